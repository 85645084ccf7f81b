//! The native backend: model families computed in this process by MLX, on Metal, CUDA or the CPU.
//!
//! One named thread owns each model: it builds, runs and drops every array (`device`). What serves a model, and how its
//! weights lie in memory, is decided purely (`judge`). The modules [`mod@verify`] and [`mod@bench`] are what the commands
//! of those names run.

mod backend;
pub mod bench;
mod device;
mod engine;
mod generate;
mod host;
mod judge;
// Nobody asks it yet.
#[allow(dead_code, unused_imports)]
mod prefix;
mod sampler;
mod settings;
pub mod verify;

pub use backend::INFO;
pub use settings::Settings;
