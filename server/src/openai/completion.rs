//! `POST /v1/completions`: the request.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, Error as _},
};
use serde_json::{Value, json};

use super::{
    BadRequest,
    fields::{CHOICES_MAX, Shared, refuse_set, request, tokens_max},
};
use crate::pipeline::{Ask, Subject};

/// Most prompts of a request.
pub const PROMPTS_MAX: usize = 16;
/// Most alternatives that can be asked for with each token.
const LOGPROBS_MAX: u32 = 20;

request! {
    /// The body of a text completion.
    CompletionRequest {
        #[schemars(required)]
        prompt: Option<Prompts>,
        #[schemars(range(max = 20))]
        logprobs: Option<u32>,
        /// Put the prompt in front of the answer.
        echo: Option<bool>,
        #[schemars(extend("enum" = ["", null]))]
        suffix: Option<Value>,
        /// Write so many answers, and give the likeliest of them.
        best_of: Option<u32>,
    }
}

/// What to continue: texts, or lists of token ids.
#[derive(Clone, Debug)]
pub struct Prompts(pub Vec<Subject>);

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

impl<'de> Deserialize<'de> for Prompts {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Prompts;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string, a list of token ids, or a list of either")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Prompts, E> {
                Ok(Prompts(vec![Subject::Text(text.to_owned())]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, mut seq: A) -> Result<Prompts, A::Error> {
                let mixed = || A::Error::invalid_value(de::Unexpected::Other("a mix of texts and tokens"), &Visitor);
                let (mut prompts, mut tokens) = (Vec::new(), Vec::new());
                while let Some(element) = seq.next_element()? {
                    match element {
                        Element::Token(id) if prompts.is_empty() => tokens.push(id),
                        _ if !tokens.is_empty() => return Err(mixed()),
                        Element::Text(text) => prompts.push(Subject::Text(text)),
                        Element::List(ids) => prompts.push(Subject::Tokens(ids)),
                        Element::Token(_) => return Err(mixed()),
                    }
                }
                if prompts.is_empty() {
                    prompts.push(Subject::Tokens(tokens));
                }
                Ok(Prompts(prompts))
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// What a request for text completions comes to.
#[derive(Debug)]
pub struct CompletionAsk {
    /// One for each prompt.
    pub asks: Vec<Ask>,
    /// Answers to each prompt that are given. Where the asks have more, the likeliest.
    pub n: u32,
}

impl CompletionRequest {
    /// Checks everything that does not depend on the model, and translates it. `id` names the jobs.
    pub fn ask(self, id: &str) -> Result<(Shared, CompletionAsk), BadRequest> {
        let shared = self.shared()?;
        refuse_set(&[("suffix", &self.suffix, json!(""), "prompts are continued, not filled in")])?;
        let echo = self.echo.unwrap_or(false);
        if echo && self.logprobs.is_some() {
            return Err(BadRequest::unsupported("echo", "the prompt's own probabilities are not computed"));
        }
        if self.logprobs.is_some_and(|top| top > LOGPROBS_MAX) {
            return Err(BadRequest::value("logprobs", format!("has to be between 0 and {LOGPROBS_MAX}")));
        }
        let choices = self.best_of.unwrap_or(shared.n);
        if !(shared.n..=CHOICES_MAX).contains(&choices) {
            let what = format!("has to be between `n` and {CHOICES_MAX}");
            return Err(BadRequest::value("best_of", what));
        }
        let ranked = choices > shared.n;
        if ranked && shared.stream {
            return Err(BadRequest::value(
                "best_of",
                "cannot go with `stream`: answers are ranked when they are whole",
            ));
        }
        let prompts = self.prompt.ok_or_else(|| BadRequest::missing("prompt"))?.0;
        if prompts.len() > PROMPTS_MAX {
            let what = format!("has {} prompts; at most {PROMPTS_MAX} are possible", prompts.len());
            return Err(BadRequest::value("prompt", what));
        }
        let tokens_max = tokens_max("max_tokens", self.max_tokens)?;
        let ask = |(index, subject)| Ask {
            sampling: shared.sampling.clone(),
            tokens_max,
            tokens_min: shared.tokens_min,
            ignore_eos: shared.ignore_eos,
            logprobs: self.logprobs,
            ranked,
            stop: shared.stop.clone(),
            grammar: shared.grammar.clone(),
            choices,
            echo,
            ..Ask::new(if index == 0 { id.to_owned() } else { format!("{id}-p{index}") }, subject)
        };
        let asks = prompts.into_iter().enumerate().map(ask).collect();
        Ok((shared.clone(), CompletionAsk { asks, n: shared.n }))
    }
}
