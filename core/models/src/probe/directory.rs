//! The profile of a directory with safetensors weights.

use std::path::Path;

use mesh_core::{Fact, ModelProfile, ProbeError, Quantization, Source};
use serde_json::Value;

use super::{
    CONFIG_BYTES_MAX, GENERATION_CONFIG_BYTES_MAX, TOKENIZER_BYTES_MAX, TOKENIZER_CONFIG_BYTES_MAX, add_eos, blank,
    census::{self, Packing},
    json, kept, malformed, relative, safetensors, template,
    tokens::{self, AddedToken, TokenizerConfig},
    typed,
};
use crate::store::Artifact;

const CONFIG: &str = "config.json";
const GENERATION_CONFIG: &str = "generation_config.json";
const TOKENIZER: &str = "tokenizer.json";
/// A tokenizer.json that is worth a thread, in bytes.
const TOKENIZER_LONG_BYTES: u64 = 1 << 20;
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
const SPECIAL_TOKENS: &str = "special_tokens_map.json";

pub(super) fn profile(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    let root = &artifact.root;
    let mut profile = blank(artifact)?;
    let config = Config(json(root, CONFIG, CONFIG_BYTES_MAX)?);
    profile.generation_config = json(root, GENERATION_CONFIG, GENERATION_CONFIG_BYTES_MAX)?;
    config.check().map_err(|what| malformed(&root.join(CONFIG), what))?;
    profile.model_type = config.named("model_type");
    profile.architectures = config.architectures();
    geometry(&mut profile, &config);
    profile.vision = config.0.get("vision_config").map(|_| Fact::new(true, Source::key(CONFIG, "vision_config")));
    profile.quantization = config.quantization();
    let path = root.join(TOKENIZER);
    let added = || tokens::added_tokens(&path, TOKENIZER_BYTES_MAX);
    let long = std::fs::metadata(&path).is_ok_and(|metadata| metadata.len() > TOKENIZER_LONG_BYTES);
    let added = match long {
        // The two longest reads, beside each other.
        true => std::thread::scope(|scope| {
            let added = scope.spawn(added);
            weights(&mut profile, artifact, &config)?;
            added.join().unwrap_or_else(|_| Err(malformed(&path, "it cannot be read")))
        })?,
        false => {
            weights(&mut profile, artifact, &config)?;
            added()?
        }
    };
    if let Some(added) = added {
        profile.tokenizer = Some(Fact::new(path.clone(), Source::file(relative(root, &path))));
        end_tokens(&mut profile, &config, root, &added)?;
    } else {
        end_tokens(&mut profile, &config, root, &[])?;
    }
    profile.config = config.0;
    Ok(profile)
}

/// config.json with its `text_config`, where language models with other parts keep theirs.
struct Config(Value);

impl Config {
    /// The value at the top, else in `text_config`, with its source.
    fn get(&self, key: &str) -> Option<(&Value, Source)> {
        self.at_top(key).or_else(|| self.in_text(key))
    }

    /// The value in `text_config`, else at the top: wrappers repeat some sizes for other parts.
    fn of_text(&self, key: &str) -> Option<(&Value, Source)> {
        self.in_text(key).or_else(|| self.at_top(key))
    }

    fn at_top(&self, key: &str) -> Option<(&Value, Source)> {
        let value = self.0.get(key).filter(|value| !value.is_null())?;
        Some((value, Source::key(CONFIG, key)))
    }

    fn in_text(&self, key: &str) -> Option<(&Value, Source)> {
        let value = self.0.get("text_config")?.get(key).filter(|value| !value.is_null())?;
        Some((value, Source::key(CONFIG, format!("text_config.{key}"))))
    }

    fn named(&self, key: &str) -> Option<Fact<String>> {
        let (value, source) = self.get(key)?;
        Some(Fact::new(value.as_str()?.to_owned(), source))
    }

