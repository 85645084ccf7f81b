//! Vectors for texts: the engine over a model whose states say which token was fed.

use std::{
    sync::atomic::Ordering,
    time::{Duration, Instant},
};

use futures::FutureExt;
use mesh_core::{
    Embed, EmbedError, Embedded, EngineError, EngineState, FinishReason, Pooling, Prompt, PromptForm, SubmitError,
};
use serde_json::json;

use crate::engine_tests::{DEVICE, VOCAB, after, count, counting, job};

fn embed(inputs: &[Vec<u32>], pooling: Pooling) -> Embed {
    Embed { id: "test".into(), inputs: inputs.iter().cloned().map(Prompt::Tokens).collect(), pooling }
}

/// How often each token is there, scaled to length 1.
fn counts(input: &[u32]) -> Vec<f32> {
    let mut counts = vec![0.0; VOCAB as usize];
    input.iter().for_each(|id| counts[*id as usize] += 1.0);
    let length = counts.iter().map(|count| count * count).sum::<f32>().sqrt();
    counts.iter().map(|count| count / length).collect()
}

fn assert_close(found: &Embedded, expected: &[Vec<f32>]) {
    assert_eq!(found.vectors.len(), expected.len());
    for (at, (found, expected)) in found.vectors.iter().zip(expected).enumerate() {
        assert_eq!(found.len(), expected.len());
        let worst = found.iter().zip(expected).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(worst < 1e-5, "input {at}: {found:?} instead of {expected:?}");
    }
}

#[tokio::test]
async fn vectors_are_means_or_last_states_of_length_one() {
    let _device = DEVICE.read().await;
    // More texts than are read at once, short ones and ones of several chunks, in no order.
    let inputs: Vec<Vec<u32>> =
        (0..50_u32).map(|at| (0..1 + (at * 37) % 90).map(|step| (step * (at + 1)) % 50).collect()).collect();
    let means: Vec<_> = inputs.iter().map(|input| counts(input)).collect();
    let lasts: Vec<_> = inputs.iter().map(|input| counts(&input[input.len() - 1..])).collect();
    let tokens = inputs.iter().map(|input| input.len() as u32).sum::<u32>();
    for chunk in [2048, 16, 1] {
        let (engine, _) = counting(json!({ "prefill_chunk_tokens": chunk }), 100).await;
        assert!(engine.capabilities().embeddings);
        let mean = engine.embed(embed(&inputs, Pooling::Mean)).await.unwrap();
        assert_eq!(mean.prompt_tokens, tokens);
        assert_close(&mean, &means);
        assert_close(&engine.embed(embed(&inputs, Pooling::Last)).await.unwrap(), &lasts);
    }
}

#[tokio::test]
async fn texts_that_cannot_be_read_are_refused() {
    let _device = DEVICE.read().await;
    let settings = json!({ "parallel_requests_max": 1, "queue_requests_max": 1 });
    let (engine, faults) = counting(settings, 20).await;
    let refused = async |inputs: &[Vec<u32>]| engine.embed(embed(inputs, Pooling::Mean)).await.err();
    let submit = |error: SubmitError| Some(EmbedError::Submit(error));
    assert_eq!(refused(&[vec![1], vec![]]).await, submit(SubmitError::Empty));
    assert_eq!(refused(&[vec![1; 21]]).await, submit(SubmitError::TooLong { prompt: 21, max: 20 }));
    assert_eq!(refused(&[vec![1; 20]]).await, None, "nothing is written after it");
    assert_eq!(refused(&[]).await, None);
    assert_eq!(refused(&[vec![64]]).await, submit(SubmitError::UnknownToken { id: 64, vocab_size: 64 }));
    let text = Prompt::Text { text: "a".into(), add_special: true };
    let text = engine.embed(Embed { inputs: vec![text], ..embed(&[], Pooling::Mean) }).await.err();
    assert_eq!(text, submit(SubmitError::WrongForm { wanted: PromptForm::Tokens }));
    // Two that hold all places, until they are dropped.
    let held = [engine.submit(job(&[1], 19)).await.unwrap(), engine.submit(job(&[1], 19)).await.unwrap()];
    let busy = refused(&[vec![1]]).await;
    assert!(matches!(busy, Some(EmbedError::Submit(SubmitError::Busy { .. })) | None), "{busy:?}");
    drop(held);
    // One that the device fails is alone with that, and leaves its place.
    let since = Instant::now();
    faults.fail_at.store(31, Ordering::Relaxed);
    let failed = loop {
        match refused(&[vec![30]]).await {
            Some(EmbedError::Submit(SubmitError::Busy { .. })) if since.elapsed() < Duration::from_secs(60) => {
                tokio::time::sleep(Duration::from_millis(2)).await;
            }
            other => break other,
        }
    };
    assert_eq!(failed, Some(EmbedError::Engine(EngineError::Failed { what: "out of luck".into() })));
    assert_eq!(refused(&[vec![30]]).await, None);
    engine.drain(Duration::from_secs(5)).await;
    assert!(matches!(refused(&[vec![1]]).await, Some(EmbedError::Submit(SubmitError::Gone { .. }))));
}

