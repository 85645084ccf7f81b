//! Steps of sampling beside each other, on every kind of cache.

use std::{sync::Arc, time::Duration};

use conformance::{engine, shared::shared};
use futures::StreamExt;
use mesh_core::{
    Constraint, Dry, EngineHandle, Event, Follower, Grammar, Job, Prompt, Rules, Sampling, TokenLogprob, Xtc,
};
use serde_json::json;

use super::{KINDS, cpu, load, reference, vectors::tensor};

/// Tokens go up by classes: what comes after a token of class `n` is of class `n + 1`.
#[derive(Debug)]
struct Classes(u32);

impl Rules for Classes {
    fn follow(&self) -> Box<dyn Follower> {
        Box::new(Self(self.0))
    }
}

impl Follower for Classes {
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        for (word, at) in allowed.iter_mut().zip(0..) {
            let bits = (0..32).filter(|bit| (at * 32 + bit) % 3 == self.0 % 3);
            *word = bits.fold(0, |word, bit| word | 1 << bit);
        }
        Ok(())
    }

    fn take(&mut self, id: u32) -> Result<(), String> {
        if id % 3 != self.0 % 3 {
            return Err(format!("{id} is of another class"));
        }
        self.0 += 1;
        Ok(())
    }
}

/// The tokens of a job, and how likely they were.
async fn tokens(engine: &EngineHandle, job: Job) -> Vec<(u32, Option<TokenLogprob>)> {
    let events = engine.submit(job).await.expect("admitted").collect::<Vec<_>>().await;
    let tokens = events.into_iter().filter_map(|event| match event.expect("no error") {
        Event::Token { id, logprob } => Some((id, logprob.map(|logprob| *logprob))),
        _ => None,
    });
    tokens.collect()
}

/// Grammars, what a row has to see of its text first, and what it reports, beside each other and beside rows without.
#[tokio::test]
async fn every_step_of_sampling_is_a_rows_own() {
    for (name, _) in KINDS {
        let Some(root) = shared("every_step_of_sampling_is_a_rows_own", &format!("golden/{name}")) else { return };
        let (prompt, _) = reference(&root);
        let engine = load(&root, json!({ "device": "cpu", "prefill_chunk_tokens": 8 })).await;
        let jobs = |index: usize| {
            let warm = Sampling { temperature: Some(1.5), seed: Some(index as u64), ..Sampling::default() };
            let dry = Dry {
                multiplier: 2.0,
                base: 1.75,
                allowed_length: 1,
                last_n: None,
                sequence_breakers: Vec::new(),
                breaker_ids: vec![7],
            };
            let job = engine::job(Prompt::Tokens(prompt[index..].to_vec()), 12 + index as u32);
            let class = Constraint { grammar: Grammar::JsonObject, rules: Some(Arc::new(Classes(index as u32))) };
            match index % 6 {
                0 => job,
                1 => Job { sampling: warm, constraint: Some(class), logprobs: Some(3), ..job },
                2 => Job { sampling: Sampling { dry: Some(dry), ..warm }, ..job },
                3 => Job { sampling: Sampling { typical_p: Some(0.9), ..warm }, logprobs: Some(0), ..job },
                4 => {
                    let xtc = Some(Xtc { probability: 0.5, threshold: 0.01 });
                    Job { sampling: Sampling { xtc, ..warm }, tokens_min: Some(5), ..job }
                }
                _ => Job { constraint: Some(class), ..job },
            }
        };
        let mut alone = Vec::new();
        for index in 0..12 {
            alone.push(tokens(&engine, jobs(index)).await);
        }
        let together = futures::future::join_all((0..12).map(|index| tokens(&engine, jobs(index)))).await;
        for (index, (together, alone)) in together.iter().zip(&alone).enumerate() {
            assert_eq!(together.len(), 12 + index, "{name}: job {index}");
            for (step, (found, expected)) in together.iter().zip(alone).enumerate() {
                assert_eq!(found.0, expected.0, "{name}: job {index}, token {step}");
                if [1, 5].contains(&(index % 6)) {
                    assert_eq!(found.0 as usize % 3, (index + step) % 3, "{name}: job {index} keeps to its grammar");
                }
                let (Some(found), Some(expected)) = (&found.1, &expected.1) else {
                    assert!(found.1.is_none() && expected.1.is_none() && ![1, 3].contains(&(index % 6)));
                    continue;
                };
                assert_eq!(
                    (found.top.len(), found.chosen.id),
                    (if index % 6 == 1 { 3 } else { 0 }, expected.chosen.id)
                );
                assert!((found.chosen.logprob - expected.chosen.logprob).abs() < 1e-3, "{found:?} {expected:?}");
            }
        }
        engine.drain(Duration::from_secs(5)).await;
    }
}

/// What is reported of a token is the softmax of the reference's logits.
#[tokio::test]
async fn probabilities_are_those_of_the_reference() {
    let Some(root) = shared("probabilities_are_those_of_the_reference", "golden/llama") else { return };
    let (prompt, greedy) = reference(&root);
    let logits = tensor(&root.join("reference.safetensors"), "greedy_logits");
    let engine = load(&root, cpu()).await;
    let job = Job { logprobs: Some(5), ..engine::job(Prompt::Tokens(prompt), 16) };
    for (at, (id, logprob)) in tokens(&engine, job).await.into_iter().enumerate() {
        let row = &logits[at * 512..(at + 1) * 512];
        let sum = row.iter().map(|logit| f64::from(*logit).exp()).sum::<f64>().ln() as f32;
        let logprob = logprob.expect("it asks");
        assert_eq!((id, logprob.chosen.id, logprob.top[0].id), (greedy[at], greedy[at], greedy[at]));
        let mut best: Vec<f32> = row.iter().map(|logit| logit - sum).collect();
        best.sort_by(|a, b| b.total_cmp(a));
        assert_eq!(logprob.top.len(), 5);
        for (found, expected) in logprob.top.iter().zip(best) {
            assert!((found.logprob - expected).abs() < 1e-3 && (row[found.id as usize] - sum - expected).abs() < 1e-3);
        }
    }
}
