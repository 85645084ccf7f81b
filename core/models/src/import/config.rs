//! config.json and generation_config.json from a GGUF header.

use std::collections::BTreeMap;

use serde_json::{Map, Value, json};

use super::{
    architecture::{ARCHITECTURES, Architecture},
    gemma3, rope,
    tensors::Output,
};
use crate::{
    error::ImportError,
    gguf::{GROUP, Gguf},
};

/// Most layers that are believed; the deepest published models have fewer than 200.
const LAYERS_MAX: u32 = 4096;

/// The sizes of a model.
#[derive(Debug)]
pub(super) struct Model {
    pub architecture: &'static Architecture,
    pub layers: u32,
    pub heads: u32,
    pub kv_heads: u32,
    pub head_dim: u32,
    pub hidden: u32,
    intermediate: u32,
    context: u32,
}

impl Model {
    pub fn read<D: AsRef<[u8]>>(gguf: &Gguf<D>) -> Result<Self, ImportError> {
        let name = gguf.text("general.architecture").unwrap_or_default();
        let architecture = ARCHITECTURES.iter().find(|known| known.name == name).ok_or_else(|| {
            let known = ARCHITECTURES.iter().map(|known| known.name).collect();
            ImportError::Architecture { architecture: name.chars().take(100).collect(), known }
        })?;
        let optional = |key: &str| {
            let key = format!("{name}.{key}");
            match gguf.unsigned(&key) {
                None => Ok(None),
                Some(value) => match u32::try_from(value) {
                    Ok(value) if value > 0 => Ok(Some(value)),
                    _ => Err(ImportError::Setting { key, what: format!("it is {value}") }),
                },
            }
        };
        let required = |key: &str| {
            optional(key)?.ok_or_else(|| ImportError::Setting { key: format!("{name}.{key}"), what: "missing".into() })
        };
        let (heads, hidden) = (required("attention.head_count")?, required("embedding_length")?);
        let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads);
        for key in ["attention.value_length", "rope.dimension_count"] {
            if let Some(other) = optional(key)?.filter(|other| *other != head_dim) {
                let what = format!("it is {other} while heads have {head_dim} values");
                return Err(ImportError::Setting { key: format!("{name}.{key}"), what });
            }
        }
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            let what = format!("heads of {head_dim} values cannot rotate");
            return Err(ImportError::Setting { key: format!("{name}.attention.key_length"), what });
        }
        // What these change is not written into config.json, so the import would be another model.
        let always =
            ["expert_count", "attention.clamp_kqv", "attn_logit_softcapping", "final_logit_softcapping"].as_slice();
        let unless_gemma = ["attention.sliding_window", "attention.scale"].as_slice();
        let refused = always.iter().chain(unless_gemma.iter().filter(|_| name != gemma3::NAME));
        for key in refused {
            let key = format!("{name}.{key}");
            if let Some(value) = gguf.float(&key).filter(|value| *value != 0.0) {
                return Err(ImportError::Setting {
                    key,
                    what: format!("it is {value}, which config.json cannot say here"),
                });
            }
        }
        let layers = required("block_count")?;
        if layers > LAYERS_MAX {
            let what = format!("it is {layers}; up to {LAYERS_MAX} layers are imported");
            return Err(ImportError::Setting { key: format!("{name}.block_count"), what });
        }
        Ok(Self {
            architecture,
            layers,
            heads,
            kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
            head_dim,
            hidden,
            intermediate: required("feed_forward_length")?,
            context: required("context_length")?,
        })
    }
}

/// The number a 32-bit float was written as: 1e-5 rather than 9.999999747378752e-6.
pub(super) fn shortest(value: f64) -> f64 {
    (value as f32).to_string().parse().unwrap_or(value)
}

