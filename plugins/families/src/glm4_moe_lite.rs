//! GLM 4.7 Flash: the graph of DeepSeek V3 in GLM's sizes.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{CausalModel, DeepseekConfig, GraphError, GraphFamily, Weights, accepted};
use serde_json::Value;

/// The family.
pub struct Glm4MoeLite;
mesh_graph::register_family!(&Glm4MoeLite);

impl ModelFamily for Glm4MoeLite {
    fn id(&self) -> &'static str {
        "glm4_moe_lite"
    }

    fn title(&self) -> &'static str {
        "GLM 4.7 Flash"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["glm4_moe_lite"], architectures: &["Glm4MoeLiteForCausalLM"], gguf_architectures: &[] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "glm" }
    }
}

fn read(config: &Value) -> Result<DeepseekConfig, GraphError> {
    DeepseekConfig::read(config)
}

impl GraphFamily for Glm4MoeLite {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        Ok(Box::new(read(config)?.decoder(weights)?))
    }
}
