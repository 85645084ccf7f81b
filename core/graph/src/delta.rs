//! The gated delta rule: a matrix for each head, decayed, corrected towards each new key's value, and read by queries.
//!
//! With state `S` (`[key, value]`), log decay `g`, key `k`, value `v` and rate `β`, a step is `S ← e^g·S`, then
//! `S ← S + k·(β·(v − Sᵀk))ᵀ`, and gives `Sᵀq`. Many steps are computed in chunks: within one, the corrections solve a
//! triangular system, and only the state passes from chunk to chunk. Everything is f32.

use mlx_rs::{Array, Dtype, error::Exception, ops};

use crate::ffi;

/// Steps a chunk, where a head's decay is one number. A power of two.
const CHUNK: i32 = 64;
/// Steps a chunk, where each channel of a key has its own decay, which takes `chunk² · key` numbers a head.
const CHUNK_BY_CHANNEL: i32 = 16;

/// What each step is made of.
#[derive(Debug)]
pub struct Steps {
    /// `[batch, time, heads, key]`.
    pub q: Array,
    /// `[batch, time, heads, key]`.
    pub k: Array,
    /// `[batch, time, heads, value]`.
    pub v: Array,
    /// Logarithms of the decay, none above zero: `[batch, time, heads, 1]`, or `[batch, time, heads, key]`.
    pub log_decay: Array,
    /// `[batch, time, heads, 1]`.
    pub beta: Array,
}

/// `x / √(Σx² + eps)` over the last axis, in f32.
pub fn l2_normed(x: &Array) -> Result<Array, Exception> {
    const EPS: f32 = 1e-6;
    let x = x.as_dtype(Dtype::Float32)?;
    let squares = x.multiply(&x)?.sum_axis(-1, true)?;
    x.multiply(ops::rsqrt(squares.add(Array::from_f32(EPS))?)?)
}

/// Runs `steps` on from `state` (`[batch, heads, key, value]`; absent at first), which is replaced. Gives
/// `[batch, time, heads, value]` in f32.
pub fn delta_rule(steps: &Steps, state: &mut Option<Array>) -> Result<Array, Exception> {
    let heads_first = |x: &Array| x.as_dtype(Dtype::Float32)?.transpose_axes(&[0, 2, 1, 3]);
    let [q, k, v] = [heads_first(&steps.q)?, heads_first(&steps.k)?, heads_first(&steps.v)?];
    let [g, beta] = [heads_first(&steps.log_decay)?, heads_first(&steps.beta)?];
    let (batch, heads, time) = (q.dim(0), q.dim(1), q.dim(2));
    let start = match state.take() {
        Some(state) => state,
        None => ops::zeros_dtype(&[batch, heads, k.dim(3), v.dim(3)], Dtype::Float32)?,
    };
    let (out, end) = match time {
        1 => step(&q, &k, &v, &g, &beta, &start)?,
        _ => chunks(&q, &k, &v, &g, &beta, start)?,
    };
    *state = Some(end);
    out.transpose_axes(&[0, 2, 1, 3])
}

/// One step; all `[batch, heads, 1, …]`.
fn step(q: &Array, k: &Array, v: &Array, g: &Array, beta: &Array, state: &Array) -> Result<(Array, Array), Exception> {
    let state = state.multiply(g.exp()?.swap_axes(-1, -2)?)?;
    let correction = v.subtract(ops::matmul(k, &state)?)?.multiply(beta)?;
    let state = state.add(k.swap_axes(-1, -2)?.multiply(correction)?)?;
    Ok((ops::matmul(q, &state)?, state))
}

