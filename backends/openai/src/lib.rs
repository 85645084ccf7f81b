//! Another OpenAI-compatible server (vLLM, Ollama, LM Studio, llama-server, another mesh-llm), whose models are offered as this
//! server's own.
//!
//! [`Shared`] looks at the server again and again (`look`): what kind it is (`kind`), which models it lists, and what they honour,
//! by what it says and by asking (`probe`). A request goes out as its OpenAI form (`request`, `wire`) over `client`, and what
//! comes back is read into the parts of an answer (`reading`); `reply` does the same for questions, `engine` is what the
//! server sees of a model.
//!
//! Invariants:
//! - A model is offered while the server answers and lists it, and not a look longer.
//! - Nothing is assumed of a server: a parameter that it is not known or seen to honour is refused by name.
//! - Everything that is read has a bound, in bytes and in time. An open stream always ends.
//! - Clients are told what the server says, and never where it is.

mod client;
mod engine;
mod error;
mod kind;
mod look;
mod options;
mod probe;
mod reading;
mod reply;
mod request;
mod shared;
mod wire;

#[cfg(test)]
mod tests;

pub use kind::Kind;
pub use options::{Own, ShareError, ShareOptions};
pub use shared::{INFO, Shared};
