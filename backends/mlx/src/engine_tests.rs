//! The engine over a model that counts, and that hangs, fails or panics when it is told to.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use futures::{StreamExt, future::join_all};
use mesh_core::{
    Device, DeviceKind, Engine, EngineError, EngineHandle, EngineState, Event, EventStream, FinishReason, Job, Prompt,
    Sampling, SubmitError,
};
use mesh_graph::{Cache, CacheKind, CausalModel, Rows, ffi, memory};
use mlx_rs::{Array, Dtype, error::Exception, ops};
use serde_json::{Value, json};
use tokio::sync::RwLock;

use crate::{
    device::{Built, Context, Start, start},
    identity::Identity,
    settings::Settings,
};

pub const VOCAB: i32 = 64;

/// All tests share the device: while one has it hang, others would fail as they should.
pub static DEVICE: RwLock<()> = RwLock::const_new(());

/// The token after 5 is 6, and after 63 it is 0.
#[derive(Default)]
struct Counting {
    faults: Arc<Faults>,
}

/// What is to go wrong, once each, in a pass that feeds this token plus one; 0 is never.
#[derive(Default)]
pub struct Faults {
    pub hang_ms: AtomicU64,
    pub fail_at: AtomicU32,
    pub panic_at: AtomicU32,
    pub passes: AtomicU64,
}

impl CausalModel for Counting {
    fn forward(&self, tokens: &Array, cache: &mut Cache, rows: Rows) -> Result<Array, Exception> {
        self.faults.passes.fetch_add(1, Ordering::Relaxed);
        std::thread::sleep(Duration::from_millis(self.faults.hang_ms.swap(0, Ordering::Relaxed)));
        let fed = |fault: &AtomicU32| match fault.load(Ordering::Relaxed) {
            0 => false,
            token => {
                let ids = tokens.as_dtype(Dtype::Uint32).and_then(|ids| ids.eval().map(|()| ids));
                let found = ids.is_ok_and(|ids| ids.to_vec_exact::<u32>().is_ok_and(|ids| ids.contains(&(token - 1))));
                found && fault.swap(0, Ordering::Relaxed) != 0
            }
        };
        if fed(&self.faults.fail_at) {
            return Err(Exception::custom("out of luck"));
        }
        assert!(!fed(&self.faults.panic_at), "told to");
        let pass = cache.begin(tokens);
        let (batch, time) = (tokens.dim(0), tokens.dim(1));
        let keys = ops::zeros_dtype(&[batch, 1, time, 4], Dtype::Float32)?;
        cache.layers()[0].positions()?.update([&keys, &keys])?;
        cache.advance(&pass);
        let next = tokens.as_dtype(Dtype::Int32)?.add(Array::from_int(1))?.remainder(Array::from_int(VOCAB))?;
        let ids = ops::arange::<_, i32>(0, VOCAB, None)?.reshape(&[1, 1, VOCAB])?;
        let logits = ids.eq(next.reshape(&[batch, time, 1])?)?.as_dtype(Dtype::Float32)?;
        let logits = logits.multiply(Array::from_f32(20.0))?;
        match rows {
            // A state is which token was fed.
            Rows::States => {
                ids.eq(tokens.as_dtype(Dtype::Int32)?.reshape(&[batch, time, 1])?)?.as_dtype(Dtype::Float32)
            }
            Rows::All => Ok(logits),
            Rows::Last => ffi::slice(&logits, [0, time - 1, 0], [batch, time, VOCAB]),
        }
    }

    fn layout(&self) -> Vec<CacheKind> {
        vec![CacheKind::Full]
    }

    fn vocab_size(&self) -> u32 {
        VOCAB as u32
    }
}

pub async fn counting(settings: Value, context_tokens: u32) -> (EngineHandle, Arc<Faults>) {
    let faults = Arc::new(Faults::default());
    let model = Counting { faults: faults.clone() };
    let handle = start(Start {
        name: "counting".into(),
        device: Device { kind: DeviceKind::Cpu, name: "test".into(), memory_bytes: Some(4 << 30) },
        settings: Settings::read(&settings).unwrap(),
        context: Context { tokens: context_tokens, asked: true },
        config: json!({ "hidden_size": 4, "intermediate_size": 4, "num_attention_heads": 1 }),
        eos: vec![63],
        identity: Identity { weights: Vec::new(), circumstances: "counting".into() },
        build: Box::new(move |_| Ok(Built { model: Box::new(model), weights_bytes: 0 })),
    })
    .await
    .unwrap();
    (handle, faults)
}

pub fn job(prompt: &[u32], tokens_max: u32) -> Job {
    Job {
        sampling: Sampling::greedy(),
        tokens_max: Some(tokens_max),
        ignore_eos: true,
        ..Job::new("test", Prompt::Tokens(prompt.to_vec()))
    }
}

