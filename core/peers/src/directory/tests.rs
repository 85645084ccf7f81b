use mesh_core::node::Load;
use proptest::{collection::vec, prelude::*};

use super::*;
use crate::{advert::VERSION, samples::offer};

const fn node(index: u8) -> NodeId {
    NodeId([index; 32])
}

const ME: NodeId = node(255);

const fn at(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

fn advert(index: u8, incarnation: u64, sequence: u64, models: &[&str]) -> Advert {
    Advert {
        version: VERSION,
        node: node(index),
        name: format!("node-{index}"),
        incarnation,
        sequence,
        lease_ms: 5000,
        leaving: false,
        offers: models.iter().map(|name| offer(name)).collect(),
    }
}

fn directory() -> Directory {
    Directory::new(ME, Bounds::default())
}

fn who(directory: &Directory, model: &str, now: Duration) -> Vec<NodeId> {
    directory.offers(model, now).into_iter().map(|candidate| candidate.node).collect()
}

#[test]
fn the_later_advert_wins() {
    let mut directory = directory();
    assert_eq!(directory.hear(advert(1, 10, 5, &["a"]), at(0)), Heard::New);
    assert_eq!(directory.hear(advert(1, 10, 5, &["a"]), at(1)), Heard::Stale);
    assert_eq!(directory.hear(advert(1, 10, 4, &["b"]), at(2)), Heard::Stale);
    assert_eq!(directory.hear(advert(1, 9, 9, &["b"]), at(3)), Heard::Stale);
    assert_eq!(directory.hear(advert(1, 10, 6, &["a"]), at(4)), Heard::Refreshed);
    assert_eq!(directory.hear(advert(1, 10, 7, &["a", "b"]), at(5)), Heard::Changed);
    assert_eq!(directory.hear(advert(1, 11, 0, &["c"]), at(6)), Heard::Changed);
    assert_eq!(who(&directory, "a", at(7)), []);
    assert_eq!(who(&directory, "c", at(7)), [node(1)]);
    assert_eq!(directory.hear(Advert { node: ME, ..advert(1, 99, 0, &["a"]) }, at(8)), Heard::Stale);
}

#[test]
fn a_lease_is_over_exactly_when_it_is() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a"]), at(1000));
    assert_eq!(directory.next_expiry(), Some(at(6000)));
    let before = at(6000) - Duration::from_nanos(1);
    assert_eq!(who(&directory, "a", before), [node(1)]);
    assert_eq!(directory.expire(before), []);
    assert_eq!(who(&directory, "a", at(6000)), []);
    assert_eq!(directory.expire(at(6000)), [node(1)]);
    assert_eq!(directory.next_expiry(), None);
    // What was said before the lease ended does not come back.
    assert_eq!(directory.hear(advert(1, 1, 0, &["a"]), at(6001)), Heard::Stale);
    assert_eq!(directory.missing(), [node(1)]);
    assert_eq!(directory.hear(advert(1, 1, 1, &["a"]), at(6002)), Heard::New);
    assert_eq!(directory.missing(), []);
}

#[test]
fn who_leaves_is_gone_and_stays_so() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a"]), at(0));
    assert_eq!(directory.hear(Advert { leaving: true, ..advert(1, 1, 2, &["a"]) }, at(1)), Heard::Left);
    assert_eq!(who(&directory, "a", at(2)), []);
    assert_eq!(directory.hear(advert(1, 1, 1, &["a"]), at(3)), Heard::Stale);
    assert_eq!(directory.hear(advert(1, 2, 0, &["a"]), at(4)), Heard::New);
    assert_eq!(directory.missing(), []);
}

