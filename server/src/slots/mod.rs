//! Models by name, and their way from cold to ready and back.
//!
//! Each slot has one owner task, which alone changes its state; everybody else reads a snapshot, and nothing that
//! reads one waits for the owner. Requests for a model that is not ready join the load under way. What models may hold
//! together is bounded: `memory` has them make room for one another, as [`residency`] decides.

pub mod backoff;
mod elsewhere;
pub mod error;
mod identity;
pub mod known;
mod memory;
mod owner;
pub mod residency;
pub mod start;

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{
    ModelProfile,
    node::{Here, Load, Routing},
};
use tokio::{
    sync::{mpsc, oneshot, watch},
    task::JoinHandle,
};

pub use elsewhere::RemoteModels;
pub use error::{RoomError, SlotError, StartError};
pub use known::Known;
pub use memory::{Pool, PoolUse, ROOM_WAIT_MAX};
pub use start::{Locate, Observer, StartStep, Starter, StoreLocate};

use crate::{lease::Lease, metrics::Tally, served::ServedModel};
use identity::Identity;
use known::Notes;
use memory::{Memory, Peer};
use owner::Charge;

/// Most requests that wait for one model to become ready.
pub const WAITING_MAX: usize = 256;

/// Where a slot is.
#[derive(Clone, Debug)]
pub enum SlotState {
    /// It is not in memory: nothing was asked of it yet, or it was unloaded.
    Cold,
    /// It is being located, elected or loaded, or waits for room.
    Loading,
    /// It serves.
    Ready(Arc<ServedModel>),
    /// It answers what it was asked, and will be cold then.
    Unloading,
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
    /// All words that there are for states.
    pub const WORDS: [&str; 6] = ["cold", "loading", "ready", "unloading", "failed", "stopped"];

    /// The state in a word.
    pub fn word(&self) -> &'static str {
        match self {
            Self::Cold => "cold",
            Self::Loading => "loading",
            Self::Ready(_) => "ready",
            Self::Unloading => "unloading",
            Self::Failed { .. } => "failed",
            Self::Stopped => "stopped",
        }
    }
}

/// What is asked of a slot's owner.
enum Wish {
    /// The model, once it is ready. `gone` is a model that the requester found to be over.
    Model { gone: Option<Arc<ServedModel>>, reply: oneshot::Sender<Result<Lease, SlotError>> },
    /// Finish what runs within `grace`, then stop.
    Drain { grace: Duration, done: oneshot::Sender<()> },
}

/// A model to be served, and how it is kept.
#[derive(Clone, Debug)]
pub struct SlotPlan {
    /// How it is started.
    pub starter: Starter,
    /// The name it is served under, if not its own.
    pub name: Option<String>,
    /// Its own name, where that is known before it is located.
    pub own_name: Option<String>,
    /// What is known about it, where that is known before it is located.
    pub profile: Option<Arc<ModelProfile>>,
    /// Whether it stays in memory whatever comes.
    pub pinned: bool,
    /// Memory it shall have, in bytes, if not what it needs for itself.
    pub share_bytes: Option<u64>,
    /// Whether it is loaded before anybody asks. The caller does so; here it decides when the server is ready.
    pub at_start: bool,
}

impl From<Starter> for SlotPlan {
    /// The only model: loaded at the start, and nothing that would make it leave.
    fn from(starter: Starter) -> Self {
        Self { starter, name: None, own_name: None, profile: None, pinned: false, share_bytes: None, at_start: true }
    }
}

/// How long and how much of models is kept.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Keeping {
    /// What models may hold together on a device, in bytes; what it has, less a margin, if absent.
    pub memory_bytes: Option<u64>,
    /// How long a model that nobody uses stays; for ever if absent.
    pub idle_ttl: Option<Duration>,
}

/// One model, however far along.
#[derive(Debug)]
pub struct Slot {
    index: usize,
    identity: Arc<Identity>,
    notes: Arc<Notes>,
    memory: Arc<Memory>,
    state: watch::Receiver<SlotState>,
    wishes: mpsc::Sender<Wish>,
    owner: JoinHandle<()>,
}

