//! Kimi K2: the graph of DeepSeek V3 in other sizes.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{CausalModel, DeepseekConfig, GraphError, GraphFamily, Weights, accepted};
use serde_json::Value;

/// The family.
pub struct KimiK2;
mesh_graph::register_family!(&KimiK2);

impl ModelFamily for KimiK2 {
    fn id(&self) -> &'static str {
        "kimi_k2"
    }

    fn title(&self) -> &'static str {
        "Kimi K2"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["kimi_k2"], architectures: &["KimiK2ForCausalLM"], gguf_architectures: &[] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("thinking"), dialect: "kimi_k2" }
    }
}

fn read(config: &Value) -> Result<DeepseekConfig, GraphError> {
    DeepseekConfig::read(config)
}

impl GraphFamily for KimiK2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        Ok(Box::new(read(config)?.decoder(weights)?))
    }
}
