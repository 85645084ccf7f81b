//! What a node says of itself: adverts, and pulses between them.

use std::{sync::Arc, time::Duration};

use bytes::Bytes;
use mesh_core::node::Load;
use mesh_peers::{
    advert::{self, Advert, Pulse},
    cadence,
};
use tokio::time::timeout;

use crate::{
    adverts::{ADDRESSES_MAX, Gossiped, Shown, Spoken},
    link::Link,
    node::{Node, millis, node_id},
    trust::Signed,
    wire,
};

/// For so long what is busy is not looked at again: many may be sent pulses.
const LOOKED_MIN: Duration = Duration::from_millis(100);
/// How long a message may take to be handed to a connection, before gossip has to do.
const TELL_MAX: Duration = Duration::from_secs(2);

/// What this node said last of itself.
#[derive(Debug)]
pub struct Own {
    /// As it is passed on.
    pub shown: Shown,
    /// Counts what it said.
    pub sequence: u64,
    /// The models, by place.
    models: Vec<String>,
    /// How busy they were, and when that was looked at.
    loads: Option<(Duration, Loads)>,
}

/// How busy models are, by place.
type Loads = Arc<Vec<(u16, Load)>>;

impl Node {
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
        let models = offers.iter().map(|offer| offer.name.clone()).collect();
        let mut at = self.endpoint.addr();
        at.addrs = at.addrs.into_iter().take(ADDRESSES_MAX).collect();
        let mut state = self.state();
        let sequence = state.own.as_ref().map_or(0, |own| own.sequence) + 1;
        let advert = Advert {
            version: advert::VERSION,
            node: node_id(self.id),
            name: self.name.clone(),
            incarnation: self.incarnation,
            sequence,
            lease_ms: millis(cadence::lease(state.directory.len() + 1)),
            leaving,
            offers: offers.into_iter().map(Arc::new).collect(),
        };
        let shown = Shown {
            node: self.id,
            certificate: self.membership.certificate.clone(),
            spoken: Signed::new(&self.key, &Spoken { advert, at }),
            age_ms: 0,
        };
        state.own = Some(Own { shown: shown.clone(), sequence, models, loads: None });
        shown
    }

    /// Tells those first who are connected.
    pub fn tell(&self, said: &Gossiped) {
        let bytes = said.encode();
        let links: Vec<Link> = self.state().links.values().cloned().collect();
        for link in links {
            let bytes = bytes.clone();
            self.tasks.spawn(async move {
                let told = async {
                    let mut send = link.connection.open_uni().await.ok()?;
                    wire::write_encoded(&mut send, &bytes).await.ok()?;
                    send.finish().ok()
                };
                timeout(TELL_MAX, told).await.ok()
            });
        }
    }

    /// Tells everybody something that is new.
    pub async fn announce(&self, leaving: bool) {
        let said = Gossiped::Advert(Box::new(self.advert(leaving)));
        self.tell(&said);
        self.news.send(said).await.ok();
    }

    /// How busy it is, for one who is connected; and when it is to expect the next one.
    pub fn pulse(&self, link: &Link, bytes_max: usize) -> (Bytes, Duration) {
        let loads = self.loads();
        let state = self.state();
        let neighbour = state.neighbours.contains(&link.connection.remote_id());
        let unused = if neighbour { Duration::ZERO } else { link.unused() };
        let next = cadence::pulse(unused, state.links.len());
        let pulse = Pulse {
            incarnation: self.incarnation,
            sequence: state.own.as_ref().map_or(0, |own| own.sequence),
            next_ms: millis(next),
            loads: loads.to_vec(),
        };
        drop(state);
        (pulse.encode_within(bytes_max, rand::random::<u16>().into()).into(), next)
    }

    /// How busy it is, at most a moment ago.
    fn loads(&self) -> Loads {
        let now = self.now();
        let fresh = |looked: Duration| now.saturating_sub(looked) < LOOKED_MIN;
        if let Some((looked, loads)) = self.state().own.as_ref().and_then(|own| own.loads.as_ref())
            && fresh(*looked)
        {
            return loads.clone();
        }
        let busy = self.local.get().map(|local| local.loads()).unwrap_or_default();
        let mut state = self.state();
        let Some(own) = &mut state.own else { return Arc::default() };
        let load = |model: &String| busy.iter().find(|(name, _)| name == model).map(|(_, load)| *load);
        let places = own.models.iter().enumerate();
        let loads = places.filter_map(|(place, model)| Some((u16::try_from(place).ok()?, load(model)?)));
        let loads = Arc::new(loads.collect::<Vec<_>>());
        own.loads = Some((now, loads.clone()));
        loads
    }
}