#[test]
fn a_lost_node_is_routed_to_again_once_it_is_heard() {
    type Sign = fn(&mut Directory);
    let signs: [(&str, Sign); 4] = [
        ("a later sequence", |directory| assert_eq!(directory.hear(advert(1, 1, 1, &["a"]), at(20)), Heard::Changed)),
        ("a later start", |directory| assert_eq!(directory.hear(advert(1, 2, 0, &["a"]), at(20)), Heard::Changed)),
        ("a pulse", |directory| {
            let pulse = Pulse { incarnation: 1, sequence: 0, next_ms: 1000, loads: Vec::new() };
            assert_eq!(directory.pulse(node(1), &pulse, None, at(20)), Pulsed::Applied);
        }),
        ("a connection", |directory| directory.reached(node(1), Some(at(3)), at(20))),
    ];
    for (sign, show) in signs {
        let mut directory = directory();
        directory.hear(advert(1, 1, 0, &["a"]), at(0));
        let loss = Loss { node: node(1), incarnation: 1, sequence: 0 };
        assert_eq!(directory.lost(node(1), at(10)), Some(loss));
        assert_eq!(directory.lost(node(1), at(10)), None, "it is told once");
        assert_eq!(who(&directory, "a", at(11)), []);
        assert_eq!(directory.missing(), [node(1)]);
        assert_eq!(directory.hear(advert(1, 1, 0, &["a"]), at(12)), Heard::Stale);
        assert_eq!(who(&directory, "a", at(13)), []);
        show(&mut directory);
        assert_eq!(who(&directory, "a", at(21)), [node(1)], "{sign}");
    }
}

#[test]
fn what_others_lost_is_believed_unless_it_is_here() {
    let mut directory = directory();
    let loss = |index, sequence| Loss { node: node(index), incarnation: 1, sequence };
    directory.hear(advert(1, 1, 3, &["a"]), at(0));
    assert_eq!(directory.report(&loss(1, 2), at(1)), Reported::Ignored, "it was heard since");
    assert_eq!(directory.report(&loss(2, 0), at(1)), Reported::Ignored, "nobody knows it");
    assert_eq!(directory.report(&Loss { node: ME, ..loss(1, 0) }, at(1)), Reported::Mine);
    directory.reached(node(1), None, at(1));
    assert_eq!(directory.report(&loss(1, 3), at(2)), Reported::Ignored, "it is connected");
    assert_eq!(who(&directory, "a", at(2)), [node(1)]);
    directory.closed(node(1));
    assert_eq!(directory.report(&loss(1, 3), at(3)), Reported::Believed);
    assert_eq!(who(&directory, "a", at(3)), []);
    assert_eq!(directory.report(&loss(1, 3), at(4)), Reported::Ignored, "it is known");
}

#[test]
fn who_hears_few_pulses_of_a_node_believes_those_who_hear_many() {
    for next_ms in [250, 1000, 10_000] {
        let mut directory = directory();
        directory.hear(advert(1, 1, 3, &["a"]), at(0));
        directory.pulse(node(1), &Pulse { incarnation: 1, sequence: 3, next_ms, loads: Vec::new() }, None, at(100));
        let loss = Loss { node: node(1), incarnation: 1, sequence: 3 };
        assert_eq!(directory.report(&loss, at(600)), Reported::Ignored, "{next_ms}: it was heard just now");
        assert_eq!(directory.report(&loss, at(601)), Reported::Believed, "{next_ms}");
        let lost = |directory: &Directory, model: &str, now: u64| -> Vec<String> {
            directory.lost_offers(model, at(now)).into_iter().map(|(name, _)| name).collect()
        };
        assert_eq!(lost(&directory, "a", 601), ["node-1"]);
        assert_eq!(lost(&directory, "a@node-1", 601), ["node-1"]);
        assert_eq!(lost(&directory, "b", 601), [""; 0]);
        // Its lease began with its latest pulse.
        assert_eq!(lost(&directory, "a", 5100), [""; 0], "and its lease is over");
        directory.reached(node(1), None, at(700));
        assert_eq!(lost(&directory, "a", 700), [""; 0], "and it is there");
    }
}

