//! The gated MLP.

use mlx_rs::{Array, error::Exception, ops};

use crate::{
    linear::{Bias, Linear},
    model::GraphError,
    weights::Weights,
};

/// `down(silu(gate(x)) · up(x))`.
#[derive(Debug)]
pub struct SwiGlu {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
}

impl SwiGlu {
    /// Takes `{name}.gate_proj`, `up_proj` and `down_proj`.
    pub fn new(weights: &mut Weights, name: &str, hidden: i32, inner: i32, bias: Bias) -> Result<Self, GraphError> {
        let mut linear = |part: &str, out, inner| Linear::new(weights, &format!("{name}.{part}"), out, inner, bias);
        Ok(Self {
            gate_proj: linear("gate_proj", inner, hidden)?,
            up_proj: linear("up_proj", inner, hidden)?,
            down_proj: linear("down_proj", hidden, inner)?,
        })
    }

    /// gate, up and down.
    pub(crate) fn projections(&self) -> [&Linear; 3] {
        [&self.gate_proj, &self.up_proj, &self.down_proj]
    }

    /// `[batch, time, hidden]` to the same.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        let gate = self.gate_proj.forward(x)?;
        let up = self.up_proj.forward(x)?;
        self.down_proj.forward(&silu(&gate)?.multiply(&up)?)
    }
}

/// `x · sigmoid(x)`.
pub fn silu(x: &Array) -> Result<Array, Exception> {
    x.multiply(ops::sigmoid(x)?)
}
