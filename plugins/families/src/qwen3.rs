//! Qwen 3: no bias, RMS norm over each head of q and k before rotation.

use mesh_core::{Claims, Conventions, Fingerprint, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, NormWeight, QkNorm,
    Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Qwen3;
mesh_graph::register_family!(&Qwen3);

impl ModelFamily for Qwen3 {
    fn id(&self) -> &'static str {
        "qwen3"
    }

    fn title(&self) -> &'static str {
        "Qwen 3"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["qwen3"], architectures: &["Qwen3ForCausalLM"], gguf_architectures: &["qwen3"] }
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        Some(Fingerprint {
            required: &["model.layers.0.self_attn.q_norm.weight", "model.layers.0.mlp.gate_proj.weight"],
            forbidden: &["experts.0.gate_proj.weight", "pre_feedforward_layernorm.weight", "linear_attn.A_log"],
        })
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(DecoderConfig::read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "hermes" }
    }
}

impl GraphFamily for Qwen3 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = DecoderConfig::read(config)?;
        let attention =
            AttentionSpec { qk_norm: QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole), ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, _| Layer::plain(weights, name, &config, attention.clone());
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
