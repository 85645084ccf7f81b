//! What a node does all the time, each a task of its own. They end with the node.

use std::{sync::Arc, time::Duration};

use futures::StreamExt;
use iroh::{
    EndpointAddr, EndpointId,
    endpoint::{AfterHandshakeOutcome, Connection, EndpointHooks, VarInt},
    protocol::{AcceptError, ProtocolHandler},
};
use iroh_gossip::{
    api::{Event, GossipReceiver, GossipSender, GossipTopic, JoinOptions},
    net::Gossip,
    proto::TopicId,
};
use iroh_mdns_address_lookup::{DiscoveryEvent, MdnsAddressLookup};
use mesh_peers::cadence;
use tokio::{
    sync::{Semaphore, mpsc},
    time::{Instant, MissedTickBehavior, interval, sleep, sleep_until, timeout},
};

use crate::{
    adverts::Gossiped,
    home::{Denied, Home},
    link::{self, MEETING_MAX, MeetError, Parting},
    node::{Admitted, Node},
    wire::{self, GOSSIP_ALPN, Join, Joined, STRANGER_BYTES_MAX},
};

/// Connections of strangers that are listened to at the same time.
const STRANGERS_MAX: usize = 64;
/// Changes that come together are told together.
const GATHER: Duration = Duration::from_millis(20);
/// How often a node looks after leases, pulses and connections.
const TICK: Duration = Duration::from_millis(100);
/// How often the files are looked at that commands change.
const LOOK: Duration = Duration::from_secs(1);

/// Keeps everybody out of gossip who is no member.
#[derive(Debug)]
pub struct Gate(pub Admitted);

impl EndpointHooks for Gate {
    async fn after_handshake<'a>(&'a self, connection: &'a Connection) -> AfterHandshakeOutcome {
        if connection.alpn() != GOSSIP_ALPN || self.0.contains(&connection.remote_id()) {
            return AfterHandshakeOutcome::Accept;
        }
        AfterHandshakeOutcome::Reject { error_code: VarInt::from_u32(Parting::Stranger as u32), reason: Vec::new() }
    }
}

/// Takes connections of those who say that they are members.
#[derive(Clone)]
pub struct Listening {
    node: Arc<Node>,
    strangers: Arc<Semaphore>,
}

impl std::fmt::Debug for Listening {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Listening")
    }
}

impl Listening {
    /// For a node.
    pub fn new(node: Arc<Node>) -> Self {
        Self { node, strangers: Arc::new(Semaphore::new(STRANGERS_MAX)) }
    }
}

impl ProtocolHandler for Listening {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Ok(place) = self.strangers.try_acquire() else {
            Parting::Greedy.close(&connection);
            return Ok(());
        };
        let welcomed = link::welcome(&self.node, &connection).await;
        drop(place);
        match welcomed {
            // What is said over it is `attend`'s.
            Ok(link) => drop(link.connection.closed().await),
            Err(MeetError::Gone) => {}
            Err(error) => {
                tracing::debug!(node = %connection.remote_id().fmt_short(), %error, "not let in");
                Parting::Stranger.close(&connection);
            }
        }
        Ok(())
    }
}

/// Lets nodes in that have a ticket.
#[derive(Debug)]
pub struct Joining {
    home: Home,
    places: Semaphore,
}

impl Joining {
    /// Into the mesh whose key is kept there.
    pub fn new(home: Home) -> Self {
        Self { home, places: Semaphore::new(STRANGERS_MAX) }
    }

    async fn talk(&self, connection: &Connection) -> Result<Joined, wire::WireError> {
        let ended = |error: iroh::endpoint::ConnectionError| wire::WireError::Ended(error.to_string());
        let (mut send, mut recv) = connection.accept_bi().await.map_err(ended)?;
        let join: Join = wire::expect(&mut recv, STRANGER_BYTES_MAX).await?;
        let (home, node) = (self.home.clone(), connection.remote_id());
        let redeemed =
            tokio::task::spawn_blocking(move || home.redeem(&join.secret, node, std::time::SystemTime::now()));
        let joined = match redeemed.await.unwrap_or(Err(Denied::Unable)) {
            Ok(membership) => Joined::Member(Box::new(membership)),
            Err(denied) => Joined::Denied(denied),
        };
        wire::write(&mut send, &joined).await?;
        send.finish().ok();
        Ok(joined)
    }
}

