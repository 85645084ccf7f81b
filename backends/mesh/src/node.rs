//! A node in a mesh: the one place where its state changes. What is decided about it is decided elsewhere, purely.

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, RwLock},
    time::{Duration, Instant, SystemTime},
};

use bytes::Bytes;
use iroh::{Endpoint, EndpointAddr, EndpointId, SecretKey, address_lookup::memory::MemoryLookup, endpoint::Connection};
use mesh_core::node::Local;
use mesh_peers::{
    Affinity, Bounds, Directory, Heard, NodeId, Policy, Reach,
    advert::{Loss, Pulse},
    cadence,
    directory::{Pulsed, Reported},
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

use crate::{
    adverts::{Gossiped, Shown, Spoken},
    counts::Counts,
    home::{Home, Membership},
    link::{Link, Parting},
    own::Own,
    trust::{Judge, Revocations, Signed, TrustError},
    wire::{Budget, CARD_BYTES_MAX, Card},
};

/// What is said to everybody and not yet sent.
pub const NEWS_MAX: usize = 256;
/// Members whose adverts a card shows, in bytes.
const CARD_ADVERTS_BYTES_MAX: usize = CARD_BYTES_MAX / 2;
/// Beginnings of conversations whose nodes are remembered.
const PREFIXES_MAX: usize = 1 << 16;
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
    /// Its key.
    pub key: SecretKey,
    began: Instant,
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

/// Held by who connects to a node.
pub type Turn = tokio::sync::Mutex<()>;

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
    pub shown: BTreeMap<EndpointId, (Duration, Shown)>,
    /// Those that could be connected to.
    pub reach: Reach,
    /// Held by who connects to a node.
    pub turns: HashMap<EndpointId, Arc<Turn>>,
    /// Those that gossip goes through.
    pub neighbours: BTreeSet<EndpointId>,
    /// What this node said last of itself.
    pub own: Option<Own>,
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
            reach: Reach::new(rand::random()),
            turns: HashMap::new(),
            neighbours: BTreeSet::new(),
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

    /// Tells who waits that something has.
    pub fn changed(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    /// What it shows another member, whose card it has seen or not: itself, and all the others as well where that node may
    /// not have heard of them.
    pub fn card(&self, to: EndpointId, theirs: Option<&Card>) -> Card {
        let now = self.now();
        let state = self.state();
        let own = state.own.as_ref().map(|own| own.shown.clone());
        let hears = state.directory.is_routable(&node_id(to), now)
            && state
                .directory
                .latest(&node_id(to))
                .is_some_and(|(known, _)| theirs.is_none_or(|theirs| theirs.incarnation <= known));
        let latest = state.shown.values().filter(|_| !hears);
        let mut latest: Vec<_> = latest.filter(|(heard, _)| now.saturating_sub(*heard) < cadence::LEASE_MAX).collect();
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
            state.reach.met(node_id(id));
            (kept, retired)
        };
        for shown in card.adverts {
            self.hear(shown);
        }
        {
            let mut state = self.state();
            // What an earlier start offered is not there any more.
            if state.directory.latest(&node_id(id)).is_some_and(|(known, _)| known == kept.incarnation) {
                state.directory.reached(node_id(id), round_trip(&kept.connection), self.now());
            }
        }
        self.changed();
        tracing::debug!(node = %id.fmt_short(), "connected");
        crate::attend::attend(self, link);
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
            if Parting::Unneeded.ended(&link.connection) {
                state.directory.closed(node_id(id));
                return;
            }
            state.reach.parted(node_id(id), now);
            if Parting::Duplicate.ended(&link.connection) {
                // The node has another one, which is not known here: it is there, all the same.
                state.directory.closed(node_id(id));
                return;
            }
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
            let before = state.directory.latest(&node_id(id)).map(|(incarnation, _)| incarnation);
            let started_anew = before.is_some_and(|before| before < advert.incarnation);
            let heard = state.directory.hear_aged(advert, age, now);
            match &heard {
                Heard::New | Heard::Changed | Heard::Refreshed => {
                    self.addresses.set_endpoint_info(address);
                    state.shown.insert(id, (at, shown));
                    state.reach.vouch(node_id(id));
                    if started_anew {
                        state.affinity.forget(node_id(id));
                    }
                    if heard != Heard::Refreshed && !state.links.contains_key(&id) {
                        state.reach.parted(node_id(id), now);
                    }
                }
                Heard::Left => {
                    state.shown.remove(&id);
                    state.reach.forget(node_id(id));
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
        let now = self.now();
        let (reported, said) = {
            let mut state = self.state();
            (state.directory.report(&loss, now), state.own.as_ref().map_or(0, |own| own.sequence))
        };
        match reported {
            Reported::Believed => self.changed(),
            // It is here: a later advert says so to all, unless one has already.
            Reported::Mine if (loss.incarnation, loss.sequence) >= (self.incarnation, said) => self.speak.notify_one(),
            Reported::Mine | Reported::Ignored => {}
        }
    }

    /// How busy a node is that this one is connected to.
    pub fn hear_pulse(&self, link: &Link, bytes: &Bytes) {
        match Pulse::decode(bytes) {
            Ok(pulse) => {
                link.heard(Duration::from_millis(pulse.next_ms.into()));
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
            state.reach.forget(node_id(*id));
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

/// In whole milliseconds.
pub fn millis(duration: Duration) -> u32 {
    u32::try_from(duration.as_millis()).unwrap_or(u32::MAX)
}
