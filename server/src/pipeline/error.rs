//! Why a request could not be handed to a model.

use mesh_core::{EmbedError, EngineError, Hint, SubmitError, TemplateError, node::Rejection};
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
    /// Nobody who knows the model's tokens offers to tell.
    #[error("this model's backend has a tokenizer of its own, which it does not share")]
    TokensUnknown,
    /// The engine broke underway.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine gives no embeddings.
    #[error("this model's backend gives no embeddings")]
    NoEmbeddings,
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
    /// Another machine turned it down.
    #[error(transparent)]
    Rejected(#[from] Rejection),
    /// A part of the server broke.
    #[error("the server failed while preparing the prompt")]
    Panicked,
}

impl From<EmbedError> for PipelineError {
    fn from(error: EmbedError) -> Self {
        match error {
            EmbedError::Unsupported => Self::NoEmbeddings,
            EmbedError::Submit(error) => Self::Submit(error),
            EmbedError::Engine(error) => Self::Engine(error),
        }
    }
}

impl Hint for PipelineError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Template(error) => error.hint(),
            Self::NoTokenizer => Some("download tokenizer.json into the model's directory and start again".into()),
            Self::NoTools { .. } => Some("leave `tools` out, or serve a model that was trained to call tools".into()),
            Self::TokensUnknown => Some("serve the model with a backend that takes tokens".into()),
            Self::NoEmbeddings => Some("serve the model with a backend that gives them; GET /v1/models says so".into()),
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
            Self::Submit(_) | Self::Rejected(_) | Self::Tokenizer(_) | Self::Engine(_) | Self::Panicked => None,
        }
    }
}
