//! What draws come to, row by row and in any company.

use std::collections::BTreeSet;

use mesh_core::{Dry, Sampling, TokenLogprob, Xtc};
use mesh_graph::ffi;
use mlx_rs::Array;
use proptest::prelude::*;

use super::*;

const VOCAB: usize = 6;
const LOGITS: [f32; VOCAB] = [2.0, 1.0, 0.5, 0.0, -1.0, 1.5];

/// Draws once for each sampler, all in one batch, after having fed token 3; each row has its own logits, end to end.
fn draw_rows(logits: &[f32], samplers: &mut [Sampler], known: Vec<Known>) -> (Vec<u32>, Vec<Option<TokenLogprob>>) {
    // A GPU where there is one: what holds here has to hold there.
    ffi::use_device(ffi::device_facts().kind);
    let count = samplers.len() as i32;
    let logits = Array::from_slice(logits, &[count, 1, logits.len() as i32 / count]);
    let fed = Array::from_slice(&vec![3_u32; samplers.len()], &[count, 1]);
    let mut rows: Vec<Row<'_>> =
        samplers.iter_mut().zip(known).map(|(sampler, known)| Row { sampler, known }).collect();
    let drawn = draw(&logits, &fed, &mut rows, &mut Masks::default()).unwrap();
    assert_eq!(drawn.tokens.shape(), [count, 1]);
    drawn.tokens.eval().unwrap();
    let tokens = drawn.tokens.to_vec_exact::<u32>().unwrap();
    let likely = drawn.likely.iter().zip(&tokens);
    let likely = likely.map(|(likely, token)| likely.as_ref().map(|likely| likely.read(*token).unwrap())).collect();
    (tokens, likely)
}

/// The same, all from the same logits.
fn draw_all(samplers: &mut [Sampler], written: bool) -> Vec<u32> {
    let known = samplers.iter().map(|_| Known { position: u32::from(written), ..Known::default() }).collect();
    draw_rows(&LOGITS.repeat(samplers.len()), samplers, known).0
}

fn shares(sampling: &Sampling) -> [f32; VOCAB] {
    shares_of(&LOGITS, sampling, None)
}

/// How often each token is drawn.
fn shares_of(logits: &[f32; VOCAB], sampling: &Sampling, mask: Option<Mask>) -> [f32; VOCAB] {
    const DRAWS: usize = 4000;
    let mut samplers: Vec<Sampler> = (0..DRAWS)
        .map(|seed| Sampler::new(&Sampling { seed: Some(seed as u64), ..sampling.clone() }, VOCAB as u32, 0))
        .collect();
    let mut counts = [0.0; VOCAB];
    let known = (0..DRAWS).map(|_| Known { mask: mask.clone(), ..Known::default() }).collect();
    let (drawn, _) = draw_rows(&logits.repeat(DRAWS), &mut samplers, known);
    drawn.into_iter().for_each(|id| counts[id as usize] += 1.0 / DRAWS as f32);
    counts
}

fn mask(vocab: usize, allowed: impl IntoIterator<Item = u32>) -> Mask {
    let fill = |words: &mut [u32]| {
        allowed.into_iter().for_each(|id| words[id as usize / 32] |= 1 << (id % 32));
        Ok::<(), ()>(())
    };
    Mask::filled(vocab as u32, fill).unwrap()
}

/// The probabilities of `logits`, those of `out` left out.
fn likely(logits: [f32; VOCAB], out: &[usize]) -> [f32; VOCAB] {
    let mut weights = logits.map(f32::exp);
    out.iter().for_each(|id| weights[*id] = 0.0);
    let sum: f32 = weights.iter().sum();
    weights.map(|weight| weight / sum)
}

fn assert_close(found: [f32; VOCAB], expected: [f32; VOCAB], what: &str) {
    let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(worst < 0.03, "{what}: {found:?} instead of {expected:?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(expected > 0.0 || *found == 0.0, "{what}: something was drawn that is left out");
    }
}

