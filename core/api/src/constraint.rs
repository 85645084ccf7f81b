//! What an answer has to look like, and who says at each step which tokens keep to it.

use std::{fmt, sync::Arc};

use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::capability::Knob;

/// What an answer has to be, whole.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Grammar {
    /// A JSON object, whichever.
    JsonObject,
    /// A JSON value that the schema validates.
    JsonSchema(Arc<Value>),
    /// A text that the regular expression matches from its beginning to its end.
    Regex(Arc<str>),
    /// A text of the language that a Lark grammar describes.
    Lark(Arc<str>),
}

impl Grammar {
    /// The capability it takes.
    pub fn knob(&self) -> Knob {
        match self {
            Self::JsonObject | Self::JsonSchema(_) => Knob::JsonSchema,
            Self::Regex(_) => Knob::Regex,
            Self::Lark(_) => Knob::Lark,
        }
    }
}

/// A grammar, and for engines that take tokens, what keeps to it.
#[derive(Clone, Debug)]
pub struct Constraint {
    /// What the answer has to be. Engines that take text enforce it by themselves.
    pub grammar: Grammar,
    /// Made by whoever has the tokenizer; present where the engine's prompts are tokens.
    pub rules: Option<Arc<dyn Rules>>,
}

/// The same answers are possible; who enforces it does not matter.
impl PartialEq for Constraint {
    fn eq(&self, other: &Self) -> bool {
        self.grammar == other.grammar
    }
}

/// A grammar in terms of one vocabulary.
pub trait Rules: Send + Sync + fmt::Debug {
    /// Follows one answer from its first token.
    fn follow(&self) -> Box<dyn Follower>;
}

/// Follows one answer. Costs time and no device.
pub trait Follower: Send {
    /// Sets `allowed` to the tokens that may come next: bit `i % 32` of word `i / 32` for token `i`. End-of-text tokens are
    /// among them where the answer may end, and nothing else is where it has to.
    ///
    /// # Errors
    ///
    /// The grammar became too costly to follow; for people.
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String>;

    /// Goes on by one token, which was among those allowed and is no end-of-text token.
    ///
    /// # Errors
    ///
    /// The token is not possible here; for people.
    fn take(&mut self, id: u32) -> Result<(), String>;
}
