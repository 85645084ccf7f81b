//! gpt-oss: a learned sink for each head, layers that see a sliding window in turn with layers that see everything, YaRN, and
//! experts with biases, a clipped gate, and weights published in MXFP4.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, Bias, CausalModel, Decoder, DecoderConfig, ExpertActivation, Frame, GraphError,
    GraphFamily, Layer, Moe, MoeSpec, NormNames, RouterSpec, Score, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct GptOss;
mesh_graph::register_family!(&GptOss);

impl ModelFamily for GptOss {
    fn id(&self) -> &'static str {
        "gpt_oss"
    }

    fn title(&self) -> &'static str {
        "gpt-oss"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["gpt_oss"], architectures: &["GptOssForCausalLM"], gguf_architectures: &["gpt-oss"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Effort("reasoning_effort"), dialect: "harmony" }
    }
}

/// Steepness of the gate; configs don't name it.
const ALPHA: f32 = 1.702;

#[derive(Deserialize)]
struct Own {
    num_local_experts: i32,
    num_experts_per_tok: Option<i32>,
    experts_per_token: Option<i32>,
    swiglu_limit: Option<f32>,
}

fn read(config: &Value) -> Result<(DecoderConfig, MoeSpec), GraphError> {
    let mut config = DecoderConfig::read_or(config, &json!({ "attention_bias": true, "sliding_window": 128, "rope_theta": 1.5e5 }))?;
    config.default_layer_types(["sliding_attention", "full_attention"], 2);
    config.check_layer_windows()?;
    let own: Own = config.own()?;
    let top_k = own.num_experts_per_tok.or(own.experts_per_token).unwrap_or(4);
    let moe = MoeSpec {
        gate: "router",
        bias: Bias::Yes,
        activation: ExpertActivation::Clipped { limit: own.swiglu_limit.unwrap_or(7.0), alpha: ALPHA },
        ..MoeSpec::new(RouterSpec::new(own.num_local_experts, top_k, Score::SoftmaxOfChosen)?, config.intermediate_size)
    };
    Ok((config, moe))
}

/// Published experts are `mlp.experts.gate_up_proj`, whose rows are a gate's and an up projection's in turn, and
/// `down_proj`: in MXFP4, or as plain stacks the other way round. mlx-lm stores `gate_proj`, `up_proj` and `down_proj`.
fn experts(weights: &mut Weights, layer: &str, inner: i32) -> Result<(), GraphError> {
    let [fused, gate, up, down] =
        ["gate_up_proj", "gate_proj", "up_proj", "down_proj"].map(|part| format!("{layer}.mlp.switch_mlp.{part}"));
    for name in [&fused, &down] {
        weights.unpack_mxfp4_blocks(name)?;
        weights.turn_stack(name)?;
    }
    weights.split_alternating_rows(&fused, inner, &gate, &up)
}

impl GraphFamily for GptOss {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, moe) = read(config)?;
        weights.rename(&[(".mlp.experts.", ".mlp.switch_mlp.")]);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            experts(weights, name, config.intermediate_size)?;
            let attention = AttentionSpec { window: config.layer_window(index)?, sinks: true, ..config.attention() };
            let moe = Moe::new(weights, &format!("{name}.mlp"), &config, moe.clone())?;
            Layer::attending(weights, name, &config, NormNames::PRE, attention, moe)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
