use proptest::{prelude::*, sample::Index};

use super::*;
use crate::samples;

const fn node(index: u8) -> NodeId {
    NodeId([index; 32])
}

const fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn candidate(index: u8) -> Candidate {
    Candidate {
        node: node(index),
        name: format!("node-{index}"),
        offer: samples::offer("a"),
        round_trip: Some(ms(1)),
        silent: ms(100),
        overdue: Duration::ZERO,
        connected: true,
        cached_tokens: 0,
    }
}

fn with(index: u8, change: impl FnOnce(&mut Candidate, &mut ModelOffer)) -> Candidate {
    let mut candidate = candidate(index);
    let mut offer = ModelOffer::clone(&candidate.offer);
    change(&mut candidate, &mut offer);
    candidate.offer = Arc::new(offer);
    candidate
}

const ASKED: Asked = Asked { prompt_tokens: 1000, answer_tokens_max: None, excluded: &[] };

fn chosen(candidates: &[Candidate]) -> NodeId {
    choose(candidates, &ASKED, &Policy::default(), 1).unwrap().node
}

fn any_candidate() -> impl Strategy<Value = Candidate> {
    let load = (0..100_u32, 0..100_u32, prop::option::of(1.0..5000.0_f32), prop::option::of(1.0..200.0_f32));
    let rest =
        (0..8_u32, 0..20_u32, prop::option::of(0..500_u64), 0..60_000_u64, 0..3000_u64, any::<bool>(), 0..4000_u32);
    (any::<u8>(), load, rest).prop_map(|(index, (running, waiting, prefill_per_s, decode_per_s), rest)| {
        let (parallel, queued, round_trip, silent, overdue, connected, cached) = rest;
        with(index, |candidate, offer| {
            offer.load = mesh_core::node::Load { running, waiting, prefill_per_s, decode_per_s };
            offer.capabilities.requests_parallel_max = parallel;
            offer.capabilities.requests_queued_max = queued;
            candidate.round_trip = round_trip.map(ms);
            (candidate.silent, candidate.overdue) = (ms(silent), ms(overdue));
            (candidate.connected, candidate.cached_tokens) = (connected, cached);
        })
    })
}

proptest! {
    #[test]
    fn worse_is_never_expected_sooner(
        better in any_candidate(),
        queue in 0..50_u32,
        running in 0..50_u32,
        round_trip in 0..500_u64,
        silent in 0..60_000_u64,
        overdue in 0..5000_u64,
        uncached in 0..4000_u32,
    ) {
        let policy = Policy::default();
        let asked = Asked { prompt_tokens: 4000, ..ASKED };
        let total = |candidate: &Candidate| expect(candidate, &asked, &policy).total;
        let worse = |change: &dyn Fn(&mut Candidate, &mut ModelOffer)| {
            let mut worse = better.clone();
            let mut offer = ModelOffer::clone(&worse.offer);
            change(&mut worse, &mut offer);
            worse.offer = Arc::new(offer);
            total(&worse)
        };
        prop_assert!(worse(&|_, offer| offer.load.waiting += queue) >= total(&better));
        prop_assert!(worse(&|_, offer| offer.load.running += running) >= total(&better));
        if better.round_trip.is_some() {
            prop_assert!(worse(&|worse, _| *worse.round_trip.as_mut().unwrap() += ms(round_trip)) >= total(&better));
        }
        prop_assert!(worse(&|worse, _| worse.silent += ms(silent)) >= total(&better));
        prop_assert!(worse(&|worse, _| worse.overdue += ms(overdue)) >= total(&better));
        prop_assert!(worse(&|worse, _| worse.cached_tokens = worse.cached_tokens.saturating_sub(uncached)) >= total(&better));
        prop_assert!(worse(&|worse, _| worse.connected = false) >= total(&better));
    }

    #[test]
    fn the_choice_is_the_same_for_the_same_and_has_everybody(
        candidates in prop::collection::vec(any_candidate(), 1..12),
        salt in any::<u64>(),
        excluded in any::<Index>(),
        turn in any::<Index>(),
    ) {
        let mut candidates = candidates;
        candidates.sort_by_key(|candidate| candidate.node);
        candidates.dedup_by_key(|candidate| candidate.node);
        let excluded = [excluded.get(&candidates).node];
        let (policy, asked) = (Policy::default(), Asked { excluded: &excluded, ..ASKED });
        let choice = choose(&candidates, &asked, &policy, salt);
        let mut turned = candidates.clone();
        turned.rotate_left(turn.index(candidates.len()));
        prop_assert_eq!(&choose(&turned, &asked, &policy, salt), &choice);
        let Some(choice) = choice else {
            prop_assert_eq!(candidates.len(), 1);
            return Ok(());
        };
        prop_assert_eq!(choice.node, choice.ranked[0].0);
        let mut ranked: Vec<_> = choice.ranked.iter().map(|(node, _)| *node).collect();
        ranked.sort();
        let expected: Vec<_> = candidates.iter().map(|candidate| candidate.node).filter(|node| *node != excluded[0]).collect();
        prop_assert_eq!(ranked, expected);
        // Full ones last, and nobody before one who is better by more than a tie.
        for pair in choice.ranked.windows(2) {
            let (first, second) = (pair[0].1, pair[1].1);
            prop_assert!(first.full <= second.full);
            let tie = second.total.mul_f64(1.1 + 1e-6) + ms(5);
            prop_assert!(first.full != second.full || first.total <= tie, "{:?} before {:?}", first, second);
        }
    }
}