impl ProtocolHandler for Joining {
    async fn accept(&self, connection: Connection) -> Result<(), AcceptError> {
        let Ok(_place) = self.places.try_acquire() else {
            Parting::Greedy.close(&connection);
            return Ok(());
        };
        let node = connection.remote_id();
        match timeout(MEETING_MAX, self.talk(&connection)).await {
            Ok(Ok(Joined::Member(_))) => tracing::info!(node = %node, "a node joined the mesh"),
            Ok(Ok(Joined::Denied(why))) => tracing::warn!(node = %node, %why, "a node may not join"),
            Ok(Err(error)) => tracing::debug!(node = %node.fmt_short(), %error, "a node did not say what it wants"),
            Err(_) => tracing::debug!(node = %node.fmt_short(), "a node took too long to say what it wants"),
        }
        // The other side closes when it has read the answer.
        timeout(Duration::from_secs(2), connection.closed()).await.ok();
        Parting::Stranger.close(&connection);
        Ok(())
    }
}

/// Starts them.
pub fn start(node: &Arc<Node>, gossip: &Gossip, mdns: Option<MdnsAddressLookup>, news: mpsc::Receiver<Gossiped>) {
    node.tasks.spawn(talk(node.clone(), gossip.clone(), news));
    node.tasks.spawn(advertise(node.clone()));
    node.tasks.spawn(reach(node.clone()));
    node.tasks.spawn(look(node.clone()));
    if let Some(mdns) = mdns {
        node.tasks.spawn(discover(node.clone(), mdns));
    }
}

/// Says what is new to everybody, and hears what others say.
async fn talk(node: Arc<Node>, gossip: Gossip, mut news: mpsc::Receiver<Gossiped>) {
    let topic = TopicId::from_bytes(node.membership.secret.derive("mesh-llm 1 topic of gossip", b""));
    loop {
        let bootstrap: Vec<EndpointId> = node.state().links.keys().copied().collect();
        let topic = match gossip.subscribe_with_opts(topic, JoinOptions::with_bootstrap(bootstrap)).await {
            Ok(topic) => topic,
            Err(error) => {
                tracing::error!(%error, "nothing can be heard of the mesh");
                return;
            }
        };
        node.alone();
        let done = tokio::select! {
            () = node.over.cancelled() => true,
            () = chat(&node, topic, &mut news) => false,
        };
        if done {
            return;
        }
        // What was missed comes with the next adverts.
        sleep(Duration::from_millis(100)).await;
    }
}

async fn chat(node: &Arc<Node>, topic: GossipTopic, news: &mut mpsc::Receiver<Gossiped>) {
    let (sender, mut receiver): (GossipSender, GossipReceiver) = topic.split();
    let mut changes = node.changes();
    let mut again = interval(Duration::from_secs(1));
    again.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        tokio::select! {
            said = news.recv() => {
                let Some(said) = said else { return };
                if sender.broadcast(said.encode()).await.is_err() {
                    return;
                }
            }
            event = receiver.next() => match event {
                Some(Ok(Event::Received(message))) => match Gossiped::decode(&message.content) {
                    Ok(said) => hear(node, said),
                    Err(error) => tracing::debug!(%error, "gossip that cannot be read"),
                },
                Some(Ok(Event::NeighborUp(id))) => {
                    // Before there was a neighbour, nobody heard what this node said.
                    if node.neighbour(id, true) == 1 {
                        node.speak.notify_one();
                    }
                }
                Some(Ok(Event::NeighborDown(id))) => drop(node.neighbour(id, false)),
                Some(Ok(Event::Lagged)) | Some(Err(_)) | None => return,
            },
            // Whoever is connected and no neighbour may be one: gossip decides how many it needs.
            _ = changes.changed() => befriend(node, &sender, &receiver).await,
            _ = again.tick() => befriend(node, &sender, &receiver).await,
        }
    }
}

/// Neighbours that gossip is to have, where there are so many.
const NEIGHBOURS_WANTED: usize = 3;

async fn befriend(node: &Arc<Node>, sender: &GossipSender, receiver: &GossipReceiver) {
    let neighbours: Vec<EndpointId> = receiver.neighbors().collect();
    let others: Vec<EndpointId> =
        node.state().links.keys().filter(|id| !neighbours.contains(id)).copied().take(NEIGHBOURS_WANTED).collect();
    if neighbours.len() < NEIGHBOURS_WANTED && !others.is_empty() {
        sender.join_peers(others).await.ok();
    }
}

