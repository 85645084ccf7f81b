//! Answers that keep to a grammar, that may not repeat themselves or not end yet, and that say how likely they were: the
//! engine over a model that counts.

use std::sync::{Arc, Mutex};

use futures::{StreamExt, future::join_all};
use mesh_core::{
    Constraint, Dry, EngineError, Event, FinishReason, Follower, Grammar, Job, Knob, Rules, Sampling, SubmitError,
};
use serde_json::json;

use crate::engine_tests::{DEVICE, VOCAB, after, count, counting, job};

/// Ends an answer.
const END: u32 = 63;

/// What may come at each step; after the last, nothing but the end.
#[derive(Clone, Debug, Default)]
struct Steps {
    allowed: Vec<Vec<u32>>,
    /// Where following fails.
    too_costly_at: Option<usize>,
    /// What fails to be taken.
    refused: Option<u32>,
    /// Everything that anybody was told of.
    taken: Arc<Mutex<Vec<u32>>>,
}

struct Stepping {
    steps: Steps,
    at: usize,
}

impl Rules for Steps {
    fn follow(&self) -> Box<dyn Follower> {
        Box::new(Stepping { steps: self.clone(), at: 0 })
    }
}

impl Follower for Stepping {
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        if self.steps.too_costly_at == Some(self.at) {
            return Err("too many ways to go on".into());
        }
        let end = vec![END];
        for id in self.steps.allowed.get(self.at).unwrap_or(&end) {
            allowed[*id as usize / 32] |= 1 << (id % 32);
        }
        Ok(())
    }

    fn take(&mut self, id: u32) -> Result<(), String> {
        if self.steps.refused == Some(id) || !self.steps.allowed[self.at].contains(&id) || id == END {
            return Err("it is not possible here".into());
        }
        self.steps.taken.lock().unwrap().push(id);
        self.at += 1;
        Ok(())
    }
}

fn constrained(steps: Steps, job: Job) -> Job {
    let constraint = Constraint { grammar: Grammar::JsonObject, rules: Some(Arc::new(steps)) };
    Job { constraint: Some(constraint), ignore_eos: false, ..job }
}

fn steps<const N: usize>(allowed: [&[u32]; N]) -> Steps {
    Steps { allowed: allowed.iter().map(|ids| ids.to_vec()).collect(), ..Steps::default() }
}

#[tokio::test]
async fn an_answer_keeps_to_its_grammar_and_ends_with_it() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 200).await;
    let grammar = steps([&[10, 20], &[30], &[31, 40], &[3, 4, END]]);
    let answer = count(&*engine, constrained(grammar.clone(), job(&[9], 50))).await;
    // Nothing that is allowed is what the model would say at first; then it ends before it has to.
    assert_eq!(answer, Ok((vec![10, 30, 31, 3], FinishReason::Stop)));
    assert_eq!(*grammar.taken.lock().unwrap(), [10, 30, 31, 3]);
    assert_eq!(count(&*engine, constrained(grammar, job(&[9], 2))).await, Ok((vec![10, 30], FinishReason::Length)));
    let nothing = count(&*engine, constrained(steps([]), job(&[9], 50))).await;
    assert_eq!(nothing, Ok((vec![], FinishReason::Stop)));
}

#[tokio::test]
async fn a_grammar_without_rules_is_refused() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 100).await;
    let constraint = Some(Constraint { grammar: Grammar::Regex("a".into()), rules: None });
    let refused = engine.submit(Job { constraint, ..job(&[1], 1) }).await.err();
    assert_eq!(refused, Some(SubmitError::Unsupported { knob: Knob::Regex }));
}

