//! What draws come to, row by row and in any company.

use mesh_core::{DeviceKind, Sampling};
use mesh_graph::ffi;
use mlx_rs::Array;

use super::*;

const VOCAB: usize = 6;
const LOGITS: [f32; VOCAB] = [2.0, 1.0, 0.5, 0.0, -1.0, 1.5];

fn logits(rows: usize) -> Array {
    Array::from_slice(&LOGITS.repeat(rows), &[rows as i32, 1, VOCAB as i32])
}

/// Draws once for each sampler, all in one batch, after having fed token 3.
fn draw_all(samplers: &mut [Sampler], written: bool) -> Vec<u32> {
    ffi::use_device(DeviceKind::Cpu);
    let fed = Array::from_slice(&vec![3_u32; samplers.len()], &[samplers.len() as i32, 1]);
    let mut rows: Vec<Row<'_>> = samplers.iter_mut().map(|sampler| Row { sampler, written }).collect();
    let drawn = draw(&logits(rows.len()), &fed, &mut rows).unwrap();
    assert_eq!(drawn.shape(), [rows.len() as i32, 1]);
    drawn.eval().unwrap();
    drawn.to_vec_exact::<u32>().unwrap()
}

fn shares(sampling: &Sampling) -> [f32; VOCAB] {
    const DRAWS: usize = 4000;
    let mut samplers: Vec<Sampler> = (0..DRAWS)
        .map(|seed| Sampler::new(&Sampling { seed: Some(seed as u64), ..sampling.clone() }, VOCAB as u32, 0))
        .collect();
    let mut counts = [0.0; VOCAB];
    draw_all(&mut samplers, false).into_iter().for_each(|id| counts[id as usize] += 1.0 / DRAWS as f32);
    counts
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