impl Slot {
    /// The state at this moment.
    pub fn state(&self) -> SlotState {
        self.state.borrow().clone()
    }

    /// The name it is served under: the one it was given, or else the model's own, once that is known.
    pub fn name(&self) -> String {
        self.identity.shown()
    }

    /// Whether it stays in memory whatever comes.
    pub fn pinned(&self) -> bool {
        self.identity.pinned
    }

    /// Whether it is loaded before anybody asks.
    pub fn at_start(&self) -> bool {
        self.identity.at_start
    }

    /// What is known about its model, whether it is loaded or not.
    pub fn known(&self) -> Known {
        self.notes.now()
    }

    /// Memory that is set aside for it, in bytes.
    pub fn reserved_bytes(&self) -> u64 {
        self.memory.reserved_bytes(self.index)
    }

    /// How it is, for those who decide whether others are asked instead.
    fn here(&self) -> Here {
        let SlotState::Ready(model) = &*self.state.borrow() else { return Here::Cold };
        if model.takes_conversations() {
            // Others serve it, and each request finds its way to them.
            return Here::Cold;
        }
        let Load { running, waiting, .. } = self.tally().load();
        Here::Ready { running, waiting, parallel: model.handle.capabilities().requests_parallel_max }
    }

    /// Changes with its state.
    pub(crate) fn changes(&self) -> watch::Receiver<SlotState> {
        self.state.clone()
    }

    /// The model as the user spelled it.
    pub(crate) fn reference(&self) -> &str {
        &self.identity.reference
    }

    /// What is counted of it.
    pub(crate) fn tally(&self) -> &Tally {
        &self.identity.tally
    }

    /// True unless it should be loaded and is not: a model that was ready and was unloaded will be back when it is asked for.
    fn available(&self) -> bool {
        match &*self.state.borrow() {
            SlotState::Ready(_) => true,
            SlotState::Cold | SlotState::Loading | SlotState::Unloading => {
                !self.identity.at_start || self.identity.served()
            }
            SlotState::Failed { .. } => !self.identity.at_start,
            SlotState::Stopped => false,
        }
    }

