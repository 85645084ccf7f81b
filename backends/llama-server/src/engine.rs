//! A running child as an engine: admission, one task for each job, and the end.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use async_trait::async_trait;
use mesh_core::{
    Capabilities, Constraint, Engine, EngineError, EngineState, Event, EventStream, Grammar, Job, Prompt, SubmitError,
};
use tokio::{
    sync::{mpsc, watch},
    time::{sleep, timeout},
};
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;

use crate::{
    child::{Ended, Process},
    client::{Client, ClientError},
    gate::{Gate, Place},
    schema,
    wire::{Candidate, Completion},
};

/// Events that may wait for a slow reader, for each job. A reader slower than that holds back its own job only.
const EVENTS_BUFFERED_MAX: usize = 64;
/// How long the child has to end once asked to.
const END_MAX: Duration = Duration::from_secs(5);
/// How long the reason for a broken connection is waited for: the child's end is noticed a moment after its connections'.
const REASON_MAX: Duration = Duration::from_secs(2);
/// Lines of the child's log that a failure quotes.
const LINES_QUOTED: usize = 8;

/// A loaded model. Dropping it kills the child.
pub struct LlamaEngine {
    capabilities: Capabilities,
    /// Entries in the vocabulary, where the child tells.
    vocab_size: Option<u32>,
    client: Client,
    process: Arc<Process>,
    state: Arc<watch::Sender<EngineState>>,
    /// A place for each job that is running or waiting.
    gate: Gate,
    /// Cancels every job.
    cancel: CancellationToken,
    /// The child's end is ours.
    stopping: Arc<AtomicBool>,
}

impl LlamaEngine {
    /// An engine over a child that is ready. Has to be called inside a tokio runtime.
    pub(crate) fn new(process: Process, client: Client, capabilities: Capabilities, vocab_size: Option<u32>) -> Self {
        let gate = Gate::new(capabilities.requests_parallel_max, capabilities.requests_queued_max);
        let (state, _) = watch::channel(EngineState::Ready);
        let engine = Self {
            capabilities,
            vocab_size,
            client,
            process: Arc::new(process),
            state: Arc::new(state),
            gate,
            cancel: CancellationToken::new(),
            stopping: Arc::new(AtomicBool::new(false)),
        };
        let (ended, tail) = (engine.process.ended(), engine.process.tail.clone());
        let (state, stopping) = (engine.state.clone(), engine.stopping.clone());
        tokio::spawn(async move {
            let Ended { status, .. } = ended.await;
            if stopping.load(Ordering::SeqCst) {
                state.send_replace(EngineState::Stopped);
            } else {
                let why = format!("llama-server exited with {status}; last lines: {}", tail.last(LINES_QUOTED));
                tracing::error!("{why}");
                state.send_replace(EngineState::Failed(why.into()));
            }
        });
        engine
    }

    /// The tokens of `text`, as the child sees them.
    ///
    /// # Errors
    ///
    /// The child is over, or does not answer.
    pub async fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<u32>, EngineError> {
        match self.client.tokenize(text, add_special).await {
            Ok(tokens) => Ok(tokens),
            Err(error) => Err(reason(&self.state, &error).await),
        }
    }

    /// The `count` likeliest tokens after `prompt`, best first, end-of-text tokens among them. Meant for comparisons:
    /// asked step by step, each time with the tokens so far, only the last of them is computed.
    ///
    /// # Errors
    ///
    /// The child is over, refuses the prompt, or does not answer.
    pub async fn likeliest(&self, prompt: &[u32], count: u32) -> Result<Vec<Candidate>, EngineError> {
        let busy = |_| EngineError::Failed { what: "every place in its queue is taken".into() };
        let mut place = self.gate.enter().map_err(busy)?;
        place.turn(|_| {}).await;
        match self.client.likeliest(prompt, count).await {
            Ok(candidates) => Ok(candidates),
            Err(error) => Err(reason(&self.state, &error).await),
        }
    }

    /// Ends the child as if it had crashed.
    #[cfg(test)]
    pub(crate) async fn end_child(&self) {
        self.process.stop(Duration::ZERO).await;
    }

    fn admit(&self) -> Result<Place, SubmitError> {
        let place = self.gate.enter();
        // Looked at after the place was taken: a drain that begins later waits for this place.
        match &*self.state.borrow() {
            EngineState::Ready => {}
            other => return Err(SubmitError::Gone { why: why(other) }),
        }
        place.map_err(|full| SubmitError::Busy { running: full.occupied, retry_after: full.retry_after })
    }

