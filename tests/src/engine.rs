//! The engine contract. Each function takes any engine and a prompt it can answer.

use futures::StreamExt;
use mesh_core::{Engine, EngineError, Event, EventStream, FinishReason, Job, Prompt, Sampling, SubmitError, Usage};

/// What a finished job said.
#[derive(Clone, Debug, PartialEq)]
pub struct Answer {
    /// Token ids, from engines that report them.
    pub tokens: Vec<u32>,
    /// Text, from engines that report it.
    pub text: String,
    /// Why it ended.
    pub reason: FinishReason,
    /// Tokens read and written.
    pub usage: Usage,
}

/// A greedy job.
pub fn job(prompt: Prompt, tokens_max: u32) -> Job {
    Job {
        sampling: Sampling::greedy(),
        tokens_max: Some(tokens_max),
        ignore_eos: true,
        ..Job::new("conformance", prompt)
    }
}

/// Runs a job to its end.
pub async fn run(engine: &dyn Engine, job: Job) -> Result<Answer, EngineError> {
    let mut events = engine.submit(job).await.expect("the job is admitted");
    let (mut tokens, mut text, mut finished) = (Vec::new(), String::new(), None);
    while let Some(event) = events.next().await {
        assert!(finished.is_none(), "nothing comes after the last event");
        match event? {
            Event::Queued { .. } => {}
            Event::Prefill { done, total, cached } => assert!(cached <= done && done <= total),
            Event::Token { id, .. } => tokens.push(id),
            Event::Text { text: piece, .. } => text.push_str(&piece),
            Event::Finished { reason, usage, .. } => finished = Some((reason, usage)),
        }
    }
    let (reason, usage) = finished.expect("a stream ends with `Finished` or an error");
    Ok(Answer { tokens, text, reason, usage })
}

/// The same greedy job twice gives the same answer, and the second reuses the first one's prompt where that is promised.
pub async fn repeats(engine: &dyn Engine, prompt: Prompt) {
    let first = run(engine, job(prompt.clone(), 8)).await.expect("first");
    let second = run(engine, job(prompt, 8)).await.expect("second");
    assert_eq!((&first.tokens, &first.text), (&second.tokens, &second.text));
    assert_eq!(first.reason, FinishReason::Length);
    assert_eq!(first.usage.completion_tokens, 8);
    if engine.capabilities().prefix_reuse {
        assert!(second.usage.cached_tokens > 0, "{:?}", second.usage);
        assert!(second.usage.cached_tokens < second.usage.prompt_tokens);
    }
}

/// A seed repeats a draw; another seed gives another one.
pub async fn seeds(engine: &dyn Engine, prompt: Prompt) {
    let drawn = async |seed| {
        let sampling = Sampling { temperature: Some(2.0), seed: Some(seed), ..Sampling::default() };
        let answer = run(engine, Job { sampling, ..job(prompt.clone(), 12) }).await.expect("drawn");
        (answer.tokens, answer.text)
    };
    assert_eq!(drawn(1).await, drawn(1).await);
    assert_ne!(drawn(1).await, drawn(2).await);
}

/// A prompt as long as the context is refused with both numbers, an empty one by name, and neither does harm.
pub async fn bounds(engine: &dyn Engine, good: Prompt) {
    let max = engine.capabilities().context_tokens_max;
    let long = job(Prompt::Tokens(vec![5; max as usize + 1]), 1);
    let refused = engine.submit(long).await.err();
    assert_eq!(refused, Some(SubmitError::TooLong { prompt: max + 1, max }));
    let empty = engine.submit(job(Prompt::Tokens(Vec::new()), 1)).await.err();
    assert_eq!(empty, Some(SubmitError::Empty));
    run(engine, job(good, 2)).await.expect("still serving");
}

