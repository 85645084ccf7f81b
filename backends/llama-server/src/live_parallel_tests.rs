//! Several requests at once, and several conversations in turn, over a real llama-server.

use std::path::Path;

use futures::{StreamExt, future::join_all};
use mesh_core::{
    EngineHandle, Event, EventStream, FinishReason, InferenceBackend, ProgressSink, Sampling, SubmitError,
};
use serde_json::json;
use tokio::time::timeout;

use crate::{
    BACKEND, fixture,
    live_tests::{SOON, answer, golden, job, plan, ready, section},
};

/// An engine on the golden Llama with a context of 1024 tokens.
async fn load(binary: &Path, golden: &Path, parallel: u32, queued: u32) -> EngineHandle {
    let mut settings = section(binary);
    settings["parallel_requests_max"] = json!(parallel);
    settings["queue_requests_max"] = json!(queued);
    settings["prompt_cache_mib"] = json!(64);
    let profile = fixture::profile("golden", golden.join("llama/model.gguf"), "llama");
    BACKEND.load(plan(profile, settings, Some(1024)), ProgressSink::silent()).await.unwrap()
}

/// `count` token ids, another sequence for each `seed`.
fn tokens(seed: u32, count: u32) -> Vec<u32> {
    (0..count).map(|at| 10 + (seed * 131 + at * (7 + seed)) % 480).collect()
}

async fn next(stream: &mut EventStream) -> Event {
    timeout(SOON, stream.next()).await.expect("nothing comes").expect("the stream is over").unwrap()
}

#[tokio::test]
async fn requests_beside_each_other_are_answered_as_alone() {
    let Some((binary, shared)) = ready("requests_beside_each_other_are_answered_as_alone") else { return };
    let engine = load(&binary, &shared, 4, 32).await;
    assert_eq!((engine.capabilities().requests_parallel_max, engine.capabilities().requests_queued_max), (4, 32));
    let (prompt, _) = golden(&shared.join("llama"));
    // Beginnings of the golden prompt, so that each is answered differently; of different lengths, so that they are at
    // different places when they share a step.
    let jobs: Vec<_> =
        (0..12).map(|n| job(prompt[..prompt.len() - n].to_vec(), Sampling::greedy(), 4 + n as u32)).collect();
    let mut alone = Vec::new();
    for job in &jobs {
        alone.push(answer(&engine, job.clone()).await);
    }
    let beside = join_all(jobs.iter().map(|job| answer(&engine, job.clone()))).await;
    for ((alone, beside), job) in alone.iter().zip(&beside).zip(&jobs) {
        assert_eq!((&beside.0, beside.1), (&alone.0, FinishReason::Length), "{:?}", job.prompt);
        assert_eq!(beside.2.completion_tokens, alone.2.completion_tokens);
    }
}

#[tokio::test]
async fn every_slot_has_the_whole_context() {
    let Some((binary, shared)) = ready("every_slot_has_the_whole_context") else { return };
    let engine = load(&binary, &shared, 2, 0).await;
    let most = engine.capabilities().context_tokens_max;
    assert_eq!(most, 1024);
    let answers =
        join_all((0..2).map(|seed| answer(&engine, job(tokens(seed, most - 9), Sampling::greedy(), 9)))).await;
    assert!(answers.iter().all(|(_, _, usage)| usage.completion_tokens == 9), "{answers:?}");
    let long = engine.submit(job(tokens(0, most + 5), Sampling::greedy(), 1)).await.err();
    assert_eq!(long, Some(SubmitError::TooLong { prompt: most + 5, max: most }));
}

/// Three conversations that begin with the same instructions, in turn, with fewer slots than conversations, and with enough.
#[tokio::test]
async fn conversations_in_turn_keep_their_prefixes() {
    let Some((binary, shared)) = ready("conversations_in_turn_keep_their_prefixes") else { return };
    for parallel in [1, 2, 4] {
        let engine = load(&binary, &shared, parallel, 0).await;
        let mut conversations: Vec<_> =
            (1..4).map(|seed| [tokens(0, 60), tokens(seed, 100 * seed - 80)].concat()).collect();
        for turn in 0..4u32 {
            for (seed, conversation) in (1..).zip(&mut conversations) {
                let known = conversation.len() as u32;
                conversation.extend(tokens(10 * turn + seed, 30));
                let (.., usage) = answer(&engine, job(conversation.clone(), Sampling::greedy(), 3)).await;
                assert_eq!(usage.prompt_tokens, known + 30);
                let expected = if turn == 0 { 0..=60 } else { known - 1..=known };
                let cached = usage.cached_tokens;
                assert!(expected.contains(&cached), "{parallel} slots, turn {turn} of {seed}: {cached} of {known}");
            }
        }
    }
}

#[tokio::test]
async fn whoever_leaves_makes_room_while_waiting_and_while_running() {
    let Some((binary, shared)) = ready("whoever_leaves_makes_room_while_waiting_and_while_running") else { return };
    let engine = load(&binary, &shared, 1, 3).await;
    let submit = async |most| engine.submit(job(tokens(1, 20), Sampling::greedy(), most)).await;
    let mut running = submit(1000).await.unwrap();
    while !matches!(next(&mut running).await, Event::Text { .. }) {}
    let mut waiting = Vec::new();
    for ahead in 0..3 {
        waiting.push(submit(5).await.unwrap());
        assert_eq!(next(waiting.last_mut().unwrap()).await, Event::Queued { ahead });
    }
    let Err(SubmitError::Busy { running: taken, .. }) = submit(5).await else { panic!("a fifth was admitted") };
    assert_eq!(taken, 4);
    drop(waiting.remove(1));
    assert_eq!(next(&mut waiting[1]).await, Event::Queued { ahead: 1 });
    waiting.push(submit(5).await.unwrap());
    assert_eq!(next(&mut waiting[2]).await, Event::Queued { ahead: 2 });
    drop(running);
    for stream in waiting {
        let events: Vec<_> = timeout(SOON, stream.collect()).await.unwrap();
        let Some(Ok(Event::Finished { usage, .. })) = events.last() else { panic!("{events:?}") };
        assert_eq!(usage.completion_tokens, 5);
    }
}