#[test]
fn pulses_bring_loads_and_prolong_the_lease() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a", "b"]), at(0));
    let busy = Load { running: 3, waiting: 1, prefill_per_s: Some(900.0), decode_per_s: None };
    let pulse = Pulse { incarnation: 1, sequence: 0, next_ms: 250, loads: vec![(1, busy), (7, busy)] };
    assert_eq!(directory.pulse(node(1), &pulse, Some(at(12)), at(4000)), Pulsed::Applied);
    let found = &directory.offers("b", at(4100))[0];
    assert_eq!((found.offer.load, found.round_trip, found.silent), (busy, Some(at(12)), at(100)));
    assert!(found.connected && found.overdue.is_zero());
    assert_eq!(directory.offers("a", at(4100))[0].offer.load, Load::default());
    assert_eq!(directory.next_expiry(), Some(at(9000)));
    assert_eq!(directory.offers("b", at(4350))[0].overdue, at(100));

    let ahead = Pulse { sequence: 1, loads: vec![(0, busy)], ..pulse.clone() };
    assert_eq!(directory.pulse(node(1), &ahead, None, at(4200)), Pulsed::Ahead);
    assert_eq!(directory.offers("a", at(4200))[0].offer.load, Load::default(), "of an advert that is not known");
    assert_eq!(directory.pulse(node(1), &Pulse { incarnation: 0, ..pulse.clone() }, None, at(4200)), Pulsed::Stale);
    assert_eq!(directory.pulse(node(2), &pulse, None, at(4200)), Pulsed::Stale);
    assert_eq!(directory.pulse(node(1), &Pulse { incarnation: 2, ..pulse.clone() }, None, at(4300)), Pulsed::Ahead);
    assert_eq!(who(&directory, "a", at(4300)), [], "it was started anew, and what it offers now is not known");
    assert_eq!(directory.pulse(node(1), &pulse, None, at(90_000)), Pulsed::Stale, "its lease is over");
}

#[test]
fn a_connection_that_is_quiet_is_noticed() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a"]), at(0));
    let pulse = Pulse { incarnation: 1, sequence: 0, next_ms: 200, loads: Vec::new() };
    directory.pulse(node(1), &pulse, None, at(1000));
    assert_eq!(directory.quiet(at(1600)), []);
    assert_eq!(directory.quiet(at(1601)), [node(1)]);
    // A node that stood still itself has nobody to blame.
    directory.stood_still(at(300));
    assert_eq!(directory.quiet(at(1900)), []);
    assert_eq!(directory.quiet(at(1901)), [node(1)]);
    directory.lost(node(1), at(1901));
    assert_eq!(directory.quiet(at(9000)), []);
}

#[test]
fn a_revoked_node_is_not_heard_any_more() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a"]), at(0));
    directory.revoke(node(1));
    assert_eq!(who(&directory, "a", at(1)), []);
    assert_eq!(directory.hear(advert(1, 9, 0, &["a"]), at(2)), Heard::Refused(Refused::Revoked));
    assert!(directory.nodes(at(3)).is_empty());
}

#[test]
fn nodes_are_addressed_by_name_and_by_id() {
    let mut directory = directory();
    directory.hear(advert(1, 1, 0, &["a", "b@c"]), at(0));
    directory.hear(Advert { name: "twin".into(), ..advert(2, 1, 0, &["a"]) }, at(0));
    directory.hear(Advert { name: "twin".into(), ..advert(3, 1, 0, &["a"]) }, at(0));
    let now = at(1);
    assert_eq!(who(&directory, "a", now), [node(1), node(2), node(3)]);
    assert_eq!(who(&directory, "a@node-1", now), [node(1)]);
    assert_eq!(who(&directory, &format!("a@{}", node(2)), now), [node(2)]);
    assert_eq!(who(&directory, &format!("a@{}", node(2).short()), now), [node(2)]);
    assert_eq!(who(&directory, "b@c", now), [node(1)]);
    for nobody in ["a@twin", "a@", "a@nobody", "b@node-1", "@node-1", "", "@"] {
        assert_eq!(who(&directory, nobody, now), [], "{nobody}");
    }
    let twin = format!("twin-{}", node(3).short());
    assert_eq!(who(&directory, &format!("a@{twin}"), now), [node(3)]);
    let models = directory.models(now);
    assert_eq!(models.iter().map(|model| model.name.as_str()).collect::<Vec<_>>(), ["a", "b@c"]);
    let names: Vec<_> = models[0].nodes.iter().map(|offered| offered.node.clone()).collect();
    assert_eq!(names, ["node-1".to_owned(), format!("twin-{}", node(2).short()), twin]);
    assert_eq!(directory.nodes(now)[0].lease_left, at(4999));
}

