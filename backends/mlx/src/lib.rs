//! The native backend: model families computed in this process by MLX, on Metal, CUDA or the CPU.
//!
//! One named thread owns each model: it builds, runs and drops every array (`device`). What serves a model, and how its
//! weights lie in memory, is decided purely (`judge`), and so is what the thread does next (`schedule`), which `runner`
//! performs. The modules [`mod@verify`] and [`mod@bench`] are what the commands
//! of those names run.

mod backend;
pub mod bench;
pub mod convert;
mod device;
#[cfg(test)]
mod embed_tests;
mod engine;
#[cfg(test)]
mod engine_tests;
#[cfg(test)]
mod grammar_tests;
mod group;
mod host;
mod identity;
mod judge;
mod memory;
mod prefix;
mod remember;
mod runner;
mod sampler;
mod schedule;
mod sequence;
mod settings;
mod threads;
pub mod verify;
mod watchdog;

pub use backend::INFO;
pub use judge::footprint;
pub use settings::Settings;