/// Many steps; all `[batch, heads, time, …]`.
fn chunks(
    q: &Array,
    k: &Array,
    v: &Array,
    g: &Array,
    beta: &Array,
    mut state: Array,
) -> Result<(Array, Array), Exception> {
    let time = q.dim(2);
    let by_channel = g.dim(3) > 1;
    let most = if by_channel { CHUNK_BY_CHANNEL } else { CHUNK };
    let chunk = most.min((time as u32).next_power_of_two() as i32);
    let count = (time + chunk - 1) / chunk;
    // Steps of zeros change nothing.
    let cut = |x: &Array| -> Result<Array, Exception> {
        let (batch, heads, size) = (x.dim(0), x.dim(1), x.dim(3));
        let missing = count * chunk - time;
        let x = match missing {
            0 => x.clone(),
            _ => {
                let zeros = ops::zeros_dtype(&[batch, heads, missing, size], Dtype::Float32)?;
                ops::concatenate(&[x.clone(), zeros], 2)?
            }
        };
        x.reshape(&[batch, heads, count, chunk, size])
    };
    let [q, k, v, g, beta] = [cut(q)?, cut(k)?, cut(v)?, cut(g)?, cut(beta)?];
    let masks = Masks::new(chunk)?;
    let mut outs = Vec::with_capacity(count as usize);
    let prepared = if by_channel { None } else { Some(Chunk::prepare(&q, &k, &v, &g, &beta, &masks)?) };
    for index in 0..count {
        let nth = |x: &Array| {
            let shape = x.shape();
            let [batch, heads, _, rows, columns] = [shape[0], shape[1], shape[2], shape[3], shape[4]];
            ffi::slice(x, [0, 0, index, 0, 0], [batch, heads, index + 1, rows, columns])?.squeeze_axes(&[2])
        };
        let chunk = match &prepared {
            Some(all) => all.map(nth)?,
            None => Chunk::prepare(&nth(&q)?, &nth(&k)?, &nth(&v)?, &nth(&g)?, &nth(&beta)?, &masks)?,
        };
        let corrections = chunk.values.subtract(ops::matmul(&chunk.reads, &state)?)?;
        let read = ops::matmul(&chunk.queries, &state)?;
        outs.push(read.add(ops::matmul(&chunk.scores, &corrections)?)?);
        let added = ops::matmul(chunk.keys.swap_axes(-1, -2)?, corrections)?;
        state = state.multiply(&chunk.decay)?.add(added)?;
    }
    let out = ops::concatenate(&outs, 2)?;
    let (batch, heads, size) = (out.dim(0), out.dim(1), out.dim(3));
    Ok((ffi::slice(&out, [0, 0, 0, 0], [batch, heads, time, size])?, state))
}

/// All of a chunk that does not depend on the state. Leading axes are free.
struct Chunk {
    /// The corrections as they were with no state: `[chunk, value]`.
    values: Array,
    /// What of the state they subtract: `[chunk, key]`.
    reads: Array,
    /// Queries of the state: `[chunk, key]`.
    queries: Array,
    /// Of corrections by queries, `[chunk, chunk]`.
    scores: Array,
    /// What corrections are added to the state by: `[chunk, key]`.
    keys: Array,
    /// Of the state: `[key or 1, 1]`.
    decay: Array,
}

impl Chunk {
    fn prepare(q: &Array, k: &Array, v: &Array, g: &Array, beta: &Array, masks: &Masks) -> Result<Self, Exception> {
        let total = ops::cumsum(g, -2, None, None)?;
        let decayed = total.exp()?;
        let (of_keys, of_queries) = if g.dim(-1) > 1 {
            // e^(Gᵢ − Gⱼ) channel by channel; its factors alone would overflow.
            let between = total.expand_dims(-2)?.subtract(total.expand_dims(-3)?)?;
            let between = ops::minimum(between, Array::from_f32(0.0))?.exp()?.multiply(k.expand_dims(-3)?)?;
            let with = |x: &Array| -> Result<Array, Exception> {
                ops::matmul(&between, x.expand_dims(-1)?)?.squeeze_axes(&[-1])
            };
            (with(k)?, with(q)?)
        } else {
            let between = total.subtract(total.swap_axes(-1, -2)?)?;
            let between = ops::minimum(between, Array::from_f32(0.0))?.exp()?;
            let keys = k.swap_axes(-1, -2)?;
            (ops::matmul(k, &keys)?.multiply(&between)?, ops::matmul(q, &keys)?.multiply(&between)?)
        };
        let inverse = masks.inverse(&of_keys.multiply(beta)?.multiply(&masks.before)?)?;
        let end = {
            let chunk = total.dim(-2);
            total.split_at_indices(&[chunk - 1], -2)?.pop().ok_or_else(|| Exception::custom("an empty chunk"))?
        };
        Ok(Self {
            values: ops::matmul(&inverse, v.multiply(beta)?)?,
            reads: ops::matmul(&inverse, k.multiply(&decayed)?.multiply(beta)?)?,
            queries: q.multiply(&decayed)?,
            scores: of_queries.multiply(&masks.up_to)?,
            keys: k.multiply(end.subtract(&total)?.exp()?)?,
            decay: end.exp()?.swap_axes(-1, -2)?,
        })
    }

    fn map(&self, f: impl Fn(&Array) -> Result<Array, Exception>) -> Result<Self, Exception> {
        Ok(Self {
            values: f(&self.values)?,
            reads: f(&self.reads)?,
            queries: f(&self.queries)?,
            scores: f(&self.scores)?,
            keys: f(&self.keys)?,
            decay: f(&self.decay)?,
        })
    }
}

