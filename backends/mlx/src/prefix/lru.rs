//! What goes first: leaves and points by when they were last used, what is pinned at the end.
//!
//! A leaf goes as a whole. Within the tree a point goes alone, when it is older than every leaf. What is *last* is decided
//! by pins: paths that conversations begin with. A pin covers its path and the point at its end, no other points.

use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
};

use super::{
    payload::{Payload, Segment},
    tree::{NodeId, ROOT, Tree},
};

/// Pinned paths.
pub(super) const PINS_MAX: usize = 64;

/// The ends of the pinned paths, oldest first.
#[derive(Default)]
pub(super) struct Pins(VecDeque<NodeId>);

/// Something to be evicted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Victim {
    /// The point of a node that has others below it.
    Point(NodeId),
    /// A node that has none.
    Leaf(NodeId),
}

/// What a victim makes room in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Room {
    /// Memory: warm nodes and points, whose cold remains may stay.
    Memory,
    /// The tree itself: nodes, warm or cold.
    Nodes,
}

/// Victims in order. Nothing may be used or inserted while they are taken.
pub(super) struct Victims {
    room: Room,
    heap: BinaryHeap<Reverse<(bool, u64, Victim)>>,
}

impl Victims {
    pub fn new<S: Segment, P: Payload>(tree: &Tree<S, P>, room: Room) -> Self {
        let mut victims = Self { room, heap: BinaryHeap::new() };
        for (id, node) in tree.iter() {
            victims.offer(tree, id);
            if room == Room::Memory && node.point.is_some() && node.warm_children > 0 {
                victims.heap.push(Reverse((tree.is_pin(id), node.point_used, Victim::Point(id))));
            }
        }
        victims
    }

    /// Adds a node if it is a leaf, as a parent becomes one whose last child went.
    pub fn offer<S: Segment, P: Payload>(&mut self, tree: &Tree<S, P>, id: NodeId) {
        let Some(node) = tree.get(id).filter(|_| id != ROOT) else { return };
        let is_leaf = match self.room {
            Room::Memory => node.segment.is_some() && node.warm_children == 0,
            Room::Nodes => node.children.is_empty(),
        };
        if is_leaf {
            self.heap.push(Reverse((node.pins > 0, node.used, Victim::Leaf(id))));
        }
    }

    pub fn next<S: Segment, P: Payload>(&mut self, tree: &Tree<S, P>) -> Option<Victim> {
        while let Some(Reverse((_, _, victim))) = self.heap.pop() {
            match victim {
                // It has become a leaf, which is in the heap too.
                Victim::Point(id) if tree.get(id).is_none_or(|node| node.warm_children == 0) => {}
                Victim::Leaf(id) if tree.get(id).is_none() => {}
                _ => return Some(victim),
            }
        }
        None
    }
}

impl<S: Segment, P: Payload> Tree<S, P> {
    /// Pins these tokens if all are known, and releases the oldest pins while those together hold more than half of the
    /// budget; answers whether this one is pinned.
    pub fn pin(&mut self, tokens: &[u32]) -> Result<bool, S::Error> {
        let mut path = self.walk(ROOT, tokens);
        if path.iter().map(|(_, used)| used).sum::<usize>() < tokens.len() {
            return Ok(false);
        }
        self.cut(&mut path)?;
        let Some(&(end, _)) = path.last() else { return Ok(false) };
        if let Some(index) = self.pins.0.iter().position(|pin| *pin == end) {
            self.pins.0.remove(index);
        } else {
            self.count_pin(end, |pins| pins + 1);
        }
        self.pins.0.push_back(end);
        self.limit_pins();
        Ok(self.is_pin(end))
    }

    /// Whether a pinned path ends here.
    pub fn is_pin(&self, id: NodeId) -> bool {
        self.pins.0.contains(&id)
    }

    /// Releases pins, the oldest first, until they hold no more than half of the budget.
    pub fn limit_pins(&mut self) {
        while self.pins.0.len() > PINS_MAX || self.pinned_bytes() > self.limits.bytes_max / 2 {
            let Some(oldest) = self.pins.0.pop_front() else { break };
            self.count_pin(oldest, |pins| pins - 1);
        }
    }

    /// Has a pin that ends at this node, which is about to go, end at its parent.
    pub fn shorten_pin(&mut self, id: NodeId) {
        let Some(index) = self.pins.0.iter().position(|pin| *pin == id) else { return };
        let parent = self.node(id).parent;
        if parent == ROOT || self.is_pin(parent) {
            self.pins.0.remove(index);
            self.count_pin(id, |pins| pins - 1);
        } else {
            self.pins.0[index] = parent;
        }
    }

    /// What pinned paths weigh together.
    pub fn pinned_bytes(&self) -> u64 {
        if self.pins.0.is_empty() {
            return 0;
        }
        let pinned = self.iter().filter(|(_, node)| node.pins > 0);
        pinned
            .map(|(id, node)| {
                let other_point = if self.is_pin(id) { 0 } else { node.point_bytes() };
                node.weight() - other_point
            })
            .sum()
    }

    fn count_pin(&mut self, end: NodeId, count: impl Fn(usize) -> usize) {
        let mut at = end;
        while at != ROOT {
            let node = self.node_mut(at);
            node.pins = count(node.pins);
            at = node.parent;
        }
    }

    #[cfg(test)]
    pub fn check_pins(&self) {
        let through = |node: NodeId| {
            let passes = |end: &&NodeId| {
                let mut at = **end;
                while at != ROOT && at != node {
                    at = self.node(at).parent;
                }
                at == node
            };
            self.pins.0.iter().filter(passes).count()
        };
        assert!(self.iter().all(|(id, node)| node.pins == through(id)));
        assert!(self.pins.0.len() <= PINS_MAX);
    }
}
