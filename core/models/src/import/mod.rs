//! A GGUF into an MLX directory, without loss unless that is asked for.
//!
//! Blocks of Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q4_K and Q5_K become MLX's affine groups of 32: the codes stay what they are,
//! scales and biases are kept in 32-bit floats, so that every weight keeps its value. Q2_K, Q3_K and Q6_K have scales for
//! 16 values, which no MLX mode has: they become 32-bit floats, or are quantized anew. Other types are refused. The GGUF is memory-mapped and
//! one tensor at a time is converted; the directory appears whole, by a rename.

mod architecture;
mod config;
mod gemma3;
mod measure;
mod pieces;
mod repack;
mod rope;
mod tensors;
mod tokenizer;

use std::{
    fs,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use mesh_core::{ProgressSink, Stage};
use serde_json::Value;

use crate::{disk, error::ImportError, gguf::Gguf};

pub use measure::Imported;

/// Goes into the names of imported directories, so that a changed import is made again.
pub(crate) const VERSION: u32 = 2;

/// How directories begin that an import has not finished.
pub(crate) const WORK: &str = ".import-";

/// What becomes of blocks that no MLX mode has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Manner {
    /// 32-bit floats: every weight keeps its value.
    #[default]
    Exact,
    /// Affine groups of 32 with more bits than the blocks have: a little is lost, and said.
    Compact,
}

/// What an import made.
#[derive(Clone, Debug, PartialEq)]
pub struct ImportReport {
    /// `general.architecture` of the GGUF.
    pub architecture: String,
    /// Tensors in the GGUF.
    pub tensors_read: usize,
    /// Tensors in the directory: a quantized one becomes codes, scales and biases.
    pub tensors_written: usize,
    /// Size of the directory's weights, in bytes.
    pub weight_bytes: u64,
    /// What became of the weights, by what they are part of; empty unless it was asked for.
    pub parts: Vec<Imported>,
}

/// Imports `gguf` into the new directory `out`. Blocks; one tensor at a time is held in memory.
///
/// # Errors
///
/// Architectures other than llama, qwen2, qwen3 and gemma3, types that are no floats, legacy blocks or K-quants,
/// tokenizers other than byte-level BPE and scored pieces, settings that config.json cannot say, and an `out` that
/// exists. Nothing is left behind.
pub fn import_gguf(gguf: &Path, out: &Path, progress: &ProgressSink) -> Result<ImportReport, ImportError> {
    import(&[gguf.to_owned()], out, Manner::Exact, false, progress)
}

/// The same for a GGUF in one file or several, whose parts are given in order, and with what is said of it measured: what was
/// written is read again and compared with the source.
///
/// # Errors
///
/// As [`import_gguf`].
pub fn import_measured(
    ggufs: &[PathBuf],
    out: &Path,
    manner: Manner,
    progress: &ProgressSink,
) -> Result<ImportReport, ImportError> {
    import(ggufs, out, manner, true, progress)
}

fn import(
    ggufs: &[PathBuf],
    out: &Path,
    manner: Manner,
    measured: bool,
    progress: &ProgressSink,
) -> Result<ImportReport, ImportError> {
    if out.exists() {
        return Err(ImportError::Exists { path: out.to_owned() });
    }
    let files = ggufs.iter().map(|gguf| Gguf::open(gguf)).collect::<Result<Vec<_>, _>>()?;
    // The parts after the first hold tensors only.
    let (Some(file), Some(gguf)) = (files.first(), ggufs.first()) else {
        return Err(ImportError::Setting { key: "weights".into(), what: "there are none".into() });
    };
    let model = config::Model::read(file)?;
    let outputs = tensors::plan(&files, &model, manner)?;
    let config = config::config(file, &model, &outputs)?;
    let generation_config = config::generation_config(file);
    let tokenizer = tokenizer::read(file)?;

    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let bytes = outputs.iter().map(|output| output.bytes() as u64).sum();
    disk::check(&out.to_string_lossy(), bytes, disk::free(parent), parent)?;
    fs::create_dir_all(parent).map_err(ImportError::io(parent))?;
    let work = tempfile::Builder::new().prefix(WORK).tempdir_in(parent).map_err(ImportError::io(parent))?;
    for (name, content) in [
        ("config.json", &config),
        ("generation_config.json", &generation_config),
        ("tokenizer.json", &tokenizer.tokenizer),
        ("tokenizer_config.json", &tokenizer.config),
    ] {
        write_json(&work.path().join(name), content)?;
    }
    let weights = work.path().join("model.safetensors");
    let stage = Stage::Import { what: gguf.file_name().unwrap_or_default().to_string_lossy().into_owned() };
    let (done, total) = (AtomicU64::new(0), outputs.len() as u64);
    let tick = || {
        let done = done.fetch_add(1, Ordering::Relaxed);
        progress.report(&stage, done, Some(total));
    };
    let views = outputs.iter().map(|output| (output.name.as_str(), tensors::Ticking { output, tick: &tick }));
    let metadata = [("format".to_owned(), "mlx".to_owned())].into();
    safetensors::serialize_to_file(views, Some(metadata), &weights)
        .map_err(|error| ImportError::Io { path: weights.clone(), source: std::io::Error::other(error) })?;
    let weight_bytes = fs::metadata(&weights).map_err(ImportError::io(&weights))?.len();
    let parts = if measured { measure::measure(&weights, &outputs)? } else { Vec::new() };
    match fs::rename(work.path(), out) {
        Ok(()) => {}
        Err(_) if out.exists() => return Err(ImportError::Exists { path: out.to_owned() }),
        Err(source) => return Err(ImportError::Io { path: out.to_owned(), source }),
    }
    // It has another name now; there is nothing to remove.
    let _ = work.keep();
    progress.report(&stage, total, Some(total));
    Ok(ImportReport {
        architecture: model.architecture.name.to_owned(),
        tensors_read: files.iter().map(|file| file.tensors.len()).sum(),
        tensors_written: outputs.len(),
        weight_bytes,
        parts,
    })
}

fn write_json(path: &Path, content: &Value) -> Result<(), ImportError> {
    let text = format!("{content:#}\n");
    fs::write(path, text).map_err(ImportError::io(path))
}

#[cfg(test)]
mod tests;
