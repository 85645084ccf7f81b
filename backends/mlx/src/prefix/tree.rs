//! The radix tree: runs of tokens on edges, what is kept of them at the nodes.
//!
//! Invariants, which `Tree::check` verifies in tests:
//! - No run is empty but the root's, and siblings begin with different tokens: a sequence has one path.
//! - A node is *warm* if its segment is in memory, *cold* if only a file has it; it is one of the two. Whatever is above a
//!   warm node is warm. Points in memory are those of warm nodes.
//! - Whoever is used uses all that is above: no node was used before its descendants.
//! - `bytes` is the sum of the nodes' weights at all times, because nothing changes a weight but `alloc`, `free` and
//!   `change`.

use std::{collections::HashMap, sync::Arc};

use super::{
    lru::Pins,
    payload::{Payload, Segment},
};

/// Where a node is in its tree; meaningless once it is removed.
pub(super) type NodeId = usize;

/// The node that every path begins after.
pub(super) const ROOT: NodeId = 0;

/// What a node counts beside its tokens and payloads.
pub(super) const NODE_BYTES: u64 = 256;

/// What bounds a store in memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// What the store should occupy at most. Half of it may be pinned, and nothing that is longer is loaded from files.
    pub bytes_max: u64,
    /// Edges of the tree.
    pub nodes_max: usize,
}

impl Limits {
    /// This many bytes, and more nodes than anybody needs.
    pub fn of_bytes(bytes_max: u64) -> Self {
        Self { bytes_max, nodes_max: 65_536 }
    }
}

/// A file that holds a run of tokens.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct FileRef {
    /// Its name in the model's folder.
    pub name: String,
    /// How many tokens come before its run.
    pub start: usize,
    /// How many its run has.
    pub tokens: usize,
    /// Its length.
    pub bytes: u64,
    /// Whether it has the point at the run's end.
    pub pointed: bool,
}

/// A part of a file's run, from `skip` tokens on.
#[derive(Clone, Debug)]
pub(super) struct Slice {
    pub file: Arc<FileRef>,
    pub skip: usize,
}

pub(super) struct Node<S, P> {
    pub parent: NodeId,
    pub run: Box<[u32]>,
    pub segment: Option<S>,
    pub point: Option<P>,
    pub file: Option<Slice>,
    /// Whether `file` has the point at this node's end.
    pub point_on_disk: bool,
    /// Writing it was tried and makes no sense again.
    pub unwritable: bool,
    pub children: HashMap<u32, NodeId>,
    pub warm_children: usize,
    pub used: u64,
    pub point_used: u64,
    /// How many pinned paths lead through it.
    pub pins: usize,
}

impl<S: Payload, P: Payload> Node<S, P> {
    fn new(parent: NodeId, run: &[u32], used: u64) -> Self {
        Self {
            parent,
            run: run.into(),
            segment: None,
            point: None,
            file: None,
            point_on_disk: false,
            unwritable: false,
            children: HashMap::new(),
            warm_children: 0,
            used,
            point_used: 0,
            pins: 0,
        }
    }

    pub fn has_point(&self) -> bool {
        self.point.is_some() || self.point_on_disk
    }

    /// Whether a file has all that is in memory.
    pub fn is_written(&self) -> bool {
        self.file.is_some() && (self.point.is_none() || self.point_on_disk)
    }

    pub fn point_bytes(&self) -> u64 {
        self.point.as_ref().map_or(0, P::bytes)
    }

    pub fn weight(&self) -> u64 {
        NODE_BYTES + self.run.len() as u64 * 4 + self.segment.as_ref().map_or(0, S::bytes) + self.point_bytes()
    }
}

/// What became of an insertion.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Inserted {
    /// So many tokens were not held before and are now.
    Stored(usize),
    /// All tokens were held already; a point that was given is new or took an old one's place.
    Held,
    /// Nothing was stored: of the tokens before the segment's only so many are held, the rest was evicted.
    Missing(usize),
    /// Nothing was stored: the segment is not for the tokens it was given with.
    Mismatched,
}

/// Nodes from the root down, each with how many tokens of its run are meant: all but for the last.
pub(super) type Path = Vec<(NodeId, usize)>;

pub(super) struct Tree<S, P> {
    nodes: Vec<Option<Node<S, P>>>,
    free: Vec<NodeId>,
    bytes: u64,
    clock: u64,
    pub needs_points: bool,
    pub limits: Limits,
    pub pins: Pins,
}

