//! A node's life: it joins, takes part, and leaves.

#[cfg(test)]
mod tests;

use std::{
    net::{Ipv4Addr, Ipv6Addr, SocketAddr, SocketAddrV4, SocketAddrV6},
    sync::Arc,
    time::{Duration, SystemTime},
};

use iroh::{
    Endpoint, EndpointAddr, RelayMode, RelayUrl, SecretKey,
    address_lookup::memory::MemoryLookup,
    endpoint::{IdleTimeout, QuicTransportConfig, VarInt, presets},
    protocol::Router,
};
use iroh_gossip::net::Gossip;
use iroh_mdns_address_lookup::MdnsAddressLookup;
use mesh_core::{
    EngineHandle, Hint,
    node::{Elsewhere, Here, Local, ModelOffer, NodeOffer, RemoteModel, Routing},
};
use mesh_peers::{Asked, Place, Policy, choose, place, policy::LocalState};
use serde_json::{Value, json};
use tokio::{sync::watch, time::timeout};

use crate::{
    adverts::GOSSIP_BYTES_MAX,
    backend::{self, INFO, common, device},
    engine::Remote,
    home::{Denied, Home, HomeError, Membership},
    link::SILENCE_MAX,
    node::{Admitted, Node, Parts},
    tasks::{self, Gate, Joining, Listening},
    ticket::Ticket,
    wire::{self, ALPN, GOSSIP_ALPN, JOIN_ALPN, Join, Joined, STRANGER_BYTES_MAX},
};

/// The UDP port that nodes listen on unless they are told another.
pub const PORT: u16 = 9338;
const KEEP_ALIVE: Duration = Duration::from_millis(500);
/// Requests of one node that are answered at the same time.
const STREAMS_MAX: u32 = 256;
/// Messages of one node that are read at the same time.
const MESSAGES_MAX: u32 = 16;
/// How long joining may take.
const JOINING_MAX: Duration = Duration::from_secs(15);

/// How a node takes part.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where it is kept.
    pub home: Home,
    /// What it is called.
    pub name: String,
    /// The UDP address it listens on; port 0 takes any free one.
    pub listen: SocketAddr,
    /// Whether it finds others, and is found, on local networks.
    pub mdns: bool,
    /// Relays for nodes that do not reach one another; none unless they are named.
    pub relays: Vec<RelayUrl>,
    /// How it chooses among others.
    pub policy: Policy,
}

/// Why a node does not take part.
#[derive(Debug, thiserror::Error)]
pub enum MeshError {
    /// Its files.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The address cannot be listened on.
    #[error("{address} (UDP) cannot be listened on: {why}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// Why.
        why: String,
    },
    /// The network cannot be used.
    #[error("the mesh cannot be reached: {why}")]
    Network {
        /// Why.
        why: String,
    },
    /// The ticket's time is over.
    #[error("the ticket has expired")]
    Expired,
    /// Who wrote the ticket does not answer.
    #[error("the node that wrote the ticket does not answer: {why}")]
    Unanswered {
        /// Why.
        why: String,
    },
    /// Who wrote the ticket lets nobody in by it.
    #[error("the node that wrote the ticket does not let this one in: {0}")]
    Denied(Denied),
    /// Who answered is not of the ticket's mesh.
    #[error("what answered is not of the ticket's mesh")]
    Another,
}

impl Hint for MeshError {
    fn hint(&self) -> Option<String> {
        Some(match self {
            Self::Home(error) => return error.hint(),
            Self::Listen { .. } => "choose another port with --mesh-port (0 takes any free one)".into(),
            Self::Network { .. } => "look at the machine's network".into(),
            Self::Unanswered { .. } => {
                "`mesh-llm serve` has to run there, and its UDP port to be reachable from here; a ticket that was written while \
                 it runs says where"
                    .into()
            }
            Self::Expired | Self::Denied(_) | Self::Another => {
                "ask for another one: mesh-llm mesh invite, on the machine that created the mesh".into()
            }
        })
    }
}

