//! Gemma 2: four norms a layer whose weights are stored less one, scaled embeddings, scores and logits capped by tanh, and
//! layers that see a sliding window in turn with layers that see everything.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    Attention, AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Mlp,
    NormNames, NormWeight, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct Gemma2;
mesh_graph::register_family!(&Gemma2);

impl ModelFamily for Gemma2 {
    fn id(&self) -> &'static str {
        "gemma2"
    }

    fn title(&self) -> &'static str {
        "Gemma 2"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["gemma2"], architectures: &["Gemma2ForCausalLM"], gguf_architectures: &["gemma2"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "plain" }
    }
}

#[derive(Deserialize)]
struct Own {
    query_pre_attn_scalar: f32,
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

fn read(config: &Value) -> Result<(DecoderConfig, Own), GraphError> {
    let defaults = json!({ "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true });
    let mut config = DecoderConfig::read_or(config, &defaults)?;
    config.default_layer_types(["sliding_attention", "full_attention"], 2);
    config.check_layer_windows()?;
    let own = config.own()?;
    Ok((config, own))
}

impl GraphFamily for Gemma2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, own) = read(config)?;
        let frame = Frame {
            embedding_multiplier: (config.hidden_size as f32).sqrt(),
            stored: NormWeight::LessOne,
            final_logit_softcapping: own.final_logit_softcapping,
            ..Frame::default()
        };
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let attention = AttentionSpec {
                window: config.layer_window(index)?,
                scale: 1.0 / own.query_pre_attn_scalar.sqrt(),
                softcap: own.attn_logit_softcapping,
                ..config.attention()
            };
            let attention = Attention::new(weights, &format!("{name}.self_attn"), attention)?;
            let mlp = Mlp::new(weights, &format!("{name}.mlp"), &config)?;
            Layer::new(weights, name, &config, NormNames::GEMMA, attention, mlp)
        };
        Ok(Box::new(Decoder::new(weights, &config, frame, layer)?))
    }
}
