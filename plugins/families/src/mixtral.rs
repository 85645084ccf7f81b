//! Mixtral: Mistral with experts, the best of which share the softmax.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Moe, MoeSpec,
    MIXTRAL_NAMES, NormNames, RouterSpec, Score, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct Mixtral;
mesh_graph::register_family!(&Mixtral);

impl ModelFamily for Mixtral {
    fn id(&self) -> &'static str {
        "mixtral"
    }

    fn title(&self) -> &'static str {
        "Mixtral"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["mixtral"], architectures: &["MixtralForCausalLM"], gguf_architectures: &[] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "mistral" }
    }
}

#[derive(Deserialize)]
struct Own {
    num_local_experts: i32,
    num_experts_per_tok: i32,
}

fn read(config: &Value) -> Result<(DecoderConfig, MoeSpec), GraphError> {
    let config = DecoderConfig::read_or(config, &json!({ "rope_theta": 1e6 }))?;
    let own: Own = config.own()?;
    let router = RouterSpec::new(own.num_local_experts, own.num_experts_per_tok, Score::SoftmaxOfChosen)?;
    let moe = MoeSpec::new(router, config.intermediate_size);
    Ok((config, moe))
}

impl GraphFamily for Mixtral {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, moe) = read(config)?;
        weights.rename(MIXTRAL_NAMES);
        let attention = AttentionSpec { window: config.window(), ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, _| {
            let moe = Moe::new(weights, &format!("{name}.mlp"), &config, moe.clone())?;
            Layer::attending(weights, name, &config, NormNames::PRE, attention.clone(), moe)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
