//! Gemma 3: as Gemma 2 without caps, with norms on q and k; every sixth layer sees everything, the others a sliding window,
//! with rotary settings of their own.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer,
    NormNames, NormWeight, QkNorm, RopeSpec, Scaling, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct Gemma3;
mesh_graph::register_family!(&Gemma3);

impl ModelFamily for Gemma3 {
    fn id(&self) -> &'static str {
        "gemma3"
    }

    fn title(&self) -> &'static str {
        "Gemma 3"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["gemma3_text", "gemma3"],
            architectures: &["Gemma3ForCausalLM", "Gemma3ForConditionalGeneration"],
            gguf_architectures: &["gemma3"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "plain" }
    }
}

const LEFT_OUT: &[&str] = &["vision_tower.", "multi_modal_projector."];

#[derive(Deserialize)]
struct Own {
    sliding_window_pattern: Option<usize>,
    #[serde(rename = "_sliding_window_pattern")]
    pattern: Option<usize>,
    rope_local_base_freq: f32,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

struct Read {
    config: DecoderConfig,
    own: Own,
    local: RopeSpec,
    global: RopeSpec,
}

/// What published configs leave to the reference implementation.
fn defaults() -> Value {
    json!({
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true, "rms_norm_eps": 1e-6, "vocab_size": 262_208,
        "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256.0,
        "sliding_window": 4096, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
    })
}

fn read(config: &Value) -> Result<Read, GraphError> {
    let mut config = DecoderConfig::read_or(config, &defaults())?;
    let own: Own = config.own()?;
    let period = own.sliding_window_pattern.or(own.pattern).unwrap_or(6);
    config.default_layer_types(["sliding_attention", "full_attention"], period);
    config.check_layer_windows()?;
    config.pre_attn_scale()?;
    let global = RopeSpec::read_layer_type(&config.settings, config.head_dim(), "full_attention")?;
    let local = match config.settings["rope_parameters"]["sliding_attention"].is_object() {
        true => RopeSpec::read_layer_type(&config.settings, config.head_dim(), "sliding_attention")?,
        false => RopeSpec { theta: own.rope_local_base_freq, scaling: Scaling::None, ..global.clone() },
    };
    Ok(Read { config, own, local, global })
}

impl GraphFamily for Gemma3 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let Read { config, own, local, global } = read(config)?;
        weights.text_part(LEFT_OUT);
        let frame = Frame::gemma(&config, NormWeight::LessOne, own.final_logit_softcapping);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let window = config.layer_window(index)?;
            let attention = AttentionSpec {
                qk_norm: QkNorm::PerHead(config.rms_norm_eps, NormWeight::LessOne),
                rope: Some(if window.is_some() { local.clone() } else { global.clone() }),
                window,
                scale: config.pre_attn_scale()?,
                softcap: own.attn_logit_softcapping,
                ..config.attention()
            };
            Layer::dense(weights, name, &config, NormNames::GEMMA, attention).map(Layer::with_clipped_stream)
        };
        Ok(Box::new(Decoder::new(weights, &config, frame, layer)?))
    }
}
