//! Rotary position embeddings.

mod spec;

use std::f64::consts::PI;

use mlx_rs::{Array, error::Exception, fast, ops};
pub use spec::{RopeSpec, Scaling, Yarn};

use crate::{elementwise::scalar, ffi, pass::Pass};

/// A rotary embedding, ready to apply.
#[derive(Debug)]
pub struct Rope {
    dims: i32,
    traditional: bool,
    /// Multiplies positions.
    scale: f32,
    /// Multiplies what is rotated.
    attention_factor: f32,
    frequencies: Frequencies,
}

/// MLX's `freqs` are periods: the inverse of the angle that a position adds.
#[derive(Debug)]
enum Frequencies {
    /// Plain powers of this base.
    Base(f32),
    Periods(Array, Vec<f32>),
    /// Up to a length, and beyond.
    ByLength {
        limit: i32,
        short: Array,
        long: Array,
    },
    /// A base that grows with the sequence.
    Growing {
        theta: f64,
        factor: f64,
        limit: f64,
    },
}

impl Rope {
    /// Prepares what does not depend on positions.
    pub fn new(spec: &RopeSpec) -> Self {
        let plain = Self {
            dims: spec.dims,
            traditional: spec.traditional,
            scale: 1.0,
            attention_factor: 1.0,
            frequencies: Frequencies::Base(spec.theta),
        };
        let periods: Vec<f64> = (0..spec.dims / 2).map(|pair| period(spec, pair)).collect();
        let given = |periods: Vec<f64>| {
            let periods: Vec<f32> = periods.into_iter().map(|period| period as f32).collect();
            Frequencies::Periods(array(&periods), periods)
        };
        match &spec.scaling {
            Scaling::None => plain,
            Scaling::Linear { factor } => Self { scale: 1.0 / factor, ..plain },
            Scaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_max_position_embeddings } => {
                let [factor, low, high, original] =
                    [factor, low_freq_factor, high_freq_factor, original_max_position_embeddings]
                        .map(|x| f64::from(*x));
                let scaled = |period: f64| {
                    let wavelength = 2.0 * PI * period;
                    if wavelength > original / low {
                        period * factor
                    } else if wavelength < original / high {
                        period
                    } else {
                        let smooth = (original / wavelength - low) / (high - low);
                        period / ((1.0 - smooth) / factor + smooth)
                    }
                };
                Self { frequencies: given(periods.into_iter().map(scaled).collect()), ..plain }
            }
            Scaling::Yarn(yarn) => Self {
                attention_factor: yarn.attention_factor,
                frequencies: given(yarn_periods(spec, yarn, periods)),
                ..plain
            },
            Scaling::Dynamic { factor, max_position_embeddings } => Self {
                frequencies: Frequencies::Growing {
                    theta: spec.theta.into(),
                    factor: f64::from(*factor),
                    limit: f64::from(*max_position_embeddings),
                },
                ..plain
            },
            Scaling::Longrope { short_factor, long_factor, original_max_position_embeddings, attention_factor } => {
                let divided = |factors: &[f32]| {
                    let divided =
                        periods.iter().zip(factors).map(|(period, factor)| (period * f64::from(*factor)) as f32);
                    array(&divided.collect::<Vec<_>>())
                };
                let (short, long) = (divided(short_factor), divided(long_factor));
                let limit = *original_max_position_embeddings;
                Self {
                    attention_factor: *attention_factor,
                    frequencies: Frequencies::ByLength { limit, short, long },
                    ..plain
                }
            }
            Scaling::Proportional { rotated, factor } => {
                let still = |(pair, period): (usize, f64)| match (pair as i32) < rotated / 2 {
                    true => period * f64::from(*factor),
                    false => f64::INFINITY,
                };
                Self { frequencies: given(periods.into_iter().enumerate().map(still).collect()), ..plain }
            }
        }
    }

    /// The angle in radians that one position adds, for each pair of dimensions, for kernels that rotate themselves;
    /// `None` where that is not all there is to it.
    pub(crate) fn angles_per_position(&self) -> Option<Vec<f32>> {
        if self.attention_factor != 1.0 {
            return None;
        }
        let angle = |period: f32| self.scale / period;
        match &self.frequencies {
            Frequencies::Base(base) => {
                let spec = RopeSpec { dims: self.dims, theta: *base, ..RopeSpec::default() };
                Some((0..self.dims / 2).map(|pair| angle(period(&spec, pair) as f32)).collect())
            }
            Frequencies::Periods(_, periods) => Some(periods.iter().map(|period| angle(*period)).collect()),
            _ => None,
        }
    }

    /// The length in tokens beyond which a sequence is encoded differently from its first token on, where there is one.
    pub fn length_limit(&self) -> Option<i32> {
        match self.frequencies {
            Frequencies::ByLength { limit, .. } => Some(limit),
            Frequencies::Growing { limit, .. } => Some(limit as i32),
            _ => None,
        }
    }

    /// Rotates `x`, `[batch, heads, time, head_dim]`, the tokens of `pass`.
    pub fn forward(&self, x: &Array, pass: &Pass) -> Result<Array, Exception> {
        let scaled;
        let x = if self.attention_factor == 1.0 {
            x
        } else {
            scaled = self.multiply(x)?;
            &scaled
        };
        let of_row = |horizon: i32| match &self.frequencies {
            Frequencies::Base(base) => (Some(*base), None),
            Frequencies::Periods(periods, _) => (None, Some(periods)),
            Frequencies::ByLength { limit, short, long } => (None, Some(if horizon > *limit { long } else { short })),
            Frequencies::Growing { theta, factor, limit } => {
                let length = f64::from(horizon).max(*limit);
                let dims = f64::from(self.dims);
                let grown = theta * (factor * length / limit - (factor - 1.0)).powf(dims / (dims - 2.0));
                (Some(grown as f32), None)
            }
        };
        let rotated = |x: &Array, starts: Option<&Array>, horizon: i32| {
            let (base, periods) = of_row(horizon);
            match starts {
                Some(starts) => fast::rope_dynamic(x, self.dims, self.traditional, base, self.scale, starts, periods),
                None => fast::rope(x, self.dims, self.traditional, base, self.scale, pass.offset(), periods),
            }
        };
        let horizons = pass.horizons();
        let longest = horizons.iter().copied().max().unwrap_or(0);
        if self.length_limit().is_none_or(|limit| longest <= limit) || horizons.iter().all(|one| *one == longest) {
            return rotated(x, pass.starts(), longest);
        }
        // Rows of a batch differ: each has its own frequencies.
        let shape = x.shape();
        let rows = horizons.iter().zip(0..).map(|(horizon, row)| {
            let one = ffi::slice(x, [row, 0, 0, 0], [row + 1, shape[1], shape[2], shape[3]])?;
            let start = pass.starts().map(|starts| ffi::slice(starts, [row], [row + 1])).transpose()?;
            rotated(&one, start.as_ref(), *horizon)
        });
        ops::concatenate(&rows.collect::<Result<Vec<_>, Exception>>()?, 0)
    }

    /// `x` with the dimensions that rotate multiplied by the attention factor.
    fn multiply(&self, x: &Array) -> Result<Array, Exception> {
        let factor = scalar(self.attention_factor, x.dtype())?;
        let [batch, heads, time, head_dim] = [x.dim(0), x.dim(1), x.dim(2), x.dim(3)];
        if self.dims == head_dim {
            return x.multiply(factor);
        }
        let rotated = ffi::slice(x, [0; 4], [batch, heads, time, self.dims])?.multiply(factor)?;
        let rest = ffi::slice(x, [0, 0, 0, self.dims], [batch, heads, time, head_dim])?;
        ops::concatenate(&[rotated, rest], -1)
    }
}

