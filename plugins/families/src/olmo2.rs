//! OLMo 2: norms on what attention and MLP give, none before them, and a norm over the full width of q and k.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer,
    NormNames, NormWeight, QkNorm, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Olmo2;
mesh_graph::register_family!(&Olmo2);

impl ModelFamily for Olmo2 {
    fn id(&self) -> &'static str {
        "olmo2"
    }

    fn title(&self) -> &'static str {
        "OLMo 2"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["olmo2"], architectures: &["Olmo2ForCausalLM"], gguf_architectures: &["olmo2"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "plain" }
    }
}

const NORMS: NormNames = NormNames {
    before_mixer: None,
    after_mixer: Some("post_attention_layernorm"),
    before_mlp: None,
    after_mlp: Some("post_feedforward_layernorm"),
    stored: NormWeight::Whole,
};

fn read(config: &Value) -> Result<DecoderConfig, GraphError> {
    DecoderConfig::read(config)
}

impl GraphFamily for Olmo2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let config = read(config)?;
        let attention = AttentionSpec { qk_norm: QkNorm::Full(config.rms_norm_eps), ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, _| {
            Layer::dense(weights, name, &config, NORMS, attention.clone())
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
