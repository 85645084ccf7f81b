//! The settings of config.json that most decoders share, under the checkpoints' own names.

use serde::{Deserialize, de::DeserializeOwned};
use serde_json::{Value, json};

use crate::{elementwise::Activation, model::GraphError, rope::RopeSpec};

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
    /// Added to mean squares; some configs say `norm_eps`.
    pub rms_norm_eps: f32,
    /// Entries in the vocabulary.
    pub vocab_size: i32,
    /// Whether the head is the embedding.
    pub tie_word_embeddings: bool,
    /// Bias on q, k, v (and, in Llama, o).
    #[serde(default)]
    pub attention_bias: bool,
    /// Bias in the MLP.
    #[serde(default)]
    pub mlp_bias: bool,
    sliding_window: Option<i32>,
    use_sliding_window: Option<bool>,
    /// What each layer is, where the config lists it.
    pub layer_types: Option<Vec<String>>,
    /// What stands between the projections of the MLP; some configs say `hidden_activation`.
    pub hidden_act: Activation,
    /// How positions are encoded; read from the several places configs put it.
    #[serde(skip)]
    pub rope: RopeSpec,
    /// All settings of the language model, with defaults filled in.
    #[serde(skip)]
    pub settings: Value,
}

/// Settings that go by several names, or have a default that is a family's own: the name here, the other names.
const NAMES: &[(&str, &[&str])] = &[
    ("rms_norm_eps", &["norm_eps"]),
    ("hidden_act", &["hidden_activation"]),
    ("intermediate_size", &["moe_intermediate_size"]),
];

/// The most that settings may say whose names end so. Far above every published model, and low enough that no product of
/// a few of them leaves 32 bits.
const BOUNDS: &[(&str, i64)] = &[
    ("vocab_size", 1 << 24),
    ("vocab_size_per_layer_input", 1 << 24),
    ("_layers", 1 << 12),
    ("_heads", 1 << 12),
    ("_experts", 1 << 12),
    ("_group", 1 << 12),
    ("_groups", 1 << 12),
    ("_per_tok", 1 << 12),
    ("_per_token", 1 << 12),
    ("_dim", 1 << 14),
    ("_rank", 1 << 14),
    ("_kernel_size", 1 << 10),
    ("conv_L_cache", 1 << 10),
    ("_size", 1 << 20),
    ("_of", 1 << 20),
];

/// Names a size that no model has; also in objects within.
fn check_bounds(settings: &Value) -> Result<(), GraphError> {
    let Some(settings) = settings.as_object() else { return Ok(()) };
    for (name, value) in settings {
        let bound = BOUNDS.iter().find(|(ending, _)| name.ends_with(ending));
        if let (Some((_, most)), Some(number)) = (bound, value.as_f64())
            && (number < 0.0 || number > *most as f64)
        {
            return Err(GraphError::Config(format!("`{name}` is {value}, where 0 to {most} are supported")));
        }
        check_bounds(value)?;
    }
    Ok(())
}

impl DecoderConfig {
    /// Reads config.json, or its `text_config` where there is one.
    pub fn read(config: &Value) -> Result<Self, GraphError> {
        Self::read_or(config, &Value::Null)
    }

    /// The same, with `defaults` (an object) for settings that are absent or null.
    pub fn read_or(config: &Value, defaults: &Value) -> Result<Self, GraphError> {
        let outer = config;
        let config = text_config(config);
        let mut settings = config.clone();
        if let Some(settings) = settings.as_object_mut() {
            // What is null has its default.
            settings.retain(|_, value| !value.is_null());
            let given = |key: &str| config.get(key).filter(|value| !value.is_null());
            for (name, others) in NAMES {
                if given(name).is_none()
                    && let Some(value) = others.iter().find_map(|other| given(other))
                {
                    settings.insert((*name).into(), value.clone());
                }
            }
            let defaults = defaults.as_object().into_iter().flatten();
            let tied = outer.get("tie_word_embeddings").cloned().unwrap_or(false.into());
            let silu = ("hidden_act".to_owned(), Value::from("silu"));
            let common = [("tie_word_embeddings".to_owned(), tied), silu];
            for (name, value) in defaults.map(|(name, value)| (name.clone(), value.clone())).chain(common) {
                let value_now = settings.entry(name).or_insert(Value::Null);
                if value_now.is_null() {
                    *value_now = value;
                }
            }
        }
        check_bounds(&settings)?;
        if let Some(other) = settings.get("use_bidirectional_attention").filter(|value| **value != json!("vision"))
            && *other != Value::Bool(false)
        {
            let what = format!("`use_bidirectional_attention` {other} is not supported");
            return Err(GraphError::Config(what));
        }
        let act = &settings["hidden_act"];
        if Activation::deserialize(act).is_err() {
            let act = act.as_str().map_or_else(|| act.to_string(), str::to_owned);
            return Err(GraphError::Config(format!("`hidden_act` `{act}` is not supported")));
        }
        let mut this: Self = deserialize(&settings)?;
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
        if !this.rms_norm_eps.is_finite() || this.rms_norm_eps < 0.0 {
            return Err(GraphError::Config(format!("`rms_norm_eps` is {}", this.rms_norm_eps)));
        }
        if this.num_attention_heads % this.kv_heads() != 0 {
            return Err(GraphError::Config(format!(
                "`num_attention_heads` {} is no multiple of `num_key_value_heads` {}",
                this.num_attention_heads,
                this.kv_heads()
            )));
        }
        if this.use_sliding_window == Some(true) {
            return Err(GraphError::Config("`use_sliding_window` is true, which is not supported".into()));
        }
        if let Some(types) = &this.layer_types
            && types.len() != this.num_hidden_layers
        {
            let (types, layers) = (types.len(), this.num_hidden_layers);
            return Err(GraphError::Config(format!("`layer_types` lists {types} layers, not {layers}")));
        }
        this.rope = RopeSpec::read(&settings, this.head_dim())?;
        this.settings = settings;
        Ok(this)
    }

