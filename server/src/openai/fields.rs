//! Parameters that chat and text completions share, and their ranges.

use std::{collections::BTreeMap, fmt, marker::PhantomData};

use mesh_core::{Dry, Grammar, Sampling, Xtc};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::{BadRequest, format};

/// Most stop strings a request may have.
pub const STOPS_MAX: usize = 4;
/// Longest stop string, in bytes.
pub const STOP_BYTES_MAX: usize = 1024;
/// Most entries of `logit_bias`.
pub const LOGIT_BIAS_MAX: usize = 1024;
/// Most answers to one prompt.
pub const CHOICES_MAX: u32 = 8;
/// Most `dry_sequence_breakers`.
pub const BREAKERS_MAX: usize = 16;
/// Longest of them, in bytes.
pub const BREAKER_BYTES_MAX: usize = 64;
/// What no repetition goes across if a request does not say.
const BREAKERS: [&str; 4] = ["\n", ":", "\"", "*"];
/// What a further repeated token costs if a request does not say.
const DRY_BASE: f32 = 1.75;
/// How many tokens may be repeated if a request does not say.
const DRY_ALLOWED_LENGTH: u32 = 2;
/// From which probability on a token is a top choice, if a request does not say.
const XTC_THRESHOLD: f32 = 0.1;

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct StreamOptions {
    /// Send one more chunk with the usage before the end.
    pub include_usage: Option<bool>,
}

/// Reads an object or nothing. By itself, serde takes a list for an object, with its fields by position.
pub(crate) fn object<'de, T: Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<Option<T>, D::Error> {
    struct Visitor<T>(PhantomData<T>);
    impl<'de, T: Deserialize<'de>> de::Visitor<'de> for Visitor<T> {
        type Value = Option<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("an object")
        }

        fn visit_unit<E: de::Error>(self) -> Result<Option<T>, E> {
            Ok(None)
        }

        fn visit_map<A: de::MapAccess<'de>>(self, map: A) -> Result<Option<T>, A::Error> {
            T::deserialize(de::value::MapAccessDeserializer::new(map)).map(Some)
        }
    }
    deserializer.deserialize_any(Visitor(PhantomData))
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
            #[schemars(required, length(min = 1))]
            pub model: Option<String>,
            pub stream: Option<bool>,
            #[serde(default, deserialize_with = "crate::openai::fields::object")]
            pub stream_options: Option<$crate::openai::fields::StreamOptions>,
            #[schemars(range(min = 1))]
            pub max_tokens: Option<u32>,
            #[schemars(range(min = 0, max = 2))]
            pub temperature: Option<f32>,
            #[schemars(extend("exclusiveMinimum" = 0), range(max = 1))]
            pub top_p: Option<f32>,
            pub top_k: Option<u32>,
            #[schemars(range(min = 0, max = 1))]
            pub min_p: Option<f32>,
            pub seed: Option<u64>,
            pub stop: Option<$crate::openai::fields::Strings>,
            #[schemars(range(min = 1, max = 8))]
            pub n: Option<u32>,
            #[schemars(range(min = -2, max = 2))]
            pub presence_penalty: Option<f32>,
            #[schemars(range(min = -2, max = 2))]
            pub frequency_penalty: Option<f32>,
            #[schemars(extend("exclusiveMinimum" = 0), range(max = 10))]
            pub repetition_penalty: Option<f32>,
            /// llama.cpp's name of `repetition_penalty`.
            #[schemars(extend("exclusiveMinimum" = 0), range(max = 10))]
            pub repeat_penalty: Option<f32>,
            #[schemars(extend("exclusiveMinimum" = 0), range(max = 1))]
            pub typical_p: Option<f32>,
            #[schemars(range(min = 0, max = 1))]
            pub xtc_probability: Option<f32>,
            #[schemars(range(min = 0, max = 0.5))]
            pub xtc_threshold: Option<f32>,
            #[schemars(range(min = 0, max = 100))]
            pub dry_multiplier: Option<f32>,
            #[schemars(range(min = 1, max = 100))]
            pub dry_base: Option<f32>,
            pub dry_allowed_length: Option<u32>,
            #[schemars(range(min = -1))]
            pub dry_penalty_last_n: Option<i32>,
            #[schemars(length(max = 16), inner(length(min = 1, max = 64)))]
            pub dry_sequence_breakers: Option<Vec<String>>,
            pub min_tokens: Option<u32>,
            pub response_format: Option<serde_json::Value>,
            pub structured_outputs: Option<serde_json::Value>,
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
                    repeat_penalty: self.repeat_penalty,
                    typical_p: self.typical_p,
                    xtc_probability: self.xtc_probability,
                    xtc_threshold: self.xtc_threshold,
                    dry_multiplier: self.dry_multiplier,
                    dry_base: self.dry_base,
                    dry_allowed_length: self.dry_allowed_length,
                    dry_penalty_last_n: self.dry_penalty_last_n,
                    dry_sequence_breakers: self.dry_sequence_breakers.as_deref(),
                    min_tokens: self.min_tokens,
                    response_format: self.response_format.as_ref(),
                    structured_outputs: self.structured_outputs.as_ref(),
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
    pub repeat_penalty: Option<f32>,
    pub typical_p: Option<f32>,
    pub xtc_probability: Option<f32>,
    pub xtc_threshold: Option<f32>,
    pub dry_multiplier: Option<f32>,
    pub dry_base: Option<f32>,
    pub dry_allowed_length: Option<u32>,
    pub dry_penalty_last_n: Option<i32>,
    pub dry_sequence_breakers: Option<&'a [String]>,
    pub min_tokens: Option<u32>,
    pub response_format: Option<&'a Value>,
    pub structured_outputs: Option<&'a Value>,
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
    /// Answers to the prompt.
    pub n: u32,
    /// Tokens before which the answer does not end by itself.
    pub tokens_min: Option<u32>,
    /// What the answer has to be.
    pub grammar: Option<Grammar>,
    /// What the request calls fields that errors know by other names.
    pub names: Vec<(&'static str, &'static str)>,
}

