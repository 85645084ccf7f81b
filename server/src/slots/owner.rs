//! The one task that owns a slot.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use futures::{FutureExt, future::BoxFuture};
use mesh_core::{EngineHandle, EngineState};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

use super::{
    RoomError, SlotError, SlotState, StartError, StartStep, Starter, WAITING_MAX, Wish, backoff,
    identity::Identity,
    memory::{Memory, Reservation},
    residency::Need,
};
use crate::{lease::Lease, served::ServedModel};

type Reply = oneshot::Sender<Result<Lease, SlotError>>;

/// An engine that was there for this long and then failed has not failed in a row, nor has one that answered.
const HEALTHY_AFTER: Duration = Duration::from_secs(60);

/// How long an engine that nobody uses any more may take to stop.
const UNLOAD_GRACE: Duration = Duration::from_secs(60);

/// What the owner works on besides its inbox.
enum Work {
    Idle,
    Starting(Starting),
    Watching(Watching),
    /// The handle is for a drain that comes in between.
    Leaving(EngineHandle, BoxFuture<'static, Left>),
}

/// A start, which is abandoned when this is dropped.
struct Starting(JoinHandle<Result<Serving, StartError>>);

impl Drop for Starting {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A model and its room.
struct Serving {
    model: Arc<ServedModel>,
    reservation: Reservation,
}

struct Watching {
    serving: Serving,
    ended: BoxFuture<'static, EngineState>,
    /// Ready when nobody used the model for as long as it is kept for.
    unused: BoxFuture<'static, ()>,
    since: Instant,
}

/// How leaving came out.
enum Left {
    /// The room is not needed any more, and somebody still used the model.
    Stays(Watching),
    /// It is unloaded, and its room free.
    Gone,
    /// Its engine does not stop.
    Stuck,
}

/// What an owner is in charge of.
pub(super) struct Charge {
    pub index: usize,
    pub identity: Arc<Identity>,
    pub starter: Starter,
    pub memory: Arc<Memory>,
    pub idle_ttl: Option<Duration>,
    pub state: watch::Sender<SlotState>,
    /// True while somebody needs this slot's room.
    pub unload: watch::Receiver<bool>,
}

struct Owner {
    charge: Charge,
    waiting: Vec<Reply>,
    failures: u32,
    work: Work,
}

/// Runs until it is drained or every handle on the slot is gone.
pub(super) async fn own(charge: Charge, mut inbox: mpsc::Receiver<Wish>) {
    let mut owner = Owner { charge, waiting: Vec::new(), failures: 0, work: Work::Idle };
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
                Outcome::Started(Ok(serving)) => owner.started(serving),
                Outcome::Started(Err(error)) => owner.failed(error),
                Outcome::Ended(state) => owner.ended(state),
                Outcome::Unused => owner.unused(),
                Outcome::Left(left) => owner.left(left),
            },
            () = wanted(&mut owner.charge.unload), if matches!(owner.work, Work::Watching(_)) => owner.leave(),
        }
    }
}

/// Waits for the wish that the model be unloaded.
async fn wanted(unload: &mut watch::Receiver<bool>) {
    if unload.wait_for(|wanted| *wanted).await.is_err() {
        std::future::pending().await
    }
}

enum Outcome {
    Started(Result<Serving, StartError>),
    Ended(EngineState),
    Unused,
    Left(Left),
}

impl Work {
    async fn next(&mut self) -> Outcome {
        match self {
            Self::Idle => std::future::pending().await,
            Self::Starting(Starting(task)) => {
                Outcome::Started(task.await.unwrap_or_else(|_| Err(StartError::Panicked { what: "loading the model" })))
            }
            Self::Watching(watching) => tokio::select! {
                state = &mut watching.ended => Outcome::Ended(state),
                () = &mut watching.unused => Outcome::Unused,
            },
            Self::Leaving(_, left) => Outcome::Left(left.await),
        }
    }
}

