//! Who may hold how much memory: the one coordinator over all slots.
//!
//! It decides by [`residency`], and changes nobody's state: it wishes for models to be unloaded, and their owners do it.
//! Models get room one after the other, in the order they asked. So no two loads count on the same bytes, and a large
//! model is not overtaken by small ones for ever.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};

use bytesize::ByteSize;
use mesh_core::{Device, DeviceKind};
use serde::Serialize;
use tokio::sync::watch;

use super::{
    RoomError, SlotState,
    identity::Identity,
    residency::{self, Activity, Decision, Need, Resident},
};

/// Longest wait for room: for those that are busy to answer, and for those that are loading to get ready.
pub const ROOM_WAIT_MAX: Duration = Duration::from_secs(120);

/// One part in so many of a device's memory is left to what nobody accounts for: scratch space, tokenizers, others.
const MARGIN_DIVISOR: u64 = 10;

/// Memory that several devices may share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Pool {
    /// The machine's: of its processors, of processes of their own, and of GPUs that have none but this.
    Ram,
    /// A GPU's own.
    Gpu,
}

impl Pool {
    const ALL: [Self; 2] = [Self::Ram, Self::Gpu];

    /// Its name for programs, the one it is serialised as.
    pub fn word(self) -> &'static str {
        match self {
            Self::Ram => "ram",
            Self::Gpu => "gpu",
        }
    }

    fn of(kind: DeviceKind) -> Self {
        match kind {
            DeviceKind::Cpu | DeviceKind::Metal | DeviceKind::External => Self::Ram,
            DeviceKind::Cuda => Self::Gpu,
        }
    }
}

impl fmt::Display for Pool {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ram => "RAM",
            Self::Gpu => "GPU memory",
        })
    }
}

/// A pool at this moment.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct PoolUse {
    /// Which one.
    pub pool: Pool,
    /// What models may hold there together, where there is a bound.
    pub budget_bytes: Option<u64>,
    /// What is set aside for them.
    pub reserved_bytes: u64,
}

/// What the coordinator knows of a slot, and how it asks for room.
#[derive(Debug)]
pub(super) struct Peer {
    pub identity: Arc<Identity>,
    pub state: watch::Receiver<SlotState>,
    /// True while somebody needs the slot's room.
    pub unload: watch::Sender<bool>,
}

/// The coordinator.
#[derive(Debug)]
pub(super) struct Memory {
    given_bytes: Option<u64>,
    peers: Vec<Peer>,
    accounts: [Account; Pool::ALL.len()],
    /// Told whenever a decision may have changed.
    changes: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Account {
    /// Held by whoever is being given room.
    turn: tokio::sync::Mutex<()>,
    ledger: Mutex<Ledger>,
}

#[derive(Debug, Default)]
struct Ledger {
    /// What the device had when it was first looked at: later, what is available lacks what models hold already.
    device_bytes: Option<u64>,
    /// By reservation.
    held: BTreeMap<u64, Held>,
    reservations: u64,
}

#[derive(Clone, Copy, Debug)]
struct Held {
    slot: usize,
    bytes: u64,
}

impl Memory {
    pub fn new(given_bytes: Option<u64>, peers: Vec<Peer>) -> Self {
        Self { given_bytes, peers, accounts: Default::default(), changes: watch::Sender::new(()) }
    }

    /// Whether there is more than one model.
    pub fn is_shared(&self) -> bool {
        self.peers.len() > 1
    }

    fn account(&self, pool: Pool) -> &Account {
        &self.accounts[pool as usize]
    }

    fn ledger(&self, pool: Pool) -> MutexGuard<'_, Ledger> {
        self.account(pool).ledger.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a device has for models in all, whatever they hold of it at the moment.
    pub fn device_bytes(&self, device: &Device) -> Option<u64> {
        let mut ledger = self.ledger(Pool::of(device.kind));
        ledger.device_bytes = ledger.device_bytes.or(device.memory_bytes);
        self.given_bytes.or(ledger.device_bytes)
    }