#[test]
fn nobody_takes_the_place_of_others() {
    let bounds = Bounds { members_max: 4, offers_max: 3, node_bytes_max: 6000, total_bytes_max: 16_000 };
    let mut directory = Directory::new(ME, bounds);
    let many = ["a", "b", "c", "d"];
    assert_eq!(
        directory.hear(advert(1, 1, 0, &many), at(0)),
        Heard::Refused(Refused::Offers { found: 4, max: 3 }),
        "by name, and nothing of it is kept"
    );
    assert!(directory.is_empty());
    let big = |index, bytes: usize| {
        let mut advert = advert(index, 1, 0, &["a"]);
        let rest = bytes - advert.weight_bytes();
        Arc::make_mut(&mut advert.offers[0]).name = "a".repeat(rest + 1);
        advert
    };
    assert!(matches!(directory.hear(big(1, 6001), at(0)), Heard::Refused(Refused::Bytes { max: 6000, .. })));
    assert_eq!(directory.hear(big(1, 6000), at(0)), Heard::New);
    assert_eq!(directory.hear(big(2, 6000), at(0)), Heard::New);
    // 8000 bytes are for all that need more than 2000, and two have taken 4000 of them each.
    assert!(matches!(directory.hear(big(3, 2001), at(0)), Heard::Refused(Refused::Bytes { max: 2000, .. })));
    assert_eq!(directory.hear(big(3, 2000), at(0)), Heard::New);
    assert_eq!(directory.hear(advert(4, 1, 0, &["a"]), at(0)), Heard::New);
    assert_eq!(directory.hear(advert(5, 1, 0, &["a"]), at(0)), Heard::Refused(Refused::Members { max: 4 }));
    directory.hear(Advert { leaving: true, ..advert(1, 1, 1, &[]) }, at(1));
    assert_eq!(directory.hear(big(5, 6000), at(1)), Heard::New);
}

#[test]
fn a_snapshot_gives_what_is_known_and_no_longer_leases() {
    let mut old = directory();
    for index in 1..=100 {
        old.hear(advert(index, 1, 0, &["a"]), at(u64::from(index)));
    }
    old.lost(node(7), at(1000));
    let snapshots = old.snapshot(Arc::new(Advert { node: ME, ..advert(0, 1, 0, &["a"]) }), at(2000));
    let mut new = Directory::new(node(200), Bounds::default());
    for snapshot in snapshots {
        let snapshot = Snapshot::decode(&snapshot.encode()).unwrap();
        for Held { age_ms, advert } in snapshot.held {
            assert_eq!(new.hear_aged(advert, at(age_ms.into()), at(12_000)), Heard::New);
        }
    }
    assert_eq!(new.len(), 100, "99 of a hundred, and the one that tells");
    assert_eq!(new.next_expiry(), Some(at(15_001)), "what was heard first has 3001 ms left");
}

#[derive(Clone, Debug)]
enum Step {
    Hear(Advert, u64),
    Pulse(u8, u64, u64),
    Reached(u8),
    Lost(u8),
    Closed(u8),
    Report(u8, u64, u64),
    Revoke(u8),
    Pass(u64),
    Expire,
}

const MODELS: [&str; 3] = ["a", "b", "c"];

