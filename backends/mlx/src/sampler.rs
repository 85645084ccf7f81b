//! The choice of next tokens for a batch, on the device and inside the graph.
//!
//! For each row, the steps run in llama.cpp's order, so that both backends mean the same by the same numbers: bias,
//! penalties, top-k, top-p, min-p, temperature, draw. A draw inverts the distribution at one number, which is a function
//! of the row's seed and of how many tokens it has drawn: what a row gets depends neither on the timing nor on who else
//! is in the batch.

use mesh_core::Sampling;
use mesh_graph::ffi;
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

/// One row's parameters, checked, and where it is in its random numbers.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: Option<f32>,
    top_k: Option<i32>,
    min_p: Option<f32>,
    seed: u64,
    drawn: u64,
    vocab_size: i32,
    /// Added to the logits, `[1, 1, vocab]`.
    bias: Option<Array>,
    penalties: Option<Penalties>,
}

#[derive(Clone, Debug)]
struct Penalties {
    repetition: f32,
    presence: f32,
    frequency: f32,
    /// How often each token was written, `[1, 1, vocab]`.
    written: Array,
    /// One for each token of the prompt, `[1, 1, vocab]`.
    read: Array,
}

/// What a row is narrowed to before it draws.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Way {
    /// The likeliest.
    Greedy,
    /// Any.
    Whole,
    /// Some of the likeliest.
    Narrowed,
}

impl Sampler {
    /// `entropy` seeds it where the request does not.
    pub fn new(sampling: &Sampling, vocab_size: u32, entropy: u64) -> Self {
        let vocab = vocab_size as usize;
        let bias = (!sampling.logit_bias.is_empty()).then(|| {
            let mut bias = vec![0.0_f32; vocab];
            for (id, value) in &sampling.logit_bias {
                if let Some(slot) = bias.get_mut(*id as usize) {
                    *slot = *value;
                }
            }
            row(&bias)
        });
        let repetition = sampling.repetition_penalty.unwrap_or(1.0);
        let presence = sampling.presence_penalty.unwrap_or(0.0);
        let frequency = sampling.frequency_penalty.unwrap_or(0.0);
        let penalties = (repetition != 1.0 || presence != 0.0 || frequency != 0.0).then(|| {
            let none = row(&vec![0.0; vocab]);
            Penalties { repetition, presence, frequency, written: none.clone(), read: none }
        });
        Self {
            temperature: sampling.temperature.unwrap_or(1.0),
            top_p: sampling.top_p.filter(|p| *p < 1.0),
            top_k: sampling.top_k.filter(|k| *k > 0 && *k < vocab_size).map(|k| k as i32),
            min_p: sampling.min_p.filter(|p| *p > 0.0),
            seed: sampling.seed.unwrap_or(entropy),
            drawn: 0,
            vocab_size: vocab_size as i32,
            bias,
            penalties,
        }
    }

    /// Tells it all tokens so far but the one that is fed next: the first `prompt` of them were read, the rest written.
    pub fn begin(&mut self, tokens: &[u32], prompt: usize) {
        let Some(penalties) = &mut self.penalties else { return };
        let count = |tokens: &[u32], most: f32| {
            let mut counts = vec![0.0_f32; self.vocab_size as usize];
            for id in tokens {
                if let Some(count) = counts.get_mut(*id as usize) {
                    *count = (*count + 1.0).min(most);
                }
            }
            row(&counts)
        };
        let (read, written) = tokens.split_at(prompt.min(tokens.len()));
        penalties.read = count(read, 1.0);
        penalties.written = count(written, f32::MAX);
    }

    fn way(&self) -> Way {
        // Divided by less, logits leave the range of f32.
        if self.temperature < 1e-6 || self.top_k == Some(1) {
            Way::Greedy
        } else if self.top_p.is_some() || self.top_k.is_some() || self.min_p.is_some() {
            Way::Narrowed
        } else {
            Way::Whole
        }
    }

    fn is_plain(&self) -> bool {
        self.bias.is_none() && self.penalties.is_none()
    }

