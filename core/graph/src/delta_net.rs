//! Gated DeltaNet, the linear attention of Qwen3-Next and Qwen 3.5.

use mlx_rs::{Array, Dtype, error::Exception, ops};
use serde::Deserialize;
use serde_json::Value;

use crate::{
    attention::{Attention, AttentionSpec, QkNorm, last_axis},
    cache::LayerCache,
    config::DecoderConfig,
    conv::ShortConv,
    decoder::{Decoder, FeedForward, Frame, Layer, NormNames},
    delta::{Steps, delta_rule, l2_normed},
    elementwise::{scale, silu, softplus},
    linear::{Bias, Linear},
    model::GraphError,
    norm::{NormWeight, RmsNorm},
    pass::Pass,
    weights::Weights,
};

/// Its sizes, under the checkpoints' names.
#[derive(Clone, Debug, Deserialize)]
pub struct DeltaNetConfig {
    /// Heads of queries and keys.
    pub linear_num_key_heads: i32,
    /// Heads of values; a multiple of the key heads.
    pub linear_num_value_heads: i32,
    /// Size of a key head.
    pub linear_key_head_dim: i32,
    /// Size of a value head.
    pub linear_value_head_dim: i32,
    /// Positions that the convolution sees.
    pub linear_conv_kernel_dim: i32,
}

impl DeltaNetConfig {
    /// Names a size that cannot be computed with.
    pub fn check(&self) -> Result<(), GraphError> {
        let sizes = [
            ("linear_num_key_heads", self.linear_num_key_heads),
            ("linear_num_value_heads", self.linear_num_value_heads),
            ("linear_key_head_dim", self.linear_key_head_dim),
            ("linear_value_head_dim", self.linear_value_head_dim),
        ];
        if let Some((name, value)) = sizes.into_iter().find(|(_, value)| *value <= 0) {
            return Err(GraphError::Config(format!("`{name}` is {value}")));
        }
        if self.linear_num_value_heads % self.linear_num_key_heads != 0 {
            return Err(GraphError::Config(format!(
                "`linear_num_value_heads` {} is no multiple of `linear_num_key_heads` {}",
                self.linear_num_value_heads, self.linear_num_key_heads
            )));
        }
        Ok(())
    }

    /// Width of all keys, and of all queries.
    pub fn key_dim(&self) -> i32 {
        self.linear_num_key_heads * self.linear_key_head_dim
    }

    /// Width of all values.
    pub fn value_dim(&self) -> i32 {
        self.linear_num_value_heads * self.linear_value_head_dim
    }
}

/// One such layer. Its states: the convolution's inputs, then the delta rule's matrix.
#[derive(Debug)]
pub struct GatedDeltaNet {
    config: DeltaNetConfig,
    in_proj_qkv: Linear,
    in_proj_z: Linear,
    in_proj_b: Linear,
    in_proj_a: Linear,
    conv1d: ShortConv,
    /// `−e^A_log`, f32.
    rate: Array,
    dt_bias: Array,
    norm: RmsNorm,
    out_proj: Linear,
}

impl GatedDeltaNet {
    /// Takes the tensors under `{name}.`.
    pub fn new(
        weights: &mut Weights,
        name: &str,
        hidden: i32,
        eps: f32,
        config: DeltaNetConfig,
    ) -> Result<Self, GraphError> {
        let (keys, values, heads) = (config.key_dim(), config.value_dim(), config.linear_num_value_heads);
        let of = |part: &str| format!("{name}.{part}");
        let mut linear = |part: &str, out, inner| Linear::new(weights, &of(part), out, inner, Bias::No);
        let in_proj_qkv = linear("in_proj_qkv", 2 * keys + values, hidden)?;
        let in_proj_z = linear("in_proj_z", values, hidden)?;
        // What decays and rates are made of adds up over all steps: in f32, where it is not packed.
        let in_proj_b = linear("in_proj_b", heads, hidden)?.in_f32()?;
        let in_proj_a = linear("in_proj_a", heads, hidden)?.in_f32()?;
        let out_proj = linear("out_proj", hidden, values)?;
        let kernel = config.linear_conv_kernel_dim;
        let conv1d = ShortConv::new(weights, &of("conv1d"), 2 * keys + values, kernel, false)?;
        let rate = weights.take_f32(&of("A_log"), &[heads])?.exp()?.negative()?;
        let dt_bias = weights.take_f32(&of("dt_bias"), &[heads])?;
        let norm = RmsNorm::new(weights, &of("norm"), config.linear_value_head_dim, eps)?;
        Ok(Self { config, in_proj_qkv, in_proj_z, in_proj_b, in_proj_a, conv1d, rate, dt_bias, norm, out_proj })
    }

