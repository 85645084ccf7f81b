//! A node in a mesh: the one place where its state changes. What is decided about it is decided elsewhere, purely.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use iroh::{Endpoint, EndpointAddr, EndpointId, SecretKey, address_lookup::memory::MemoryLookup, endpoint::Connection};
use mesh_core::node::{Local, ModelOffer};
use mesh_peers::{
    Affinity, Bounds, Directory, Heard, NodeId, Policy,
    advert::{self, Advert, Loss, Pulse},
    cadence,
    directory::{Pulsed, Reported},
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    adverts::{ADDRESSES_MAX, Gossiped, Shown, Spoken},
    counts::Counts,
    home::{Home, Membership},
    link::{Link, Parting},
    trust::{Judge, Revocations, Signed, TrustError},
    wire::{Budget, CARD_BYTES_MAX, Card},
};

/// What is said to everybody and not yet sent.
pub const NEWS_MAX: usize = 256;
/// Members whose adverts a card shows, in bytes.
const CARD_ADVERTS_BYTES_MAX: usize = CARD_BYTES_MAX / 2;
/// Nodes that are known and not connected to.
const KNOWN_MAX: usize = 4096;
/// Beginnings of conversations whose nodes are remembered.
const PREFIXES_MAX: usize = 1 << 16;
/// Longest pause between two attempts to reach a node: a partition that heals is noticed within it.
const PAUSE_MAX: Duration = Duration::from_secs(4);
const PAUSE_MIN: Duration = Duration::from_millis(250);

/// Everything that is shared by a node's tasks.
pub struct Node {
    /// Who it is.
    pub id: EndpointId,
    /// What it is called.
    pub name: String,
    /// When it was started, in milliseconds since 1970.
    pub incarnation: u64,
    /// Its place in the mesh.
    pub membership: Membership,
    /// Where it is kept.
    pub home: Home,
    /// Its end of all connections.
    pub endpoint: Endpoint,
    /// Addresses that were told, by tickets and the last time.
    pub addresses: MemoryLookup,
    /// How it chooses among others.
    pub policy: Policy,
    /// What it does itself for others, once that is known.
    pub local: OnceLock<Arc<dyn Local>>,
    /// Who may take part in gossip.
    pub admitted: Admitted,
    /// What requests of others hold in memory.
    pub budget: Budget,
    /// What was done for whom.
    pub counts: Counts,
    /// Ends its tasks.
    pub over: CancellationToken,
    /// The tasks.
    pub tasks: TaskTracker,
    /// What is said to everybody.
    pub news: mpsc::Sender<Gossiped>,
    /// Asks for an advert now.
    pub speak: Notify,
    changes: watch::Sender<u64>,
    key: SecretKey,
    began: Instant,
    sequence: AtomicU64,
    state: Mutex<State>,
}

/// Members whose certificate was seen.
#[derive(Clone, Debug, Default)]
pub struct Admitted(Arc<RwLock<BTreeSet<EndpointId>>>);

impl Admitted {
    /// Whether it was.
    pub fn contains(&self, node: &EndpointId) -> bool {
        self.0.read().unwrap_or_else(PoisonError::into_inner).contains(node)
    }

    fn insert(&self, node: EndpointId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(node);
    }

    fn remove(&self, node: &EndpointId) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).remove(node);
    }
}

/// What changes.
pub struct State {
    /// Who belongs here.
    pub judge: Judge,
    /// Who is there, and serves what.
    pub directory: Directory,
    /// Who has seen the beginnings of which conversations.
    pub affinity: Affinity,
    /// The connections.
    pub links: HashMap<EndpointId, Link>,
    /// The latest adverts, as they came, to be passed on.
    shown: BTreeMap<EndpointId, (Duration, Shown)>,
    /// Those that could be connected to.
    known: BTreeMap<EndpointId, Known>,
    /// What this node said last of itself, and what it offered then, by place.
    own: Option<(Shown, Vec<ModelOffer>)>,
}

#[derive(Clone, Debug, Default)]
struct Known {
    failures: u32,
    next: Duration,
    dialling: bool,
}

/// The parts of a node that are there before it runs.
pub struct Parts {
    /// What it is called.
    pub name: String,
    /// Its key.
    pub key: SecretKey,
    /// Its place in the mesh.
    pub membership: Membership,
    /// Where it is kept.
    pub home: Home,
    /// Its end of all connections.
    pub endpoint: Endpoint,
    /// Addresses that were told.
    pub addresses: MemoryLookup,
    /// How it chooses among others.
    pub policy: Policy,
    /// Who may take part in gossip.
    pub admitted: Admitted,
}

