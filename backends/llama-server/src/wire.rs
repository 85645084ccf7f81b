//! What llama-server is sent and sends, typed. Fields that are not used here are not listed.

use std::{sync::Arc, time::Duration};

use mesh_core::{Dry, FinishReason, Grammar, Job, Sampling, Timings, TokenLogprob, Usage};
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Value, json};

/// Body of `POST /tokenize`.
#[derive(Debug, Serialize)]
pub(crate) struct Tokenize<'a> {
    pub content: &'a str,
    pub add_special: bool,
    /// Special tokens in the text are recognised.
    pub parse_special: bool,
}

/// Answer of `POST /tokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct Tokenized {
    pub tokens: Vec<u32>,
}

/// Body of `POST /detokenize`.
#[derive(Debug, Serialize)]
pub(crate) struct Detokenize<'a> {
    pub tokens: &'a [u32],
}

/// Answer of `POST /detokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct Detokenized {
    pub content: String,
}

/// Answer of `GET /props`, as far as it is read.
#[derive(Debug, Deserialize)]
pub(crate) struct Props {
    pub default_generation_settings: SlotSettings,
}

#[derive(Debug, Deserialize)]
pub(crate) struct SlotSettings {
    /// Context of one slot, in tokens.
    pub n_ctx: u32,
}

