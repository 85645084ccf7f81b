//! A decoder-only transformer: the skeleton that most families fill in.

use mlx_rs::{Array, Dtype, error::Exception, ops};

use crate::{
    attention::{Attention, AttentionSpec, QkNorm, Values},
    cache::{Cache, CacheKind, LayerCache},
    config::DecoderConfig,
    delta_net::GatedDeltaNet,
    elementwise::{scalar, scale, softcap},
    ffi,
    kernels::layer::{FusedHead, FusedLayer},
    linear::{Bias, Embedding, Linear},
    mla::LatentAttention,
    mlp::Mlp,
    model::{CausalModel, GraphError, Rows},
    moe::{Moe, MoeSpec},
    norm::{NormWeight, RmsNorm},
    pass::Pass,
    weights::Weights,
};

/// What mixes positions in a layer.
pub trait Mixer: std::fmt::Debug {
    /// `[batch, time, hidden]` to the same, continuing what `cache` holds.
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception>;

    /// What it keeps.
    fn keeps(&self) -> CacheKind;

    /// See [`CausalModel::length_limit`].
    fn length_limit(&self) -> Option<i32> {
        None
    }

    /// The plain attention that kernels of our own may compute.
    fn as_attention(&self) -> Option<&Attention> {
        None
    }
}

impl Mixer for Attention {
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        Self::forward(self, x, cache, pass)
    }

    fn keeps(&self) -> CacheKind {
        match self.spec() {
            AttentionSpec { shared: true, .. } => CacheKind::Shared,
            AttentionSpec { window: Some(window), .. } => CacheKind::Window(*window),
            _ => CacheKind::Full,
        }
    }

    fn length_limit(&self) -> Option<i32> {
        self.rope().and_then(|rope| rope.length_limit())
    }

    fn as_attention(&self) -> Option<&Attention> {
        Some(self)
    }
}

impl Mixer for LatentAttention {
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        Self::forward(self, x, cache, pass)
    }

    fn keeps(&self) -> CacheKind {
        CacheKind::Full
    }

    fn length_limit(&self) -> Option<i32> {
        Self::length_limit(self)
    }
}

impl Mixer for GatedDeltaNet {
    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        Self::forward(self, x, cache, pass)
    }

    fn keeps(&self) -> CacheKind {
        CacheKind::State
    }
}

/// What each position goes through by itself.
#[derive(Debug)]
pub enum FeedForward {
    /// One MLP.
    Mlp(Mlp),
    /// Several, of which a router chooses.
    Moe(Box<Moe>),
}

impl FeedForward {
    /// Takes what stands at `{name}`: the mixture that is given, or one MLP.
    pub fn take(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        moe: Option<MoeSpec>,
    ) -> Result<Self, GraphError> {
        match moe {
            Some(moe) => Moe::new(weights, name, config, moe).map(Self::from),
            None => Mlp::new(weights, name, config).map(Self::from),
        }
    }

    /// `[batch, time, hidden]`, through `norm` where there is one, to the same. A router sees what the norm gives before
    /// that is rounded.
    fn forward(&self, x: &Array, norm: Option<&RmsNorm>) -> Result<Array, Exception> {
        match (self, norm) {
            (Self::Mlp(mlp), Some(norm)) => mlp.forward(&norm.forward(x)?),
            (Self::Moe(moe), Some(norm)) => {
                let wide = norm.forward_wide(x)?;
                moe.forward_routed(&wide.as_dtype(norm.weight().dtype())?, &wide)
            }
            (Self::Mlp(mlp), None) => mlp.forward(x),
            (Self::Moe(moe), None) => moe.forward(x),
        }
    }
}

impl From<Mlp> for FeedForward {
    fn from(mlp: Mlp) -> Self {
        Self::Mlp(mlp)
    }
}

impl From<Moe> for FeedForward {
    fn from(moe: Moe) -> Self {
        Self::Moe(Box::new(moe))
    }
}

/// Names of a layer's norms; those that are absent are not computed.
#[derive(Clone, Copy, Debug)]
pub struct NormNames {
    /// Before the mixer.
    pub before_mixer: Option<&'static str>,
    /// On what the mixer gives.
    pub after_mixer: Option<&'static str>,
    /// Before the MLP.
    pub before_mlp: Option<&'static str>,
    /// On what the MLP gives.
    pub after_mlp: Option<&'static str>,
    /// What the checkpoint stores.
    pub stored: NormWeight,
}

