//! What the engine remembers of sequences it has computed: many prefixes, in a radix tree over tokens.
//!
//! A node's edge holds a run of tokens. With it comes a [`Segment`], what layers keep of each of these tokens, which can be
//! cut at any token; and perhaps a *point*, a snapshot at the edge's end of what cannot be cut: windows, states of
//! recurrences and convolutions. A model that has such layers can be resumed only where a point is, any other model
//! anywhere.
//!
//! Files may take what memory has no room for, and keep it beyond a restart (`spill`, `disk`). A node whose payloads are
//! only in a file is *cold*; a lookup that needs it loads it.
//!
//! No array is known here and no model. Time is counted in uses, with files in microseconds as well. The thread that owns
//! the model owns the store.

mod disk;
#[cfg(test)]
mod disk_tests;
#[cfg(test)]
mod fakes;
mod file;
#[cfg(test)]
mod folder_tests;
mod lru;
mod payload;
mod restore;
mod spill;
#[cfg(test)]
mod tests;
mod tree;

pub use disk::DiskSettings;
pub use payload::{NamedTensor, Payload, Segment};
pub use tree::{Inserted, Limits};

use disk::Disk;
use lru::{Room, Victim, Victims};
use tree::Tree;

/// Prefixes with what a model keeps of them.
pub struct PrefixStore<S, P> {
    tree: Tree<S, P>,
    disk: Option<Disk>,
    /// When what found no room on the disk was used last: nothing older finds any.
    disk_full_at: u64,
}

/// What is known of a prompt.
pub struct Hit<'a, S, P> {
    /// How many tokens can be taken over.
    pub tokens: usize,
    /// Their segments in order, each with how many of its tokens belong to them: all but for the last.
    pub segments: Vec<(&'a S, usize)>,
    /// The snapshot after them, if the model needs one and `tokens` is not 0.
    pub point: Option<&'a P>,
}

/// What an eviction did.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Evicted {
    /// Segments that left memory, each with its point if it had one; whether or not a file has them.
    pub segments: usize,
    /// Points that left memory alone.
    pub points: usize,
    /// How much less the store occupies.
    pub bytes: u64,
}

impl<S: Segment, P: Payload> PrefixStore<S, P> {
    /// An empty store. `needs_points` says whether the model can be resumed only at points; if not, none are kept.
    pub fn new(needs_points: bool, limits: Limits) -> Self {
        Self { tree: Tree::new(needs_points, limits), disk: None, disk_full_at: 0 }
    }

    /// What the store occupies: payloads, tokens and nodes.
    pub fn bytes(&self) -> u64 {
        self.tree.bytes()
    }

    /// How many nodes there are.
    #[cfg(test)]
    pub fn nodes(&self) -> usize {
        self.tree.len()
    }

    /// How much of a prompt [`lookup`](Self::lookup) would find, if the files are what they seem. This is no use of it.
    pub fn known(&self, prompt: &[u32]) -> usize {
        let path = self.tree.resumable(before_last(prompt));
        path.iter().map(|(_, used)| used).sum()
    }

    /// How many tokens of `tokens` have their segments in memory, whether or not a sequence can be resumed there. What
    /// [`insert`](Self::insert) is given beyond these is new.
    pub fn held(&self, tokens: &[u32]) -> usize {
        self.tree.held(tokens)
    }

    /// Finds the longest prefix that a prompt can be resumed from: never all of it, because the last token's step gives
    /// the first logits.
    pub fn lookup(&mut self, prompt: &[u32]) -> Hit<'_, S, P> {
        let path = loop {
            let path = self.tree.resumable(before_last(prompt));
            // Each failure shortens what is known.
            if self.load(&path) {
                break path;
            }
        };
        self.touch(&path);
        let tree = &self.tree;
        let segments = path.iter().filter_map(|&(id, used)| Some((tree.node(id).segment.as_ref()?, used))).collect();
        let point = path.last().and_then(|(id, _)| tree.node(*id).point.as_ref());
        Hit { tokens: path.iter().map(|(_, used)| used).sum(), segments, point }
    }

    /// Remembers `tokens`. `segment` is what is kept of those from `from` on; what is held already of them is cut off. A
    /// `point` is the snapshot after the last of them. On an error the segment is lost, and nothing else.
    pub fn insert(&mut self, tokens: &[u32], from: usize, segment: S, point: Option<P>) -> Result<Inserted, S::Error> {
        self.make_room();
        self.keep_time();
        self.tree.insert(tokens, from, segment, point)
    }

    /// Forgets the point after exactly these tokens, if there is one: that of a chunk's end, once a later one is there.
    pub fn drop_point(&mut self, tokens: &[u32]) -> bool {
        self.tree.drop_point(tokens)
    }

    /// Has these tokens, and the point after them, evicted last. Half of the budget can be pinned; beyond that the oldest
    /// pins are released, or the new one if it is too long itself. Answers whether the tokens are pinned now, which they
    /// are not either if they are not known.
    pub fn pin(&mut self, tokens: &[u32]) -> Result<bool, S::Error> {
        self.make_room();
        self.tree.pin(tokens)
    }

    /// Evicts what was not used for longest until the store occupies `bytes_max` at most. With files, it is written if it
    /// is not yet.
    pub fn evict(&mut self, bytes_max: u64) -> Evicted {
        self.tree.limit_pins();
        let before = self.tree.bytes();
        let mut evicted = Evicted::default();
        if before <= bytes_max {
            return evicted;
        }
        let mut victims = Victims::new(&self.tree, Room::Memory);
        while self.tree.bytes() > bytes_max {
            match victims.next(&self.tree) {
                Some(Victim::Point(id)) => {
                    self.save(id);
                    self.tree.change(id, |node| node.point = None);
                    evicted.points += 1;
                }
                Some(Victim::Leaf(id)) => {
                    let parent = self.tree.node(id).parent;
                    if self.save(id) {
                        self.tree.change(id, |node| (node.segment, node.point) = (None, None));
                    } else {
                        self.tree.remove(id);
                    }
                    victims.offer(&self.tree, parent);
                    evicted.segments += 1;
                }
                // What is left is cold. The files stay; only a restart finds them again.
                None => {
                    self.thin(usize::MAX, bytes_max);
                    break;
                }
            }
        }
        evicted.bytes = before - self.tree.bytes();
        evicted
    }

    /// Makes sure that two more nodes may be added.
    fn make_room(&mut self) {
        let max = self.tree.limits.nodes_max;
        if self.tree.len() + 2 <= max {
            return;
        }
        // More than is needed at once, so that the nodes are not sorted at each insertion.
        let enough = max - (max / 16).max(2).min(max);
        self.thin(enough, u64::MAX);
    }

    /// Removes nodes, those not used for longest first, until there are no more than these, of no more weight.
    fn thin(&mut self, nodes_max: usize, bytes_max: u64) {
        let mut victims = Victims::new(&self.tree, Room::Nodes);
        while self.tree.len() > nodes_max || self.tree.bytes() > bytes_max {
            let Some(Victim::Leaf(id) | Victim::Point(id)) = victims.next(&self.tree) else { break };
            let parent = self.tree.node(id).parent;
            self.tree.remove(id);
            victims.offer(&self.tree, parent);
        }
    }
}

fn before_last(prompt: &[u32]) -> &[u32] {
    prompt.split_last().map_or(prompt, |(_, rest)| rest)
}
