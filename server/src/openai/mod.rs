//! The OpenAI wire format, both ways. Nothing outside this module writes or reads OpenAI JSON.
//!
//! Requests are read strictly: every field is honoured, or refused by its name. A field that is `null` is absent.
//!
//! - [`bad_request`]: what can be wrong with a request, and the reading of JSON.
//! - [`fields`]: parameters that chat and text completions share.
//! - [`mod@format`]: what an answer has to be.
//! - [`chat`], [`completion`]: the two requests.
//! - [`logprobs`]: how likely tokens were, in both forms.
//! - [`embedding`], [`model`], [`tokens`], [`cancel`]: the surfaces beside them.
//! - [`responses`]: a surface of its own.
//! - [`response`]: answers, chunks, models, errors.

pub mod bad_request;
pub mod cancel;
pub mod chat;
pub mod completion;
pub mod embedding;
pub mod fields;
pub mod format;
pub mod logprobs;
pub mod message;
pub mod model;
pub mod response;
pub mod responses;
pub(crate) mod schema;
pub mod tokens;

pub use bad_request::{BadRequest, parse};
pub use chat::ChatRequest;
pub use completion::CompletionRequest;
