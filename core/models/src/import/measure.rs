//! What an import kept of its source: the written directory is read again and compared, value by value.

use std::{collections::BTreeMap, fs::File, path::Path};

use memmap2::Mmap;
use mesh_core::Part;
use safetensors::SafeTensors;
use serde::Serialize;

use super::tensors::Output;
use crate::{error::ImportError, gguf::GROUP};

/// Weights of one part and type, and what became of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Imported {
    /// What they are part of.
    pub part: Part,
    /// The GGUF's type.
    pub from: String,
    /// How they are stored now: `F32`, `affine 4-bit group 32`.
    pub to: String,
    /// How many tensors.
    pub tensors: u64,
    /// How many values.
    pub values: u64,
    /// How many of them are not, bit by bit, what the source gives.
    pub changed: u64,
    /// Root of the mean square of the difference, over that of the values.
    pub relative_rms: f64,
}

#[derive(Default)]
struct Sum {
    tensors: u64,
    values: u64,
    changed: u64,
    squares: f64,
    differences: f64,
}

/// Compares what lies in `file` with what it was made of.
pub(super) fn measure(file: &Path, outputs: &[Output<'_>]) -> Result<Vec<Imported>, ImportError> {
    let broken = |what: String| ImportError::Io { path: file.to_owned(), source: std::io::Error::other(what) };
    let opened = File::open(file).map_err(ImportError::io(file))?;
    // SAFETY: the file was written by this process just now, and lies in a directory that nobody else knows.
    let map = unsafe { Mmap::map(&opened) }.map_err(ImportError::io(file))?;
    let tensors = SafeTensors::deserialize(&map).map_err(|error| broken(error.to_string()))?;
    let read = |name: &str| tensors.tensor(name).map(|view| view.data()).map_err(|error| broken(error.to_string()));
    let mut sums: BTreeMap<(Part, String, String), Sum> = BTreeMap::new();
    for output in outputs {
        let Some(form) = output.form() else { continue };
        let sum = sums.entry((Part::of(&output.name), output.kind.to_string(), form)).or_default();
        sum.tensors += 1;
        let codes = read(&output.name)?;
        let module = output.name.strip_suffix(".weight").unwrap_or(&output.name);
        let bits = output.quantized().map(|(_, bits)| bits);
        let affine = match bits {
            Some(_) => Some((read(&format!("{module}.scales"))?, read(&format!("{module}.biases"))?)),
            None => None,
        };
        let (mut expected, mut kept, mut row) = (Vec::new(), Vec::new(), 0);
        for stored in output.ordered() {
            expected.clear();
            output.values(stored, &mut expected);
            kept.clear();
            let count = expected.len();
            match (bits, affine) {
                (Some(bits), Some((scales, biases))) => {
                    let (bytes, groups) = (count * bits / 8, count / GROUP);
                    let numbers = row * groups * 4..(row + 1) * groups * 4;
                    affine_values(
                        &codes[row * bytes..(row + 1) * bytes],
                        bits,
                        &scales[numbers.clone()],
                        &biases[numbers],
                        &mut kept,
                    );
                }
                _ => output.written_values(codes, row, count, &mut kept),
            }
            sum.values += count as u64;
            for (kept, expected) in kept.iter().zip(&expected) {
                sum.changed += u64::from(kept.to_bits() != expected.to_bits() && kept != expected);
                let (kept, expected) = (f64::from(*kept), f64::from(*expected));
                sum.squares += expected * expected;
                sum.differences += (kept - expected) * (kept - expected);
            }
            row += 1;
        }
    }
    let rows = sums.into_iter().map(|((part, from, to), sum)| Imported {
        part,
        from,
        to,
        tensors: sum.tensors,
        values: sum.values,
        changed: sum.changed,
        relative_rms: if sum.squares > 0.0 { (sum.differences / sum.squares).sqrt() } else { 0.0 },
    });
    Ok(rows.collect())
}

/// What MLX's affine groups of 32 mean: code `i` is at bit `bits · i` of the row's little-endian bit string.
fn affine_values(codes: &[u8], bits: usize, scales: &[u8], biases: &[u8], out: &mut Vec<f32>) {
    let (scales, biases) = (scales.as_chunks().0, biases.as_chunks().0);
    let groups = codes.chunks_exact(GROUP * bits / 8).zip(scales.iter().zip(biases));
    for (codes, (scale, bias)) in groups {
        let (scale, bias) = (f32::from_le_bytes(*scale), f32::from_le_bytes(*bias));
        let (mut word, mut held, mut bytes) = (0u32, 0, codes.iter());
        for _ in 0..GROUP {
            while held < bits {
                word |= u32::from(bytes.next().copied().unwrap_or(0)) << held;
                held += 8;
            }
            let code = word & ((1 << bits) - 1);
            word >>= bits;
            held -= bits;
            out.push(code as f32 * scale + bias);
        }
    }
}