fn any_advert() -> impl Strategy<Value = Advert> {
    (0..4_u8, 0..3_u64, 0..4_u64, 1..8_u32, prop::bool::weighted(0.1), 0..8_u8).prop_map(
        |(index, incarnation, sequence, lease, leaving, set)| {
            let models: Vec<_> = (0..3).filter(|bit| set >> bit & 1 == 1).map(|bit| MODELS[bit]).collect();
            Advert { lease_ms: lease * 1000, leaving, ..advert(index, incarnation, sequence, &models) }
        },
    )
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (any_advert(), prop_oneof![Just(0), 0..4000_u64]).prop_map(|(advert, age)| Step::Hear(advert, age)),
        2 => (0..4_u8, 0..3_u64, 0..4_u64).prop_map(|(index, start, sequence)| Step::Pulse(index, start, sequence)),
        1 => (0..4_u8).prop_map(Step::Reached),
        2 => (0..4_u8).prop_map(Step::Lost),
        1 => (0..4_u8).prop_map(Step::Closed),
        2 => (0..4_u8, 0..3_u64, 0..4_u64).prop_map(|(index, start, sequence)| Step::Report(index, start, sequence)),
        1 => prop::bool::weighted(0.1).prop_flat_map(|revoke| (0..4_u8).prop_map(move |index| {
            if revoke { Step::Revoke(index) } else { Step::Expire }
        })),
        4 => (1..4000_u64).prop_map(Step::Pass),
    ]
}

/// What should be true of one node, in the words of the invariant.
#[derive(Default)]
struct Should {
    latest: Option<Advert>,
    until: Duration,
    lost: bool,
    revoked: bool,
    /// Until when a pulse has to come, of one that is connected.
    expected: Option<Duration>,
}

impl Should {
    fn is_later(&self, start: u64, sequence: u64) -> bool {
        self.latest.as_ref().is_none_or(|latest| (start, sequence) > (latest.incarnation, latest.sequence))
    }

    fn held(&self, now: Duration) -> Option<&Advert> {
        self.latest.as_ref().filter(|latest| !latest.leaving && !self.revoked && now < self.until)
    }

    fn routable(&self, now: Duration) -> Option<&Advert> {
        self.held(now).filter(|_| !self.lost)
    }

    fn step(&mut self, step: &Step, now: Duration) {
        match step {
            Step::Hear(advert, age) if !self.revoked && self.is_later(advert.incarnation, advert.sequence) => {
                let lease = u64::from(advert.lease_ms);
                if advert.leaving || *age < lease {
                    let restarted = self.latest.as_ref().is_none_or(|old| old.incarnation != advert.incarnation);
                    if restarted || self.lost || self.held(now).is_none() {
                        self.expected = None;
                    }
                    self.until = now + at(lease.saturating_sub(*age));
                    self.latest = Some(advert.clone());
                    self.lost = false;
                }
            }
            Step::Pulse(_, start, _) => {
                if let Some(advert) = self.held(now).filter(|advert| *start >= advert.incarnation) {
                    let same = *start == advert.incarnation;
                    let lease = at(advert.lease_ms.into());
                    self.until = if same { self.until.max(now + lease) } else { self.until };
                    self.lost = !same;
                    self.expected = Some(now + PULSE_USED * 2);
                }
            }
            Step::Reached(_) if self.held(now).is_some() => {
                self.lost = false;
                self.expected = Some(now + PULSE_USED * 2);
            }
            Step::Lost(_) if self.held(now).is_some() => {
                self.lost = true;
                self.expected = None;
            }
            Step::Closed(_) => self.expected = None,
            Step::Report(_, start, sequence)
                if self.held(now).is_some()
                    && self.expected.is_none_or(|expected| now > expected)
                    && self.latest.as_ref().is_some_and(|latest| !latest.is_later_than(*start, *sequence)) =>
            {
                self.lost = true;
                self.expected = None;
            }
            Step::Revoke(_) => self.revoked = true,
            _ => {}
        }
    }
}

fn apply(directory: &mut Directory, step: &Step, now: Duration) {
    match step {
        Step::Hear(advert, age) => _ = directory.hear_aged(advert.clone(), at(*age), now),
        Step::Pulse(index, incarnation, sequence) => {
            let pulse = Pulse { incarnation: *incarnation, sequence: *sequence, next_ms: 1000, loads: Vec::new() };
            directory.pulse(node(*index), &pulse, None, now);
        }
        Step::Reached(index) => directory.reached(node(*index), None, now),
        Step::Lost(index) => _ = directory.lost(node(*index), now),
        Step::Closed(index) => directory.closed(node(*index)),
        Step::Report(index, incarnation, sequence) => {
            let loss = Loss { node: node(*index), incarnation: *incarnation, sequence: *sequence };
            directory.report(&loss, now);
        }
        Step::Revoke(index) => directory.revoke(node(*index)),
        Step::Pass(_) => {}
        Step::Expire => _ = directory.expire(now),
    }
}