    /// A family's own settings.
    pub fn own<T: DeserializeOwned>(&self) -> Result<T, GraphError> {
        deserialize(&self.settings)
    }

    /// Positions that attention sees, where every layer is limited. Qwen's configs name a window and switch it off.
    pub fn window(&self) -> Option<i32> {
        self.sliding_window.filter(|window| *window > 0 && self.use_sliding_window.is_none())
    }

    /// Whether layer `index` is of type `name`; an error if it is of a type that is not in `known`.
    pub fn is_layer(&self, index: usize, name: &str, known: &[&str]) -> Result<bool, GraphError> {
        let Some(layer) = self.layer_types.as_ref().and_then(|types| types.get(index)) else {
            return Err(GraphError::Config("`layer_types` is missing".into()));
        };
        if !known.contains(&layer.as_str()) {
            return Err(GraphError::Config(format!("`layer_types` has `{layer}`, which is not supported")));
        }
        Ok(layer == name)
    }

    /// The window of layer `index` where `layer_types` has `sliding_attention`, none where it has `full_attention`.
    pub fn layer_window(&self, index: usize) -> Result<Option<i32>, GraphError> {
        if !self.is_layer(index, "sliding_attention", &["sliding_attention", "full_attention"])? {
            return Ok(None);
        }
        match self.sliding_window {
            Some(window) if window > 0 => Ok(Some(window)),
            _ => {
                Err(GraphError::Config("`layer_types` has `sliding_attention`, but `sliding_window` is missing".into()))
            }
        }
    }

    /// Whether every layer has an answer to [`layer_window`](Self::layer_window).
    pub fn check_layer_windows(&self) -> Result<(), GraphError> {
        (0..self.num_hidden_layers).try_for_each(|index| self.layer_window(index).map(drop))
    }

    /// The attention scale that Gemma's configs give as `query_pre_attn_scalar`.
    pub fn pre_attn_scale(&self) -> Result<f32, GraphError> {
        let scalar = &self.settings["query_pre_attn_scalar"];
        match scalar.as_f64().filter(|scalar| scalar.is_finite() && *scalar > 0.0) {
            Some(scalar) => Ok(1.0 / (scalar as f32).sqrt()),
            None => Err(GraphError::Config(format!("`query_pre_attn_scalar` is {scalar}"))),
        }
    }

    /// The layer whose keys and values each layer reads, where the last `shared` layers read those of the last layer of
    /// their type before them.
    pub fn kv_sources(&self, shared: usize) -> Result<Vec<usize>, GraphError> {
        let first = self.num_hidden_layers.saturating_sub(shared);
        let types = self.layer_types.as_deref().unwrap_or_default();
        let source = |index: usize| match index < first {
            true => Some(index),
            false => (0..first).rev().find(|earlier| types.get(*earlier) == types.get(index)),
        };
        let missing = || GraphError::Config(format!("`num_kv_shared_layers` {shared} leaves a layer nothing to share"));
        (0..self.num_hidden_layers).map(|index| source(index).ok_or_else(missing)).collect()
    }

    /// Fills `layer_types` in where the config leaves it out: every `period`th layer is the last of `names`, the others
    /// the first.
    pub fn default_layer_types(&mut self, [most, every]: [&str; 2], period: usize) {
        let layer = |index: usize| if (index + 1).is_multiple_of(period.max(1)) { every } else { most };
        let layers = self.num_hidden_layers;
        self.layer_types.get_or_insert_with(|| (0..layers).map(|index| layer(index).to_owned()).collect());
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

/// What a family answers in `accept`, from what it read of config.json.
pub fn accepted<T>(read: Result<T, GraphError>) -> Result<(), String> {
    match read {
        Ok(_) => Ok(()),
        // The reason names config.json as its source.
        Err(error) => Err(error.to_string()),
    }
}

fn deserialize<T: DeserializeOwned>(settings: &Value) -> Result<T, GraphError> {
    T::deserialize(settings).map_err(|error| GraphError::Config(error.to_string()))
}

/// The part of config.json that describes the language model: itself, or `text_config` in multimodal wrappers.
pub fn text_config(config: &Value) -> &Value {
    config.get("text_config").filter(|inner| inner.is_object()).unwrap_or(config)
}
