//! GLM 4 (0414): four norms a layer, rotation of half of each head in neighbouring pairs, a fused gate and up projection.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, Bias, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Mlp,
    NormNames, NormWeight, RopeSpec, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Glm4;
mesh_graph::register_family!(&Glm4);

impl ModelFamily for Glm4 {
    fn id(&self) -> &'static str {
        "glm4"
    }

    fn title(&self) -> &'static str {
        "GLM 4"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["glm4"], architectures: &["Glm4ForCausalLM"], gguf_architectures: &["glm4"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "glm" }
    }
}

const NORMS: NormNames = NormNames {
    before_mixer: Some("input_layernorm"),
    after_mixer: Some("post_self_attn_layernorm"),
    before_mlp: Some("post_attention_layernorm"),
    after_mlp: Some("post_mlp_layernorm"),
    stored: NormWeight::Whole,
};

fn read(config: &Value) -> Result<(DecoderConfig, AttentionSpec), GraphError> {
    let config = DecoderConfig::read(config)?;
    let rope = Some(RopeSpec { traditional: true, ..config.rope.clone() });
    let attention = AttentionSpec { rope, o_bias: Bias::No, ..config.attention() };
    Ok((config, attention))
}

impl GraphFamily for Glm4 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, attention) = read(config)?;
        let layer = |weights: &mut Weights, name: &str, _| {
            Mlp::split_fused(weights, &format!("{name}.mlp"), &config)?;
            Layer::dense(weights, name, &config, NORMS, attention.clone())
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
