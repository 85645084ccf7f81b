//! Kimi Linear: Kimi Delta Attention, whose decay is each channel's own, in most layers; latent attention without rotation in
//! the others; DeepSeek's experts under other names.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    Bias, CacheKind, DeepseekMoeConfig, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily,
    LatentAttention, LatentSpec, Layer, LayerCache, Linear, Mixer, MIXTRAL_NAMES, NormNames,
    Pass, RmsNorm, ShortConv, Steps, Weights, accepted, delta_rule, l2_normed, scale, silu,
    softplus,
};
use mlx_rs::{Array, Dtype, error::Exception, ops};
use serde::Deserialize;
use serde_json::Value;

/// The family.
pub struct KimiLinear;
mesh_graph::register_family!(&KimiLinear);

impl ModelFamily for KimiLinear {
    fn id(&self) -> &'static str {
        "kimi_linear"
    }

    fn title(&self) -> &'static str {
        "Kimi Linear"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["kimi_linear"],
            architectures: &["KimiLinearForCausalLM"],
            gguf_architectures: &["kimi-linear"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("thinking"), dialect: "kimi_k2" }
    }
}

/// mlx-lm's.
const NAMES: &[(&str, &str)] = &[
    ("_conv.conv.", "_conv1d."),
    (".mlp.e_score_correction_bias", ".mlp.gate.e_score_correction_bias"),
];

/// Multi-token prediction.
const LEFT_OUT: &[&str] = &["mtp."];

#[derive(Clone, Debug, Deserialize)]
struct LinearAttention {
    /// Counted from one.
    kda_layers: Vec<usize>,
    head_dim: i32,
    num_heads: i32,
    short_conv_kernel_size: i32,
}

#[derive(Deserialize)]
struct Own {
    linear_attn_config: LinearAttention,
    #[serde(default)]
    mla_use_nope: bool,
}

struct Read {
    config: DecoderConfig,
    linear: LinearAttention,
    attention: LatentSpec,
    moe: DeepseekMoeConfig,
}

fn read(config: &Value) -> Result<Read, GraphError> {
    let config = DecoderConfig::read(config)?;
    let own: Own = config.own()?;
    let mut attention = LatentSpec::read(&config)?;
    if own.mla_use_nope {
        attention.rope = None;
    }
    let moe = DeepseekMoeConfig::read(&config)?;
    Ok(Read { linear: own.linear_attn_config, attention, moe, config })
}

/// Kimi Delta Attention. Its states: the inputs of three convolutions, then the delta rule's matrix.
#[derive(Debug)]
struct DeltaAttention {
    heads: i32,
    head_dim: i32,
    /// q, k and v.
    projections: [(Linear, ShortConv); 3],
    /// Low-rank maps to decays and to gates.
    decay: [Linear; 2],
    gate: [Linear; 2],
    b_proj: Linear,
    /// `−e^A_log`, one a head, f32.
    rate: Array,
    /// One a channel.
    dt_bias: Array,
    o_norm: RmsNorm,
    o_proj: Linear,
}

impl DeltaAttention {
    fn new(
        weights: &mut Weights,
        name: &str,
        hidden: i32,
        eps: f32,
        own: &LinearAttention,
    ) -> Result<Self, GraphError> {
        let (heads, head_dim) = (own.num_heads, own.head_dim);
        let width = heads * head_dim;
        let linear = |weights: &mut Weights, part: &str, out, inner| {
            Linear::new(weights, &format!("{name}.{part}"), out, inner, Bias::No)
        };
        let mut mixed = |part: &str| {
            let proj = linear(weights, &format!("{part}_proj"), width, hidden)?;
            let kernel = own.short_conv_kernel_size;
            Ok::<_, GraphError>((
                proj,
                ShortConv::new(weights, &format!("{name}.{part}_conv1d"), width, kernel, false)?,
            ))
        };
        let projections = [mixed("q")?, mixed("k")?, mixed("v")?];
        let mut low_rank = |part: &str| {
            let first = linear(weights, &format!("{part}_a_proj"), head_dim, hidden)?;
            Ok::<_, GraphError>([first, linear(weights, &format!("{part}_b_proj"), width, head_dim)?])
        };
        let (decay, gate) = (low_rank("f")?, low_rank("g")?);
        let b_proj = linear(weights, "b_proj", heads, hidden)?.in_f32()?;
        let o_proj = linear(weights, "o_proj", hidden, width)?;
        let rate = weights.take_f32(&format!("{name}.A_log"), &[1, 1, heads, 1])?;
        let dt_bias = weights.take_f32(&format!("{name}.dt_bias"), &[width])?;
        let o_norm = RmsNorm::new(weights, &format!("{name}.o_norm"), head_dim, eps)?;
        let rate = rate.exp()?.negative()?;
        Ok(Self { heads, head_dim, projections, decay, gate, b_proj, rate, dt_bias, o_norm, o_proj })
    }
}

impl Mixer for DeltaAttention {
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let (batch, time) = (pass.batch(), pass.time());
        let split = |x: &Array| x.reshape(&[batch, time, self.heads, self.head_dim]);
        let states = cache.states(self.projections.len() + 1)?;
        let mut mixed = Vec::new();
        for ((proj, conv), state) in self.projections.iter().zip(states.iter_mut()) {
            mixed.push(split(&silu(&conv.forward(&proj.forward(x)?, state, pass)?)?)?);
        }
        let ([q, k, v], Some(state)) = (&mixed[..], states.last_mut()) else {
            return Err(Exception::custom("a recurrent layer was given a cache of another layout"));
        };
        let [first, second] = &self.decay;
        let decay = second.forward(&first.forward(x)?)?.as_dtype(Dtype::Float32)?.add(&self.dt_bias)?;
        let steps = Steps {
            q: scale(&l2_normed(q)?, 1.0 / (self.head_dim as f32).sqrt())?,
            k: l2_normed(k)?,
            v: v.clone(),
            log_decay: split(&softplus(&decay)?)?.multiply(&self.rate)?,
            beta: ops::sigmoid(self.b_proj.forward(x)?.as_dtype(Dtype::Float32)?)?.expand_dims(-1)?,
        };
        let out = self.o_norm.forward(&delta_rule(&steps, state)?.as_dtype(x.dtype())?)?;
        let [first, second] = &self.gate;
        let gate = ops::sigmoid(split(&second.forward(&first.forward(x)?)?)?)?;
        self.o_proj.forward(&out.multiply(gate)?.reshape(&[batch, time, self.heads * self.head_dim])?)
    }

    fn keeps(&self) -> CacheKind {
        CacheKind::State
    }
}

impl GraphFamily for KimiLinear {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let Read { config, linear, attention, moe } = read(config)?;
        weights.leave_out(LEFT_OUT);
        weights.rename(MIXTRAL_NAMES);
        weights.rename(NAMES);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let mlp = moe.feed_forward(weights, &format!("{name}.mlp"), &config, index)?;
            let mixer = format!("{name}.self_attn");
            if linear.kda_layers.contains(&(index + 1)) {
                let delta = DeltaAttention::new(weights, &mixer, config.hidden_size, config.rms_norm_eps, &linear)?;
                return Layer::new(weights, name, &config, NormNames::PRE, delta, mlp);
            }
            let latent = LatentAttention::new(weights, &mixer, attention.clone())?;
            Layer::new(weights, name, &config, NormNames::PRE, latent, mlp)
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
