//! Qwen 2 and 2.5: Llama with bias on q, k and v.

use mesh_core::{Claims, Conventions, Fingerprint, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, Bias, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Qwen2;
mesh_graph::register_family!(&Qwen2);

impl ModelFamily for Qwen2 {
    fn id(&self) -> &'static str {
        "qwen2"
    }

    fn title(&self) -> &'static str {
        "Qwen 2, Qwen 2.5"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["qwen2"], architectures: &["Qwen2ForCausalLM"], gguf_architectures: &["qwen2"] }
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        Some(Fingerprint {
            required: &["model.layers.0.self_attn.q_proj.bias", "model.layers.0.mlp.gate_proj.weight"],
            forbidden: &["o_proj.bias", "q_norm.weight", "experts.0.gate_proj.weight"],
        })
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(DecoderConfig::read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "hermes" }
    }
}

impl GraphFamily for Qwen2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = DecoderConfig::read(config)?;
        let attention = AttentionSpec { qkv_bias: Bias::Yes, o_bias: Bias::No, ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, _| Layer::plain(weights, name, &config, attention.clone());
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
