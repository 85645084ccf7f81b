//! Models by name, and their way from cold to ready.
//!
//! Each slot has one owner task, which alone changes its state; everybody else reads a snapshot, and nothing that
//! reads one waits for the owner. Requests for a model that is not ready join the load under way.

pub mod backoff;
pub mod error;
mod owner;
pub mod start;

use std::{
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub use error::{SlotError, StartError};
pub use start::{Locate, Observer, StartStep, Starter, StoreLocate};

use crate::served::ServedModel;

/// Most requests that wait for one model to become ready.
pub const WAITING_MAX: usize = 256;

/// Where a slot is.
#[derive(Clone, Debug)]
pub enum SlotState {
    /// Nothing was asked of it yet.
    Cold,
    /// It is being located, elected or loaded.
    Loading,
    /// It serves.
    Ready(Arc<ServedModel>),
    /// It failed.
    Failed {
        /// Failures in a row.
        failures: u32,
        /// The last one.
        reason: Arc<StartError>,
        /// When the next request may try again.
        retry_at: Instant,
    },
    /// It was drained.
    Stopped,
}

impl SlotState {
    /// The state in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Loading => "loading",
            Self::Ready(_) => "ready",
            Self::Failed { .. } => "failed",
            Self::Stopped => "stopped",
        }
    }
}

/// What is asked of a slot's owner.
enum Wish {
    /// The model, once it is ready. `gone` is a model that the requester found to be over.
    Model { gone: Option<Arc<ServedModel>>, reply: oneshot::Sender<Result<Arc<ServedModel>, SlotError>> },
    /// Finish what runs within `grace`, then stop.
    Drain { grace: Duration, done: oneshot::Sender<()> },
}

/// One model, however far along.
#[derive(Debug)]
pub struct Slot {
    /// The name it was asked for at the start.
    reference: String,
    /// The model's own name, once it was located.
    name: Arc<OnceLock<String>>,
    state: watch::Receiver<SlotState>,
    wishes: mpsc::Sender<Wish>,
    owner: JoinHandle<()>,
}

impl Slot {
    fn spawn(mut starter: Starter) -> Self {
        let name = Arc::new(OnceLock::new());
        let (named, observer) = (name.clone(), starter.observer);
        starter.observer = Arc::new(move |step| {
            if let StartStep::Located(profile) = step {
                named.set(profile.name.clone()).ok();
            }
            observer(step);
        });
        let (state_tx, state) = watch::channel(SlotState::Cold);
        let (wishes, inbox) = mpsc::channel(WAITING_MAX);
        let reference = starter.reference.clone();
        let owner = tokio::spawn(owner::own(starter, state_tx, inbox));
        Self { reference, name, state, wishes, owner }
    }

    /// The state at this moment.
    pub fn state(&self) -> SlotState {
        self.state.borrow().clone()
    }

    /// The name it is served under: the model's own, once that is known.
    pub fn name(&self) -> String {
        self.name.get().unwrap_or(&self.reference).clone()
    }

    fn answers_to(&self, name: &str) -> bool {
        self.reference == name || self.name.get().is_some_and(|own| own == name)
    }

    /// The model. Joins or starts a load where it is not ready.
    pub async fn model(&self, gone: Option<Arc<ServedModel>>) -> Result<Arc<ServedModel>, SlotError> {
        match &*self.state.borrow() {
            SlotState::Ready(model) if gone.as_ref().is_none_or(|gone| !Arc::ptr_eq(gone, model)) => {
                return Ok(model.clone());
            }
            SlotState::Stopped => return Err(SlotError::Stopped),
            _ => {}
        }
        let (reply, answer) = oneshot::channel();
        self.wishes.try_send(Wish::Model { gone, reply }).map_err(|error| match error {
            mpsc::error::TrySendError::Full(_) => SlotError::Crowded { model: self.name(), waiting: WAITING_MAX },
            mpsc::error::TrySendError::Closed(_) => SlotError::Stopped,
        })?;
        answer.await.unwrap_or(Err(SlotError::Stopped))
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.owner.abort();
    }
}

/// All models of this server.
#[derive(Clone, Debug)]
pub struct Slots(Arc<Vec<Slot>>);

impl Slots {
    /// A slot for each model. Has to be called within a tokio runtime, which runs the owners.
    pub fn spawn(starters: Vec<Starter>) -> Self {
        Self(Arc::new(starters.into_iter().map(Slot::spawn).collect()))
    }

    /// The slots.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.iter()
    }

    /// The slot of that name.
    pub fn get(&self, name: &str) -> Result<&Slot, SlotError> {
        if let Some(slot) = self.iter().find(|slot| slot.answers_to(name)) {
            return Ok(slot);
        }
        let name = name.chars().take(200).collect();
        let nameless = |slot: &&Slot| slot.name.get().is_none() && matches!(&*slot.state.borrow(), SlotState::Loading);
        Err(match self.iter().find(nameless) {
            Some(slot) => SlotError::NotYetKnown { name, loading: slot.reference.clone() },
            None => SlotError::Unknown { name, served: self.iter().map(Slot::name).collect() },
        })
    }

    /// Whether every slot is ready.
    pub fn ready(&self) -> bool {
        self.iter().all(|slot| matches!(&*slot.state.borrow(), SlotState::Ready(_)))
    }

    /// Finishes what runs within `grace`, then stops every engine.
    pub async fn drain(&self, grace: Duration) {
        let drains = self.iter().map(|slot| async move {
            let (done, drained) = oneshot::channel();
            if slot.wishes.send(Wish::Drain { grace, done }).await.is_ok() {
                drained.await.ok();
            }
        });
        futures::future::join_all(drains).await;
    }
}
