//! Who is connected to, in which order, and which connections are given up.
//!
//! Anybody may announce himself on a network, under as many ids as he likes: whoever is known to be a member goes first,
//! and attempts at strangers never take the places of others.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    time::Duration,
};

use crate::NodeId;

/// Connections that a node keeps to others whether or not it needs them.
pub const LINKS_WANTED: usize = 16;
/// Connections beyond that it keeps for its requests.
pub const LINKS_USED_MAX: usize = 32;
/// For how long it keeps those that are not used.
pub const LINK_KEPT: Duration = Duration::from_secs(120);

/// Attempts that are made at the same time.
pub const ATTEMPTS_MAX: usize = 8;
/// Of those, attempts at nodes of which nothing is heard.
const ATTEMPTS_UNHEARD_MAX: usize = 4;
/// And at strangers.
const ATTEMPTS_STRANGE_MAX: usize = 2;

/// Pauses between attempts at one node. With the time that an attempt takes at one that is gone, each is tried about every ten
/// seconds.
const PAUSE_MIN: Duration = Duration::from_millis(250);
const PAUSE_MAX: Duration = Duration::from_secs(5);

/// Members that are remembered.
const MEMBERS_MAX: usize = 4096;
/// Strangers that are.
const STRANGERS_MAX: usize = 256;
/// Attempts after which a stranger is forgotten.
const STRANGE_FAILURES_MAX: u32 = 8;

/// How a node stands to this one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Standing {
    /// Gossip goes through it, and there is no connection for pulses yet.
    Neighbour,
    /// It is there, as others say.
    Member,
    /// It was there, or somebody who should know says that it is.
    Unheard,
    /// It says itself that it is there.
    Stranger,
    /// There is a connection.
    Connected,
}

#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// More than its own word was heard of it.
    vouched: bool,
    failures: u32,
    next: Duration,
    under_way: Option<Place>,
}

/// Whose place an attempt takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    Heard,
    Unheard,
    Strange,
}

/// Nodes that could be connected to.
#[derive(Debug)]
pub struct Reach {
    nodes: BTreeMap<NodeId, Node>,
    strangers: usize,
    salt: u64,
}

impl Reach {
    /// None yet. Each node should have a salt of its own: not all are to connect to the same few.
    pub fn new(salt: u64) -> Self {
        Self { nodes: BTreeMap::new(), strangers: 0, salt }
    }

    /// A member, or one who is said to be one by a ticket or by what was remembered.
    pub fn vouch(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.get_mut(&id) {
            self.strangers -= usize::from(!node.vouched);
            node.vouched = true;
            return;
        }
        if self.nodes.len() - self.strangers >= MEMBERS_MAX {
            let vouched = self.nodes.iter().filter(|(_, node)| node.vouched && node.under_way.is_none());
            let Some(worst) = vouched.max_by_key(|(_, node)| node.failures).map(|(id, _)| *id) else { return };
            self.nodes.remove(&worst);
        }
        self.nodes.insert(id, Node { vouched: true, ..Node::default() });
    }

    /// One who announces himself. If that is a member, it is worth an attempt at once.
    pub fn announced(&mut self, id: NodeId, now: Duration) {
        if let Some(node) = self.nodes.get_mut(&id) {
            if node.vouched {
                node.next = node.next.min(now);
            }
            return;
        }
        if self.strangers >= STRANGERS_MAX {
            // Whoever announces many ids only takes the places of his own.
            let strange = self.nodes.iter().filter(|(_, node)| !node.vouched && node.under_way.is_none());
            let Some((worst, _)) = strange.max_by_key(|(id, node)| (node.failures, mix(id, self.salt))) else { return };
            let worst = *worst;
            self.forget(worst);
        }
        self.nodes.insert(id, Node::default());
        self.strangers += 1;
    }

    /// It left, or was revoked.
    pub fn forget(&mut self, id: NodeId) {
        if let Some(node) = self.nodes.remove(&id) {
            self.strangers -= usize::from(!node.vouched);
        }
    }

    /// The connection to it ended: another is worth an attempt now.
    pub fn parted(&mut self, id: NodeId, now: Duration) {
        if let Some(node) = self.nodes.get_mut(&id) {
            (node.failures, node.next) = (0, now);
        }
    }

    /// There is a connection to it, whoever opened that.
    pub fn met(&mut self, id: NodeId) {
        self.vouch(id);
        if let Some(node) = self.nodes.get_mut(&id) {
            node.failures = 0;
        }
    }

