//! Grouped-query attention with rotary positions over a cache.

use mlx_rs::{Array, error::Exception, fast, ops};

use crate::{
    cache::LayerCache,
    elementwise::scalar,
    ffi,
    linear::{Bias, Linear},
    model::GraphError,
    norm::{NormWeight, RmsNorm},
    pass::{Attend, Pass},
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
    /// RMS norm on q and k before rotation.
    pub qk_norm: QkNorm,
    /// Where values come from.
    pub values: Values,
    /// Rotary positions; `None` leaves positions to the mask.
    pub rope: Option<RopeSpec>,
    /// Positions a query sees, itself included, where limited.
    pub window: Option<i32>,
    /// Multiplies the scores.
    pub scale: f32,
    /// `cap · tanh(score / cap)`, where capped.
    pub softcap: Option<f32>,
    /// Whether each head has a learned score in `sinks`, which takes weight and gives nothing.
    pub sinks: bool,
    /// Whether `q_proj` gives, for each head, a gate behind the query; its sigmoid multiplies the head's output.
    pub output_gate: bool,
    /// Whether queries grow with their position.
    pub query_growth: Option<QueryGrowth>,
    /// Whether keys and values are those of an earlier layer, and this one has queries alone.
    pub shared: bool,
}

/// RMS norm on queries and keys.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum QkNorm {
    /// None.
    #[default]
    None,
    /// Over each head, with this eps.
    PerHead(f32, NormWeight),
    /// Over the full width, with this eps.
    Full(f32),
}

/// Where values come from.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Values {
    /// `v_proj`.
    #[default]
    Projected,
    /// `v_proj`, and each head divided by its root mean square with this eps.
    Normed(f32),
    /// `k_proj` before its norm and rotation, and each head divided by its root mean square with this eps.
    Keys(f32),
}

/// `1 + beta · ln(1 + ⌊position / original⌋)`, which multiplies queries.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct QueryGrowth {
    /// How fast.
    pub beta: f32,
    /// The context length before scaling, in tokens.
    pub original_max_position_embeddings: f32,
}

/// An attention layer.
#[derive(Debug)]
pub struct Attention {
    spec: AttentionSpec,
    q_proj: Linear,
    keys: Option<Keys>,
    o_proj: Linear,
    q_norm: Option<RmsNorm>,
    sinks: Option<Array>,
    rope: Option<Rope>,
}

#[derive(Debug)]
struct Keys {
    k_proj: Linear,
    v_proj: Option<Linear>,
    k_norm: Option<RmsNorm>,
}

impl Attention {
    /// Takes `{name}.q_proj`, `k_proj`, `v_proj`, `o_proj` and what else the spec asks for.
    pub fn new(weights: &mut Weights, name: &str, spec: AttentionSpec) -> Result<Self, GraphError> {
        let (q, kv) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
        let gated = if spec.output_gate { 2 * q } else { q };
        let mut linear =
            |part: &str, out, inner, bias| Linear::new(weights, &format!("{name}.{part}"), out, inner, bias);
        let q_proj = linear("q_proj", gated, spec.hidden, spec.qkv_bias)?;
        if spec.shared {
            // Some checkpoints carry them all the same.
            let unused = ["k_proj", "v_proj", "k_norm"].map(|part| format!("{name}.{part}."));
            weights.leave_out(&unused.each_ref().map(String::as_str));
        }
        let mut linear =
            |part: &str, out, inner, bias| Linear::new(weights, &format!("{name}.{part}"), out, inner, bias);
        let keys = match spec.shared {
            true => None,
            false => {
                let k_proj = linear("k_proj", kv, spec.hidden, spec.qkv_bias)?;
                let v_proj = match spec.values {
                    Values::Keys(_) => None,
                    _ => Some(linear("v_proj", kv, spec.hidden, spec.qkv_bias)?),
                };
                Some((k_proj, v_proj))
            }
        };
        let o_proj = linear("o_proj", spec.hidden, q, spec.o_bias)?;
        let mut norm = |part: &str, heads: i32| {
            let name = format!("{name}.{part}");
            match spec.qk_norm {
                QkNorm::None => Ok(None),
                QkNorm::PerHead(eps, stored) => RmsNorm::stored(weights, &name, spec.head_dim, eps, stored).map(Some),
                QkNorm::Full(eps) => RmsNorm::new(weights, &name, heads * spec.head_dim, eps).map(Some),
            }
        };
        let q_norm = norm("q_norm", spec.heads)?;
        let keys = match keys {
            Some((k_proj, v_proj)) => Some(Keys { k_proj, v_proj, k_norm: norm("k_norm", spec.kv_heads)? }),
            None => None,
        };
        let sinks = match spec.sinks {
            true => Some(weights.take(&format!("{name}.sinks"), &[spec.heads])?),
            false => None,
        };
        let rope = spec.rope.as_ref().map(Rope::new);
        Ok(Self { spec, q_proj, keys, o_proj, q_norm, sinks, rope })
    }

    /// What the layer looks like.
    pub fn spec(&self) -> &AttentionSpec {
        &self.spec
    }

    pub(crate) fn rope(&self) -> Option<&Rope> {
        self.rope.as_ref()
    }

    pub(crate) fn norms(&self) -> Option<(&RmsNorm, &RmsNorm)> {
        self.q_norm.as_ref().zip(self.keys.as_ref()?.k_norm.as_ref())
    }

    /// q, k, v and o of a layer that has nothing but these, a rotation and norms over heads; for kernels that know no
    /// more.
    pub(crate) fn plain_projections(&self) -> Option<[&Linear; 4]> {
        let spec = &self.spec;
        let plain = spec.softcap.is_none()
            && !spec.sinks
            && !spec.output_gate
            && spec.query_growth.is_none()
            && spec.values == Values::Projected
            && !matches!(spec.qk_norm, QkNorm::Full(_));
        let keys = self.keys.as_ref().filter(|_| plain)?;
        Some([&self.q_proj, &keys.k_proj, keys.v_proj.as_ref()?, &self.o_proj])
    }

