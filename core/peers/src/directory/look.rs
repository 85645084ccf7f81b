//! What may be asked of a directory.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use mesh_core::node::{ModelOffer, NodeOffer, RemoteModel};
use serde::Serialize;

use super::{Directory, Member};
use crate::{NodeId, policy::Candidate};

/// A node, as a table of nodes shows it.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct NodeRow {
    /// Who.
    pub id: NodeId,
    /// What it is called; with its short id where others are called the same.
    pub name: String,
    /// What it offers.
    pub offers: Vec<Arc<ModelOffer>>,
    /// Time since it was last heard.
    pub age: Duration,
    /// Whether there is a connection.
    pub connected: bool,
    /// Whether it may be routed to.
    pub routable: bool,
    /// How long a message goes there and back, if that is known.
    pub round_trip: Option<Duration>,
    /// What is left of its lease.
    pub lease_left: Duration,
}

impl Directory {
    /// How many others are known.
    pub fn len(&self) -> usize {
        self.members.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.members.is_empty()
    }

    /// Whether the node is known, and may be routed to.
    pub fn is_routable(&self, node: &NodeId, now: Duration) -> bool {
        self.members.get(node).is_some_and(|member| member.routable(now))
    }

    /// Whether the node was revoked.
    pub fn is_revoked(&self, node: &NodeId) -> bool {
        self.revoked.contains(node)
    }

    /// The latest incarnation and sequence heard of a node.
    pub fn latest(&self, node: &NodeId) -> Option<(u64, u64)> {
        self.members.get(node).map(|member| (member.advert.incarnation, member.advert.sequence))
    }

    /// Who may be asked for a model, by its name or by `name@node`, where the node is its name or its id, short or not.
    pub fn offers(&self, model: &str, now: Duration) -> Vec<Candidate> {
        let everybody = self.members.iter();
        let found: Vec<_> = everybody.filter_map(|(id, member)| candidate(id, member, model, now)).collect();
        // A model whose own name has an @ comes first.
        if !found.is_empty() {
            return found;
        }
        let addressed = model.rsplit_once('@').and_then(|(model, node)| {
            let (id, member) = self.members.get_key_value(&self.named(node)?)?;
            candidate(id, member, model, now)
        });
        addressed.into_iter().collect()
    }

    /// What those are called that offer a model, by its name or by `name@node`, and are lost, and what they offer: before their
    /// leases are over they may well come back.
    pub fn lost_offers(&self, model: &str, now: Duration) -> Vec<(String, Arc<ModelOffer>)> {
        let lost = |member: &Member, model: &str| {
            let offer = member.offers().iter().find(|offer| offer.name == model)?;
            (member.lost && now < member.expires).then(|| (member.advert.name.clone(), offer.clone()))
        };
        let found: Vec<_> = self.members.values().filter_map(|member| lost(member, model)).collect();
        if !found.is_empty() {
            return found;
        }
        let addressed = model.rsplit_once('@').and_then(|(model, node)| {
            let member = self.members.get(&self.named(node)?)?;
            lost(member, model)
        });
        addressed.into_iter().collect()
    }

    /// The one node of that name or id, full or short, or as [`nodes`](Self::nodes) calls it.
    pub fn named(&self, text: &str) -> Option<NodeId> {
        if let Ok(id) = text.parse() {
            return self.members.contains_key(&id).then_some(id);
        }
        let mut found = self.members.iter().filter(|(id, member)| {
            let (name, short) = (&member.advert.name, id.short());
            let both = || text.strip_suffix(&short).and_then(|rest| rest.strip_suffix('-')) == Some(name);
            name == text || short == text || both()
        });
        let (id, _) = found.next()?;
        found.next().is_none().then_some(*id)
    }

    /// What each member is called: its name, with its short id where others have the same.
    fn names(&self) -> BTreeMap<NodeId, String> {
        let mut count: BTreeMap<&str, usize> = BTreeMap::new();
        for member in self.members.values() {
            *count.entry(&member.advert.name).or_default() += 1;
        }
        let named = self.members.iter().map(|(id, member)| {
            let name = &member.advert.name;
            let alone = count.get(name.as_str()) == Some(&1);
            (*id, if alone { name.clone() } else { format!("{name}-{}", id.short()) })
        });
        named.collect()
    }

    /// The models that may be asked for, by name, each with those who offer it.
    pub fn models(&self, now: Duration) -> Vec<RemoteModel> {
        let names = self.names();
        let mut models: BTreeMap<&str, Vec<NodeOffer>> = BTreeMap::new();
        for (id, member) in self.members.iter().filter(|(_, member)| member.routable(now)) {
            for offer in member.offers() {
                let offered = NodeOffer { node: names[id].clone(), offer: ModelOffer::clone(offer) };
                models.entry(&offer.name).or_default().push(offered);
            }
        }
        models.into_iter().map(|(name, nodes)| RemoteModel { name: name.to_owned(), nodes }).collect()
    }

    /// All nodes whose leases hold, by id.
    pub fn nodes(&self, now: Duration) -> Vec<NodeRow> {
        let names = self.names();
        let held = self.members.iter().filter(|(_, member)| now < member.expires);
        let rows = held.map(|(id, member)| NodeRow {
            id: *id,
            name: names[id].clone(),
            offers: member.offers().to_vec(),
            age: now.saturating_sub(member.heard),
            connected: member.due.is_some(),
            routable: member.routable(now),
            round_trip: member.round_trip,
            lease_left: member.expires.saturating_sub(now),
        });
        rows.collect()
    }
}

fn candidate(id: &NodeId, member: &Member, model: &str, now: Duration) -> Option<Candidate> {
    let offer = member.offers().iter().find(|offer| offer.name == model)?;
    member.routable(now).then(|| Candidate {
        node: *id,
        name: member.advert.name.clone(),
        offer: offer.clone(),
        round_trip: member.round_trip,
        silent: now.saturating_sub(member.heard),
        overdue: member.due.map_or(Duration::ZERO, |due| now.saturating_sub(due.at)),
        connected: member.due.is_some(),
        cached_tokens: 0,
    })
}
