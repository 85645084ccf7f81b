//! What a backend can do with a model: the data that requests are checked against before they are submitted.

use std::{collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, IntoDeserializer},
};

use crate::engine::Job;

/// The form in which an engine takes a prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum PromptForm {
    /// Token ids; whoever submits has the tokenizer.
    Tokens,
    /// Rendered text; the engine has the tokenizer.
    Text,
    /// Conversations; the engine has the templates and reads answers by itself, as one on another machine does.
    Chat,
}

impl fmt::Display for PromptForm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Tokens => "tokens",
            Self::Text => "text",
            Self::Chat => "chat",
        })
    }
}

/// The form in which an engine answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum OutputForm {
    /// Token ids, one event each.
    Tokens,
    /// Text, already detokenized.
    Text,
    /// Parts of an answer, read to the end.
    Parts,
}

/// A request parameter that an engine may or may not honour. The names are those of the OpenAI API and its common
/// extensions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Knob {
    Temperature,
    TopP,
    TopK,
    MinP,
    TypicalP,
    Xtc,
    Dry,
    Seed,
    RepetitionPenalty,
    PresencePenalty,
    FrequencyPenalty,
    LogitBias,
    IgnoreEos,
    MinTokens,
    Logprobs,
    /// JSON objects and JSON schemas.
    JsonSchema,
    Regex,
    Lark,
}

impl Knob {
    /// The request field's name.
    pub const fn field(self) -> &'static str {
        match self {
            Self::Temperature => "temperature",
            Self::TopP => "top_p",
            Self::TopK => "top_k",
            Self::MinP => "min_p",
            Self::TypicalP => "typical_p",
            Self::Xtc => "xtc_probability",
            Self::Dry => "dry_multiplier",
            Self::Seed => "seed",
            Self::RepetitionPenalty => "repetition_penalty",
            Self::PresencePenalty => "presence_penalty",
            Self::FrequencyPenalty => "frequency_penalty",
            Self::LogitBias => "logit_bias",
            Self::IgnoreEos => "ignore_eos",
            Self::MinTokens => "min_tokens",
            Self::Logprobs => "logprobs",
            Self::JsonSchema | Self::Regex | Self::Lark => "response_format",
        }
    }
}

impl fmt::Display for Knob {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.field())
    }
}

/// What an engine accepts and promises.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capabilities {
    /// How prompts are handed over.
    pub prompt: PromptForm,
    /// How answers come back.
    pub output: OutputForm,
    /// The request parameters that change what it does.
    #[serde(deserialize_with = "known")]
    pub knobs: BTreeSet<Knob>,
    /// Longest prompt and answer together, in tokens.
    pub context_tokens_max: u32,
    /// Requests computed at the same time.
    pub requests_parallel_max: u32,
    /// Requests that may wait beyond those.
    pub requests_queued_max: u32,
    /// True if a prompt's known prefix is not computed again.
    pub prefix_reuse: bool,
    /// True if it gives embeddings.
    pub embeddings: bool,
    /// True if images are understood.
    pub vision: bool,
}

/// The parameters of these names that this program knows. Another machine's may have learned more, which nobody here asks
/// for.
fn known<'de, D: Deserializer<'de>>(deserializer: D) -> Result<BTreeSet<Knob>, D::Error> {
    struct Name(Option<Knob>);

    impl<'de> Deserialize<'de> for Name {
        fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
            struct Visitor;

            impl de::Visitor<'_> for Visitor {
                type Value = Name;

                fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                    f.write_str("a parameter's name")
                }

                fn visit_str<E: de::Error>(self, name: &str) -> Result<Name, E> {
                    let known: Result<Knob, de::value::Error> = Knob::deserialize(name.into_deserializer());
                    Ok(Name(known.ok()))
                }
            }

            deserializer.deserialize_str(Visitor)
        }
    }

    struct Names;

    impl<'de> de::Visitor<'de> for Names {
        type Value = BTreeSet<Knob>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            f.write_str("names of parameters")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut names: A) -> Result<BTreeSet<Knob>, A::Error> {
            let mut known = BTreeSet::new();
            while let Some(Name(knob)) = names.next_element()? {
                known.extend(knob);
            }
            Ok(known)
        }
    }

    deserializer.deserialize_seq(Names)
}

impl Capabilities {
    /// An engine that does nothing beyond the least: one request after the other, none in line, no parameters.
    pub fn new(prompt: PromptForm, output: OutputForm, context_tokens_max: u32) -> Self {
        Self {
            prompt,
            output,
            knobs: BTreeSet::new(),
            context_tokens_max,
            requests_parallel_max: 1,
            requests_queued_max: 0,
            prefix_reuse: false,
            embeddings: false,
            vision: false,
        }
    }

    /// The parameters that `job` sets and this engine would not honour, in order.
    pub fn lacking(&self, job: &Job) -> Vec<Knob> {
        job.knobs().into_iter().filter(|knob| !self.knobs.contains(knob)).collect()
    }
}
