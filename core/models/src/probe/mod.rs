//! What a model is, from its configs and headers. Every file is size-capped before it is read, every fact names its
//! source, and a file that was cut off is an error that says by how much.

mod census;
mod directory;
mod gguf;
mod kept;
mod safetensors;
mod template;
mod tokens;

use std::{
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use mesh_core::{Fact, ModelProfile, ProbeError, Source, WeightFormat};
use serde::de::DeserializeOwned;
use serde_json::Value;

use crate::store::Artifact;

/// Largest config.json, in bytes.
const CONFIG_BYTES_MAX: u64 = 2 << 20;
/// Most values in a JSON object that is kept whole. A value of two bytes takes 72 in memory, and may take 300.
const VALUES_MAX: usize = 1 << 17;
/// Largest generation_config.json, in bytes.
const GENERATION_CONFIG_BYTES_MAX: u64 = 256 << 10;
/// Largest tokenizer_config.json and special_tokens_map.json, in bytes; some list every added token.
const TOKENIZER_CONFIG_BYTES_MAX: u64 = 16 << 20;
/// Largest tokenizer.json, in bytes. Gemma's has 33 MB.
const TOKENIZER_BYTES_MAX: u64 = 128 << 20;

/// What is known about an artifact from its configs and headers.
///
/// # Errors
///
/// A file that is missing, cut off, malformed or larger than its bound.
pub fn probe(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    match artifact.format {
        WeightFormat::Safetensors => directory::profile(artifact),
        WeightFormat::Gguf => gguf::profile(artifact),
    }
}

/// A profile that knows no more than what the artifact itself says.
fn blank(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    let mut bytes = 0u64;
    for path in &artifact.weights {
        let metadata = std::fs::metadata(path).map_err(|source| missing_or(path, source))?;
        bytes = bytes.saturating_add(metadata.len());
    }
    let Some(first) = artifact.weights.first() else {
        return Err(ProbeError::MissingFile { root: artifact.root.clone(), file: "weights".into() });
    };
    let format = Fact::new(artifact.format, Source::file(relative(&artifact.root, first)));
    let (name, root) = (artifact.name.clone(), artifact.root.clone());
    Ok(ModelProfile::of_files(name, root, artifact.weights.clone(), format, bytes))
}

/// A path as shown to people: below the model's directory.
fn relative(root: &Path, path: &Path) -> String {
    path.strip_prefix(root).unwrap_or(path).to_string_lossy().into_owned()
}

/// Adds an end-of-text token unless it is known already; the first source stays.
fn add_eos(profile: &mut ModelProfile, id: u32, source: Source) {
    if profile.eos_token_ids.iter().all(|fact| fact.value != id) {
        profile.eos_token_ids.push(Fact::new(id, source));
    }
}

fn missing_or(path: &Path, source: std::io::Error) -> ProbeError {
    match source.kind() {
        std::io::ErrorKind::NotFound => ProbeError::Missing { path: path.to_owned() },
        _ => ProbeError::Io { path: path.to_owned(), source },
    }
}

fn malformed(path: &Path, what: impl Into<String>) -> ProbeError {
    ProbeError::Malformed { path: path.to_owned(), what: what.into() }
}

/// A file's content if the file exists and holds at most `bytes_max` bytes.
pub(crate) fn read_capped(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, ProbeError> {
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io(error)),
    };
    // The size that metadata claims is no more than a hint: the file may be a pipe.
    let hint = file.metadata().map_or(0, |metadata| metadata.len().min(bytes_max));
    let mut content = Vec::with_capacity(hint as usize + 1);
    file.take(bytes_max + 1).read_to_end(&mut content).map_err(io)?;
    if content.len() as u64 > bytes_max {
        return Err(malformed(path, format!("larger than the {bytes_max} bytes that are read")));
    }
    Ok(Some(content))
}

/// Of a JSON object in the model's directory, what `T` takes; nothing if the file is not there.
fn typed<T: DeserializeOwned + Default>(root: &Path, file: &str, bytes_max: u64) -> Result<T, ProbeError> {
    let path: PathBuf = root.join(file);
    let Some(content) = read_capped(&path, bytes_max)? else { return Ok(T::default()) };
    serde_json::from_slice(&content).map_err(|error| malformed(&path, error.to_string()))
}

/// A JSON object in the model's directory; `Null` if the file is not there.
fn json(root: &Path, file: &str, bytes_max: u64) -> Result<Value, ProbeError> {
    let path: PathBuf = root.join(file);
    let Some(content) = read_capped(&path, bytes_max)? else { return Ok(Value::Null) };
    // At most as many as there are things that stand before one.
    let values = content.iter().filter(|byte| matches!(byte, b',' | b'[' | b'{')).count();
    if values > VALUES_MAX {
        return Err(malformed(&path, format!("may hold {values} values; at most {VALUES_MAX} are read")));
    }
    match serde_json::from_slice(&content) {
        Ok(value @ Value::Object(_)) => Ok(value),
        Ok(_) => Err(malformed(&path, "not a JSON object")),
        Err(error) => Err(malformed(&path, error.to_string())),
    }
}

#[cfg(test)]
mod tests;
