//! Phi 3 and 4: fused projections, rotation of a part of each head (Phi 4 mini), and longrope on long-context models.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Mlp, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Phi3;
mesh_graph::register_family!(&Phi3);

impl ModelFamily for Phi3 {
    fn id(&self) -> &'static str {
        "phi3"
    }

    fn title(&self) -> &'static str {
        "Phi 3, Phi 3.5, Phi 4"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["phi3"], architectures: &["Phi3ForCausalLM"], gguf_architectures: &["phi3"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "plain" }
    }
}

fn read(config: &Value) -> Result<(DecoderConfig, AttentionSpec), GraphError> {
    let config = DecoderConfig::read(config)?;
    let attention = AttentionSpec { window: config.window(), ..config.attention() };
    Ok((config, attention))
}

impl GraphFamily for Phi3 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, attention) = read(config)?;
        let (q, kv) = (attention.heads * attention.head_dim, attention.kv_heads * attention.head_dim);
        let hidden = config.hidden_size;
        let layer = |weights: &mut Weights, name: &str, _| {
            let of = |part: &str| format!("{name}.{part}");
            let [q_proj, k_proj, v_proj] = ["q_proj", "k_proj", "v_proj"].map(|part| of(&format!("self_attn.{part}")));
            weights.split_rows(&of("self_attn.qkv_proj"), hidden, &[(&q_proj, q), (&k_proj, kv), (&v_proj, kv)])?;
            Mlp::split_fused(weights, &of("mlp"), &config)?;
            Layer::plain(weights, name, &config, attention.clone())
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
