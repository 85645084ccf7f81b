//! A model of the server as an engine: requests go out, parts of answers come back.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::stream;
use mesh_core::{
    Capabilities, Engine, EngineError, EngineState, EventStream, Job, PromptForm, SubmitError, Timings, Usage,
    answer::Part,
    ask::Ask,
    node::{Load, ModelOffer, PartStream, Question, Rejection, Reply},
    queue::{RETRY_AFTER_MIN, RETRY_AFTER_UNMEASURED},
};
use tokio::{
    sync::{Notify, OwnedSemaphorePermit, Semaphore, watch},
    time::timeout,
};
use tokio_util::sync::CancellationToken;

use crate::{
    client::{Events, Upstream},
    error::{self, Trouble, Veil},
    kind::Manners,
    reading::{Progress, Reading},
    reply, request,
};

/// How long the usage of an answer is waited for, once it said why it ended.
const USAGE_MAX: Duration = Duration::from_secs(5);

/// The way to the server, which all its models share.
pub(crate) struct Link {
    pub upstream: Upstream,
    /// Wakes whoever looks at the server.
    pub look: Notify,
    /// Requests that it may be sent at the same time.
    pub places: Arc<Semaphore>,
    /// When it last said something in an answer.
    pub heard: Mutex<Option<Instant>>,
}

impl Link {
    /// Notes what went wrong; it may be time to look again.
    fn noted(&self, id: &str, trouble: &Trouble) {
        tracing::warn!(job = id, trouble = %self.upstream.veil.over(&trouble.to_string()), "the shared server");
        if trouble.doubtful() {
            self.look.notify_one();
        }
    }

    fn hear(&self) {
        *self.heard.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
    }
}

/// A model that the server lists.
pub(crate) struct SharedModel {
    pub offer: ModelOffer,
    /// What the server calls it.
    id: String,
    veil: Veil,
    pub manners: Manners,
    link: Arc<Link>,
    state: watch::Sender<EngineState>,
    /// Requests under way.
    running: Arc<watch::Sender<u32>>,
    speed: Arc<Mutex<Speed>>,
    /// Cancels every request.
    cancel: CancellationToken,
}

/// How fast answers came; the last one counts as much as all before it. Seen from here: the way and the waiting over there are in
/// it, unless the server tells.
#[derive(Clone, Copy, Debug, Default)]
struct Speed {
    prefill_per_s: Option<f32>,
    decode_per_s: Option<f32>,
}

impl Speed {
    /// Adds an answer of so many tokens, which took so long before its first piece and after it.
    fn note(&mut self, usage: Usage, before: Duration, after: Duration) {
        let add = |mean: &mut Option<f32>, tokens: u32, time: Duration| {
            let per_s = tokens as f32 / time.as_secs_f32();
            if tokens > 0 && per_s.is_finite() {
                *mean = Some(mean.map_or(per_s, |mean| (mean + per_s) / 2.0));
            }
        };
        add(&mut self.prefill_per_s, usage.prompt_tokens.saturating_sub(usage.cached_tokens), before);
        // The first one came with the prompt.
        add(&mut self.decode_per_s, usage.completion_tokens.saturating_sub(1), after);
    }
}

impl SharedModel {
    pub fn new(offer: ModelOffer, id: String, manners: Manners, link: Arc<Link>) -> Self {
        Self {
            veil: link.upstream.veil.and(&id, &offer.name),
            offer,
            id,
            manners,
            link,
            state: watch::channel(EngineState::Ready).0,
            running: Arc::new(watch::channel(0).0),
            speed: Arc::default(),
            cancel: CancellationToken::new(),
        }
    }

    /// The offer, with how busy it is.
    pub fn offer_now(&self) -> ModelOffer {
        let Speed { prefill_per_s, decode_per_s } = *self.speed.lock().unwrap_or_else(PoisonError::into_inner);
        let load = Load { running: *self.running.borrow(), waiting: 0, prefill_per_s, decode_per_s };
        ModelOffer { load, ..self.offer.clone() }
    }

