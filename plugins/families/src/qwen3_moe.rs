//! Qwen 3 with Qwen's mixture of experts.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, NormNames,
    NormWeight, QkNorm, QwenMoeConfig, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Qwen3Moe;
mesh_graph::register_family!(&Qwen3Moe);

impl ModelFamily for Qwen3Moe {
    fn id(&self) -> &'static str {
        "qwen3_moe"
    }

    fn title(&self) -> &'static str {
        "Qwen 3 (mixture of experts), Qwen 3 Coder"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["qwen3_moe"],
            architectures: &["Qwen3MoeForCausalLM"],
            gguf_architectures: &["qwen3moe"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "hermes" }
    }
}

fn read(config: &Value) -> Result<(DecoderConfig, QwenMoeConfig), GraphError> {
    let config = DecoderConfig::read(config)?;
    let moe = QwenMoeConfig::read(&config)?;
    Ok((config, moe))
}

impl GraphFamily for Qwen3Moe {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, moe) = read(config)?;
        let qk_norm = QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole);
        let attention = AttentionSpec { qk_norm, ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let mlp = moe.feed_forward(weights, &format!("{name}.mlp"), &config, index)?;
            Layer::attending(weights, name, &config, NormNames::PRE, attention.clone(), mlp)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