/// A stream that is dropped leaves room for the next job, however long it would have run.
pub async fn cancels(engine: &dyn Engine, prompt: Prompt) {
    let max = engine.capabilities().context_tokens_max;
    let mut events = engine.submit(job(prompt.clone(), max)).await.expect("admitted");
    let _ = events.next().await;
    drop(events);
    let next = tokio_timeout(run(engine, job(prompt, 2))).await;
    assert_eq!(next.expect("served").usage.completion_tokens, 2);
}

/// As many jobs at once as there are places, and more: each answer is the one it has alone, whoever comes and goes.
pub async fn company(engine: &dyn Engine, prompts: &[Prompt]) {
    let jobs = |index: usize| {
        let seeded =
            Sampling { temperature: Some(1.5), seed: Some(index as u64), top_p: Some(0.95), ..Sampling::default() };
        let plain = Sampling { temperature: Some(1.0), seed: Some(index as u64), ..Sampling::default() };
        let narrow = Sampling { top_k: Some(7), min_p: Some(0.01), ..seeded.clone() };
        let sampling = [Sampling::greedy(), seeded, plain, narrow][index % 4].clone();
        let tokens_max = 3 + (index as u32 * 5) % 17;
        Job { sampling, ..job(prompts[index % prompts.len()].clone(), tokens_max) }
    };
    let count = 3 * prompts.len();
    let mut alone = Vec::new();
    for index in 0..count {
        alone.push(run(engine, jobs(index)).await.expect("alone"));
    }
    let together = futures::future::join_all((0..count).map(|index| async move {
        if index % 5 == 4 {
            // Somebody who leaves after a token or two.
            let mut events = engine.submit(jobs(index)).await.expect("admitted");
            let left = events.next().await;
            drop((left, events));
            return None;
        }
        Some(run(engine, jobs(index)).await.expect("in company"))
    }))
    .await;
    for (index, (together, alone)) in together.into_iter().zip(alone).enumerate() {
        if let Some(together) = together {
            assert_eq!((together.tokens, together.text), (alone.tokens, alone.text), "job {index}");
            assert_eq!(together.reason, alone.reason);
        }
    }
}

/// Beyond the places and the queue a job is refused at once, and told when to come again; who waits is told how many are
/// before it, may leave, and is served in the end.
pub async fn queues(engine: &dyn Engine, prompt: Prompt) {
    let capabilities = engine.capabilities();
    let places = capabilities.requests_parallel_max + capabilities.requests_queued_max;
    let long = capabilities.context_tokens_max;
    let mut admitted = Vec::new();
    for _ in 0..places {
        admitted.push(engine.submit(job(prompt.clone(), long)).await.expect("a place"));
    }
    match engine.submit(job(prompt.clone(), 1)).await.err() {
        Some(SubmitError::Busy { running, retry_after }) => {
            assert!(running >= places && !retry_after.is_zero(), "{running} {retry_after:?}");
        }
        other => panic!("{other:?}"),
    }
    if capabilities.requests_queued_max > 0 {
        let mut last = admitted.pop().expect("one that waits");
        let told = tokio_timeout(last.next()).await;
        let ahead = capabilities.requests_queued_max - 1;
        assert!(matches!(told, Some(Ok(Event::Queued { ahead: told })) if told <= ahead), "{told:?}");
        // It leaves while it waits: its place is free, soon.
        drop(last);
        drop(place(engine, &prompt).await);
    }
    drop(admitted);
    let last = place(engine, &prompt).await.collect::<Vec<_>>().await.pop();
    assert!(matches!(last, Some(Ok(Event::Finished { .. }))), "{last:?}");
}

/// A place, as soon as somebody who left is noticed.
async fn place(engine: &dyn Engine, prompt: &Prompt) -> EventStream {
    tokio_timeout(async {
        loop {
            match engine.submit(job(prompt.clone(), 2)).await {
                Ok(events) => return events,
                Err(SubmitError::Busy { .. }) => tokio::time::sleep(std::time::Duration::from_millis(5)).await,
                Err(other) => panic!("{other}"),
            }
        }
    })
    .await
}

async fn tokio_timeout<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(std::time::Duration::from_secs(60), work).await.expect("within a minute")
}