#[test]
fn draws_follow_the_distribution_that_is_asked_for() {
    let plain = Sampling { temperature: Some(1.0), ..Sampling::default() };
    assert_close(shares(&plain), likely(LOGITS, &[]), "plain");
    let warm = Sampling { temperature: Some(2.0), ..Sampling::default() };
    assert_close(shares(&warm), likely(LOGITS.map(|logit| logit / 2.0), &[]), "temperature");
    let top_k = Sampling { top_k: Some(2), ..Sampling::default() };
    assert_close(shares(&top_k), likely(LOGITS, &[1, 2, 3, 4]), "top_k");
    // 0.42, 0.25 and 0.15 come first; the third is what takes the sum beyond 0.7.
    let top_p = Sampling { top_p: Some(0.7), ..Sampling::default() };
    assert_close(shares(&top_p), likely(LOGITS, &[2, 3, 4]), "top_p");
    let min_p = Sampling { min_p: Some(0.3), ..Sampling::default() };
    assert_close(shares(&min_p), likely(LOGITS, &[2, 3, 4]), "min_p");
    let bias = Sampling { logit_bias: [(4, 3.0), (0, -100.0)].into(), ..Sampling::default() };
    assert_close(shares(&bias), likely([2.0, 1.0, 0.5, 0.0, 2.0, 1.5], &[0]), "logit_bias");
}

#[test]
fn penalties_are_those_of_the_tokens_so_far() {
    let best = |sampling: Sampling, tokens: &[u32], prompt: usize, written: bool| {
        let mut sampler = Sampler::new(&Sampling { temperature: Some(0.0), ..sampling }, VOCAB as u32, 0);
        sampler.begin(tokens, prompt);
        draw_all(std::slice::from_mut(&mut sampler), written)[0]
    };
    let none = Sampling::default();
    assert_eq!(best(none.clone(), &[0, 5], 0, true), 0);
    // Written tokens alone count for these two, and the prompt's too for the third.
    let presence = Sampling { presence_penalty: Some(0.6), ..none.clone() };
    assert_eq!(best(presence.clone(), &[0], 0, true), 5);
    assert_eq!(best(presence.clone(), &[0], 1, true), 0);
    assert_eq!(best(presence, &[0, 0, 0, 5], 0, true), 0, "once each, however often");
    let frequency = Sampling { frequency_penalty: Some(0.4), ..none.clone() };
    assert_eq!(best(frequency.clone(), &[0], 0, true), 0);
    assert_eq!(best(frequency, &[0, 0], 0, true), 5);
    let repetition = Sampling { repetition_penalty: Some(1.5), ..none.clone() };
    assert_eq!(best(repetition, &[0], 1, true), 5);
    // The token that was fed counts too: a bias makes it the best but for its penalty.
    let fed = Sampling { logit_bias: [(3, 2.1)].into(), frequency_penalty: Some(0.4), ..none };
    assert_eq!(best(fed.clone(), &[], 0, true), 0);
    assert_eq!(best(fed, &[], 0, false), 3, "as the prompt's last it was not written");
}

#[test]
fn a_row_gets_the_same_in_any_company() {
    let kinds = [
        Sampling { temperature: Some(0.0), ..Sampling::default() },
        Sampling { seed: Some(5), ..Sampling::default() },
        Sampling { seed: Some(6), top_k: Some(3), ..Sampling::default() },
        Sampling { seed: Some(7), top_p: Some(0.9), temperature: Some(1.7), ..Sampling::default() },
        Sampling { seed: Some(8), min_p: Some(0.05), presence_penalty: Some(1.0), ..Sampling::default() },
        Sampling { seed: Some(9), logit_bias: [(2, 4.0)].into(), ..Sampling::default() },
    ];
    let fresh = || kinds.iter().map(|kind| Sampler::new(kind, VOCAB as u32, 0)).collect::<Vec<_>>();
    let mut together = fresh();
    let mut apart = fresh();
    for _ in 0..20 {
        let company = draw_all(&mut together, true);
        let alone: Vec<u32> = apart.iter_mut().map(|one| draw_all(std::slice::from_mut(one), true)[0]).collect();
        assert_eq!(company, alone);
        // In another order, too, from the next draw on.
        together.reverse();
        apart.reverse();
    }
}

