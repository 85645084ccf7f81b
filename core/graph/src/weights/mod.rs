//! Checked weights. They balance: a missing tensor is named with the shape it should have, and one that nobody took
//! stops the load.
//!
//! Graphs ask for tensors under one set of names. Where a checkpoint has others, its family renames them first; errors,
//! and the quantization table, keep to the checkpoint's own.

mod layout;
mod stacked;

use std::{collections::HashMap, path::PathBuf};

use mesh_core::DeviceKind;
use mlx_rs::{Array, Dtype, random};
use serde_json::Value;

pub use layout::MIXTRAL_NAMES;

use crate::{
    ffi::{self, Mode, Packed},
    model::GraphError,
    quantization::{QuantizationTable, Scheme},
};

/// Where, and as what, weights are held.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Placement {
    /// The device that will compute.
    pub device: DeviceKind,
    /// Floats are converted to this type; `None` stands for the one that most of the checkpoint's floats have.
    pub floats: Option<Dtype>,
    /// Unpack quantized matrices at load.
    pub dequantize: bool,
    /// Use kernels of our own where they apply. Off only to compare with plain operations.
    pub kernels: bool,
}

impl Placement {
    /// For the CPU: MLX computes half floats there many times slower than f32, and accumulates in them.
    pub fn cpu(dequantize: bool) -> Self {
        Self { device: DeviceKind::Cpu, floats: Some(Dtype::Float32), dequantize, kernels: false }
    }

    /// For a GPU: as the checkpoint has it.
    pub fn gpu(device: DeviceKind) -> Self {
        Self { device, floats: None, dequantize: false, kernels: true }
    }

    /// Whether CUDA kernels of our own are to be used.
    pub(crate) fn fused(self) -> bool {
        self.kernels && self.device == DeviceKind::Cuda
    }
}

/// A checkpoint's tensors, each to be taken once.
pub struct Weights {
    source: Source,
    quantization: QuantizationTable,
    placement: Placement,
    taken: Vec<Array>,
    /// What was replaced by what in names, in order.
    renamed: Vec<layout::Renamed>,
}

/// A tensor, and what its file calls it.
#[derive(Clone)]
struct Tensor {
    array: Array,
    published: String,
}

enum Source {
    Files(HashMap<String, Tensor>),
    /// Made on demand, for benchmarks of a shape.
    Random {
        dtype: Dtype,
        scheme: Option<Scheme>,
    },
}

impl Weights {
    /// Opens safetensors files. Lazy: values are read when they are evaluated.
    pub fn open(files: &[PathBuf], config: &Value, placement: Placement) -> Result<Self, GraphError> {
        ffi::init();
        let mut tensors = HashMap::new();
        for file in files {
            let failed = |what: String| GraphError::File { path: file.display().to_string(), what };
            for (name, array) in Array::load_safetensors(file).map_err(|error| failed(error.to_string()))? {
                let tensor = Tensor { array, published: name.clone() };
                if tensors.insert(name.clone(), tensor).is_some() {
                    return Err(failed(format!("tensor `{name}` is in two files")));
                }
            }
        }
        let quantization = QuantizationTable::read(config)?;
        // One type for all: a single f32 norm would make f32 of all that follows it.
        let floats = placement.floats.or_else(|| prevailing(tensors.values()));
        let placement = Placement { floats, ..placement };
        let (taken, renamed) = (Vec::new(), Vec::new());
        Ok(Self { source: Source::Files(tensors), quantization, placement, taken, renamed })
    }

    /// Seeded random weights of whatever shapes are asked for.
    pub fn random(seed: u64, dtype: Dtype, scheme: Option<Scheme>, placement: Placement) -> Result<Self, GraphError> {
        ffi::init();
        random::seed(seed)?;
        let quantization = scheme.map(QuantizationTable::uniform).unwrap_or_default();
        let placement = Placement { floats: placement.floats.or(Some(dtype)), ..placement };
        let (taken, renamed) = (Vec::new(), Vec::new());
        Ok(Self { source: Source::Random { dtype, scheme }, quantization, placement, taken, renamed })
    }

    /// Where the weights are held.
    pub fn placement(&self) -> Placement {
        self.placement
    }

