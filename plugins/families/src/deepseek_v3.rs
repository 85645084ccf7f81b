//! DeepSeek V3 and R1: latent attention and a mixture of experts.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{CausalModel, DeepseekConfig, GraphError, GraphFamily, Weights, accepted};
use serde_json::Value;

/// The family.
pub struct DeepseekV3;
mesh_graph::register_family!(&DeepseekV3);

impl ModelFamily for DeepseekV3 {
    fn id(&self) -> &'static str {
        "deepseek_v3"
    }

    fn title(&self) -> &'static str {
        "DeepSeek V3, DeepSeek R1"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["deepseek_v3"],
            architectures: &["DeepseekV3ForCausalLM"],
            gguf_architectures: &["deepseek2"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("thinking"), dialect: "deepseek" }
    }
}

fn read(config: &Value) -> Result<DeepseekConfig, GraphError> {
    DeepseekConfig::read(config)
}

impl GraphFamily for DeepseekV3 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        Ok(Box::new(read(config)?.decoder(weights)?))
    }
}
