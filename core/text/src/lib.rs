//! Text on both sides of a model: chat templates in, tokens to text and text to answers out.
//!
//! - [`template`]: a model's chat template, rendered as its authors' Python tooling renders it.
//! - [`tokenizer`], [`decoder`]: text to token ids, and token ids to text one at a time.
//! - [`stop`]: cuts a stream at stop strings.
//! - [`dialect`]: the contract of a wire format of reasoning and tool calls, and its registry.
//! - [`choice`]: which dialect a model speaks, by its family and its template.
//! - [`constraint`]: which tokens keep to a grammar.
//! - [`tools`]: the tools of a request, as dialects see them.
//! - [`scan`]: what dialects are written with.
//!
//! Everything that streams keeps one promise: however its input is cut, its output is the same.

pub mod choice;
pub mod constraint;
pub mod decoder;
pub mod dialect;
pub mod scan;
pub mod stop;
pub mod template;
pub mod tokenizer;
pub mod tools;

/// Used by the registration macros; not part of the API.
#[doc(hidden)]
pub use inventory as __inventory;

pub use choice::{Choice, choose};
pub use constraint::{ConstraintError, Vocabulary};
pub use decoder::StreamDecoder;
pub use dialect::{
    Answer, AnsweredCall, CallIds, CallSchema, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm,
    assemble, dialects,
};
pub use mesh_core::Delta;
pub use mesh_core::error::TemplateError;
pub use stop::{StopFilter, StopOutput};
pub use template::{Template, TemplateInput};
pub use tokenizer::{DecoderOptions, Tokenizer, TokenizerError};
pub use tools::Tools;
