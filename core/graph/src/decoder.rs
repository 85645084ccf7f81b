//! A decoder-only transformer with pre-norms: the skeleton that most families fill in.

use mlx_rs::{Array, error::Exception};

use crate::{
    attention::{Attention, AttentionSpec},
    cache::LayerCache,
    config::DecoderConfig,
    ffi,
    kernels::layer::{FusedHead, FusedLayer},
    linear::{Bias, Embedding, Linear},
    mlp::SwiGlu,
    model::{CausalModel, GraphError, Rows},
    norm::RmsNorm,
    weights::Weights,
};

/// One pre-norm layer.
#[derive(Debug)]
pub struct Layer {
    input_layernorm: RmsNorm,
    self_attn: Attention,
    post_attention_layernorm: RmsNorm,
    mlp: SwiGlu,
    /// For one token on CUDA, where the kernels support the layer.
    fused: Option<FusedLayer>,
}

impl Layer {
    /// Takes the tensors under `{name}.`.
    pub fn new(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        attention: AttentionSpec,
    ) -> Result<Self, GraphError> {
        let (hidden, eps) = (config.hidden_size, config.rms_norm_eps);
        let input_layernorm = RmsNorm::new(weights, &format!("{name}.input_layernorm"), hidden, eps)?;
        let self_attn = Attention::new(weights, &format!("{name}.self_attn"), attention)?;
        let post_attention_layernorm = RmsNorm::new(weights, &format!("{name}.post_attention_layernorm"), hidden, eps)?;
        let (inner, bias) = (config.intermediate_size, config.mlp_bias.into());
        let mlp = SwiGlu::new(weights, &format!("{name}.mlp"), hidden, inner, bias)?;
        let fused = match weights.placement().fused() {
            true => FusedLayer::new(&input_layernorm, &self_attn, &post_attention_layernorm, &mlp)?,
            false => None,
        };
        Ok(Self { input_layernorm, self_attn, post_attention_layernorm, mlp, fused })
    }

    /// `offset` is the cache's length as an array, given for single tokens.
    fn forward(&self, x: &Array, cache: &mut LayerCache, offset: Option<&Array>) -> Result<Array, Exception> {
        if let (Some(fused), Some(offset)) = (&self.fused, offset) {
            return fused.forward(x, &self.self_attn, cache, offset);
        }
        let x = x.add(self.self_attn.forward(&self.input_layernorm.forward(x)?, cache)?)?;
        x.add(self.mlp.forward(&self.post_attention_layernorm.forward(&x)?)?)
    }
}

/// Embedding, layers, final norm and head.
#[derive(Debug)]
pub struct Decoder {
    embed_tokens: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    /// Absent where the embedding is the head.
    lm_head: Option<Linear>,
    /// Norm and head for one token on CUDA.
    fused_head: Option<FusedHead>,
    vocab_size: i32,
}

impl Decoder {
    /// Takes the tensors under `model.` and the head; `attention` gives the spec of each layer.
    pub fn new(
        weights: &mut Weights,
        config: &DecoderConfig,
        attention: impl Fn(usize) -> AttentionSpec,
    ) -> Result<Self, GraphError> {
        let (hidden, vocab) = (config.hidden_size, config.vocab_size);
        let embed_tokens = Embedding::new(weights, "model.embed_tokens", vocab, hidden)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Layer::new(weights, &format!("model.layers.{index}"), config, attention(index)))
            .collect::<Result<_, _>>()?;
        for index in 0..config.num_hidden_layers {
            weights.drop_tensor(&format!("model.layers.{index}.self_attn.rotary_emb.inv_freq"));
        }
        let norm = RmsNorm::new(weights, "model.norm", hidden, config.rms_norm_eps)?;
        let lm_head = if config.tie_word_embeddings {
            // Some tied checkpoints carry the head all the same.
            for part in ["weight", "scales", "biases"] {
                weights.drop_tensor(&format!("lm_head.{part}"));
            }
            None
        } else {
            Some(Linear::new(weights, "lm_head", vocab, hidden, Bias::No)?)
        };
        let fused_head = match weights.placement().fused() {
            true => FusedHead::new(&norm, lm_head.as_ref(), &embed_tokens)?,
            false => None,
        };
        Ok(Self { embed_tokens, layers, norm, lm_head, fused_head, vocab_size: vocab })
    }
}

impl DecoderConfig {
    /// Attention as config.json describes it, with no norm on q and k, and bias where `attention_bias` says.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            hidden: self.hidden_size,
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            head_dim: self.head_dim(),
            qkv_bias: self.attention_bias.into(),
            o_bias: self.attention_bias.into(),
            qk_norm_eps: None,
            rope: self.rope.clone(),
            window: None,
        }
    }
}

impl CausalModel for Decoder {
    fn forward(&self, tokens: &Array, cache: &mut [LayerCache], rows: Rows) -> Result<Array, Exception> {
        let mut x = self.embed_tokens.forward(tokens)?;
        let single = x.dim(0) * x.dim(1) == 1;
        let offset = match cache.first() {
            Some(first) if single && self.layers.iter().any(|layer| layer.fused.is_some()) => {
                Some(Array::from_slice(&[first.len()], &[1]))
            }
            _ => None,
        };
        for (layer, cache) in self.layers.iter().zip(cache) {
            x = layer.forward(&x, cache, offset.as_ref())?;
        }
        if let (Some(head), true) = (&self.fused_head, single) {
            return head.forward(&x);
        }
        if rows == Rows::Last && x.dim(1) > 1 {
            x = ffi::slice(&x, [0, x.dim(1) - 1, 0], [x.dim(0), x.dim(1), x.dim(2)])?;
        }
        let x = self.norm.forward(&x)?;
        match &self.lm_head {
            Some(head) => head.forward(&x),
            None => self.embed_tokens.as_head(&x),
        }
    }

    fn new_cache(&self) -> Vec<LayerCache> {
        self.layers.iter().map(|_| LayerCache::default()).collect()
    }

    fn vocab_size(&self) -> u32 {
        self.vocab_size as u32
    }
}