/// From nothing to a model that serves: find, elect, make room, load.
async fn start(
    index: usize,
    identity: Arc<Identity>,
    starter: Starter,
    memory: Arc<Memory>,
) -> Result<Serving, StartError> {
    let seen = memory.clone();
    let candidate = starter.elect(move |device| seen.device_bytes(device)).await?;
    let offer = &candidate.elected.offer;
    let need = Need::of(&candidate.profile, offer, identity.share_bytes);
    let reservation = memory.reserve(index, &offer.device, need).await?;
    // One that is alone shares with nobody.
    let share_bytes = memory.is_shared().then_some(reservation.bytes);
    match starter.load(candidate, share_bytes).await {
        Ok(model) => {
            model.count(identity.shown(), identity.tally.clone());
            Ok(Serving { model, reservation })
        }
        Err(error) => {
            reservation.give_back().await;
            Err(error)
        }
    }
}

/// Waits until nobody uses the model, stops its engine, and gives back all it held.
async fn leave(watching: Watching, mut unload: watch::Receiver<bool>) -> Left {
    tokio::select! {
        biased;
        () = watching.serving.model.usage.over() => {}
        _ = unload.wait_for(|wanted| !wanted) => return Left::Stays(watching),
    }
    let Serving { model, reservation } = watching.serving;
    drop(watching.ended);
    model.handle.drain(UNLOAD_GRACE).await;
    if !model.handle.state_now().is_over() {
        // Its room is not free before it ends, whenever that is.
        tokio::spawn(async move {
            model.handle.ended().await;
            reservation.give_back().await;
        });
        return Left::Stuck;
    }
    drop(model);
    reservation.give_back().await;
    Left::Gone
}