#[test]
fn the_sooner_one_is_asked() {
    let worse: [fn(&mut Candidate, &mut ModelOffer); 6] = [
        |_, offer| (offer.load.running, offer.load.waiting) = (4, 2),
        |_, offer| offer.load.prefill_per_s = Some(50.0),
        |candidate, _| candidate.round_trip = Some(ms(1500)),
        |candidate, _| candidate.overdue = ms(1000),
        |candidate, _| candidate.silent = Duration::from_secs(300),
        |_, offer| offer.load.decode_per_s = Some(0.5),
    ];
    for (index, worse) in worse.into_iter().enumerate() {
        let (one, other) = (with(1, worse), with(2, worse));
        assert_eq!(chosen(&[one, candidate(2)]), node(2), "{index}");
        assert_eq!(chosen(&[candidate(1), other]), node(1), "{index}");
    }
    assert_eq!(choose(&[], &ASKED, &Policy::default(), 1), None);
}

#[test]
fn a_prefix_counts_as_the_time_it_saves() {
    let knows = |index, tokens| with(index, |candidate, _| candidate.cached_tokens = tokens);
    assert_eq!(chosen(&[knows(1, 0), knows(2, 900)]), node(2));
    assert_eq!(chosen(&[knows(1, 900), knows(2, 0)]), node(1));
    // Not at any price: somebody else reads it all before a place is free there.
    let busy = with(1, |candidate, offer| {
        candidate.cached_tokens = 900;
        (offer.load.running, offer.load.waiting) = (4, 8);
    });
    assert_eq!(chosen(&[busy, candidate(2)]), node(2));
    let forgets = with(1, |candidate, offer| (candidate.cached_tokens, offer.capabilities.prefix_reuse) = (900, false));
    let expected = expect(&forgets, &ASKED, &Policy::default());
    assert_eq!(expected.prefill, expect(&candidate(1), &ASKED, &Policy::default()).prefill);
}

#[test]
fn a_full_node_is_asked_last_and_not_never() {
    let full = with(1, |_, offer| (offer.load.running, offer.load.waiting) = (4, 16));
    let slow = with(2, |_, offer| offer.load.prefill_per_s = Some(1.0));
    let choice = choose(&[full.clone(), slow], &ASKED, &Policy::default(), 1).unwrap();
    assert_eq!(choice.ranked.iter().map(|(node, _)| *node).collect::<Vec<_>>(), [node(2), node(1)]);
    assert_eq!(chosen(&[full]), node(1));
    let short = with(1, |_, offer| offer.capabilities.context_tokens_max = 999);
    assert!(expect(&short, &ASKED, &Policy::default()).full);
}

