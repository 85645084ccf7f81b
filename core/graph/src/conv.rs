//! The short causal convolution along time, one filter a channel.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use crate::{ffi, model::GraphError, pass::Pass, weights::Weights};

/// Each channel of a position is a weighted sum of itself and the positions just before.
#[derive(Debug)]
pub struct ShortConv {
    /// `[kernel, channels]`, f32; the last row is the present's.
    taps: Array,
    bias: Option<Array>,
}

impl ShortConv {
    /// Takes `{name}.weight`, `[channels, 1, kernel]` as published or `[channels, kernel, 1]` as mlx-lm stores it, and
    /// `{name}.bias` where there is to be one.
    pub fn new(weights: &mut Weights, name: &str, channels: i32, kernel: i32, bias: bool) -> Result<Self, GraphError> {
        if kernel < 2 {
            return Err(GraphError::Config(format!("a convolution over {kernel} positions is not supported")));
        }
        let weight = format!("{name}.weight");
        let taps = match Self::is_published(weights, name) {
            true => weights.take_f32(&weight, &[channels, 1, kernel])?.squeeze_axes(&[1])?,
            false => weights.take_f32(&weight, &[channels, kernel, 1])?.squeeze_axes(&[2])?,
        };
        let taps = taps.t();
        let bias = if bias { Some(weights.take_f32(&format!("{name}.bias"), &[channels])?) } else { None };
        Ok(Self { taps, bias })
    }

    /// Whether the filters at `name` have the layout of published checkpoints, rather than mlx-lm's.
    pub fn is_published(weights: &Weights, name: &str) -> bool {
        weights.shape(&format!("{name}.weight")).is_none_or(|shape| shape.last() != Some(&1))
    }

    /// `[batch, time, channels]` to the same, in f32. `state` holds the inputs just before, `[batch, kernel − 1, channels]`.
    pub fn forward(&self, x: &Array, state: &mut Option<Array>, pass: &Pass) -> Result<Array, Exception> {
        let x = pass.without_padding(x)?;
        let (batch, time, channels) = (x.dim(0), x.dim(1), x.dim(2));
        let kernel = self.taps.dim(0);
        let before = match state.take() {
            Some(state) => state,
            None => ops::zeros_dtype(&[batch, kernel - 1, channels], x.dtype())?,
        };
        let all = ops::concatenate(&[before, x], 1)?;
        // Picked, because a slice would keep the whole chunk in memory.
        let last = ops::arange::<_, i32>(time, time + kernel - 1, None)?;
        *state = Some(indexing::take_axis(&all, &last, 1)?);
        // Each sum would be rounded otherwise.
        let all = all.as_dtype(Dtype::Float32)?;
        let y = if time == 1 {
            all.multiply(&self.taps)?.sum_axis(1, true)?
        } else {
            let mut y: Option<Array> = None;
            for tap in 0..kernel {
                let filter = ffi::slice(&self.taps, [tap, 0], [tap + 1, channels])?;
                let term = ffi::slice(&all, [0, tap, 0], [batch, tap + time, channels])?.multiply(filter)?;
                y = Some(y.map_or(Ok(term.clone()), |y| y.add(&term))?);
            }
            y.ok_or_else(|| Exception::custom("a convolution without taps"))?
        };
        self.bias.as_ref().map_or(Ok(y.clone()), |bias| y.add(bias))
    }
}