    /// The model. Joins or starts a load where it is not ready. `gone` is a model that the caller found to be over.
    pub async fn model(&self, gone: Option<Arc<ServedModel>>) -> Result<Lease, SlotError> {
        match &*self.state.borrow() {
            SlotState::Ready(model) if gone.as_ref().is_none_or(|gone| !Arc::ptr_eq(gone, model)) => {
                // None is left where the owner has just closed it, and will say so in a moment.
                if let Some(lease) = Lease::of(model) {
                    return Ok(lease);
                }
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

/// All models of this server, and those that others serve for it.
#[derive(Clone, Debug)]
pub struct Slots(Arc<All>);

#[derive(Debug)]
struct All {
    slots: Vec<Slot>,
    remote: RemoteModels,
}

/// Where a model is.
#[derive(Debug)]
pub enum Found<'a> {
    /// Here, loaded or not.
    Here(&'a Slot),
    /// On another machine, which has it ready.
    There(Arc<ServedModel>),
}

impl Slots {
    /// A slot for each model, the default one first. Has to be called within a tokio runtime, which runs the owners.
    pub fn spawn(plans: Vec<SlotPlan>, keeping: Keeping) -> Self {
        Self::spawn_beside(plans, keeping, RemoteModels::default())
    }

    /// The same beside models that others serve.
    pub fn spawn_beside(plans: Vec<SlotPlan>, keeping: Keeping, remote: RemoteModels) -> Self {
        let taken = identity::Taken::default();
        let mut peers = Vec::new();
        let mut charges = Vec::new();
        for plan in plans {
            let identity = Arc::new(Identity::new(&plan, taken.clone()));
            let SlotPlan { starter, own_name, profile, .. } = plan;
            let notes = Arc::new(Notes::default());
            if let Some(profile) = &profile {
                notes.located(profile, &starter.electorate);
            }
            let (sender, state) = watch::channel(SlotState::Cold);
            let (unload, wanted) = watch::channel(false);
            peers.push(Peer { identity: identity.clone(), state, unload });
            charges.push((identity, own_name, starter, sender, wanted, notes));
        }
        // Not before all the names are known that users chose.
        for (identity, own_name, ..) in &charges {
            own_name.iter().for_each(|name| identity.located(name));
        }
        let memory = Arc::new(Memory::new(keeping.memory_bytes, peers));
        let slots = charges.into_iter().enumerate().map(|(index, (identity, _, mut starter, state, unload, notes))| {
            let (located, observer) = (identity.clone(), starter.observer);
            let (noted, electorate) = (notes.clone(), starter.electorate.clone());
            starter.observer = Arc::new(move |step| {
                noted.step(step, &electorate);
                if let StartStep::Located(profile) = step {
                    located.located(&profile.name);
                }
                observer(step);
            });
            let (wishes, inbox) = mpsc::channel(WAITING_MAX);
            let snapshot = state.subscribe();
            let charge = Charge {
                index,
                identity: identity.clone(),
                starter,
                memory: memory.clone(),
                idle_ttl: keeping.idle_ttl,
                state,
                unload,
            };
            let owner = tokio::spawn(owner::own(charge, inbox));
            Slot { index, identity, notes, memory: memory.clone(), state: snapshot, wishes, owner }
        });
        Self(Arc::new(All { slots: slots.collect(), remote }))
    }

    /// The slots.
    pub fn iter(&self) -> impl Iterator<Item = &Slot> {
        self.0.slots.iter()
    }

    /// What is counted of all models, those of others included, by the names that are shown.
    pub(crate) fn tallies(&self) -> Vec<(String, Arc<Tally>)> {
        let own = self.iter().map(|slot| (slot.name(), slot.identity.tally.clone()));
        own.chain(self.remote().tallies()).collect()
    }

    /// What others serve.
    pub fn remote(&self) -> &RemoteModels {
        &self.0.remote
    }

    /// Why a request for the model of that name goes where it goes.
    pub(crate) fn explain(&self, name: &str) -> Result<Routing, SlotError> {
        let slot = self.get(name);
        let here = slot.as_ref().ok().map(|slot| slot.here());
        match (self.remote().explain(name, here), slot, here) {
            (Some(routing), ..) => Ok(routing),
            (None, Err(error), _) => Err(error),
            (None, Ok(_), here) => {
                let why = match here {
                    Some(Here::Ready { .. }) => "ready here",
                    _ => "not loaded here, and nobody else has it ready",
                };
                Ok(Routing { elsewhere: false, why: why.into(), machines: Vec::new() })
            }
        }
    }

    /// Where the model of that name is to be asked: here, or where it is ready.
    pub fn find(&self, name: &str) -> Result<Found<'_>, SlotError> {
        match self.get(name) {
            Ok(slot) => match self.remote().instead_of(slot, name) {
                Some(model) => Ok(Found::There(model)),
                None => Ok(Found::Here(slot)),
            },
            Err(error) => match self.remote().model(name) {
                Some(model) => Ok(Found::There(model)),
                None => Err(error),
            },
        }
    }

    /// The slot of that name.
    pub fn get(&self, name: &str) -> Result<&Slot, SlotError> {
        if let Some(slot) = self.iter().find(|slot| slot.identity.answers_to(name)) {
            return Ok(slot);
        }
        let name = name.chars().take(200).collect();
        let nameless =
            |slot: &&Slot| !slot.identity.is_located() && matches!(&*slot.state.borrow(), SlotState::Loading);
        Err(match self.iter().find(nameless) {
            Some(slot) => SlotError::NotYetKnown { name, loading: slot.identity.reference.clone() },
            None => {
                let mut served: Vec<_> = self.iter().map(Slot::name).chain(self.remote().names()).collect();
                served.dedup();
                SlotError::Unknown { name, served }
            }
        })
    }

    /// Whether every model that is to be loaded at the start was, and none of them has failed since.
    pub fn ready(&self) -> bool {
        self.iter().all(Slot::available)
    }

    /// Memory for models, and what is set aside of it.
    pub fn memory(&self) -> Vec<PoolUse> {
        self.0.slots.first().map(|slot| slot.memory.pools()).unwrap_or_default()
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
