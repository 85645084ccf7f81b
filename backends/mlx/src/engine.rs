//! The engine's front: admission, streams and draining. Everything that touches MLX is behind the channel, on the
//! device thread.

use std::{
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::Stream;
use mesh_core::{
    Capabilities, DeviceKind, Embed, EmbedError, Embedded, Engine, EngineError, EngineState, Event, EventStream,
    FinishReason, Job, Pooling, Prompt, PromptForm, SubmitError, Timings, Usage, queue::Pace,
};
use mesh_graph::Footprint;
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    memory::FreeMemory,
    watchdog::{Doing, Pulse, Step},
};

/// Events of one job that may wait for its reader.
pub const EVENTS_MAX: usize = 256;

/// How long a cancelled generation may take to notice.
const CANCEL_GRACE: Duration = Duration::from_secs(30);

/// What both sides of the channel see.
pub struct Shared {
    pub state: watch::Sender<EngineState>,
    /// Set when the grace of a drain is over.
    pub cancelled: AtomicBool,
    /// Jobs admitted and not yet over.
    pub admitted: AtomicU32,
    /// The step under way.
    pub pulse: Pulse,
    /// How long jobs hold their places.
    pub pace: Mutex<Pace>,
    /// Bytes that sequences hold, remembered ones included.
    pub held_bytes: AtomicU64,
    /// Bytes that they may hold, at the device thread's last look.
    pub memory_now: AtomicU64,
}

impl Shared {
    /// Of an engine that is starting.
    pub fn starting() -> Arc<Self> {
        let (state, _) = watch::channel(EngineState::Starting);
        let (cancelled, admitted) = (AtomicBool::new(false), AtomicU32::new(0));
        Arc::new(Self {
            state,
            cancelled,
            admitted,
            pulse: Pulse::default(),
            pace: Mutex::default(),
            held_bytes: AtomicU64::new(0),
            memory_now: AtomicU64::new(u64::MAX),
        })
    }

    /// Begins a step of the device thread; it is over when what is returned is dropped.
    pub fn doing(&self, doing: Doing) -> Step<'_> {
        self.pulse.begin(doing)
    }
}

/// Something on its way to the device thread.
pub enum Work {
    Generate(Box<Generation>),
    Embed(Vectors),
}

/// Texts on their way to become vectors.
pub struct Vectors {
    pub job: String,
    pub inputs: Vec<Vec<u32>>,
    pub pooling: Pooling,
    pub answer: oneshot::Sender<Result<Embedded, EngineError>>,
    pub place: Place,
}

/// A job on its way.
pub struct Generation {
    pub job: Job,
    pub prompt: Vec<u32>,
    pub tokens_max: u32,
    pub events: mpsc::Sender<Result<Event, EngineError>>,
    pub place: Place,
}

/// A place among the admitted; given up when dropped.
pub struct Place {
    shared: Arc<Shared>,
    since: Instant,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.shared.admitted.fetch_sub(1, Ordering::Relaxed);
        self.shared.pace.lock().unwrap_or_else(PoisonError::into_inner).record(self.since.elapsed());
    }
}

/// What a job is checked against before it is taken in.
pub struct Admission {
    /// What sequences take.
    pub footprint: Footprint,
    /// What they may take together.
    pub memory_bytes: u64,
    /// What is free.
    pub free_memory: FreeMemory,
}

pub struct MlxEngine {
    pub capabilities: Capabilities,
    pub admission: Admission,
    pub vocab_size: u32,
    pub shared: Arc<Shared>,
    /// Taken away when draining starts.
    pub jobs: Mutex<Option<mpsc::Sender<Work>>>,
}

