//! Multi-head latent attention: the cache holds, for each position, one latent that all heads' keys and values are made
//! of, and one rotated key that all heads share.

use mlx_rs::{Array, error::Exception, ops};
use serde::Deserialize;

use crate::{
    attention::last_axis,
    cache::LayerCache,
    config::DecoderConfig,
    ffi,
    linear::{Bias, Linear},
    model::GraphError,
    norm::RmsNorm,
    pass::{Attend, Pass},
    rope::{Rope, RopeSpec},
    weights::{Matrix, Weights},
};

/// What a latent attention layer looks like, under the checkpoints' names.
#[derive(Clone, Debug)]
pub struct LatentSpec {
    /// Width of the residual stream.
    pub hidden: i32,
    /// Heads.
    pub heads: i32,
    /// Width of the queries' latent; without one, `q_proj` gives queries at once.
    pub q_lora_rank: Option<i32>,
    /// Width of the latent of keys and values.
    pub kv_lora_rank: i32,
    /// The part of a head that is not rotated.
    pub qk_nope_head_dim: i32,
    /// The part of a head that is.
    pub qk_rope_head_dim: i32,
    /// Size of a value head.
    pub v_head_dim: i32,
    /// Bias on the first projections and the output.
    pub bias: Bias,
    /// Of the norms on latents.
    pub latent_eps: f32,
    /// Rotation of `qk_rope_head_dim`; `None` leaves positions to the mask.
    pub rope: Option<RopeSpec>,
    /// Multiplies the scores.
    pub scale: f32,
}

/// The sizes as configs have them.
#[derive(Deserialize)]
struct LatentConfig {
    q_lora_rank: Option<i32>,
    kv_lora_rank: i32,
    qk_nope_head_dim: i32,
    qk_rope_head_dim: i32,
    v_head_dim: i32,
    rope_interleave: Option<bool>,
}

impl LatentSpec {
    /// As config.json describes it, with DeepSeek's rotation of neighbours and, where YaRN has `mscale_all_dim`, its
    /// square on the scale.
    pub fn read(config: &DecoderConfig) -> Result<Self, GraphError> {
        let own: LatentConfig = config.own()?;
        let sizes = [
            ("q_lora_rank", own.q_lora_rank.unwrap_or(1)),
            ("kv_lora_rank", own.kv_lora_rank),
            ("qk_nope_head_dim", own.qk_nope_head_dim),
            ("qk_rope_head_dim", own.qk_rope_head_dim),
            ("v_head_dim", own.v_head_dim),
        ];
        if let Some((name, value)) = sizes.into_iter().find(|(_, value)| *value <= 0) {
            return Err(GraphError::Config(format!("`{name}` is {value}")));
        }
        let traditional = own.rope_interleave.unwrap_or(true);
        let rope = RopeSpec { traditional, ..RopeSpec::read(&config.settings, own.qk_rope_head_dim)? };
        let head = own.qk_nope_head_dim + own.qk_rope_head_dim;
        Ok(Self {
            hidden: config.hidden_size,
            heads: config.num_attention_heads,
            q_lora_rank: own.q_lora_rank,
            kv_lora_rank: own.kv_lora_rank,
            qk_nope_head_dim: own.qk_nope_head_dim,
            qk_rope_head_dim: own.qk_rope_head_dim,
            v_head_dim: own.v_head_dim,
            bias: config.attention_bias.into(),
            // The published implementations do not take `rms_norm_eps` here.
            latent_eps: 1e-6,
            scale: rope.scale_factor() / (head as f32).sqrt(),
            rope: Some(rope),
        })
    }
}

/// A latent attention layer.
#[derive(Debug)]
pub struct LatentAttention {
    spec: LatentSpec,
    queries: Queries,
    kv_a_proj_with_mqa: Linear,
    kv_a_layernorm: RmsNorm,
    /// `[heads, latent, nope]`: from a query to the latent, or from the latent to keys.
    embed_q: HeadLinear,
    /// `[heads, v, latent]`: from the latent to values.
    unembed_out: HeadLinear,
    o_proj: Linear,
    rope: Option<Rope>,
}

#[derive(Debug)]
enum Queries {
    Direct(Linear),
    Latent { q_a_proj: Linear, q_a_layernorm: RmsNorm, q_b_proj: Linear },
}