    /// Whom to connect to now, where so many connections are there. Each attempt has to be [`ended`](Self::ended).
    pub fn next(&mut self, links: usize, standing: impl Fn(&NodeId) -> Option<Standing>, now: Duration) -> Vec<NodeId> {
        let under_way = |place| self.nodes.values().filter(|node| node.under_way == Some(place)).count();
        let (mut unheard, mut strange) = (under_way(Place::Unheard), under_way(Place::Strange));
        let mut all = under_way(Place::Heard) + unheard + strange;
        let mut wanted = LINKS_WANTED.saturating_sub(links + all);
        let due = self.nodes.iter().filter(|(_, node)| node.under_way.is_none() && node.next <= now);
        let mut due: Vec<_> = due
            .filter_map(|(id, node)| {
                let unknown = if node.vouched { Standing::Unheard } else { Standing::Stranger };
                let standing = standing(id).unwrap_or(unknown);
                let comes = match standing {
                    Standing::Neighbour | Standing::Unheard => true,
                    Standing::Member | Standing::Stranger => wanted > 0,
                    Standing::Connected => false,
                };
                comes.then(|| (standing, node.failures, mix(id, self.salt), *id))
            })
            .collect();
        due.sort_unstable();
        let mut found = Vec::new();
        for (standing, .., id) in due {
            if all >= ATTEMPTS_MAX {
                break;
            }
            let (place, free) = match standing {
                Standing::Neighbour => (Place::Heard, true),
                Standing::Member => (Place::Heard, wanted > 0),
                // However many there are on this side of a divide, somebody has to look for the other.
                Standing::Unheard => (Place::Unheard, unheard < ATTEMPTS_UNHEARD_MAX),
                Standing::Stranger => (Place::Strange, strange < ATTEMPTS_STRANGE_MAX && wanted > 0),
                Standing::Connected => continue,
            };
            if !free {
                continue;
            }
            all += 1;
            wanted = wanted.saturating_sub(1);
            unheard += usize::from(place == Place::Unheard);
            strange += usize::from(place == Place::Strange);
            if let Some(node) = self.nodes.get_mut(&id) {
                node.under_way = Some(place);
            }
            found.push(id);
        }
        found
    }

    /// How an attempt ended. `random` is between 0 and 1, and keeps two that try one another from doing so at the same time
    /// again and again.
    pub fn ended(&mut self, id: NodeId, reached: bool, random: f64, now: Duration) {
        let Entry::Occupied(mut entry) = self.nodes.entry(id) else { return };
        let node = entry.get_mut();
        node.under_way = None;
        node.failures = if reached { 0 } else { node.failures.saturating_add(1) };
        let pause = PAUSE_MIN.saturating_mul(1 << node.failures.min(10)).min(PAUSE_MAX);
        node.next = now + pause.mul_f64(0.75 + 0.5 * random.clamp(0.0, 1.0));
        if !node.vouched && node.failures >= STRANGE_FAILURES_MAX {
            entry.remove();
            self.strangers -= 1;
        }
    }
}

/// A node's place among equals.
fn mix(node: &NodeId, salt: u64) -> u64 {
    let hash = blake3::Hasher::new().update(&node.0).update(&salt.to_le_bytes()).finalize();
    u64::from_le_bytes(hash.as_bytes()[..8].try_into().expect("eight bytes"))
}

/// A connection, as far as it matters to whether it is kept.
#[derive(Clone, Copy, Debug)]
pub struct Kept {
    /// To whom.
    pub node: NodeId,
    /// Whether this node opened it: who opened a connection closes it.
    pub own: bool,
    /// Whether gossip goes to that node.
    pub neighbour: bool,
    /// How long ago it was used last, or opened. Zero while it is.
    pub unused: Duration,
}

