//! Llama 2 and 3: the plain pre-norm decoder. Llama 3 scales its rotary frequencies.

use mesh_core::{Claims, Conventions, Fingerprint, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Weights, accepted};
use serde_json::Value;

/// The family.
pub struct Llama;
mesh_graph::register_family!(&Llama);

impl ModelFamily for Llama {
    fn id(&self) -> &'static str {
        "llama"
    }

    fn title(&self) -> &'static str {
        "Llama"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["llama"], architectures: &["LlamaForCausalLM"], gguf_architectures: &["llama"] }
    }

    fn fingerprint(&self) -> Option<Fingerprint> {
        Some(Fingerprint {
            required: &["model.layers.0.self_attn.q_proj.weight", "model.layers.0.mlp.gate_proj.weight"],
            forbidden: &[
                "q_proj.bias",
                "q_norm.weight",
                "pre_feedforward_layernorm.weight",
                "post_mlp_layernorm.weight",
            ],
        })
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(DecoderConfig::read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "llama3_json" }
    }
}

impl GraphFamily for Llama {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = DecoderConfig::read(config)?;
        let attention = config.attention();
        let layer = |weights: &mut Weights, name: &str, _| Layer::plain(weights, name, &config, attention.clone());
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