impl<S: Segment, P: Payload> Tree<S, P> {
    pub fn new(needs_points: bool, limits: Limits) -> Self {
        let root = Node::new(ROOT, &[], 0);
        Self {
            nodes: vec![Some(root)],
            free: Vec::new(),
            bytes: 0,
            clock: 0,
            needs_points,
            limits,
            pins: Pins::default(),
        }
    }

    /// What all nodes but the root weigh.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// How many nodes there are beside the root.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len() - 1
    }

    pub fn get(&self, id: NodeId) -> Option<&Node<S, P>> {
        self.nodes.get(id)?.as_ref()
    }

    pub fn node(&self, id: NodeId) -> &Node<S, P> {
        self.get(id).expect("ids of removed nodes are not kept")
    }

    pub fn node_mut(&mut self, id: NodeId) -> &mut Node<S, P> {
        self.nodes[id].as_mut().expect("ids of removed nodes are not kept")
    }

    /// All nodes but the root, in no order.
    pub fn iter(&self) -> impl Iterator<Item = (NodeId, &Node<S, P>)> {
        self.nodes.iter().enumerate().skip(1).filter_map(|(id, node)| Some((id, node.as_ref()?)))
    }

    pub fn is_warm(&self, id: NodeId) -> bool {
        id == ROOT || self.node(id).segment.is_some()
    }

    /// Changes what a node weighs.
    pub fn change<T>(&mut self, id: NodeId, change: impl FnOnce(&mut Node<S, P>) -> T) -> T {
        let node = self.nodes[id].as_mut().expect("ids of removed nodes are not kept");
        let (weight, was_warm, parent) = (node.weight(), node.segment.is_some(), node.parent);
        let answer = change(node);
        self.bytes = self.bytes - weight + node.weight();
        let is_warm = node.segment.is_some();
        if was_warm != is_warm {
            let warm = &mut self.node_mut(parent).warm_children;
            *warm = if is_warm { *warm + 1 } else { *warm - 1 };
        }
        answer
    }

    fn alloc(&mut self, node: Node<S, P>) -> NodeId {
        self.bytes += node.weight();
        if let Some(id) = self.free.pop() {
            self.nodes[id] = Some(node);
            return id;
        }
        self.nodes.push(Some(node));
        self.nodes.len() - 1
    }

    /// Nodes that share tokens with `tokens`, below `from`.
    pub fn walk(&self, from: NodeId, tokens: &[u32]) -> Path {
        let (mut path, mut at, mut rest) = (Path::new(), from, tokens);
        while let Some(&id) = rest.first().and_then(|first| self.node(at).children.get(first)) {
            let run = &self.node(id).run;
            let common = run.iter().zip(rest).take_while(|(a, b)| a == b).count();
            path.push((id, common));
            if common < run.len() {
                break;
            }
            (at, rest) = (id, &rest[common..]);
        }
        path
    }

    /// The part of `tokens`' path that a sequence can be resumed from.
    pub fn resumable(&self, tokens: &[u32]) -> Path {
        let mut path = self.walk(ROOT, tokens);
        let (mut bytes, mut last) = (0, None);
        let mut fits = |&(id, _): &(NodeId, usize)| {
            let node = self.node(id);
            let cold = node.file.as_ref().filter(|_| node.segment.is_none()).map(|slice| &slice.file);
            // A file is loaded once for all of its parts.
            bytes += match cold {
                Some(file) if last == Some(file) => 0,
                Some(file) => file.bytes,
                None => node.weight(),
            };
            last = cold;
            cold.is_none() || bytes <= self.limits.bytes_max
        };
        path.truncate(path.iter().take_while(|step| fits(step)).count());
        if self.needs_points {
            let ends = |&(id, used): &(NodeId, usize)| {
                let node = self.node(id);
                node.has_point() && used == node.run.len()
            };
            path.truncate(path.iter().rposition(ends).map_or(0, |last| last + 1));
        }
        path
    }

    /// How many tokens of `tokens` are in memory from the first on.
    pub fn held(&self, tokens: &[u32]) -> usize {
        let path = self.walk(ROOT, tokens);
        path.iter().take_while(|(id, _)| self.is_warm(*id)).map(|(_, used)| used).sum()
    }

    /// The next point in time.
    pub fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Makes it that late at least.
    pub fn advance(&mut self, now: u64) {
        self.clock = self.clock.max(now);
    }

    /// Says that a path was used now, and the point at its end with it.
    pub fn touch(&mut self, path: &Path) {
        let now = self.tick();
        for &(id, _) in path {
            self.node_mut(id).used = now;
        }
        if let Some(&(id, _)) = path.last() {
            self.node_mut(id).point_used = now;
        }
    }

    /// Cuts a run in two and answers the node of the first part; the second keeps the id. A run's end is no place to cut.
    pub fn split(&mut self, id: NodeId, at: usize) -> Result<NodeId, S::Error> {
        let node = self.node(id);
        let parts = node.segment.as_ref().map(|segment| segment.split(at)).transpose()?;
        let (first, second) = parts.map_or((None, None), |(first, second)| (Some(first), Some(second)));
        let is_warm = first.is_some();
        let (parent, pins, file) = (node.parent, node.pins, node.file.clone());
        let (head, tail): (Box<[u32]>, Box<[u32]>) = (node.run[..at].into(), node.run[at..].into());
        let later = file.clone().map(|slice| Slice { skip: slice.skip + at, ..slice });
        let mut front = Node::new(parent, &head, node.used);
        (front.segment, front.file, front.pins, front.unwritable) = (first, file, pins, node.unwritable);
        front.warm_children = usize::from(is_warm);
        front.children.insert(tail[0], id);
        let front = self.alloc(front);
        self.node_mut(parent).children.insert(head[0], front);
        self.change(id, |node| (node.run, node.segment, node.file) = (tail, second, later));
        self.node_mut(id).parent = front;
        Ok(front)
    }

    /// Makes the path end where a node ends.
    pub fn cut(&mut self, path: &mut Path) -> Result<(), S::Error> {
        if let Some(last) =
            path.last_mut().filter(|(id, used)| *used < self.nodes[*id].as_ref().map_or(0, |n| n.run.len()))
        {
            last.0 = self.split(last.0, last.1)?;
        }
        Ok(())
    }

    /// A new node without payloads, which the caller gives it.
    pub fn add(&mut self, parent: NodeId, run: &[u32], used: u64) -> NodeId {
        let id = self.alloc(Node::new(parent, run, used));
        self.node_mut(parent).children.insert(run[0], id);
        id
    }

    /// See [`PrefixStore::insert`](super::PrefixStore::insert).
    pub fn insert(&mut self, tokens: &[u32], from: usize, segment: S, point: Option<P>) -> Result<Inserted, S::Error> {
        if from > tokens.len() || segment.tokens() != tokens.len() - from {
            return Ok(Inserted::Mismatched);
        }
        let held = self.held(tokens);
        if held < from {
            return Ok(Inserted::Missing(held));
        }
        let point = point.filter(|_| self.needs_points && !tokens.is_empty());
        let mut rest = Rest(Some(segment).filter(|_| held < tokens.len()));
        rest.take(held - from)?;
        let mut path = self.walk(ROOT, tokens);
        if held < tokens.len() || point.is_some() {
            self.cut(&mut path)?;
        }
        // What is cold from here on has come back, with what the caller computed anew.
        for &(id, tokens) in &path {
            if !self.is_warm(id) {
                let part = rest.take(tokens)?;
                self.change(id, |node| node.segment = part);
            }
        }
        if let Some(segment) = rest.0 {
            let parent = path.last().map_or(ROOT, |(id, _)| *id);
            let run = &tokens[tokens.len() - segment.tokens()..];
            let id = self.add(parent, run, 0);
            self.change(id, |node| node.segment = Some(segment));
            path.push((id, run.len()));
        }
        self.touch(&path);
        if let (Some(point), Some(&(id, _))) = (point, path.last()) {
            self.change(id, |node| node.point = Some(point));
        }
        self.limit_pins();
        Ok(if held < tokens.len() { Inserted::Stored(tokens.len() - held) } else { Inserted::Held })
    }

    /// Forgets the point after exactly these tokens; answers whether there was one.
    pub fn drop_point(&mut self, tokens: &[u32]) -> bool {
        let path = self.walk(ROOT, tokens);
        let Some(&(id, used)) = path.last() else { return false };
        let node = self.node(id);
        let reached: usize = path.iter().map(|(_, used)| used).sum();
        if reached < tokens.len() || used < node.run.len() || !node.has_point() {
            return false;
        }
        self.change(id, |node| (node.point, node.point_on_disk) = (None, false));
        true
    }

    /// Removes a node and all that is below it.
    pub fn remove(&mut self, id: NodeId) {
        let mut doomed = vec![id];
        let mut next = 0;
        while let Some(&id) = doomed.get(next) {
            doomed.extend(self.node(id).children.values());
            next += 1;
        }
        for id in doomed.into_iter().rev() {
            self.shorten_pin(id);
            self.change(id, |node| (node.segment, node.point) = (None, None));
            let Some(node) = self.nodes[id].take() else { continue };
            self.bytes -= node.weight();
            self.node_mut(node.parent).children.remove(&node.run[0]);
            self.free.push(id);
        }
    }

    /// Removes the cold nodes of these files, and what is below them; makes the warm ones unwritten.
    pub fn forget_files(&mut self, names: &[String]) {
        if names.is_empty() {
            return;
        }
        let is_of = |node: &Node<S, P>| node.file.as_ref().is_some_and(|slice| names.contains(&slice.file.name));
        let concerned: Vec<NodeId> = self.iter().filter(|(_, node)| is_of(node)).map(|(id, _)| id).collect();
        for id in concerned {
            if self.get(id).is_none() {
                continue;
            }
            if self.is_warm(id) {
                let node = self.node_mut(id);
                (node.file, node.point_on_disk) = (None, false);
            } else {
                self.remove(id);
            }
        }
    }

    /// The node to be written next: one used last of those whose ancestors are all written. Older ones than `after`
    /// don't count.
    pub fn unwritten(&self, after: u64) -> Option<NodeId> {
        let mut best = None;
        let mut at = vec![ROOT];
        while let Some(id) = at.pop() {
            let node = self.node(id);
            if id == ROOT || node.is_written() {
                at.extend(node.children.values().filter(|child| self.node(**child).used > after));
            } else if !node.unwritable {
                best = best.max(Some((node.used, id)));
            }
        }
        best.map(|(_, id)| id)
    }

    /// The node to be brought back to memory next: one used last of the cold ones right below warm ones.
    pub fn thawing(&self) -> Option<NodeId> {
        let cold = self.iter().filter(|(id, node)| !self.is_warm(*id) && self.is_warm(node.parent));
        cold.max_by_key(|(id, node)| (node.used, *id)).map(|(id, _)| id)
    }

    /// All tokens up to a node's end.
    pub fn tokens_to(&self, id: NodeId) -> Vec<u32> {
        let mut runs = Vec::new();
        let mut at = id;
        while at != ROOT {
            runs.push(&self.node(at).run);
            at = self.node(at).parent;
        }
        runs.into_iter().rev().flatten().copied().collect()
    }
}

