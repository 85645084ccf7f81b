//! What config.json says of a Gemma 3 besides what every model's says.
//!
//! Its GGUF leaves several facts to llama.cpp, which knows the published sizes by their numbers of layers; so does this.

use serde_json::{Map, Value, json};

use super::config::{Model, shortest};
use crate::{error::ImportError, gguf::Gguf};

/// `general.architecture`.
pub(super) const NAME: &str = "gemma3";
/// Every so many layers one attends to everything, in all published sizes.
const PATTERN: u32 = 6;
/// The base frequency of the layers that slide.
const LOCAL_THETA: f64 = 10_000.0;
/// The base frequency of the others, unless the header says otherwise.
pub(super) const THETA: f64 = 1_000_000.0;
/// Layers of the sizes whose attention is scaled by the size of a head: 270M, 1B, 4B and 12B.
const BY_HEAD_DIM: &[u32] = &[18, 26, 34, 48];
/// Layers of the 27B, whose attention is scaled by the share of the width that a head has.
const BY_SHARE: u32 = 62;

/// The fields to be added, replacing those of the same name.
pub(super) fn fields<D: AsRef<[u8]>>(gguf: &Gguf<D>, model: &Model) -> Result<Map<String, Value>, ImportError> {
    let setting = |key: &str, what: String| ImportError::Setting { key: format!("gemma3.{key}"), what };
    let window = gguf.unsigned("gemma3.attention.sliding_window").filter(|window| (1..=1 << 24).contains(window));
    let window = window.ok_or_else(|| setting("attention.sliding_window", "missing, or no window".into()))?;
    let key = "attention.sliding_window_pattern";
    let pattern = match gguf.unsigned(&format!("gemma3.{key}")) {
        None => PATTERN,
        Some(pattern @ 1..=1024) => pattern as u32,
        Some(pattern) => return Err(setting(key, format!("it is {pattern}"))),
    };
    let full = |layer: &u32| layer.is_multiple_of(pattern); // counted from 1
    if let Some(slides) = gguf.array(&format!("gemma3.{key}")) {
        let stated: Vec<bool> = slides.unsigned().map(|slides| slides == 0).collect();
        if stated != (1..=model.layers).map(|layer| full(&layer)).collect::<Vec<_>>() {
            return Err(setting(key, format!("it is not that every {pattern}th layer is full")));
        }
    }
    let local_theta = gguf.float("gemma3.rope.freq_base_swa").map_or(LOCAL_THETA, shortest);
    let layer_types: Vec<&str> =
        (1..=model.layers).map(|layer| if full(&layer) { "full_attention" } else { "sliding_attention" }).collect();
    let fields = json!({
        "hidden_activation": "gelu_pytorch_tanh",
        "attention_bias": false,
        "query_pre_attn_scalar": query_scalar(gguf, model)?,
        "sliding_window": window,
        "sliding_window_pattern": pattern,
        "layer_types": layer_types,
        "rope_local_base_freq": local_theta,
        "attn_logit_softcapping": null,
        "final_logit_softcapping": null,
    });
    match fields {
        Value::Object(fields) => Ok(fields),
        _ => Ok(Map::new()),
    }
}