    pub(crate) fn attend(&self, q: &Array, k: &Array, v: &Array, pass: &Pass) -> Result<Array, Exception> {
        let AttentionSpec { scale, window, softcap, .. } = self.spec;
        pass.attend(q, k, v, &Attend { scale, window, softcap, sinks: self.sinks.as_ref() })
    }

    /// `[batch, time, hidden]` to the same, continuing what `cache` holds.
    pub fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let keys = self.keys_and_values(x, cache, pass)?;
        self.forward_with(x, &keys, pass)
    }

    /// Appends the keys and values of `x` to `cache`; returns all that its queries may see.
    pub fn keys_and_values(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<[Array; 2], Exception> {
        let Some(keys) = &self.keys else {
            return Err(Exception::custom("a layer that shares keys and values was asked for its own"));
        };
        let heads = self.spec.kv_heads;
        let raw = keys.k_proj.forward(x)?;
        let k = self.rotate(self.heads(self.normed(&raw, keys.k_norm.as_ref(), heads)?, pass)?, pass)?;
        let v = match &keys.v_proj {
            Some(v_proj) => self.split(&v_proj.forward(x)?, heads)?,
            None => self.split(&raw, heads)?,
        };
        let v = match self.spec.values {
            Values::Projected => v,
            Values::Normed(eps) | Values::Keys(eps) => fast::rms_norm(&v, None, eps)?,
        };
        cache.positions()?.update([&k, &self.heads(v, pass)?])
    }

    /// Attention of the queries of `x` over keys and values that hold those of `pass` already.
    pub fn forward_with(&self, x: &Array, [k, v]: &[Array; 2], pass: &Pass) -> Result<Array, Exception> {
        let (batch, time, heads) = (pass.batch(), pass.time(), self.spec.heads);
        let q = self.q_proj.forward(x)?;
        let (q, gate) = match self.spec.output_gate {
            false => (q, None),
            true => {
                let both = q.reshape(&[batch, time, heads, 2 * self.spec.head_dim])?;
                let [q, gate]: [Array; 2] =
                    both.split_equal(2, -1)?.try_into().map_err(|_| Exception::custom("a split in two gave more"))?;
                let flat = [batch, time, heads * self.spec.head_dim];
                (q.reshape(&flat)?, Some(gate.reshape(&flat)?))
            }
        };
        let q = self.rotate(self.heads(self.normed(&q, self.q_norm.as_ref(), heads)?, pass)?, pass)?;
        let q = match &self.spec.query_growth {
            None => q,
            Some(growth) => q.multiply(growth.factor(pass)?.as_dtype(q.dtype())?)?,
        };
        let out = self.attend(&q, k, v, pass)?;
        let out = if time == 1 { out } else { out.transpose_axes(&[0, 2, 1, 3])? };
        let out = out.reshape(&[batch, time, heads * self.spec.head_dim])?;
        match gate {
            Some(gate) => self.o_proj.forward(&out.multiply(ops::sigmoid(gate)?)?),
            None => self.o_proj.forward(&out),
        }
    }

    /// `[batch, time, heads · head_dim]` to `[batch, time, heads, head_dim]`.
    fn split(&self, x: &Array, heads: i32) -> Result<Array, Exception> {
        x.reshape(&[x.dim(0), x.dim(1), heads, self.spec.head_dim])
    }

    fn normed(&self, x: &Array, norm: Option<&RmsNorm>, heads: i32) -> Result<Array, Exception> {
        match (norm, self.spec.qk_norm) {
            (Some(norm), QkNorm::Full(_)) => self.split(&norm.forward(x)?, heads),
            (Some(norm), _) => norm.forward(&self.split(x, heads)?),
            (None, _) => self.split(x, heads),
        }
    }

    /// `[batch, time, heads, head_dim]` to `[batch, heads, time, head_dim]`.
    fn heads(&self, x: Array, pass: &Pass) -> Result<Array, Exception> {
        match pass.time() {
            // With one position, moving the head axis is a change of shape alone.
            1 => x.reshape(&[x.dim(0), x.dim(2), 1, x.dim(3)]),
            _ => x.transpose_axes(&[0, 2, 1, 3]),
        }
    }

    fn rotate(&self, x: Array, pass: &Pass) -> Result<Array, Exception> {
        self.rope.as_ref().map_or(Ok(x.clone()), |rope| rope.forward(&x, pass))
    }
}

impl QueryGrowth {
    fn factor(&self, pass: &Pass) -> Result<Array, Exception> {
        // Padding stands before the first position.
        let positions = ops::maximum(pass.positions()?, Array::from_f32(0.0))?;
        let periods = positions.divide(Array::from_f32(self.original_max_position_embeddings))?;
        let growth = ops::log1p(ops::floor(periods)?)?.multiply(scalar(self.beta, mlx_rs::Dtype::Float32)?)?;
        growth.add(Array::from_f32(1.0))
    }
}

/// The last axis of `x` from `start` to `stop`.
pub fn last_axis(x: &Array, start: i32, stop: i32) -> Result<Array, Exception> {
    match x.shape() {
        [a, b, _] => ffi::slice(x, [0, 0, start], [*a, *b, stop]),
        [a, b, c, _] => ffi::slice(x, [0, 0, 0, start], [*a, *b, *c, stop]),
        shape => Err(Exception::custom(format!("an array of shape {shape:?} was to be cut along its last axis"))),
    }
}