    /// It is not offered any more. What is under way goes on.
    pub fn gone(&self) {
        self.state.send_if_modified(|state| {
            let serving = !state.is_over();
            if serving {
                *state = EngineState::Stopped;
            }
            serving
        });
    }

    /// What clients are told of a request that the server did not take.
    fn rejected(&self, job: &str, trouble: &Trouble) -> Rejection {
        let rejection = error::rejection(trouble, &self.veil);
        if rejection.may_go_elsewhere() {
            self.link.noted(job, trouble);
        }
        rejection
    }

    /// A place, if it serves.
    fn enter(&self) -> Result<Running, Rejection> {
        if *self.state.borrow() != EngineState::Ready {
            let what = format!("the shared server does not serve `{}` at the moment; try again", self.offer.name);
            return Err(Rejection::unavailable("engine_gone", what, RETRY_AFTER_MIN));
        }
        let permit = self.link.places.clone().try_acquire_owned().map_err(|_| {
            let what = "the shared server is sent as many requests as it may be; try again";
            Rejection::unavailable("busy", what, RETRY_AFTER_UNMEASURED)
        })?;
        self.running.send_modify(|running| *running += 1);
        Ok(Running { running: self.running.clone(), _permit: permit })
    }
}

/// One request under way.
struct Running {
    running: Arc<watch::Sender<u32>>,
    _permit: OwnedSemaphorePermit,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.running.send_modify(|running| *running -= 1);
    }
}

#[async_trait]
impl Engine for SharedModel {
    fn capabilities(&self) -> &Capabilities {
        &self.offer.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.state.subscribe()
    }

    async fn submit(&self, _: Job) -> Result<EventStream, SubmitError> {
        Err(SubmitError::WrongForm { wanted: PromptForm::Chat })
    }

    async fn answer(&self, ask: Ask) -> Result<PartStream, Rejection> {
        let running = self.enter()?;
        let sent = Instant::now();
        let request::Plan { path, body, how } = request::plan(&self.id, &self.manners, &ask)?;
        let events = match self.cancel.run_until_cancelled(self.link.upstream.events(path, &body)).await {
            Some(Ok(events)) => events,
            Some(Err(trouble)) => return Err(self.rejected(&ask.id, &trouble)),
            None => return Err(Rejection::unavailable("engine_gone", "the server stops", RETRY_AFTER_MIN)),
        };
        let mut ready = VecDeque::new();
        let reading = Reading::new(how, &mut ready);
        let answer = Answer {
            id: ask.id,
            events: Some(events),
            reading,
            ready,
            link: self.link.clone(),
            veil: self.veil.clone(),
            cancel: self.cancel.clone(),
            running: Some(running),
            speed: self.speed.clone(),
            sent,
            first: None,
        };
        Ok(Box::pin(stream::unfold(answer, |mut answer| async move {
            let part = answer.next().await?;
            Some((part, answer))
        })))
    }

    async fn reply(&self, question: Question) -> Result<Reply, Rejection> {
        let _running = self.enter()?;
        let work = reply::reply(&self.link.upstream, &self.id, &self.manners, &question);
        match self.cancel.run_until_cancelled(work).await {
            Some(Ok(reply)) => Ok(reply),
            Some(Err(reply::Unanswered::Rejected(rejection))) => Err(rejection),
            Some(Err(reply::Unanswered::Trouble(trouble))) => Err(self.rejected("question", &trouble)),
            None => Err(Rejection::unavailable("engine_gone", "the server stops", RETRY_AFTER_MIN)),
        }
    }

    async fn drain(&self, grace: Duration) {
        self.state.send_if_modified(|state| {
            let ready = *state == EngineState::Ready;
            if ready {
                *state = EngineState::Draining;
            }
            ready
        });
        let mut running = self.running.subscribe();
        // The sender lives as long as this engine.
        if timeout(grace, running.wait_for(|running| *running == 0)).await.is_err() {
            self.cancel.cancel();
        }
        self.gone();
    }
}