    async fn tokens(&self, prompt: &Prompt) -> Result<Vec<u32>, SubmitError> {
        match prompt {
            Prompt::Tokens(tokens) => Ok(tokens.clone()),
            Prompt::Text { text, add_special } => {
                self.tokenize(text, *add_special).await.map_err(|error| match error {
                    EngineError::Failed { what } | EngineError::NotBegun { what } => SubmitError::Gone { why: what },
                    EngineError::Stopped => SubmitError::Gone { why: why(&EngineState::Stopped) },
                })
            }
        }
    }

    fn check(&self, job: &Job, prompt: &[u32]) -> Result<(), SubmitError> {
        let max = self.capabilities.context_tokens_max;
        if prompt.is_empty() {
            return Err(SubmitError::Empty);
        }
        let length = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        if length >= max {
            // A prompt that fills the context leaves no room for an answer.
            return Err(SubmitError::TooLong { prompt: length, max });
        }
        if let Some(vocab_size) = self.vocab_size {
            let ids = prompt.iter().chain(job.sampling.logit_bias.keys());
            if let Some(id) = ids.copied().find(|id| *id >= vocab_size) {
                return Err(SubmitError::UnknownToken { id, vocab_size });
            }
        }
        Ok(())
    }
}

impl Drop for LlamaEngine {
    fn drop(&mut self) {
        self.stopping.store(true, Ordering::SeqCst);
        self.cancel.cancel();
    }
}

fn why(state: &EngineState) -> Arc<str> {
    match state {
        EngineState::Failed(why) => why.clone(),
        EngineState::Stopped => "it was stopped".into(),
        EngineState::Draining => "it is stopping".into(),
        EngineState::Starting | EngineState::Ready => "it is not ready".into(),
    }
}

#[async_trait]
impl Engine for LlamaEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.state.subscribe()
    }

    async fn submit(&self, mut job: Job) -> Result<EventStream, SubmitError> {
        let place = self.admit()?;
        if let Some(knob) = self.capabilities.lacking(&job).into_iter().next() {
            return Err(SubmitError::Unsupported { knob });
        }
        if let Some(Constraint { grammar: Grammar::JsonSchema(schema), .. }) = &mut job.constraint {
            *schema = Arc::new(schema::translated(schema).map_err(|what| SubmitError::Grammar { what })?);
        }
        let prompt = self.tokens(&job.prompt).await?;
        self.check(&job, &prompt)?;
        let body = Completion::new(&job, prompt, self.capabilities.context_tokens_max);
        let (events, stream) = mpsc::channel(EVENTS_BUFFERED_MAX);
        let running = Running {
            client: self.client.clone(),
            state: self.state.clone(),
            cancel: self.cancel.clone(),
            events,
            logprobs: job.logprobs,
        };
        tokio::spawn(running.run(body, place));
        Ok(Box::pin(ReceiverStream::new(stream)))
    }

    async fn tokenize(&self, text: &str, add_special: bool) -> Result<Option<Vec<u32>>, EngineError> {
        LlamaEngine::tokenize(self, text, add_special).await.map(Some)
    }

    async fn detokenize(&self, ids: &[u32]) -> Result<Option<String>, EngineError> {
        match self.client.detokenize(ids).await {
            Ok(text) => Ok(Some(text)),
            Err(error) => Err(reason(&self.state, &error).await),
        }
    }

    async fn drain(&self, grace: Duration) {
        let mut state = self.state.subscribe();
        let mut begun = false;
        self.state.send_if_modified(|state| {
            begun = *state == EngineState::Ready;
            if begun {
                *state = EngineState::Draining;
            }
            begun
        });
        if begun {
            // In a task of its own, so that it goes on if this future is dropped.
            let gate = self.gate.clone();
            let (cancel, stopping, process) = (self.cancel.clone(), self.stopping.clone(), self.process.clone());
            tokio::spawn(async move {
                tokio::select! {
                    () = gate.emptied() => {}
                    () = cancel.cancelled() => {}
                    _ = process.ended() => return,
                }
                stopping.store(true, Ordering::SeqCst);
                cancel.cancel();
                process.stop(END_MAX).await;
            });
        }
        tokio::select! {
            _ = state.wait_for(EngineState::is_over) => return,
            () = sleep(grace) => self.cancel.cancel(),
        }
        let _ = state.wait_for(EngineState::is_over).await;
    }
}

