//! What is counted of one model.

use std::sync::{Mutex, PoisonError};

use mesh_core::{FinishReason, Timings, Usage, node::Load};
use prometheus_client::metrics::{counter::Counter, gauge::Gauge, histogram::Histogram};

use crate::pipeline::Finish;

/// Seconds to a first token: from a cached prompt on a GPU to a long one on a processor, which also waits.
const FIRST_TOKEN_S: [f64; 16] =
    [0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 180.0];
/// Seconds between two tokens.
const NEXT_TOKEN_S: [f64; 14] = [0.002, 0.005, 0.01, 0.015, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1.0, 2.5, 10.0];
/// Seconds for a whole answer.
const ANSWER_S: [f64; 15] = [0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 15.0, 30.0, 60.0, 120.0, 300.0, 600.0, 1800.0];

/// How answers end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum End {
    Stop,
    Length,
    StopString,
    ToolCalls,
    /// The client left.
    Cancelled,
    /// The engine broke.
    Error,
}

impl End {
    pub const ALL: [Self; 6] =
        [Self::Stop, Self::Length, Self::StopString, Self::ToolCalls, Self::Cancelled, Self::Error];

    /// In a word, as labels and logs have it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Stop => "stop",
            Self::Length => "length",
            Self::StopString => "stop_string",
            Self::ToolCalls => "tool_calls",
            Self::Cancelled => "cancelled",
            Self::Error => "error",
        }
    }
}

impl From<Finish> for End {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Engine(FinishReason::Stop) => Self::Stop,
            Finish::Engine(FinishReason::Length) => Self::Length,
            Finish::StopString => Self::StopString,
            Finish::ToolCalls => Self::ToolCalls,
        }
    }
}

/// Counts of one model, from the server's start on, however often it was loaded.
#[derive(Debug)]
pub struct Tally {
    pub(super) running: Gauge,
    pub(super) waiting: Gauge,
    pub(super) prompt_tokens: Counter,
    pub(super) cached_tokens: Counter,
    pub(super) completion_tokens: Counter,
    pub(super) cache_hits: Counter,
    pub(super) ended: [Counter; End::ALL.len()],
    pub(super) first_token: Histogram,
    pub(super) next_token: Histogram,
    pub(super) answer: Histogram,
    speeds: Mutex<Speeds>,
}

/// How much a new measurement counts against those before.
const NEW: f32 = 0.2;

/// Tokens a second of one request, as measured lately.
#[derive(Clone, Copy, Debug, Default)]
struct Speeds {
    prefill_per_s: Option<f32>,
    decode_per_s: Option<f32>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            running: Gauge::default(),
            waiting: Gauge::default(),
            prompt_tokens: Counter::default(),
            cached_tokens: Counter::default(),
            completion_tokens: Counter::default(),
            cache_hits: Counter::default(),
            ended: Default::default(),
            first_token: Histogram::new(FIRST_TOKEN_S),
            next_token: Histogram::new(NEXT_TOKEN_S),
            answer: Histogram::new(ANSWER_S),
            speeds: Mutex::default(),
        }
    }
}

impl Tally {
    /// Takes note of how fast an answer was. Few tokens tell little, and are left out.
    pub(super) fn timed(&self, usage: Usage, timings: Timings) {
        const TOKENS_MIN: u32 = 8;
        let mut speeds = self.speeds.lock().unwrap_or_else(PoisonError::into_inner);
        let take = |slot: &mut Option<f32>, tokens: u32, seconds: f32| {
            let speed = tokens as f32 / seconds;
            if tokens >= TOKENS_MIN && speed.is_finite() && speed > 0.0 {
                *slot = Some(slot.map_or(speed, |before| before + NEW * (speed - before)));
            }
        };
        let read = usage.prompt_tokens.saturating_sub(usage.cached_tokens);
        take(&mut speeds.prefill_per_s, read, timings.prefill.as_secs_f32());
        take(&mut speeds.decode_per_s, usage.completion_tokens, timings.decode.as_secs_f32());
    }

    /// How busy the model is, and how fast.
    pub(crate) fn load(&self) -> Load {
        let count = |gauge: &Gauge| u32::try_from(gauge.get()).unwrap_or(0);
        let Speeds { prefill_per_s, decode_per_s } = *self.speeds.lock().unwrap_or_else(PoisonError::into_inner);
        Load { running: count(&self.running), waiting: count(&self.waiting), prefill_per_s, decode_per_s }
    }

    pub(super) fn end(&self, end: End, usage: Usage) {
        self.prompt_tokens.inc_by(usage.prompt_tokens.into());
        self.cached_tokens.inc_by(usage.cached_tokens.into());
        self.completion_tokens.inc_by(usage.completion_tokens.into());
        self.cache_hits.inc_by(u64::from(usage.cached_tokens > 0));
        self.ended[end as usize].inc();
    }
}
