//! What was done for whom, for tables and metrics. One line a node, and as many nodes as there are members.

use std::{
    collections::BTreeMap,
    sync::{Mutex, PoisonError},
};

use iroh::EndpointId;
use serde::Serialize;

/// Nodes that are counted.
const NODES_MAX: usize = 4096;

/// What passed between this node and another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Count {
    /// Requests that it was sent.
    pub sent: u64,
    /// Of those, how many it did not answer whole.
    pub failed: u64,
    /// Requests that it was sent because another had failed.
    pub failed_over: u64,
    /// Its requests that were answered here.
    pub served: u64,
}

/// All of them.
#[derive(Debug, Default)]
pub struct Counts(Mutex<BTreeMap<EndpointId, Count>>);

impl Counts {
    /// Counts something.
    pub fn add(&self, node: EndpointId, what: impl FnOnce(&mut Count)) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if counts.len() < NODES_MAX || counts.contains_key(&node) {
            what(counts.entry(node).or_default());
        }
    }

    /// Of one node.
    pub fn of(&self, node: &EndpointId) -> Count {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(node).copied().unwrap_or_default()
    }
}
