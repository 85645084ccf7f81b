//! Mistral: Llama whose layers may all see a sliding window (7B v0.1). Ministral 3 scales queries by their position. Mistral
//! Small 3 comes in a multimodal wrapper.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, QueryGrowth, Weights,
    accepted,
};
use serde_json::Value;

/// The family.
pub struct Mistral;
mesh_graph::register_family!(&Mistral);

impl ModelFamily for Mistral {
    fn id(&self) -> &'static str {
        "mistral"
    }

    fn title(&self) -> &'static str {
        "Mistral, Ministral 3, Mistral Small 3"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["mistral", "ministral3", "mistral3"],
            architectures: &["MistralForCausalLM", "Ministral3ForCausalLM", "Mistral3ForConditionalGeneration"],
            gguf_architectures: &["mistral3"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "mistral" }
    }
}

const LEFT_OUT: &[&str] = &["vision_tower.", "multi_modal_projector."];

fn read(config: &Value) -> Result<(DecoderConfig, AttentionSpec), GraphError> {
    let inner = &config["text_config"]["model_type"];
    if let Some(other) = inner.as_str().filter(|inner| !["mistral", "ministral3"].contains(inner)) {
        return Err(GraphError::Config(format!("`text_config.model_type` `{other}` is not supported")));
    }
    let config = DecoderConfig::read(config)?;
    let rope = &config.settings["rope_parameters"];
    let number = |key: &str| rope[key].as_f64().map(|value| value as f32);
    let query_growth = match (number("llama_4_scaling_beta"), number("original_max_position_embeddings")) {
        (Some(beta), Some(original_max_position_embeddings)) => {
            Some(QueryGrowth { beta, original_max_position_embeddings })
        }
        (Some(_), None) => {
            let what = "`llama_4_scaling_beta` needs `original_max_position_embeddings`";
            return Err(GraphError::Config(what.into()));
        }
        (None, _) => None,
    };
    let attention = AttentionSpec { window: config.window(), query_growth, ..config.attention() };
    Ok((config, attention))
}

impl GraphFamily for Mistral {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, attention) = read(config)?;
        weights.text_part(LEFT_OUT);
        let layer = |weights: &mut Weights, name: &str, _| Layer::plain(weights, name, &config, attention.clone());
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
