//! Llama 2 and 3, and Mistral: the plain pre-norm decoder. Llama 3 scales its rotary frequencies; Mistral 7B v0.1 sees a
//! sliding window in every layer.

use mesh_core::{Claims, Conventions, Fingerprint, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{AttentionSpec, CausalModel, Decoder, DecoderConfig, GraphError, GraphFamily, Weights};
use serde_json::Value;

/// The family.
pub struct Llama;
mesh_graph::register_family!(&Llama);

impl ModelFamily for Llama {
    fn id(&self) -> &'static str {
        "llama"
    }

    fn title(&self) -> &'static str {
        "Llama, Mistral"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["llama", "mistral"],
            architectures: &["LlamaForCausalLM", "MistralForCausalLM"],
            gguf_architectures: &["llama"],
        }
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
        DecoderConfig::accept(profile)
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "llama3_json" }
    }
}

impl GraphFamily for Llama {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = DecoderConfig::read(config)?;
        let attention = AttentionSpec { window: config.window(), ..config.attention() };
        Ok(Box::new(Decoder::new(weights, &config, |_| attention.clone())?))
    }
}