/// What is left of a segment while it is handed out from the front.
pub(super) struct Rest<S>(pub Option<S>);

impl<S: Segment> Rest<S> {
    /// The first `tokens` tokens; nothing if none are asked for.
    pub fn take(&mut self, tokens: usize) -> Result<Option<S>, S::Error> {
        match self.0.take() {
            whole if tokens == 0 => {
                self.0 = whole;
                Ok(None)
            }
            Some(whole) if tokens < whole.tokens() => {
                let (first, rest) = whole.split(tokens)?;
                self.0 = Some(rest);
                Ok(Some(first))
            }
            whole => Ok(whole),
        }
    }
}

#[cfg(test)]
impl<S: Segment, P: Payload> Tree<S, P> {
    /// Verifies what this file and `lru` promise.
    pub fn check(&self) {
        let mut bytes = 0;
        for (id, node) in self.iter() {
            bytes += node.weight();
            let parent = self.node(node.parent);
            assert!(!node.run.is_empty() && parent.children.get(&node.run[0]) == Some(&id));
            assert!(node.segment.as_ref().is_none_or(|segment| segment.tokens() == node.run.len()));
            assert!(node.segment.is_some() || (node.file.is_some() && node.point.is_none()));
            assert!(node.segment.is_none() || self.is_warm(node.parent));
            assert!(node.parent == ROOT || (parent.used >= node.used && parent.pins >= node.pins));
            assert!(node.used <= self.clock && self.len() <= self.limits.nodes_max);
        }
        for (id, node) in self.nodes.iter().enumerate().filter_map(|(id, node)| Some((id, node.as_ref()?))) {
            assert!(node.children.values().all(|child| self.node(*child).parent == id));
            assert_eq!(node.warm_children, node.children.values().filter(|child| self.is_warm(**child)).count());
        }
        assert_eq!(bytes, self.bytes);
        self.check_pins();
    }
}