#[tokio::test]
async fn answers_go_on_beside_vectors_and_a_short_text_does_not_wait_for_many() {
    let _device = DEVICE.read().await;
    let (engine, faults) = counting(json!({ "prefill_chunk_tokens": 64 }), 2000).await;
    let many = vec![vec![5; 1500]; 40];
    let mut slow = engine.embed(embed(&many, Pooling::Mean));
    assert!(slow.as_mut().now_or_never().is_none());
    assert_eq!(count(&*engine, job(&[1; 100], 40)).await, Ok((after(1, 40), FinishReason::Length)));
    let short = engine.embed(embed(&[vec![3, 3, 4]], Pooling::Mean)).await.unwrap();
    assert_close(&short, &[counts(&[3, 3, 4])]);
    // 40 texts of 94 chunks each.
    let passes = faults.passes.load(Ordering::Relaxed);
    assert!(passes < 1000, "{passes} passes came first");
    assert!(slow.as_mut().now_or_never().is_none(), "the many are not done");
    // Nobody waits for them any more.
    drop(slow);
    assert_eq!(count(&*engine, job(&[9], 5)).await, Ok((after(9, 5), FinishReason::Length)));
    let passes = faults.passes.load(Ordering::Relaxed);
    assert!(passes < 1100, "{passes}");
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(faults.passes.load(Ordering::Relaxed), passes, "nothing is computed for who left");
}

#[tokio::test]
async fn a_drain_without_grace_ends_vectors_too() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({ "prefill_chunk_tokens": 8 }), 2000).await;
    let many = vec![vec![5; 1500]; 40];
    let mut slow = engine.embed(embed(&many, Pooling::Mean));
    assert!(slow.as_mut().now_or_never().is_none());
    let (answer, ()) = futures::join!(slow, engine.drain(Duration::ZERO));
    assert_eq!(answer.err(), Some(EmbedError::Engine(EngineError::Stopped)));
    assert_eq!(engine.state_now(), EngineState::Stopped);
}

#[tokio::test]
async fn a_panic_reaches_who_waits_for_vectors() {
    let _device = DEVICE.read().await;
    let (engine, faults) = counting(json!({}), 200).await;
    faults.panic_at.store(41, Ordering::Relaxed);
    let error = engine.embed(embed(&[vec![40]], Pooling::Last)).await.unwrap_err();
    assert!(error.to_string().contains("told to"), "{error}");
}

/// Little memory: texts and answers take turns with it, and all come to their end.
#[tokio::test]
async fn vectors_and_answers_share_little_memory() {
    let _device = DEVICE.read().await;
    let settings = json!({ "sequences_bytes_max": 1024 * 32, "prefix_bytes_max": 0, "prefill_chunk_tokens": 64 });
    let (engine, _) = counting(settings, 600).await;
    let inputs: Vec<Vec<u32>> = (0..6).map(|at| vec![at; 590]).collect();
    let expected: Vec<_> = inputs.iter().map(|input| counts(input)).collect();
    let prompt = vec![3; 400];
    let answers = futures::future::join_all((0..4).map(|_| count(&*engine, job(&prompt, 190))));
    let (vectors, answers) = futures::join!(engine.embed(embed(&inputs, Pooling::Mean)), answers);
    assert_close(&vectors.unwrap(), &expected);
    for answer in answers {
        assert_eq!(answer, Ok((after(3, 190), FinishReason::Length)));
    }
}
