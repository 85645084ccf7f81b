//! A request as every surface asks it and every node passes it on: translated, and within its ranges.

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::{chat::Message, constraint::Grammar, sampling::Sampling};

/// One request, translated and within its ranges.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Ask {
    /// Names it in logs.
    pub id: String,
    /// What is asked.
    pub subject: Subject,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate; absent means up to the end of the context.
    pub tokens_max: Option<u32>,
    /// Tokens before which the answer does not end by itself.
    pub tokens_min: Option<u32>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Alternatives to report with each token.
    pub logprobs: Option<u32>,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// What the answer has to be.
    pub grammar: Option<Grammar>,
    /// Answers to write.
    pub choices: u32,
    /// Find out how likely each answer is, whether its tokens' probabilities are reported or not.
    pub ranked: bool,
    /// Put the prompt in front of the answer.
    pub echo: bool,
}

impl Ask {
    /// A request for the answer to `subject`, with nothing set.
    pub fn new(id: impl Into<String>, subject: Subject) -> Self {
        Self {
            id: id.into(),
            subject,
            sampling: Sampling::default(),
            tokens_max: None,
            tokens_min: None,
            ignore_eos: false,
            logprobs: None,
            stop: Vec::new(),
            grammar: None,
            choices: 1,
            ranked: false,
            echo: false,
        }
    }

    /// The request for one of its answers, as it would be if it stood alone.
    pub fn choice(&self, index: u32) -> Self {
        let mut one = Self { choices: 1, ..self.clone() };
        if index > 0 {
            one.id = format!("{}-{index}", self.id);
            one.sampling.seed = self.sampling.seed.map(|seed| seed.wrapping_add(index.into()));
        }
        one
    }
}

/// What is asked.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Subject {
    /// The next message of a conversation.
    Chat(Chat),
    /// The continuation of a text.
    Text(String),
    /// The continuation of tokens, to which nothing is added.
    Tokens(Vec<u32>),
}

/// A conversation to be continued.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Chat {
    /// The messages so far.
    pub messages: Vec<Message>,
    /// Tools the model may call, as JSON schemas for the template.
    pub tools: Vec<Value>,
    /// Which of them it has to call.
    pub tool_choice: ToolChoice,
    /// The answer ends with its first call.
    pub single_call: bool,
    /// Further template variables.
    pub kwargs: Map<String, Value>,
    /// How much reasoning is asked for, if the request says.
    pub effort: Option<Effort>,
    /// Most tokens of reasoning.
    pub thinking_tokens_max: Option<u32>,
}

/// Whether tools have to be called.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToolChoice {
    /// The model decides.
    #[default]
    Auto,
    /// One of them.
    Required,
    /// This one.
    Named(String),
}

/// How much reasoning is asked for.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effort {
    /// On or off: `enable_thinking`.
    Switch(bool),
    /// A named level: `reasoning_effort`. `none` switches it off.
    Level(String),
}
