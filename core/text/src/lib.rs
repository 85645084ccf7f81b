//! Text on both sides of a model: chat templates in, tokens to text and text to answers out.
//!
//! - [`template`]: a model's chat template, rendered as its authors' Python tooling renders it.
//! - [`tokenizer`], [`decoder`]: text to token ids, and token ids to text one at a time.
//! - [`stop`]: cuts a stream at stop strings.
//! - [`dialect`]: the contract of a wire format of reasoning and tool calls, and its registry.
//! - [`constraint`]: which tokens keep to a grammar.
//! - [`scan`]: what dialects are written with.
//!
//! Everything that streams keeps one promise: however its input is cut, its output is the same.

pub mod constraint;
pub mod decoder;
pub mod dialect;
pub mod scan;
pub mod stop;
pub mod template;
pub mod tokenizer;

/// Used by the registration macros; not part of the API.
#[doc(hidden)]
pub use inventory as __inventory;

pub use constraint::{ConstraintError, Vocabulary};
pub use decoder::StreamDecoder;
pub use dialect::{
    Answer, AnsweredCall, CallSchema, Delta, Dialect, DialectParser, ParserContext, ReasoningForm, assemble, dialects,
};
pub use mesh_core::error::TemplateError;
pub use stop::{StopFilter, StopOutput};
pub use template::{Template, TemplateInput};
pub use tokenizer::{DecoderOptions, Tokenizer, TokenizerError};