pub async fn tokens(mut events: EventStream) -> Result<(Vec<u32>, FinishReason), EngineError> {
    let mut written = Vec::new();
    loop {
        match events.next().await.expect("a last event") {
            Ok(Event::Token { id, .. }) => written.push(id),
            Ok(Event::Finished { reason, .. }) => return Ok((written, reason)),
            Ok(Event::Queued { .. } | Event::Prefill { .. } | Event::Text { .. }) => {}
            Err(error) => return Err(error),
        }
    }
}

pub async fn count(engine: &dyn Engine, job: Job) -> Result<(Vec<u32>, FinishReason), EngineError> {
    tokens(engine.submit(job).await.expect("admitted")).await
}

/// So many tokens after `from`.
pub fn after(from: u32, count: u32) -> Vec<u32> {
    (1..=count).map(|step| (from + step) % VOCAB as u32).collect()
}

#[tokio::test]
async fn a_device_that_hangs_is_given_up_and_another_engine_serves() {
    let _device = DEVICE.write().await;
    let (engine, faults) = counting(json!({ "step_s_max": 1 }), 100).await;
    let (bystander, _) = counting(json!({}), 100).await;
    assert_eq!(count(&*engine, job(&[1], 3)).await, Ok((after(1, 3), FinishReason::Length)));
    faults.hang_ms.store(3000, Ordering::Relaxed);
    let (first, second) = (engine.submit(job(&[5], 9)).await.unwrap(), engine.submit(job(&[6], 9)).await.unwrap());
    for events in [first, second] {
        let error = tokens(events).await.unwrap_err();
        assert!(error.to_string().contains("no progress"), "{error}");
    }
    // Whoever else needs the device is told, too, rather than left waiting.
    let error = count(&*bystander, job(&[1], 3)).await.unwrap_err();
    assert!(error.to_string().contains("does not end"), "{error}");
    // The device has not answered yet.
    assert!(matches!(engine.state_now(), EngineState::Failed(_)));
    assert!(matches!(engine.submit(job(&[1], 1)).await, Err(SubmitError::Gone { .. })));
    assert!(matches!(engine.ended().await, EngineState::Failed(_)));
    engine.drain(Duration::from_secs(1)).await;
    let (another, _) = counting(json!({}), 100).await;
    assert_eq!(count(&*another, job(&[1], 3)).await, Ok((after(1, 3), FinishReason::Length)));
}

#[tokio::test]
async fn an_error_ends_those_it_concerns_and_nobody_else() {
    let _device = DEVICE.read().await;
    let (engine, faults) = counting(json!({ "prefill_chunk_tokens": 8 }), 4000).await;
    // One that writes long, in a group of its own because of its length.
    let long: Vec<u32> = (0..1500).map(|at| at % 50).collect();
    let writer = engine.submit(job(&long, 400)).await.unwrap();
    faults.fail_at.store(61, Ordering::Relaxed);
    let error = count(&*engine, job(&[58], 9)).await.unwrap_err();
    assert_eq!(error, EngineError::Failed { what: "out of luck".into() });
    assert_eq!(tokens(writer).await, Ok((after(1499 % 50, 400), FinishReason::Length)));
    // A prompt that cannot be read fails alone, too.
    faults.fail_at.store(61, Ordering::Relaxed);
    let reads = count(&*engine, job(&[60, 1, 2], 2));
    let (failed, other) = futures::join!(reads, count(&*engine, job(&[7, 8], 5)));
    assert!(failed.is_err());
    assert_eq!(other, Ok((after(8, 5), FinishReason::Length)));
    assert_eq!(engine.state_now(), EngineState::Ready);
}

#[tokio::test]
async fn a_bias_on_a_token_that_is_not_there_is_refused() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({}), 100).await;
    let sampling = Sampling { logit_bias: [(600, 1.0)].into(), ..Sampling::greedy() };
    let refused = engine.submit(Job { sampling, ..job(&[1], 1) }).await.err();
    assert_eq!(refused, Some(SubmitError::UnknownToken { id: 600, vocab_size: VOCAB as u32 }));
}

#[tokio::test]
async fn a_panic_reaches_everybody() {
    let _device = DEVICE.read().await;
    let (engine, faults) = counting(json!({ "parallel_requests_max": 1 }), 200).await;
    faults.panic_at.store(41, Ordering::Relaxed);
    let runs = engine.submit(job(&[30], 100)).await.unwrap();
    let waits = engine.submit(job(&[1], 5)).await.unwrap();
    for events in [runs, waits] {
        let error = tokens(events).await.unwrap_err();
        assert!(error.to_string().contains("told to"), "{error}");
    }
    assert!(matches!(engine.state_now(), EngineState::Failed(_)));
}