#[tokio::test]
async fn an_answer_ends_early_only_where_it_may_and_late_only_where_it_must() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 200).await;
    let grammar = || steps([&[5, END][..]; 6]);
    // The model would end at once.
    let asked = |job| constrained(grammar(), job);
    assert_eq!(count(&*engine, asked(job(&[62], 50))).await, Ok((vec![], FinishReason::Stop)));
    let least = Job { tokens_min: Some(2), ..job(&[62], 4) };
    let answer = count(&*engine, asked(least)).await;
    assert_eq!(answer, Ok((vec![5; 4], FinishReason::Length)));
    // Beyond the grammar it ends, whatever was asked for.
    let least = Job { tokens_min: Some(50), ..job(&[62], 100) };
    assert_eq!(count(&*engine, asked(least)).await, Ok((vec![5; 6], FinishReason::Stop)));
    let never = Job { ignore_eos: true, ..asked(job(&[62], 100)) };
    assert_eq!(count(&*engine, never).await, Ok((vec![5; 6], FinishReason::Stop)));
    // Without a grammar, too: 63 would come third.
    let free = Job { ignore_eos: false, ..job(&[60], 6) };
    assert_eq!(count(&*engine, free.clone()).await, Ok((vec![61, 62], FinishReason::Stop)));
    let least = Job { tokens_min: Some(3), ..free };
    assert_eq!(count(&*engine, least).await, Ok((vec![61, 62, 0, 1, 2, 3], FinishReason::Length)));
}

#[tokio::test]
async fn a_grammar_that_fails_ends_its_own_answer_alone() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 400).await;
    let costly = Steps { too_costly_at: Some(2), ..steps([&[1], &[2], &[3]]) };
    let refusing = Steps { refused: Some(2), ..steps([&[1], &[2], &[3]]) };
    let stuck = steps([&[1], &[2], &[]]);
    let whole = steps([&[1], &[2], &[3]]);
    let broken = [(costly, "too many ways"), (refusing, "token 2 does not keep"), (stuck, "leaves no token")];
    let bystander = count(&*engine, job(&[9], 300));
    let failing = broken.iter().map(|(steps, _)| count(&*engine, constrained(steps.clone(), job(&[9], 9))));
    let (bystander, failed, answer) =
        futures::join!(bystander, join_all(failing), count(&*engine, constrained(whole, job(&[9], 9))));
    assert_eq!(bystander, Ok((after(9, 300), FinishReason::Length)));
    assert_eq!(answer, Ok((vec![1, 2, 3], FinishReason::Stop)));
    for (failed, (_, word)) in failed.into_iter().zip(broken) {
        let Err(EngineError::Failed { what }) = failed else { panic!("{failed:?}") };
        assert!(what.contains(word) && what.contains("grammar"), "{what}");
    }
}

/// Tokens of one class each, then the next; as hot as it gets.
#[tokio::test]
async fn hot_answers_keep_to_their_grammars_and_leave_their_neighbours_alone() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({ "prefill_chunk_tokens": 8 }), 400).await;
    let classes = |class: u32| Steps {
        allowed: (0..40).map(|step| (0..END).filter(|id| (id + step) % 5 == class).collect()).collect(),
        ..Steps::default()
    };
    let hot = |seed: u32| Job {
        sampling: Sampling { temperature: Some(50.0), seed: Some(u64::from(seed)), ..Sampling::default() },
        ..job(&(0..=seed).collect::<Vec<_>>(), 50 + seed)
    };
    let jobs = |index: u32| match index % 3 {
        0 => constrained(classes(index % 5), hot(index)),
        1 => hot(index),
        _ => job(&[index], 30 + index),
    };
    let mut alone = Vec::new();
    for index in 0..9 {
        alone.push(count(&*engine, jobs(index)).await.unwrap());
    }
    let together = join_all((0..9).map(|index| count(&*engine, jobs(index)))).await;
    for (index, (together, alone)) in (0..).zip(together.into_iter().zip(alone)) {
        assert_eq!(together.as_ref(), Ok(&alone), "job {index}");
        if index % 3 == 0 {
            assert_eq!((alone.0.len(), alone.1), (40, FinishReason::Stop));
            assert!((0..).zip(&alone.0).all(|(step, id)| (id + step) % 5 == index % 5), "{alone:?}");
        }
    }
}