#[test]
fn equals_share_by_salt() {
    let all: Vec<_> = (0..10).map(candidate).collect();
    let mut counts = [0_u32; 10];
    for salt in 0..1000 {
        counts[usize::from(choose(&all, &ASKED, &Policy::default(), salt).unwrap().node.0[0])] += 1;
    }
    assert!(counts.iter().all(|count| (50..200).contains(count)), "{counts:?}");
}

#[test]
fn reasons_say_what_counted() {
    let candidate = with(1, |candidate, offer| {
        candidate.cached_tokens = 600;
        (offer.load.running, offer.load.waiting) = (4, 16);
    });
    let choice = choose(&[candidate], &ASKED, &Policy::default(), 1).unwrap();
    for part in
        ["node-1 (0101010101)", "1 ms on the way", "ms in line", "ms reading", "about 600 tokens read before", "full"]
    {
        assert!(choice.reasons[0].contains(part), "{part}: {:?}", choice.reasons);
    }
}

#[test]
fn numbers_of_any_size_add_up() {
    let absurd = with(1, |candidate, offer| {
        candidate.round_trip = Some(Duration::MAX);
        (candidate.silent, candidate.overdue) = (Duration::MAX, Duration::MAX);
        (offer.load.running, offer.load.waiting) = (u32::MAX, u32::MAX);
        (offer.load.prefill_per_s, offer.load.decode_per_s) = (Some(f32::MIN_POSITIVE), Some(f32::NAN));
    });
    let policy =
        Policy { affinity: f32::NAN, company: f32::INFINITY, tie: f32::NAN, prefill_per_s: -1.0, ..Policy::default() };
    assert!(expect(&absurd, &ASKED, &policy).total > Duration::from_secs(3600));
    assert!(choose(&[absurd], &ASKED, &policy, 0).is_some());
}

#[test]
fn this_machine_then_a_peer_then_a_load() {
    let policy = Policy::default();
    let peer = expect(&candidate(1), &ASKED, &policy);
    let full = Expected { full: true, ..peer };
    let busy = LocalState::Ready { running: 4, waiting: 12, parallel: 4 };
    let free = LocalState::Ready { running: 0, waiting: 0, parallel: 4 };
    let to = |local, best: Option<&Expected>, policy: &Policy| place(local, best, policy).0;
    assert_eq!(to(busy, Some(&peer), &policy), Place::Here);
    assert_eq!(to(LocalState::Cold, Some(&peer), &policy), Place::There);
    assert_eq!(to(LocalState::Cold, Some(&full), &policy), Place::LoadHere);
    assert_eq!(to(LocalState::Cold, None, &policy), Place::LoadHere);
    assert_eq!(to(LocalState::NotHere, Some(&full), &policy), Place::There);
    assert_eq!(to(LocalState::NotHere, None, &policy), Place::Nowhere);

    let fastest = Policy { prefer: Prefer::Fastest, ..Policy::default() };
    assert_eq!(to(busy, Some(&peer), &fastest), Place::There);
    assert_eq!(to(busy, Some(&full), &fastest), Place::Here);
    assert_eq!(to(free, Some(&peer), &fastest), Place::Here);
    let local_first = Policy { cold: Cold::LocalFirst, ..Policy::default() };
    assert_eq!(to(LocalState::Cold, Some(&peer), &local_first), Place::LoadHere);
}

#[test]
fn numbers_are_set_by_name_and_others_are_as_they_were() {
    let policy: Policy = serde_json::from_str(r#"{ "prefer": "fastest", "failed_try_ms": 50 }"#).unwrap();
    assert_eq!(policy, Policy { prefer: Prefer::Fastest, failed_try_ms: 50.0, ..Policy::default() });
    assert!(serde_json::from_str::<Policy>(r#"{ "hazzard": 1 }"#).unwrap_err().to_string().contains("hazzard"));
}
