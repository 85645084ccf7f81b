//! A whole pre-norm layer for one token, on CUDA.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::Attention,
    cache::LayerCache,
    kernels::{
        heads::Heads,
        matvec::{Epilogue, Matvec, supports},
    },
    linear::{Embedding, Linear},
    mlp::Mlp,
    norm::RmsNorm,
    pass::Pass,
};

/// A layer's decode step in six launches and attention.
#[derive(Debug)]
pub struct FusedLayer {
    dtype: Dtype,
    qkv: Matvec,
    heads: Heads,
    o_proj: Matvec,
    gate_up: Matvec,
    down_proj: Matvec,
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
        Ok(Some(Self { dtype, qkv, heads, o_proj, gate_up, down_proj }))
    }

    /// The type of the stream that the kernels read and write.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// `x` is `[1, 1, hidden]`.
    pub fn forward(
        &self,
        x: &Array,
        attention: &Attention,
        cache: &mut LayerCache,
        pass: &Pass,
    ) -> Result<Array, Exception> {
        let [q, k, v] = self.heads.forward(&self.qkv.forward(x, None)?, &pass.column())?;
        let [k, v] = cache.positions()?.update([&k, &v])?;
        let spec = attention.spec();
        let out = attention.attend(&q, &k, &v, pass)?;
        let out = out.reshape(&[1, 1, spec.heads * spec.head_dim])?;
        let x = self.o_proj.forward(&out, Some(x))?;
        self.down_proj.forward(&self.gate_up.forward(&x, None)?, Some(&x))
    }
}

/// The final norm and the head, in one launch.
#[derive(Debug)]
pub struct FusedHead(Matvec);

impl FusedHead {
    /// From the norm and the head (or the embedding, where they are tied); `None` if the kernel does not compute them.
    pub fn new(norm: &RmsNorm, head: Option<&Linear>, embedding: &Embedding) -> Result<Option<Self>, Exception> {
        let dtype: Dtype = norm.weight().dtype();
        match head {
            Some(head) => Ok(Matvec::new(&[head], Some(norm), Epilogue::Plain, dtype)?.map(Self)),
            None => match embedding.packed() {
                Some(packed) if supports(packed, dtype) => {
                    Matvec::packed(&[packed], &[], Some(norm), Epilogue::Plain, dtype).map(|head| Some(Self(head)))
                }
                _ => Ok(None),
            },
        }
    }

    /// `[1, 1, hidden]` to logits, `[1, 1, vocab]`.
    pub fn forward(&self, x: &Array) -> Result<Array, Exception> {
        self.0.forward(x, None)
    }
}
