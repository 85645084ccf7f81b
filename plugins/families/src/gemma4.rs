//! Gemma 4: Gemma 3 with whole norms, unscaled scores, a norm without weight on values, larger heads on full layers, and a
//! factor a layer. Small sizes (E) give each layer embeddings of its own and let the last layers share keys and values;
//! large ones take values from keys, or have experts beside the MLP.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    Activation, Attention, AttentionSpec, Bias, Cache, CacheKind, CausalModel, DecoderConfig, Embedding, Ends,
    ExpertActivation, Frame, GraphError, GraphFamily, Linear, Mixer, Mlp, Moe, MoeSpec, NormWeight,
    QkNorm, RmsNorm, RopeSpec, RouterSpec, Rows, Score, Values, Weights, accepted, add_clipped, scale,
};
use mlx_rs::{Array, error::Exception};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct Gemma4;
mesh_graph::register_family!(&Gemma4);

impl ModelFamily for Gemma4 {
    fn id(&self) -> &'static str {
        "gemma4"
    }

    fn title(&self) -> &'static str {
        "Gemma 4"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["gemma4", "gemma4_text", "gemma4_unified"],
            architectures: &["Gemma4ForConditionalGeneration", "Gemma4ForCausalLM"],
            gguf_architectures: &["gemma4"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "gemma4" }
    }
}

/// Vision and sound.
const LEFT_OUT: &[&str] = &["vision_tower.", "vision_embedder.", "audio_tower.", "embed_vision.", "embed_audio."];

/// Published experts have no `.weight`; mlx-lm says `switch_glu`.
const NAMES: &[(&str, &str)] = &[
    (".experts.gate_up_proj", ".moe.switch_mlp.gate_up_proj.weight"),
    (".experts.down_proj", ".moe.switch_mlp.down_proj.weight"),
    (".experts.switch_glu.", ".moe.switch_mlp."),
    (".router.scale", ".router.norm.weight"),
    (".router.", ".moe.router."),
];

#[derive(Deserialize)]
struct Own {
    global_head_dim: Option<i32>,
    #[serde(default)]
    attention_k_eq_v: bool,
    num_global_key_value_heads: Option<i32>,
    #[serde(default)]
    num_kv_shared_layers: usize,
    #[serde(default)]
    use_double_wide_mlp: bool,
    hidden_size_per_layer_input: Option<i32>,
    vocab_size_per_layer_input: Option<i32>,
    #[serde(default)]
    enable_moe_block: bool,
    num_experts: Option<i32>,
    top_k_experts: Option<i32>,
    moe_intermediate_size: Option<i32>,
    final_logit_softcapping: Option<f32>,
}

struct Read {
    config: DecoderConfig,
    own: Own,
    attention: Vec<AttentionSpec>,
    /// The layer whose keys and values each layer reads.
    sources: Vec<usize>,
    moe: Option<MoeSpec>,
}

fn read(config: &Value) -> Result<Read, GraphError> {
    // What configs leave to the reference implementation.
    let defaults = json!({
        "hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": true, "rms_norm_eps": 1e-6, "sliding_window": 512,
        "global_head_dim": 512, "rope_parameters": {
            "full_attention": { "rope_type": "proportional", "rope_theta": 1e6, "partial_rotary_factor": 0.25 },
            "sliding_attention": { "rope_type": "default", "rope_theta": 1e4 },
        },
    });
    let mut config = DecoderConfig::read_or(config, &defaults)?;
    config.default_layer_types(["sliding_attention", "full_attention"], 6);
    let own: Own = config.own()?;
    let sources = config.kv_sources(own.num_kv_shared_layers)?;
    let attention = |index| {
        let window = config.layer_window(index)?;
        let keys_as_values = own.attention_k_eq_v && window.is_none();
        let (name, head_dim) = match window {
            Some(_) => ("sliding_attention", config.head_dim()),
            None => ("full_attention", own.global_head_dim.unwrap_or(config.head_dim())),
        };
        Ok(AttentionSpec {
            head_dim,
            kv_heads: own.num_global_key_value_heads.filter(|_| keys_as_values).unwrap_or(config.kv_heads()),
            qk_norm: QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole),
            values: if keys_as_values { Values::Keys } else { Values::Normed }(config.rms_norm_eps),
            rope: Some(RopeSpec::read_layer_type(&config.settings, head_dim, name)?),
            window,
            scale: 1.0,
            shared: sources[index] != index,
            ..config.attention()
        })
    };
    let attention = (0..config.num_hidden_layers).map(attention).collect::<Result<_, GraphError>>()?;
    let moe = || {
        let (experts, top_k) = (own.num_experts.unwrap_or(0), own.top_k_experts.unwrap_or(0));
        let router = RouterSpec::new(experts, top_k, Score::SoftmaxOfChosen)?;
        Ok::<_, GraphError>(MoeSpec {
            gate: "router.proj",
            per_expert_scale: Some("router.per_expert_scale"),
            activation: ExpertActivation::Gated(config.hidden_act),
            ..MoeSpec::new(router, own.moe_intermediate_size.unwrap_or(0))
        })
    };
    let moe = own.enable_moe_block.then(moe).transpose()?;
    Ok(Read { config, own, attention, sources, moe })
}