impl Owner {
    fn want(&mut self, gone: Option<Arc<ServedModel>>, reply: Reply) {
        self.notice_the_end();
        let state = self.charge.state.borrow().clone();
        match state {
            SlotState::Ready(model) if gone.is_none_or(|gone| !Arc::ptr_eq(&gone, &model)) => match Lease::of(&model) {
                Some(lease) => {
                    reply.send(Ok(lease)).ok();
                }
                None => self.wait(reply),
            },
            // The requester was refused by an engine that says it serves: it is draining by itself. The watch on its
            // state will settle it; until then there is nobody to turn to.
            SlotState::Ready(_) | SlotState::Stopped => {
                reply.send(Err(SlotError::Stopped)).ok();
            }
            SlotState::Loading | SlotState::Unloading => self.wait(reply),
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
                    let model = self.charge.identity.reference.clone();
                    reply.send(Err(SlotError::Failed { model, failures, reason, retry_after })).ok();
                }
            }
        }
    }

    /// An engine's end and a request may arrive together: the end comes first, so that the request starts it again. Looked at
    /// rather than polled: a task that has done much in a row is told that nothing is ready, to give way to others.
    fn notice_the_end(&mut self) {
        if let Work::Watching(watching) = &self.work {
            let state = watching.serving.model.handle.state_now();
            if state.is_over() {
                self.ended(state);
            }
        }
    }

    fn wait(&mut self, reply: Reply) {
        self.waiting.retain(|reply| !reply.is_closed());
        if self.waiting.len() >= WAITING_MAX {
            let model = self.charge.identity.reference.clone();
            reply.send(Err(SlotError::Crowded { model, waiting: self.waiting.len() })).ok();
        } else {
            self.waiting.push(reply);
        }
    }

    fn start(&mut self) {
        self.charge.state.send_replace(SlotState::Loading);
        let Charge { index, identity, starter, memory, .. } = &self.charge;
        let start = start(*index, identity.clone(), starter.clone(), memory.clone());
        self.work = Work::Starting(Starting(tokio::spawn(start)));
    }

    fn started(&mut self, serving: Serving) {
        let model = serving.model.clone();
        self.watch(serving, Instant::now());
        self.charge.identity.set_served(true);
        self.serve();
        (self.charge.starter.observer)(&StartStep::Ready(model));
    }

    fn watch(&mut self, serving: Serving, since: Instant) {
        let (handle, usage) = (serving.model.handle.clone(), serving.model.usage.clone());
        let ended = async move { handle.ended().await }.boxed();
        let unused = match self.charge.idle_ttl {
            Some(ttl) if !self.charge.identity.pinned => async move { usage.unused_for(ttl).await }.boxed(),
            _ => std::future::pending().boxed(),
        };
        self.work = Work::Watching(Watching { serving, ended, unused, since });
    }

    /// Hands the model out, to those who wait first.
    fn serve(&mut self) {
        let Work::Watching(Watching { serving: Serving { model, .. }, .. }) = &self.work else { return };
        let lent = self.waiting.drain(..).filter(|reply| !reply.is_closed());
        let lent: Vec<_> = lent.map(|reply| (reply, Lease::of(model).ok_or(SlotError::Stopped))).collect();
        self.charge.state.send_replace(SlotState::Ready(model.clone()));
        for (reply, lease) in lent {
            reply.send(lease).ok();
        }
        self.charge.memory.changed();
    }

    fn failed(&mut self, error: StartError) {
        self.work = Work::Idle;
        if let StartError::Room(late @ RoomError::Late { .. }) = error {
            self.charge.state.send_replace(SlotState::Cold);
            for reply in self.waiting.drain(..) {
                reply.send(Err(SlotError::NoRoom(late.clone()))).ok();
            }
            (self.charge.starter.observer)(&StartStep::Failed(Arc::new(late.into())));
            return;
        }
        self.charge.identity.set_served(false);
        self.failures = self.failures.saturating_add(1);
        let wait = backoff::delay(self.failures);
        let reason = Arc::new(error);
        let state =
            SlotState::Failed { failures: self.failures, reason: reason.clone(), retry_at: Instant::now() + wait };
        self.charge.state.send_replace(state);
        for reply in self.waiting.drain(..) {
            reply
                .send(Err(SlotError::Failed {
                    model: self.charge.identity.reference.clone(),
                    failures: self.failures,
                    reason: reason.clone(),
                    retry_after: wait,
                }))
                .ok();
        }
        (self.charge.starter.observer)(&StartStep::Failed(reason));
    }

    fn ended(&mut self, state: EngineState) {
        if let Work::Watching(Watching { serving, since, .. }) = std::mem::replace(&mut self.work, Work::Idle) {
            if serving.model.has_answered() || since.elapsed() >= HEALTHY_AFTER {
                self.failures = 0;
            }
            tokio::spawn(serving.reservation.give_back());
        }
        let what = match state {
            EngineState::Failed(what) => what,
            _ => "it stopped by itself".into(),
        };
        self.failed(StartError::Engine { what });
    }

    fn unused(&mut self) {
        let (Some(ttl), Work::Watching(watching)) = (self.charge.idle_ttl, &mut self.work) else { return };
        let usage = watching.serving.model.usage.clone();
        if usage.close_unused(ttl) {
            tracing::info!("{}: unloading, unused for {} s", self.charge.identity.shown(), ttl.as_secs());
            self.leave();
        } else {
            // Somebody came just now.
            watching.unused = async move { usage.unused_for(ttl).await }.boxed();
        }
    }

    /// Takes no more requests, and unloads the model once those that run are answered.
    fn leave(&mut self) {
        match std::mem::replace(&mut self.work, Work::Idle) {
            Work::Watching(watching) => {
                watching.serving.model.usage.close();
                self.charge.state.send_replace(SlotState::Unloading);
                let handle = watching.serving.model.handle.clone();
                self.work = Work::Leaving(handle, leave(watching, self.charge.unload.clone()).boxed());
            }
            other => self.work = other,
        }
    }

    fn left(&mut self, left: Left) {
        match left {
            Left::Stays(watching) => {
                tracing::info!("{}: stays, its room is not needed any more", self.charge.identity.shown());
                watching.serving.model.usage.open();
                self.work = Work::Watching(watching);
                self.serve();
            }
            Left::Gone => {
                tracing::info!("{}: unloaded", self.charge.identity.shown());
                self.work = Work::Idle;
                self.failures = 0;
                self.charge.state.send_replace(SlotState::Cold);
                self.waiting.retain(|reply| !reply.is_closed());
                if !self.waiting.is_empty() {
                    self.start();
                }
            }
            Left::Stuck => {
                let what = format!("it was told to stop and did not within {} s", UNLOAD_GRACE.as_secs()).into();
                self.failed(StartError::Engine { what });
            }
        }
    }

    async fn drain(&mut self, grace: Duration) {
        let state = self.charge.state.send_replace(SlotState::Stopped);
        let work = std::mem::replace(&mut self.work, Work::Idle); // aborts a start under way
        for reply in self.waiting.drain(..) {
            reply.send(Err(SlotError::Stopped)).ok();
        }
        if let SlotState::Ready(model) = &state {
            model.handle.drain(grace).await;
        } else if let Work::Leaving(handle, _) = &work {
            handle.drain(grace).await;
        }
    }
}