impl Raw<'_> {
    /// Checks ranges.
    pub fn check(self) -> Result<Shared, BadRequest> {
        let model = self.model.filter(|model| !model.is_empty()).ok_or_else(|| BadRequest::missing("model"))?;
        let stream = self.stream.unwrap_or(false);
        if self.stream_options.is_some() && !stream {
            return Err(BadRequest::value("stream_options", "is only possible with `stream`: true"));
        }
        let n = self.n.unwrap_or(1);
        if !(1..=CHOICES_MAX).contains(&n) {
            return Err(BadRequest::value("n", format!("is {n}; it has to be between 1 and {CHOICES_MAX}")));
        }
        within("temperature", self.temperature, 0.0, 2.0)?;
        above_zero("top_p", self.top_p, 1.0)?;
        within("min_p", self.min_p, 0.0, 1.0)?;
        within("presence_penalty", self.presence_penalty, -2.0, 2.0)?;
        within("frequency_penalty", self.frequency_penalty, -2.0, 2.0)?;
        above_zero("typical_p", self.typical_p, 1.0)?;
        let repetition_penalty = self.repetition_penalty()?;
        let (xtc, dry) = (self.xtc()?, self.dry()?);
        Ok(Shared {
            model: model.to_owned(),
            stream,
            include_usage: self.stream_options.and_then(|options| options.include_usage).unwrap_or(false),
            sampling: Sampling {
                temperature: self.temperature,
                top_p: self.top_p,
                top_k: self.top_k,
                min_p: self.min_p,
                typical_p: self.typical_p,
                xtc,
                dry,
                seed: self.seed,
                repetition_penalty,
                presence_penalty: self.presence_penalty,
                frequency_penalty: self.frequency_penalty,
                logit_bias: logit_bias(self.logit_bias)?,
            },
            stop: stops("stop", self.stop.map(|stops| stops.0.clone()).unwrap_or_default())?,
            ignore_eos: self.ignore_eos.unwrap_or(false),
            n,
            tokens_min: self.min_tokens,
            grammar: format::grammar(self.response_format, self.structured_outputs)?,
            names: self.names(),
        })
    }

    fn names(&self) -> Vec<(&'static str, &'static str)> {
        let mut names = Vec::new();
        if self.structured_outputs.is_some() {
            names.push(("response_format", "structured_outputs"));
        }
        if self.repetition_penalty.is_none() && self.repeat_penalty.is_some() {
            names.push(("repetition_penalty", "repeat_penalty"));
        }
        names
    }

    fn repetition_penalty(&self) -> Result<Option<f32>, BadRequest> {
        above_zero("repetition_penalty", self.repetition_penalty, 10.0)?;
        above_zero("repeat_penalty", self.repeat_penalty, 10.0)?;
        match (self.repetition_penalty, self.repeat_penalty) {
            (Some(one), Some(other)) if one != other => {
                Err(BadRequest::value("repeat_penalty", "contradicts `repetition_penalty`; give one of them"))
            }
            (one, other) => Ok(one.or(other)),
        }
    }

    fn xtc(&self) -> Result<Option<Xtc>, BadRequest> {
        within("xtc_probability", self.xtc_probability, 0.0, 1.0)?;
        within("xtc_threshold", self.xtc_threshold, 0.0, 0.5)?;
        match (self.xtc_probability, self.xtc_threshold) {
            (None, Some(_)) => Err(BadRequest::value("xtc_threshold", "is only possible with `xtc_probability`")),
            (None | Some(0.0), _) => Ok(None),
            (Some(probability), threshold) => {
                Ok(Some(Xtc { probability, threshold: threshold.unwrap_or(XTC_THRESHOLD) }))
            }
        }
    }

    fn dry(&self) -> Result<Option<Dry>, BadRequest> {
        within("dry_multiplier", self.dry_multiplier, 0.0, 100.0)?;
        within("dry_base", self.dry_base, 1.0, 100.0)?;
        let breakers = self.dry_sequence_breakers;
        if breakers.is_some_and(|breakers| breakers.len() > BREAKERS_MAX) {
            let what = format!("has more than {BREAKERS_MAX} strings");
            return Err(BadRequest::value("dry_sequence_breakers", what));
        }
        for (index, breaker) in breakers.into_iter().flatten().enumerate() {
            if breaker.is_empty() || breaker.len() > BREAKER_BYTES_MAX {
                let what = format!("has {} bytes; it has to have between 1 and {BREAKER_BYTES_MAX}", breaker.len());
                return Err(BadRequest::value(format!("dry_sequence_breakers[{index}]"), what));
            }
        }
        // As in llama.cpp: -1 stands for the whole context, 0 switches it off.
        let last_n = match self.dry_penalty_last_n {
            None | Some(-1) => None,
            Some(last) => Some(u32::try_from(last).map_err(|_| {
                BadRequest::value("dry_penalty_last_n", "has to be 0 or more tokens, or -1 for all of them")
            })?),
        };
        let Some(multiplier) = self.dry_multiplier else {
            let others = [
                ("dry_base", self.dry_base.is_some()),
                ("dry_allowed_length", self.dry_allowed_length.is_some()),
                ("dry_penalty_last_n", self.dry_penalty_last_n.is_some()),
                ("dry_sequence_breakers", breakers.is_some()),
            ];
            return match others.into_iter().find(|(_, given)| *given) {
                Some((param, _)) => Err(BadRequest::value(param, "is only possible with `dry_multiplier`")),
                None => Ok(None),
            };
        };
        if multiplier == 0.0 || last_n == Some(0) {
            return Ok(None);
        }
        Ok(Some(Dry {
            multiplier,
            base: self.dry_base.unwrap_or(DRY_BASE),
            allowed_length: self.dry_allowed_length.unwrap_or(DRY_ALLOWED_LENGTH),
            last_n,
            sequence_breakers: breakers
                .map_or_else(|| BREAKERS.map(str::to_owned).to_vec(), |breakers| breakers.to_vec()),
            // Whoever has the tokenizer finds them.
            breaker_ids: Vec::new(),
        }))
    }
}

fn above_zero(param: &str, value: Option<f32>, high: f32) -> Result<(), BadRequest> {
    match value {
        Some(value) if !(value > 0.0 && value <= high) => {
            Err(BadRequest::value(param, format!("has to be above 0 and at most {high}")))
        }
        _ => Ok(()),
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