    /// The row's logits, `[1, 1, vocab]`, with bias and penalties. `fed` is the token they follow, `[1, 1]`, which counts as
    /// written if `written`, or else as read.
    fn adjust(&mut self, logits: &Array, fed: &Array, written: bool) -> Result<Array, Exception> {
        let mut logits = logits.as_dtype(Dtype::Float32)?;
        if let Some(bias) = &self.bias {
            logits = logits.add(bias)?;
        }
        let Some(penalties) = &mut self.penalties else { return Ok(logits) };
        let ids = ops::arange::<_, u32>(0, self.vocab_size, None)?.reshape(&[1, 1, self.vocab_size])?;
        let one = ids.eq(fed.as_dtype(Dtype::Uint32)?.reshape(&[1, 1, 1])?)?.as_dtype(Dtype::Float32)?;
        if written {
            penalties.written = penalties.written.add(one)?;
        } else {
            penalties.read = ops::maximum(&penalties.read, one)?;
        }
        let zero = Array::from_f32(0.0);
        if penalties.repetition != 1.0 {
            let by = Array::from_f32(penalties.repetition);
            let penalised = ops::select(logits.gt(&zero)?, logits.divide(&by)?, logits.multiply(&by)?)?;
            let seen = penalties.read.add(&penalties.written)?.gt(&zero)?;
            logits = ops::select(seen, penalised, logits)?;
        }
        let often = penalties.written.multiply(Array::from_f32(penalties.frequency))?;
        let once = penalties.written.gt(&zero)?.as_dtype(Dtype::Float32)?;
        logits.subtract(often)?.subtract(once.multiply(Array::from_f32(penalties.presence))?)
    }

    /// The next number in `[0, 1)`: a function of the seed and of how many were drawn, so that a seed repeats whatever the
    /// timing. Coarser than f32 allows, so that it stays below 1 when multiplied.
    fn next_number(&mut self) -> f32 {
        let mixed = split_mix(self.seed ^ split_mix(self.drawn.wrapping_add(1)));
        self.drawn += 1;
        (mixed >> 41) as f32 / (1_u32 << 23) as f32
    }
}

/// One row of a draw.
pub struct Row<'a> {
    /// How it chooses.
    pub sampler: &'a mut Sampler,
    /// Whether the token that was fed was written by the model, rather than the prompt's last.
    pub written: bool,
}

