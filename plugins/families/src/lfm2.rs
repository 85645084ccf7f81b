//! LFM 2: layers are attention or a gated short convolution; some sizes have experts, with a sigmoid router and a bias that
//! takes part in choosing alone.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    Attention, AttentionSpec, CacheKind, CausalModel, Decoder, DecoderConfig, FeedForward, Frame, GraphError,
    GraphFamily, Layer, LayerCache, Linear, Mixer, MoeSpec, MIXTRAL_NAMES, NormNames, NormWeight, Pass,
    QkNorm, RouterSpec, Score, ShortConv, Weights, accepted,
};
use mlx_rs::{Array, error::Exception};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct Lfm2;
mesh_graph::register_family!(&Lfm2);

impl ModelFamily for Lfm2 {
    fn id(&self) -> &'static str {
        "lfm2"
    }

    fn title(&self) -> &'static str {
        "LFM 2, LFM 2 (mixture of experts)"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["lfm2", "lfm2_moe"],
            architectures: &["Lfm2ForCausalLM", "Lfm2MoeForCausalLM"],
            gguf_architectures: &["lfm2", "lfm2moe"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Fixed, dialect: "pythonic" }
    }
}

const NAMES: &[(&str, &str)] = &[
    (".operator_norm.", ".input_layernorm."),
    (".ffn_norm.", ".post_attention_layernorm."),
    (".feed_forward.", ".mlp."),
    (".self_attn.out_proj.", ".self_attn.o_proj."),
    (".q_layernorm.", ".q_norm."),
    (".k_layernorm.", ".k_norm."),
];

#[derive(Deserialize)]
struct Own {
    #[serde(rename = "conv_L_cache")]
    kernel: i32,
    #[serde(default)]
    conv_bias: bool,
    full_attn_idxs: Option<Vec<usize>>,
    #[serde(default)]
    block_auto_adjust_ff_dim: bool,
    block_ff_dim: Option<i32>,
    tie_embedding: Option<bool>,
    block_ffn_dim_multiplier: Option<f64>,
    block_multiple_of: Option<i32>,
    num_experts: Option<i32>,
    #[serde(default)]
    num_experts_per_tok: i32,
    #[serde(default)]
    moe_intermediate_size: i32,
    #[serde(default)]
    num_dense_layers: usize,
    #[serde(default)]
    norm_topk_prob: bool,
    #[serde(default)]
    use_expert_bias: bool,
    routed_scaling_factor: Option<f32>,
}

struct Read {
    config: DecoderConfig,
    own: Own,
    moe: Option<MoeSpec>,
}

fn read(config: &Value) -> Result<Read, GraphError> {
    let mut config = DecoderConfig::read_or(config, &json!({ "tie_word_embeddings": true, "rope_theta": 1e6 }))?;
    let own: Own = config.own()?;
    if let (None, Some(full)) = (&config.layer_types, &own.full_attn_idxs) {
        let layer = |index| if full.contains(&index) { "full_attention" } else { "conv" };
        config.layer_types = Some((0..config.num_hidden_layers).map(|index| layer(index).to_owned()).collect());
    }
    for index in 0..config.num_hidden_layers {
        is_conv(&config, index)?;
    }
    // Where there are two widths, this is the one that was trained with.
    config.intermediate_size = own.block_ff_dim.unwrap_or(config.intermediate_size);
    config.tie_word_embeddings = own.tie_embedding.unwrap_or(config.tie_word_embeddings);
    if own.block_auto_adjust_ff_dim {
        let shrunk = (2 * i64::from(config.intermediate_size) / 3) as f64;
        let wanted = (own.block_ffn_dim_multiplier.unwrap_or(1.0) * shrunk) as i32;
        let step = own.block_multiple_of.unwrap_or(256).max(1);
        config.intermediate_size = wanted.saturating_add(step - 1) / step * step;
    }
    let moe = match own.num_experts.filter(|experts| *experts > 0) {
        None => None,
        Some(experts) => {
            let router = RouterSpec {
                normalize: own.norm_topk_prob,
                scaling_factor: own.routed_scaling_factor.unwrap_or(1.0),
                ..RouterSpec::new(experts, own.num_experts_per_tok, Score::Sigmoid)?
            };
            let correction_bias = own.use_expert_bias.then_some("expert_bias");
            Some(MoeSpec { correction_bias, ..MoeSpec::new(router, own.moe_intermediate_size) })
        }
    };
    Ok(Read { config, own, moe })
}

fn is_conv(config: &DecoderConfig, index: usize) -> Result<bool, GraphError> {
    config.is_layer(index, "conv", &["conv", "full_attention"])
}

/// `out(C · conv(B · x))`, where `in_proj` gives B, C and x.
#[derive(Debug)]
struct GatedConv {
    in_proj: Linear,
    conv: ShortConv,
    out_proj: Linear,
}

impl GatedConv {
    fn new(weights: &mut Weights, name: &str, hidden: i32, own: &Own) -> Result<Self, GraphError> {
        let bias = own.conv_bias;
        Ok(Self {
            in_proj: Linear::new(weights, &format!("{name}.in_proj"), 3 * hidden, hidden, bias.into())?,
            conv: ShortConv::new(weights, &format!("{name}.conv"), hidden, own.kernel, bias)?,
            out_proj: Linear::new(weights, &format!("{name}.out_proj"), hidden, hidden, bias.into())?,
        })
    }
}

impl Mixer for GatedConv {
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let parts = self.in_proj.forward(x)?.split_equal(3, -1)?;
        let ([b, c, x], [state]) = (&parts[..], cache.states(1)?) else {
            return Err(Exception::custom("a convolution was given a cache of another layout"));
        };
        let mixed = self.conv.forward(&b.multiply(x)?, state, pass)?.as_dtype(c.dtype())?;
        self.out_proj.forward(&c.multiply(mixed)?)
    }

    fn keeps(&self) -> CacheKind {
        CacheKind::State
    }
}

impl GraphFamily for Lfm2 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let Read { config, own, moe } = read(config)?;
        weights.rename(NAMES);
        weights.rename(MIXTRAL_NAMES);
        let qk_norm = QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole);
        let attention = AttentionSpec { qk_norm, ..config.attention() };
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let moe = moe.clone().filter(|_| index >= own.num_dense_layers);
            let mlp = FeedForward::take(weights, &format!("{name}.mlp"), &config, moe)?;
            if is_conv(&config, index)? {
                let conv = GatedConv::new(weights, &format!("{name}.conv"), config.hidden_size, &own)?;
                return Layer::new(weights, name, &config, NormNames::PRE, conv, mlp);
            }
            let attention = Attention::new(weights, &format!("{name}.self_attn"), attention.clone())?;
            Layer::new(weights, name, &config, NormNames::PRE, attention, mlp)
        };
        let frame = Frame { norm: "model.embedding_norm", ..Frame::default() };
        Ok(Box::new(Decoder::new(weights, &config, frame, layer)?))
    }
}
