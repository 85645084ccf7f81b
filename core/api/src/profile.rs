//! What is known about a model before anything is loaded. Every fact names the file (and key) it was read from, so
//! that a verdict can say why.

use std::{collections::BTreeMap, fmt, path::PathBuf};

use serde::{Deserialize, Serialize};

use crate::anatomy::{Kept, Stored};

/// Where a fact was read.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Source {
    /// File name relative to the model's root, such as `config.json`.
    pub file: String,
    /// Key inside the file, such as `model_type`; absent where the file itself is the fact.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
}

impl Source {
    /// A file as such.
    pub fn file(file: impl Into<String>) -> Self {
        Self { file: file.into(), key: None }
    }

    /// A key inside a file.
    pub fn key(file: impl Into<String>, key: impl Into<String>) -> Self {
        Self { file: file.into(), key: Some(key.into()) }
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.key {
            Some(key) => write!(f, "`{key}` in {}", self.file),
            None => f.write_str(&self.file),
        }
    }
}

/// A value and where it comes from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Fact<T> {
    /// What was read.
    pub value: T,
    /// Where it was read.
    pub source: Source,
}

impl<T> Fact<T> {
    /// A fact from its two halves.
    pub fn new(value: T, source: Source) -> Self {
        Self { value, source }
    }
}

/// How weights are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WeightFormat {
    /// One or several `.safetensors` files beside a `config.json`.
    Safetensors,
    /// One or several `.gguf` files that carry everything.
    Gguf,
}

impl fmt::Display for WeightFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Safetensors => "safetensors",
            Self::Gguf => "GGUF",
        })
    }
}

/// The prevailing quantization. Single tensors may differ; loaders read the per-tensor truth.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Quantization {
    /// `affine`, `mxfp4`, `fp8`, or a GGUF type name such as `Q4_1`.
    pub mode: String,
    /// Bits a code, where the mode does not fix it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bits: Option<u32>,
    /// Values that share one scale.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub group_size: Option<u32>,
}

impl fmt::Display for Quantization {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.mode)?;
        if let Some(bits) = self.bits {
            write!(f, " {bits}-bit")?;
        }
        if let Some(group) = self.group_size {
            write!(f, " group {group}")?;
        }
        Ok(())
    }
}

/// A chat template as published with the model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ChatTemplate {
    /// The template used when none is asked for by name.
    pub default: String,
    /// Further templates by name (`tool_use`, `rag` …).
    pub named: BTreeMap<String, String>,
}

/// Everything known about one model artifact, from its config and headers.
///
/// Made by `mesh-models`; read by backends, families and the election. Holds no open file.
#[derive(Clone, Debug, Serialize)]
pub struct ModelProfile {
    /// The name it is served under.
    pub name: String,
    /// The directory that holds the model's files.
    pub root: PathBuf,
    /// The weight files, in shard order.
    pub weights: Vec<PathBuf>,
    /// How the weights are stored.
    pub format: Fact<WeightFormat>,
    /// Size of the weight files together, in bytes.
    pub weight_bytes: Fact<u64>,
    /// `model_type` of config.json (of its `text_config` where that is what can be served).
    pub model_type: Option<Fact<String>>,
    /// `architectures` of config.json.
    pub architectures: Option<Fact<Vec<String>>>,
    /// `general.architecture` of a GGUF.
    pub gguf_architecture: Option<Fact<String>>,
    /// The prevailing quantization; absent for plain floats.
    pub quantization: Option<Fact<Quantization>>,
    /// Longest context the model was made for, in tokens.
    pub context_tokens_max: Option<Fact<u32>>,
    /// Number of parameters.
    pub parameters: Option<Fact<u64>>,
    /// Those that one token meets, where experts are chosen among.
    pub parameters_active: Option<Fact<u64>>,
    /// How the weights are stored, by what they are part of.
    pub stored: Option<Fact<Vec<Stored>>>,
    /// What is kept of a sequence while it is computed.
    pub kept: Option<Fact<Kept>>,
    /// Number of transformer layers.
    pub layers: Option<Fact<u32>>,
    /// Key/value heads a layer.
    pub kv_heads: Option<Fact<u32>>,
    /// Size of one head.
    pub head_dim: Option<Fact<u32>>,
    /// Entries in the vocabulary.
    pub vocab_size: Option<Fact<u32>>,
    /// Every token that ends a generation: the union of the configs and the tokenizer.
    pub eos_token_ids: Vec<Fact<u32>>,
    /// Text of the begin-of-text token, as templates see it.
    pub bos_token: Option<Fact<String>>,
    /// Text of the end-of-text token, as templates see it.
    pub eos_token: Option<Fact<String>>,
    /// `tokenizer.json`, where there is one.
    pub tokenizer: Option<Fact<PathBuf>>,
    /// The model's own chat template.
    #[serde(skip_serializing)]
    pub chat_template: Option<Fact<ChatTemplate>>,
    /// True where the checkpoint has a vision part.
    pub vision: Option<Fact<bool>>,
    /// Tensor names; filled only where the config did not settle what the model is.
    #[serde(skip_serializing)]
    pub tensor_names: Option<Fact<Vec<String>>>,
    /// config.json whole, `Null` where there is none.
    #[serde(skip_serializing)]
    pub config: serde_json::Value,
    /// generation_config.json whole, `Null` where there is none.
    #[serde(skip_serializing)]
    pub generation_config: serde_json::Value,
}

