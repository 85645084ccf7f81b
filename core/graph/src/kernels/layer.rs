//! A whole pre-norm layer for one token a row, on CUDA.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::Attention,
    cache::LayerCache,
    kernels::{
        attend::RowsAttention,
        heads::Heads,
        matmul::{self, Matmul},
        matvec::{Epilogue, Matvec, supports},
        norm::RowsNorm,
        rows::takes,
    },
    linear::{Embedding, Linear},
    mlp::Mlp,
    norm::RmsNorm,
    pass::Pass,
};

/// A layer's decode step: in six launches and attention for one row, in nine for several.
#[derive(Debug)]
pub struct FusedLayer {
    dtype: Dtype,
    heads: Heads,
    single: Single,
    /// Where matrices and heads are such that several rows at once are supported too.
    rows: Option<Several>,
}

#[derive(Debug)]
struct Single {
    qkv: Matvec,
    o_proj: Matvec,
    gate_up: Matvec,
    down_proj: Matvec,
}

/// What is multiplied is in fragment order, and so norms and products come apart.
#[derive(Debug)]
struct Several {
    input_layernorm: RowsNorm,
    qkv: Matmul,
    attention: RowsAttention,
    o_proj: Matmul,
    post_attention_layernorm: RowsNorm,
    gate_up: Matmul,
    down_proj: Matmul,
}

impl FusedLayer {
    /// From the parts of a layer; `None` if any of them is not one that the kernels compute.
    pub fn new(
        input_layernorm: &RmsNorm,
        attention: &Attention,
        post_attention_layernorm: &RmsNorm,
        mlp: &Mlp,
    ) -> Result<Option<Self>, Exception> {
        let dtype = input_layernorm.weight().dtype();
        let (Some([q, k, v, o]), Some([gate, up, down]), Some(rope)) =
            (attention.plain_projections(), mlp.swiglu_projections(), attention.rope())
        else {
            return Ok(None);
        };
        let heads = Heads::new(attention.spec(), attention.norms(), rope, dtype)?;
        let qkv = Matvec::new(&[q, k, v], Some(input_layernorm), Epilogue::Plain, dtype)?;
        let o_proj = Matvec::new(&[o], None, Epilogue::Residual, dtype)?;
        let gate_up = Matvec::new(&[gate, up], Some(post_attention_layernorm), Epilogue::SwiGlu, dtype)?;
        let down_proj = Matvec::new(&[down], None, Epilogue::Residual, dtype)?;
        let (Some(heads), Some(qkv), Some(o_proj), Some(gate_up), Some(down_proj)) =
            (heads, qkv, o_proj, gate_up, down_proj)
        else {
            return Ok(None);
        };
        let single = Single { qkv, o_proj, gate_up, down_proj };
        let group_size = q.packed().map_or(0, |packed| packed.group_size);
        let qkv = Matmul::new(&[q, k, v], Epilogue::Plain, group_size, dtype)?;
        let o_proj = Matmul::new(&[o], Epilogue::Residual, group_size, dtype)?;
        let gate_up = Matmul::new(&[gate, up], Epilogue::SwiGlu, group_size, dtype)?;
        let down_proj = Matmul::new(&[down], Epilogue::Residual, group_size, dtype)?;
        let attend = RowsAttention::new(attention.spec(), group_size, dtype)?;
        let rows = match (qkv, attend, o_proj, gate_up, down_proj) {
            (Some(qkv), Some(attention), Some(o_proj), Some(gate_up), Some(down_proj)) => Some(Several {
                input_layernorm: RowsNorm::new(input_layernorm, group_size)?,
                qkv,
                attention,
                o_proj,
                post_attention_layernorm: RowsNorm::new(post_attention_layernorm, group_size)?,
                gate_up,
                down_proj,
            }),
            _ => None,
        };
        Ok(Some(Self { dtype, heads, single, rows }))
    }