fn about(step: &Step) -> Option<u8> {
    match step {
        Step::Hear(advert, _) => Some(advert.node.0[0]),
        Step::Pulse(index, ..) | Step::Report(index, ..) => Some(*index),
        Step::Reached(index) | Step::Lost(index) | Step::Closed(index) | Step::Revoke(index) => Some(*index),
        Step::Pass(_) | Step::Expire => None,
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn advertised_means_routable(steps in vec(any_step(), 1..60)) {
        let mut directory = directory();
        let mut should: Vec<Should> = (0..4).map(|_| Should::default()).collect();
        let mut now = Duration::ZERO;
        for step in &steps {
            apply(&mut directory, step, now);
            if let Some(index) = about(step) {
                should[usize::from(index)].step(step, now);
            }
            if let Step::Pass(ms) = step {
                now += at(*ms);
            }
            for model in MODELS {
                let offering = |advert: &Advert| advert.offers.iter().any(|offer| offer.name == model);
                let expected: Vec<NodeId> = (0..4_u8)
                    .filter(|index| should[usize::from(*index)].routable(now).is_some_and(offering))
                    .map(node)
                    .collect();
                prop_assert_eq!(who(&directory, model, now), expected, "{} after {:?}", model, step);
            }
            let connected = directory.members.iter().filter(|(_, member)| member.due.is_some()).map(|(node, _)| *node);
            prop_assert!(connected.eq(directory.connected.iter().copied()));
            let held = should.iter().filter(|node| node.held(now).is_some()).count();
            prop_assert_eq!(directory.nodes(now).len(), held);
        }
    }

    #[test]
    fn the_order_of_arrival_does_not_matter(adverts in vec(any_advert(), 1..12), order in vec(any::<prop::sample::Index>(), 30)) {
        // Two different adverts of one number would be a lie, which nothing has to put in order.
        let mut distinct = adverts;
        distinct.sort_by_key(|advert| (advert.node, advert.incarnation, advert.sequence));
        distinct.dedup_by_key(|advert| (advert.node, advert.incarnation, advert.sequence));
        let mut straight = directory();
        for advert in &distinct {
            straight.hear(advert.clone(), at(0));
        }
        let mut shuffled = directory();
        for advert in order.iter().map(|index| index.get(&distinct)).chain(distinct.iter().rev()) {
            shuffled.hear(advert.clone(), at(0));
        }
        for now in [at(0), at(2000), at(5000)] {
            prop_assert_eq!(straight.nodes(now), shuffled.nodes(now));
            prop_assert_eq!(straight.models(now), shuffled.models(now));
            prop_assert_eq!(straight.expire(now).len(), shuffled.expire(now).len());
        }
    }

    #[test]
    fn whoever_comes_has_its_share(weights in vec((0..12_u8, 1..40_usize, 0..4_u64), 1..60)) {
        let bounds = Bounds { members_max: 12, offers_max: 64, node_bytes_max: 30_000, total_bytes_max: 120_000 };
        let mut directory = Directory::new(ME, bounds);
        for (index, offers, sequence) in weights {
            let names: Vec<String> = (0..offers).map(|offer| format!("model-{offer}")).collect();
            let names: Vec<&str> = names.iter().map(String::as_str).collect();
            let advert = advert(index, 1, sequence, &names);
            let weight = advert.weight_bytes();
            let heard = directory.hear(advert, at(0));
            prop_assert!(weight > 5000 || !matches!(heard, Heard::Refused(_)), "{} bytes are its share: {:?}", weight, heard);
            let all: usize = directory.members.values().map(|member| member.weight).sum();
            prop_assert!(all <= bounds.total_bytes_max);
            let excess: usize = directory.members.values().map(|member| member.weight.saturating_sub(5000)).sum();
            prop_assert_eq!(directory.excess, excess);
        }
    }
}
