//! The words that model families are written in, over `mlx-rs`: checked weights, linear maps (plain or quantized), norms,
//! rotary embeddings, attention, recurrences, mixtures of experts, caches, and a decoder put together from them.
//!
//! A family file in `plugins/families` holds only what is peculiar to it. Arrays are built, evaluated and dropped on
//! one thread; nothing here starts another.
//!
//! Shapes are written `[batch, time, hidden]`; `heads` count query heads and `kv_heads` key/value heads.

pub mod attention;
pub mod cache;
pub mod config;
pub mod conv;
pub mod decoder;
pub mod deepseek;
pub mod delta;
pub mod delta_net;
pub mod elementwise;
pub mod family;
pub mod ffi;
mod kernels;
pub mod linear;
pub mod memory;
pub mod mla;
pub mod mlp;
pub mod model;
pub mod moe;
pub mod norm;
pub mod pass;
pub mod quantization;
pub mod qwen_moe;
pub mod rope;
pub mod router;
pub mod weights;

#[doc(hidden)]
pub use mesh_core as __core;

pub use attention::last_axis;
pub use attention::{Attention, AttentionSpec, QkNorm, QueryGrowth, Values};
pub use cache::{
    Cache, CacheKind, LayerCache,
    kept::{Blueprint, Footprint, Point, Segment, needs_points},
};
pub use config::{DecoderConfig, accepted};
pub use conv::ShortConv;
pub use decoder::{Decoder, Ends, FeedForward, Frame, Layer, Mixer, NormNames, add_clipped};
pub use deepseek::{DeepseekConfig, DeepseekMoeConfig};
pub use delta::{Steps, delta_rule, l2_normed};
pub use delta_net::{DeltaDecoderConfig, DeltaNetConfig, GatedDeltaNet};
pub use elementwise::{Activation, scale, silu, softplus};
pub use family::{GraphFamily, graph_families};
pub use linear::{Bias, Embedding, Linear};
pub use mla::{LatentAttention, LatentSpec};
pub use mlp::Mlp;
pub use model::{CausalModel, GraphError, Rows};
pub use moe::{ExpertActivation, ExpertSizes, Moe, MoeSpec, SwitchGlu};
pub use norm::{NormWeight, RmsNorm};
pub use pass::Pass;
pub use quantization::{QuantizationTable, Scheme};
pub use qwen_moe::QwenMoeConfig;
pub use rope::{Rope, RopeSpec, Scaling};
pub use router::{Groups, RouterSpec, Score};
pub use weights::{MIXTRAL_NAMES, Placement, Weights};