    /// `[batch, time, hidden]` to the same, continuing what `cache` holds.
    pub fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let config = &self.config;
        let (batch, time) = (pass.batch(), pass.time());
        let (keys, values) = (config.key_dim(), config.value_dim());
        let (key_heads, value_heads) = (config.linear_num_key_heads, config.linear_num_value_heads);
        let [conv_state, state] = cache.states(2)? else {
            return Err(Exception::custom("a recurrent layer was given a cache of another layout"));
        };
        let mixed = silu(&self.conv1d.forward(&self.in_proj_qkv.forward(x)?, conv_state, pass)?)?;
        // Each key head serves a run of value heads.
        let heads = |from: i32| -> Result<Array, Exception> {
            let part = last_axis(&mixed, from, from + keys)?;
            let part = l2_normed(&part.reshape(&[batch, time, key_heads, config.linear_key_head_dim])?)?;
            match value_heads / key_heads {
                1 => Ok(part),
                run => ops::repeat_axis::<f32>(part, run, 2),
            }
        };
        let split = |x: &Array| x.reshape(&[batch, time, value_heads, config.linear_value_head_dim]);
        let per_head = |x: Array| x.reshape(&[batch, time, value_heads, 1]);
        let a = self.in_proj_a.forward(x)?.as_dtype(Dtype::Float32)?.add(&self.dt_bias)?;
        let steps = Steps {
            q: scale(&heads(0)?, 1.0 / (config.linear_key_head_dim as f32).sqrt())?,
            k: heads(keys)?,
            v: split(&last_axis(&mixed, 2 * keys, 2 * keys + values)?)?,
            log_decay: per_head(softplus(&a)?.multiply(&self.rate)?)?,
            beta: per_head(ops::sigmoid(self.in_proj_b.forward(x)?.as_dtype(Dtype::Float32)?)?)?,
        };
        let out = delta_rule(&steps, state)?.as_dtype(x.dtype())?;
        let gate = silu(&split(&self.in_proj_z.forward(x)?)?.as_dtype(Dtype::Float32)?)?;
        let out = self.norm.forward(&out)?.multiply(gate)?.as_dtype(x.dtype())?;
        self.out_proj.forward(&out.reshape(&[batch, time, values])?)
    }
}

/// A decoder of such layers, with gated attention in between: what Qwen3-Next and Qwen 3.5 share.
#[derive(Clone, Debug)]
pub struct DeltaDecoderConfig {
    /// The settings that all decoders share.
    pub decoder: DecoderConfig,
    /// Sizes of the linear attention.
    pub net: DeltaNetConfig,
}

impl DeltaDecoderConfig {
    /// Reads config.json. Where it lists no `layer_types`, every `full_attention_interval`th layer is attention.
    pub fn read(config: &Value) -> Result<Self, GraphError> {
        let mut decoder = DecoderConfig::read(config)?;
        let interval = decoder.settings["full_attention_interval"].as_u64().unwrap_or(4) as usize;
        decoder.default_layer_types(["linear_attention", "full_attention"], interval);
        let this = Self { net: decoder.own()?, decoder };
        this.net.check()?;
        for index in 0..this.decoder.num_hidden_layers {
            this.is_linear(index)?;
        }
        Ok(this)
    }

    /// Whether layer `index` is linear attention.
    pub fn is_linear(&self, index: usize) -> Result<bool, GraphError> {
        self.decoder.is_layer(index, "linear_attention", &["linear_attention", "full_attention"])
    }

    /// Builds the decoder; `mlp` takes what stands at the name it is given, in the layer of that index.
    pub fn decoder(
        &self,
        weights: &mut Weights,
        mlp: impl Fn(&mut Weights, &str, usize) -> Result<FeedForward, GraphError>,
    ) -> Result<Decoder, GraphError> {
        let config = &self.decoder;
        // mlx-lm adds the one that published norms lack, and turns convolutions round, in one go.
        let mut stored = NormWeight::LessOne;
        for index in 0..config.num_hidden_layers {
            let name = format!("model.layers.{index}.linear_attn.conv1d");
            if self.is_linear(index)? && !ShortConv::is_published(weights, &name) {
                stored = NormWeight::Whole;
            }
        }
        let attention = AttentionSpec {
            qk_norm: QkNorm::PerHead(config.rms_norm_eps, stored),
            output_gate: true,
            ..config.attention()
        };
        let norms = NormNames { stored, ..NormNames::PRE };
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let mlp = mlp(weights, &format!("{name}.mlp"), index)?;
            if self.is_linear(index)? {
                let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
                let name_of_net = format!("{name}.linear_attn");
                let net = GatedDeltaNet::new(weights, &name_of_net, hidden, eps, self.net.clone())?;
                return Layer::new(weights, name, config, norms, net, mlp);
            }
            let attention = Attention::new(weights, &format!("{name}.self_attn"), attention.clone())?;
            Layer::new(weights, name, config, norms, attention, mlp)
        };
        Decoder::new(weights, config, Frame { stored, ..Frame::default() }, layer)
    }
}