impl MlxEngine {
    fn place(&self) -> Result<Place, SubmitError> {
        let max = self.capabilities.requests_parallel_max.saturating_add(self.capabilities.requests_queued_max);
        let one_more = |admitted: u32| (admitted < max).then_some(admitted + 1);
        if let Err(admitted) = self.shared.admitted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more) {
            let pace = *self.shared.pace.lock().unwrap_or_else(PoisonError::into_inner);
            // Places are held from admission on, waiting included: all of them turn over in the time of one.
            return Err(SubmitError::Busy { running: admitted, retry_after: pace.retry_after(1, max) });
        }
        Ok(Place { shared: self.shared.clone(), since: Instant::now() })
    }

    /// Refuses what would not fit even if everybody else were gone, because other programs hold the memory.
    fn fits(&self, tokens: u32) -> Result<(), SubmitError> {
        let Admission { footprint, memory_bytes, free_memory } = &self.admission;
        let needed_bytes = footprint.bytes(tokens.into());
        let available_bytes = match free_memory.kind {
            DeviceKind::Cpu => free_memory.limit(*memory_bytes, self.shared.held_bytes.load(Ordering::Relaxed)),
            // Nobody but its own thread waits for a device.
            _ => self.shared.memory_now.load(Ordering::Relaxed).min(*memory_bytes),
        };
        match needed_bytes > available_bytes {
            true => Err(SubmitError::Memory { tokens, needed_bytes, available_bytes }),
            false => Ok(()),
        }
    }

    /// A prompt's tokens, if it has any and no others than the vocabulary's. They are never more than a `u32` counts.
    fn tokens(&self, prompt: Prompt) -> Result<Vec<u32>, SubmitError> {
        let Prompt::Tokens(prompt) = prompt else {
            return Err(SubmitError::WrongForm { wanted: PromptForm::Tokens });
        };
        let max = self.capabilities.context_tokens_max;
        let length = u32::try_from(prompt.len()).unwrap_or(u32::MAX);
        if length == 0 {
            return Err(SubmitError::Empty);
        }
        if length > max {
            return Err(SubmitError::TooLong { prompt: length, max });
        }
        self.in_vocabulary(&prompt)?;
        Ok(prompt)
    }

    fn in_vocabulary<'a>(&self, ids: impl IntoIterator<Item = &'a u32>) -> Result<(), SubmitError> {
        match ids.into_iter().find(|id| **id >= self.vocab_size) {
            Some(id) => Err(SubmitError::UnknownToken { id: *id, vocab_size: self.vocab_size }),
            None => Ok(()),
        }
    }

    fn is_serving(&self) -> Result<(), SubmitError> {
        if self.shared.state.borrow().is_over() { Err(self.gone()) } else { Ok(()) }
    }

    fn send(&self, work: Work) -> Result<(), SubmitError> {
        let jobs = self.jobs.lock().unwrap_or_else(PoisonError::into_inner);
        match jobs.as_ref().is_some_and(|jobs| jobs.try_send(work).is_ok()) {
            true => Ok(()),
            false => Err(self.gone()),
        }
    }

    fn gone(&self) -> SubmitError {
        let why = match &*self.shared.state.borrow() {
            EngineState::Failed(why) => why.clone(),
            EngineState::Stopped => "it is stopped".into(),
            _ => "it is draining".into(),
        };
        SubmitError::Gone { why }
    }
}

