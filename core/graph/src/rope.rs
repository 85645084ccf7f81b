//! Rotary position embeddings: the kinds configs name, and the places they name them in.

use std::f32::consts::PI;

use mlx_rs::{Array, error::Exception, fast};
use serde_json::Value;

use crate::model::GraphError;

/// How positions are encoded.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct RopeSpec {
    /// Dimensions rotated.
    pub dims: i32,
    /// Base of the frequencies.
    pub theta: f32,
    /// Whether neighbours are paired, rather than halves.
    pub traditional: bool,
    /// How frequencies or positions are scaled.
    pub scaling: Scaling,
}

/// How frequencies or positions are scaled for long contexts.
#[derive(Clone, Debug, Default, PartialEq)]
pub enum Scaling {
    /// Not at all.
    #[default]
    None,
    /// Positions divided by `factor`.
    Linear {
        /// The divisor.
        factor: f32,
    },
    /// Llama 3's: long wavelengths divided by `factor`, short ones kept, those between blended.
    Llama3 {
        /// The divisor of long wavelengths.
        factor: f32,
        /// Wavelengths over `original / low_freq_factor` are long.
        low_freq_factor: f32,
        /// Wavelengths under `original / high_freq_factor` are short.
        high_freq_factor: f32,
        /// The context length before scaling, in tokens.
        original_max_position_embeddings: f32,
    },
}

impl RopeSpec {
    /// Reads `rope_theta`, `rope_scaling` and `rope_parameters` of a text config; `head_dim` dimensions are rotated.
    /// A kind that is not computed here is an error that names it.
    pub fn read(config: &Value, head_dim: i32) -> Result<Self, GraphError> {
        let object = |key: &str| config.get(key).filter(|value| value.is_object());
        let scaling = object("rope_parameters").or_else(|| object("rope_scaling"));
        let theta = scaling
            .and_then(|scaling| scaling.get("rope_theta"))
            .or_else(|| config.get("rope_theta"))
            .and_then(Value::as_f64)
            .unwrap_or(10_000.0) as f32;
        let kind = scaling
            .and_then(|scaling| scaling.get("rope_type").or_else(|| scaling.get("type")))
            .and_then(Value::as_str);
        let number = |key: &str| {
            scaling.and_then(|scaling| scaling.get(key)).and_then(Value::as_f64).map(|value| value as f32).ok_or_else(
                || GraphError::Config(format!("rope scaling of kind `{}` has no `{key}`", kind.unwrap_or("?"))),
            )
        };
        let scaling = match kind.unwrap_or("default") {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: number("factor")? },
            "llama3" => Scaling::Llama3 {
                factor: number("factor")?,
                low_freq_factor: number("low_freq_factor")?,
                high_freq_factor: number("high_freq_factor")?,
                original_max_position_embeddings: number("original_max_position_embeddings")?,
            },
            other => return Err(GraphError::Config(format!("`rope_type` `{other}` is not supported"))),
        };
        Ok(Self { dims: head_dim, theta, traditional: false, scaling })
    }
}

/// A rotary embedding, ready to apply.
#[derive(Debug)]
pub struct Rope {
    dims: i32,
    traditional: bool,
    scale: f32,
    /// Set instead of `freqs` where frequencies are plain powers.
    base: Option<f32>,
    freqs: Option<Array>,
    /// Inverse of the angle that a position adds, scaled for long contexts.
    periods: Vec<f32>,
}

impl Rope {
    /// Prepares what does not depend on positions.
    pub fn new(spec: &RopeSpec) -> Self {
        let plain = Self {
            dims: spec.dims,
            traditional: spec.traditional,
            scale: 1.0,
            base: Some(spec.theta),
            freqs: None,
            periods: periods(spec).collect(),
        };
        match spec.scaling {
            Scaling::None => plain,
            Scaling::Linear { factor } => Self { scale: 1.0 / factor, ..plain },
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let (long, short) = (
                    original_max_position_embeddings / low_freq_factor,
                    original_max_position_embeddings / high_freq_factor,
                );
                let scaled = |period: f32| {
                    let wavelength = 2.0 * PI * period;
                    if wavelength > long {
                        period * factor
                    } else if wavelength < short {
                        period
                    } else {
                        let smooth = (original_max_position_embeddings / wavelength - low_freq_factor)
                            / (high_freq_factor - low_freq_factor);
                        period / ((1.0 - smooth) / factor + smooth)
                    }
                };
                let periods: Vec<f32> = periods(spec).map(scaled).collect();
                let freqs = Array::from_slice(&periods, &[periods.len() as i32]);
                Self { base: None, freqs: Some(freqs), periods, ..plain }
            }
        }
    }

    /// The angle in radians that one position adds, for each pair of dimensions; for kernels that rotate themselves.
    pub(crate) fn angles_per_position(&self) -> Vec<f32> {
        self.periods.iter().map(|period| self.scale / period).collect()
    }

    /// Rotates `x`, `[batch, heads, time, head_dim]`, whose first position is `offset`.
    pub fn forward(&self, x: &Array, offset: i32) -> Result<Array, Exception> {
        fast::rope(x, self.dims, self.traditional, self.base, self.scale, offset, self.freqs.as_ref())
    }
}

/// `theta^(2i/dims)`: what MLX calls `freqs`, the inverse of the angle a position adds.
fn periods(spec: &RopeSpec) -> impl Iterator<Item = f32> {
    let (theta, dims) = (f64::from(spec.theta), f64::from(spec.dims));
    (0..spec.dims / 2).map(move |i| theta.powf(2.0 * f64::from(i) / dims) as f32)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reads_every_place() {
        let flat = RopeSpec::read(&json!({"rope_theta": 5e5}), 64).unwrap();
        let nested =
            RopeSpec::read(&json!({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}), 64).unwrap();
        assert_eq!(flat, nested);
        let linear = RopeSpec::read(&json!({"rope_scaling": {"type": "linear", "factor": 8.0}}), 64).unwrap();
        assert_eq!(linear.scaling, Scaling::Linear { factor: 8.0 });
    }

    #[test]
    fn names_what_it_cannot_do() {
        let error = RopeSpec::read(&json!({"rope_scaling": {"rope_type": "foo"}}), 64).unwrap_err();
        assert!(error.to_string().contains("`rope_type` `foo`"), "{error}");
        let error = RopeSpec::read(&json!({"rope_scaling": {"rope_type": "linear"}}), 64).unwrap_err();
        assert!(error.to_string().contains("`factor`"), "{error}");
    }
}
