//! How the next token is chosen.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::capability::Knob;

/// Sampling parameters. `None` leaves the step out; nothing is filled in behind the user's back.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Sampling {
    /// Divides the logits, 0 or more; 0 takes the likeliest token. Absent means 1.
    pub temperature: Option<f32>,
    /// Keeps the smallest set of tokens whose probabilities sum to this, above 0 and at most 1.
    pub top_p: Option<f32>,
    /// Keeps this many of the likeliest tokens; 0 keeps all.
    pub top_k: Option<u32>,
    /// Keeps tokens at least this fraction as likely as the likeliest, 0 to 1.
    pub min_p: Option<f32>,
    /// Keeps the tokens closest to the distribution's entropy whose probabilities sum to this, above 0 and at most 1.
    pub typical_p: Option<f32>,
    /// Now and then leaves out the likeliest tokens.
    pub xtc: Option<Xtc>,
    /// Makes tokens less likely that would go on repeating what was said before.
    pub dry: Option<Dry>,
    /// Makes sampling repeatable.
    pub seed: Option<u64>,
    /// Divides (or multiplies, if negative) the logits of tokens seen; 1 changes nothing.
    pub repetition_penalty: Option<f32>,
    /// Subtracted once from tokens already generated, −2 to 2.
    pub presence_penalty: Option<f32>,
    /// Subtracted for each time a token was generated, −2 to 2.
    pub frequency_penalty: Option<f32>,
    /// Added to single tokens' logits, −100 to 100.
    pub logit_bias: BTreeMap<u32, f32>,
}

/// "Exclude top choices": with some probability, all tokens above a threshold but the least likely of them are left out.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Xtc {
    /// How often it applies, above 0 and at most 1.
    pub probability: f32,
    /// From which probability on a token is a top choice, 0 to 0.5; above 0.5 there are never two.
    pub threshold: f32,
}

/// "Don't repeat yourself": a token that would make the longest suffix of the text, which occurred before, longer by one loses
/// `multiplier · base^(length − allowed_length)` of its logit.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Dry {
    /// The loss at the length that is just not allowed, above 0.
    pub multiplier: f32,
    /// How much more each further token costs, 1 or more.
    pub base: f32,
    /// Tokens that may be repeated for nothing.
    pub allowed_length: u32,
    /// Tokens of prompt and answer that are looked at, from the end; absent means all.
    pub last_n: Option<u32>,
    /// Texts that no repetition goes across.
    pub sequence_breakers: Vec<String>,
    /// The tokens that hold one of those texts, for engines that take tokens.
    pub breaker_ids: Vec<u32>,
}

impl Sampling {
    /// The likeliest token each time.
    pub fn greedy() -> Self {
        Self { temperature: Some(0.0), ..Self::default() }
    }

    /// The parameters that are set.
    pub fn knobs(&self) -> Vec<Knob> {
        [
            (self.temperature.is_some(), Knob::Temperature),
            (self.top_p.is_some(), Knob::TopP),
            (self.top_k.is_some(), Knob::TopK),
            (self.min_p.is_some(), Knob::MinP),
            (self.typical_p.is_some(), Knob::TypicalP),
            (self.xtc.is_some(), Knob::Xtc),
            (self.dry.is_some(), Knob::Dry),
            (self.seed.is_some(), Knob::Seed),
            (self.repetition_penalty.is_some(), Knob::RepetitionPenalty),
            (self.presence_penalty.is_some(), Knob::PresencePenalty),
            (self.frequency_penalty.is_some(), Knob::FrequencyPenalty),
            (!self.logit_bias.is_empty(), Knob::LogitBias),
        ]
        .into_iter()
        .filter_map(|(set, knob)| set.then_some(knob))
        .collect()
    }
}