/// One answer under way. Dropping it closes the connection.
struct Answer {
    id: String,
    /// None once nothing more is read.
    events: Option<Events>,
    reading: Reading,
    ready: VecDeque<Part>,
    link: Arc<Link>,
    veil: Veil,
    cancel: CancellationToken,
    running: Option<Running>,
    speed: Arc<Mutex<Speed>>,
    sent: Instant,
    /// When its first piece came.
    first: Option<Instant>,
}

impl Answer {
    async fn next(&mut self) -> Option<Result<Part, EngineError>> {
        loop {
            if let Some(part) = self.ready.pop_front() {
                return Some(Ok(part));
            }
            let events = self.events.as_mut()?;
            let cancel = self.cancel.clone();
            let Some(next) = cancel.run_until_cancelled(events.next()).await else {
                self.close();
                return Some(Err(EngineError::Stopped));
            };
            let progress = match next {
                Ok(Some(data)) => {
                    self.link.hear();
                    self.reading.event(&data, &mut self.ready)
                }
                Ok(None) => Ok(Progress::Over),
                Err(trouble) => Err(trouble),
            };
            if self.first.is_none() && !self.ready.is_empty() {
                self.first = Some(Instant::now());
            }
            let finished = match progress {
                Ok(Progress::Goes) => continue,
                Ok(Progress::Ended) => {
                    self.usage().await;
                    self.reading.finished()
                }
                Ok(Progress::Over) => self.reading.finished(),
                Err(trouble) => Err(trouble),
            };
            self.close();
            match finished {
                Ok(finished) => {
                    self.measured(finished.usage, finished.timings);
                    self.ready.push_back(Part::Finished(finished));
                }
                Err(trouble) => {
                    // What came before it is the client's.
                    self.link.noted(&self.id, &trouble);
                    self.ready.clear();
                    return Some(Err(error::broken(&trouble, &self.veil)));
                }
            }
        }
    }

    /// Notes how fast it came; by the server's own clock where it tells.
    fn measured(&self, usage: Usage, timings: Option<Timings>) {
        let (before, after) = match (timings, self.first) {
            (Some(timings), _) => (timings.prefill, timings.decode),
            (None, Some(first)) => (first - self.sent, first.elapsed()),
            (None, None) => return,
        };
        self.speed.lock().unwrap_or_else(PoisonError::into_inner).note(usage, before, after);
    }

    /// Reads on for the usage. The answer is whole, whatever comes.
    async fn usage(&mut self) {
        let Some(events) = &mut self.events else { return };
        let (reading, ready) = (&mut self.reading, &mut self.ready);
        let within = events.idle_max.min(USAGE_MAX);
        let work = async {
            while let Ok(Some(data)) = events.next().await {
                if !matches!(reading.event(&data, ready), Ok(Progress::Ended)) {
                    break;
                }
            }
        };
        // An end that drags on is not waited for.
        let _ = timeout(within, work).await;
    }

    fn close(&mut self) {
        self.events = None;
        self.running = None;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn speeds_are_means_that_forget() {
        let usage = Usage { prompt_tokens: 30, cached_tokens: 10, completion_tokens: 11 };
        let mut speed = Speed::default();
        speed.note(usage, Duration::from_secs(2), Duration::from_secs(1));
        assert_eq!((speed.prefill_per_s, speed.decode_per_s), (Some(10.0), Some(10.0)));
        speed.note(usage, Duration::from_secs(1), Duration::from_millis(500));
        assert_eq!((speed.prefill_per_s, speed.decode_per_s), (Some(15.0), Some(15.0)));
        // What took no time or had no tokens tells nothing.
        speed.note(Usage::default(), Duration::from_secs(1), Duration::from_secs(1));
        speed.note(usage, Duration::ZERO, Duration::ZERO);
        assert_eq!((speed.prefill_per_s, speed.decode_per_s), (Some(15.0), Some(15.0)));
    }
}