/// One admitted job.
struct Running {
    client: Client,
    state: Arc<watch::Sender<EngineState>>,
    cancel: CancellationToken,
    events: mpsc::Sender<Result<Event, EngineError>>,
    /// Likeliest tokens to report with each.
    logprobs: Option<u32>,
}

impl Running {
    /// Runs it to its end. The place is given back before the last event is sent, so that whoever reads that event finds it
    /// free.
    async fn run(self, body: Completion, mut place: Place) {
        let last = tokio::select! {
            biased;
            // Whoever asked is gone. Dropping the connection is what cancels the job in the child.
            () = self.events.closed() => return,
            () = self.cancel.cancelled() => Err(EngineError::Stopped),
            last = self.whole(&body, &mut place) => last,
        };
        drop(place);
        let _ = self.events.send(last).await;
    }

    /// Waits for its turn and is computed; returns the last event.
    async fn whole(&self, body: &Completion, place: &mut Place) -> Result<Event, EngineError> {
        let mut state = self.state.subscribe();
        tokio::select! {
            biased;
            over = state.wait_for(EngineState::is_over) => return Err(match over.as_deref() {
                Ok(EngineState::Failed(what)) => EngineError::NotBegun { what: what.clone() },
                _ => EngineError::Stopped,
            }),
            // A reader too slow for positions goes without: the place comes to it all the same.
            () = place.turn(|ahead| drop(self.events.try_send(Ok(Event::Queued { ahead })))) => {}
        }
        let ended = async {
            let _ = state.wait_for(EngineState::is_over).await;
            // What the child said before is still to be read.
            sleep(REASON_MAX).await;
        };
        let outcome = tokio::select! {
            biased;
            outcome = self.stream(body) => outcome,
            () = ended => Err(ClientError::CutOff),
        };
        match outcome {
            Ok(last) => Ok(last),
            Err(error) => Err(match reason(&self.state, &error).await {
                // What the child was sent may be what ended it, and is handed to no other.
                EngineError::Failed { what } if matches!(error, ClientError::Unreachable(_)) => {
                    EngineError::NotBegun { what }
                }
                reason => reason,
            }),
        }
    }

    /// Passes events on; returns the last one.
    async fn stream(&self, body: &Completion) -> Result<Event, ClientError> {
        let prompt_tokens = u32::try_from(body.prompt.len()).unwrap_or(u32::MAX);
        let mut pieces = self.client.complete(body).await?;
        let mut reported = 0;
        let logprobs = self.logprobs;
        loop {
            let mut piece = pieces.next().await?;
            if let Some(progress) = &piece.prompt_progress {
                let total = progress.total.max(progress.processed);
                let cached = progress.cache.min(progress.processed);
                self.pass(Event::Prefill { done: progress.processed, total, cached }).await;
            }
            if !piece.content.is_empty() || !piece.completion_probabilities.is_empty() {
                // Tokens whose text was held back, as half a character is, count with the piece that brings it.
                let tokens = piece.tokens_predicted.saturating_sub(reported);
                reported = reported.max(piece.tokens_predicted);
                let text = std::mem::take(&mut piece.content);
                let steps = std::mem::take(&mut piece.completion_probabilities);
                let logprobs = match logprobs {
                    Some(count) => steps.into_iter().map(|step| step.logprob(count)).collect(),
                    None => Vec::new(),
                };
                self.pass(Event::Text { text, tokens, logprobs }).await;
            }
            if piece.stop == Some(true) {
                let (reason, usage, timings) = piece.finish(prompt_tokens);
                return Ok(Event::Finished { reason, usage, timings });
            }
        }
    }

    async fn pass(&self, event: Event) {
        // A closed channel is noticed by `run`.
        let _ = self.events.send(Ok(event)).await;
    }
}

/// What to tell a client whose connection to the child broke: the reason of the engine's end if there is one.
async fn reason(state: &watch::Sender<EngineState>, error: &ClientError) -> EngineError {
    let failed = |what: Arc<str>| EngineError::Failed { what };
    if matches!(error, ClientError::Refused { .. } | ClientError::Reported(_)) {
        return failed(error.to_string().into());
    }
    let mut state = state.subscribe();
    match timeout(REASON_MAX, state.wait_for(EngineState::is_over)).await {
        Ok(Ok(over)) => match &*over {
            EngineState::Failed(why) => failed(why.clone()),
            _ => EngineError::Stopped,
        },
        _ => failed(error.to_string().into()),
    }
}
