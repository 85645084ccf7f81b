//! What can go wrong with a conversion.

use std::path::PathBuf;

use mesh_core::{Hint, Source, WeightFormat};

/// A checkpoint that could not be quantized.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The way to quantize does not exist.
    #[error("{what}")]
    Scheme {
        /// What is wrong with it.
        what: String,
    },
    /// Other weights than safetensors.
    #[error("the weights of {model} are {found}, and safetensors are quantized")]
    Format {
        /// The model.
        model: String,
        /// What they are.
        found: WeightFormat,
    },
    /// The weights are quantized already.
    #[error("the weights of {model} are quantized already: {found} ({at})")]
    Quantized {
        /// The model.
        model: String,
        /// How, or what shows it.
        found: String,
        /// Where that is known from.
        at: Source,
    },
    /// There is no config.json to say it in.
    #[error("{model} has no config.json")]
    NoConfig {
        /// The model.
        model: String,
    },
    /// No matrix can be quantized like that.
    #[error("{model} has no matrix whose rows divide into groups of {group_size}")]
    Nothing {
        /// The model.
        model: String,
        /// Values that share a scale.
        group_size: i32,
    },
    /// The output exists already.
    #[error("{}: exists already", .path.display())]
    Exists {
        /// The output.
        path: PathBuf,
    },
    /// A file of weights is broken.
    #[error("{}: {what}", .path.display())]
    Broken {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// MLX failed.
    #[error("MLX: {0}")]
    Mlx(String),
}

impl ConvertError {
    pub(super) fn io(path: impl Into<PathBuf>) -> impl FnOnce(std::io::Error) -> Self {
        let path = path.into();
        move |source| Self::Io { path, source }
    }
}

impl Hint for ConvertError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Scheme { .. } => Some("`mesh-llm models convert --help` shows what there is".into()),
            Self::Format { .. } => Some("`mesh-llm models import` makes an MLX directory of a GGUF".into()),
            Self::Quantized { .. } => Some("take the checkpoint of plain floats that it was made of".into()),
            Self::NoConfig { .. } => Some("put the model's config.json beside its weights".into()),
            Self::Nothing { .. } => Some("take smaller groups: --group-size 32".into()),
            Self::Exists { .. } => Some("remove it, or choose another place".into()),
            Self::Broken { .. } => Some("download the model again".into()),
            Self::Io { .. } => Some("check permissions and free space".into()),
            Self::Mlx(_) => None,
        }
    }
}