impl NormNames {
    /// Before the mixer and before the MLP.
    pub const PRE: Self = Self {
        before_mixer: Some("input_layernorm"),
        after_mixer: None,
        before_mlp: Some("post_attention_layernorm"),
        after_mlp: None,
        stored: NormWeight::Whole,
    };

    /// Before and after both, stored less one.
    pub const GEMMA: Self = Self {
        before_mixer: Some("input_layernorm"),
        after_mixer: Some("post_attention_layernorm"),
        before_mlp: Some("pre_feedforward_layernorm"),
        after_mlp: Some("post_feedforward_layernorm"),
        stored: NormWeight::LessOne,
    };
}

/// One layer: a mixer and an MLP, each added to the stream.
#[derive(Debug)]
pub struct Layer {
    before_mixer: Option<RmsNorm>,
    mixer: Box<dyn Mixer>,
    after_mixer: Option<RmsNorm>,
    before_mlp: Option<RmsNorm>,
    mlp: FeedForward,
    after_mlp: Option<RmsNorm>,
    residual_multiplier: f32,
    clipped: bool,
    /// For one token a row on CUDA, where the kernels support the layer.
    fused: Option<FusedLayer>,
}

impl Layer {
    /// Takes the norms under `{name}.`.
    pub fn new(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        norms: NormNames,
        mixer: impl Mixer + 'static,
        mlp: impl Into<FeedForward>,
    ) -> Result<Self, GraphError> {
        let mlp = mlp.into();
        let mut norm = |part: Option<&str>| {
            let stored = |part| {
                let (size, eps) = (config.hidden_size, config.rms_norm_eps);
                RmsNorm::stored(weights, &format!("{name}.{part}"), size, eps, norms.stored)
            };
            part.map(stored).transpose()
        };
        let [before_mixer, after_mixer] = [norm(norms.before_mixer)?, norm(norms.after_mixer)?];
        let [before_mlp, after_mlp] = [norm(norms.before_mlp)?, norm(norms.after_mlp)?];
        let fused = match (&before_mixer, &after_mixer, mixer.as_attention(), &before_mlp, &mlp, &after_mlp) {
            (Some(first), None, Some(attention), Some(second), FeedForward::Mlp(mlp), None)
                if weights.placement().fused() =>
            {
                FusedLayer::new(first, attention, second, mlp)?
            }
            _ => None,
        };
        let mixer = Box::new(mixer);
        let (residual_multiplier, clipped) = (1.0, false);
        Ok(Self { before_mixer, mixer, after_mixer, before_mlp, mlp, after_mlp, residual_multiplier, clipped, fused })
    }

    /// A layer of attention at `{name}.self_attn` and what has been taken at `{name}.mlp`.
    pub fn attending(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        norms: NormNames,
        attention: AttentionSpec,
        mlp: impl Into<FeedForward>,
    ) -> Result<Self, GraphError> {
        let attention = Attention::new(weights, &format!("{name}.self_attn"), attention)?;
        Self::new(weights, name, config, norms, attention, mlp)
    }

    /// A layer of attention and one MLP, as config.json describes them.
    pub fn dense(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        norms: NormNames,
        attention: AttentionSpec,
    ) -> Result<Self, GraphError> {
        let mlp = Mlp::new(weights, &format!("{name}.mlp"), config)?;
        Self::attending(weights, name, config, norms, attention, mlp)
    }

    /// The same with norms before both parts.
    pub fn plain(
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        attention: AttentionSpec,
    ) -> Result<Self, GraphError> {
        Self::dense(weights, name, config, NormNames::PRE, attention)
    }

    /// The same, with what each part adds multiplied.
    pub fn with_residual_multiplier(self, residual_multiplier: f32) -> Self {
        Self { residual_multiplier, fused: self.fused.filter(|_| residual_multiplier == 1.0), ..self }
    }

    /// The same, with the stream held within the range of f16 where it is f16: models trained in bf16 may leave it.
    pub fn with_clipped_stream(self) -> Self {
        Self { clipped: true, ..self }
    }

    fn add(&self, x: &Array, y: &Array) -> Result<Array, Exception> {
        let y = scale(y, self.residual_multiplier)?;
        if self.clipped { add_clipped(x, &y) } else { x.add(y) }
    }

