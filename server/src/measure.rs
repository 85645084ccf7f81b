//! How fast an engine reads and writes, seen from where requests come from.

use std::time::{Duration, Instant};

use futures::StreamExt;
use mesh_core::{Engine, EngineError, Event, Job, Prompt, Sampling, SubmitError};
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
    let job = Job {
        id: format!("bench-{index}"),
        prompt: Prompt::Tokens(prompt(workload, index)),
        sampling: Sampling::greedy(),
        tokens_max: Some(workload.generate_tokens),
        ignore_eos: true,
        logprobs: None,
        landmarks: mesh_core::Landmarks::default(),
    };
    let started = Instant::now();
    let mut events = engine.submit(job).await?;
    let (mut first, mut last, mut written) = (None, started, 0);
    while let Some(event) = events.next().await {
        match event? {
            Event::Token { .. } | Event::Text { .. } => {
                last = Instant::now();
                first.get_or_insert(last);
            }
            Event::Finished { usage, .. } => written = usage.completion_tokens,
            Event::Queued { .. } | Event::Prefill { .. } => {}
        }
    }
    let Some(first) = first.filter(|_| written >= 2) else {
        return Err(MeasureError::TooFew { asked: workload.generate_tokens, written });
    };
    let ttft = first - started;
    Ok(Run {
        ttft_s: ttft.as_secs_f64(),
        prefill_tokens_per_s: rate(workload.prompt_tokens, ttft),
        decode_tokens_per_s: rate(written - 1, last - first),
    })
}

fn rate(tokens: u32, time: Duration) -> f64 {
    f64::from(tokens) / time.as_secs_f64().max(f64::EPSILON)
}

/// Token ids spread over the vocabulary, another sequence for each run: a linear congruential generator will do.
fn prompt(workload: Workload, index: u32) -> Vec<u32> {
    let mut state = u64::from(index) + 1;
    (0..workload.prompt_tokens)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            ((state >> 33) % u64::from(workload.vocab_size.max(1))) as u32
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
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn spreads() {
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, min: 1.0, max: 3.0 });
        assert_eq!(Spread::of([1.0, 2.0]), Spread { median: 1.5, min: 1.0, max: 2.0 });
        assert_eq!(Spread::of([]), Spread { median: 0.0, min: 0.0, max: 0.0 });
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
