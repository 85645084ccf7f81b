//! A checkpoint of plain floats into one that MLX has quantized, as mlx-lm writes it.
//!
//! Shard by shard and rows by rows: what is in memory at a time is a few slabs of rows, however large a tensor or a shard.
//! The numbers are MLX's own. The directory appears whole, by a rename.

mod error;
mod plan;
mod shard;
mod sidecars;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, fs, path::Path};

use mesh_core::{ModelProfile, Part, ProgressSink, Stage, WeightFormat};
use mesh_graph::{Scheme, ffi::Mode};
use serde::Serialize;
use serde_json::{Value, json};

pub use error::ConvertError;
use plan::Planned;

/// Rows that are quantized at a time, in bytes of the source.
const SLAB_BYTES: usize = 16 << 20;
const CONFIG: &str = "config.json";
const INDEX: &str = "model.safetensors.index.json";

/// How to quantize: bits and group size are the mode's own where they are absent.
pub fn scheme(mode: &str, bits: Option<u32>, group_size: Option<u32>) -> Result<Scheme, ConvertError> {
    let refuse = |what: String| Err(ConvertError::Scheme { what });
    let (mode, own_bits, own_group, bits_known, groups_known): (_, _, _, &[u32], &[u32]) = match Mode::parse(mode) {
        Some(Mode::Affine) => (Mode::Affine, 4, 64, &[2, 3, 4, 5, 6, 8], &[32, 64, 128]),
        Some(Mode::Mxfp4) => (Mode::Mxfp4, 4, 32, &[4], &[32]),
        Some(Mode::Mxfp8) => (Mode::Mxfp8, 8, 32, &[8], &[32]),
        Some(Mode::Nvfp4) => (Mode::Nvfp4, 4, 16, &[4], &[16]),
        None => return refuse(format!("there is no mode `{mode}`; there are: affine, mxfp4, mxfp8, nvfp4")),
    };
    let (bits, group_size) = (bits.unwrap_or(own_bits), group_size.unwrap_or(own_group));
    let listed = |known: &[u32]| known.iter().map(u32::to_string).collect::<Vec<_>>().join(", ");
    if !bits_known.contains(&bits) {
        return refuse(format!("{} has no codes of {bits} bits; it has: {}", mode.id(), listed(bits_known)));
    }
    if !groups_known.contains(&group_size) {
        return refuse(format!("{} has no groups of {group_size}; it has: {}", mode.id(), listed(groups_known)));
    }
    Ok(Scheme { group_size: group_size as i32, bits: bits as i32, mode })
}

/// Weights of one part, and what became of them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Converted {
    /// What they are part of.
    pub part: Part,
    /// How they are stored now: `BF16`, `affine 4-bit group 64`.
    pub form: String,
    /// Why they were left as they were, where they were.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kept: Option<&'static str>,
    /// How many tensors.
    pub tensors: u64,
    /// How many values.
    pub values: u64,
    /// What they took, in bytes.
    pub bytes_before: u64,
    /// What they take, in bytes.
    pub bytes_after: u64,
    /// Root of the mean square of the difference, over that of the values.
    pub relative_rms: f64,
}

/// What a conversion made.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ConvertReport {
    /// By part and form.
    pub parts: Vec<Converted>,
    /// Size of the weights before, in bytes.
    pub bytes_before: u64,
    /// Size of the weights now, in bytes.
    pub bytes_after: u64,
}

/// Quantizes a checkpoint into the new directory `out`. Blocks, on the thread that then has used MLX.
///
/// # Errors
///
/// Weights that are no safetensors, or quantized already; files that are broken or cannot be written; an `out` that exists.
/// Nothing is left behind.
pub fn convert(
    profile: &ModelProfile,
    out: &Path,
    scheme: Scheme,
    progress: &ProgressSink,
) -> Result<ConvertReport, ConvertError> {
    convert_by(profile, out, scheme, SLAB_BYTES, progress)
}