impl Node {
    /// A node, and what it says to everybody.
    pub fn new(parts: Parts) -> (Arc<Self>, mpsc::Receiver<Gossiped>) {
        let Parts { name, key, membership, home, endpoint, addresses, policy, admitted } = parts;
        let id = key.public();
        let (news, said) = mpsc::channel(NEWS_MAX);
        let state = State {
            judge: Judge::new(membership.mesh),
            directory: Directory::new(node_id(id), Bounds::default()),
            affinity: Affinity::new(PREFIXES_MAX),
            links: HashMap::new(),
            shown: BTreeMap::new(),
            known: BTreeMap::new(),
            own: None,
        };
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let node = Self {
            id,
            name,
            incarnation: since.as_millis() as u64,
            membership,
            home,
            endpoint,
            addresses,
            policy,
            local: OnceLock::new(),
            admitted,
            budget: Budget::default(),
            counts: Counts::default(),
            over: CancellationToken::new(),
            tasks: TaskTracker::new(),
            news,
            speak: Notify::new(),
            changes: watch::Sender::new(0),
            key,
            began: Instant::now(),
            sequence: AtomicU64::new(0),
            state: Mutex::new(state),
        };
        (Arc::new(node), said)
    }

    /// What changes, for a moment. Nothing waits while this is held.
    pub fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Time since it was started.
    pub fn now(&self) -> Duration {
        self.began.elapsed()
    }

    /// Ticks when what others offer changes.
    pub fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// What it shows other members.
    pub fn card(&self) -> Card {
        let now = self.now();
        let state = self.state();
        let own = state.own.as_ref().map(|(own, _)| own.clone());
        let mut latest: Vec<_> =
            state.shown.values().filter(|(heard, _)| now.saturating_sub(*heard) < cadence::LEASE_MAX).collect();
        latest.sort_by_key(|(heard, _)| std::cmp::Reverse(*heard));
        let mut bytes = 0;
        let others = latest
            .into_iter()
            .map(|(heard, shown)| Shown { age_ms: millis(now.saturating_sub(*heard)), ..shown.clone() });
        let adverts = own.into_iter().chain(others);
        let adverts = adverts.take_while(|shown| {
            bytes += crate::codec::encode(shown).len();
            bytes <= CARD_ADVERTS_BYTES_MAX
        });
        Card {
            incarnation: self.incarnation,
            certificate: self.membership.certificate.clone(),
            revocations: state.judge.revocations().cloned(),
            adverts: adverts.collect(),
        }
    }

    /// Whether a node is a member, by its card, and that it is from now on.
    pub fn admit(&self, id: EndpointId, card: &Card) -> Result<(), TrustError> {
        if let Some(list) = &card.revocations {
            self.hear_revocations(list)?;
        }
        self.state().judge.admit(id, &card.certificate)?;
        self.admitted.insert(id);
        Ok(())
    }

    /// Keeps a connection to a member, and gives the one to be used: there may be a better one.
    pub fn meet(self: &Arc<Self>, connection: Connection, dialler: EndpointId, card: Card) -> Option<Link> {
        let id = connection.remote_id();
        let link = Link::new(connection, dialler, card.incarnation);
        let (kept, retired) = {
            let mut state = self.state();
            // It may have been revoked while it introduced itself.
            if self.over.is_cancelled() || state.judge.is_revoked(&id) {
                Parting::Stranger.close(&link.connection);
                return None;
            }
            let (kept, retired) = match state.links.get(&id) {
                Some(other) if link.replaces(other) => (link.clone(), Some(other.clone())),
                Some(other) => (other.clone(), Some(link.clone())),
                None => (link.clone(), None),
            };
            state.links.insert(id, kept.clone());
            let known = state.known.entry(id).or_default();
            *known = Known::default();
            state.directory.reached(node_id(id), round_trip(&kept.connection), self.now());
            (kept, retired)
        };
        for shown in card.adverts {
            self.hear(shown);
        }
        self.changed();
        tracing::debug!(node = %id.fmt_short(), "connected");
        crate::tasks::attend(self, link);
        if let Some(retired) = retired {
            self.tasks.spawn(retired.retire());
        }
        Some(kept)
    }

    /// A connection ended. Unless another took its place, everybody is told that the node is lost.
    pub fn part(&self, link: &Link) {
        let id = link.connection.remote_id();
        let loss = {
            let mut state = self.state();
            let current = state
                .links
                .get(&id)
                .is_some_and(|current| current.connection.stable_id() == link.connection.stable_id());
            if !current {
                return;
            }
            state.links.remove(&id);
            let now = self.now();
            state.known.entry(id).or_default().next = now;
            state.directory.lost(node_id(id), now)
        };
        tracing::debug!(node = %id.fmt_short(), "connection lost");
        if let Some(loss) = loss
            && !self.over.is_cancelled()
        {
            self.news.try_send(Gossiped::Loss(loss)).ok();
        }
        self.changed();
    }