    /// Names a size that no model has.
    fn check(&self) -> Result<(), String> {
        for settings in [Some(&self.0), self.0.get("text_config")].into_iter().flatten() {
            for (key, most) in SIZES {
                let value = &settings[*key];
                // Some checkpoints list a size for each layer.
                let one = std::slice::from_ref(value);
                let sizes = value.as_array().map_or(one, Vec::as_slice);
                let whole = |size: &Value| {
                    size.as_f64().is_some_and(|size| size.fract() == 0.0 && (0.0..=*most as f64).contains(&size))
                };
                if let Some(size) = sizes.iter().find(|size| !size.is_null() && !whole(size)) {
                    let shown: String = size.to_string().chars().take(100).collect();
                    return Err(format!("`{key}` is {shown}, where whole numbers up to {most} are read"));
                }
            }
        }
        Ok(())
    }

    /// The part that describes the language model.
    fn text(&self) -> &Value {
        self.0.get("text_config").filter(|inner| inner.is_object()).unwrap_or(&self.0)
    }

    /// The first of `keys` that holds a whole number.
    fn number(&self, keys: &[&str]) -> Option<Fact<u32>> {
        keys.iter().find_map(|key| {
            let (value, source) = self.of_text(key)?;
            Some(Fact::new(u32::try_from(value.as_u64()?).ok()?, source))
        })
    }

    fn architectures(&self) -> Option<Fact<Vec<String>>> {
        let (value, source) = self.get("architectures")?;
        let names: Vec<String> = value.as_array()?.iter().filter_map(Value::as_str).map(str::to_owned).collect();
        (!names.is_empty()).then(|| Fact::new(names, source))
    }

    fn quantization(&self) -> Option<Fact<Quantization>> {
        let (value, source) = self.get("quantization").or_else(|| self.get("quantization_config"))?;
        let number = |key: &str| value.get(key).and_then(Value::as_u64).and_then(|number| u32::try_from(number).ok());
        let mode = ["mode", "quant_method"].iter().find_map(|key| value.get(*key)?.as_str()).unwrap_or("affine");
        let quantization =
            Quantization { mode: mode.to_owned(), bits: number("bits"), group_size: number("group_size") };
        Some(Fact::new(quantization, source))
    }

    /// Values that share one scale in a module; modules may have an entry of their own.
    fn group_size(&self, module: &str) -> u64 {
        let Some((table, _)) = self.get("quantization") else { return 32 };
        let own = table.get(module).and_then(|entry| entry.get("group_size"));
        own.or_else(|| table.get("group_size")).and_then(Value::as_u64).unwrap_or(64)
    }
}

/// Sizes that have to be whole numbers, and the most that is believed. What else families read, they check.
const SIZES: &[(&str, u64)] = &[
    ("num_hidden_layers", kept::LAYERS_MAX),
    ("num_layers", kept::LAYERS_MAX),
    ("n_layer", kept::LAYERS_MAX),
    ("num_attention_heads", 1 << 12),
    ("num_key_value_heads", 1 << 12),
    ("hidden_size", 1 << 20),
    ("intermediate_size", 1 << 24),
    ("moe_intermediate_size", 1 << 24),
    ("head_dim", 1 << 14),
    ("vocab_size", 1 << 24),
    ("max_position_embeddings", u32::MAX as u64),
    ("kv_lora_rank", 1 << 14),
    ("num_experts", 1 << 14),
    ("num_local_experts", 1 << 14),
    ("n_routed_experts", 1 << 14),
    ("num_experts_per_tok", 1 << 14),
];

