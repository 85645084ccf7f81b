//! Who a node hears, and who it is connected to: what is decided in `mesh-peers` is done to its state here.

use std::{collections::BTreeSet, sync::Arc, time::Duration};

use iroh::EndpointId;
use mesh_peers::{
    NodeId, Standing,
    advert::Loss,
    reach::{Kept, surplus},
};

use crate::{
    adverts::Gossiped,
    link::Parting,
    node::{Node, State, Turn, endpoint_id, node_id},
};

/// A node that was not given time to listen for so long does not blame others for it.
const STALLED_MIN: Duration = Duration::from_millis(100);

impl Node {
    /// Somebody who is a member, as far as anybody knows.
    pub fn vouch(&self, id: EndpointId) {
        let mut state = self.state();
        if id != self.id && !state.judge.is_revoked(&id) {
            state.reach.vouch(node_id(id));
        }
    }

    /// Somebody who may be a member was seen.
    pub fn see(&self, id: EndpointId) {
        let (mut state, now) = (self.state(), self.now());
        if id != self.id && !state.judge.is_revoked(&id) {
            state.reach.announced(node_id(id), now);
        }
    }

    /// Gossip goes through a node, or does not any more. How many it goes through now.
    pub fn neighbour(&self, id: EndpointId, is: bool) -> usize {
        let mut state = self.state();
        if is {
            state.neighbours.insert(id);
        } else {
            state.neighbours.remove(&id);
        }
        state.neighbours.len()
    }

    /// Gossip goes through nobody.
    pub fn alone(&self) {
        self.state().neighbours.clear();
    }

    /// Forgets whose lease is over, and takes those for lost whose pulses do not come. This node itself stood still for
    /// `stalled`.
    pub fn listen(&self, stalled: Duration) {
        let now = self.now();
        let (expired, losses) = {
            let mut state = self.state();
            if stalled > STALLED_MIN {
                state.directory.stood_still(stalled);
            }
            let expired = state.directory.expire(now);
            for node in &expired {
                state.affinity.forget(*node);
                if let Some(id) = endpoint_id(*node) {
                    state.shown.remove(&id);
                }
            }
            let quiet = state.directory.quiet(now);
            let losses: Vec<Loss> = quiet.into_iter().filter_map(|node| state.directory.lost(node, now)).collect();
            // The connection stays a while: one that only stood still goes on with its answers. QUIC would end it, too, and
            // waits longer for a slow path.
            let lost = |id: &EndpointId| {
                let node = node_id(*id);
                state.directory.latest(&node).is_some() && !state.directory.is_routable(&node, now)
            };
            let silent = state.links.iter().filter(|(id, link)| link.is_silent() && lost(id));
            silent.for_each(|(_, link)| Parting::Silent.close(&link.connection));
            (expired, losses)
        };
        for loss in &losses {
            tracing::debug!(node = %loss.node.short(), "not heard any more");
            self.news.try_send(Gossiped::Loss(*loss)).ok();
        }
        if !expired.is_empty() || !losses.is_empty() {
            self.changed();
        }
    }

    /// Nodes to be connected to now. Whoever asks has to say how it went.
    pub fn to_dial(&self) -> Vec<EndpointId> {
        let now = self.now();
        let mut state = self.state();
        let State { reach, directory, links, neighbours, .. } = &mut *state;
        let linked: BTreeSet<NodeId> = links.keys().map(|id| node_id(*id)).collect();
        let neighbours: BTreeSet<NodeId> = neighbours.iter().map(|id| node_id(*id)).collect();
        let standing = |id: &NodeId| match () {
            () if linked.contains(id) => Some(Standing::Connected),
            () if neighbours.contains(id) => Some(Standing::Neighbour),
            () if directory.is_routable(id, now) => Some(Standing::Member),
            () => None,
        };
        let next = reach.next(links.len(), standing, now);
        let (known, unknown): (Vec<_>, Vec<_>) =
            next.into_iter().map(|id| (id, endpoint_id(id))).partition(|(_, id)| id.is_some());
        unknown.into_iter().for_each(|(id, _)| reach.forget(id));
        known.into_iter().filter_map(|(_, id)| id).collect()
    }

    /// How an attempt went.
    pub fn dialled(&self, id: EndpointId, reached: bool) {
        let now = self.now();
        self.state().reach.ended(node_id(id), reached, rand::random(), now);
    }

    /// What is held by who connects to a node: one at a time does.
    pub fn turn(&self, id: EndpointId) -> Arc<Turn> {
        let mut state = self.state();
        state.turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        state.turns.entry(id).or_default().clone()
    }

    /// Gives up connections that nobody needs any more.
    pub fn give_up(&self) {
        let mut state = self.state();
        let kept: Vec<Kept> = state
            .links
            .iter()
            .map(|(id, link)| Kept {
                node: node_id(*id),
                own: link.dialler == self.id,
                neighbour: state.neighbours.contains(id),
                unused: link.unused(),
            })
            .collect();
        for node in surplus(&kept) {
            if let Some(link) = endpoint_id(node).and_then(|id| state.links.remove(&id)) {
                state.directory.closed(node);
                Parting::Unneeded.close(&link.connection);
            }
        }
    }
}