/// Hears what somebody tells everybody.
pub fn hear(node: &Node, said: Gossiped) {
    match said {
        Gossiped::Advert(shown) => node.hear(*shown),
        Gossiped::Loss(loss) => node.hear_loss(loss),
        Gossiped::Revocations(list) => {
            if let Err(error) = node.hear_revocations(&list) {
                tracing::debug!(%error, "a list of revoked nodes does not count");
            }
        }
    }
}

/// Tells everybody what is offered: when it changes, when somebody may not know it, and now and then.
async fn advertise(node: Arc<Node>) {
    let mut began = Instant::now();
    // Kept from one advert to the next: what changes while one is being said is not missed.
    let mut changes = None;
    loop {
        let members = node.state().directory.len() + 1;
        if changes.is_none() {
            changes = node.local.get().map(|local| local.changes());
        }
        let changed = async {
            match &mut changes {
                Some(changes) => {
                    if changes.changed().await.is_err() {
                        std::future::pending().await
                    }
                }
                None => std::future::pending().await,
            }
        };
        let new = tokio::select! {
            () = node.over.cancelled() => return,
            () = changed => true,
            () = node.speak.notified() => {
                sleep(GATHER).await;
                true
            }
            () = sleep_until(began + cadence::heartbeat(members)) => false,
        };
        began = Instant::now();
        if new {
            node.announce(false).await;
        } else {
            let shown = node.advert(false);
            node.news.send(Gossiped::Advert(Box::new(shown))).await.ok();
        }
    }
}

/// Looks after leases and pulses, and connects to those it should be connected to.
async fn reach(node: Arc<Node>) {
    let mut tick = interval(TICK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut before = Instant::now();
    loop {
        tokio::select! {
            () = node.over.cancelled() => return,
            _ = tick.tick() => {}
        }
        let (since, now) = (before.elapsed(), Instant::now());
        before = now;
        node.listen(since.saturating_sub(TICK));
        node.give_up();
        for id in node.to_dial() {
            let node = node.clone();
            node.tasks.clone().spawn(async move {
                let outcome = link::dial(&node, EndpointAddr::new(id)).await;
                if let Err(error) = &outcome {
                    tracing::trace!(node = %id.fmt_short(), %error, "not reached");
                }
                node.dialled(id, outcome.is_ok());
            });
        }
    }
}

/// Hears who is on the local network.
async fn discover(node: Arc<Node>, mdns: MdnsAddressLookup) {
    let mut events = mdns.subscribe().await;
    loop {
        let event = tokio::select! {
            () = node.over.cancelled() => return,
            event = events.next() => event,
        };
        match event {
            Some(DiscoveryEvent::Discovered { endpoint_info, .. }) => node.see(endpoint_info.endpoint_id),
            Some(_) => {}
            None => return,
        }
    }
}

/// Looks at the files that commands change, and keeps those up that they read.
async fn look(node: Arc<Node>) {
    let mut tick = interval(LOOK);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut address, mut peers) = (None, Vec::new());
    loop {
        tokio::select! {
            () = node.over.cancelled() => return,
            _ = tick.tick() => {}
        }
        let home = node.home.clone();
        let found = tokio::task::spawn_blocking(move || (home.membership(), home.revocations())).await;
        let Ok((membership, revocations)) = found else { continue };
        if matches!(&membership, Ok(found) if found.as_ref().is_none_or(|found| found.mesh != node.membership.mesh)) {
            tracing::info!("this node left the mesh");
            leave(&node).await;
            return;
        }
        if let Ok(Some(list)) = revocations
            && let Ok(true) = node.hear_revocations(&list)
        {
            node.news.try_send(Gossiped::Revocations(list)).ok();
        }
        let now = node.endpoint.addr();
        if address.as_ref() != Some(&now) && node.home.remember_address(&now).is_ok() {
            address = Some(now);
        }
        let mut reachable = node.reachable().await;
        reachable.sort_by_key(|peer| peer.id);
        if !reachable.is_empty() && reachable != peers && node.home.remember_peers(&reachable).is_ok() {
            peers = reachable;
        }
    }
}

/// Says goodbye, and gives the others a moment to hear it.
pub async fn leave(node: &Arc<Node>) {
    if node.over.is_cancelled() {
        return;
    }
    node.announce(true).await;
    sleep(Duration::from_millis(200)).await;
    node.over.cancel();
}
