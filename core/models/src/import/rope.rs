//! Rope scaling of a GGUF as config.json says it.
//!
//! llama.cpp stores Llama 3's scaling as its result, one divisor for each frequency, in the tensor `rope_freqs.weight`.
//! The parameters are found by inverting the formula, and believed only if they give the stored divisors again.

use std::f64::consts::TAU;

use serde_json::{Value, json};

use crate::{
    error::ImportError,
    gguf::{Gguf, TensorType},
};

/// The tensor of divisors.
pub(super) const FACTORS: &str = "rope_freqs.weight";
/// Largest relative difference between a stored divisor and a recomputed one.
const TOLERANCE: f64 = 1e-5;
/// Llama 3's own bounds; every published model has them.
const LOW_FREQ_FACTOR: f64 = 1.0;
const HIGH_FREQ_FACTOR: f64 = 4.0;

/// `rope_scaling` of config.json, `Null` where there is none.
pub(super) fn scaling<D: AsRef<[u8]>>(
    gguf: &Gguf<D>,
    architecture: &str,
    head_dim: u32,
    theta: f64,
) -> Result<Value, ImportError> {
    let key = |name: &str| format!("{architecture}.rope.scaling.{name}");
    match gguf.text(&key("type")).unwrap_or("none") {
        "none" => {}
        "linear" => {
            let factor = gguf.float(&key("factor")).unwrap_or(1.0);
            return Ok(json!({ "rope_type": "linear", "factor": super::config::shortest(factor) }));
        }
        other => {
            let what = format!("rope scaling of type `{other}`");
            return Err(ImportError::Setting { key: key("type"), what });
        }
    }
    let Some(tensor) = gguf.tensors.iter().find(|tensor| tensor.name == FACTORS) else { return Ok(Value::Null) };
    let refuse = |what: &str| ImportError::Setting { key: FACTORS.into(), what: what.into() };
    let data = gguf.tensor_data(tensor).filter(|_| tensor.kind == TensorType::F32);
    let data = data.ok_or_else(|| refuse("its values are not 32-bit floats"))?;
    let (floats, _) = data.as_chunks::<4>();
    let factors: Vec<f64> = floats.iter().map(|bytes| f32::from_le_bytes(*bytes).into()).collect();
    if factors.len() != head_dim as usize / 2 {
        return Err(refuse("it does not have one value for each pair of a head"));
    }
    if factors.iter().all(|factor| *factor == 1.0) {
        return Ok(Value::Null);
    }
    let wavelengths: Vec<f64> =
        (0..factors.len()).map(|pair| TAU * theta.powf(2.0 * pair as f64 / f64::from(head_dim))).collect();
    let stated = gguf.unsigned(&key("original_context_length")).map(|length| length as f64);
    llama3(&factors, &wavelengths, stated).ok_or_else(|| refuse("its values are not those of llama3 scaling"))
}

/// The parameters that give these divisors.
fn llama3(factors: &[f64], wavelengths: &[f64], stated: Option<f64>) -> Option<Value> {
    let factor = *factors.last()?;
    // A divisor between the extremes tells the original length; without one any length between fits.
    let between = factors.iter().zip(wavelengths).filter(|(divisor, _)| **divisor > 1.0 && **divisor < factor);
    let inverted = between.map(|(divisor, wavelength)| {
        let smooth = (1.0 / divisor - 1.0 / factor) / (1.0 - 1.0 / factor);
        (wavelength * (smooth * (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR) + LOW_FREQ_FACTOR)).round()
    });
    let powers = (5..=20).map(|exponent| f64::from(1u32 << exponent));
    let mut candidates = stated.into_iter().chain(inverted).chain(powers);
    let fits = |length: &f64| {
        factors.iter().zip(wavelengths).all(|(stored, wavelength)| {
            let computed = divisor(*wavelength, factor, *length);
            (stored - computed).abs() <= TOLERANCE * computed
        })
    };
    let length = candidates.find(|length| *length >= 1.0 && fits(length))?;
    Some(json!({
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": LOW_FREQ_FACTOR,
        "high_freq_factor": HIGH_FREQ_FACTOR,
        "original_max_position_embeddings": length as u64,
    }))
}

/// Llama 3's divisor of one frequency.
fn divisor(wavelength: f64, factor: f64, length: f64) -> f64 {
    if wavelength < length / HIGH_FREQ_FACTOR {
        1.0
    } else if wavelength > length / LOW_FREQ_FACTOR {
        factor
    } else {
        let smooth = (length / wavelength - LOW_FREQ_FACTOR) / (HIGH_FREQ_FACTOR - LOW_FREQ_FACTOR);
        1.0 / ((1.0 - smooth) / factor + smooth)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wavelengths(theta: f64, dim: i32) -> Vec<f64> {
        (0..dim / 2).map(|pair| TAU * theta.powf(2.0 * f64::from(pair) / f64::from(dim))).collect()
    }

    #[test]
    fn published_parameters_are_found() {
        for (factor, length) in [(32.0, 8192.0), (8.0, 8192.0), (32.0, 64.0)] {
            let wavelengths = wavelengths(500_000.0, 64);
            let factors: Vec<f64> = wavelengths.iter().map(|w| f64::from(divisor(*w, factor, length) as f32)).collect();
            let found = llama3(&factors, &wavelengths, None).unwrap();
            assert_eq!(found["factor"], factor);
            assert_eq!(found["original_max_position_embeddings"], length as u64);
        }
    }

    #[test]
    fn other_divisors_are_refused() {
        let wavelengths = wavelengths(10_000.0, 16);
        let ramp: Vec<f64> = (0..8).map(|pair| 1.0 + f64::from(pair)).collect();
        assert_eq!(llama3(&ramp, &wavelengths, None), None);
        assert_eq!(llama3(&[f64::NAN; 8], &wavelengths, None), None);
        assert_eq!(llama3(&[], &[], None), None);
    }
}
