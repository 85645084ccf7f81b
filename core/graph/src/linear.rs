//! Linear maps and embeddings, plain or quantized.

use mlx_rs::{Array, Dtype, error::Exception, ops, ops::indexing};

use crate::{
    ffi,
    model::GraphError,
    weights::{Matrix, Weights},
};

/// Whether a linear map has a bias.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Bias {
    /// `{name}.bias` has to be there.
    Yes,
    /// It must not.
    No,
}

impl From<bool> for Bias {
    fn from(bias: bool) -> Self {
        if bias { Self::Yes } else { Self::No }
    }
}

/// `x · Wᵀ + b`.
#[derive(Debug)]
pub struct Linear {
    weight: LinearWeight,
    bias: Option<Array>,
}

#[derive(Debug)]
enum LinearWeight {
    /// `[in, out]`: transposed once, here.
    Plain(Array),
    Packed(ffi::Packed),
}

impl Linear {
    /// Takes `{name}.weight` of `[out, inner]`, and what belongs to it.
    pub fn new(weights: &mut Weights, name: &str, out: i32, inner: i32, bias: Bias) -> Result<Self, GraphError> {
        let weight = match weights.take_matrix(name, out, inner)? {
            Matrix::Plain(weight) => LinearWeight::Plain(weight.t()),
            Matrix::Packed(packed) => LinearWeight::Packed(packed),
        };
        let bias = match bias {
            Bias::Yes => Some(weights.take(&format!("{name}.bias"), &[out])?),
            Bias::No => None,
        };
        Ok(Self { weight, bias })
    }

    /// The same map in f32, where it is not packed. A router's logits are compared with each other: rounded ones choose
    /// other experts.
    pub fn in_f32(self) -> Result<Self, Exception> {
        let LinearWeight::Plain(weight) = &self.weight else { return Ok(self) };
        let bias = self.bias.as_ref().map(|bias| bias.as_dtype(Dtype::Float32)).transpose()?;
        Ok(Self { weight: LinearWeight::Plain(weight.as_dtype(Dtype::Float32)?), bias })
    }

    /// Maps the last axis of `x` from `inner` to `out`.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        match (&self.weight, &self.bias) {
            (LinearWeight::Plain(weight), None) => ops::matmul(x, weight),
            (LinearWeight::Plain(weight), Some(bias)) => ops::addmm(bias, x, weight, None, None),
            (LinearWeight::Packed(weight), None) => ffi::quantized_matmul(x, weight),
            (LinearWeight::Packed(weight), Some(bias)) => ffi::quantized_matmul(x, weight)?.add(bias),
        }
    }

    /// The packed weight, for kernels of our own.
    pub(crate) fn packed(&self) -> Option<&ffi::Packed> {
        match &self.weight {
            LinearWeight::Packed(packed) => Some(packed),
            LinearWeight::Plain(_) => None,
        }
    }

    /// The bias, for kernels of our own.
    pub(crate) fn bias(&self) -> Option<&Array> {
        self.bias.as_ref()
    }
}

/// Token embeddings, which may serve as the head too.
#[derive(Debug)]
pub struct Embedding {
    weight: Matrix,
    /// `[hidden, vocab]` view for the head, where the weight is plain.
    transposed: Option<Array>,
    /// What rows are unpacked to.
    floats: Option<Dtype>,
}

impl Embedding {
    /// Takes `{name}.weight` of `[vocab, hidden]`.
    pub fn new(weights: &mut Weights, name: &str, vocab: i32, hidden: i32) -> Result<Self, GraphError> {
        let weight = weights.take_matrix(name, vocab, hidden)?;
        let transposed = match &weight {
            Matrix::Plain(weight) => Some(weight.t()),
            Matrix::Packed(_) => None,
        };
        Ok(Self { weight, transposed, floats: weights.placement().floats })
    }

    /// The rows of `tokens`: `[batch, time]` to `[batch, time, hidden]`.
    pub fn forward(&self, tokens: &Array) -> Result<Array, Exception> {
        match &self.weight {
            Matrix::Plain(weight) => indexing::take_axis(weight, tokens, 0),
            Matrix::Packed(packed) => {
                let rows = |array: &Array| indexing::take_axis(array, tokens, 0);
                let rows = ffi::dequantize(&ffi::Packed {
                    weight: rows(&packed.weight)?,
                    scales: rows(&packed.scales)?,
                    biases: packed.biases.as_ref().map(rows).transpose()?,
                    ..*packed
                })?;
                self.floats.map_or(Ok(rows.clone()), |floats| rows.as_dtype(floats))
            }
        }
    }

    /// The packed weight, for kernels of our own.
    pub(crate) fn packed(&self) -> Option<&ffi::Packed> {
        match &self.weight {
            Matrix::Packed(packed) => Some(packed),
            Matrix::Plain(_) => None,
        }
    }

    /// Logits: `[batch, time, hidden]` to `[batch, time, vocab]`.
    pub fn as_head(&self, x: &Array) -> Result<Array, Exception> {
        match (&self.weight, &self.transposed) {
            (Matrix::Packed(packed), _) => ffi::quantized_matmul(x, packed),
            (Matrix::Plain(_), Some(transposed)) => ops::matmul(x, transposed),
            (Matrix::Plain(weight), None) => ops::matmul(x, weight.t()),
        }
    }
}
