//! The gated MLP.

use mlx_rs::{Array, error::Exception};

use crate::{
    config::DecoderConfig,
    elementwise::Activation,
    linear::{Bias, Linear},
    model::GraphError,
    weights::Weights,
};

/// `down(activation(gate(x)) · up(x))`.
#[derive(Debug)]
pub struct Mlp {
    gate_proj: Linear,
    up_proj: Linear,
    down_proj: Linear,
    activation: Activation,
}

impl Mlp {
    /// As config.json describes it: takes `{name}.gate_proj`, `up_proj` and `down_proj`.
    pub fn new(weights: &mut Weights, name: &str, config: &DecoderConfig) -> Result<Self, GraphError> {
        Self::sized(weights, name, config, config.intermediate_size)
    }

    /// The same with another width inside.
    pub fn sized(weights: &mut Weights, name: &str, config: &DecoderConfig, inner: i32) -> Result<Self, GraphError> {
        if inner <= 0 {
            return Err(GraphError::Config(format!("an MLP cannot be {inner} wide inside")));
        }
        let (hidden, bias) = (config.hidden_size, Bias::from(config.mlp_bias));
        let mut linear = |part: &str, out, inner| Linear::new(weights, &format!("{name}.{part}"), out, inner, bias);
        Ok(Self {
            gate_proj: linear("gate_proj", inner, hidden)?,
            up_proj: linear("up_proj", inner, hidden)?,
            down_proj: linear("down_proj", hidden, inner)?,
            activation: config.hidden_act,
        })
    }

    /// Splits `{name}.gate_up_proj`, where a checkpoint has gate and up in one.
    pub fn split_fused(weights: &mut Weights, name: &str, config: &DecoderConfig) -> Result<(), GraphError> {
        let [fused, gate, up] = ["gate_up_proj", "gate_proj", "up_proj"].map(|part| format!("{name}.{part}"));
        let inner = config.intermediate_size;
        weights.split_rows(&fused, config.hidden_size, &[(&gate, inner), (&up, inner)])
    }

    /// gate, up and down, for kernels that know SwiGLU alone.
    pub(crate) fn swiglu_projections(&self) -> Option<[&Linear; 3]> {
        (self.activation == Activation::Silu).then_some([&self.gate_proj, &self.up_proj, &self.down_proj])
    }

    /// `[batch, time, hidden]` to the same.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        let gate = self.activation.forward(&self.gate_proj.forward(x)?)?;
        self.down_proj.forward(&gate.multiply(&self.up_proj.forward(x)?)?)
    }
}
