//! How fast an engine reads and writes, seen from where requests come from.

mod conversation;
mod crowd;

pub use conversation::{Conversation, ConversationRun, Turn, measure_conversation, resume_conversation};
pub use crowd::{BehindRun, CrowdRun, measure_behind, measure_crowd};

use std::time::{Duration, Instant};

use futures::StreamExt;
use mesh_core::{Engine, EngineError, Event, Job, Prompt, Sampling, SubmitError, Usage};
use serde::Serialize;

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Workload {
    /// Tokens read.
    pub prompt_tokens: u32,
    /// Tokens written.
    pub generate_tokens: u32,
    /// Runs that count; one more goes first to warm up.
    pub runs: u32,
    /// Prompts are drawn below this token id.
    pub vocab_size: u32,
}

/// One run.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Run {
    /// From the request to the first token, in seconds.
    pub ttft_s: f64,
    /// Prompt tokens over that time.
    pub prefill_tokens_per_s: f64,
    /// Further tokens over the time they took.
    pub decode_tokens_per_s: f64,
}

/// A measurement that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum MeasureError {
    /// The engine did not take the job.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// The engine did not finish the job.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The engine wrote fewer tokens than it was asked for.
    #[error("{asked} tokens were asked for, and {written} written: too few to measure")]
    TooFew {
        /// Tokens asked for.
        asked: u32,
        /// Tokens written.
        written: u32,
    },
}

/// Runs `workload` on an engine, one request at a time. Each run has a prompt of its own, so that no prefix is known.
pub async fn measure(engine: &dyn Engine, workload: Workload) -> Result<Vec<Run>, MeasureError> {
    let mut runs = Vec::new();
    for index in 0..=workload.runs {
        let run = run(engine, workload, index).await?;
        if index > 0 {
            runs.push(run);
        }
    }
    Ok(runs)
}

async fn run(engine: &dyn Engine, workload: Workload, index: u32) -> Result<Run, MeasureError> {
    let job = job(format!("bench-{index}"), prompt(workload, index), workload.generate_tokens);
    let timed = time(engine, job).await?;
    let ttft = timed.first - timed.started;
    Ok(Run {
        ttft_s: ttft.as_secs_f64(),
        prefill_tokens_per_s: rate(workload.prompt_tokens, ttft),
        decode_tokens_per_s: rate(timed.usage.completion_tokens - 1, timed.last - timed.first),
    })
}

/// A greedy job that ends only when it has written so many tokens.
fn job(id: String, prompt: Vec<u32>, generate_tokens: u32) -> Job {
    Job {
        sampling: Sampling::greedy(),
        tokens_max: Some(generate_tokens),
        ignore_eos: true,
        ..Job::new(id, Prompt::Tokens(prompt))
    }
}

/// When a job's tokens came.
struct Timed {
    started: Instant,
    first: Instant,
    last: Instant,
    usage: Usage,
    /// Every token's time.
    times: Vec<Instant>,
    /// Every token's id, where the engine gives ids.
    tokens: Vec<u32>,
}

async fn time(engine: &dyn Engine, job: Job) -> Result<Timed, MeasureError> {
    let asked = job.tokens_max.unwrap_or(u32::MAX);
    let started = Instant::now();
    let mut events = engine.submit(job).await?;
    let (mut times, mut tokens, mut usage) = (Vec::new(), Vec::new(), Usage::default());
    while let Some(event) = events.next().await {
        match event? {
            Event::Token { id, .. } => {
                times.push(Instant::now());
                tokens.push(id);
            }
            Event::Text { tokens, .. } => times.extend((0..tokens).map(|_| Instant::now())),
            Event::Finished { usage: said, .. } => usage = said,
            Event::Queued { .. } | Event::Prefill { .. } => {}
        }
    }
    match (times.first().copied(), times.last().copied()) {
        (Some(first), Some(last)) if usage.completion_tokens >= asked.min(2) => {
            Ok(Timed { started, first, last, usage, times, tokens })
        }
        _ => Err(MeasureError::TooFew { asked, written: usage.completion_tokens }),
    }
}

fn rate(tokens: u32, time: Duration) -> f64 {
    f64::from(tokens) / time.as_secs_f64().max(f64::EPSILON)
}

fn prompt(workload: Workload, index: u32) -> Vec<u32> {
    tokens(workload.prompt_tokens, workload.vocab_size, index)
}

/// Token ids spread over the vocabulary, another sequence for each index: a linear congruential generator will do.
fn tokens(count: u32, vocab_size: u32, index: u32) -> Vec<u32> {
    let mut state = u64::from(index) + 1;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % u64::from(vocab_size.max(1))) as u32
        })
        .collect()
}

/// The middle value, and the outer ones.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Spread {
    /// Half of the values lie below.
    pub median: f64,
    /// The smallest value.
    pub min: f64,
    /// The largest value.
    pub max: f64,
}

impl Spread {
    /// Of at least one value; all zero of none.
    pub fn of(values: impl IntoIterator<Item = f64>) -> Self {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let at = |index: usize| values.get(index).copied().unwrap_or(0.0);
        let last = values.len().saturating_sub(1);
        Self { median: (at(last / 2) + at(last.div_ceil(2))) / 2.0, min: at(0), max: at(last) }
    }

    /// The value that 95 of 100 do not exceed; 0 of none.
    pub fn p95(values: impl IntoIterator<Item = f64>) -> f64 {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let rank = (values.len() * 95).div_ceil(100);
        rank.checked_sub(1).and_then(|index| values.get(index)).copied().unwrap_or(0.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([1.0, 2.0]), Spread { median: 1.5, min: 1.0, max: 2.0 });
        assert_eq!(Spread::of([]), Spread { median: 0.0, min: 0.0, max: 0.0 });
        assert_eq!(Spread::p95((1..=20).map(f64::from)), 19.0);
        assert_eq!((Spread::p95([7.0]), Spread::p95([])), (7.0, 0.0));
    }

    #[test]
    fn no_two_runs_share_a_prefix() {
        let workload = Workload { prompt_tokens: 8, generate_tokens: 2, runs: 1, vocab_size: 50_000 };
        let (a, b) = (prompt(workload, 0), prompt(workload, 1));
        assert_eq!(a.len(), 8);
        assert_ne!(a[0], b[0]);
        assert!(a.iter().all(|id| *id < 50_000));
    }
}
