//! What llama-server is sent and sends, typed. Fields that are not used here are not listed.

use std::time::Duration;

use mesh_core::{FinishReason, Job, Sampling, Timings, Usage};
use serde::{Deserialize, Serialize};

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
    pub top_logprobs: Vec<Candidate>,
}

/// A token that may come next.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// The natural logarithm of its probability.
    pub logprob: f32,
}

/// Body of `POST /completion`. Every sampler is set, so that neither the child's defaults nor its arguments matter.
#[derive(Debug, Serialize)]
pub(crate) struct Completion {
    pub prompt: Vec<u32>,
    pub stream: bool,
    pub cache_prompt: bool,
    pub return_progress: bool,
    pub n_predict: u32,
    /// The order in which they are applied; llama.cpp's natural one. Those not listed (DRY, XTC, typical, top-n-sigma) are off.
    pub samplers: [&'static str; 5],
    pub temperature: f32,
    pub dynatemp_range: f32,
    pub top_k: u32,
    pub top_p: f32,
    pub min_p: f32,
    pub typical_p: f32,
    pub top_n_sigma: f32,
    pub xtc_probability: f32,
    pub dry_multiplier: f32,
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
        Self {
            prompt,
            stream: true,
            cache_prompt: true,
            return_progress: true,
            n_predict: job.tokens_max.map_or(room, |most| most.min(room)),
            samplers: ["penalties", "top_k", "top_p", "min_p", "temperature"],
            temperature: sampling.temperature.unwrap_or(1.0),
            dynatemp_range: 0.0,
            // The likeliest token is the same among one candidate as among all, and found faster.
            top_k: if greedy { 1 } else { sampling.top_k.unwrap_or(0) },
            top_p: sampling.top_p.unwrap_or(1.0),
            min_p: sampling.min_p.unwrap_or(0.0),
            typical_p: 1.0,
            top_n_sigma: -1.0,
            xtc_probability: 0.0,
            dry_multiplier: 0.0,
            mirostat: 0,
            repeat_last_n: if penalised(sampling) { context_tokens } else { 0 },
            repeat_penalty: sampling.repetition_penalty.unwrap_or(1.0),
            presence_penalty: sampling.presence_penalty.unwrap_or(0.0),
            frequency_penalty: sampling.frequency_penalty.unwrap_or(0.0),
            seed: sampling.seed.map_or(-1, fold_seed),
            logit_bias: sampling.logit_bias.iter().map(|(id, bias)| (*id, *bias)).collect(),
            ignore_eos: job.ignore_eos,
            stop: [],
            response_fields: ["content", "stop", "stop_type", "tokens_predicted", "timings"],
        }
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
    use mesh_core::Prompt;
    use proptest::prelude::*;
    use serde_json::json;

    fn job(sampling: Sampling) -> Job {
        Job { sampling, ..Job::new("j", Prompt::Tokens(vec![1, 2, 3])) }
    }

    #[test]
    fn nothing_set_means_neutral_and_everything_is_sent() {
        let body = serde_json::to_value(Completion::new(&job(Sampling::default()), vec![1, 2, 3], 64)).unwrap();
        assert_eq!(
            body,
            json!({
                "prompt": [1, 2, 3], "stream": true, "cache_prompt": true, "return_progress": true, "n_predict": 61,
                "samplers": ["penalties", "top_k", "top_p", "min_p", "temperature"],
                "temperature": 1.0, "dynatemp_range": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "typical_p": 1.0,
                "top_n_sigma": -1.0, "xtc_probability": 0.0, "dry_multiplier": 0.0, "mirostat": 0,
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
        };
        let body = Completion::new(&Job { ignore_eos: true, tokens_max: Some(9), ..job(sampling) }, vec![1], 64);
        let body = serde_json::to_value(body).unwrap();
        for (key, value) in [
            ("temperature", json!(0.5)),
            ("top_p", json!(0.75)),
            ("top_k", json!(7)),
            ("min_p", json!(0.25)),
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