    /// Whether a tensor of that name is there and not yet taken.
    pub fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Files(tensors) => tensors.contains_key(name),
            Source::Random { .. } => false,
        }
    }

    /// The shape of a tensor that is there and not yet taken.
    pub fn shape(&self, name: &str) -> Option<&[i32]> {
        match &self.source {
            Source::Files(tensors) => tensors.get(name).map(|tensor| tensor.array.shape()),
            Source::Random { .. } => None,
        }
    }

    /// Drops a tensor that is known to be redundant.
    pub fn drop_tensor(&mut self, name: &str) {
        if let Source::Files(tensors) = &mut self.source {
            tensors.remove(name);
        }
    }

    /// Takes a tensor as it is stored, floats in the type they are held in.
    fn take_stored(&mut self, name: &str, shape: &[i32]) -> Result<Array, GraphError> {
        let array = match &mut self.source {
            Source::Files(tensors) => match tensors.remove(name) {
                Some(tensor) => tensor.array,
                None => {
                    let name = self.published(name);
                    return Err(GraphError::Weights(format!("tensor `{name}` of shape {shape:?} is missing")));
                }
            },
            Source::Random { dtype, .. } => {
                let scale = 1.0 / (*shape.last().unwrap_or(&1) as f32).sqrt();
                let values = random::normal::<f32>(shape, None, scale, None)?;
                let values = if shape.len() == 1 { values.abs()?.add(Array::from_f32(0.5))? } else { values };
                values.as_dtype(*dtype)?
            }
        };
        if array.shape() != shape {
            let (name, found) = (self.published(name), array.shape());
            return Err(GraphError::Weights(format!("tensor `{name}` has shape {found:?}, not {shape:?}")));
        }
        let array = match self.placement.floats {
            Some(dtype) if is_float(array.dtype()) && array.dtype() != dtype => array.as_dtype(dtype)?,
            _ => array,
        };
        self.taken.push(array.clone());
        Ok(array)
    }

    /// Takes a tensor that is computed with in f32, whatever the others are.
    pub fn take_f32(&mut self, name: &str, shape: &[i32]) -> Result<Array, GraphError> {
        let floats = self.placement.floats.replace(Dtype::Float32);
        let taken = self.take(name, shape);
        self.placement.floats = floats;
        let array = taken?.as_dtype(Dtype::Float32)?;
        Ok(array)
    }

    /// Takes a tensor that has to hold floats.
    pub fn take(&mut self, name: &str, shape: &[i32]) -> Result<Array, GraphError> {
        let array = self.take_stored(name, shape)?;
        match is_float(array.dtype()) {
            true => Ok(array),
            false => {
                let (name, dtype) = (self.published(name), array.dtype());
                Err(GraphError::Weights(format!("tensor `{name}` holds {dtype:?}, not floats")))
            }
        }
    }

    /// Takes a matrix `{name}.weight` of `[out, in]`, packed or plain.
    pub fn take_matrix(&mut self, name: &str, out: i32, inner: i32) -> Result<Matrix, GraphError> {
        self.take_matrices(name, &[out], inner)
    }

    /// Takes `{name}.weight` of `[…, out, in]`, given the axes before the last; packed or plain.
    fn take_matrices(&mut self, name: &str, rows: &[i32], inner: i32) -> Result<Matrix, GraphError> {
        self.unpack_fp8(name)?;
        let shape = |columns: i32| [rows, &[columns]].concat();
        let Some(scheme) = self.scheme_of(name, inner) else {
            return Ok(Matrix::Plain(self.take(&format!("{name}.weight"), &shape(inner))?));
        };
        let bits = i64::from(inner) * i64::from(scheme.bits);
        if inner % scheme.group_size != 0 || bits % 32 != 0 {
            return Err(GraphError::Weights(format!(
                "`{}` has {inner} columns, which do not divide into groups of {}",
                self.published(name),
                scheme.group_size
            )));
        }
        let groups = shape(inner / scheme.group_size);
        let packed = if let Source::Random { dtype, .. } = self.source {
            self.random_packed(&shape((bits / 32) as i32), &groups, inner, scheme, dtype)?
        } else {
            Packed {
                weight: self.take_stored(&format!("{name}.weight"), &shape((bits / 32) as i32))?,
                scales: self.take_stored(&format!("{name}.scales"), &groups)?,
                biases: match scheme.mode.has_biases() {
                    true => Some(self.take_stored(&format!("{name}.biases"), &groups)?),
                    false => None,
                },
                group_size: scheme.group_size,
                bits: scheme.bits,
                mode: scheme.mode,
            }
        };
        if !self.placement.dequantize {
            return Ok(Matrix::Packed(packed));
        }
        let plain = self.dequantized(&packed)?;
        let parts = if packed.biases.is_some() { 3 } else { 2 };
        self.taken.truncate(self.taken.len().saturating_sub(parts));
        self.taken.push(plain.clone());
        Ok(Matrix::Plain(plain))
    }

    /// The plain values of a packed matrix, in the type that floats are held in.
    pub(crate) fn dequantized(&self, packed: &Packed) -> Result<Array, GraphError> {
        let plain = ffi::dequantize(packed)?;
        Ok(match self.placement.floats {
            Some(dtype) => plain.as_dtype(dtype)?,
            None => plain,
        })
    }

    fn scheme_of(&self, name: &str, inner: i32) -> Option<Scheme> {
        match &self.source {
            Source::Files(tensors) => {
                let published = &tensors.get(&format!("{name}.scales"))?.published;
                self.quantization.scheme(published.strip_suffix(".scales").unwrap_or(published))
            }
            Source::Random { scheme, .. } => scheme.filter(|scheme| inner % scheme.group_size == 0),
        }
    }

    fn random_packed(
        &mut self,
        words: &[i32],
        groups: &[i32],
        inner: i32,
        scheme: Scheme,
        dtype: Dtype,
    ) -> Result<Packed, GraphError> {
        let weight = random::randint::<_, u32>(0, i32::MAX, words, None)?;
        let levels = (1_i64 << scheme.bits) as f32;
        let spread = 3.5 / ((inner as f32).sqrt() * levels);
        let scales = random::uniform::<_, f32>(0.5 * spread, spread, groups, None)?.as_dtype(dtype)?;
        let biases = scales.multiply(Array::from_f32(-levels / 2.0).as_dtype(dtype)?)?;
        let has_biases = scheme.mode == Mode::Affine;
        self.taken.extend([weight.clone(), scales.clone()]);
        self.taken.extend(has_biases.then(|| biases.clone()));
        Ok(Packed {
            weight,
            scales,
            biases: has_biases.then_some(biases),
            group_size: scheme.group_size,
            bits: scheme.bits,
            mode: scheme.mode,
        })
    }

    /// Ends the taking: what is left over is an error that lists it. Returns the arrays to evaluate.
    pub fn finish(self) -> Result<Vec<Array>, GraphError> {
        if let Source::Files(tensors) = &self.source
            && !tensors.is_empty()
        {
            let mut names: Vec<_> =
                tensors.values().map(|tensor| format!("`{}` {:?}", tensor.published, tensor.array.shape())).collect();
            names.sort();
            let more = names.len().saturating_sub(20);
            names.truncate(20);
            let more = if more > 0 { format!(" and {more} more") } else { String::new() };
            return Err(GraphError::Weights(format!(
                "the model does not use these tensors: {}{more}",
                names.join(", ")
            )));
        }
        Ok(self.taken)
    }
}

/// A matrix `[out, in]` as it is held.
#[derive(Clone, Debug)]
pub enum Matrix {
    /// Plain floats.
    Plain(Array),
    /// Quantized.
    Packed(Packed),
}

/// The type of most floats, by bytes.
fn prevailing<'a>(tensors: impl Iterator<Item = &'a Tensor>) -> Option<Dtype> {
    let mut bytes = [(Dtype::Bfloat16, 0), (Dtype::Float16, 0), (Dtype::Float32, 0)];
    for Tensor { array, .. } in tensors {
        if let Some((_, sum)) = bytes.iter_mut().find(|(dtype, _)| *dtype == array.dtype()) {
            *sum += array.nbytes();
        }
    }
    let (dtype, most) = bytes.into_iter().max_by_key(|(_, sum)| *sum)?;
    (most > 0).then_some(dtype)
}

fn is_float(dtype: Dtype) -> bool {
    matches!(dtype, Dtype::Float16 | Dtype::Bfloat16 | Dtype::Float32 | Dtype::Float64)
}

#[cfg(test)]
mod tests;