/// The number whose inverse square root scales attention.
fn query_scalar<D: AsRef<[u8]>>(gguf: &Gguf<D>, model: &Model) -> Result<Value, ImportError> {
    let key = "gemma3.attention.scale";
    if let Some(scale) = gguf.float(key) {
        let scalar = 1.0 / (scale * scale);
        // Published scalars are whole numbers; the header has the root of one in 32 bits.
        let whole = scalar.round();
        return match scalar.is_finite() && scalar > 0.0 {
            true if (scalar - whole).abs() < 1e-4 * whole => Ok(json!(whole as u64)),
            true => Ok(json!(scalar)),
            false => Err(ImportError::Setting { key: key.into(), what: format!("it is {scale}") }),
        };
    }
    match model.layers {
        layers if BY_HEAD_DIM.contains(&layers) => Ok(json!(model.head_dim)),
        BY_SHARE if model.hidden >= model.heads => Ok(json!(model.hidden / model.heads)),
        layers => {
            let what = format!("missing, and no published size has {layers} layers, by which it could be known");
            Err(ImportError::Setting { key: key.into(), what })
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        gguf::Gguf,
        import::{Manner, config, tensors},
        testing::GgufWriter,
    };

    /// One of that many layers, of which the tensors of one are there.
    fn tiny(layers: u32) -> GgufWriter {
        let floats = |value: f32, count: usize| value.to_le_bytes().repeat(count);
        let mut writer = GgufWriter::new(NAME)
            .number("gemma3.block_count", layers)
            .number("gemma3.context_length", 128)
            .number("gemma3.embedding_length", 32)
            .number("gemma3.feed_forward_length", 32)
            .number("gemma3.attention.head_count", 4)
            .number("gemma3.attention.head_count_kv", 1)
            .number("gemma3.attention.key_length", 16)
            .number("gemma3.attention.sliding_window", 64)
            .float("gemma3.attention.layer_norm_rms_epsilon", 1e-6)
            .tensor("token_embd.weight", &[32, 10], 0, floats(0.5, 320))
            .tensor("output_norm.weight", &[32], 0, floats(3.5, 32));
        let norms = ["attn_norm", "post_attention_norm", "ffn_norm", "post_ffw_norm", "attn_q_norm", "attn_k_norm"];
        for (number, norm) in (1u8..).zip(norms) {
            let size = if norm.contains("_q_") || norm.contains("_k_") { 16 } else { 32 };
            let content = floats(f32::from(number) / 4.0, size);
            writer = writer.tensor(&format!("blk.0.{norm}.weight"), &[size as u64], 0, content);
        }
        writer
    }

    fn config(writer: &GgufWriter) -> Result<Value, ImportError> {
        let gguf = Gguf::parse(writer.finish()).unwrap();
        let model = Model::read(&gguf)?;
        config::config(&gguf, &model, &tensors::plan(std::slice::from_ref(&gguf), &model, Manner::Exact)?)
    }

    #[test]
    fn norms_get_their_names_and_lose_the_one_that_was_added() {
        let gguf = Gguf::parse(tiny(18).finish()).unwrap();
        let model = Model::read(&gguf).unwrap();
        let outputs = tensors::plan(std::slice::from_ref(&gguf), &model, Manner::Exact).unwrap();
        let value = |name: &str| {
            let output = outputs.iter().find(|output| output.name == format!("model.{name}.weight")).unwrap();
            let content = safetensors::View::data(&tensors::Ticking { output, tick: &|| {} }).into_owned();
            f32::from_le_bytes(content[..4].try_into().unwrap())
        };
        for (norm, expected) in [
            ("embed_tokens", 0.5),
            ("norm", 2.5),
            ("layers.0.input_layernorm", -0.75),
            ("layers.0.post_attention_layernorm", -0.5),
            ("layers.0.pre_feedforward_layernorm", -0.25),
            ("layers.0.post_feedforward_layernorm", 0.0),
            ("layers.0.self_attn.q_norm", 0.25),
            ("layers.0.self_attn.k_norm", 0.5),
        ] {
            assert_eq!(value(norm), expected, "{norm}");
        }
        assert_eq!(outputs.len(), 8);
    }

    #[test]
    fn the_config_is_that_of_the_published_models() {
        let scaled = tiny(26).text("gemma3.rope.scaling.type", "linear").float("gemma3.rope.scaling.factor", 8.0);
        let config = config(&scaled).unwrap();
        let layers = config["layer_types"].as_array().unwrap();
        let full: Vec<_> = layers.iter().enumerate().filter(|(_, kind)| *kind == "full_attention").collect();
        assert_eq!((layers.len(), full.iter().map(|(at, _)| *at).collect::<Vec<_>>()), (26, vec![5, 11, 17, 23]));
        let mut config = config;
        config.as_object_mut().unwrap().remove("layer_types");
        let expected = json!({
            "architectures": ["Gemma3ForCausalLM"], "model_type": "gemma3_text", "hidden_size": 32,
            "intermediate_size": 32, "num_hidden_layers": 26, "num_attention_heads": 4, "num_key_value_heads": 1,
            "head_dim": 16, "max_position_embeddings": 128, "rms_norm_eps": 1e-6, "vocab_size": 10,
            "rope_theta": 1_000_000.0, "rope_scaling": { "rope_type": "linear", "factor": 8.0 },
            "rope_local_base_freq": 10_000.0, "tie_word_embeddings": true, "torch_dtype": "float32",
            "hidden_activation": "gelu_pytorch_tanh", "attention_bias": false, "query_pre_attn_scalar": 16,
            "sliding_window": 64, "sliding_window_pattern": 6, "attn_logit_softcapping": null,
            "final_logit_softcapping": null,
        });
        assert_eq!(config, expected);
    }

    #[test]
    fn attention_is_scaled_as_stated_or_by_the_published_size() {
        let scalar = |writer: &GgufWriter| config(writer).map(|config| config["query_pre_attn_scalar"].clone());
        assert_eq!(scalar(&tiny(34)).unwrap(), 16, "the size of a head");
        assert_eq!(scalar(&tiny(62)).unwrap(), 8, "the share of the width");
        let stated = tiny(7).float("gemma3.attention.scale", 168f32.sqrt().recip());
        assert_eq!(scalar(&stated).unwrap(), 168);
        assert_eq!(
            scalar(&tiny(7)).unwrap_err().to_string(),
            "`gemma3.attention.scale` cannot be imported: missing, and no published size has 7 layers, by which it \
             could be known"
        );
        assert!(scalar(&tiny(7).float("gemma3.attention.scale", 0.0)).is_err());
        let endless = tiny(u32::MAX).float("gemma3.attention.scale", 0.25);
        assert!(scalar(&endless).unwrap_err().to_string().contains("up to 4096 layers"));
    }

    #[test]
    fn other_windows_than_can_be_said_are_refused() {
        let slides = |every: u32| (1..=18).map(|layer: u32| !layer.is_multiple_of(every)).collect::<Vec<_>>();
        let stated = |every| config(&tiny(18).bools("gemma3.attention.sliding_window_pattern", &slides(every)));
        assert_eq!(stated(6).unwrap()["sliding_window_pattern"], 6);
        assert!(matches!(stated(4), Err(ImportError::Setting { .. })));
        let stated = config(&tiny(18).number("gemma3.attention.sliding_window_pattern", 4)).unwrap();
        assert_eq!(
            (&stated["sliding_window_pattern"], &stated["layer_types"][3]),
            (&json!(4), &json!("full_attention"))
        );
        assert!(config(&tiny(18).number("gemma3.attention.sliding_window_pattern", 0)).is_err());
        let mut none = tiny(18);
        none.entries.retain(|(key, _)| key != "gemma3.attention.sliding_window");
        assert!(matches!(config(&none), Err(ImportError::Setting { .. })));
        assert!(config(&tiny(18).float("gemma3.final_logit_softcapping", 30.0)).is_err());
    }
}