impl ModelProfile {
    /// A model of which only its files are known; what else is known is filled in.
    pub fn of_files(
        name: String,
        root: PathBuf,
        weights: Vec<PathBuf>,
        format: Fact<WeightFormat>,
        bytes: u64,
    ) -> Self {
        let weight_bytes = Fact::new(bytes, format.source.clone());
        Self {
            name,
            root,
            weights,
            format,
            weight_bytes,
            model_type: None,
            architectures: None,
            gguf_architecture: None,
            quantization: None,
            context_tokens_max: None,
            parameters: None,
            parameters_active: None,
            stored: None,
            kept: None,
            layers: None,
            kv_heads: None,
            head_dim: None,
            vocab_size: None,
            eos_token_ids: Vec::new(),
            bos_token: None,
            eos_token: None,
            tokenizer: None,
            chat_template: None,
            vision: None,
            tensor_names: None,
            config: serde_json::Value::Null,
            generation_config: serde_json::Value::Null,
        }
    }

    /// The facts as rows of name, value and source, for people to read.
    pub fn facts(&self) -> Vec<(&'static str, String, Source)> {
        fn row<T>(
            name: &'static str,
            fact: &Option<Fact<T>>,
            show: impl Fn(&T) -> String,
        ) -> Option<(&'static str, String, Source)> {
            fact.as_ref().map(|fact| (name, show(&fact.value), fact.source.clone()))
        }
        let eos = (!self.eos_token_ids.is_empty()).then(|| {
            let ids: Vec<_> = self.eos_token_ids.iter().map(|fact| fact.value.to_string()).collect();
            ("eos_token_ids", ids.join(", "), self.eos_token_ids[0].source.clone())
        });
        [
            Some(("format", self.format.value.to_string(), self.format.source.clone())),
            Some(("weight_bytes", self.weight_bytes.value.to_string(), self.weight_bytes.source.clone())),
            row("model_type", &self.model_type, String::clone),
            row("architectures", &self.architectures, |names| names.join(", ")),
            row("gguf_architecture", &self.gguf_architecture, String::clone),
            row("quantization", &self.quantization, Quantization::to_string),
            row("parameters", &self.parameters, u64::to_string),
            row("parameters_active", &self.parameters_active, u64::to_string),
            row("context_tokens_max", &self.context_tokens_max, u32::to_string),
            row("layers", &self.layers, u32::to_string),
            row("kv_heads", &self.kv_heads, u32::to_string),
            row("head_dim", &self.head_dim, u32::to_string),
            row("kept", &self.kept, Kept::to_string),
            row("vocab_size", &self.vocab_size, u32::to_string),
            eos,
            row("tokenizer", &self.tokenizer, |path| path.display().to_string()),
            row("chat_template", &self.chat_template, |template| {
                format!("{} characters", template.default.chars().count())
            }),
            row("vision", &self.vision, bool::to_string),
            row("tensors", &self.tensor_names, |names| names.len().to_string()),
        ]
        .into_iter()
        .flatten()
        .collect()
    }

    /// Bytes of keys and values for one token of context in 16-bit floats, where the facts for it are known. Of layers with
    /// windows too, as if they kept everything.
    pub fn kv_bytes_per_token(&self) -> Option<u64> {
        if let Some(Fact { value: kept, .. }) = &self.kept {
            let windows = kept.windows.iter().fold(0u64, |sum, (_, values)| sum.saturating_add(*values));
            return Some(kept.token_values.saturating_add(windows).saturating_mul(2));
        }
        let (layers, heads, dim) = (self.layers.as_ref()?, self.kv_heads.as_ref()?, self.head_dim.as_ref()?);
        Some(4 * u64::from(layers.value) * u64::from(heads.value) * u64::from(dim.value))
    }
}
