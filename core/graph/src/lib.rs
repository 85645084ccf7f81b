//! The words that model families are written in, over `mlx-rs`: checked weights, linear maps (plain or quantized), norms,
//! rotary embeddings, attention, caches, and a decoder put together from them.
//!
//! A family file in `plugins/families` holds only what is peculiar to it. Arrays are built, evaluated and dropped on
//! one thread; nothing here starts another.
//!
//! Shapes are written `[batch, time, hidden]`; `heads` count query heads and `kv_heads` key/value heads.

pub mod attention;
pub mod cache;
pub mod config;
pub mod decoder;
pub mod family;
pub mod ffi;
mod kernels;
pub mod linear;
pub mod memory;
pub mod mlp;
pub mod model;
pub mod norm;
pub mod quantization;
pub mod rope;
pub mod weights;

#[doc(hidden)]
pub use mesh_core as __core;

pub use attention::{Attention, AttentionSpec};
pub use cache::LayerCache;
pub use config::DecoderConfig;
pub use decoder::{Decoder, Layer};
pub use family::{GraphFamily, graph_families};
pub use linear::{Bias, Embedding, Linear};
pub use mlp::SwiGlu;
pub use model::{CausalModel, GraphError, Rows};
pub use norm::RmsNorm;
pub use quantization::{QuantizationTable, Scheme};
pub use rope::{Rope, RopeSpec};
pub use weights::{Placement, Weights};