    /// An advert, from whomever it came.
    pub fn hear(&self, shown: Shown) {
        let (id, now) = (shown.node, self.now());
        if id == self.id {
            return;
        }
        let heard = {
            let mut state = self.state();
            let Spoken { advert, at: address } = match shown.open(&state.judge) {
                Ok(spoken) => spoken,
                Err(error) => {
                    tracing::debug!(node = %id.fmt_short(), %error, "an advert does not count");
                    return;
                }
            };
            let age = Duration::from_millis(shown.age_ms.into());
            let at = now.saturating_sub(age);
            let heard = state.directory.hear_aged(advert, age, now);
            match &heard {
                Heard::New | Heard::Changed | Heard::Refreshed => {
                    self.addresses.set_endpoint_info(address);
                    state.shown.insert(id, (at, shown));
                    if state.known.len() < KNOWN_MAX {
                        state.known.entry(id).or_default();
                    }
                }
                Heard::Left => {
                    state.shown.remove(&id);
                    state.known.remove(&id);
                    state.affinity.forget(node_id(id));
                    self.addresses.remove_endpoint_info(id);
                }
                Heard::Stale | Heard::Refused(_) => {}
            }
            heard
        };
        match heard {
            Heard::New | Heard::Changed | Heard::Left => {
                self.admitted.insert(id);
                self.changed();
            }
            Heard::Refused(why) => tracing::warn!(node = %id.fmt_short(), %why, "an advert was refused"),
            Heard::Refreshed | Heard::Stale => self.admitted.insert(id),
        }
    }

    /// Somebody says that a node was lost.
    pub fn hear_loss(&self, loss: Loss) {
        if loss.node == node_id(self.id) {
            // It is here: the next advert says so to all.
            self.speak.notify_one();
            return;
        }
        let now = self.now();
        if self.state().directory.report(&loss, now) != Reported::Ignored {
            self.changed();
        }
    }

    /// How busy a node is that this one is connected to.
    pub fn hear_pulse(&self, link: &Link, bytes: &Bytes) {
        match Pulse::decode(bytes) {
            Ok(pulse) => {
                let id = node_id(link.connection.remote_id());
                let (way, now) = (round_trip(&link.connection), self.now());
                let pulsed = self.state().directory.pulse(id, &pulse, way, now);
                if pulsed == Pulsed::Stale {
                    tracing::trace!(node = %link.connection.remote_id().fmt_short(), "a pulse of one who is not known");
                }
            }
            Err(error) => {
                tracing::debug!(node = %link.connection.remote_id().fmt_short(), %error, "a pulse does not count")
            }
        }
    }

    /// A list of revoked nodes. Those on it are let go at once.
    pub fn hear_revocations(&self, list: &Signed<Revocations>) -> Result<bool, TrustError> {
        let known = self.state().judge.revoked().map_or(0, |known| known.serial);
        let revoked = self.state().judge.revoke(list.clone())?;
        let later = self.state().judge.revoked().is_some_and(|now| now.serial > known);
        if later && let Err(error) = self.home.remember_revocations(list) {
            tracing::warn!(%error, "the list of revoked nodes cannot be kept");
        }
        for id in &revoked {
            tracing::info!(node = %id.fmt_short(), "revoked");
            self.admitted.remove(id);
            let mut state = self.state();
            state.directory.revoke(node_id(*id));
            state.affinity.forget(node_id(*id));
            state.shown.remove(id);
            state.known.remove(id);
            if let Some(link) = state.links.remove(id) {
                Parting::Revoked.close(&link.connection);
            }
            if *id == self.id {
                tracing::error!("this node was revoked: it is not part of the mesh any more");
                self.over.cancel();
            }
        }
        if !revoked.is_empty() {
            self.changed();
        }
        Ok(later)
    }

    /// What this node offers at this moment, signed.
    pub fn advert(&self, leaving: bool) -> Shown {
        let mut offers = match self.local.get() {
            Some(local) if !leaving => local.offers(),
            _ => Vec::new(),
        };
        if offers.len() > advert::OFFERS_MAX {
            tracing::warn!(
                models = offers.len(),
                max = advert::OFFERS_MAX,
                "more models are ready than can be offered"
            );
            offers.truncate(advert::OFFERS_MAX);
        }
        let members = self.state().directory.len() + 1;
        let advert = Advert {
            version: advert::VERSION,
            node: node_id(self.id),
            name: self.name.clone(),
            incarnation: self.incarnation,
            sequence: self.sequence.fetch_add(1, Ordering::Relaxed) + 1,
            lease_ms: millis(cadence::lease(members)),
            leaving,
            offers: offers.iter().cloned().map(Arc::new).collect(),
        };
        let mut at = self.endpoint.addr();
        at.addrs = at.addrs.into_iter().take(ADDRESSES_MAX).collect();
        let shown = Shown {
            node: self.id,
            certificate: self.membership.certificate.clone(),
            spoken: Signed::new(&self.key, &Spoken { advert, at }),
            age_ms: 0,
        };
        self.state().own = Some((shown.clone(), offers));
        shown
    }

