//! What rows are narrowed to before they draw, and the draw: on the device, for all rows at once, each by its own numbers.
//! A row that leaves a step out keeps its numbers to the bit.

use mesh_graph::ffi;
use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use super::Sampler;

/// Draws from all of `logits`, `[rows, 1, vocab]`: `[rows, 1]`.
pub fn whole(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    // Half floats are too coarse for sums over a vocabulary.
    let warm = logits.as_dtype(Dtype::Float32)?.multiply(each(rows, |row| 1.0 / row.temperature))?;
    invert(&warm, rows)
}

/// The same from some of the likeliest.
pub fn narrowed(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    let logits = logits.as_dtype(Dtype::Float32)?;
    let order = ops::argsort_axis(logits.negative()?, -1)?;
    let sorted = indexing::take_along_axis(&logits, &order, -1)?;
    let mut kept = sorted.clone();
    if rows.iter().any(|row| row.top_k.is_some()) {
        let ranks = ops::arange::<_, f32>(0, sorted.dim(2), None)?.reshape(&[1, 1, sorted.dim(2)])?;
        let most = each(rows, |row| row.top_k.map_or(f32::INFINITY, |k| k as f32));
        kept = only(&ranks.lt(most)?, &kept)?;
    }
    if rows.iter().any(|row| row.typical_p.is_some()) {
        kept = typical(&kept, rows)?;
    }
    if rows.iter().any(|row| row.top_p.is_some()) {
        let likely = ops::softmax_axis(&kept, -1, true)?;
        let before = ops::cumsum(&likely, -1, None, None)?.subtract(&likely)?;
        kept = only(&before.lt(each(rows, |row| row.top_p.unwrap_or(f32::INFINITY)))?, &kept)?;
    }
    if rows.iter().any(|row| row.min_p.is_some()) {
        // p times as likely is ln p less in logits.
        let top = kept.max_axis(-1, true)?;
        let floor = top.add(each(rows, |row| row.min_p.map_or(f32::NEG_INFINITY, f32::ln)))?;
        kept = only(&kept.ge(&floor)?, &kept)?;
    }
    if rows.iter().any(|row| row.xtc.is_some()) {
        kept = without_top_choices(&kept, rows)?;
    }
    if rows.iter().any(|row| row.is_cold()) {
        let top = kept.max_axis(-1, true)?;
        let floor = top.add(each(rows, |row| if row.is_cold() { 0.0 } else { f32::NEG_INFINITY }))?;
        kept = only(&kept.ge(&floor)?, &kept)?;
    }
    let warm = kept.multiply(each(rows, |row| if row.is_cold() { 1.0 } else { 1.0 / row.temperature }))?;
    let place = invert(&warm, rows)?.reshape(&[sorted.dim(0), 1, 1])?;
    indexing::take_along_axis(&order, &place, -1)?.as_dtype(Dtype::Uint32)?.reshape(&[sorted.dim(0), 1])
}

/// Those of `logits` that `kept` says; the others cannot be drawn.
fn only(kept: &Array, logits: &Array) -> Result<Array, Exception> {
    ops::select(kept, logits, Array::from_f32(f32::NEG_INFINITY))
}

/// What is closest to the entropy, until the probabilities sum to more than each row's number.
fn typical(kept: &Array, rows: &[&mut Sampler]) -> Result<Array, Exception> {
    let likely = ops::softmax_axis(kept, -1, true)?;
    let logs = kept.subtract(kept.logsumexp_axis(-1, true)?)?;
    let possible = likely.gt(Array::from_f32(0.0))?;
    // Nothing times infinity is not a number.
    let surprise = ops::select(&possible, logs.negative()?, Array::from_f32(0.0))?;
    let entropy = likely.multiply(&surprise)?.sum_axis(-1, true)?;
    let distance = ops::select(&possible, surprise.subtract(entropy)?.abs()?, Array::from_f32(f32::INFINITY))?;
    let order = ops::argsort_axis(&distance, -1)?;
    let ordered = indexing::take_along_axis(&likely, &order, -1)?;
    let before = ops::cumsum(&ordered, -1, None, None)?.subtract(&ordered)?;
    let near = before.le(each(rows, |row| row.typical_p.unwrap_or(f32::INFINITY)))?;
    // Back to where they were.
    let ranks = ops::argsort_axis(&order, -1)?;
    only(&indexing::take_along_axis(&near, &ranks, -1)?, kept)
}

/// Leaves out all top choices but the least likely, for the rows whose turn it is.
fn without_top_choices(kept: &Array, rows: &[&mut Sampler]) -> Result<Array, Exception> {
    let likely = ops::softmax_axis(kept, -1, true)?;
    let threshold =
        each(rows, |row| row.xtc.filter(|xtc| row.coin() < xtc.probability).map_or(f32::INFINITY, |xtc| xtc.threshold));
    let top = likely.ge(threshold)?.logical_and(likely.gt(Array::from_f32(0.0))?)?.as_dtype(Dtype::Int32)?;
    // Counted from the likeliest on.
    let last = ops::cumsum(&top, -1, None, None)?.ge(top.sum_axis(-1, true)?)?;
    only(&last.logical_or(top.eq(Array::from_int(0))?)?, kept)
}

/// Where each row's number falls in its distribution: `[rows, 1]`. Never where nothing is likely, however sums are
/// rounded.
fn invert(logits: &Array, rows: &mut [&mut Sampler]) -> Result<Array, Exception> {
    let last = logits.dim(2) - 1;
    let likely = ops::softmax_axis(logits, -1, true)?;
    let sums = ops::cumsum(&likely, -1, None, None)?;
    // What rounding leaves of 1.
    let total = ffi::slice(&sums, [0, 0, last], [sums.dim(0), 1, last + 1])?;
    let numbers: Vec<f32> = rows.iter_mut().map(|row| row.next_number()).collect();
    let mark = total.multiply(Array::from_slice(&numbers, &[numbers.len() as i32, 1, 1]))?;
    let reached = sums.gt(&mark)?.logical_and(likely.gt(Array::from_f32(0.0))?)?;
    // The first that is reached, or else the likeliest.
    indexing::argmax_axis(ops::select(&reached, Array::from_f32(2.0), &likely)?, -1, false)
}

/// One number a row, `[rows, 1, 1]`.
fn each(rows: &[&mut Sampler], number: impl Fn(&Sampler) -> f32) -> Array {
    let numbers: Vec<f32> = rows.iter().map(|row| number(row)).collect();
    Array::from_slice(&numbers, &[numbers.len() as i32, 1, 1])
}
