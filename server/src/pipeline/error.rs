//! Why a request could not be handed to a model.

use mesh_core::{Hint, SubmitError, TemplateError};
use mesh_text::{ConstraintError, TokenizerError};

/// A request that was not admitted.
#[derive(Debug, thiserror::Error)]
pub enum PipelineError {
    /// The prompt could not be rendered.
    #[error(transparent)]
    Template(#[from] TemplateError),
    /// The prompt could not be tokenized.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// The model needs a tokenizer and came without one.
    #[error("the model has no tokenizer.json, without which text cannot be turned into tokens")]
    NoTokenizer,
    /// The model's answers have no form for tool calls.
    #[error("this model's answers have no form for tool calls (its dialect is `{dialect}`)")]
    NoTools {
        /// The dialect.
        dialect: &'static str,
    },
    /// The model has no such switch.
    #[error("this model {why}")]
    NoSwitch {
        /// The request's field.
        field: &'static str,
        /// What the model has instead.
        why: String,
    },
    /// The answer cannot be held to what is asked of it.
    #[error("{error}")]
    Constraint {
        /// The request's field.
        field: &'static str,
        /// Why.
        error: ConstraintError,
    },
    /// Calls that the model may make or not cannot be held to their functions.
    #[error("`strict` functions are only supported here where `tool_choice` forces a call")]
    NoStrict,
    /// A prompt of tokens cannot be put in front of its answer.
    #[error("`echo` of a prompt of tokens is not supported by this model's backend")]
    NoEcho,
    /// The engine did not admit it.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// A part of the server broke.
    #[error("the server failed while preparing the prompt")]
    Panicked,
}

impl Hint for PipelineError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Template(error) => error.hint(),
            Self::NoTokenizer => Some("download tokenizer.json into the model's directory and start again".into()),
            Self::NoTools { .. } => Some("leave `tools` out, or serve a model that was trained to call tools".into()),
            Self::NoSwitch { field, .. } => Some(format!("leave `{field}` out")),
            Self::Constraint { .. } => None,
            Self::NoStrict => {
                Some("leave `strict` out, or set `tool_choice` to `required` or a function's name".into())
            }
            Self::NoEcho => Some("send the prompt as text".into()),
            Self::Submit(SubmitError::TooLong { .. }) => {
                Some("shorten the conversation, or start the server with a longer --ctx if the model allows it".into())
            }
            Self::Submit(SubmitError::Busy { .. }) => Some("try again shortly".into()),
            Self::Submit(SubmitError::Unsupported { knob }) => Some(format!("leave `{knob}` out")),
            Self::Submit(SubmitError::Empty) => Some("send a prompt that is not empty".into()),
            Self::Submit(_) | Self::Tokenizer(_) | Self::Panicked => None,
        }
    }
}