fn geometry(profile: &mut ModelProfile, config: &Config) {
    profile.context_tokens_max = config.number(&["max_position_embeddings", "model_max_length", "max_sequence_length"]);
    profile.layers = config.number(&["num_hidden_layers", "num_layers", "n_layer"]);
    profile.kv_heads = config.number(&["num_key_value_heads", "num_attention_heads", "n_head"]);
    profile.vocab_size = config.number(&["vocab_size"]);
    let source =
        config.of_text("layer_types").or_else(|| config.of_text("num_hidden_layers")).map(|(_, source)| source);
    profile.kept = kept::kept(config.text()).zip(source).map(|(kept, source)| Fact::new(kept, source));
    // With latent attention (MLA) a cache holds latents, and heads say nothing about its size.
    if config.of_text("kv_lora_rank").is_none() {
        profile.head_dim = config.number(&["head_dim"]).or_else(|| {
            let hidden = config.number(&["hidden_size"])?;
            let heads = config.number(&["num_attention_heads"])?.value;
            Some(Fact::new(hidden.value.checked_div(heads)?, hidden.source))
        });
    }
}

fn weights(profile: &mut ModelProfile, artifact: &Artifact, config: &Config) -> Result<(), ProbeError> {
    let mut tensors = safetensors::Tensors::default();
    for path in &artifact.weights {
        safetensors::read_header(path, &mut tensors)?;
    }
    let source = Source::key(profile.format.source.file.clone(), "shapes of tensors");
    let mode = profile.quantization.as_ref().map_or("affine", |fact| fact.value.mode.as_str());
    let census = census::checkpoint(&tensors, &Packing { mode, group_size: &|module| config.group_size(module) });
    profile.parameters = Some(Fact::new(census.parameters(), source.clone()));
    let chosen = config.number(&["num_experts_per_tok", "num_experts_per_token", "experts_per_token", "top_k_experts"]);
    let all = config.number(&["num_experts", "num_local_experts", "n_routed_experts"]);
    if let (Some(chosen), Some(all)) = (chosen, all) {
        let active = census.active(chosen.value, all.value);
        profile.parameters_active = active.map(|active| Fact::new(active, chosen.source));
    }
    profile.stored = Some(Fact::new(census.stored(), source.clone()));
    if profile.model_type.is_none() && profile.architectures.is_none() {
        let source = profile.format.source.clone();
        profile.tensor_names = Some(Fact::new(tensors.entries.into_keys().collect(), source));
    }
    Ok(())
}

fn end_tokens(
    profile: &mut ModelProfile,
    config: &Config,
    root: &Path,
    added: &[AddedToken],
) -> Result<(), ProbeError> {
    for (value, source) in [config.at_top("eos_token_id"), config.in_text("eos_token_id")].into_iter().flatten() {
        for id in ids(value) {
            add_eos(profile, id, source.clone());
        }
    }
    for id in profile.generation_config.get("eos_token_id").map(ids).unwrap_or_default() {
        add_eos(profile, id, Source::key(GENERATION_CONFIG, "eos_token_id"));
    }
    let tokenizer_config: TokenizerConfig = typed(root, TOKENIZER_CONFIG, TOKENIZER_CONFIG_BYTES_MAX)?;
    let special_tokens: TokenizerConfig = typed(root, SPECIAL_TOKENS, TOKENIZER_CONFIG_BYTES_MAX)?;
    let token = |key: &str, of: fn(&TokenizerConfig) -> &Option<String>| {
        let files = [(TOKENIZER_CONFIG, of(&tokenizer_config)), (SPECIAL_TOKENS, of(&special_tokens))];
        files.into_iter().find_map(|(file, text)| Some(Fact::new(text.clone()?, Source::key(file, key))))
    };
    profile.bos_token = token("bos_token", |config| &config.bos_token.0);
    profile.eos_token = token("eos_token", |config| &config.eos_token.0);
    if let Some(eos) = profile.eos_token.clone()
        && let Some(token) = added.iter().find(|token| token.content == eos.value)
    {
        add_eos(profile, token.id, eos.source);
    }
    profile.chat_template = template::find(root, tokenizer_config)?;
    Ok(())
}

/// One id, or a list of them.
fn ids(value: &Value) -> Vec<u32> {
    let one = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Value::Array(list) => list.iter().filter_map(one).collect(),
        value => one(value).into_iter().collect(),
    }
}
