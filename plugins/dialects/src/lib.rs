//! The wire formats in which models write reasoning and tool calls, one file each.
//!
//! A new dialect is a file that implements [`Dialect`](mesh_text::Dialect), calls
//! [`register_dialect!`](mesh_text::register_dialect) and runs `contract::check` in its tests, and a line here.
//! [`reasoning`], [`calls`] and [`call`] hold what several of them share.

pub mod call;
pub mod calls;
pub mod deepseek;
pub mod gemma4;
pub mod glm;
pub mod harmony;
pub mod hermes;
pub mod kimi_k2;
pub mod llama3_json;
pub mod minimax_m2;
pub mod minimax_m3;
pub mod mistral;
pub mod plain;
pub mod python;
pub mod pythonic;
pub mod qwen3_coder;
pub mod reasoning;
pub mod think;
pub mod typed;

#[cfg(test)]
mod contract;

/// Links this crate: a crate that nobody mentions is left out, and its dialects with it. Returns how many dialects it
/// registers, for a test that counts.
pub const fn linked() -> usize {
    14
}
