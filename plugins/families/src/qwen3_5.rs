//! Qwen 3.5: the layers of Qwen 3 Next with separate projections and one MLP, in a multimodal wrapper.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{CausalModel, DeltaDecoderConfig, FeedForward, GraphError, GraphFamily, Mlp, Weights, accepted};
use serde_json::Value;

/// The family.
pub struct Qwen35;
mesh_graph::register_family!(&Qwen35);

impl ModelFamily for Qwen35 {
    fn id(&self) -> &'static str {
        "qwen3_5"
    }

    fn title(&self) -> &'static str {
        "Qwen 3.5"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["qwen3_5", "qwen3_5_text"],
            architectures: &["Qwen3_5ForConditionalGeneration", "Qwen3_5ForCausalLM"],
            gguf_architectures: &["qwen35"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "qwen3_coder" }
    }
}

/// Vision, and multi-token prediction.
const LEFT_OUT: &[&str] = &["visual.", "vision_tower.", "mtp.", "language_model.mtp."];

fn read(config: &Value) -> Result<DeltaDecoderConfig, GraphError> {
    let config = DeltaDecoderConfig::read(config)?;
    if config.decoder.settings["attn_output_gate"] == Value::Bool(false) {
        return Err(GraphError::Config("`attn_output_gate` false is not supported".into()));
    }
    Ok(config)
}

impl GraphFamily for Qwen35 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = read(config)?;
        weights.text_part(LEFT_OUT);
        let mlp = |weights: &mut Weights, name: &str, _| Mlp::new(weights, name, &config.decoder).map(FeedForward::from);
        Ok(Box::new(config.decoder(weights, mlp)?))
    }
}
