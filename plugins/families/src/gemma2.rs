//! Gemma 2: four norms a layer whose weights are stored less one, scaled embeddings, scores and logits capped by tanh, and
//! layers that see a sliding window in turn with layers that see everything.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer,
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
    attn_logit_softcapping: Option<f32>,
    final_logit_softcapping: Option<f32>,
}

fn read(config: &Value) -> Result<(DecoderConfig, Own), GraphError> {
    let defaults = json!({ "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true, "sliding_window": 4096 });
    let mut config = DecoderConfig::read_or(config, &defaults)?;
    config.default_layer_types(["sliding_attention", "full_attention"], 2);
    config.check_layer_windows()?;
    config.pre_attn_scale()?;
    let own = config.own()?;
    Ok((config, own))
}

impl GraphFamily for Gemma2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, own) = read(config)?;
        let frame = Frame::gemma(&config, NormWeight::LessOne, own.final_logit_softcapping);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let attention = AttentionSpec {
                window: config.layer_window(index)?,
                scale: config.pre_attn_scale()?,
                softcap: own.attn_logit_softcapping,
                ..config.attention()
            };
            Layer::dense(weights, name, &config, NormNames::GEMMA, attention).map(Layer::with_clipped_stream)
        };
        Ok(Box::new(Decoder::new(weights, &config, frame, layer)?))
    }
}
