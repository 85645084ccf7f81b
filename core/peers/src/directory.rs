//! Who is there, and what may be routed to whom. **Advertised means routable**: [`Directory::offers`] has what stands in the
//! latest advert heard of each node that did not leave, was not lost or revoked, and whose lease is not over; all of that, and
//! nothing else.

mod look;
#[cfg(test)]
mod tests;

use std::{
    collections::{BTreeMap, BTreeSet},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use lru::LruCache;
use mesh_core::node::ModelOffer;
use serde::{Deserialize, Serialize};

use crate::{
    NodeId,
    advert::{Advert, Held, Loss, OFFERS_MAX, Pulse, Snapshot},
    cadence::{PULSE_IDLE, PULSE_USED, PULSES_MISSED_MAX},
};

pub use look::NodeRow;

/// How much is kept of others.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Bounds {
    /// Nodes.
    pub members_max: usize,
    /// Offers of one node.
    pub offers_max: usize,
    /// Bytes that one node's advert may take.
    pub node_bytes_max: usize,
    /// Bytes that all may take. Half of it is divided among [`members_max`](Self::members_max) nodes, so that each has its
    /// share whatever the others send; the other half is for those that need more, as they come.
    pub total_bytes_max: usize,
}

impl Default for Bounds {
    fn default() -> Self {
        Self { members_max: 4096, offers_max: OFFERS_MAX, node_bytes_max: 64 << 10, total_bytes_max: 64 << 20 }
    }
}

impl Bounds {
    /// What each node may have, whatever the others have.
    fn share_bytes(&self) -> usize {
        self.total_bytes_max / 2 / self.members_max.max(1)
    }
}

/// What an advert changed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Heard {
    /// A node that was not there.
    New,
    /// Its offers are others, or it can be routed to again.
    Changed,
    /// Its lease.
    Refreshed,
    /// Nothing: it is not the latest, or it is this node's own.
    Stale,
    /// The node goes.
    Left,
    /// Nothing, and why.
    Refused(Refused),
}

/// Why an advert is not taken.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// The node was revoked.
    #[error("the node was revoked")]
    Revoked,
    /// There are too many.
    #[error("{max} other nodes are known already: raise members_max")]
    Members {
        /// How many there may be.
        max: usize,
    },
    /// It offers too much.
    #[error("{found} offers, over {max}: raise offers_max")]
    Offers {
        /// What it offers.
        found: usize,
        /// What it may.
        max: usize,
    },
    /// It takes too much.
    #[error("{bytes} bytes, over its share of {max}")]
    Bytes {
        /// What it takes.
        bytes: usize,
        /// What it may at this time.
        max: usize,
    },
}

/// What a pulse changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Pulsed {
    /// Loads, and what is known of its being alive.
    Applied,
    /// The latter; it speaks of an advert that did not come yet.
    Ahead,
    /// Nothing: it speaks of an earlier start, or of a node that is not known.
    Stale,
}

/// What the news of a loss changed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reported {
    /// The node is not routed to any more.
    Believed,
    /// Nothing: it is connected here and was heard just now, or was heard of since, or is known to be lost.
    Ignored,
    /// It is this node: it has to advertise anew, with a later sequence.
    Mine,
}

/// What is known of a node.
#[derive(Debug)]
struct Member {
    advert: Arc<Advert>,
    /// The advert's offers with loads as pulses had them; absent before there were any.
    offers: Option<Vec<Arc<ModelOffer>>>,
    heard: Duration,
    expires: Duration,
    /// When the next pulse should be there, of one that is connected.
    due: Option<Due>,
    round_trip: Option<Duration>,
    lost: bool,
    weight: usize,
}

#[derive(Clone, Copy, Debug)]
struct Due {
    at: Duration,
    interval: Duration,
}

impl Due {
    /// Whether the latest pulse is so old that somebody else's word counts for more. Those who hear few pulses of a node
    /// believe those who hear many of it.
    fn is_doubtful(&self, now: Duration) -> bool {
        now + self.interval > self.at + self.interval.min(PULSE_USED) * (PULSES_MISSED_MAX - 1)
    }
}

