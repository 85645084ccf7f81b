//! An answer as every surface writes it and every node passes it on: read to the end, and in pieces.

use serde::{Deserialize, Serialize};

use crate::engine::{FinishReason, Timings, Usage};

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Delta {
    /// Text for the user.
    Content(String),
    /// Text of the reasoning.
    Reasoning(String),
    /// A whole tool call.
    ToolCall {
        /// Counts the calls of one answer from 0.
        index: u32,
        /// The function's name.
        name: String,
        /// The arguments: the text of a JSON object.
        arguments: String,
    },
    /// A tool call that does not parse, as the model wrote it with its markers. Belongs to the content.
    Malformed {
        /// The text.
        text: String,
    },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Finish {
    /// The engine's own reason.
    Engine(FinishReason),
    /// A stop string of the request.
    StopString,
    /// The model ended its turn to have tools called.
    ToolCalls,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Finished {
    /// Why.
    pub finish: Finish,
    /// How many tokens.
    pub usage: Usage,
    /// How long, where the engine came to say it.
    pub timings: Option<Timings>,
    /// The stop string that ended it, if one did.
    pub stopped_by: Option<String>,
    /// Of the tokens generated, how many were reasoning.
    pub reasoning_tokens: u32,
    /// Tool calls that do not parse; they are part of the content.
    pub malformed_calls: u32,
    /// The tokens that no earlier part reported. An answer that is put together has all of them here.
    pub tokens: Vec<TokenText>,
    /// The mean of the tokens' log-probabilities, where the engine reported them.
    pub logprob_mean: Option<f32>,
}

/// What an answer's stream yields. It ends with exactly one [`Part::Finished`] or one error.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// The request waits for a place; so many are before it.
    Queued {
        /// Requests before it.
        ahead: u32,
    },
    /// The prompt is being read: `done` of `total` tokens.
    Prefill {
        /// Tokens read.
        done: u32,
        /// Tokens in the prompt.
        total: u32,
    },
    /// The tokens of the piece that follows, where probabilities are reported.
    Tokens(Vec<TokenText>),
    /// A piece of the answer.
    Delta(Delta),
    /// The end.
    Finished(Finished),
}

/// A token of an answer, and what could have stood in its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct TokenText {
    /// The token.
    pub chosen: Likely,
    /// The likeliest ones, likeliest first.
    pub top: Vec<Likely>,
    /// Characters of the text before it.
    pub offset_chars: usize,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Likely {
    /// Its bytes, which need not be whole characters.
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

impl Likely {
    /// Its text, where its bytes are whole characters; U+FFFD for others.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.bytes).into_owned()
    }
}
