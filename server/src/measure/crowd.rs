//! Several requests at once.

use std::time::Instant;

use futures::future::try_join_all;
use mesh_core::Engine;
use serde::Serialize;

use super::{MeasureError, Workload, job, prompt, time, tokens};

/// So many requests that came at once.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct CrowdRun {
    /// How many.
    pub streams: u32,
    /// Tokens of all over the time in which everybody wrote.
    pub decode_tokens_per_s: f64,
    /// Tokens of all, prompts left out, over the time from the first request to the last token.
    pub total_tokens_per_s: f64,
    /// Each one's time to its first token, in seconds, in the order in which they were sent.
    pub ttft_s: Vec<f64>,
}

/// Runs `workload` with so many requests at once. Each has a prompt of its own.
pub async fn measure_crowd(
    engine: &dyn Engine,
    workload: Workload,
    streams: u32,
) -> Result<Vec<CrowdRun>, MeasureError> {
    let mut runs = Vec::new();
    for index in 0..=workload.runs {
        let started = Instant::now();
        let jobs = (0..streams).map(|stream| {
            // No prompt of another crowd either.
            let seed = (streams << 16) | (index * streams + stream + 1);
            let prompt = prompt(workload, seed);
            time(engine, job(format!("bench-{index}-{stream}"), prompt, workload.generate_tokens))
        });
        let timed = try_join_all(jobs).await?;
        let all_write = timed.iter().map(|one| one.first).max().unwrap_or(started);
        let one_stops = timed.iter().map(|one| one.last).min().unwrap_or(started);
        let last = timed.iter().map(|one| one.last).max().unwrap_or(started);
        let between = |time: &&Instant| **time > all_write && **time <= one_stops;
        let written = timed.iter().map(|one| one.times.iter().filter(between).count()).sum::<usize>();
        let total: usize = timed.iter().map(|one| one.times.len()).sum();
        let per_s = |count: usize, seconds: f64| count as f64 / seconds.max(f64::EPSILON);
        if index > 0 {
            runs.push(CrowdRun {
                streams,
                decode_tokens_per_s: per_s(written, one_stops.saturating_duration_since(all_write).as_secs_f64()),
                total_tokens_per_s: per_s(total, (last - started).as_secs_f64()),
                ttft_s: timed.iter().map(|one| (one.first - one.started).as_secs_f64()).collect(),
            });
        }
    }
    Ok(runs)
}

/// A short request behind a long one.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct BehindRun {
    /// Time to the short one's first token, in seconds, from when it was sent.
    pub ttft_s: f64,
    /// Time to the long one's first token, in seconds.
    pub long_ttft_s: f64,
}

/// Sends a prompt of `behind_tokens`, then at once one as `workload` says; over and over.
pub async fn measure_behind(
    engine: &dyn Engine,
    workload: Workload,
    behind_tokens: u32,
) -> Result<Vec<BehindRun>, MeasureError> {
    let mut runs = Vec::new();
    for index in 0..=workload.runs {
        let seed = (1 << 24) | (2 * index);
        let long = tokens(behind_tokens, workload.vocab_size, seed);
        let short = prompt(workload, seed + 1);
        let (long, short) =
            futures::future::try_join(time(engine, job(format!("bench-{index}-long"), long, 2)), async {
                // Long enough for the long one to be begun, and nothing beside its time.
                tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                time(engine, job(format!("bench-{index}-short"), short, workload.generate_tokens)).await
            })
            .await?;
        if index > 0 {
            runs.push(BehindRun {
                ttft_s: (short.first - short.started).as_secs_f64(),
                long_ttft_s: (long.first - long.started).as_secs_f64(),
            });
        }
    }
    Ok(runs)
}