impl Member {
    fn offers(&self) -> &[Arc<ModelOffer>] {
        self.offers.as_deref().unwrap_or(&self.advert.offers)
    }

    fn routable(&self, now: Duration) -> bool {
        !self.lost && now < self.expires
    }
}

/// What a node knows of the others.
#[derive(Debug)]
pub struct Directory {
    me: NodeId,
    bounds: Bounds,
    members: BTreeMap<NodeId, Member>,
    expiries: BTreeSet<(Duration, NodeId)>,
    /// Those that pulses are expected from: few, where members are many.
    connected: BTreeSet<NodeId>,
    /// The latest incarnation and sequence of those that are no members any more: nothing earlier brings them back.
    gone: LruCache<NodeId, Gone>,
    revoked: BTreeSet<NodeId>,
    /// Bytes beyond their shares that members take.
    excess: usize,
}

#[derive(Clone, Copy, Debug)]
struct Gone {
    incarnation: u64,
    sequence: u64,
    /// Its lease ended: it may be somewhere, cut off.
    lapsed: bool,
}

impl Directory {
    /// An empty one, of node `me`.
    pub fn new(me: NodeId, bounds: Bounds) -> Self {
        let gone = NonZeroUsize::new(bounds.members_max).unwrap_or(NonZeroUsize::MIN);
        Self {
            me,
            bounds,
            members: BTreeMap::new(),
            expiries: BTreeSet::new(),
            connected: BTreeSet::new(),
            gone: LruCache::new(gone),
            revoked: BTreeSet::new(),
            excess: 0,
        }
    }

    /// Takes note of an advert that was just said.
    pub fn hear(&mut self, advert: impl Into<Arc<Advert>>, now: Duration) -> Heard {
        self.hear_aged(advert, Duration::ZERO, now)
    }

    /// Takes note of an advert that was said `age` ago, such as one of a [`Snapshot`].
    pub fn hear_aged(&mut self, advert: impl Into<Arc<Advert>>, age: Duration, now: Duration) -> Heard {
        let advert = advert.into();
        let node = advert.node;
        if node == self.me {
            return Heard::Stale;
        }
        if self.revoked.contains(&node) {
            return Heard::Refused(Refused::Revoked);
        }
        let latest = match self.members.get(&node) {
            Some(member) => Some((member.advert.incarnation, member.advert.sequence)),
            None => self.gone.peek(&node).map(|gone| (gone.incarnation, gone.sequence)),
        };
        if latest.is_some_and(|(incarnation, sequence)| !advert.is_later_than(incarnation, sequence)) {
            return Heard::Stale;
        }
        if advert.leaving {
            let was = self.remove(&node).is_some();
            self.bury(&advert, false);
            return if was { Heard::Left } else { Heard::Stale };
        }
        let lease = Duration::from_millis(advert.lease_ms.into());
        if age >= lease {
            return Heard::Stale;
        }
        let weight = advert.weight_bytes();
        if let Err(refused) = self.room(&node, &advert, weight) {
            return Heard::Refused(refused);
        }
        self.gone.pop(&node);
        // One whose lease is over is not there, whether that was noticed or not.
        let before = self.remove(&node).filter(|member| now < member.expires);
        let heard = match &before {
            None => Heard::New,
            // Loads change all the time, and are no change of what is offered.
            Some(member) if !member.routable(now) || !same_offers(&member.advert, &advert) => Heard::Changed,
            Some(_) => Heard::Refreshed,
        };
        let same_start = before.as_ref().is_some_and(|member| member.advert.incarnation == advert.incarnation);
        self.insert(Member {
            offers: None,
            heard: now.saturating_sub(age),
            expires: now + (lease - age),
            // A node that was started anew has none of the old one's connections.
            due: before.as_ref().filter(|member| same_start && !member.lost).and_then(|member| member.due),
            round_trip: before.and_then(|member| member.round_trip),
            lost: false,
            weight,
            advert,
        });
        heard
    }