    fn budget_bytes(&self, ledger: &Ledger) -> Option<u64> {
        self.given_bytes.or(ledger.device_bytes.map(|bytes| bytes - bytes / MARGIN_DIVISOR))
    }

    /// What is set aside for a slot.
    pub fn reserved_bytes(&self, slot: usize) -> u64 {
        let held = |pool| -> u64 {
            self.ledger(pool).held.values().filter(|held| held.slot == slot).map(|held| held.bytes).sum()
        };
        Pool::ALL.into_iter().map(held).sum()
    }

    /// The pools that were looked at so far.
    pub fn pools(&self) -> Vec<PoolUse> {
        let seen = |pool| {
            let ledger = self.ledger(pool);
            let reserved_bytes = ledger.held.values().map(|held| held.bytes).sum();
            let used = ledger.device_bytes.is_some() || ledger.reservations > 0;
            used.then(|| PoolUse { pool, budget_bytes: self.budget_bytes(&ledger), reserved_bytes })
        };
        Pool::ALL.into_iter().filter_map(seen).collect()
    }

    /// Says that a slot is somewhere else now.
    pub fn changed(&self) {
        self.changes.send_replace(());
    }

    /// Sets room aside for a slot's model, and has others leave for it if that is what it takes.
    pub async fn reserve(self: &Arc<Self>, slot: usize, device: &Device, need: Need) -> Result<Reservation, RoomError> {
        let pool = Pool::of(device.kind);
        self.device_bytes(device);
        let room = async {
            let _turn = self.account(pool).turn.lock().await;
            self.make_room(pool, slot, need).await
        };
        match tokio::time::timeout(ROOM_WAIT_MAX, room).await {
            Ok(outcome) => outcome,
            Err(_) => {
                let (held_bytes, budget_bytes) = self.sums(pool);
                let model = self.peers[slot].identity.shown();
                let waited = ROOM_WAIT_MAX;
                let needed_bytes = need.bytes().min(budget_bytes);
                Err(RoomError::Late { model, pool, needed_bytes, held_bytes, budget_bytes, waited })
            }
        }
    }

    fn sums(&self, pool: Pool) -> (u64, u64) {
        let ledger = self.ledger(pool);
        (ledger.held.values().map(|held| held.bytes).sum(), self.budget_bytes(&ledger).unwrap_or(u64::MAX))
    }

    async fn make_room(self: &Arc<Self>, pool: Pool, slot: usize, need: Need) -> Result<Reservation, RoomError> {
        let mut changes = self.changes.subscribe();
        // While these live, their slots go on leaving. If the wait is given up, those that are still there stay.
        let mut claims: BTreeMap<usize, Claim> = BTreeMap::new();
        loop {
            changes.borrow_and_update();
            match self.decide(pool, slot, need, &claims)? {
                Decision::Load { bytes } => return Ok(self.enter(pool, slot, bytes)),
                Decision::Evict { victims } => {
                    claims.extend(victims.into_iter().map(|victim| (victim, self.claim(victim))));
                }
                Decision::Wait | Decision::Never { .. } => {}
            }
            // The sender lives in `self`, so this cannot fail.
            changes.changed().await.ok();
        }
    }

