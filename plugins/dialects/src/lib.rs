//! The wire formats in which models write reasoning and tool calls, one file each.
//!
//! A new dialect is a file that implements [`Dialect`](mesh_text::Dialect), calls
//! [`register_dialect!`](mesh_text::register_dialect) and runs `contract::check` in its tests, and a line here.
//! [`reasoning`] and [`call`] hold what several of them share.

pub mod call;
pub mod hermes;
pub mod llama3_json;
pub mod plain;
pub mod reasoning;
pub mod think;

#[cfg(test)]
mod contract;

/// Links this crate: a crate that nobody mentions is left out, and its dialects with it. Returns how many dialects it
/// registers, for a test that counts.
pub const fn linked() -> usize {
    4
}