/// Experts beside the MLP, and a router that looks at the stream through a norm of its own.
#[derive(Debug)]
struct Experts {
    moe: Moe,
    /// Before the router, before the experts, on what the MLP gives and on what the experts give.
    norms: [RmsNorm; 4],
}

impl Experts {
    fn new(weights: &mut Weights, name: &str, config: &DecoderConfig, spec: &MoeSpec) -> Result<Self, GraphError> {
        let [fused, gate, up] =
            ["gate_up_proj", "gate_proj", "up_proj"].map(|part| format!("{name}.moe.switch_mlp.{part}"));
        weights.split_rows(&fused, config.hidden_size, &[(&gate, spec.inner), (&up, spec.inner)])?;
        let moe = Moe::new(weights, &format!("{name}.moe"), config, spec.clone())?;
        let mut norm = |part: &str| RmsNorm::of(weights, &format!("{name}.{part}"), config);
        let [router, before] = [norm("moe.router.norm")?, norm("pre_feedforward_layernorm_2")?];
        let [mlp, after] = [norm("post_feedforward_layernorm_1")?, norm("post_feedforward_layernorm_2")?];
        Ok(Self { moe, norms: [router, before, mlp, after] })
    }

    /// What the experts give for `x`, added to what the MLP gave.
    fn add_to(&self, fed: &Array, x: &Array) -> Result<Array, Exception> {
        let [router, before, mlp, after] = &self.norms;
        let seen = scale(&router.forward_wide(x)?, 1.0 / (x.dim(-1) as f32).sqrt())?;
        let out = self.moe.forward_routed(&before.forward(x)?, &seen)?;
        mlp.forward(fed)?.add(after.forward_wide(&out)?)
    }
}

#[derive(Debug)]
struct Gemma4Layer {
    self_attn: Attention,
    mlp: Mlp,
    experts: Option<Experts>,
    /// Before and after attention, before and after the MLP.
    norms: [RmsNorm; 4],
    /// Gate, projection and norm of the layer's own embeddings.
    own_input: Option<(Linear, Linear, RmsNorm)>,
    layer_scalar: Array,
}

impl Gemma4Layer {
    fn new(weights: &mut Weights, name: &str, index: usize, read: &Read) -> Result<Self, GraphError> {
        let Read { config, own, attention, .. } = read;
        let hidden = config.hidden_size;
        let spec = attention[index].clone();
        let wide = if spec.shared && own.use_double_wide_mlp { 2 } else { 1 };
        let own_input = match own.hidden_size_per_layer_input.filter(|width| *width > 0) {
            None => None,
            Some(width) => Some((
                Linear::new(weights, &format!("{name}.per_layer_input_gate"), width, hidden, Bias::No)?,
                Linear::new(weights, &format!("{name}.per_layer_projection"), hidden, width, Bias::No)?,
                RmsNorm::of(weights, &format!("{name}.post_per_layer_input_norm"), config)?,
            )),
        };
        let mut norm = |part: &str| RmsNorm::of(weights, &format!("{name}.{part}_layernorm"), config);
        let norms = [norm("input")?, norm("post_attention")?, norm("pre_feedforward")?, norm("post_feedforward")?];
        let experts = read.moe.as_ref().map(|moe| Experts::new(weights, name, config, moe)).transpose()?;
        Ok(Self {
            self_attn: Attention::new(weights, &format!("{name}.self_attn"), spec)?,
            mlp: Mlp::sized(weights, &format!("{name}.mlp"), config, wide * config.intermediate_size)?,
            experts,
            norms,
            own_input,
            layer_scalar: weights.take(&format!("{name}.layer_scalar"), &[1])?,
        })
    }