impl LatentAttention {
    /// Takes the tensors under `{name}.`; `kv_b_proj` may be whole or, as mlx-lm stores it, split for each head into
    /// `embed_q` and `unembed_out`.
    pub fn new(weights: &mut Weights, name: &str, spec: LatentSpec) -> Result<Self, GraphError> {
        let LatentSpec { hidden, heads, kv_lora_rank: latent, bias, .. } = spec;
        let (nope, rope, v) = (spec.qk_nope_head_dim, spec.qk_rope_head_dim, spec.v_head_dim);
        let of = |part: &str| format!("{name}.{part}");
        let queries = match spec.q_lora_rank {
            None => Queries::Direct(Linear::new(weights, &of("q_proj"), heads * (nope + rope), hidden, Bias::No)?),
            Some(rank) => Queries::Latent {
                q_a_proj: Linear::new(weights, &of("q_a_proj"), rank, hidden, bias)?,
                q_a_layernorm: RmsNorm::new(weights, &of("q_a_layernorm"), rank, spec.latent_eps)?,
                q_b_proj: Linear::new(weights, &of("q_b_proj"), heads * (nope + rope), rank, Bias::No)?,
            },
        };
        let kv_a_proj_with_mqa = Linear::new(weights, &of("kv_a_proj_with_mqa"), latent + rope, hidden, bias)?;
        let kv_a_layernorm = RmsNorm::new(weights, &of("kv_a_layernorm"), latent, spec.latent_eps)?;
        let (embed_q, unembed_out) = if weights.has(&of("embed_q.weight")) {
            let embed_q = weights.take_stack(&of("embed_q"), heads, latent, nope)?;
            (embed_q, weights.take_stack(&of("unembed_out"), heads, v, latent)?)
        } else {
            let whole = match weights.take_matrix(&of("kv_b_proj"), heads * (nope + v), latent)? {
                Matrix::Plain(whole) => whole,
                Matrix::Packed(packed) => weights.dequantized(&packed)?,
            };
            let whole = whole.reshape(&[heads, nope + v, latent])?;
            let keys = ffi::slice(&whole, [0, 0, 0], [heads, nope, latent])?.swap_axes(-1, -2)?;
            (Matrix::Plain(keys), Matrix::Plain(ffi::slice(&whole, [0, nope, 0], [heads, nope + v, latent])?))
        };
        let o_proj = Linear::new(weights, &of("o_proj"), hidden, heads * v, bias)?;
        let ropes = spec.rope.as_ref().map(Rope::new);
        Ok(Self {
            queries,
            kv_a_proj_with_mqa,
            kv_a_layernorm,
            embed_q: HeadLinear(embed_q),
            unembed_out: HeadLinear(unembed_out),
            o_proj,
            rope: ropes,
            spec,
        })
    }

    /// `[batch, time, hidden]` to the same, continuing what `cache` holds.
    pub fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let (batch, time) = (pass.batch(), pass.time());
        let LatentSpec { heads, kv_lora_rank: latent, .. } = self.spec;
        let (nope, rope) = (self.spec.qk_nope_head_dim, self.spec.qk_rope_head_dim);
        let q = match &self.queries {
            Queries::Direct(q_proj) => q_proj.forward(x)?,
            Queries::Latent { q_a_proj, q_a_layernorm, q_b_proj } => {
                q_b_proj.forward(&q_a_layernorm.forward(&q_a_proj.forward(x)?)?)?
            }
        };
        let q = q.reshape(&[batch, time, heads, nope + rope])?.transpose_axes(&[0, 2, 1, 3])?;
        let (q_nope, q_rope) = (last_axis(&q, 0, nope)?, self.rotate(&last_axis(&q, nope, nope + rope)?, pass)?);
        let compressed = self.kv_a_proj_with_mqa.forward(x)?.expand_dims(1)?;
        let new_latent = self.kv_a_layernorm.forward(&last_axis(&compressed, 0, latent)?)?;
        let new_key = self.rotate(&last_axis(&compressed, latent, latent + rope)?, pass)?;
        let new = ops::concatenate(&[new_latent, new_key], -1)?;
        let [held] = cache.positions()?.update([&new])?;
        let length = held.dim(2);
        let kv_latent = last_axis(&held, 0, latent)?;
        let how = Attend { scale: self.spec.scale, window: None, softcap: None, sinks: None };
        let out = if time == 1 {
            // Queries go to the latent, rather than all latents to keys: all heads then read the cache as it is.
            let q = ops::concatenate(&[self.embed_q.forward(&q_nope)?, q_rope], -1)?;
            self.unembed_out.forward(&pass.attend(&q, &held, &kv_latent, &how)?)?
        } else {
            let k_rope = last_axis(&held, latent, latent + rope)?;
            let k_rope = ops::broadcast_to(&k_rope, &[batch, heads, length, rope])?;
            let k = ops::concatenate(&[self.embed_q.forward_untransposed(&kv_latent)?, k_rope], -1)?;
            let v = self.unembed_out.forward(&kv_latent)?;
            let q = ops::concatenate(&[q_nope, q_rope], -1)?;
            pass.attend(&q, &k, &v, &how)?
        };
        let out = out.transpose_axes(&[0, 2, 1, 3])?.reshape(&[batch, time, heads * self.spec.v_head_dim])?;
        self.o_proj.forward(&out)
    }

    /// See [`CausalModel::length_limit`](crate::CausalModel::length_limit).
    pub(crate) fn length_limit(&self) -> Option<i32> {
        self.rope.as_ref().and_then(Rope::length_limit)
    }

    fn rotate(&self, x: &Array, pass: &Pass) -> Result<Array, Exception> {
        self.rope.as_ref().map_or(Ok(x.clone()), |rope| rope.forward(x, pass))
    }
}

/// A matrix for each head, `[heads, out, in]`.
#[derive(Debug)]
struct HeadLinear(Matrix);

impl HeadLinear {
    /// `[batch, heads or 1, time, in]` to `[batch, heads, time, out]`.
    fn forward(&self, x: &Array) -> Result<Array, Exception> {
        match &self.0 {
            Matrix::Plain(weight) => ops::matmul(x, weight.swap_axes(-1, -2)?),
            Matrix::Packed(packed) => ffi::quantized_matmul(x, packed),
        }
    }

    /// `[batch, heads or 1, time, out]` to `[batch, heads, time, in]`, by the same matrices.
    fn forward_untransposed(&self, x: &Array) -> Result<Array, Exception> {
        match &self.0 {
            Matrix::Plain(weight) => ops::matmul(x, weight),
            Matrix::Packed(packed) => ffi::quantized_matmul_untransposed(x, packed),
        }
    }
}
