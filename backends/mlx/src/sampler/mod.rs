//! The choice of next tokens for a batch, on the device and inside the graph.
//!
//! For each row, the steps run in llama.cpp's order, so that both backends mean the same by the same numbers: bias,
//! penalties, repetition (DRY), the mask of a grammar, top-k, typical, top-p, min-p, XTC, temperature, draw. A draw inverts
//! the distribution at one number, which is a function of the row's seed and of how many tokens it has drawn: what a row
//! gets depends neither on the timing nor on who else is in the batch.

mod dry;
mod likely;
mod mask;
mod narrow;

use mesh_core::{Sampling, Xtc};
use mesh_graph::ffi;
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use dry::Repetition;
pub use likely::Likely;
pub use mask::{Mask, Masks};

/// One row's parameters, checked, and where it is in its random numbers.
#[derive(Clone, Debug)]
pub struct Sampler {
    temperature: f32,
    top_p: Option<f32>,
    top_k: Option<i32>,
    min_p: Option<f32>,
    typical_p: Option<f32>,
    xtc: Option<Xtc>,
    seed: u64,
    drawn: u64,
    vocab_size: i32,
    /// Added to the logits, `[1, 1, vocab]`.
    bias: Option<Array>,
    penalties: Option<Penalties>,
    repetition: Option<Repetition>,
    /// Tokens that are not drawn before so many others were.
    late: Option<Late>,
}

#[derive(Clone, Debug)]
struct Late {
    tokens_min: u32,
    /// Minus infinity for each of them, `[1, 1, vocab]`.
    bias: Array,
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
        let bias = (!sampling.logit_bias.is_empty())
            .then(|| biases(vocab, sampling.logit_bias.iter().map(|(id, value)| (*id, *value))));
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
            typical_p: sampling.typical_p.filter(|p| *p < 1.0),
            // Above a half there are never two to choose from.
            xtc: sampling.xtc.filter(|xtc| xtc.probability > 0.0 && xtc.threshold <= 0.5),
            seed: sampling.seed.unwrap_or(entropy),
            drawn: 0,
            vocab_size: vocab_size as i32,
            bias,
            penalties,
            repetition: sampling.dry.as_ref().and_then(Repetition::new),
            late: None,
        }
    }

    /// The same, with no token of `ends` drawn before `tokens_min` others.
    pub fn with_least(self, tokens_min: Option<u32>, ends: &[u32]) -> Self {
        let late = tokens_min.filter(|least| *least > 0 && !ends.is_empty()).map(|tokens_min| {
            let bias = biases(self.vocab_size as usize, ends.iter().map(|id| (*id, f32::NEG_INFINITY)));
            Late { tokens_min, bias }
        });
        Self { late, ..self }
    }

    /// Whether it has to see every token before it draws the next.
    pub fn reads_first(&self) -> bool {
        self.repetition.is_some()
    }

    /// What tokens lose because they would go on with a repetition of `text`, which is all so far.
    pub fn losses(&self, text: &[u32]) -> Vec<(u32, f32)> {
        self.repetition.as_ref().map_or(Vec::new(), |repetition| repetition.losses(text))
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

    /// Whether it takes the likeliest of what is left. Divided by less, logits leave the range of f32.
    fn is_cold(&self) -> bool {
        self.temperature < 1e-6
    }

    fn way(&self) -> Way {
        // These two may leave the likeliest out.
        let odd = self.typical_p.is_some() || self.xtc.is_some();
        if self.top_k == Some(1) || (self.is_cold() && !odd) {
            Way::Greedy
        } else if odd || self.top_p.is_some() || self.top_k.is_some() || self.min_p.is_some() {
            Way::Narrowed
        } else {
            Way::Whole
        }
    }

    fn late(&self, position: u32) -> Option<&Late> {
        self.late.as_ref().filter(|late| position < late.tokens_min)
    }

    /// The row's logits, `[1, 1, vocab]`, with bias, penalties and losses. `fed` is the token they follow, `[1, 1]`.
    fn adjust(&mut self, logits: &Array, fed: &Array, row: &Known) -> Result<Array, Exception> {
        let mut logits = logits.as_dtype(Dtype::Float32)?;
        if let Some(bias) = &self.bias {
            logits = logits.add(bias)?;
        }
        logits = self.penalise(logits, fed, row.position > 0)?;
        if !row.losses.is_empty() {
            let shape = [1, 1, row.losses.len() as i32];
            let (ids, losses): (Vec<u32>, Vec<f32>) = row.losses.iter().copied().unzip();
            let ids = Array::from_slice(&ids, &shape);
            let less = indexing::take_along_axis(&logits, &ids, -1)?.subtract(Array::from_slice(&losses, &shape))?;
            logits = logits.put_along_axis(&ids, &less, -1)?;
        }
        match self.late(row.position) {
            Some(late) => logits.add(&late.bias),
            None => Ok(logits),
        }
    }

    /// `fed` counts as written if `written`, or else as read.
    fn penalise(&mut self, mut logits: Array, fed: &Array, written: bool) -> Result<Array, Exception> {
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
    /// timing. The first of a distribution's range where the likeliest is taken.
    fn next_number(&mut self) -> f32 {
        let number = fraction(self.mixed());
        self.drawn += 1;
        if self.is_cold() { 0.0 } else { number }
    }

    /// A second number that goes with the next, and takes nothing from it.
    fn coin(&self) -> f32 {
        fraction(split_mix(self.mixed()))
    }

    fn mixed(&self) -> u64 {
        split_mix(self.seed ^ split_mix(self.drawn.wrapping_add(1)))
    }
}

/// One row of a draw.
pub struct Row<'a> {
    /// How it chooses.
    pub sampler: &'a mut Sampler,
    /// What is known of it.
    pub known: Known,
}