/// Logits of tokens with these probabilities.
fn of(probabilities: [f32; VOCAB]) -> [f32; VOCAB] {
    probabilities.map(f32::ln)
}

#[test]
fn typical_keeps_what_is_closest_to_the_entropy() {
    // In bits: an entropy of 2; the tokens' surprises are 1, 2, 3, 4, 5 and 5, their distances 1, 0, 1, 2, 3 and 3. The tie
    // is broken a little.
    let spread = [0.5, 0.25, 0.12, 0.0675, 0.03125, 0.03125];
    let typical = |p| shares_of(&of(spread), &Sampling { typical_p: Some(p), ..Sampling::default() }, None);
    assert_close(typical(0.2), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "the closest alone");
    assert_close(typical(0.3), likely(of(spread), &[2, 3, 4, 5]), "and the likeliest");
    assert_close(typical(0.8), likely(of(spread), &[3, 4, 5]), "and one below");
    assert_close(typical(1.0), spread, "all");
    // What narrows it further goes by what is left: of the closest alone, top-p leaves it.
    let both = Sampling { typical_p: Some(0.2), min_p: Some(0.9), top_p: Some(0.1), ..Sampling::default() };
    assert_close(shares_of(&of(spread), &both, None), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "with others");
    let greedy = Sampling { typical_p: Some(0.2), ..Sampling::greedy() };
    assert_close(shares_of(&of(spread), &greedy, None), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "greedily");
}

#[test]
fn xtc_leaves_out_top_choices_but_the_last_of_them() {
    let spread = [0.4, 0.05, 0.3, 0.05, 0.15, 0.05];
    let with = |probability, threshold, sampling: Sampling| {
        let xtc = Some(Xtc { probability, threshold });
        shares_of(&of(spread), &Sampling { xtc, ..sampling }, None)
    };
    let none = Sampling::default();
    assert_close(with(1.0, 0.2, none.clone()), likely(of(spread), &[0]), "two are at the top");
    assert_close(with(1.0, 0.1, none.clone()), likely(of(spread), &[0, 2]), "three are");
    assert_close(with(1.0, 0.35, none.clone()), spread, "one is alone");
    assert_close(with(1.0, 0.6, none.clone()), spread, "never two above a half");
    let half: Vec<f32> = likely(of(spread), &[0, 2]).iter().zip(spread).map(|(a, b)| (a + b) / 2.0).collect();
    assert_close(with(0.5, 0.1, none.clone()), half.try_into().unwrap(), "every other time");
    // Of what others left.
    let top_k = Sampling { top_k: Some(2), ..none.clone() };
    assert_close(with(1.0, 0.2, top_k), [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], "after top_k");
    assert_close(with(1.0, 0.2, Sampling::greedy()), [0.0, 0.0, 1.0, 0.0, 0.0, 0.0], "greedily");
    let hot = Sampling { temperature: Some(2.0), ..none };
    let expected = likely(of(spread).map(|logit| logit / 2.0), &[0]);
    assert_close(with(1.0, 0.2, hot), expected, "before the temperature");
}

#[test]
fn the_coin_of_xtc_takes_nothing_from_the_draw() {
    let draws = |xtc: Option<Xtc>| {
        let sampling = Sampling { seed: Some(11), min_p: Some(1e-6), xtc, ..Sampling::default() };
        let mut sampler = Sampler::new(&sampling, VOCAB as u32, 0);
        (0..40).map(|_| draw_all(std::slice::from_mut(&mut sampler), true)[0]).collect::<Vec<_>>()
    };
    let never = Xtc { probability: 1e-9, threshold: 0.1 };
    assert_eq!(draws(Some(never)), draws(None));
    assert_ne!(draws(Some(Xtc { probability: 0.5, ..never })), draws(None));
}