#[tokio::test]
async fn a_slow_reader_holds_up_itself_alone() {
    let _device = DEVICE.read().await;
    let (engine, faults) = counting(json!({}), 4000).await;
    let mut slow = engine.submit(job(&[9], 2000)).await.unwrap();
    let _ = slow.next().await;
    let answers = join_all((0..6).map(|_| count(&*engine, job(&[9], 900)))).await;
    for answer in answers {
        assert_eq!(answer, Ok((after(9, 900), FinishReason::Length)));
    }
    // It got no further than what its channel holds.
    let passes = faults.passes.load(Ordering::Relaxed);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert_eq!(faults.passes.load(Ordering::Relaxed), passes, "nothing is computed for who does not read");
    let mut rest = tokens(slow).await.unwrap().0;
    let first = rest.remove(0);
    assert!(first == 10 || first == 11, "{first}");
    assert_eq!(rest, after(first, rest.len() as u32));
}

/// Tokens that were known of a prompt that is asked twice.
async fn known_again(settings: Value) -> u32 {
    let (engine, _) = counting(settings, 600).await;
    let prompt: Vec<u32> = (0..300).map(|at| at % 61).collect();
    let mut known = 0;
    for _ in 0..2 {
        let events = engine.submit(job(&prompt, 3)).await.unwrap().collect::<Vec<_>>().await;
        let Some(Ok(Event::Finished { usage, .. })) = events.last() else { panic!("{events:?}") };
        assert_eq!(usage.completion_tokens, 3);
        known = usage.cached_tokens;
    }
    known
}

#[tokio::test]
async fn what_has_no_room_is_not_remembered_and_does_no_harm() {
    let _device = DEVICE.read().await;
    assert_eq!(known_again(json!({})).await, 299);
    assert_eq!(known_again(json!({ "prefix_bytes_max": 0 })).await, 0);
    // Less than half of the prompt.
    let some = known_again(json!({ "prefix_bytes_max": 4000, "prefill_chunk_tokens": 32 })).await;
    assert!(some < 150, "{some}");
}

#[tokio::test]
async fn a_short_prompt_does_not_wait_for_a_long_one() {
    let _device = DEVICE.read().await;
    let (engine, _) = counting(json!({ "prefill_chunk_tokens": 64 }), 8000).await;
    let long: Vec<u32> = (0..6000).map(|at| at % 61).collect();
    let mut slow = engine.submit(job(&long, 2)).await.unwrap();
    let mut done = 0;
    while done < 640 {
        if let Some(Ok(Event::Prefill { done: so_far, .. })) = slow.next().await {
            done = so_far;
        }
    }
    assert_eq!(count(&*engine, job(&[1, 2, 3], 4)).await, Ok((after(3, 4), FinishReason::Length)));
    // What the other's reader has not seen yet tells how far it was read meanwhile.
    let mut seen = done;
    while let Some(Some(Ok(event))) = futures::FutureExt::now_or_never(slow.next()) {
        if let Event::Prefill { done, .. } = event {
            seen = done;
        }
    }
    assert!(seen < 3000, "{seen} tokens were read before a prompt of three");
    assert_eq!(tokens(slow).await.unwrap().0, after(5999 % 61, 2));
}

/// Random lengths, prompts that share beginnings, readers that leave: nobody gets another's answer, nothing is left over.
#[tokio::test]
async fn two_thousand_come_and_go_and_leave_nothing() {
    let _device = DEVICE.read().await;
    let settings = json!({
        "parallel_requests_max": 8, "queue_requests_max": 64, "prefill_chunk_tokens": 32, "prefix_bytes_max": 1 << 20,
    });
    let (engine, _) = counting(settings, 600).await;
    let mut active = Vec::new();
    for round in 0..40_u32 {
        let crowd = (0..50_u32).map(|index| {
            let engine = &engine;
            async move {
                let mixed = (round * 50 + index).wrapping_mul(2_654_435_761);
                let length = 1 + mixed % 150;
                let prompt: Vec<u32> = (0..length).map(|at| (at * (1 + mixed % 3)) % 60).collect();
                let count = 1 + (mixed >> 8) % 40;
                let last = prompt[prompt.len() - 1];
                match mixed >> 28 {
                    // Leaves at once, or after some events.
                    0 | 1 => drop(engine.submit(job(&prompt, count)).await.expect("a place")),
                    2 | 3 => {
                        let events = engine.submit(job(&prompt, 400)).await.expect("a place");
                        drop(events.take(3).collect::<Vec<_>>().await);
                    }
                    4 => assert!(engine.submit(job(&[1000], 1)).await.is_err()),
                    5 => assert!(engine.submit(job(&vec![1; 600], 1)).await.is_err()),
                    _ => {
                        let answer = super::engine_tests::count(&**engine, job(&prompt, count)).await;
                        assert_eq!(answer, Ok((after(last, count), FinishReason::Length)));
                    }
                }
            }
        });
        join_all(crowd).await;
        active.push(memory::active_bytes());
    }
    // What is remembered has its budget; beyond that nothing stays.
    let (early, late) = (active[10], active[39]);
    assert!(late <= early + (2 << 20), "{active:?}");
    engine.drain(Duration::from_secs(10)).await;
    assert_eq!(engine.state_now(), EngineState::Stopped);
}