/// What a draw has to know of a row beside its logits.
#[derive(Default)]
pub struct Known {
    /// Tokens written before, the one that is fed included. If there are none, that is the prompt's last.
    pub position: u32,
    /// What tokens lose, each once.
    pub losses: Vec<(u32, f32)>,
    /// What may come, where not everything may.
    pub mask: Option<Mask>,
    /// Of how many of the likeliest to report the probability, beside that of the chosen one.
    pub logprobs: Option<u32>,
}

impl Row<'_> {
    fn is_plain(&self) -> bool {
        let Sampler { bias, penalties, .. } = &*self.sampler;
        let late = self.sampler.late(self.known.position);
        bias.is_none() && penalties.is_none() && self.known.losses.is_empty() && late.is_none()
    }
}

/// The next tokens, not yet evaluated.
pub struct Drawn {
    /// `[rows, 1]`, in u32.
    pub tokens: Array,
    /// What is reported with them, for the rows that ask.
    pub likely: Vec<Option<Likely>>,
}

impl Drawn {
    /// Everything that is to be evaluated.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.tokens).chain(self.likely.iter().flatten().map(Likely::array))
    }
}

/// Draws the next token of each row from `logits`, `[rows, 1, vocab]`, which follow the tokens `fed`, `[rows, 1]`.
pub fn draw(logits: &Array, fed: &Array, rows: &mut [Row<'_>], masks: &mut Masks) -> Result<Drawn, Exception> {
    let tokens = choose(logits, fed, rows, masks)?;
    let vocab = logits.dim(2);
    let likely = rows.iter().zip(0..).map(|(row, at)| {
        let report = |top| {
            let own = ffi::slice(logits, [at, 0, 0], [at + 1, 1, vocab])?;
            Likely::new(&own, &ffi::slice(&tokens, [at, 0], [at + 1, 1])?, top)
        };
        row.known.logprobs.map(report).transpose()
    });
    let likely = likely.collect::<Result<_, Exception>>()?;
    Ok(Drawn { tokens, likely })
}

fn choose(logits: &Array, fed: &Array, rows: &mut [Row<'_>], masks: &mut Masks) -> Result<Array, Exception> {
    let mut logits = logits.clone();
    if !rows.iter().all(Row::is_plain) {
        let vocab = logits.dim(2);
        let parts = rows.iter_mut().zip(0..).map(|(row, at)| {
            let own = ffi::slice(&logits, [at, 0, 0], [at + 1, 1, vocab])?;
            match row.is_plain() {
                true => own.as_dtype(Dtype::Float32),
                false => row.sampler.adjust(&own, &ffi::slice(fed, [at, 0], [at + 1, 1])?, &row.known),
            }
        });
        logits = ops::concatenate(&parts.collect::<Result<Vec<_>, Exception>>()?, 0)?;
    }
    if rows.iter().any(|row| row.known.mask.is_some()) {
        let of_rows: Vec<Option<&Mask>> = rows.iter().map(|row| row.known.mask.as_ref()).collect();
        logits = masks.applied(&logits, &of_rows)?;
    }
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
            indexing::take_axis(&logits, Array::from_slice(&indices, &[indices.len() as i32]), 0)?
        };
        let mut samplers: Vec<&mut Sampler> = rows
            .iter_mut()
            .enumerate()
            .filter(|(row, _)| members.contains(row))
            .map(|(_, row)| &mut *row.sampler)
            .collect();
        drawn.push(match way {
            Way::Greedy => indexing::argmax_axis(&own, -1, false)?,
            Way::Whole => narrow::whole(&own, &mut samplers)?,
            Way::Narrowed => narrow::narrowed(&own, &mut samplers)?,
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

/// Numbers added to the logits of single tokens, `[1, 1, vocab]`.
fn biases(vocab: usize, values: impl Iterator<Item = (u32, f32)>) -> Array {
    let mut bias = vec![0.0_f32; vocab];
    for (id, value) in values {
        if let Some(slot) = bias.get_mut(id as usize) {
            *slot = value;
        }
    }
    row(&bias)
}

fn row(values: &[f32]) -> Array {
    Array::from_slice(values, &[1, 1, values.len() as i32])
}

/// A number in `[0, 1)`, coarser than f32 allows, so that it stays below 1 when multiplied.
fn fraction(bits: u64) -> f32 {
    (bits >> 41) as f32 / (1_u32 << 23) as f32
}

/// The finalizer of SplitMix64: spreads nearby numbers over all 64 bits.
fn split_mix(x: u64) -> u64 {
    let x = x.wrapping_add(0x9E37_79B9_7F4A_7C15);
    let x = (x ^ (x >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
    let x = (x ^ (x >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
    x ^ (x >> 31)
}

#[cfg(test)]
mod tests;
