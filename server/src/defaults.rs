//! The sampling that a model's own `generation_config.json` asks for, where a request does not say.

use mesh_core::{Capabilities, Knob, ModelProfile, Sampling};
use serde::Deserialize;
use serde_json::Value;

/// The field of a message and its chunks that holds reasoning.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningField {
    /// `reasoning_content`.
    #[default]
    ReasoningContent,
    /// `reasoning`.
    Reasoning,
    /// Both of them.
    Both,
}

/// How a model is presented to clients.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Manner {
    /// Where reasoning is.
    pub reasoning_field: ReasoningField,
    /// Whether the model's `generation_config.json` counts where a request does not say.
    pub generation_config: bool,
}

impl Default for Manner {
    fn default() -> Self {
        Self { reasoning_field: ReasoningField::default(), generation_config: true }
    }
}

/// What the model's `generation_config.json` says that the engine can do, within the ranges of requests. Says so in the log.
pub(crate) fn sampling(profile: &ModelProfile, capabilities: &Capabilities) -> Sampling {
    let config = &profile.generation_config;
    let mut sampling = Sampling::default();
    // Authors who say that nothing is drawn leave the library's other defaults standing beside it.
    if config.get("do_sample") == Some(&Value::Bool(false)) {
        return sampling;
    }
    let mut said = Vec::new();
    let mut set = |slot: &mut Option<f32>, key: &str, knob: Knob, low: f32, high: f32| {
        let Some(value) = config.get(key).and_then(Value::as_f64).map(|value| value as f32) else { return };
        if !(low..=high).contains(&value) {
            tracing::warn!(model = %profile.name, key, value, "generation_config.json is out of range; left out");
        } else if !capabilities.knobs.contains(&knob) {
            tracing::info!(model = %profile.name, key, value, "the backend lacks what generation_config.json asks for");
        } else {
            said.push(format!("{key} {value}"));
            *slot = Some(value);
        }
    };
    let above_zero = f32::MIN_POSITIVE;
    set(&mut sampling.temperature, "temperature", Knob::Temperature, 0.0, 2.0);
    set(&mut sampling.top_p, "top_p", Knob::TopP, above_zero, 1.0);
    set(&mut sampling.min_p, "min_p", Knob::MinP, 0.0, 1.0);
    set(&mut sampling.typical_p, "typical_p", Knob::TypicalP, above_zero, 1.0);
    set(&mut sampling.repetition_penalty, "repetition_penalty", Knob::RepetitionPenalty, above_zero, 10.0);
    let mut top_k = None;
    set(&mut top_k, "top_k", Knob::TopK, 0.0, 1e6);
    sampling.top_k = top_k.map(|top_k| top_k as u32);
    if !said.is_empty() {
        let values = said.join(", ");
        tracing::info!(model = %profile.name, %values, "requests that do not say get generation_config.json's sampling");
    }
    sampling
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use mesh_core::{Fact, OutputForm, PromptForm, Source, WeightFormat};
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_said_within_ranges_and_can_be_done_counts() {
        let capabilities = Capabilities {
            prompt: PromptForm::Tokens,
            output: OutputForm::Tokens,
            knobs: BTreeSet::from([Knob::Temperature, Knob::TopP, Knob::TopK]),
            context_tokens_max: 1,
            requests_parallel_max: 1,
            requests_queued_max: 1,
            prefix_reuse: false,
            embeddings: false,
            vision: false,
        };
        let of = |generation_config: Value| {
            let format = Fact::new(WeightFormat::Safetensors, Source::file("x"));
            let profile = ModelProfile::of_files("m".into(), "m".into(), vec![], format, 1);
            sampling(&ModelProfile { generation_config, ..profile }, &capabilities)
        };
        let said = json!({ "temperature": 0.6, "top_p": 7, "top_k": 20, "min_p": 0.1, "bos_token_id": 1 });
        let expected = Sampling { temperature: Some(0.6), top_k: Some(20), ..Sampling::default() };
        assert_eq!(of(said), expected);
        assert_eq!(of(json!({ "do_sample": false, "temperature": 0.6 })), Sampling::default());
        assert_eq!(of(Value::Null), Sampling::default());
    }
}