    /// Whether there is room for what the node says now.
    fn room(&self, node: &NodeId, advert: &Advert, weight: usize) -> Result<(), Refused> {
        let Bounds { members_max, offers_max, node_bytes_max, total_bytes_max } = self.bounds;
        let old = self.members.get(node).map(|member| member.weight);
        if old.is_none() && self.members.len() >= members_max {
            return Err(Refused::Members { max: members_max });
        }
        if advert.offers.len() > offers_max {
            return Err(Refused::Offers { found: advert.offers.len(), max: offers_max });
        }
        let share = self.bounds.share_bytes();
        let others = self.excess - old.map_or(0, |old| old.saturating_sub(share));
        let free = (total_bytes_max / 2).saturating_sub(others);
        let max = node_bytes_max.min(share + free);
        if weight > max { Err(Refused::Bytes { bytes: weight, max }) } else { Ok(()) }
    }

    /// Takes note of a pulse that came over the connection to a node.
    pub fn pulse(&mut self, node: NodeId, pulse: &Pulse, round_trip: Option<Duration>, now: Duration) -> Pulsed {
        let current = |member: &&mut Member| now < member.expires && pulse.incarnation >= member.advert.incarnation;
        let Some(member) = self.members.get_mut(&node).filter(current) else { return Pulsed::Stale };
        let known = (member.advert.incarnation, member.advert.sequence);
        let interval = Duration::from_millis(pulse.next_ms.into());
        let same_start = pulse.incarnation == known.0;
        member.due = Some(Due { at: now + interval, interval });
        self.connected.insert(node);
        member.round_trip = round_trip.or(member.round_trip);
        member.heard = now;
        // What an earlier start offered is not there any more.
        member.lost = !same_start;
        if same_start {
            let expires = member.expires.max(now + Duration::from_millis(member.advert.lease_ms.into()));
            self.expiries.remove(&(member.expires, node));
            self.expiries.insert((expires, node));
            member.expires = expires;
        }
        let same = (pulse.incarnation, pulse.sequence) == known;
        if same {
            let offers = member.offers.get_or_insert_with(|| member.advert.offers.clone());
            for (place, load) in &pulse.loads {
                if let Some(offer) = offers.get_mut(usize::from(*place)) {
                    Arc::make_mut(offer).load = *load;
                }
            }
        }
        if same || (same_start && pulse.sequence < known.1) { Pulsed::Applied } else { Pulsed::Ahead }
    }

    /// There is a connection to the node.
    pub fn reached(&mut self, node: NodeId, round_trip: Option<Duration>, now: Duration) {
        if let Some(member) = self.members.get_mut(&node) {
            // Until pulses have come, an ordinary interval is what is expected.
            member.due = Some(Due { at: now + PULSE_IDLE, interval: PULSE_IDLE });
            self.connected.insert(node);
            member.round_trip = round_trip.or(member.round_trip);
            member.heard = now;
            member.lost = false;
        }
    }

    /// The connection to the node broke, or it could not be reached. Until it is heard again, nothing is routed to it. What is
    /// to be told to everybody, if it was not known.
    pub fn lost(&mut self, node: NodeId, now: Duration) -> Option<Loss> {
        self.connected.remove(&node);
        let member = self.members.get_mut(&node)?;
        member.due = None;
        if member.lost || now >= member.expires {
            return None;
        }
        member.lost = true;
        Some(Loss { node, incarnation: member.advert.incarnation, sequence: member.advert.sequence })
    }

    /// The connection to the node was closed, since nobody needed it. That says nothing about the node.
    pub fn closed(&mut self, node: NodeId) {
        self.connected.remove(&node);
        if let Some(member) = self.members.get_mut(&node) {
            member.due = None;
        }
    }

    /// Somebody else lost a node.
    pub fn report(&mut self, loss: &Loss, now: Duration) -> Reported {
        if loss.node == self.me {
            return Reported::Mine;
        }
        match self.members.get_mut(&loss.node) {
            Some(member)
                if !member.lost
                    && member.due.is_none_or(|due| due.is_doubtful(now))
                    && !member.advert.is_later_than(loss.incarnation, loss.sequence) =>
            {
                member.lost = true;
                member.due = None;
                self.connected.remove(&loss.node);
                Reported::Believed
            }
            _ => Reported::Ignored,
        }
    }

