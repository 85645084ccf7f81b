//! The one task that owns a slot.

use std::{
    pin::Pin,
    sync::Arc,
    time::{Duration, Instant},
};

use futures::FutureExt;
use mesh_core::EngineState;
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{SlotError, SlotState, StartError, StartStep, Starter, WAITING_MAX, Wish, backoff};
use crate::served::ServedModel;

type Reply = oneshot::Sender<Result<Arc<ServedModel>, SlotError>>;

/// An engine that was there for this long and then failed has not failed in a row, nor has one that answered.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// What the owner works on besides its inbox.
enum Work {
    Idle,
    Starting(JoinHandle<Result<Arc<ServedModel>, StartError>>),
    Watching { ended: Pin<Box<dyn Future<Output = EngineState> + Send>>, since: Instant },
}

struct Owner {
    starter: Starter,
    state: watch::Sender<SlotState>,
    waiting: Vec<Reply>,
    failures: u32,
    work: Work,
}

/// Runs until it is drained or every handle on the slot is gone.
pub(super) async fn own(starter: Starter, state: watch::Sender<SlotState>, mut inbox: mpsc::Receiver<Wish>) {
    let mut owner = Owner { starter, state, waiting: Vec::new(), failures: 0, work: Work::Idle };
    loop {
        tokio::select! {
            wish = inbox.recv() => match wish {
                Some(Wish::Model { gone, reply }) => owner.want(gone, reply),
                Some(Wish::Drain { grace, done }) => {
                    owner.drain(grace).await;
                    done.send(()).ok();
                    return;
                }
                None => return,
            },
            outcome = owner.work.next() => match outcome {
                Outcome::Started(Ok(model)) => owner.started(model),
                Outcome::Started(Err(error)) => owner.failed(error),
                Outcome::Ended(state) => owner.ended(state),
            },
        }
    }
}

enum Outcome {
    Started(Result<Arc<ServedModel>, StartError>),
    Ended(EngineState),
}

impl Work {
    async fn next(&mut self) -> Outcome {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Starting(task) => {
                Outcome::Started(task.await.unwrap_or_else(|_| Err(StartError::Panicked { what: "loading the model" })))
            }
            Self::Watching { ended, .. } => Outcome::Ended(ended.await),
        }
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if let Self::Starting(task) = self {
            task.abort();
        }
    }
}

impl Owner {
    fn want(&mut self, gone: Option<Arc<ServedModel>>, reply: Reply) {
        self.notice_the_end();
        let state = self.state.borrow().clone();
        match state {
            SlotState::Ready(model) if gone.is_none_or(|gone| !Arc::ptr_eq(&gone, &model)) => {
                reply.send(Ok(model)).ok();
            }
            // The requester was refused by an engine that says it serves: it is draining by itself. The watch on its
            // state will settle it; until then there is nobody to turn to.
            SlotState::Ready(_) | SlotState::Stopped => {
                reply.send(Err(SlotError::Stopped)).ok();
            }
            SlotState::Loading => self.wait(reply),
            SlotState::Cold => {
                self.wait(reply);
                self.start();
            }
            SlotState::Failed { failures, reason, retry_at } => {
                let retry_after = retry_at.saturating_duration_since(Instant::now());
                if retry_after.is_zero() {
                    self.wait(reply);
                    self.start();
                } else {
                    let model = self.starter.reference.clone();
                    reply.send(Err(SlotError::Failed { model, failures, reason, retry_after })).ok();
                }
            }
        }
    }

    /// An engine's end and a request may arrive together: the end comes first, so that the request starts it again.
    fn notice_the_end(&mut self) {
        if let Work::Watching { ended, .. } = &mut self.work
            && let Some(state) = ended.as_mut().now_or_never()
        {
            self.ended(state);
        }
    }

    fn wait(&mut self, reply: Reply) {
        self.waiting.retain(|reply| !reply.is_closed());
        if self.waiting.len() >= WAITING_MAX {
            let model = self.starter.reference.clone();
            reply.send(Err(SlotError::Crowded { model, waiting: self.waiting.len() })).ok();
        } else {
            self.waiting.push(reply);
        }
    }

    fn start(&mut self) {
        let starter = self.starter.clone();
        self.state.send_replace(SlotState::Loading);
        self.work = Work::Starting(tokio::spawn(async move { starter.start().await }));
    }

    fn started(&mut self, model: Arc<ServedModel>) {
        let handle = model.handle.clone();
        let ended = Box::pin(async move { handle.ended().await });
        self.work = Work::Watching { ended, since: Instant::now() };
        self.state.send_replace(SlotState::Ready(model.clone()));
        for reply in self.waiting.drain(..) {
            reply.send(Ok(model.clone())).ok();
        }
        (self.starter.observer)(&StartStep::Ready(model));
    }

    fn failed(&mut self, error: StartError) {
        self.work = Work::Idle;
        self.failures = self.failures.saturating_add(1);
        let wait = backoff::delay(self.failures);
        let reason = Arc::new(error);
        let state =
            SlotState::Failed { failures: self.failures, reason: reason.clone(), retry_at: Instant::now() + wait };
        self.state.send_replace(state);
        for reply in self.waiting.drain(..) {
            reply
                .send(Err(SlotError::Failed {
                    model: self.starter.reference.clone(),
                    failures: self.failures,
                    reason: reason.clone(),
                    retry_after: wait,
                }))
                .ok();
        }
        (self.starter.observer)(&StartStep::Failed(reason));
    }

    fn ended(&mut self, state: EngineState) {
        let answered = matches!(&*self.state.borrow(), SlotState::Ready(model) if model.has_answered());
        let lasted = matches!(&self.work, Work::Watching { since, .. } if since.elapsed() >= HEALTHY_AFTER);
        if answered || lasted {
            self.failures = 0;
        }
        let what = match state {
            EngineState::Failed(what) => what,
            _ => "it stopped by itself".into(),
        };
        self.failed(StartError::Engine { what });
    }

    async fn drain(&mut self, grace: Duration) {
        let state = self.state.send_replace(SlotState::Stopped);
        self.work = Work::Idle; // aborts a start under way
        for reply in self.waiting.drain(..) {
            reply.send(Err(SlotError::Stopped)).ok();
        }
        if let SlotState::Ready(model) = state {
            model.handle.drain(grace).await;
        }
    }
}
