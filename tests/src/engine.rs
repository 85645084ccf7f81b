//! The engine contract. Each function takes any engine and a prompt it can answer.

use futures::StreamExt;
use mesh_core::{Engine, EngineError, Event, FinishReason, Job, Prompt, Sampling, SubmitError, Usage};

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
        id: "conformance".into(),
        prompt,
        sampling: Sampling::greedy(),
        tokens_max: Some(tokens_max),
        ignore_eos: true,
        logprobs: None,
        landmarks: mesh_core::Landmarks::default(),
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
            Event::Prefill { done, total } => assert!(done <= total),
            Event::Token { id } => tokens.push(id),
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

async fn tokio_timeout<T>(work: impl Future<Output = T>) -> T {
    tokio::time::timeout(std::time::Duration::from_secs(60), work).await.expect("within a minute")
}
