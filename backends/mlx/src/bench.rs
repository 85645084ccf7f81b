//! Engines of a real model's shape with random weights, for `mesh-llm bench --shape`.

use std::sync::atomic::AtomicBool;

use mesh_core::{Device, DeviceKind, EngineHandle, LoadError};
use mesh_graph::{Scheme, Weights, ffi::Mode, graph_families, memory};
use mlx_rs::Dtype;
use serde_json::{Value, json};

use crate::{
    device::{Built, Context, Start, bytes, gate, placement, read, start},
    identity::Identity,
    judge,
    settings::Settings,
};

/// A published model's shape.
#[derive(Clone, Debug)]
pub struct Shape {
    /// What `--shape` takes.
    pub name: &'static str,
    /// The family that computes it.
    pub family: &'static str,
    /// Its config.json, as far as the graph reads it.
    pub config: Value,
}

/// Shapes that can be measured without their weights.
pub fn shapes() -> Vec<Shape> {
    let qwen3 = |hidden: u32, inner: u32, layers: u32, heads: u32, tied: bool| {
        json!({
            "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-6,
            "vocab_size": 151_936, "tie_word_embeddings": tied, "rope_theta": 1e6, "max_position_embeddings": 40_960,
        })
    };
    let lfm2 = |hidden: u32, inner: u32, heads: u32| {
        json!({
            "model_type": "lfm2", "hidden_size": hidden, "num_hidden_layers": 16, "num_attention_heads": heads,
            "num_key_value_heads": 8, "norm_eps": 1e-5, "conv_L_cache": 3, "conv_bias": false, "block_dim": hidden,
            "block_ff_dim": inner, "intermediate_size": inner, "block_multiple_of": 256, "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": true, "vocab_size": 65_536, "tie_word_embeddings": true, "rope_theta": 1e6,
            "full_attn_idxs": [2, 5, 8, 10, 12, 14], "max_position_embeddings": 128_000,
        })
    };
    vec![
        Shape {
            name: "gemma-3-1b",
            family: "gemma3",
            config: json!({
                "model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26,
                "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "rms_norm_eps": 1e-6,
                "vocab_size": 262_144, "tie_word_embeddings": true, "rope_theta": 1e6, "rope_local_base_freq": 1e4,
                "sliding_window": 512, "sliding_window_pattern": 6, "query_pre_attn_scalar": 256,
                "hidden_activation": "gelu_pytorch_tanh", "max_position_embeddings": 32_768,
            }),
        },
        Shape { name: "lfm2-350m", family: "lfm2", config: lfm2(1024, 6656, 16) },
        Shape { name: "lfm2-1.2b", family: "lfm2", config: lfm2(2048, 12_288, 32) },
        Shape {
            name: "llama-3.2-1b",
            family: "llama",
            config: json!({
                "model_type": "llama", "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
                "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "rms_norm_eps": 1e-5,
                "vocab_size": 128_256, "tie_word_embeddings": true, "rope_theta": 5e5,
                "max_position_embeddings": 131_072,
                "rope_scaling": {
                    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            }),
        },
        Shape { name: "qwen3-0.6b", family: "qwen3", config: qwen3(1024, 3072, 28, 16, true) },
        Shape { name: "qwen3-8b", family: "qwen3", config: qwen3(4096, 12_288, 36, 32, false) },
        // Of its 48 layers and 512 experts, as many as are made in seconds.
        Shape {
            name: "qwen3-next-8-layers",
            family: "qwen3_next",
            config: json!({
                "model_type": "qwen3_next", "hidden_size": 2048, "intermediate_size": 5120, "num_hidden_layers": 8,
                "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256, "rms_norm_eps": 1e-6,
                "hidden_act": "silu", "attention_bias": false, "vocab_size": 151_936, "tie_word_embeddings": false,
                "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128,
                "linear_num_key_heads": 16, "linear_num_value_heads": 32, "full_attention_interval": 4,
                "partial_rotary_factor": 0.25, "rope_theta": 1e7, "num_experts": 32, "num_experts_per_tok": 10,
                "moe_intermediate_size": 512, "shared_expert_intermediate_size": 512, "decoder_sparse_step": 1,
                "mlp_only_layers": [], "norm_topk_prob": true, "max_position_embeddings": 262_144,
            }),
        },
        Shape {
            name: "smollm2-135m",
            family: "llama",
            config: json!({
                "model_type": "llama", "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                "num_attention_heads": 9, "num_key_value_heads": 3, "rms_norm_eps": 1e-5, "vocab_size": 49_152,
                "tie_word_embeddings": true, "rope_theta": 1e5, "max_position_embeddings": 8192,
            }),
        },
    ]
}

/// How random weights are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RandomWeights {
    /// Bits a weight: 2 to 8 in affine groups of 64, or 16 for bf16, or 32 for f32.
    pub bits: u32,
    /// Makes them repeatable.
    pub seed: u64,
    /// Whether kernels of our own are used where they apply.
    pub kernels: bool,
}

/// An engine of `shape` with random weights, ready to serve.
pub async fn random_engine(
    shape: &Shape,
    weights: RandomWeights,
    device: Device,
    settings: &Value,
) -> Result<EngineHandle, LoadError> {
    let settings = Settings::read(settings).map_err(|what| LoadError::Settings { backend: "mlx", what })?;
    let on_cpu = device.kind == DeviceKind::Cpu;
    let (scheme, dtype) = match weights.bits {
        16 => (None, Dtype::Bfloat16),
        32 => (None, Dtype::Float32),
        bits @ (2..=6 | 8) => (Some(Scheme { group_size: 64, bits: bits as i32, mode: Mode::Affine }), Dtype::Bfloat16),
        bits => {
            let what = format!("weights of {bits} bits cannot be made; there are 2 to 6, 8, 16 and 32");
            return Err(LoadError::Settings { backend: "mlx", what });
        }
    };
    let dtype = if on_cpu { Dtype::Float32 } else { dtype };
    let context = shape.config["max_position_embeddings"].as_u64().and_then(|max| u32::try_from(max).ok());
    let (family, config, kind) = (shape.family, shape.config.clone(), device.kind);
    let build = move |abandoned: &AtomicBool| {
        let _gate = gate();
        let failed = |error: String| LoadError::Weights { what: error };
        let family = graph_families()
            .map_err(|error| failed(error.to_string()))?
            .get(family)
            .map_err(|error| failed(error.to_string()))?;
        let mut placement = placement(kind, false);
        placement.kernels &= weights.kernels;
        let mut source =
            Weights::random(weights.seed, dtype, scheme, placement).map_err(|error| failed(error.to_string()))?;
        let model = family.graph(&config, &mut source).map_err(|error| failed(error.to_string()))?;
        let arrays = source.finish().map_err(|error| failed(error.to_string()))?;
        read(&arrays, abandoned, |_, _| {})?;
        memory::clear_cache();
        Ok(Built { model, weights_bytes: bytes(&arrays) })
    };
    start(Start {
        name: shape.name.into(),
        device,
        settings,
        context: Context { tokens: context.unwrap_or(judge::CONTEXT_TOKENS_DEFAULT), asked: false },
        config: shape.config.clone(),
        eos: Vec::new(),
        identity: Identity {
            weights: Vec::new(),
            circumstances: format!("{} {} {} {}", shape.name, weights.bits, weights.seed, kind),
        },
        build: Box::new(build),
    })
    .await
}

/// The most bytes MLX held at once, and starts counting anew.
pub fn take_peak_bytes() -> u64 {
    let peak = memory::peak_bytes();
    memory::reset_peak();
    peak
}