/// A node that takes part.
pub struct Mesh {
    node: Arc<Node>,
    router: Router,
}

impl Mesh {
    /// Takes part in the mesh that the files say this node is in. With a ticket it joins first, unless it is a member already.
    pub async fn start(options: Options, ticket: Option<&Ticket>) -> Result<Arc<Self>, MeshError> {
        let Options { home, name, listen, mdns, relays, policy } = options;
        let key = home.node_key()?;
        let membership = match (home.membership()?, ticket) {
            (Some(membership), None) => membership,
            (Some(membership), Some(ticket)) if membership.mesh == ticket.mesh => membership,
            (Some(membership), Some(_)) => return Err(HomeError::Member { mesh: membership.mesh_name }.into()),
            (None, Some(ticket)) => join(&home, &key, ticket, mdns, &relays).await?,
            (None, None) => return Err(HomeError::NoMesh.into()),
        };
        let admitted = Admitted::default();
        let addresses = MemoryLookup::new();
        let known: Vec<EndpointAddr> =
            home.peers()?.into_iter().chain(ticket.map(|ticket| ticket.at.clone())).collect();
        known.iter().cloned().for_each(|peer| addresses.add_endpoint_info(peer));
        let endpoint = endpoint(key.clone(), listen, &relays, Some(Gate(admitted.clone())), &addresses).await?;
        let mdns = mdns.then(|| local_network(&endpoint, membership.secret.tag())).flatten();
        let parts = Parts {
            name,
            key,
            membership,
            home: home.clone(),
            endpoint: endpoint.clone(),
            addresses,
            policy,
            admitted,
        };
        let (node, news) = Node::new(parts);
        if let Some(list) = home.revocations()?
            && let Err(error) = node.hear_revocations(&list)
        {
            tracing::warn!(%error, "the list of revoked nodes on disk does not count");
        }
        known.iter().for_each(|peer| node.vouch(peer.id));
        let gossip = Gossip::builder().max_message_size(GOSSIP_BYTES_MAX).alpn(GOSSIP_ALPN).spawn(endpoint.clone());
        let mut router =
            Router::builder(endpoint).accept(ALPN, Listening::new(node.clone())).accept(GOSSIP_ALPN, gossip.clone());
        if home.mesh_key()?.is_some() {
            router = router.accept(JOIN_ALPN, Joining::new(home));
        }
        let router = router.spawn();
        tasks::start(&node, &gossip, mdns, news);
        let mesh = Arc::new(Self { node, router });
        backend::runs(Arc::downgrade(&mesh));
        Ok(mesh)
    }

    /// What this node does for others, from now on.
    pub fn serve(&self, local: Arc<dyn Local>) {
        self.node.local.set(local).ok();
        self.node.speak.notify_one();
    }

    /// The mesh's name.
    pub fn name(&self) -> &str {
        &self.node.membership.mesh_name
    }

    /// The node's name.
    pub fn node_name(&self) -> &str {
        &self.node.name
    }

    /// Where it can be reached.
    pub fn address(&self) -> EndpointAddr {
        self.node.endpoint.addr()
    }

    /// Says goodbye to all, and ends.
    pub async fn leave(&self) {
        tasks::leave(&self.node).await;
        self.node.tasks.close();
        timeout(Duration::from_secs(2), self.node.tasks.wait()).await.ok();
        timeout(Duration::from_secs(2), self.router.shutdown()).await.ok();
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.node.over.cancel();
    }
}