    fn forward(&self, x: &Array, cache: &mut LayerCache, pass: &Pass) -> Result<Array, Exception> {
        if let (Some(fused), Some(attention)) = (&self.fused, self.mixer.as_attention())
            && fused.takes(pass, x.dtype())
        {
            return fused.forward(x, attention, cache, pass);
        }
        let mixed = match &self.before_mixer {
            Some(norm) => self.mixer.forward(&norm.forward(x)?, cache, pass)?,
            None => self.mixer.forward(x, cache, pass)?,
        };
        let x = self.add(x, &normed(&self.after_mixer, &mixed)?)?;
        let fed = self.mlp.forward(&x, self.before_mlp.as_ref())?;
        self.add(&x, &normed(&self.after_mlp, &fed)?)
    }
}

/// What goes back into the stream stays as wide as it is.
fn normed(norm: &Option<RmsNorm>, x: &Array) -> Result<Array, Exception> {
    norm.as_ref().map_or_else(|| Ok(x.clone()), |norm| norm.forward_wide(x))
}

/// `x + y`, in f16 held at the end of the range rather than becoming infinite.
pub fn add_clipped(x: &Array, y: &Array) -> Result<Array, Exception> {
    if x.dtype() != Dtype::Float16 {
        return x.add(y);
    }
    const END: f32 = 65504.0;
    let sum = x.as_dtype(Dtype::Float32)?.add(y.as_dtype(Dtype::Float32)?)?;
    ops::maximum(ops::minimum(sum, Array::from_f32(END))?, Array::from_f32(-END))?.as_dtype(Dtype::Float16)
}

/// What stands around the layers.
#[derive(Clone, Debug)]
pub struct Frame {
    /// Multiplies embeddings.
    pub embedding_multiplier: f32,
    /// Name of the last norm.
    pub norm: &'static str,
    /// What the checkpoint stores for it.
    pub stored: NormWeight,
    /// Divides logits.
    pub logits_scaling: f32,
    /// `cap · tanh(logit / cap)`, where capped.
    pub final_logit_softcapping: Option<f32>,
    /// Whether the residual stream is f32, whatever the weights are. [`Decoder`] makes it so where a layer has experts: a
    /// stream that is rounded twice a layer sends tokens to other experts than the model's own, and each time that moves
    /// its logits by units.
    pub wide_stream: bool,
}

impl Default for Frame {
    fn default() -> Self {
        Self {
            embedding_multiplier: 1.0,
            norm: "model.norm",
            stored: NormWeight::Whole,
            logits_scaling: 1.0,
            final_logit_softcapping: None,
            wide_stream: false,
        }
    }
}

impl Frame {
    /// Gemma's: embeddings times the root of their width.
    pub fn gemma(config: &DecoderConfig, stored: NormWeight, final_logit_softcapping: Option<f32>) -> Self {
        let embedding_multiplier = (config.hidden_size as f32).sqrt();
        Self { embedding_multiplier, stored, final_logit_softcapping, ..Self::default() }
    }
}

/// Embedding, last norm and head.
#[derive(Debug)]
pub struct Ends {
    frame: Frame,
    embed_tokens: Embedding,
    norm: RmsNorm,
    /// Absent where the embedding is the head.
    lm_head: Option<Linear>,
    /// Norm and head for one token a row on CUDA.
    fused_head: Option<FusedHead>,
    vocab_size: i32,
}

impl Ends {
    /// Takes `model.embed_tokens`, the last norm and, where embeddings are not tied, `lm_head`.
    pub fn new(weights: &mut Weights, config: &DecoderConfig, frame: Frame) -> Result<Self, GraphError> {
        let (hidden, vocab_size) = (config.hidden_size, config.vocab_size);
        let embed_tokens = Embedding::new(weights, "model.embed_tokens", vocab_size, hidden)?;
        let norm = RmsNorm::stored(weights, frame.norm, hidden, config.rms_norm_eps, frame.stored)?;
        let lm_head = if config.tie_word_embeddings {
            // Some tied checkpoints carry the head all the same.
            for part in ["weight", "scales", "biases"] {
                weights.drop_tensor(&format!("lm_head.{part}"));
            }
            None
        } else {
            Some(Linear::new(weights, "lm_head", vocab_size, hidden, Bias::No)?)
        };
        // Rotations are computed.
        weights.leave_out_endings(&[".rotary_emb.inv_freq"]);
        let plain = frame.logits_scaling == 1.0 && frame.final_logit_softcapping.is_none();
        let fused_head = match weights.placement().fused() && plain {
            true => FusedHead::new(&norm, lm_head.as_ref(), &embed_tokens)?,
            false => None,
        };
        Ok(Self { frame, embed_tokens, norm, lm_head, fused_head, vocab_size })
    }

