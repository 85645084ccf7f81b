//! Root-mean-square normalization.

use mlx_rs::{Array, error::Exception, fast};

use crate::{config::DecoderConfig, elementwise::scalar, model::GraphError, weights::Weights};

/// What a checkpoint stores as a norm's weight.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum NormWeight {
    /// The weight.
    #[default]
    Whole,
    /// The weight less one, as Gemma does.
    LessOne,
}

/// `x / rms(x) · weight` over the last axis, in the fused kernel.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Array,
    eps: f32,
}

impl RmsNorm {
    /// Takes `{name}.weight`, of shape `[size]`.
    pub fn new(weights: &mut Weights, name: &str, size: i32, eps: f32) -> Result<Self, GraphError> {
        Self::stored(weights, name, size, eps, NormWeight::Whole)
    }

    /// The same over the residual stream of `config`.
    pub fn of(weights: &mut Weights, name: &str, config: &DecoderConfig) -> Result<Self, GraphError> {
        Self::new(weights, name, config.hidden_size, config.rms_norm_eps)
    }

    /// The same, where the checkpoint may store something else than the weight.
    pub fn stored(
        weights: &mut Weights,
        name: &str,
        size: i32,
        eps: f32,
        stored: NormWeight,
    ) -> Result<Self, GraphError> {
        let weight = weights.take(&format!("{name}.weight"), &[size])?;
        let weight = match stored {
            NormWeight::Whole => weight,
            NormWeight::LessOne => weight.add(scalar(1.0, weight.dtype())?)?,
        };
        Ok(Self { weight, eps })
    }

    /// Normalizes the last axis of `x`, in the type of the weight.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        self.forward_wide(x)?.as_dtype(self.weight.dtype())
    }

    /// The same, in the type of `x` where that is wider.
    pub fn forward_wide(&self, x: &Array) -> Result<Array, Exception> {
        fast::rms_norm(x, Some(&self.weight), self.eps)
    }

    /// The weight, for kernels that normalize themselves.
    pub fn weight(&self) -> &Array {
        &self.weight
    }

    /// Added to the mean square.
    pub fn eps(&self) -> f32 {
        self.eps
    }
}