    /// Forgets a node, and refuses what it says from now on.
    pub fn revoke(&mut self, node: NodeId) {
        self.remove(&node);
        self.gone.pop(&node);
        self.revoked.insert(node);
    }

    /// Those whose leases are over by now, and that are forgotten with this.
    pub fn expire(&mut self, now: Duration) -> Vec<NodeId> {
        let mut expired = Vec::new();
        while let Some(&(at, node)) = self.expiries.first()
            && at <= now
        {
            if let Some(member) = self.remove(&node) {
                self.bury(&member.advert, true);
            }
            expired.push(node);
        }
        expired
    }

    /// When the next lease is over.
    pub fn next_expiry(&self) -> Option<Duration> {
        self.expiries.first().map(|(at, _)| *at)
    }

    /// Connected ones that missed several pulses: their connections are to be taken for [`lost`](Self::lost).
    pub fn quiet(&self, now: Duration) -> Vec<NodeId> {
        let missed = |due: Due| now > due.at + due.interval * (PULSES_MISSED_MAX - 1);
        let due = |node: &NodeId| self.members.get(node).and_then(|member| member.due);
        self.connected.iter().filter(|node| due(node).is_some_and(missed)).copied().collect()
    }

    /// This node itself heard nothing for so long, since it was not given time to listen: no pulse is late by that.
    pub fn stood_still(&mut self, time: Duration) {
        for node in &self.connected {
            if let Some(due) = self.members.get_mut(node).and_then(|member| member.due.as_mut()) {
                due.at += time;
            }
        }
    }

    /// Those that were lost, or whose leases ended: after a partition they may be there, and nobody here would know unless
    /// somebody tries to reach one of them every now and then.
    pub fn missing(&self) -> Vec<NodeId> {
        let lost = self.members.iter().filter(|(_, member)| member.lost).map(|(node, _)| *node);
        let lapsed = self.gone.iter().filter(|(_, gone)| gone.lapsed).map(|(node, _)| *node);
        lost.chain(lapsed).collect()
    }

    /// What is known, for a node that has just come, with this node's own latest advert: its next one may be a while off.
    pub fn snapshot(&self, mine: Arc<Advert>, now: Duration) -> Vec<Snapshot> {
        let mine = Held { age_ms: 0, advert: mine };
        let routable = self.members.values().filter(|member| member.routable(now));
        let held = routable.map(|member| {
            let age = Duration::from_millis(member.advert.lease_ms.into()).saturating_sub(member.expires - now);
            Held { age_ms: u32::try_from(age.as_millis()).unwrap_or(u32::MAX), advert: member.advert.clone() }
        });
        Snapshot::several([mine].into_iter().chain(held))
    }

    fn insert(&mut self, member: Member) {
        let node = member.advert.node;
        self.excess += member.weight.saturating_sub(self.bounds.share_bytes());
        self.expiries.insert((member.expires, node));
        if member.due.is_some() {
            self.connected.insert(node);
        }
        self.members.insert(node, member);
    }

    fn remove(&mut self, node: &NodeId) -> Option<Member> {
        let member = self.members.remove(node)?;
        self.connected.remove(node);
        self.excess -= member.weight.saturating_sub(self.bounds.share_bytes());
        self.expiries.remove(&(member.expires, *node));
        Some(member)
    }

    fn bury(&mut self, advert: &Advert, lapsed: bool) {
        let Advert { incarnation, sequence, .. } = *advert;
        self.gone.put(advert.node, Gone { incarnation, sequence, lapsed });
    }
}

fn same_offers(one: &Advert, other: &Advert) -> bool {
    one.name == other.name
        && one.offers.len() == other.offers.len()
        && one.offers.iter().zip(&other.offers).all(|(one, other)| {
            Arc::ptr_eq(one, other) || **one == ModelOffer { load: one.load, ..ModelOffer::clone(other) }
        })
}