pub(super) fn config<D: AsRef<[u8]>>(
    gguf: &Gguf<D>,
    model: &Model,
    outputs: &[Output<'_>],
) -> Result<Value, ImportError> {
    let name = model.architecture.name;
    let eps_key = format!("{name}.attention.layer_norm_rms_epsilon");
    let eps = gguf.float(&eps_key).ok_or_else(|| ImportError::Setting { key: eps_key, what: "missing".into() })?;
    let is_gemma3 = name == gemma3::NAME;
    let theta = gguf.float(&format!("{name}.rope.freq_base"));
    let theta = shortest(theta.unwrap_or(if is_gemma3 { gemma3::THETA } else { 10_000.0 }));
    let has = |ending: &str| outputs.iter().any(|output| output.name.ends_with(ending));
    let embedding = outputs.iter().find(|output| output.name == "model.embed_tokens.weight");
    let Some(embedding) = embedding else {
        return Err(ImportError::Setting { key: "token_embd.weight".into(), what: "missing".into() });
    };
    let mut config = json!({
        "architectures": [model.architecture.class],
        "model_type": model.architecture.model_type,
        "hidden_size": model.hidden,
        "intermediate_size": model.intermediate,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "max_position_embeddings": model.context,
        "rms_norm_eps": shortest(eps),
        "vocab_size": embedding.shape[0],
        "rope_theta": theta,
        "rope_scaling": rope::scaling(gguf, name, model.head_dim, theta)?,
        "tie_word_embeddings": !has("lm_head.weight"),
        "torch_dtype": "float32",
    });
    let Value::Object(fields) = &mut config else { return Ok(config) };
    if is_gemma3 {
        fields.extend(gemma3::fields(gguf, model)?);
    } else {
        fields.insert("hidden_act".into(), "silu".into());
    }
    if model.architecture.bias_everywhere {
        fields.insert("attention_bias".into(), has("_proj.bias").into());
        fields.insert("mlp_bias".into(), has("down_proj.bias").into());
    }
    for (field, key) in TOKEN_IDS {
        if let Some(id) = gguf.unsigned(key) {
            fields.insert((*field).into(), id.into());
        }
    }
    if let Some(quantization) = quantization(outputs) {
        fields.insert("quantization".into(), quantization.clone());
        fields.insert("quantization_config".into(), quantization);
    }
    Ok(config)
}

const TOKEN_IDS: &[(&str, &str)] = &[
    ("bos_token_id", "tokenizer.ggml.bos_token_id"),
    ("eos_token_id", "tokenizer.ggml.eos_token_id"),
    ("pad_token_id", "tokenizer.ggml.padding_token_id"),
];

/// The prevailing bits, and an entry for each module that has others.
fn quantization(outputs: &[Output<'_>]) -> Option<Value> {
    let modules: Vec<(&str, usize)> = outputs.iter().filter_map(Output::quantized).collect();
    let mut counts: BTreeMap<usize, usize> = BTreeMap::new();
    for (_, bits) in &modules {
        *counts.entry(*bits).or_default() += 1;
    }
    let prevailing = counts.into_iter().max_by_key(|(_, count)| *count)?.0;
    let mut table = Map::new();
    table.insert("group_size".into(), GROUP.into());
    table.insert("bits".into(), prevailing.into());
    table.insert("mode".into(), "affine".into());
    for (module, bits) in modules.into_iter().filter(|(_, bits)| *bits != prevailing) {
        table.insert(module.to_owned(), json!({ "group_size": GROUP, "bits": bits }));
    }
    Some(Value::Object(table))
}

pub(super) fn generation_config<D: AsRef<[u8]>>(gguf: &Gguf<D>) -> Value {
    let mut fields = Map::new();
    for (field, key) in TOKEN_IDS {
        if let Some(id) = gguf.unsigned(key) {
            fields.insert((*field).into(), id.into());
        }
    }
    let mut ends: Vec<u64> = Vec::new();
    for key in ["eos", "eot", "eom"] {
        ends.extend(gguf.unsigned(&format!("tokenizer.ggml.{key}_token_id")).filter(|id| !ends.contains(id)));
    }
    if ends.len() > 1 {
        fields.insert("eos_token_id".into(), ends.into());
    }
    Value::Object(fields)
}