#[tokio::test]
async fn who_was_sent_back_goes_on_in_its_grammar() {
    let _device = DEVICE.read().await;
    // Room for three until they outgrow 512 tokens of 32 bytes, then for two.
    let settings = json!({ "sequences_bytes_max": 3 * 512 * 32, "prefix_bytes_max": 0, "prefill_chunk_tokens": 64 });
    let (engine, _) = counting(settings, 600).await;
    let prompt: Vec<u32> = (0..210).map(|at| at % 60).collect();
    let grammar = |own: u32| Steps { allowed: vec![vec![own, own + 1]; 330], ..Steps::default() };
    let seeded = |own: u32| Sampling { seed: Some(u64::from(own)), ..Sampling::default() };
    let grammars = [10, 20, 30].map(|own| (own, grammar(own)));
    let answers = grammars.iter().map(|(own, steps)| {
        let (engine, job) = (&engine, Job { sampling: seeded(*own), ..job(&prompt, 400) });
        async move {
            let mut events = engine.submit(constrained(steps.clone(), job)).await.unwrap();
            let (mut written, mut sent_back, mut reason) = (Vec::new(), false, None);
            while let Some(event) = events.next().await {
                match event.unwrap() {
                    Event::Token { id, .. } => written.push(id),
                    Event::Prefill { .. } => sent_back |= !written.is_empty(),
                    Event::Finished { reason: why, .. } => reason = Some(why),
                    Event::Queued { .. } | Event::Text { .. } => {}
                }
            }
            (written, sent_back, reason)
        }
    });
    let answers = join_all(answers).await;
    assert!(answers.iter().any(|(_, sent_back, _)| *sent_back), "there was room for all of them");
    for ((own, steps), (written, _, reason)) in grammars.iter().zip(answers) {
        assert_eq!((written.len(), reason), (330, Some(FinishReason::Stop)));
        assert!(written.iter().all(|id| id == own || *id == own + 1) && written.contains(own), "{written:?}");
        assert_eq!(*steps.taken.lock().unwrap(), written, "each token was taken once");
    }
}

#[tokio::test]
async fn what_was_just_written_counts_as_repetition() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 100).await;
    let dry = Dry {
        multiplier: 30.0,
        base: 1.0,
        allowed_length: 2,
        last_n: None,
        sequence_breakers: Vec::new(),
        breaker_ids: vec![],
    };
    let asked = |dry| Job { sampling: Sampling { dry: Some(dry), ..Sampling::greedy() }, ..job(&[1, 2, 3, 1, 2], 5) };
    // 3 would repeat the prompt; the model counts on from what comes instead, until 1 2 is there for the third time.
    let (answer, neighbour) = futures::join!(count(&*engine, asked(dry.clone())), count(&*engine, job(&[7], 40)));
    assert_eq!(answer, Ok((vec![0, 1, 2, 1, 2], FinishReason::Length)));
    assert_eq!(neighbour, Ok((after(7, 40), FinishReason::Length)));
    let broken = Dry { breaker_ids: vec![2], ..dry };
    assert_eq!(count(&*engine, asked(broken)).await, Ok((after(2, 5), FinishReason::Length)));
}

#[tokio::test]
async fn probabilities_come_with_the_tokens_of_who_asks() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 100).await;
    let tokens = async |job: Job| {
        let events = engine.submit(job).await.unwrap().collect::<Vec<_>>().await;
        let tokens = events.into_iter().filter_map(|event| match event.unwrap() {
            Event::Token { id, logprob } => Some((id, logprob)),
            _ => None,
        });
        tokens.collect::<Vec<_>>()
    };
    let asks = Job { logprobs: Some(2), ..job(&[9], 30) };
    // Held to 20 by its grammar.
    let held = constrained(steps([&[20]]), Job { logprobs: Some(1), ..job(&[9], 30) });
    let (asking, held, silent) = futures::join!(tokens(asks), tokens(held), tokens(job(&[9], 30)));
    assert!(silent.iter().all(|(_, logprob)| logprob.is_none()));
    let log_sum = (20f32.exp() + (VOCAB - 1) as f32).ln();
    assert_eq!(asking.iter().map(|(id, _)| *id).collect::<Vec<_>>(), after(9, 30));
    for (id, logprob) in asking {
        let logprob = logprob.expect("it asked");
        assert_eq!((logprob.chosen.id, logprob.top.len(), logprob.top[0].id), (id, 2, id));
        assert!((logprob.chosen.logprob - (20.0 - log_sum)).abs() < 1e-4, "{logprob:?}");
        assert!((logprob.top[1].logprob + log_sum).abs() < 1e-4, "{logprob:?}");
    }
    let (20, Some(logprob)) = &held[0] else { panic!("{held:?}") };
    assert!(logprob.chosen.id == 20 && (logprob.chosen.logprob + log_sum).abs() < 1e-4, "{logprob:?}");
    assert_eq!(logprob.top[0].id, 10, "what the model would have said");
}
