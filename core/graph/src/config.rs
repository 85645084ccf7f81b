//! The settings of config.json that most decoders share, under the checkpoints' own names.

use mesh_core::ModelProfile;
use serde::Deserialize;
use serde_json::Value;

use crate::{model::GraphError, rope::RopeSpec};

/// Settings shared by decoder-only transformers.
#[derive(Clone, Debug, Deserialize)]
pub struct DecoderConfig {
    /// Width of the residual stream.
    pub hidden_size: i32,
    /// Width inside the MLP.
    pub intermediate_size: i32,
    /// Number of layers.
    pub num_hidden_layers: usize,
    /// Query heads.
    pub num_attention_heads: i32,
    num_key_value_heads: Option<i32>,
    head_dim: Option<i32>,
    /// Added to mean squares.
    pub rms_norm_eps: f32,
    /// Entries in the vocabulary.
    pub vocab_size: i32,
    /// Whether the head is the embedding.
    #[serde(default)]
    pub tie_word_embeddings: bool,
    /// Bias on q, k, v (and, in Llama, o).
    #[serde(default)]
    pub attention_bias: bool,
    /// Bias in the MLP.
    #[serde(default)]
    pub mlp_bias: bool,
    sliding_window: Option<i32>,
    use_sliding_window: Option<bool>,
    /// Longest context, in tokens.
    pub max_position_embeddings: Option<u32>,
    #[serde(default = "silu")]
    hidden_act: String,
    /// How positions are encoded; read from the several places configs put it.
    #[serde(skip)]
    pub rope: RopeSpec,
}

fn silu() -> String {
    "silu".into()
}

impl DecoderConfig {
    /// Reads config.json, or its `text_config` where there is one.
    pub fn read(config: &Value) -> Result<Self, GraphError> {
        let config = text_config(config);
        let mut this = Self::deserialize(config).map_err(|error| GraphError::Config(error.to_string()))?;
        let positive = [
            ("hidden_size", this.hidden_size),
            ("intermediate_size", this.intermediate_size),
            ("num_attention_heads", this.num_attention_heads),
            ("num_key_value_heads", this.kv_heads()),
            ("head_dim", this.head_dim()),
            ("vocab_size", this.vocab_size),
        ];
        for (name, value) in positive {
            if value <= 0 {
                return Err(GraphError::Config(format!("`{name}` is {value}")));
            }
        }
        if this.num_attention_heads % this.kv_heads() != 0 {
            return Err(GraphError::Config(format!(
                "`num_attention_heads` {} is no multiple of `num_key_value_heads` {}",
                this.num_attention_heads,
                this.kv_heads()
            )));
        }
        if this.hidden_act != "silu" {
            return Err(GraphError::Config(format!("`hidden_act` `{}` is not supported", this.hidden_act)));
        }
        if this.use_sliding_window == Some(true) {
            return Err(GraphError::Config("`use_sliding_window` is true, which is not supported".into()));
        }
        this.rope = RopeSpec::read(config, this.head_dim())?;
        Ok(this)
    }

    /// What a family without peculiar settings answers in `accept`: whether config.json can be computed as it stands.
    pub fn accept(profile: &ModelProfile) -> Result<(), String> {
        Self::read(&profile.config).map(drop).map_err(|error| error.to_string())
    }

    /// Positions that attention sees, where every layer is limited. Qwen's configs name a window and switch it off.
    pub fn window(&self) -> Option<i32> {
        self.sliding_window.filter(|window| *window > 0 && self.use_sliding_window.is_none())
    }

    /// Key/value heads.
    pub fn kv_heads(&self) -> i32 {
        self.num_key_value_heads.unwrap_or(self.num_attention_heads)
    }

    /// Size of a head.
    pub fn head_dim(&self) -> i32 {
        self.head_dim.unwrap_or(self.hidden_size / self.num_attention_heads.max(1))
    }
}

/// The part of config.json that describes the language model: itself, or `text_config` in multimodal wrappers.
pub fn text_config(config: &Value) -> &Value {
    config.get("text_config").filter(|inner| inner.is_object()).unwrap_or(config)
}