#[test]
fn masked_draws_follow_what_is_left() {
    let left = mask(VOCAB, [1, 3, 4]);
    let hot = Sampling { temperature: Some(2.0), ..Sampling::default() };
    let warm = LOGITS.map(|logit| logit / 2.0);
    assert_close(shares_of(&LOGITS, &hot, Some(left.clone())), likely(warm, &[0, 2, 5]), "whole");
    let top_k = Sampling { top_k: Some(2), ..hot.clone() };
    assert_close(shares_of(&LOGITS, &top_k, Some(left.clone())), likely(warm, &[0, 2, 4, 5]), "narrowed");
    let greedy = Sampling { temperature: Some(0.0), ..hot.clone() };
    assert_close(shares_of(&LOGITS, &greedy, Some(left.clone())), [0.0, 1.0, 0.0, 0.0, 0.0, 0.0], "greedy");
    // Whatever a bias or a penalty says.
    let biased = Sampling { logit_bias: [(0, 100.0)].into(), repetition_penalty: Some(0.1), ..hot };
    assert_close(shares_of(&LOGITS, &biased, Some(mask(VOCAB, [4]))), [0.0, 0.0, 0.0, 0.0, 1.0, 0.0], "one");
}

#[test]
fn masks_that_the_device_has_are_the_masks_asked_for() {
    // More than are kept, each twice, beside a row that has none.
    let mut masks = Masks::default();
    let logits = Array::from_slice(&[1.0_f32; 2 * 70], &[2, 1, 70]);
    for _ in 0..2 {
        for id in 0..70 {
            let only = mask(70, [id, (id + 7) % 70]);
            let left = masks.applied(&logits, &[None, Some(&only)]).unwrap();
            let left = left.as_dtype(Dtype::Float32).unwrap().to_vec_exact::<f32>().unwrap();
            assert!(left[..70].iter().all(|logit| *logit == 1.0), "{id}");
            let allowed = |token: &usize| left[70 + token].is_finite();
            let mut expected = [id as usize, (id as usize + 7) % 70];
            expected.sort_unstable();
            assert_eq!((0..70).filter(allowed).collect::<Vec<_>>(), expected);
        }
    }
    assert!(masks.applied(&logits, &[None, Some(&mask(33, [1]))]).is_err(), "of another vocabulary");
}

#[test]
fn a_mask_ends_with_the_vocabulary() {
    let all = |words: &mut [u32]| {
        words.fill(u32::MAX);
        Ok::<(), ()>(())
    };
    let mut mask = Mask::filled(33, all).unwrap();
    let whole = mask.clone();
    assert_eq!(mask.take(&[0, 31, 0, 33, 400]), [0, 31]);
    assert!(!mask.is_empty());
    assert_eq!(mask.take(&(0..40).collect::<Vec<_>>()), (1..31).chain([32]).collect::<Vec<_>>());
    assert!(mask.is_empty());
    mask.put(&(0..400).collect::<Vec<_>>());
    assert_eq!(mask, whole);
    assert!(Mask::filled(64, |_| Ok::<(), ()>(())).unwrap().is_empty());
    assert_eq!(Mask::filled(64, |_| Err("why")).err(), Some("why"));
}

#[test]
fn no_end_of_text_comes_before_it_may() {
    let sampling = Sampling { logit_bias: [(2, 50.0), (4, 50.0)].into(), ..Sampling::greedy() };
    let at = |position, tokens_min| {
        let sampler = Sampler::new(&sampling, VOCAB as u32, 0).with_least(tokens_min, &[2, 4]);
        draw_rows(&LOGITS, &mut [sampler], vec![Known { position, ..Known::default() }]).0[0]
    };
    assert_eq!((at(0, Some(2)), at(1, Some(2)), at(2, Some(2)), at(9, Some(2))), (0, 0, 2, 2));
    assert_eq!((at(0, Some(0)), at(0, None)), (2, 2));
}