    /// Decides, and logs the arithmetic.
    fn decide(
        &self,
        pool: Pool,
        slot: usize,
        need: Need,
        claims: &BTreeMap<usize, Claim>,
    ) -> Result<Decision<usize>, RoomError> {
        let residents = self.residents(pool, claims);
        let (held_bytes, budget_bytes) = self.sums(pool);
        let decision = residency::decide(need, budget_bytes, &residents);
        let outcome = match &decision {
            Decision::Load { bytes } if *bytes < need.bytes() => format!("loading with {}", ByteSize(*bytes)),
            Decision::Load { .. } => "loading".to_owned(),
            Decision::Wait => "waiting for room that is on its way".to_owned(),
            Decision::Never { .. } => "it never fits".to_owned(),
            Decision::Evict { victims } => {
                let residents = victims.iter().filter_map(|key| residents.iter().find(|one| one.key == *key));
                let evicted: Vec<_> = residents.map(|resident| self.described(resident)).collect();
                format!("evicting {}", evicted.join(", "))
            }
        };
        let model = self.peers[slot].identity.shown();
        let arithmetic = format!(
            "{model}: {} of weights + {} of cache = {}, held {} of {} in {pool}",
            ByteSize(need.weights_bytes),
            ByteSize(need.cache_bytes),
            ByteSize(need.bytes()),
            ByteSize(held_bytes),
            if budget_bytes == u64::MAX { "no known bound".to_owned() } else { ByteSize(budget_bytes).to_string() },
        );
        match decision {
            // Said again whenever anything changes.
            Decision::Wait => tracing::debug!("{arithmetic}: {outcome}"),
            _ => tracing::info!("{arithmetic}: {outcome}"),
        }
        match decision {
            Decision::Never { pinned_bytes } => {
                Err(RoomError::Never { model, pool, needed_bytes: need.weights_bytes, pinned_bytes, budget_bytes })
            }
            decision => Ok(decision),
        }
    }

    fn described(&self, resident: &Resident<usize>) -> String {
        let name = self.peers[resident.key].identity.shown();
        match resident.activity {
            Activity::Ready { requests: 0, unused } => format!("{name} (idle {} s)", unused.as_secs()),
            Activity::Ready { requests, .. } => format!("{name} (once {requests} requests are answered)"),
            Activity::Loading | Activity::Leaving => name,
        }
    }

    fn residents(&self, pool: Pool, claims: &BTreeMap<usize, Claim>) -> Vec<Resident<usize>> {
        let held: Vec<Held> = self.ledger(pool).held.values().copied().collect();
        let resident = |held: Held| {
            let peer = &self.peers[held.slot];
            let activity = match &*peer.state.borrow() {
                _ if claims.contains_key(&held.slot) => Activity::Leaving,
                SlotState::Loading => Activity::Loading,
                SlotState::Ready(model) => {
                    let usage = model.usage();
                    Activity::Ready { requests: usage.requests, unused: usage.last.elapsed() }
                }
                // Whatever else holds something is about to give it back.
                SlotState::Cold | SlotState::Unloading | SlotState::Failed { .. } | SlotState::Stopped => {
                    Activity::Leaving
                }
            };
            Resident { key: held.slot, bytes: held.bytes, pinned: peer.identity.pinned, activity }
        };
        held.into_iter().map(resident).collect()
    }

    fn enter(self: &Arc<Self>, pool: Pool, slot: usize, bytes: u64) -> Reservation {
        let mut ledger = self.ledger(pool);
        ledger.reservations += 1;
        let id = ledger.reservations;
        ledger.held.insert(id, Held { slot, bytes });
        Reservation { memory: self.clone(), pool, id, bytes }
    }

    fn claim(&self, slot: usize) -> Claim {
        let unload = self.peers[slot].unload.clone();
        unload.send_replace(true);
        Claim(unload)
    }
}

/// The wish that a model be unloaded, for as long as this lives.
struct Claim(watch::Sender<bool>);

impl Drop for Claim {
    fn drop(&mut self) {
        self.0.send_replace(false);
    }
}

/// Bytes set aside for a model, until this is dropped.
#[derive(Debug)]
pub(super) struct Reservation {
    memory: Arc<Memory>,
    pool: Pool,
    id: u64,
    /// How many.
    pub bytes: u64,
}

impl Reservation {
    /// Has the allocator give freed pages back to the system, and then gives the room to others.
    pub async fn give_back(self) {
        // Walks the heap, which takes its time.
        tokio::task::spawn_blocking(trim).await.ok();
    }
}

impl Drop for Reservation {
    fn drop(&mut self) {
        self.memory.ledger(self.pool).held.remove(&self.id);
        self.memory.changed();
    }
}

/// glibc keeps what is freed in the midst of its heap. Weights are there once its threshold for mappings of their own has
/// grown, which frees of large blocks make it do.
fn trim() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: may be called at any time, by any thread.
    unsafe {
        libc::malloc_trim(0);
    }
}