    /// `[batch, time]` to `[batch, time, hidden]`.
    pub fn embed(&self, tokens: &Array) -> Result<Array, Exception> {
        let x = self.embed_tokens.forward(tokens)?;
        let x = if self.frame.wide_stream { x.as_dtype(Dtype::Float32)? } else { x };
        scale(&x, self.frame.embedding_multiplier)
    }

    /// `[batch, time, hidden]` to what is wanted of the pass.
    pub fn logits(&self, x: Array, rows: Rows, pass: &Pass) -> Result<Array, Exception> {
        if rows == Rows::States {
            return self.norm.forward_wide(&x.as_dtype(Dtype::Float32)?)?.as_dtype(Dtype::Float32);
        }
        if let Some(head) = self.fused_head.as_ref().filter(|head| head.takes(pass)) {
            return head.forward(&x, pass);
        }
        let x = match rows {
            Rows::Last if x.dim(1) > 1 => ffi::slice(&x, [0, x.dim(1) - 1, 0], [x.dim(0), x.dim(1), x.dim(2)])?,
            _ => x,
        };
        let x = self.norm.forward(&x)?;
        let logits = match &self.lm_head {
            Some(head) => head.forward(&x)?,
            None => self.embed_tokens.as_head(&x)?,
        };
        let logits = match self.frame.logits_scaling {
            1.0 => logits,
            divisor => logits.divide(scalar(divisor, logits.dtype())?)?,
        };
        self.frame.final_logit_softcapping.map_or(Ok(logits.clone()), |cap| softcap(&logits, cap))
    }

    /// Entries in the vocabulary.
    pub fn vocab_size(&self) -> u32 {
        self.vocab_size as u32
    }
}

/// Embedding, layers, last norm and head.
#[derive(Debug)]
pub struct Decoder {
    ends: Ends,
    layers: Vec<Layer>,
}

impl Decoder {
    /// Takes what stands around the layers, and from `layer` each one, given its name and index.
    pub fn new(
        weights: &mut Weights,
        config: &DecoderConfig,
        frame: Frame,
        mut layer: impl FnMut(&mut Weights, &str, usize) -> Result<Layer, GraphError>,
    ) -> Result<Self, GraphError> {
        let mut ends = Ends::new(weights, config, frame)?;
        let layers: Vec<Layer> = (0..config.num_hidden_layers)
            .map(|index| layer(weights, &format!("model.layers.{index}"), index))
            .collect::<Result<_, _>>()?;
        ends.frame.wide_stream |= layers.iter().any(|layer| matches!(layer.mlp, FeedForward::Moe(_)));
        Ok(Self { ends, layers })
    }
}

impl DecoderConfig {
    /// Attention as config.json describes it: no norm on q and k, and bias where `attention_bias` says.
    pub fn attention(&self) -> AttentionSpec {
        AttentionSpec {
            hidden: self.hidden_size,
            heads: self.num_attention_heads,
            kv_heads: self.kv_heads(),
            head_dim: self.head_dim(),
            qkv_bias: self.attention_bias.into(),
            o_bias: self.attention_bias.into(),
            qk_norm: QkNorm::None,
            values: Values::Projected,
            rope: Some(self.rope.clone()),
            window: None,
            scale: 1.0 / (self.head_dim() as f32).sqrt(),
            softcap: None,
            sinks: false,
            output_gate: false,
            query_growth: None,
            shared: false,
        }
    }
}

impl CausalModel for Decoder {
    fn forward(&self, tokens: &Array, cache: &mut Cache, rows: Rows) -> Result<Array, Exception> {
        let pass = cache.begin(tokens);
        let mut x = self.ends.embed(tokens)?;
        for (layer, cache) in self.layers.iter().zip(cache.layers()) {
            x = layer.forward(&x, cache, &pass)?;
        }
        cache.advance(&pass);
        self.ends.logits(x, rows, &pass)
    }

    fn layout(&self) -> Vec<CacheKind> {
        self.layers.iter().map(|layer| layer.mixer.keeps()).collect()
    }

    fn vocab_size(&self) -> u32 {
        self.ends.vocab_size()
    }

    fn length_limit(&self) -> Option<u32> {
        self.layers.iter().filter_map(|layer| layer.mixer.length_limit()).min().map(|limit| limit.max(0) as u32)
    }
}
