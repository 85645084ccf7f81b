//! MiniMax M2: a sigmoid router with a correction bias, a norm over the full width of q and k, rotation of a part of each head.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Moe, MoeSpec,
    MIXTRAL_NAMES, NormNames, QkNorm, RopeSpec, RouterSpec, Score, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct MiniMaxM2;
mesh_graph::register_family!(&MiniMaxM2);

impl ModelFamily for MiniMaxM2 {
    fn id(&self) -> &'static str {
        "minimax_m2"
    }

    fn title(&self) -> &'static str {
        "MiniMax M2"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["minimax_m2"],
            architectures: &["MiniMaxM2ForCausalLM"],
            gguf_architectures: &["minimax-m2"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "minimax_m2" }
    }
}

/// Multi-token prediction.
const LEFT_OUT: &[&str] = &["mtp."];

#[derive(Deserialize)]
struct Own {
    num_local_experts: i32,
    num_experts_per_tok: i32,
    rotary_dim: Option<i32>,
    scoring_func: Option<String>,
    use_routing_bias: Option<bool>,
    use_qk_norm: Option<bool>,
    qk_norm_type: Option<String>,
    shared_intermediate_size: Option<i32>,
}

fn read(config: &Value) -> Result<(DecoderConfig, AttentionSpec, MoeSpec), GraphError> {
    let config = DecoderConfig::read_or(config, &json!({ "rope_theta": 5e6 }))?;
    let own: Own = config.own()?;
    let refuse = |what: String| Err(GraphError::Config(format!("{what} is not supported")));
    if let Some(other) = own.scoring_func.filter(|name| name != "sigmoid") {
        return refuse(format!("`scoring_func` `{other}`"));
    }
    if let Some(other) = own.qk_norm_type.filter(|name| name != "per_layer") {
        return refuse(format!("`qk_norm_type` `{other}`"));
    }
    if let Some(size) = own.shared_intermediate_size.filter(|size| *size != 0) {
        return refuse(format!("`shared_intermediate_size` {size}"));
    }
    let qk_norm = if own.use_qk_norm.unwrap_or(true) { QkNorm::Full(config.rms_norm_eps) } else { QkNorm::None };
    let dims = own.rotary_dim.unwrap_or(config.rope.dims);
    if dims <= 0 || dims > config.head_dim() || dims % 2 != 0 {
        return refuse(format!("`rotary_dim` {dims}"));
    }
    let rope = Some(RopeSpec { dims, ..config.rope.clone() });
    let attention = AttentionSpec { qk_norm, rope, ..config.attention() };
    let router = RouterSpec::new(own.num_local_experts, own.num_experts_per_tok, Score::Sigmoid)?;
    let moe = MoeSpec {
        correction_bias: own.use_routing_bias.unwrap_or(true).then_some("e_score_correction_bias"),
        ..MoeSpec::new(RouterSpec { normalize: true, ..router }, config.intermediate_size)
    };
    Ok((config, attention, moe))
}

impl GraphFamily for MiniMaxM2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, attention, moe) = read(config)?;
        weights.leave_out(LEFT_OUT);
        weights.rename(MIXTRAL_NAMES);
        let layer = |weights: &mut Weights, name: &str, _| {
            let moe = Moe::new(weights, &format!("{name}.mlp"), &config, moe.clone())?;
            Layer::attending(weights, name, &config, NormNames::PRE, attention.clone(), moe)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