    /// How busy it is, for those who are connected.
    pub fn pulse(&self) -> Bytes {
        let now = self.local.get().map(|local| local.offers()).unwrap_or_default();
        let state = self.state();
        let load = |said: &ModelOffer| now.iter().find(|offer| offer.name == said.name).map(|offer| offer.load);
        let said = state.own.as_ref().map(|(_, offers)| offers.as_slice()).unwrap_or_default();
        let loads = said.iter().enumerate().filter_map(|(at, said)| Some((u16::try_from(at).ok()?, load(said)?)));
        let pulse = Pulse {
            incarnation: self.incarnation,
            sequence: self.sequence.load(Ordering::Relaxed),
            next_ms: millis(cadence::PULSE_IDLE),
            loads: loads.collect(),
        };
        pulse.encode().into()
    }

    /// Forgets whose lease is over.
    pub fn expire(&self) {
        let now = self.now();
        let mut state = self.state();
        let expired = state.directory.expire(now);
        for id in &expired {
            if let Ok(id) = EndpointId::from_bytes(&id.0) {
                state.shown.remove(&id);
            }
        }
        drop(state);
        if !expired.is_empty() {
            self.changed();
        }
    }

    /// Somebody who may be a member was seen.
    pub fn see(&self, id: EndpointId) {
        let mut state = self.state();
        if id != self.id && !state.judge.is_revoked(&id) && state.known.len() < KNOWN_MAX {
            let now = self.now();
            let known = state.known.entry(id).or_default();
            known.next = known.next.min(now);
        }
    }

    /// Nodes to be connected to now, at most `most` of them, those first whose adverts were heard: anybody may announce
    /// himself on a network, as often as he likes. Whoever asks has to say how it went.
    pub fn to_dial(&self, most: usize) -> Vec<EndpointId> {
        let now = self.now();
        let mut state = self.state();
        let State { known, links, shown, .. } = &mut *state;
        let due = known.iter().filter(|(id, known)| !known.dialling && known.next <= now && !links.contains_key(*id));
        let mut due: Vec<_> = due.map(|(id, known)| (!shown.contains_key(id), known.next, *id)).collect();
        due.sort_unstable();
        let due: Vec<EndpointId> = due.into_iter().map(|(.., id)| id).take(most).collect();
        for id in &due {
            if let Some(known) = known.get_mut(id) {
                known.dialling = true;
            }
        }
        due
    }

    /// How an attempt went.
    pub fn dialled(&self, id: EndpointId, reached: bool) {
        let now = self.now();
        let mut state = self.state();
        let forgotten = !state.shown.contains_key(&id);
        if let Some(known) = state.known.get_mut(&id) {
            known.dialling = false;
            known.failures = if reached { 0 } else { known.failures.saturating_add(1) };
            // Not all at once, and not the two of a pair at the same time.
            let pause = PAUSE_MIN.saturating_mul(1 << known.failures.min(10)).min(PAUSE_MAX);
            known.next = now + pause.mul_f64(0.75 + 0.5 * rand::random::<f64>());
            // Strangers on the network are not asked for ever.
            if forgotten && known.failures > 1000 {
                state.known.remove(&id);
            }
        }
    }

    /// Where those are that it is connected to, to be remembered.
    pub async fn reachable(&self) -> Vec<EndpointAddr> {
        let ids: Vec<EndpointId> = self.state().links.keys().copied().collect();
        let mut found = Vec::new();
        for id in ids {
            if let Some(info) = self.endpoint.remote_info(id).await {
                found.push(EndpointAddr::from_parts(id, info.addrs().map(|addr| addr.addr().clone())));
            }
        }
        found
    }
}

/// A node's id, as those know it who decide.
pub fn node_id(id: EndpointId) -> NodeId {
    NodeId(*id.as_bytes())
}

/// And the way back.
pub fn endpoint_id(id: NodeId) -> Option<EndpointId> {
    EndpointId::from_bytes(&id.0).ok()
}

/// The time to the other side and back, over the way that is used.
fn round_trip(connection: &Connection) -> Option<Duration> {
    connection.paths().iter().find(|path| path.is_selected()).map(|path| path.rtt())
}

fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
