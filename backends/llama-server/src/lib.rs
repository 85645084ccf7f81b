//! llama.cpp's `llama-server` as a managed child process behind the contracts of `mesh-core`.
//!
//! The life of a model here: [`settings`] are read, the binary is found ([`mod@find`]) or installed ([`mod@install`]), the model is
//! judged from its header alone (`judge`), memory is shared out (`share`), and the child is started (`child`, `launch`), waited
//! for and talked to over loopback HTTP (`client`, `wire`). `engine` turns one HTTP stream into the events every engine
//! speaks; who has no slot waits at the `gate`.
//!
//! Invariants:
//! - The child never outlives us. It is in a process group of its own and is killed when its engine is dropped; on Linux
//!   the kernel kills it even if we are killed by SIGKILL.
//! - The child's defaults never leak into an answer: every sampling parameter is sent, and `LLAMA_ARG_*` variables are
//!   not handed down.
//! - Everything the child says is bounded before it is kept: log lines, log length, events, error bodies.
//! - An open stream always ends: with `Finished`, or with an error that names the cause.

mod argv;
mod backend;
mod child;
mod client;
mod engine;
#[cfg(test)]
mod engine_tests;
pub mod find;
#[cfg(test)]
mod fixture;
mod gate;
pub mod install;
mod judge;
mod launch;
#[cfg(test)]
mod live_parallel_tests;
#[cfg(test)]
mod live_tests;
mod log;
mod memory;
mod pins;
mod schema;
pub mod settings;
mod share;
mod unpack;
mod wire;

pub use backend::{BACKEND, INFO, LlamaServer};
pub use engine::LlamaEngine;
pub use find::{Found, Origin};
pub use install::{InstallError, InstallOptions, Installed, default_install_dir, install};
pub use settings::Settings;
pub use wire::Candidate;

mesh_core::register_backend!(&BACKEND);