impl Elsewhere for Mesh {
    fn kind(&self) -> &'static str {
        "mesh"
    }

    fn models(&self) -> Vec<RemoteModel> {
        self.node.state().directory.models(self.node.now())
    }

    fn engine(&self, name: &str) -> Option<(EngineHandle, NodeOffer)> {
        let (candidates, lost) = {
            let (state, now) = (self.node.state(), self.node.now());
            (state.directory.offers(name, now), state.directory.lost_offers(name, now))
        };
        // What all of them take may be asked of whichever is chosen.
        let (node, offer) = match (candidates.first(), common(candidates.iter().map(|one| &*one.offer))) {
            (Some(first), Some(offer)) => (first.name.clone(), offer),
            _ => lost.into_iter().next().map(|(node, offer)| (node, (*offer).clone()))?,
        };
        let device = device(self.name());
        let engine = Remote::new(self.node.clone(), name, &offer);
        Some((EngineHandle::new(&INFO, device, Arc::new(engine)), NodeOffer { node, offer }))
    }

    fn goes_there(&self, name: &str, here: Here) -> bool {
        self.explain(name, Some(here)).is_some_and(|routing| routing.elsewhere)
    }

    fn explain(&self, name: &str, here: Option<Here>) -> Option<Routing> {
        let candidates = self.node.state().directory.offers(name, self.node.now());
        let choice = choose(&candidates, &Asked::default(), &self.node.policy, self.node.incarnation)?;
        let best = choice.ranked.first().map(|(_, expected)| *expected);
        let local = match here {
            None => LocalState::NotHere,
            Some(Here::Cold) => LocalState::Cold,
            Some(Here::Ready { running, waiting, parallel }) => LocalState::Ready { running, waiting, parallel },
        };
        let (placed, why) = place(local, best.as_ref(), &self.node.policy);
        Some(Routing { elsewhere: placed == Place::There, why, machines: choice.reasons })
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.node.changes()
    }

    fn status(&self) -> Value {
        let now = self.node.now();
        let rows = self.node.state().directory.nodes(now);
        let nodes = rows.into_iter().map(|row| {
            let count = crate::node::endpoint_id(row.id).map(|id| self.node.counts.of(&id)).unwrap_or_default();
            let offers: Vec<Value> = row.offers.iter().map(|offer| said(offer)).collect();
            json!({
                "id": row.id,
                "name": row.name,
                "offers": offers,
                "connected": row.connected,
                "routable": row.routable,
                "age_s": row.age.as_secs_f64(),
                "lease_left_s": row.lease_left.as_secs_f64(),
                "round_trip_ms": row.round_trip.map(|trip| trip.as_secs_f64() * 1e3),
                "sent": count.sent,
                "failed": count.failed,
                "failed_over": count.failed_over,
                "served": count.served,
            })
        });
        json!({
            "mesh": self.node.membership.mesh_name,
            "node": { "id": self.node.id.to_string(), "name": self.node.name },
            "nodes": nodes.collect::<Vec<_>>(),
        })
    }
}

/// An offer as a table shows it.
fn said(offer: &ModelOffer) -> Value {
    json!({
        "name": offer.name,
        "reference": offer.reference,
        "revision": offer.revision,
        "hash": offer.hash,
        "backend": offer.backend,
        "quantization": offer.quantization,
        "context_length": offer.capabilities.context_tokens_max,
        "parallel": offer.capabilities.requests_parallel_max,
        "running": offer.load.running,
        "waiting": offer.load.waiting,
        "prefill_per_s": offer.load.prefill_per_s,
        "decode_per_s": offer.load.decode_per_s,
    })
}

