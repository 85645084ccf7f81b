//! Root-mean-square normalization.

use mlx_rs::{Array, error::Exception, fast};

use crate::{model::GraphError, weights::Weights};

/// `x / rms(x) · weight` over the last axis, in the fused kernel.
#[derive(Debug)]
pub struct RmsNorm {
    weight: Array,
    eps: f32,
}

impl RmsNorm {
    /// Takes `{name}.weight`, of shape `[size]`.
    pub fn new(weights: &mut Weights, name: &str, size: i32, eps: f32) -> Result<Self, GraphError> {
        Ok(Self { weight: weights.take(&format!("{name}.weight"), &[size])?, eps })
    }

    /// Normalizes the last axis of `x`.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
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