#[test]
fn losses_are_taken_from_single_tokens() {
    let of = |losses: &[(u32, f32)]| {
        let known = Known { losses: losses.to_vec(), ..Known::default() };
        draw_rows(&LOGITS, &mut [Sampler::new(&Sampling::greedy(), VOCAB as u32, 0)], vec![known]).0[0]
    };
    assert_eq!(of(&[]), 0);
    assert_eq!(of(&[(0, 0.4)]), 0);
    assert_eq!(of(&[(0, 0.6)]), 5);
    assert_eq!(of(&[(5, 0.6), (0, 1.1)]), 1);
}

#[test]
fn probabilities_are_the_models_own() {
    let sampling = Sampling { logit_bias: [(4, 50.0)].into(), temperature: Some(0.2), ..Sampling::default() };
    let known = Known { logprobs: Some(3), mask: Some(mask(VOCAB, [3, 4])), ..Known::default() };
    let drawn = draw_rows(&LOGITS, &mut [Sampler::new(&sampling, VOCAB as u32, 0)], vec![known]);
    let (tokens, likely_of) = (drawn.0, drawn.1[0].clone().unwrap());
    assert_eq!((tokens[0], likely_of.chosen.id), (4, 4));
    let expected = likely(LOGITS, &[]).map(f32::ln);
    assert!((likely_of.chosen.logprob - expected[4]).abs() < 1e-5, "{likely_of:?}");
    assert_eq!(likely_of.top.iter().map(|one| one.id).collect::<Vec<_>>(), [0, 5, 1]);
    assert!(likely_of.top.iter().all(|one| (one.logprob - expected[one.id as usize]).abs() < 1e-5), "{likely_of:?}");
    // None but the chosen one; and no more than there are.
    for (asked, told) in [(0, 0), (100, VOCAB)] {
        let known = Known { logprobs: Some(asked), ..Known::default() };
        let (_, likely) = draw_rows(&LOGITS, &mut [Sampler::new(&sampling, VOCAB as u32, 0)], vec![known]);
        assert_eq!(likely[0].as_ref().unwrap().top.len(), told);
    }
}

/// Not a multiple of a word's bits.
const WIDE: usize = 41;

/// One row with whatever steps, its logits, and what is known of it.
type AnyRow = (Sampling, Vec<f32>, (Option<BTreeSet<u32>>, BTreeSet<u32>, Option<u32>, Option<u32>));

fn any_row() -> impl Strategy<Value = AnyRow> {
    let narrow = (
        prop::option::of(1u32..WIDE as u32),
        prop::option::of(0.05f32..1.0),
        prop::option::of(0.05f32..1.0),
        prop::option::of(0.001f32..0.5),
        prop::option::of((0.1f32..1.0, 0.01f32..0.5)),
    );
    let rest = (
        prop_oneof![Just(0.0f32), 0.3f32..3.0],
        any::<u64>(),
        prop::option::of(0.5f32..2.0),
        prop::option::of(-1.0f32..1.0),
        prop::collection::btree_map(0..WIDE as u32, -5.0f32..5.0, 0..3),
    );
    let sampling = (narrow, rest).prop_map(|((top_k, typical_p, top_p, min_p, xtc), rest)| {
        let (temperature, seed, repetition_penalty, frequency_penalty, logit_bias) = rest;
        let xtc = xtc.map(|(probability, threshold)| Xtc { probability, threshold });
        let (temperature, seed) = (Some(temperature), Some(seed));
        let own = Sampling { temperature, seed, top_k, typical_p, top_p, min_p, xtc, ..Sampling::default() };
        Sampling { repetition_penalty, frequency_penalty, logit_bias, ..own }
    });
    let ids = |size| prop::collection::btree_set(0..WIDE as u32, size);
    let known = (prop::option::of(ids(1..8)), ids(0..4), prop::option::of(0u32..5), prop::option::of(0u32..4));
    (sampling, prop::collection::vec(-4.0f32..4.0, WIDE), known)
}