async fn endpoint(
    key: SecretKey,
    listen: SocketAddr,
    relays: &[RelayUrl],
    gate: Option<Gate>,
    addresses: &MemoryLookup,
) -> Result<Endpoint, MeshError> {
    let network = |why: String| MeshError::Network { why };
    let idle = IdleTimeout::try_from(SILENCE_MAX).map_err(|error| network(error.to_string()))?;
    let transport = QuicTransportConfig::builder()
        .max_idle_timeout(Some(idle))
        .keep_alive_interval(KEEP_ALIVE)
        .default_path_max_idle_timeout(SILENCE_MAX)
        .default_path_keep_alive_interval(KEEP_ALIVE)
        .max_concurrent_bidi_streams(VarInt::from_u32(STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(MESSAGES_MAX))
        .build();
    let relay_mode = match relays {
        [] => RelayMode::Disabled,
        relays => RelayMode::custom(relays.iter().cloned()),
    };
    let refused = |why: String| MeshError::Listen { address: listen, why };
    let mut builder = Endpoint::builder(presets::Minimal)
        .secret_key(key)
        .relay_mode(relay_mode)
        .transport_config(transport)
        .address_lookup(addresses.clone())
        .clear_ip_transports()
        .bind_addr(listen)
        .map_err(|error| refused(error.to_string()))?;
    if listen.ip() == Ipv4Addr::UNSPECIFIED {
        // Both families, as far as the machine has them.
        let other = SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, listen.port(), 0, 0);
        builder = builder.bind_addr(other).map_err(|error| refused(error.to_string()))?;
    }
    if let Some(gate) = gate {
        builder = builder.hooks(gate);
    }
    builder.bind().await.map_err(|error| refused(format!("{error:#}")))
}

fn local_network(endpoint: &Endpoint, tag: String) -> Option<MdnsAddressLookup> {
    let built = MdnsAddressLookup::builder().service_name(tag).build(endpoint.id());
    match (built, endpoint.address_lookup()) {
        (Ok(mdns), Ok(lookup)) => {
            lookup.add(mdns.clone());
            Some(mdns)
        }
        (Err(error), _) => {
            tracing::warn!(error = %format!("{error:#}"), "nodes on local networks are not found");
            None
        }
        (_, Err(_)) => None,
    }
}

/// Shows a ticket to who wrote it, and remembers what comes of it.
async fn join(
    home: &Home,
    key: &SecretKey,
    ticket: &Ticket,
    mdns: bool,
    relays: &[RelayUrl],
) -> Result<Membership, MeshError> {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_secs());
    if ticket.expires_s <= now {
        return Err(MeshError::Expired);
    }
    let addresses = MemoryLookup::new();
    addresses.add_endpoint_info(ticket.at.clone());
    let any = SocketAddrV4::new(Ipv4Addr::UNSPECIFIED, 0);
    let endpoint = endpoint(key.clone(), any.into(), relays, None, &addresses).await?;
    let _mdns = mdns.then(|| local_network(&endpoint, ticket.tag.clone())).flatten();
    let asked = timeout(JOINING_MAX, ask_in(&endpoint, ticket)).await;
    endpoint.close().await;
    let unanswered = |why: String| MeshError::Unanswered { why };
    let joined = asked.map_err(|_| unanswered(format!("nothing came within {} s", JOINING_MAX.as_secs())))?;
    match joined.map_err(unanswered)? {
        Joined::Denied(denied) => Err(MeshError::Denied(denied)),
        Joined::Member(membership) => {
            let judge = crate::trust::Judge::new(ticket.mesh);
            if membership.mesh != ticket.mesh || judge.admit(key.public(), &membership.certificate).is_err() {
                return Err(MeshError::Another);
            }
            home.join(&membership)?;
            home.remember_peers(std::slice::from_ref(&ticket.at))?;
            Ok(*membership)
        }
    }
}

async fn ask_in(endpoint: &Endpoint, ticket: &Ticket) -> Result<Joined, String> {
    // The network's own names for things may take a moment to be heard, so that one attempt is not enough.
    let connection = loop {
        match endpoint.connect(EndpointAddr::new(ticket.at.id), JOIN_ALPN).await {
            Ok(connection) => break connection,
            Err(error) => tracing::debug!(error = %format!("{error:#}"), "not reached"),
        }
        tokio::time::sleep(Duration::from_millis(300)).await;
    };
    let (mut send, mut recv) = connection.open_bi().await.map_err(|error| error.to_string())?;
    wire::write(&mut send, &Join { secret: ticket.secret }).await.map_err(|error| error.to_string())?;
    let joined = wire::expect(&mut recv, STRANGER_BYTES_MAX).await.map_err(|error| error.to_string())?;
    connection.close(VarInt::from_u32(0), b"");
    Ok(joined)
}
