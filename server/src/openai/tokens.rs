//! `/tokenize`, `/detokenize` and `/apply-template`, as llama-server and vLLM users know them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{
    BadRequest,
    message::{self, WireMessage},
};
use crate::pipeline::Chat;

/// The body of `/tokenize`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct TokenizeRequest {
    /// May be left out where one model is served.
    pub model: Option<String>,
    /// A text; nothing is added to it unless `add_special` says so.
    pub content: Option<String>,
    /// A text as a completion would have it: with the begin-of-text token, unless `add_special` says otherwise.
    pub prompt: Option<String>,
    /// A conversation, which the model's template renders.
    #[schemars(length(min = 1))]
    pub messages: Option<Vec<WireMessage>>,
    pub tools: Option<Vec<Value>>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    pub add_generation_prompt: Option<bool>,
    /// Whether the tokenizer adds its own begin-of-text token and the like.
    pub add_special: Option<bool>,
    /// The same, by another name.
    pub add_special_tokens: Option<bool>,
    /// Special tokens in the text are recognised; `false` is refused.
    #[schemars(extend("enum" = [true, null]))]
    pub parse_special: Option<bool>,
    /// Say what each token stands for: `tokens` become objects of `id` and `piece`.
    pub with_pieces: Option<bool>,
    /// Say what each token stands for, in `token_strs`.
    pub return_token_strs: Option<bool>,
}

/// What is to be tokenized.
#[derive(Clone, Debug)]
pub enum Tokenizable {
    /// A text.
    Text(String),
    /// A conversation, and whether the assistant is made to speak.
    Chat(Chat, bool),
}

/// `/tokenize`, checked.
#[derive(Clone, Debug)]
pub struct Tokenize {
    /// What.
    pub what: Tokenizable,
    /// Whether the tokenizer adds its own begin-of-text token and the like.
    pub add_special: bool,
    /// Each token with its piece.
    pub pieces: bool,
    /// The pieces beside the tokens.
    pub strings: bool,
}

impl TokenizeRequest {
    /// Checks it.
    pub fn check(self) -> Result<Tokenize, BadRequest> {
        if self.parse_special == Some(false) {
            return Err(BadRequest::unsupported("parse_special", "special tokens in a text are always recognised"));
        }
        let given = match (self.add_special, self.add_special_tokens) {
            (Some(one), Some(other)) if one != other => {
                return Err(BadRequest::value("add_special_tokens", "contradicts `add_special`; give one of them"));
            }
            (one, other) => one.or(other),
        };
        let of_chat = [
            ("tools", self.tools.is_some()),
            ("chat_template_kwargs", self.chat_template_kwargs.is_some()),
            ("add_generation_prompt", self.add_generation_prompt.is_some()),
        ];
        let (what, add_special) = match (self.content, self.prompt, self.messages) {
            (None, None, Some(messages)) => {
                let chat = chat(messages, self.tools, self.chat_template_kwargs)?;
                (Tokenizable::Chat(chat, self.add_generation_prompt.unwrap_or(true)), false)
            }
            (content, prompt, None) => {
                if let Some((name, _)) = of_chat.into_iter().find(|(_, set)| *set) {
                    return Err(BadRequest::value(name, "is only possible with `messages`"));
                }
                match (content, prompt) {
                    (Some(text), None) => (Tokenizable::Text(text), false),
                    (None, Some(text)) => (Tokenizable::Text(text), true),
                    (Some(_), Some(_)) => {
                        return Err(BadRequest::value("prompt", "cannot go with `content`; give one of them"));
                    }
                    (None, None) => return Err(BadRequest::missing("content")),
                }
            }
            _ => return Err(BadRequest::value("messages", "cannot go with a text; give one of them")),
        };
        Ok(Tokenize {
            what,
            add_special: given.unwrap_or(add_special),
            pieces: self.with_pieces.unwrap_or(false),
            strings: self.return_token_strs.unwrap_or(false),
        })
    }
}

fn chat(
    messages: Vec<WireMessage>,
    tools: Option<Vec<Value>>,
    kwargs: Option<Map<String, Value>>,
) -> Result<Chat, BadRequest> {
    let tools = tools.unwrap_or_default();
    message::tools(&tools)?;
    let messages = message::messages(messages)?;
    Ok(Chat { messages, tools, kwargs: kwargs.unwrap_or_default(), ..Chat::default() })
}

/// What `/tokenize` answers.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Tokenized {
    /// The tokens.
    pub tokens: Vec<WireToken>,
    /// How many there are.
    pub count: usize,
    /// Longest prompt and answer together, in tokens.
    pub max_model_len: u32,
    /// What they stand for, if asked for; incomplete characters are U+FFFD.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub token_strs: Option<Vec<String>>,
}

/// A token.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum WireToken {
    /// Its id.
    Id(u32),
    /// With what it stands for.
    Piece {
        /// Its id.
        id: u32,
        /// What it stands for.
        piece: Piece,
    },
}

/// What a token stands for.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[serde(untagged)]
pub enum Piece {
    /// A text.
    Text(String),
    /// Bytes that are no text by themselves.
    Bytes(Vec<u8>),
}

impl From<Vec<u8>> for Piece {
    fn from(bytes: Vec<u8>) -> Self {
        String::from_utf8(bytes).map_or_else(|error| Self::Bytes(error.into_bytes()), Self::Text)
    }
}

/// The body of `/detokenize`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct DetokenizeRequest {
    /// May be left out where one model is served.
    pub model: Option<String>,
    /// The token ids.
    #[schemars(required)]
    pub tokens: Option<Vec<u32>>,
}

/// What `/detokenize` answers: the text, under both of its usual names.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Detokenized {
    pub content: String,
    pub prompt: String,
}

/// The body of `/apply-template`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct TemplateRequest {
    /// May be left out where one model is served.
    pub model: Option<String>,
    #[schemars(required, length(min = 1))]
    pub messages: Option<Vec<WireMessage>>,
    pub tools: Option<Vec<Value>>,
    pub chat_template_kwargs: Option<Map<String, Value>>,
    /// Whether the assistant is made to speak; true unless given.
    pub add_generation_prompt: Option<bool>,
}

impl TemplateRequest {
    /// The conversation, and whether the assistant is made to speak.
    pub fn check(self) -> Result<(Chat, bool), BadRequest> {
        let messages = self.messages.ok_or_else(|| BadRequest::missing("messages"))?;
        let chat = chat(messages, self.tools, self.chat_template_kwargs)?;
        Ok((chat, self.add_generation_prompt.unwrap_or(true)))
    }
}

/// What `/apply-template` answers.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct Templated {
    /// The conversation as the model gets it.
    pub prompt: String,
}
