//! Grouped-query attention with rotary positions over a cache.

use mlx_rs::{
    Array,
    error::Exception,
    fast::{self, ScaledDotProductAttentionMask as Mask},
    ops,
};

use crate::{
    cache::LayerCache,
    ffi,
    linear::{Bias, Linear},
    model::GraphError,
    norm::RmsNorm,
    rope::{Rope, RopeSpec},
    weights::Weights,
};

/// What an attention layer looks like.
#[derive(Clone, Debug)]
pub struct AttentionSpec {
    /// Width of the residual stream.
    pub hidden: i32,
    /// Query heads.
    pub heads: i32,
    /// Key/value heads.
    pub kv_heads: i32,
    /// Size of a head.
    pub head_dim: i32,
    /// Bias on q, k and v.
    pub qkv_bias: Bias,
    /// Bias on the output.
    pub o_bias: Bias,
    /// RMS norm over each head of q and k before rotation, with this eps.
    pub qk_norm_eps: Option<f32>,
    /// Rotary positions.
    pub rope: RopeSpec,
    /// Positions a query sees, itself included, where limited.
    pub window: Option<i32>,
}

/// An attention layer.
#[derive(Debug)]
pub struct Attention {
    spec: AttentionSpec,
    scale: f32,
    q_proj: Linear,
    k_proj: Linear,
    v_proj: Linear,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    k_norm: Option<RmsNorm>,
    rope: Rope,
}

impl Attention {
    /// Takes `{name}.q_proj`, `k_proj`, `v_proj`, `o_proj` and the norms the spec asks for.
    pub fn new(weights: &mut Weights, name: &str, spec: AttentionSpec) -> Result<Self, GraphError> {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let mut linear =
            |part: &str, out, inner, bias| Linear::new(weights, &format!("{name}.{part}"), out, inner, bias);
        let q_proj = linear("q_proj", q, spec.hidden, spec.qkv_bias)?;
        let k_proj = linear("k_proj", kv, spec.hidden, spec.qkv_bias)?;
        let v_proj = linear("v_proj", kv, spec.hidden, spec.qkv_bias)?;
        let o_proj = linear("o_proj", spec.hidden, q, spec.o_bias)?;
        let mut norm = |part: &str| {
            spec.qk_norm_eps.map(|eps| RmsNorm::new(weights, &format!("{name}.{part}"), spec.head_dim, eps)).transpose()
        };
        Ok(Self {
            scale: 1.0 / (spec.head_dim as f32).sqrt(),
            q_proj,
            k_proj,
            v_proj,
            o_proj,
            q_norm: norm("q_norm")?,
            k_norm: norm("k_norm")?,
            rope: Rope::new(&spec.rope),
            spec,
        })
    }

    pub(crate) fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    pub(crate) fn scale(&self) -> f32 {
        self.scale
    }

    pub(crate) fn rope(&self) -> &Rope {
        &self.rope
    }

    pub(crate) fn norms(&self) -> Option<(&RmsNorm, &RmsNorm)> {
        self.q_norm.as_ref().zip(self.k_norm.as_ref())
    }

    /// q, k, v and o.
    pub(crate) fn projections(&self) -> [&Linear; 4] {
        [&self.q_proj, &self.k_proj, &self.v_proj, &self.o_proj]
    }

    /// `[batch, time, hidden]` to the same, continuing what `cache` holds.
    pub fn forward(&self, x: &Array, cache: &mut LayerCache) -> Result<Array, Exception> {
        let (batch, time) = (x.dim(0), x.dim(1));
        let offset = cache.len();
        let heads = |x: Array, heads: i32, norm: Option<&RmsNorm>| {
            let head_dim = self.spec.head_dim;
            // With one position, moving the head axis is a change of shape alone.
            let x = match time {
                1 => x.reshape(&[batch, heads, 1, head_dim])?,
                _ => x.reshape(&[batch, time, heads, head_dim])?,
            };
            let x = norm.map_or(Ok(x.clone()), |norm| norm.forward(&x))?;
            if time == 1 { Ok(x) } else { x.transpose_axes(&[0, 2, 1, 3]) }
        };
        let q = heads(self.q_proj.forward(x)?, self.spec.heads, self.q_norm.as_ref())?;
        let k = heads(self.k_proj.forward(x)?, self.spec.kv_heads, self.k_norm.as_ref())?;
        let v = heads(self.v_proj.forward(x)?, self.spec.kv_heads, None)?;
        let q = self.rope.forward(&q, offset)?;
        let k = self.rope.forward(&k, offset)?;
        let (k, v) = cache.update(&k, &v)?;
        let out = attend(&q, &k, &v, self.scale, self.spec.window)?;
        let out = if time == 1 { out } else { out.transpose_axes(&[0, 2, 1, 3])? };
        self.o_proj.forward(&out.reshape(&[batch, time, self.spec.heads * self.spec.head_dim])?)
    }
}

/// Causal attention of `q` (`[batch, heads, time, head_dim]`) over `k` and `v` (`[batch, kv_heads, length, head_dim]`),
/// whose last `time` positions are the queries' own; each sees `window` positions at most.
pub fn attend(q: &Array, k: &Array, v: &Array, scale: f32, window: Option<i32>) -> Result<Array, Exception> {
    let (time, length) = (q.dim(2), k.dim(2));
    match window.filter(|window| *window < length) {
        None if time == 1 => fast::scaled_dot_product_attention(q, k, v, scale, None, None),
        None => fast::scaled_dot_product_attention(q, k, v, scale, Mask::Causal, None),
        Some(window) if time == 1 => {
            let last = |x: &Array| ffi::slice(x, [0, 0, length - window, 0], [x.dim(0), x.dim(1), length, x.dim(3)]);
            fast::scaled_dot_product_attention(q, last(k)?, last(v)?, scale, None, None)
        }
        Some(window) => {
            let mask = window_mask(time, length, window)?;
            fast::scaled_dot_product_attention(q, k, v, scale, &mask, None)
        }
    }
}

/// `[time, length]`, true where a query may look: at itself and the `window - 1` positions before.
fn window_mask(time: i32, length: i32, window: i32) -> Result<Array, Exception> {
    let rows = ops::arange::<_, i32>(length - time, length, None)?.reshape(&[time, 1])?;
    let columns = ops::arange::<_, i32>(0, length, None)?.reshape(&[1, length])?;
    let causal = columns.le(&rows)?;
    let near = columns.gt(rows.subtract(Array::from_int(window))?)?;
    causal.logical_and(near)
}