/// Draws the next token of each row from `logits`, `[rows, 1, vocab]`, which follow the tokens `fed`, `[rows, 1]`. The
/// result, `[rows, 1]` in u32, is not yet evaluated.
pub fn draw(logits: &Array, fed: &Array, rows: &mut [Row<'_>]) -> Result<Array, Exception> {
    let adjusted;
    let logits = if rows.iter().all(|row| row.sampler.is_plain()) {
        logits
    } else {
        let vocab = logits.dim(2);
        let parts = rows.iter_mut().zip(0..).map(|(row, at)| {
            let own = ffi::slice(logits, [at, 0, 0], [at + 1, 1, vocab])?;
            match row.sampler.is_plain() {
                true => own.as_dtype(Dtype::Float32),
                false => row.sampler.adjust(&own, &ffi::slice(fed, [at, 0], [at + 1, 1])?, row.written),
            }
        });
        adjusted = ops::concatenate(&parts.collect::<Result<Vec<_>, Exception>>()?, 0)?;
        &adjusted
    };
    // Each way computes its rows alone, so that nobody's result depends on another's way.
    let mut drawn = Vec::new();
    let mut places = vec![0_i32; rows.len()];
    let mut count = 0;
    for way in [Way::Greedy, Way::Whole, Way::Narrowed] {
        let members: Vec<usize> = (0..rows.len()).filter(|row| rows[*row].sampler.way() == way).collect();
        if members.is_empty() {
            continue;
        }
        for member in &members {
            places[*member] = count;
            count += 1;
        }
        let own = if members.len() == rows.len() {
            logits.clone()
        } else {
            let indices: Vec<i32> = members.iter().map(|row| *row as i32).collect();
            indexing::take_axis(logits, Array::from_slice(&indices, &[indices.len() as i32]), 0)?
        };
        let mut samplers: Vec<&mut Sampler> = rows
            .iter_mut()
            .enumerate()
            .filter(|(row, _)| members.contains(row))
            .map(|(_, row)| &mut *row.sampler)
            .collect();
        drawn.push(match way {
            Way::Greedy => indexing::argmax_axis(&own, -1, false)?,
            Way::Whole => whole(&own, &mut samplers)?,
            Way::Narrowed => narrowed(&own, &mut samplers)?,
        });
    }
    match &drawn[..] {
        [one] => Ok(one.clone()),
        several => {
            let together = ops::concatenate(several, 0)?;
            indexing::take_axis(&together, Array::from_slice(&places, &[places.len() as i32]), 0)
        }
    }
}

fn whole(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    // Half floats are too coarse for sums over a vocabulary.
    let warm = logits.as_dtype(Dtype::Float32)?.multiply(each(rows, |row| 1.0 / row.temperature))?;
    invert(&warm, rows)
}

fn narrowed(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let order = ops::argsort_axis(logits.negative()?, -1)?;
    let sorted = indexing::take_along_axis(&logits, &order, -1)?;
    let none = Array::from_f32(f32::NEG_INFINITY);
    let mut kept = sorted.clone();
    if rows.iter().any(|row| row.top_k.is_some()) {
        let ranks = ops::arange::<_, f32>(0, sorted.dim(2), None)?.reshape(&[1, 1, sorted.dim(2)])?;
        let most = each(rows, |row| row.top_k.map_or(f32::INFINITY, |k| k as f32));
        kept = ops::select(ranks.lt(most)?, &kept, &none)?;
    }
    if rows.iter().any(|row| row.top_p.is_some()) {
        let likely = ops::softmax_axis(&kept, -1, true)?;
        let before = ops::cumsum(&likely, -1, None, None)?.subtract(&likely)?;
        kept = ops::select(before.lt(each(rows, |row| row.top_p.unwrap_or(f32::INFINITY)))?, &kept, &none)?;
    }
    if rows.iter().any(|row| row.min_p.is_some()) {
        // p times as likely is ln p less in logits.
        let top = ffi::slice(&sorted, [0, 0, 0], [sorted.dim(0), 1, 1])?;
        let floor = top.add(each(rows, |row| row.min_p.map_or(f32::NEG_INFINITY, f32::ln)))?;
        kept = ops::select(kept.ge(&floor)?, &kept, &none)?;
    }
    let place = invert(&kept.multiply(each(rows, |row| 1.0 / row.temperature))?, rows)?;
    let place = place.reshape(&[sorted.dim(0), 1, 1])?;
    indexing::take_along_axis(&order, &place, -1)?.as_dtype(Dtype::Uint32)?.reshape(&[sorted.dim(0), 1])
}

/// Where each row's number falls in its distribution: `[rows, 1]`.
fn invert(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    let last = logits.dim(2) - 1;
    let sums = ops::cumsum(ops::softmax_axis(logits, -1, true)?, -1, None, None)?;
    // What rounding leaves of 1.
    let total = ffi::slice(&sums, [0, 0, last], [sums.dim(0), 1, last + 1])?;
    let numbers: Vec<f32> = rows.iter_mut().map(|row| row.next_number()).collect();
    let mark = total.multiply(Array::from_slice(&numbers, &[numbers.len() as i32, 1, 1]))?;
    let place = sums.le(&mark)?.as_dtype(Dtype::Uint32)?.sum_axis(-1, false)?;
    ops::minimum(place, Array::from_slice(&[last as u32], &[1]))
}

/// One number a row, `[rows, 1, 1]`.
fn each(rows: &[&mut Sampler], number: impl Fn(&Sampler) -> f32) -> Array {
    let numbers: Vec<f32> = rows.iter().map(|row| number(row)).collect();
    Array::from_slice(&numbers, &[numbers.len() as i32, 1, 1])
}

fn row(values: &[f32]) -> Array {
    Array::from_slice(values, &[1, 1, values.len() as i32])
}

/// The finalizer of SplitMix64: spreads nearby numbers over all 64 bits.
fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
#[path = "sampler_tests.rs"]
mod tests;
