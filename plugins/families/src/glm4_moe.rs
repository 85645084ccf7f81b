//! GLM 4.5 to 4.7: DeepSeek's mixture of experts on attention with biased projections that rotates half of each head.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, Bias, CausalModel, Decoder, DecoderConfig, DeepseekMoeConfig, Frame, GraphError,
    GraphFamily, Layer, NormNames, NormWeight, QkNorm, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Glm4Moe;
mesh_graph::register_family!(&Glm4Moe);

impl ModelFamily for Glm4Moe {
    fn id(&self) -> &'static str {
        "glm4_moe"
    }

    fn title(&self) -> &'static str {
        "GLM 4.5, GLM 4.6, GLM 4.7"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["glm4_moe"], architectures: &["Glm4MoeForCausalLM"], gguf_architectures: &["glm4moe"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "glm" }
    }
}

fn read(config: &Value) -> Result<(DecoderConfig, AttentionSpec, DeepseekMoeConfig), GraphError> {
    let config = DecoderConfig::read(config)?;
    let moe = DeepseekMoeConfig::read(&config)?;
    let qk_norm = match config.settings["use_qk_norm"].as_bool() {
        Some(true) => QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole),
        _ => QkNorm::None,
    };
    let attention = AttentionSpec { qk_norm, o_bias: Bias::No, ..config.attention() };
    Ok((config, attention, moe))
}

impl GraphFamily for Glm4Moe {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, attention, moe) = read(config)?;
        DeepseekMoeConfig::leave_out_prediction(weights, &config);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let mlp = moe.feed_forward(weights, &format!("{name}.mlp"), &config, index)?;
            Layer::attending(weights, name, &config, NormNames::PRE, attention.clone(), mlp)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
