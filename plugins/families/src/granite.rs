//! Granite 3: Llama with multipliers on embeddings, scores, residuals and logits.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Weights, accepted,
};
use serde::Deserialize;
use serde_json::Value;

/// The family.
pub struct Granite;
mesh_graph::register_family!(&Granite);

impl ModelFamily for Granite {
    fn id(&self) -> &'static str {
        "granite"
    }

    fn title(&self) -> &'static str {
        "Granite 3"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["granite"], architectures: &["GraniteForCausalLM"], gguf_architectures: &["granite"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("thinking"), dialect: "hermes" }
    }
}

#[derive(Deserialize)]
struct Own {
    embedding_multiplier: f32,
    attention_multiplier: f32,
    residual_multiplier: f32,
    logits_scaling: f32,
}

fn read(config: &Value) -> Result<(DecoderConfig, Own), GraphError> {
    let config = DecoderConfig::read(config)?;
    let own: Own = config.own()?;
    if own.logits_scaling == 0.0 {
        return Err(GraphError::Config("`logits_scaling` is zero".into()));
    }
    Ok((config, own))
}

impl GraphFamily for Granite {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, own) = read(config)?;
        let Own { embedding_multiplier, attention_multiplier, residual_multiplier, logits_scaling } = own;
        let attention = AttentionSpec { scale: attention_multiplier, ..config.attention() };
        let frame = Frame { embedding_multiplier, logits_scaling, ..Frame::default() };
        let layer = |weights: &mut Weights, name: &str, _| {
            Ok(Layer::plain(weights, name, &config, attention.clone())?.with_residual_multiplier(residual_multiplier))
        };
        Ok(Box::new(Decoder::new(weights, &config, frame, layer)?))
    }
}
