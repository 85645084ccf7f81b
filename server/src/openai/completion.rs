//! `POST /v1/completions`: the request.

use std::fmt;

use serde::{Deserialize, Deserializer, de};
use serde_json::{Value, json};

use super::{
    BadRequest,
    fields::{Shared, refuse_set, request, tokens_max},
};
use crate::pipeline::{Ask, Subject};

request! {
    /// The body of a text completion.
    CompletionRequest {
        prompt: Option<Prompt>,
        logprobs: Option<u32>,
        echo: Option<Value>,
        suffix: Option<Value>,
        best_of: Option<Value>,
    }
}

/// What to continue: text, or token ids.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// One text; a list of one is the same.
    Text(String),
    /// One list of token ids.
    Tokens(Vec<u32>),
    /// Several prompts at once, which is not supported.
    Several,
}

/// An element of a list given as the prompt.
enum Element {
    Text(String),
    Token(u32),
    List(Vec<u32>),
}

impl<'de> Deserialize<'de> for Element {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Element;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a token id")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Element, E> {
                Ok(Element::Text(text.to_owned()))
            }

            fn visit_u64<E: de::Error>(self, id: u64) -> Result<Element, E> {
                let id = u32::try_from(id).map_err(|_| E::invalid_value(de::Unexpected::Unsigned(id), &self))?;
                Ok(Element::Token(id))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Element, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Element::List)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl<'de> Deserialize<'de> for Prompt {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Prompt;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of token ids")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompt, E> {
                Ok(Prompt::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Prompt, E> {
                Ok(Prompt::Text(text))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Prompt, A::Error> {
                let mut prompt = None;
                while let Some(element) = seq.next_element()? {
                    prompt = Some(match (prompt, element) {
                        (None, Element::Text(text)) => Prompt::Text(text),
                        (None, Element::Token(id)) => Prompt::Tokens(vec![id]),
                        (None, Element::List(ids)) => Prompt::Tokens(ids),
                        (Some(Prompt::Tokens(mut ids)), Element::Token(id)) => {
                            ids.push(id);
                            Prompt::Tokens(ids)
                        }
                        (Some(_), _) => Prompt::Several,
                    });
                }
                Ok(prompt.unwrap_or(Prompt::Tokens(Vec::new())))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

impl CompletionRequest {
    /// Checks everything that does not depend on the model, and translates it. `id` names the job.
    pub fn ask(self, id: &str) -> Result<(Shared, Ask), BadRequest> {
        let shared = self.shared()?;
        refuse_set(&[
            ("echo", &self.echo, json!(false), "the answer holds what was generated, and nothing else"),
            ("suffix", &self.suffix, json!(""), "prompts are continued, not filled in"),
            ("best_of", &self.best_of, json!(1), "send one request for each answer"),
        ])?;
        let subject = match self.prompt.ok_or_else(|| BadRequest::missing("prompt"))? {
            Prompt::Text(text) => Subject::Text(text),
            Prompt::Tokens(ids) => Subject::Tokens(ids),
            Prompt::Several => {
                return Err(BadRequest::unsupported("prompt", "send one request for each prompt"));
            }
        };
        let ask = Ask {
            sampling: shared.sampling.clone(),
            tokens_max: tokens_max("max_tokens", self.max_tokens)?,
            ignore_eos: shared.ignore_eos,
            logprobs: self.logprobs,
            stop: shared.stop.clone(),
            ..Ask::new(id, subject)
        };
        Ok((shared, ask))
    }
}