fn convert_by(
    profile: &ModelProfile,
    out: &Path,
    scheme: Scheme,
    slab_bytes: usize,
    progress: &ProgressSink,
) -> Result<ConvertReport, ConvertError> {
    if out.exists() {
        return Err(ConvertError::Exists { path: out.to_owned() });
    }
    if profile.format.value != WeightFormat::Safetensors {
        return Err(ConvertError::Format { model: profile.name.clone(), found: profile.format.value });
    }
    if let Some(fact) = &profile.quantization {
        let (model, found, at) = (profile.name.clone(), fact.value.to_string(), fact.source.clone());
        return Err(ConvertError::Quantized { model, found, at });
    }
    if !profile.config.is_object() {
        return Err(ConvertError::NoConfig { model: profile.name.clone() });
    }
    let mut shards = profile.weights.iter().map(|path| plan::shard(path, scheme)).collect::<Result<Vec<_>, _>>()?;
    if let Some(name) = shards.iter().flatten().find(|tensor| tensor.name.ends_with(".scales")) {
        let (model, found) = (profile.name.clone(), format!("tensor `{}`", name.name));
        return Err(ConvertError::Quantized { model, found, at: profile.format.source.clone() });
    }
    if !shards.iter().flatten().any(|tensor| tensor.scheme().is_some()) {
        return Err(ConvertError::Nothing { model: profile.name.clone(), group_size: scheme.group_size });
    }

    plan::stack_experts(&mut shards);

    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let io = ConvertError::io;
    fs::create_dir_all(parent).map_err(io(parent))?;
    let work = tempfile::Builder::new().prefix(".convert-").tempdir_in(parent).map_err(io(parent))?;
    sidecars::copy(&profile.root, work.path())?;
    write_json(&work.path().join(CONFIG), &config(&profile.config, scheme))?;

    let stage = Stage::Convert { what: profile.name.clone() };
    let total: u64 = shards.iter().flatten().map(Planned::values).sum();
    let files = shard::Files::create(work.path(), &shards)?;
    let (mut sums, mut done) = (Sums::default(), 0);
    for (source, planned) in profile.weights.iter().zip(&shards) {
        let reader = shard::Reader { source, files: &files, slab_bytes };
        reader.convert(planned, &mut sums, |values| {
            done += values;
            progress.report(&stage, done.min(total.saturating_sub(1)), Some(total));
        })?;
    }
    files.sync()?;
    let bytes_after = files.bytes;
    let metadata = json!({ "total_size": bytes_after, "total_parameters": total });
    write_json(&work.path().join(INDEX), &json!({ "metadata": metadata, "weight_map": files.map() }))?;
    match fs::rename(work.path(), out) {
        Ok(()) => {}
        Err(_) if out.exists() => return Err(ConvertError::Exists { path: out.to_owned() }),
        Err(source) => return Err(ConvertError::Io { path: out.to_owned(), source }),
    }
    // It has another name now; there is nothing to remove.
    let _ = work.keep();
    progress.report(&stage, total, Some(total));
    let parts = sums.rows();
    let bytes_before = parts.iter().map(|part| part.bytes_before).sum();
    Ok(ConvertReport { parts, bytes_before, bytes_after })
}

fn shard_name(number: usize, of: usize) -> String {
    match of {
        1 => "model.safetensors".into(),
        _ => format!("model-{:05}-of-{of:05}.safetensors", number + 1),
    }
}

/// config.json with what mlx-lm adds to it.
fn config(config: &Value, scheme: Scheme) -> Value {
    let mut config = config.clone();
    let Scheme { group_size, bits, mode } = scheme;
    let quantization = json!({ "group_size": group_size, "bits": bits, "mode": mode.id() });
    config["quantization"] = quantization.clone();
    config["quantization_config"] = quantization;
    config
}

fn write_json(path: &Path, content: &Value) -> Result<(), ConvertError> {
    fs::write(path, format!("{content:#}\n")).map_err(ConvertError::io(path))
}

/// What is added up over tensors, by part and form, and by why they were left as they were.
#[derive(Debug, Default)]
struct Sums(BTreeMap<(Part, String, Option<&'static str>), (Converted, Squares)>);

/// Squares of values, and of what they changed by.
#[derive(Clone, Copy, Debug, Default)]
struct Squares {
    values: f64,
    differences: f64,
}

impl Sums {
    fn add(&mut self, tensor: &Planned, squares: Squares) {
        let (part, form) = (Part::of(&tensor.name), tensor.form());
        let empty = || Converted {
            part,
            form: form.clone(),
            kept: tensor.kept(),
            tensors: 0,
            values: 0,
            bytes_before: 0,
            bytes_after: 0,
            relative_rms: 0.0,
        };
        let (row, sum) =
            self.0.entry((part, form.clone(), tensor.kept())).or_insert_with(|| (empty(), Squares::default()));
        row.tensors += 1;
        row.values += tensor.values();
        row.bytes_before += tensor.bytes();
        row.bytes_after += tensor.parts().iter().map(plan::Output::bytes).sum::<u64>();
        sum.values += squares.values;
        sum.differences += squares.differences;
    }

    fn rows(self) -> Vec<Converted> {
        let rms = |sum: Squares| if sum.values > 0.0 { (sum.differences / sum.values).sqrt() } else { 0.0 };
        self.0.into_values().map(|(row, sum)| Converted { relative_rms: rms(sum), ..row }).collect()
    }
}