    /// Whether the kernels compute a pass over a stream of `dtype`.
    pub fn takes(&self, pass: &Pass, dtype: Dtype) -> bool {
        dtype == self.dtype && (pass.is_single() || (self.rows.is_some() && takes(pass)))
    }

    /// `x` is `[batch, 1, hidden]`, of a pass that the kernels take.
    pub fn forward(
        &self,
        x: &Array,
        attention: &Attention,
        cache: &mut LayerCache,
        pass: &Pass,
    ) -> Result<Array, Exception> {
        match &self.rows {
            Some(rows) if !pass.is_single() => rows.forward(x, &self.heads, cache, pass),
            _ => self.single.forward(x, &self.heads, attention, cache, pass),
        }
    }
}

impl Single {
    fn forward(
        &self,
        x: &Array,
        heads: &Heads,
        attention: &Attention,
        cache: &mut LayerCache,
        pass: &Pass,
    ) -> Result<Array, Exception> {
        let [q, k, v] = heads.forward(&self.qkv.forward(x, None)?, &pass.row_positions())?;
        let [k, v] = cache.positions()?.update([&k, &v])?;
        let spec = attention.spec();
        let out = attention.attend(&q, &k, &v, pass)?;
        let out = out.reshape(&[1, 1, spec.heads * spec.head_dim])?;
        let x = self.o_proj.forward(&out, Some(x))?;
        self.down_proj.forward(&self.gate_up.forward(&x, None)?, Some(&x))
    }
}

impl Several {
    fn forward(&self, x: &Array, heads: &Heads, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        let positions = pass.row_positions();
        let qkv = self.qkv.forward(&self.input_layernorm.forward(x)?, x)?;
        let [q, k, v] = heads.forward(&qkv, &positions)?;
        let [k, v] = cache.positions()?.update([&k, &v])?;
        let x = self.o_proj.forward(&self.attention.forward(&q, &k, &v, &positions)?, x)?;
        let fed = self.gate_up.forward(&self.post_attention_layernorm.forward(&x)?, &x)?;
        self.down_proj.forward(&fed, &x)
    }
}

/// The final norm and the head: in one launch for one row, in two for several.
#[derive(Debug)]
pub struct FusedHead {
    dtype: Dtype,
    single: Matvec,
    rows: Option<(RowsNorm, Matmul)>,
}

impl FusedHead {
    /// From the norm and the head (or the embedding, where they are tied); `None` if the kernel does not compute them.
    pub fn new(norm: &RmsNorm, head: Option<&Linear>, embedding: &Embedding) -> Result<Option<Self>, Exception> {
        let dtype = norm.weight().dtype();
        let packed = match head {
            Some(head) => head.packed().filter(|_| head.bias().is_none()),
            None => embedding.packed(),
        };
        let Some(packed) = packed.filter(|packed| supports(packed, dtype)) else { return Ok(None) };
        let single = Matvec::packed(&[packed], &[], Some(norm), Epilogue::Plain, dtype)?;
        let rows = match matmul::supports(packed, packed.group_size) {
            true => {
                let norm = RowsNorm::new(norm, packed.group_size)?;
                Some((norm, Matmul::packed(&[packed], &[], Epilogue::Plain, dtype)?))
            }
            false => None,
        };
        Ok(Some(Self { dtype, single, rows }))
    }

    /// Whether the kernels compute a pass.
    pub fn takes(&self, pass: &Pass) -> bool {
        pass.is_single() || (self.rows.is_some() && takes(pass))
    }

    /// `[batch, 1, hidden]`, of a pass that the kernels take, to logits, `[batch, 1, vocab]`.
    pub fn forward(&self, x: &Array, pass: &Pass) -> Result<Array, Exception> {
        let x = &x.as_dtype(self.dtype)?;
        match &self.rows {
            Some((norm, head)) if !pass.is_single() => head.forward(&norm.forward(x)?, x),
            _ => self.single.forward(x, None),
        }
    }
}