#[async_trait]
impl Engine for MlxEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.shared.state.subscribe()
    }

    async fn submit(&self, mut job: Job) -> Result<EventStream, SubmitError> {
        if let Some(knob) = self.capabilities.lacking(&job).into_iter().next() {
            return Err(SubmitError::Unsupported { knob });
        }
        if let Some(constraint) = job.constraint.as_ref().filter(|constraint| constraint.rules.is_none()) {
            return Err(SubmitError::Unsupported { knob: constraint.grammar.knob() });
        }
        let prompt = self.tokens(std::mem::replace(&mut job.prompt, Prompt::Tokens(Vec::new())))?;
        let max = self.capabilities.context_tokens_max;
        let length = prompt.len() as u32;
        if length >= max {
            return Err(SubmitError::TooLong { prompt: length, max });
        }
        self.in_vocabulary(job.sampling.logit_bias.keys())?;
        let tokens_max = job.tokens_max.unwrap_or(u32::MAX).min(max - length);
        self.is_serving()?;
        self.fits(length + 1)?;
        let place = self.place()?;
        let (events, receiver) = mpsc::channel(EVENTS_MAX);
        if tokens_max == 0 {
            let usage = Usage { prompt_tokens: length, ..Usage::default() };
            let last = Event::Finished { reason: FinishReason::Length, usage, timings: Timings::default() };
            return Ok(Box::pin(futures::stream::iter([Ok(last)])));
        }
        self.send(Work::Generate(Box::new(Generation { job, prompt, tokens_max, events, place })))?;
        Ok(Box::pin(Events::new(receiver, self.shared.state.subscribe())))
    }

    async fn embed(&self, embed: Embed) -> Result<Embedded, EmbedError> {
        let Embed { id, inputs, pooling } = embed;
        let inputs = inputs.into_iter().map(|input| self.tokens(input)).collect::<Result<Vec<_>, _>>()?;
        self.is_serving()?;
        let Some(longest) = inputs.iter().map(Vec::len).max() else { return Ok(Embedded::default()) };
        self.fits(longest as u32)?;
        let place = self.place()?;
        let (answer, receiver) = oneshot::channel();
        self.send(Work::Embed(Vectors { job: id, inputs, pooling, answer, place }))?;
        let mut state = self.shared.state.subscribe();
        tokio::select! {
            biased;
            Ok(answer) = receiver => Ok(answer?),
            // A thread that hangs answers nobody, and one that is gone has dropped what it had not answered.
            state = state.wait_for(EngineState::is_over) => Err(state.map_or(EngineError::Stopped, |state| over(&state)).into()),
        }
    }

    async fn drain(&self, grace: Duration) {
        self.jobs.lock().unwrap_or_else(PoisonError::into_inner).take();
        self.shared.state.send_if_modified(|state| {
            let serving = matches!(state, EngineState::Starting | EngineState::Ready);
            if serving {
                *state = EngineState::Draining;
            }
            serving
        });
        let mut state = self.shared.state.subscribe();
        if tokio::time::timeout(grace, state.wait_for(EngineState::is_over)).await.is_err() {
            self.shared.cancelled.store(true, Ordering::Relaxed);
            let _ = tokio::time::timeout(CANCEL_GRACE, state.wait_for(EngineState::is_over)).await;
        }
    }
}

/// What became of those who were left when the engine was over.
fn over(state: &EngineState) -> EngineError {
    match state {
        EngineState::Failed(what) => EngineError::Failed { what: what.clone() },
        _ => EngineError::Stopped,
    }
}

/// A job's events. A channel that closes without a last event means that the device thread is gone; the state says why.
/// A thread that no longer gets on keeps its channels open: then the state alone tells. One that goes on has let go of
/// this job alone.
struct Events {
    receiver: mpsc::Receiver<Result<Event, EngineError>>,
    state: watch::Receiver<EngineState>,
    /// Until the engine is over; absent once it is.
    until_over: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    /// Whether anything of it was computed.
    begun: bool,
    ended: bool,
}

impl Events {
    fn new(receiver: mpsc::Receiver<Result<Event, EngineError>>, state: watch::Receiver<EngineState>) -> Self {
        let mut watched = state.clone();
        let until_over = Box::pin(async move {
            let _ = watched.wait_for(EngineState::is_over).await;
        });
        Self { receiver, state, until_over: Some(until_over), begun: false, ended: false }
    }

    fn poll_over(&mut self, context: &mut Context<'_>) -> Poll<EngineError> {
        if let Some(until_over) = &mut self.until_over {
            ready!(until_over.as_mut().poll(context));
            self.until_over = None;
        }
        Poll::Ready(match over(&self.state.borrow()) {
            EngineError::Failed { what } if !self.begun => EngineError::NotBegun { what },
            error => error,
        })
    }
}

impl Stream for Events {
    type Item = Result<Event, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let event = match self.receiver.poll_recv(context) {
            Poll::Ready(Some(event)) => event,
            Poll::Ready(None) => Err(match self.poll_over(context) {
                Poll::Ready(why) => why,
                Poll::Pending => EngineError::Failed { what: "the answer was given up: nobody read it".into() },
            }),
            Poll::Pending => match self.poll_over(context) {
                Poll::Ready(failed @ (EngineError::Failed { .. } | EngineError::NotBegun { .. })) => Err(failed),
                _ => return Poll::Pending,
            },
        };
        self.begun |= !matches!(event, Ok(Event::Queued { .. }));
        self.ended = matches!(event, Ok(Event::Finished { .. }) | Err(_));
        Poll::Ready(Some(event))
    }
}