    /// The rest of the layer, from what attention gave.
    fn forward(&self, x: &Array, mixed: &Array, own: Option<&Array>) -> Result<Array, Exception> {
        let [_, after, before_mlp, after_mlp] = &self.norms;
        let x = add_clipped(x, &after.forward(mixed)?)?;
        let fed = self.mlp.forward(&before_mlp.forward(&x)?)?;
        let fed = self.experts.as_ref().map_or(Ok(fed.clone()), |experts| experts.add_to(&fed, &x))?;
        let mut x = add_clipped(&x, &after_mlp.forward_wide(&fed)?)?;
        if let (Some((gate, projection, norm)), Some(own)) = (&self.own_input, own) {
            let gated = Activation::GeluTanh.forward(&gate.forward(&x)?)?.multiply(own)?;
            x = add_clipped(&x, &norm.forward(&projection.forward(&gated)?)?)?;
        }
        x.multiply(&self.layer_scalar)
    }
}

/// Embeddings of each layer's own.
#[derive(Debug)]
struct LayerInputs {
    embed: Embedding,
    projection: Linear,
    norm: RmsNorm,
    width: i32,
}

impl LayerInputs {
    fn new(weights: &mut Weights, config: &DecoderConfig, own: &Own) -> Result<Option<Self>, GraphError> {
        let Some(width) = own.hidden_size_per_layer_input.filter(|width| *width > 0) else { return Ok(None) };
        let (all, hidden) = (config.num_hidden_layers as i32 * width, config.hidden_size);
        let vocab = own.vocab_size_per_layer_input.unwrap_or(config.vocab_size);
        Ok(Some(Self {
            embed: Embedding::new(weights, "model.embed_tokens_per_layer", vocab, all)?,
            projection: Linear::new(weights, "model.per_layer_model_projection", all, hidden, Bias::No)?,
            norm: RmsNorm::new(weights, "model.per_layer_projection_norm", width, config.rms_norm_eps)?,
            width,
        }))
    }

    /// One array a layer, `[batch, time, width]`.
    fn forward(&self, tokens: &Array, x: &Array, layers: usize) -> Result<Vec<Array>, Exception> {
        let shape = [x.dim(0), x.dim(1), layers as i32, self.width];
        let own = scale(&self.embed.forward(tokens)?, (self.width as f32).sqrt())?.reshape(&shape)?;
        let projected = scale(&self.projection.forward(x)?, 1.0 / (x.dim(-1) as f32).sqrt())?.reshape(&shape)?;
        let sum = scale(&self.norm.forward(&projected)?.add(own)?, std::f32::consts::FRAC_1_SQRT_2)?;
        sum.unstack(2)
    }
}

struct Model {
    ends: Ends,
    layer_inputs: Option<LayerInputs>,
    layers: Vec<Gemma4Layer>,
    sources: Vec<usize>,
}

impl CausalModel for Model {
    fn forward(&self, tokens: &Array, cache: &mut Cache, rows: Rows) -> Result<Array, Exception> {
        let pass = cache.begin(tokens);
        let mut x = self.ends.embed(tokens)?;
        let own = match &self.layer_inputs {
            Some(inputs) => inputs.forward(tokens, &x, self.layers.len())?,
            None => Vec::new(),
        };
        let mut keys: Vec<[Array; 2]> = Vec::new();
        for (index, (layer, cache)) in self.layers.iter().zip(cache.layers()).enumerate() {
            let normed = layer.norms[0].forward(&x)?;
            if self.sources[index] == index {
                keys.push(layer.self_attn.keys_and_values(&normed, cache, &pass)?);
            }
            let mixed = layer.self_attn.forward_with(&normed, &keys[self.sources[index]], &pass)?;
            x = layer.forward(&x, &mixed, own.get(index))?;
        }
        cache.advance(&pass);
        self.ends.logits(x, rows, &pass)
    }

    fn layout(&self) -> Vec<CacheKind> {
        self.layers.iter().map(|layer| layer.self_attn.keeps()).collect()
    }

    fn vocab_size(&self) -> u32 {
        self.ends.vocab_size()
    }
}

impl GraphFamily for Gemma4 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let read = read(config)?;
        let Read { config, own, sources, .. } = &read;
        weights.text_part(LEFT_OUT);
        weights.rename(NAMES);
        let frame = Frame::gemma(config, NormWeight::Whole, own.final_logit_softcapping);
        let frame = Frame { wide_stream: read.moe.is_some(), ..frame };
        let ends = Ends::new(weights, config, frame)?;
        let layer_inputs = LayerInputs::new(weights, config, own)?;
        let layers = (0..config.num_hidden_layers)
            .map(|index| Gemma4Layer::new(weights, &format!("model.layers.{index}"), index, &read))
            .collect::<Result<_, _>>()?;
        Ok(Box::new(Model { ends, layer_inputs, layers, sources: sources.clone() }))
    }
}
