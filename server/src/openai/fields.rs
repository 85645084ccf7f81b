//! Parameters that chat and text completions share, and their ranges.

use std::{collections::BTreeMap, fmt};

use mesh_core::Sampling;
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::BadRequest;

/// Most stop strings a request may have.
pub const STOPS_MAX: usize = 4;
/// Longest stop string, in bytes.
pub const STOP_BYTES_MAX: usize = 1024;
/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Send one more chunk with the usage before the end.
    pub include_usage: Option<bool>,
}

/// One string or several.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Strings(pub Vec<String>);

impl<'de> Deserialize<'de> for Strings {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Strings;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of strings")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Strings, E> {
                Ok(Strings(vec![text.to_owned()]))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Strings, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Strings)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// Declares a request: its own fields and those that both requests share.
macro_rules! request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, serde::Deserialize, schemars::JsonSchema)]
        #[serde(deny_unknown_fields, expecting = "an object")]
        #[allow(missing_docs)]
        pub struct $name {
            $($(#[$field_meta])* pub $field: $type,)*
            pub model: Option<String>,
            pub stream: Option<bool>,
            pub stream_options: Option<$crate::openai::fields::StreamOptions>,
            pub max_tokens: Option<u32>,
            pub temperature: Option<f32>,
            pub top_p: Option<f32>,
            pub top_k: Option<u32>,
            pub min_p: Option<f32>,
            pub seed: Option<u64>,
            pub stop: Option<$crate::openai::fields::Strings>,
            pub n: Option<u32>,
            pub presence_penalty: Option<f32>,
            pub frequency_penalty: Option<f32>,
            pub repetition_penalty: Option<f32>,
            pub logit_bias: Option<std::collections::BTreeMap<String, f32>>,
            pub ignore_eos: Option<bool>,
            /// Says who asks. Accepted and put to no use: it is neither logged nor kept.
            pub user: Option<String>,
        }

        impl $name {
            /// The shared parameters, checked.
            pub fn shared(&self) -> Result<$crate::openai::fields::Shared, $crate::openai::BadRequest> {
                $crate::openai::fields::Raw {
                    model: self.model.as_deref(),
                    stream: self.stream,
                    stream_options: self.stream_options,
                    temperature: self.temperature,
                    top_p: self.top_p,
                    top_k: self.top_k,
                    min_p: self.min_p,
                    seed: self.seed,
                    stop: self.stop.as_ref(),
                    n: self.n,
                    presence_penalty: self.presence_penalty,
                    frequency_penalty: self.frequency_penalty,
                    repetition_penalty: self.repetition_penalty,
                    logit_bias: self.logit_bias.as_ref(),
                    ignore_eos: self.ignore_eos,
                }
                .check()
            }
        }
    };
}
pub(crate) use request;

/// The shared parameters as they came.
#[allow(missing_docs)]
pub struct Raw<'a> {
    pub model: Option<&'a str>,
    pub stream: Option<bool>,
    pub stream_options: Option<StreamOptions>,
    pub temperature: Option<f32>,
    pub top_p: Option<f32>,
    pub top_k: Option<u32>,
    pub min_p: Option<f32>,
    pub seed: Option<u64>,
    pub stop: Option<&'a Strings>,
    pub n: Option<u32>,
    pub presence_penalty: Option<f32>,
    pub frequency_penalty: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub logit_bias: Option<&'a BTreeMap<String, f32>>,
    pub ignore_eos: Option<bool>,
}

/// The shared parameters, within their ranges.
#[derive(Clone, Debug, PartialEq)]
pub struct Shared {
    /// Who shall answer.
    pub model: String,
    /// Answer in events rather than at once.
    pub stream: bool,
    /// Send the usage as the last event.
    pub include_usage: bool,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Strings that end the answer.
    pub stop: Vec<String>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
}

impl Raw<'_> {
    /// Checks ranges.
    pub fn check(self) -> Result<Shared, BadRequest> {
        let model = self.model.filter(|model| !model.is_empty()).ok_or_else(|| BadRequest::missing("model"))?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(BadRequest::value("stream_options", "is only possible with `stream`: true"));
        }
        match self.n {
            None | Some(1) => {}
            Some(0) => return Err(BadRequest::value("n", "has to be 1")),
            Some(_) => return Err(BadRequest::unsupported("n", "send one request for each answer")),
        }
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        if self.top_p == Some(0.0) {
            return Err(BadRequest::value("top_p", "has to be above 0 and at most 1"));
        }
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        within("repetition_penalty", self.repetition_penalty, 0.0, 10.0)?;
        if self.repetition_penalty == Some(0.0) {
            return Err(BadRequest::value("repetition_penalty", "has to be above 0 and at most 10"));
        }
        Ok(Shared {
            model: model.to_owned(),
            stream,
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                seed: self.seed,
                repetition_penalty: self.repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias: logit_bias(self.logit_bias)?,
                ..Sampling::default()
            },
            stop: stops("stop", self.stop.map(|stops| stops.0.clone()).unwrap_or_default())?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
        })
    }
}

pub(crate) fn within(param: &str, value: Option<f32>, low: f32, high: f32) -> Result<(), BadRequest> {
    match value {
        Some(value) if !(low..=high).contains(&value) => {
            Err(BadRequest::value(param, format!("is {value}; it has to be between {low} and {high}")))
        }
        _ => Ok(()),
    }
}

/// Checks a count of tokens to generate.
pub fn tokens_max(param: &str, value: Option<u32>) -> Result<Option<u32>, BadRequest> {
    if value == Some(0) { Err(BadRequest::value(param, "has to be 1 or more")) } else { Ok(value) }
}

/// Checks the strings that end an answer.
pub(crate) fn stops(param: &str, stops: Vec<String>) -> Result<Vec<String>, BadRequest> {
    if stops.len() > STOPS_MAX {
        return Err(BadRequest::value(param, format!("has {} strings; at most {STOPS_MAX} are possible", stops.len())));
    }
    for (index, stop) in stops.iter().enumerate() {
        if stop.is_empty() || stop.len() > STOP_BYTES_MAX {
            return Err(BadRequest::value(
                format!("{param}[{index}]"),
                format!("has {} bytes; it has to have between 1 and {STOP_BYTES_MAX}", stop.len()),
            ));
        }
    }
    Ok(stops)
}

fn logit_bias(entries: Option<&BTreeMap<String, f32>>) -> Result<BTreeMap<u32, f32>, BadRequest> {
    let Some(entries) = entries else { return Ok(BTreeMap::new()) };
    if entries.len() > LOGIT_BIAS_MAX {
        let what = format!("has {} entries; at most {LOGIT_BIAS_MAX} are possible", entries.len());
        return Err(BadRequest::value("logit_bias", what));
    }
    entries
        .iter()
        .map(|(key, bias)| {
            let id = key.parse().map_err(|_| BadRequest::value("logit_bias", "has to have token ids as its keys"))?;
            within(&format!("logit_bias.{id}"), Some(*bias), -100.0, 100.0)?;
            Ok((id, *bias))
        })
        .collect()
}

/// Refuses the fields that are set to anything but their trivial value. `Null` as the trivial value means that there is
/// none.
pub fn refuse_set(fields: &[(&str, &Option<Value>, Value, &str)]) -> Result<(), BadRequest> {
    for (param, value, trivial, why) in fields {
        if value.as_ref().is_some_and(|value| value != trivial) {
            return Err(BadRequest::unsupported(*param, *why));
        }
    }
    Ok(())
}
