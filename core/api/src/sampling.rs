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
