//! `logprobs`: which tokens an answer is made of, and how likely they were, in the two forms of the API.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::pipeline::{Likely, TokenText};

/// `logprobs` of a chat completion or one of its chunks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatLogprobs {
    /// The tokens, in order: of reasoning, calls and content alike.
    pub content: Vec<ChatToken>,
    /// Tokens of a refusal, which is never told apart.
    pub refusal: Option<Vec<ChatToken>>,
}

/// A token, and what could have stood in its place.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ChatToken {
    /// The token.
    #[serde(flatten)]
    pub chosen: WireLikely,
    /// The likeliest ones, likeliest first.
    pub top_logprobs: Vec<WireLikely>,
}

/// A token and how likely it was.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct WireLikely {
    /// Its text; U+FFFD where its bytes are no whole characters.
    pub token: String,
    /// The natural logarithm of its probability.
    pub logprob: f32,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// JSON has no infinity: OpenAI's number for what could not have been.
const IMPOSSIBLE: f32 = -9999.0;

fn finite(logprob: f32) -> f32 {
    if logprob.is_finite() { logprob } else { IMPOSSIBLE }
}

impl WireLikely {
    fn of(likely: &Likely) -> Self {
        Self { token: likely.text(), logprob: finite(likely.logprob), bytes: likely.bytes.clone() }
    }
}

impl ChatLogprobs {
    /// Of these tokens.
    pub fn of(tokens: &[TokenText]) -> Self {
        let token = |token: &TokenText| ChatToken {
            chosen: WireLikely::of(&token.chosen),
            top_logprobs: token.top.iter().map(WireLikely::of).collect(),
        };
        Self { content: tokens.iter().map(token).collect(), refusal: None }
    }
}

/// `logprobs` of a text completion or one of its chunks: lists of equal length.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct TextLogprobs {
    pub tokens: Vec<String>,
    pub token_logprobs: Vec<f32>,
    /// The likeliest tokens by their text; of several with one text, the likeliest.
    pub top_logprobs: Vec<Map<String, Value>>,
    /// Characters of the text before each token.
    pub text_offset: Vec<usize>,
}

impl TextLogprobs {
    /// Of these tokens.
    pub fn of(tokens: &[TokenText]) -> Self {
        let mut logprobs = Self::default();
        for token in tokens {
            let mut top = Map::new();
            for likely in token.top.iter().chain([&token.chosen]) {
                top.entry(spelled(likely)).or_insert_with(|| finite(likely.logprob).into());
            }
            logprobs.tokens.push(spelled(&token.chosen));
            logprobs.token_logprobs.push(finite(token.chosen.logprob));
            logprobs.top_logprobs.push(top);
            logprobs.text_offset.push(token.offset_chars);
        }
        logprobs
    }
}

/// A token in a form without bytes of its own: what is no text is spelled as OpenAI spells it.
fn spelled(likely: &Likely) -> String {
    match std::str::from_utf8(&likely.bytes) {
        Ok(text) => text.to_owned(),
        Err(_) => {
            let bytes: String = likely.bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect();
            format!("bytes:{bytes}")
        }
    }
}