/// Zeros and ones over pairs of steps.
struct Masks {
    /// One where the second comes before the first.
    before: Array,
    /// One where it does not come after.
    up_to: Array,
    unit: Array,
    /// For blocks of 1, 2, 4 … steps: one where a pair stands in two neighbouring blocks that make one of twice the size.
    levels: Vec<Array>,
}

impl Masks {
    fn new(chunk: i32) -> Result<Self, Exception> {
        let of = |holds: &dyn Fn(i32, i32) -> bool| {
            let values: Vec<f32> =
                (0..chunk * chunk).map(|pair| f32::from(u8::from(holds(pair / chunk, pair % chunk)))).collect();
            Array::from_slice(&values, &[chunk, chunk])
        };
        let sizes = (0..).map(|power| 1 << power).take_while(|size| *size < chunk);
        let levels = sizes
            .map(|size| of(&|i, j| i / (2 * size) == j / (2 * size) && i % (2 * size) >= size && j % (2 * size) < size))
            .collect();
        Ok(Self { before: of(&|i, j| j < i), up_to: of(&|i, j| j <= i), unit: of(&|i, j| i == j), levels })
    }

    /// `(1 + A)⁻¹` for strictly lower triangular `A`: inverses of small diagonal blocks are put together into those of
    /// blocks twice the size. As stable as solving row by row, which a power series is not.
    fn inverse(&self, a: &Array) -> Result<Array, Exception> {
        let mut inverse = self.unit.clone();
        for level in &self.levels {
            let between = ops::matmul(&inverse, a.multiply(level)?)?;
            inverse = inverse.subtract(ops::matmul(between, &inverse)?)?;
        }
        Ok(inverse)
    }
}

#[cfg(test)]
mod tests {
    use mlx_rs::random;

    use super::*;

    fn steps(time: i32, channels: i32, strong: bool) -> Steps {
        let normal = |shape: &[i32]| random::normal::<f32>(shape, None, None, None).unwrap();
        let uniform = |shape: &[i32], most: f32| random::uniform::<_, f32>(0.0, most, shape, None).unwrap();
        let (batch, heads, key, value) = (2, 3, 8, 5);
        // Keys that hardly differ, and decays that underflow: what breaks careless factorings.
        let base = normal(&[1, 1, heads, key]);
        let near = base.add(normal(&[batch, time, heads, key]).multiply(Array::from_f32(0.01)).unwrap()).unwrap();
        let decay = if strong { 30.0 } else { 0.1 };
        Steps {
            q: l2_normed(&normal(&[batch, time, heads, key])).unwrap(),
            k: l2_normed(&near).unwrap(),
            v: normal(&[batch, time, heads, value]),
            log_decay: uniform(&[batch, time, heads, channels], decay).negative().unwrap(),
            beta: uniform(&[batch, time, heads, 1], 1.0),
        }
    }

    fn one_by_one(steps: &Steps) -> (Array, Array) {
        let mut state = None;
        let outs: Vec<Array> = (0..steps.q.dim(1))
            .map(|at| {
                let cut = |x: &Array| ffi::slice(x, [0, at, 0, 0], [x.dim(0), at + 1, x.dim(2), x.dim(3)]).unwrap();
                let [q, k, v] = [cut(&steps.q), cut(&steps.k), cut(&steps.v)];
                let (log_decay, beta) = (cut(&steps.log_decay), cut(&steps.beta));
                delta_rule(&Steps { q, k, v, log_decay, beta }, &mut state).unwrap()
            })
            .collect();
        (ops::concatenate(&outs, 1).unwrap(), state.unwrap())
    }

    fn difference(a: &Array, b: &Array) -> f32 {
        a.subtract(b).unwrap().abs().unwrap().max(None).unwrap().try_item_exact::<f32>().unwrap()
    }

    #[test]
    fn chunks_equal_single_steps() {
        random::seed(1).unwrap();
        for time in [2, 16, 64, 65, 150] {
            for channels in [1, 8] {
                for strong in [false, true] {
                    let steps = steps(time, channels, strong);
                    let (expected, end) = one_by_one(&steps);
                    let mut state = None;
                    let out = delta_rule(&steps, &mut state).unwrap();
                    let found = (difference(&out, &expected), difference(&state.unwrap(), &end));
                    let what = format!("{time} steps, {channels} channels, strong decay {strong}: {found:?}");
                    assert!(found.0 < 2e-5 && found.1 < 2e-5, "{what}");
                }
            }
        }
    }
}
