//! Functions of single values.

use mlx_rs::{Array, Dtype, error::Exception, ops};
use serde::Deserialize;

/// A constant of `dtype`. MLX promotes half floats that meet an f32 constant.
pub fn scalar(value: f32, dtype: Dtype) -> Result<Array, Exception> {
    let value = Array::from_f32(value);
    if dtype == Dtype::Float32 { Ok(value) } else { value.as_dtype(dtype) }
}

/// `x · factor`, in the type of `x`.
pub fn scale(x: &Array, factor: f32) -> Result<Array, Exception> {
    if factor == 1.0 {
        return Ok(x.clone());
    }
    x.multiply(scalar(factor, x.dtype())?)
}

/// `cap · tanh(x / cap)`.
pub fn softcap(x: &Array, cap: f32) -> Result<Array, Exception> {
    scale(&ops::tanh(x.divide(scalar(cap, x.dtype())?)?)?, cap)
}

/// `x · sigmoid(x)`.
pub fn silu(x: &Array) -> Result<Array, Exception> {
    x.multiply(ops::sigmoid(x)?)
}

/// `ln(1 + eˣ)`.
pub fn softplus(x: &Array) -> Result<Array, Exception> {
    ops::logaddexp(x, scalar(0.0, x.dtype())?)
}

/// GELU by its approximation with tanh.
pub fn gelu_tanh(x: &Array) -> Result<Array, Exception> {
    let dtype = x.dtype();
    // Half floats would be rounded at each of these.
    let x = &x.as_dtype(Dtype::Float32)?;
    let cube = x.multiply(x)?.multiply(x)?;
    let inner = scale(&x.add(scale(&cube, 0.044_715)?)?, (2.0 / std::f32::consts::PI).sqrt())?;
    scale(&x.multiply(ops::tanh(inner)?.add(Array::from_f32(1.0))?)?, 0.5)?.as_dtype(dtype)
}

/// GELU by the error function.
pub fn gelu(x: &Array) -> Result<Array, Exception> {
    let dtype = x.dtype();
    let x = &x.as_dtype(Dtype::Float32)?;
    let erf = ops::erf(scale(x, std::f32::consts::FRAC_1_SQRT_2)?)?;
    scale(&x.multiply(erf.add(Array::from_f32(1.0))?)?, 0.5)?.as_dtype(dtype)
}

/// `hidden_act` or `hidden_activation`, under the checkpoints' names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
pub enum Activation {
    /// `x · sigmoid(x)`.
    #[default]
    #[serde(rename = "silu", alias = "swish")]
    Silu,
    /// GELU by its approximation with tanh.
    #[serde(rename = "gelu_pytorch_tanh", alias = "gelu_new")]
    GeluTanh,
    /// GELU by the error function.
    #[serde(rename = "gelu")]
    Gelu,
}

impl Activation {
    /// The function's value.
    pub fn forward(self, x: &Array) -> Result<Array, Exception> {
        match self {
            Self::Silu => silu(x),
            Self::GeluTanh => gelu_tanh(x),
            Self::Gelu => gelu(x),
        }
    }
}
