//! The choice of the next token, on the device and inside the graph.
//!
//! The steps run in llama.cpp's order, so that both backends mean the same by the same numbers: top-k, top-p, min-p,
//! temperature, draw.

use mesh_core::Sampling;
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
    random,
};

use mesh_graph::ffi;

/// A sampler with its parameters checked and its random numbers seeded.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: Option<f32>,
    top_k: Option<i32>,
    min_p: Option<f32>,
    seed: u64,
    drawn: u64,
}

impl Sampler {
    /// `entropy` seeds it where the request does not.
    pub fn new(sampling: &Sampling, vocab_size: u32, entropy: u64) -> Self {
        Self {
            temperature: sampling.temperature.unwrap_or(1.0),
            top_p: sampling.top_p.filter(|p| *p < 1.0),
            top_k: sampling.top_k.filter(|k| *k > 0 && *k < vocab_size).map(|k| k as i32),
            min_p: sampling.min_p.filter(|p| *p > 0.0),
            seed: sampling.seed.unwrap_or(entropy),
            drawn: 0,
        }
    }

    /// Draws from `logits`, `[1, 1, vocab]`: token ids, `[1, 1]`, not yet evaluated.
    pub fn draw(&mut self, logits: &Array) -> Result<Array, Exception> {
        if self.temperature <= 0.0 || self.top_k == Some(1) {
            return indexing::argmax_axis(logits, -1, false);
        }
        let key = self.next_key();
        let warm = |logits: &Array| logits.multiply(Array::from_f32(1.0 / self.temperature));
        // Half floats are too coarse for sums over a vocabulary.
        let logits = logits.as_dtype(Dtype::Float32)?;
        if self.top_p.is_none() && self.top_k.is_none() && self.min_p.is_none() {
            return random::categorical(warm(&logits)?, -1, None, &key);
        }
        let order = ops::argsort_axis(logits.negative()?, -1)?;
        let order = match self.top_k {
            Some(k) => ffi::slice(&order, [0, 0, 0], [1, 1, k])?,
            None => order,
        };
        let sorted = indexing::take_along_axis(&logits, &order, -1)?;
        let mut kept = sorted.clone();
        let none = Array::from_f32(f32::NEG_INFINITY);
        if let Some(p) = self.top_p {
            let likely = ops::softmax_axis(&kept, -1, true)?;
            let before = ops::cumsum(&likely, -1, None, None)?.subtract(&likely)?;
            kept = ops::select(before.lt(Array::from_f32(p))?, &kept, &none)?;
        }
        if let Some(p) = self.min_p {
            // p times as likely is ln p less in logits.
            let top = ffi::slice(&sorted, [0, 0, 0], [1, 1, 1])?;
            let floor = top.add(Array::from_f32(p.ln()))?;
            kept = ops::select(kept.ge(&floor)?, &kept, &none)?;
        }
        let place = random::categorical(warm(&kept)?, -1, None, &key)?;
        let place = place.reshape(&[1, 1, 1])?;
        indexing::take_along_axis(&order, &place, -1)?.reshape(&[1, 1])
    }

    /// The key of the next draw: a function of the seed and of how many were drawn, so that a seed repeats whatever the
    /// timing.
    fn next_key(&mut self) -> Array {
        let mixed = split_mix(self.seed ^ split_mix(self.drawn.wrapping_add(1)));
        self.drawn += 1;
        Array::from_slice(&[(mixed >> 32) as u32, mixed as u32], &[2])
    }
}

/// The finalizer of SplitMix64: spreads nearby numbers over all 64 bits.
fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}