/// Answer of `GET /v1/models`, as far as it is read.
#[derive(Debug, Deserialize)]
pub(crate) struct Models {
    pub data: Vec<Model>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Model {
    pub meta: Option<Meta>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Meta {
    pub n_vocab: Option<u32>,
}

/// Body of `POST /completion` that asks for the likeliest next tokens.
///
/// Probabilities are those before any sampler. They are left out where the token that is drawn is no whole text, as half a
/// character is, so a bias has another one drawn.
#[derive(Debug, Serialize)]
pub(crate) struct Ahead<'a> {
    pub prompt: &'a [u32],
    pub stream: bool,
    pub cache_prompt: bool,
    pub n_predict: u32,
    pub n_probs: u32,
    pub post_sampling_probs: bool,
    pub samplers: [&'static str; 1],
    pub top_k: u32,
    pub logit_bias: [(u32, f32); 1],
    pub response_fields: [&'static str; 1],
}

impl<'a> Ahead<'a> {
    /// For the `count` likeliest tokens after `prompt`; `whole` is a token that is a text by itself.
    pub fn new(prompt: &'a [u32], count: u32, whole: u32) -> Self {
        Self {
            prompt,
            stream: false,
            cache_prompt: true,
            n_predict: 1,
            n_probs: count,
            post_sampling_probs: false,
            samplers: ["top_k"],
            top_k: 1,
            logit_bias: [(whole, 1e6)],
            response_fields: ["completion_probabilities"],
        }
    }
}

/// Its answer, with one step.
#[derive(Debug, Deserialize)]
pub(crate) struct Steps {
    pub completion_probabilities: Vec<Step>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Step {
    #[serde(flatten)]
    pub chosen: Candidate,
    #[serde(default)]
    pub top_logprobs: Vec<Candidate>,
}

/// A token that may come next.
#[derive(Clone, Debug, PartialEq, Deserialize)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// Its bytes.
    #[serde(default)]
    pub bytes: Vec<u8>,
    /// The natural logarithm of its probability.
    #[serde(deserialize_with = "finite")]
    pub logprob: f32,
}

/// JSON knows no infinity: the child writes `null`, or the least number there is, for what is impossible.
fn finite<'de, D: Deserializer<'de>>(deserializer: D) -> Result<f32, D::Error> {
    Ok(Option::<f32>::deserialize(deserializer)?.unwrap_or(f32::NEG_INFINITY).max(f32::MIN))
}

impl From<Candidate> for mesh_core::Candidate {
    fn from(candidate: Candidate) -> Self {
        Self { id: candidate.id, bytes: Some(candidate.bytes), logprob: candidate.logprob }
    }
}

impl Step {
    /// With the `count` likeliest.
    pub fn logprob(self, count: u32) -> TokenLogprob {
        let top = self.top_logprobs.into_iter().take(count as usize).map(Into::into).collect();
        TokenLogprob { chosen: self.chosen.into(), top }
    }
}

/// Body of `POST /completion`. Every sampler is set, so that neither the child's defaults nor its arguments matter.
#[derive(Debug, Serialize)]
pub(crate) struct Completion {
    pub prompt: Vec<u32>,
    pub stream: bool,
    pub cache_prompt: bool,
    pub return_progress: bool,
    pub n_predict: u32,
    /// The order in which they are applied; llama.cpp's natural one. The one not listed (top-n-sigma) is off.
    pub samplers: [&'static str; 8],
    pub temperature: f32,
    pub dynatemp_range: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub top_n_sigma: f32,
    pub xtc_probability: f32,
    pub xtc_threshold: f32,
    pub dry_multiplier: f32,
    pub dry_base: f32,
    pub dry_allowed_length: u32,
    pub dry_penalty_last_n: u32,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub dry_sequence_breakers: Vec<String>,
    pub mirostat: u32,
    /// The window of the penalties, in tokens.
    pub repeat_last_n: u32,
    pub repeat_penalty: f32,
    pub presence_penalty: f32,
    pub frequency_penalty: f32,
    /// −1 draws one.
    pub seed: i64,
    pub logit_bias: Vec<(u32, f32)>,
    pub ignore_eos: bool,
    /// Likeliest tokens to report with each; none reports no probabilities.
    pub n_probs: u32,
    pub post_sampling_probs: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub json_schema: Option<Arc<Value>>,
    /// Special tokens that are part of the text. Each that is not a single token is passed over.
    pub preserved_tokens: Vec<String>,
    pub stop: [&'static str; 0],
    /// The fields wanted of the last event, which would otherwise repeat the whole prompt.
    pub response_fields: [&'static str; 5],
}

impl Completion {
    /// The request for `job`, whose prompt is `prompt`, in a context of `context_tokens`; the prompt is shorter than that.
    ///
    /// llama.cpp counts penalties over the prompt too, also those that the OpenAI API counts over the answer alone.
    pub fn new(job: &Job, prompt: Vec<u32>, context_tokens: u32) -> Self {
        let sampling = &job.sampling;
        let room = context_tokens.saturating_sub(u32::try_from(prompt.len()).unwrap_or(u32::MAX));
        let greedy = sampling.temperature == Some(0.0);
        // What may leave the likeliest out.
        let spares = sampling.xtc.is_some() || sampling.typical_p.is_some_and(|typical_p| typical_p < 1.0);
        let dry = sampling.dry.as_ref();
        Self {
            prompt,
            stream: true,
            cache_prompt: true,
            return_progress: true,
            n_predict: job.tokens_max.map_or(room, |most| most.min(room)),
            samplers: ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
            temperature: sampling.temperature.unwrap_or(1.0),
            dynatemp_range: 0.0,
            // The likeliest token is the same among one candidate as among all, and found faster.
            top_k: if greedy && !spares { 1 } else { sampling.top_k.unwrap_or(0) },
            top_p: sampling.top_p.unwrap_or(1.0),
            min_p: sampling.min_p.unwrap_or(0.0),
            typical_p: sampling.typical_p.unwrap_or(1.0),
            top_n_sigma: -1.0,
            xtc_probability: sampling.xtc.map_or(0.0, |xtc| xtc.probability),
            // Above one half there are never two top choices, and at 0 there are impossible ones among them.
            xtc_threshold: sampling.xtc.map_or(1.0, |xtc| xtc.threshold.max(f32::MIN_POSITIVE)),
            dry_multiplier: dry.map_or(0.0, |dry| dry.multiplier),
            dry_base: dry.map_or(1.0, |dry| dry.base),
            dry_allowed_length: dry.map_or(0, |dry| dry.allowed_length),
            dry_penalty_last_n: dry.and_then(|dry| dry.last_n).unwrap_or(context_tokens).min(context_tokens),
            dry_sequence_breakers: dry.map(breakers).unwrap_or_default(),
            mirostat: 0,
            repeat_last_n: if penalised(sampling) { context_tokens } else { 0 },
            repeat_penalty: sampling.repetition_penalty.unwrap_or(1.0),
            presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
            frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
            seed: sampling.seed.map_or(-1, fold_seed),
            logit_bias: sampling.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            ignore_eos: job.ignore_eos,
            // The chosen one's own is reported with at least one other.
            n_probs: job.logprobs.map_or(0, |count| count.max(1)),
            post_sampling_probs: false,
            json_schema: job.constraint.as_ref().and_then(|constraint| match &constraint.grammar {
                Grammar::JsonObject => Some(Arc::new(json!({ "type": "object" }))),
                Grammar::JsonSchema(schema) => Some(schema.clone()),
                // Not among this engine's capabilities.
                Grammar::Regex(_) | Grammar::Lark(_) => None,
            }),
            preserved_tokens: job.shown.clone(),
            stop: [],
            response_fields: ["content", "stop", "stop_type", "tokens_predicted", "timings"],
        }
    }
}

/// The child does not take an empty list; a character that no text holds does as well.
fn breakers(dry: &Dry) -> Vec<String> {
    match dry.sequence_breakers.is_empty() {
        true => vec!["\u{10ffff}".to_owned()],
        false => dry.sequence_breakers.clone(),
    }
}

fn penalised(sampling: &Sampling) -> bool {
    sampling.repetition_penalty.is_some_and(|penalty| penalty != 1.0)
        || [sampling.presence_penalty, sampling.frequency_penalty].iter().flatten().any(|penalty| *penalty != 0.0)
}

/// Seeds are 31 bits wide for the child, small ones unchanged.
fn fold_seed(seed: u64) -> i64 {
    ((seed ^ (seed >> 31) ^ (seed >> 62)) & 0x7fff_ffff) as i64
}

/// One event of a `/completion` stream: a piece of the answer, a report of progress, an error, or the end.
#[derive(Debug, Deserialize)]
pub(crate) struct Piece {
    /// Present in every event but errors; true in the last one.
    pub stop: Option<bool>,
    pub error: Option<ErrorBody>,
    #[serde(default)]
    pub content: String,
    #[serde(default)]
    pub tokens_predicted: u32,
    /// How likely the tokens of the text were, as far as the child says: it leaves out those that are no whole text.
    #[serde(default)]
    pub completion_probabilities: Vec<Step>,
    pub prompt_progress: Option<PromptProgress>,
    pub stop_type: Option<StopType>,
    pub timings: Option<ChildTimings>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct PromptProgress {
    pub total: u32,
    #[serde(default)]
    pub cache: u32,
    pub processed: u32,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum StopType {
    Eos,
    Limit,
    #[serde(other)]
    Other,
}

/// `timings`; `_ms` are milliseconds.
#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct ChildTimings {
    #[serde(default)]
    pub cache_n: Option<u32>,
    #[serde(default)]
    pub prompt_n: Option<i64>,
    #[serde(default)]
    pub prompt_ms: f64,
    #[serde(default)]
    pub predicted_ms: f64,
}

/// `{"error": …}` of a body or an event.
#[derive(Debug, Deserialize)]
pub(crate) struct ErrorAnswer {
    pub error: ErrorBody,
}

#[derive(Debug, Deserialize)]
pub(crate) struct ErrorBody {
    pub message: String,
}

impl Piece {
    /// How it ended, from the last piece of a stream. `prompt_tokens` is what was sent.
    pub fn finish(&self, prompt_tokens: u32) -> (FinishReason, Usage, Timings) {
        let reason = match self.stop_type {
            Some(StopType::Limit) => FinishReason::Length,
            _ => FinishReason::Stop,
        };
        let timings = self.timings.unwrap_or_default();
        // Builds that do not say what they reused say what they computed.
        let computed = timings.prompt_n.and_then(|count| u32::try_from(count).ok());
        let cached = timings.cache_n.or(computed.map(|count| prompt_tokens.saturating_sub(count))).unwrap_or(0);
        let usage =
            Usage { prompt_tokens, cached_tokens: cached.min(prompt_tokens), completion_tokens: self.tokens_predicted };
        (reason, usage, Timings { prefill: millis(timings.prompt_ms), decode: millis(timings.predicted_ms) })
    }
}

fn millis(value: f64) -> Duration {
    Duration::try_from_secs_f64(value / 1000.0).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{Constraint, Prompt, Xtc};
    use proptest::prelude::*;

    fn job(sampling: Sampling) -> Job {
        Job { sampling, ..Job::new("j", Prompt::Tokens(vec![1, 2, 3])) }
    }

    #[test]
    fn constraints_are_schemas_to_the_child() {
        let with = |grammar| {
            let constraint = Some(Constraint { grammar, rules: None });
            serde_json::to_value(Completion::new(&Job { constraint, ..job(Sampling::default()) }, vec![1], 64)).unwrap()
        };
        let schema = json!({ "type": "array" });
        assert_eq!(with(Grammar::JsonSchema(Arc::new(schema.clone())))["json_schema"], schema);
        assert_eq!(with(Grammar::JsonObject)["json_schema"], json!({ "type": "object" }));
    }

    #[test]
    fn probabilities_are_read_as_they_come() {
        let piece = json!({ "content": "é", "stop": false, "completion_probabilities": [{
            "id": 7, "token": "é", "bytes": [195, 169], "logprob": -0.5,
            "top_logprobs": [{ "id": 7, "token": "é", "bytes": [195, 169], "logprob": -0.5 },
                             { "id": 8, "token": "x", "bytes": [120], "logprob": null }],
        }] });
        let mut piece: Piece = serde_json::from_value(piece).unwrap();
        let logprob = piece.completion_probabilities.remove(0).logprob(2);
        assert_eq!((logprob.chosen.id, logprob.chosen.bytes.as_deref()), (7, Some("é".as_bytes())));
        assert_eq!((logprob.top.len(), logprob.top[1].logprob), (2, f32::MIN));
    }

    #[test]
    fn nothing_set_means_neutral_and_everything_is_sent() {
        let body = serde_json::to_value(Completion::new(&job(Sampling::default()), vec![1, 2, 3], 64)).unwrap();
        assert_eq!(
            body,
            json!({
                "prompt": [1, 2, 3], "stream": true, "cache_prompt": true, "return_progress": true, "n_predict": 61,
                "samplers": ["penalties", "dry", "top_k", "typ_p", "top_p", "min_p", "xtc", "temperature"],
                "temperature": 1.0, "dynatemp_range": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
                "top_n_sigma": -1.0, "xtc_probability": 0.0, "xtc_threshold": 1.0, "dry_multiplier": 0.0, "dry_base": 1.0,
                "dry_allowed_length": 0, "dry_penalty_last_n": 64, "n_probs": 0, "post_sampling_probs": false, "preserved_tokens": [], "mirostat": 0,
                "repeat_last_n": 0, "repeat_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                "seed": -1, "logit_bias": [], "ignore_eos": false, "stop": [],
                "response_fields": ["content", "stop", "stop_type", "tokens_predicted", "timings"],
            })
        );
    }

    #[test]
    fn what_is_set_arrives() {
        let sampling = Sampling {
            temperature: Some(0.5),
            top_p: Some(0.75),
            top_k: Some(7),
            min_p: Some(0.25),
            seed: Some(42),
            repetition_penalty: Some(1.5),
            presence_penalty: Some(0.5),
            frequency_penalty: Some(-0.5),
            logit_bias: [(5, -100.0)].into(),
            typical_p: Some(0.5),
            xtc: Some(Xtc { probability: 0.25, threshold: 0.125 }),
            dry: Some(Dry {
                multiplier: 0.5,
                base: 1.75,
                allowed_length: 3,
                last_n: Some(50),
                sequence_breakers: vec![],
                breaker_ids: vec![],
            }),
        };
        let body = Completion::new(&Job { ignore_eos: true, tokens_max: Some(9), ..job(sampling) }, vec![1], 64);
        let body = serde_json::to_value(body).unwrap();
        for (key, value) in [
            ("temperature", json!(0.5)),
            ("top_p", json!(0.75)),
            ("top_k", json!(7)),
            ("min_p", json!(0.25)),
            ("typical_p", json!(0.5)),
            ("xtc_probability", json!(0.25)),
            ("xtc_threshold", json!(0.125)),
            ("dry_multiplier", json!(0.5)),
            ("dry_base", json!(1.75)),
            ("dry_allowed_length", json!(3)),
            ("dry_penalty_last_n", json!(50)),
            ("dry_sequence_breakers", json!(["\u{10ffff}"])),
            ("seed", json!(42)),
            ("repeat_penalty", json!(1.5)),
            ("repeat_last_n", json!(64)),
            ("presence_penalty", json!(0.5)),
            ("frequency_penalty", json!(-0.5)),
            ("logit_bias", json!([[5, -100.0]])),
            ("ignore_eos", json!(true)),
            ("n_predict", json!(9)),
        ] {
            assert_eq!(body[key], value, "{key}");
        }
    }

    #[test]
    fn one_candidate_is_enough_for_the_likeliest_unless_it_may_be_left_out() {
        let top_k = |sampling: Sampling| Completion::new(&job(sampling), vec![1], 64).top_k;
        let xtc = Some(Xtc { probability: 0.5, threshold: 0.1 });
        assert_eq!(top_k(Sampling::greedy()), 1);
        assert_eq!(top_k(Sampling { typical_p: Some(1.0), ..Sampling::greedy() }), 1);
        assert_eq!(top_k(Sampling { typical_p: Some(0.5), ..Sampling::greedy() }), 0);
        assert_eq!(top_k(Sampling { xtc, top_k: Some(3), ..Sampling::greedy() }), 3);
    }

    proptest! {
        #[test]
        fn seeds_fit_and_small_ones_stay(seed: u64, small in 0u64..0x8000_0000) {
            prop_assert!((0..=0x7fff_ffff).contains(&fold_seed(seed)));
            prop_assert_eq!(fold_seed(small), small as i64);
        }

        #[test]
        fn an_answer_never_outgrows_the_context(prompt in 0usize..300, context in 1u32..256, most in proptest::option::of(0u32..500)) {
            let body = Completion::new(&Job { tokens_max: most, ..job(Sampling::greedy()) }, vec![0; prompt], context);
            prop_assert!(u64::from(body.n_predict) + prompt as u64 <= u64::from(context).max(prompt as u64));
            prop_assert!(most.is_none_or(|most| body.n_predict <= most));
        }
    }

    #[test]
    fn ends_are_read_from_old_and_new_builds() {
        let new = json!({"stop": true, "content": "", "stop_type": "limit", "tokens_predicted": 4,
            "timings": {"cache_n": 5, "prompt_n": 4, "prompt_ms": 1.5, "predicted_ms": 2.0}});
        let piece: Piece = serde_json::from_value(new).unwrap();
        let (reason, usage, timings) = piece.finish(9);
        assert_eq!(reason, FinishReason::Length);
        assert_eq!(usage, Usage { prompt_tokens: 9, cached_tokens: 5, completion_tokens: 4 });
        assert_eq!(timings.prefill, Duration::from_micros(1500));
        let old = json!({"stop": true, "stop_type": "eos", "timings": {"prompt_n": 2, "prompt_ms": -1.0}});
        let piece: Piece = serde_json::from_value(old).unwrap();
        let (reason, usage, timings) = piece.finish(9);
        assert_eq!((reason, usage.cached_tokens, timings.prefill), (FinishReason::Stop, 7, Duration::ZERO));
    }
}