fn array(values: &[f32]) -> Array {
    Array::from_slice(values, &[values.len() as i32])
}

/// `theta^(2 · pair / dims)`.
fn period(spec: &RopeSpec, pair: i32) -> f64 {
    f64::from(spec.theta).powf(2.0 * f64::from(pair) / f64::from(spec.dims))
}

/// Periods blended by a ramp over dimensions: fast ones kept, slow ones multiplied by `factor`.
fn yarn_periods(spec: &RopeSpec, yarn: &Yarn, periods: Vec<f64>) -> Vec<f64> {
    let dims = f64::from(spec.dims);
    let original = f64::from(yarn.original_max_position_embeddings);
    // The dimension whose wavelength makes so many rotations within the original context.
    let dimension = |rotations: f32| {
        dims * (original / (f64::from(rotations) * 2.0 * PI)).ln() / (2.0 * f64::from(spec.theta).ln())
    };
    let (mut low, mut high) = (dimension(yarn.beta_fast), dimension(yarn.beta_slow));
    if yarn.truncate {
        (low, high) = (low.floor(), high.ceil());
    }
    let (low, mut high) = (low.max(0.0), high.min(dims - 1.0));
    if low == high {
        high += 0.001;
    }
    let blend = |(pair, period): (usize, f64)| {
        let slow = ((pair as f64 - low) / (high - low)).clamp(0.0, 1.0);
        1.0 / (slow / (period * f64::from(yarn.factor)) + (1.0 - slow) / period)
    };
    periods.into_iter().enumerate().map(blend).collect()
}