proptest! {
    /// Whatever steps its neighbours have, a row gets what it gets alone, to the bit, and nothing that its mask forbids.
    #[test]
    fn rows_draw_together_as_they_draw_alone(rows in prop::collection::vec(any_row(), 1..7)) {
        let fresh = || -> Vec<Sampler> {
            let each = rows.iter().map(|(sampling, _, (_, _, tokens_min, _))| {
                Sampler::new(sampling, WIDE as u32, 0).with_least(*tokens_min, &[7])
            });
            each.collect()
        };
        let known = |(_, _, (allowed, losing, _, logprobs)): &AnyRow, position| {
            let losses = losing.iter().map(|id| (*id, 1.5)).collect();
            // As the engine does it: what has to end is not drawn for, what may not end has no end among what is allowed.
            let mask = allowed.as_ref().map(|allowed| mask(WIDE, allowed.iter().copied().filter(|id| *id != 7).chain([8])));
            Known { position, losses, mask, logprobs: *logprobs }
        };
        let (mut together, mut apart) = (fresh(), fresh());
        let all: Vec<f32> = rows.iter().flat_map(|(_, logits, _)| logits.clone()).collect();
        for position in 0..4 {
            let company = draw_rows(&all, &mut together, rows.iter().map(|row| known(row, position)).collect());
            for (at, row) in rows.iter().enumerate() {
                let alone = draw_rows(&row.1, &mut apart[at..=at], vec![known(row, position)]);
                prop_assert_eq!((company.0[at], &company.1[at]), (alone.0[0], &alone.1[0]), "row {}", at);
                if let Some(allowed) = &row.2.0 {
                    prop_assert!(allowed.contains(&company.0[at]) || company.0[at] == 8);
                }
                if row.2.2.is_some_and(|tokens_min| position < tokens_min) {
                    prop_assert!(company.0[at] != 7);
                }
            }
        }
    }

    /// A neighbour's mask takes nothing from who has none.
    #[test]
    fn a_mask_is_its_rows_alone(rows in prop::collection::vec(any_row(), 2..6)) {
        let draws = |masked: bool| {
            let mut samplers: Vec<Sampler> =
                rows.iter().map(|(sampling, ..)| Sampler::new(sampling, WIDE as u32, 0)).collect();
            let all: Vec<f32> = rows.iter().flat_map(|(_, logits, _)| logits.clone()).collect();
            let mask = masked.then(|| mask(WIDE, [5, 40]));
            let known = |at| Known { mask: mask.clone().filter(|_| at == 0), ..Known::default() };
            draw_rows(&all, &mut samplers, (0..rows.len()).map(known).collect()).0
        };
        let (free, held) = (draws(false), draws(true));
        prop_assert_eq!(&free[1..], &held[1..]);
        prop_assert!([5, 40].contains(&held[0]));
    }
}

#[test]
fn a_row_that_must_not_repeat_itself_has_to_see_every_token() {
    let dry = Dry {
        multiplier: 1.0,
        base: 2.0,
        allowed_length: 1,
        last_n: None,
        sequence_breakers: Vec::new(),
        breaker_ids: Vec::new(),
    };
    let of = |dry: Option<Dry>| Sampler::new(&Sampling { dry, ..Sampling::default() }, VOCAB as u32, 0);
    assert!(!of(None).reads_first());
    assert!(!of(Some(Dry { multiplier: 0.0, ..dry.clone() })).reads_first(), "it loses nothing");
    let row = of(Some(dry));
    assert!(row.reads_first());
    assert_eq!(row.losses(&[1, 2, 1]), [(2, 1.0)]);
}