/// The connections that nobody needs any more.
pub fn surplus(links: &[Kept]) -> Vec<NodeId> {
    let beyond = links.len().saturating_sub(LINKS_WANTED);
    let mut own: Vec<&Kept> = links.iter().filter(|link| link.own && !link.neighbour).collect();
    own.sort_by_key(|link| (std::cmp::Reverse(link.unused), link.node));
    let too_many = own.len().saturating_sub(LINKS_USED_MAX);
    let old = own
        .iter()
        .enumerate()
        .filter(|(at, link)| !link.unused.is_zero() && (*at < too_many || link.unused >= LINK_KEPT));
    old.map(|(_, link)| link.node).take(beyond).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(index: u16) -> NodeId {
        let mut id = [0; 32];
        id[..2].copy_from_slice(&index.to_be_bytes());
        NodeId(id)
    }

    const fn at(s: u64) -> Duration {
        Duration::from_secs(s)
    }

    #[test]
    fn thousands_of_announced_ids_delay_no_member() {
        let mut reach = Reach::new(1);
        let mut announced = 1000..6000_u16;
        announced.by_ref().take(2000).for_each(|index| reach.announced(node(index), at(0)));
        let heard = |id: &NodeId| (*id == node(1)).then_some(Standing::Member);
        let first = reach.next(0, heard, at(0));
        assert_eq!(first.len(), ATTEMPTS_STRANGE_MAX, "{first:?}");
        // While those are tried, a member becomes known, and one that was lost.
        announced.by_ref().take(2000).for_each(|index| reach.announced(node(index), at(1)));
        reach.vouch(node(2));
        reach.vouch(node(1));
        assert_eq!(reach.next(0, heard, at(1)), [node(1), node(2)]);
        assert_eq!(reach.next(0, heard, at(2)), [], "strangers have no more places");
        announced.for_each(|index| reach.announced(node(index), at(2)));
        assert!(reach.nodes.len() <= STRANGERS_MAX + 2);
        // An announced one that is a member after all is not held up by its failures.
        reach.ended(node(2), false, 0.5, at(2));
        assert_eq!(reach.next(0, heard, at(2)), []);
        reach.announced(node(2), at(2));
        assert_eq!(reach.next(0, heard, at(2)), [node(2)]);
    }

    #[test]
    fn strangers_that_never_answer_are_forgotten_and_members_are_not() {
        let mut reach = Reach::new(1);
        reach.announced(node(1), at(0));
        reach.vouch(node(2));
        for round in 1..100 {
            for id in reach.next(0, |_| None, at(10 * round)) {
                reach.ended(id, false, 1.0, at(10 * round));
            }
        }
        assert_eq!(reach.nodes.keys().copied().collect::<Vec<_>>(), [node(2)]);
        assert_eq!(reach.strangers, 0);
        let failed = at(990) + PAUSE_MAX.mul_f64(1.25);
        assert_eq!(reach.next(0, |_| None, failed - at(1)), []);
        assert_eq!(reach.next(0, |_| None, failed), [node(2)]);
    }

    #[test]
    fn attempts_are_bounded_and_neighbours_go_first() {
        let mut reach = Reach::new(1);
        (0..100).for_each(|index| reach.vouch(node(index)));
        let standing = |id: &NodeId| match u16::from_be_bytes([id.0[0], id.0[1]]) {
            7 => Some(Standing::Neighbour),
            index if index < 50 => Some(Standing::Member),
            90.. => Some(Standing::Connected),
            _ => None,
        };
        let first = reach.next(LINKS_WANTED - 3, standing, at(0));
        assert_eq!(first[0], node(7));
        let class = |range: std::ops::Range<u16>| {
            first.iter().filter(|id| range.contains(&u16::from_be_bytes([id.0[0], id.0[1]]))).count()
        };
        assert_eq!((class(0..50), class(50..90), class(90..100)), (3, ATTEMPTS_UNHEARD_MAX, 0), "{first:?}");
        assert!(first.len() <= ATTEMPTS_MAX);
        assert_eq!(reach.next(LINKS_WANTED, standing, at(0)), []);
        for id in &first {
            reach.ended(*id, true, 0.0, at(0));
        }
        let enough = reach.next(LINKS_WANTED, standing, at(0));
        assert_eq!(enough.len(), ATTEMPTS_UNHEARD_MAX, "only the missing are looked for: {enough:?}");
        let others = Reach { salt: 2, ..reach }.next(0, standing, at(100));
        assert_ne!(others[1..4], first[1..4], "each node has others first");
    }

    #[test]
    fn connections_that_are_not_needed_are_given_up_by_who_opened_them() {
        let link =
            |index: u16, unused: u64| Kept { node: node(index), own: true, neighbour: false, unused: at(unused) };
        let few: Vec<Kept> = (0..LINKS_WANTED as u16).map(|index| link(index, 1000)).collect();
        assert_eq!(surplus(&few), [], "so many are wanted");
        let foreign = few.iter().map(|kept| Kept { own: false, ..*kept });
        let all: Vec<Kept> = foreign.chain([link(100, 119), link(101, 120), link(102, 0)]).collect();
        assert_eq!(surplus(&all), [node(101)]);
        let neighbours = few.iter().map(|kept| Kept { neighbour: true, ..*kept });
        let used = (0..LINKS_USED_MAX as u16 + 2).map(|index| link(200 + index, 60 - u64::from(index)));
        let all: Vec<Kept> = neighbours.chain(used).collect();
        assert_eq!(surplus(&all), [node(200), node(201)], "the least recently used ones");
    }
}
