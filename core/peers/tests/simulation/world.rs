//! Nodes, a network with latencies, and time that passes as it is told to. One seed, one course of events.

use std::{
    cmp::Reverse,
    collections::{BTreeSet, BinaryHeap},
    num::NonZeroUsize,
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use iroh_gossip::proto::{Command, Event, InEvent, Message, OutEvent, Scope, Timer, TopicId};
use lru::LruCache;
use mesh_peers::{
    Advert, Loss, NodeId, Pulse,
    advert::{News, Snapshot},
    cadence,
    directory::Reported,
    reach::{Kept, LINKS_WANTED, surplus},
};
use rand::{RngExt, SeedableRng, rngs::StdRng};
use tokio::time::Instant;

use crate::{
    peer::{Peer, id_of, index_of},
    traffic::{Outcome, Request},
};

/// How often a node looks after its pulses, leases and heartbeats.
pub const TICK: Duration = Duration::from_millis(250);

/// After this, QUIC gives up a connection on which nothing comes any more (its idle timeout, with keep-alives below it).
pub const IDLE: Duration = Duration::from_secs(2);

/// How long a node that leaves stays to pass its own last words on.
const LAST_WORDS: Duration = Duration::from_millis(500);

/// How often a node tries to reach one of those that are missing.
const PROBE: Duration = Duration::from_secs(10);

/// Bytes of UDP, IP and QUIC around a message.
const PACKET_BYTES: usize = 70;

fn topic() -> TopicId {
    TopicId::from_bytes([7; 32])
}

/// What a world is like.
#[derive(Clone, Copy)]
pub struct Setup {
    pub nodes: usize,
    pub seed: u64,
    /// The part of all nodes that go in a minute, and are replaced: half of them without a word.
    pub churn_per_minute: f64,
    /// Requests of the whole mesh that are for others, about.
    pub requests_per_s: f64,
    /// How often a node swaps one of its models for another, in a minute.
    pub swaps_per_minute: f64,
    /// How long an answer takes, about.
    pub answer: Duration,
}

impl Setup {
    /// Ten in a hundred nodes go in a minute, ten swap a model, and each has a request every five seconds.
    pub fn usual(nodes: usize, seed: u64) -> Self {
        let requests_per_s = nodes as f64 / 5.0;
        let answer = Duration::from_secs(3);
        Self { nodes, seed, churn_per_minute: 0.1, requests_per_s, swaps_per_minute: 0.1, answer }
    }
}

pub enum What {
    Gossip(usize, Box<Message<NodeId>>),
    Pulse(usize, Arc<Pulse>),
    Snapshot(Arc<Snapshot>),
    /// Said over a connection, to be there before gossip is.
    Told(Heard),
    /// The other end closed a connection that nobody needed.
    Parted(usize),
    WantSnapshot(usize),
    Timer(Box<Timer<NodeId>>),
    Broken(usize),
    Tick,
    Gone,
    Request,
    Churn,
    Swap,
    Arrive(Box<Request>),
    Failed(Box<Request>, bool),
    Done(usize),
}

struct Scheduled {
    at: Duration,
    number: u64,
    node: usize,
    life: u32,
    what: What,
}

impl PartialEq for Scheduled {
    fn eq(&self, other: &Self) -> bool {
        self.number == other.number
    }
}

impl Eq for Scheduled {}

impl PartialOrd for Scheduled {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Scheduled {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        (self.at, self.number).cmp(&(other.at, other.number))
    }
}

/// Messages that were sent, and their bytes as they are on the network.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sent {
    pub messages: u64,
    pub bytes: u64,
}

impl Sent {
    fn count(&mut self, bytes: usize) {
        self.messages += 1;
        self.bytes += (bytes + PACKET_BYTES) as u64;
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    pub adverts: Sent,
    pub control: Sent,
    pub pulses: Sent,
    pub snapshots: Sent,
}

pub struct World {
    pub setup: Setup,
    pub now: Duration,
    pub rng: StdRng,
    pub peers: Vec<Peer>,
    pub outcome: Outcome,
    pub traffic: Traffic,
    /// For how many node-seconds the traffic was counted.
    pub node_seconds: f64,
    pub divided: bool,
    founding: bool,
    queue: BinaryHeap<Reverse<Scheduled>>,
    number: u64,
    start: Instant,
    /// What was decoded: each message is, once. Where its bytes lie tells which it is, and they stay there as long as they are
    /// in here.
    news: LruCache<usize, (Bytes, Heard)>,
    breaking: BTreeSet<(usize, usize)>,
}

#[derive(Clone)]
pub enum Heard {
    Advert(Arc<Advert>),
    Loss(Loss),
}

impl World {
    /// A mesh that has come together: one node after the other joined a random earlier one, and all know all.
    pub fn new(setup: Setup) -> Self {
        let mut world = Self {
            setup,
            now: Duration::ZERO,
            rng: StdRng::seed_from_u64(setup.seed),
            peers: Vec::new(),
            outcome: Outcome::default(),
            traffic: Traffic::default(),
            node_seconds: 0.0,
            divided: false,
            founding: true,
            queue: BinaryHeap::new(),
            number: 0,
            start: Instant::now(),
            news: LruCache::new(NonZeroUsize::new(20_000).expect("above zero")),
            breaking: BTreeSet::new(),
        };
        for _ in 0..setup.nodes {
            world.join();
            world.run(Duration::from_millis(2));
        }
        world.introduce();
        world.run(Duration::from_secs(1));
        world
    }

    /// Everybody knows everybody. (Having them tell one another would take most of the time.)
    fn introduce(&mut self) {
        self.founding = false;
        let nodes = self.peers.len();
        let (heartbeat, lease) = (cadence::heartbeat(nodes), cadence::lease(nodes).as_millis() as u32);
        for node in 0..nodes {
            let advert = Arc::new(Advert { lease_ms: lease, ..self.peers[node].advert(false) });
            for other in 0..nodes {
                self.peers[other].directory.hear(advert.clone(), self.now);
            }
            self.peers[node].advertise_at = self.now + heartbeat.mul_f64(self.rng.random());
        }
    }

    /// Starts requests, churn and swaps.
    pub fn live(&mut self) {
        self.schedule(Duration::ZERO, 0, What::Request);
        self.schedule(Duration::ZERO, 0, What::Churn);
        self.schedule(Duration::ZERO, 0, What::Swap);
    }

    /// Counts from here on.
    pub fn reset(&mut self) {
        (self.outcome, self.traffic, self.node_seconds) = (Outcome::default(), Traffic::default(), 0.0);
    }

    pub fn run(&mut self, time: Duration) {
        let end = self.now + time;
        self.node_seconds += time.as_secs_f64() * self.living().len() as f64;
        while self.queue.peek().is_some_and(|Reverse(next)| next.at <= end) {
            let Some(Reverse(Scheduled { at, node, life, what, .. })) = self.queue.pop() else { break };
            self.now = at;
            let everybodys = matches!(what, What::Request | What::Churn | What::Swap);
            if everybodys || (self.peers[node].alive && self.peers[node].life == life) {
                self.happen(node, what);
            } else if let What::Arrive(request) = what {
                self.arrive_nowhere(request);
            }
        }
        self.now = end;
    }

    pub fn living(&self) -> Vec<usize> {
        (0..self.peers.len()).filter(|index| self.peers[*index].alive).collect()
    }

    pub fn any_living(&mut self) -> Option<usize> {
        for _ in 0..if self.peers.is_empty() { 0 } else { 100 } {
            let index = self.rng.random_range(0..self.peers.len());
            if self.peers[index].alive && self.peers[index].serving {
                return Some(index);
            }
        }
        None
    }

    /// One way, between places on a plane: from half a millisecond to about 40.
    pub fn latency(&self, from: usize, to: usize) -> Duration {
        let ((a, b), (c, d)) = (self.peers[from].place, self.peers[to].place);
        Duration::from_micros(500 + (30_000.0 * ((a - c).powi(2) + (b - d).powi(2)).sqrt()) as u64)
    }

    pub fn reaches(&self, from: usize, to: usize) -> bool {
        self.peers[to].alive && (!self.divided || self.peers[from].side == self.peers[to].side)
    }

    pub fn schedule(&mut self, delay: Duration, node: usize, what: What) {
        self.number += 1;
        let life = self.peers.get(node).map_or(0, |peer| peer.life);
        self.queue.push(Reverse(Scheduled { at: self.now + delay, number: self.number, node, life, what }));
    }

    fn happen(&mut self, node: usize, what: What) {
        match what {
            What::Gossip(from, message) => self.gossip(node, InEvent::RecvMessage(id_of(from), *message)),
            What::Timer(timer) => self.gossip(node, InEvent::TimerExpired(*timer)),
            What::Broken(other) => {
                self.breaking.remove(&(node, other));
                if !self.reaches(node, other) {
                    self.gossip(node, InEvent::PeerDisconnected(id_of(other)));
                }
            }
            What::Pulse(from, pulse) => {
                let round_trip = self.latency(node, from) * 2;
                let (peer, now) = (&mut self.peers[node], self.now);
                // What comes after a connection was closed does not come.
                if peer.connected(from) {
                    peer.directory.pulse(id_of(from), &pulse, Some(round_trip), now);
                }
            }
            What::Told(news) => self.hear(node, news),
            What::Parted(from) => {
                if let Some(watcher) = self.peers[node].watchers.get_mut(&from) {
                    watcher.used = None;
                    if !watcher.neighbour {
                        self.peers[node].watchers.remove(&from);
                    }
                }
            }
            What::WantSnapshot(from) => {
                let Some(mine) = self.peers[node].latest.clone() else { return };
                for snapshot in self.peers[node].directory.snapshot(mine, self.now) {
                    self.traffic.snapshots.count(snapshot.encode().len());
                    if self.reaches(node, from) {
                        self.schedule(self.latency(node, from), from, What::Snapshot(Arc::new(snapshot)));
                    }
                }
            }
            What::Snapshot(snapshot) => {
                for held in &snapshot.held {
                    let age = Duration::from_millis(held.age_ms.into());
                    self.peers[node].directory.hear_aged(held.advert.clone(), age, self.now);
                }
            }
            What::Tick => self.tick(node),
            What::Gone => {
                self.gossip(node, InEvent::Command(topic(), Command::Quit));
                self.die(node);
            }
            What::Churn => self.churn(),
            What::Swap => self.swap(),
            What::Request => self.request(),
            What::Arrive(request) => self.arrive(*request),
            What::Failed(request, dead) => self.failed(*request, dead),
            What::Done(model) => self.peers[node].done(model),
        }
    }

    pub fn gossip(&mut self, node: usize, event: InEvent<NodeId>) {
        let now = self.start + self.now;
        let out: Vec<_> = self.peers[node].gossip.handle(event, now, None).collect();
        for event in out {
            match event {
                OutEvent::SendMessage(to, message) => self.send(node, index_of(&to), message),
                OutEvent::ScheduleTimer(delay, timer) => self.schedule(delay, node, What::Timer(Box::new(timer))),
                OutEvent::EmitEvent(_, Event::NeighborUp(other)) => self.neighbour(node, index_of(&other)),
                OutEvent::EmitEvent(_, Event::NeighborDown(other)) => {
                    let (other, peer) = (index_of(&other), &mut self.peers[node]);
                    peer.neighbours.remove(&other);
                    if let Some(watcher) = peer.watchers.get_mut(&other) {
                        watcher.neighbour = false;
                        if watcher.used.is_none() {
                            peer.watchers.remove(&other);
                        }
                    }
                    peer.parted(other);
                }
                OutEvent::EmitEvent(_, Event::Received(received)) => {
                    let content = received.content;
                    let (_, news) = self.news.get_or_insert(content.as_ptr() as usize, || {
                        let news = match News::decode(&content).expect("what a node says others understand") {
                            News::Advert(advert) => Heard::Advert(Arc::new(advert)),
                            News::Loss(loss) => Heard::Loss(loss),
                        };
                        (content, news)
                    });
                    let news = news.clone();
                    self.hear(node, news);
                }
                OutEvent::DisconnectPeer(_) | OutEvent::PeerData(..) => {}
            }
        }
    }

    fn send(&mut self, from: usize, to: usize, message: Message<NodeId>) {
        let bytes = message.size().expect("it has a form");
        match message.kind() {
            iroh_gossip::proto::state::MessageKind::Data => self.traffic.adverts.count(bytes),
            iroh_gossip::proto::state::MessageKind::Control => self.traffic.control.count(bytes),
        }
        if self.reaches(from, to) {
            self.schedule(self.latency(from, to), to, What::Gossip(from, Box::new(message)));
        } else if self.breaking.insert((from, to)) {
            self.schedule(IDLE, from, What::Broken(to));
        }
    }

    fn neighbour(&mut self, node: usize, other: usize) {
        let (latency, now) = (self.latency(node, other), self.now);
        let peer = &mut self.peers[node];
        peer.neighbours.insert(other);
        peer.watchers.entry(other).or_default().neighbour = true;
        peer.directory.reached(id_of(other), Some(latency * 2), now);
        if !peer.advertised {
            peer.advertised = true;
            if self.founding {
                return;
            }
            self.advertise(node);
            if self.reaches(node, other) {
                self.schedule(latency, other, What::WantSnapshot(node));
            }
        }
    }

    fn hear(&mut self, node: usize, news: Heard) {
        let (peer, now) = (&mut self.peers[node], self.now);
        match news {
            Heard::Advert(advert) => {
                let from = advert.node;
                let before = peer.directory.latest(&from).map(|(incarnation, _)| incarnation);
                if advert.leaving || before.is_some_and(|before| before < advert.incarnation) {
                    peer.affinity.forget(from);
                }
                if advert.leaving {
                    peer.links.remove(&index_of(&from));
                }
                peer.directory.hear(advert, now);
            }
            Heard::Loss(loss) => {
                if peer.directory.report(&loss, now) == Reported::Mine
                    && (peer.incarnation, peer.sequence) <= (loss.incarnation, loss.sequence)
                {
                    self.outcome.wrong_losses += 1;
                    self.advertise(node);
                }
            }
        }
    }

    pub fn advertise(&mut self, node: usize) {
        let peer = &mut self.peers[node];
        if !peer.serving {
            return;
        }
        let advert = peer.advert(false);
        let interval = cadence::heartbeat(peer.directory.len() + 1);
        let interval = interval.mul_f64(self.rng.random_range(0.9..1.1));
        self.peers[node].advertise_at = self.now + interval;
        self.broadcast(node, &News::Advert(advert));
    }

    /// Tells what has changed: those who have a connection first.
    pub fn changed(&mut self, node: usize, advert: Advert) {
        let bytes = advert.encode().len();
        let heard = Heard::Advert(Arc::new(advert.clone()));
        for to in self.peers[node].watchers.keys().copied().collect::<Vec<_>>() {
            self.traffic.adverts.count(bytes);
            if self.reaches(node, to) {
                self.schedule(self.latency(node, to), to, What::Told(heard.clone()));
            }
        }
        self.broadcast(node, &News::Advert(advert));
    }

    fn broadcast(&mut self, node: usize, news: &News) {
        self.gossip(node, InEvent::Command(topic(), Command::Broadcast(news.encode().into(), Scope::Swarm)));
    }

    /// The node lost another one, and tells everybody.
    pub fn lost(&mut self, node: usize, other: usize) {
        let (peer, now) = (&mut self.peers[node], self.now);
        peer.links.remove(&other);
        if let Some(loss) = peer.directory.lost(id_of(other), now) {
            self.broadcast(node, &News::Loss(loss));
        }
    }

    fn tick(&mut self, node: usize) {
        let now = self.now;
        self.schedule(TICK, node, What::Tick);
        for expired in self.peers[node].directory.expire(now) {
            self.peers[node].affinity.forget(expired);
        }
        for quiet in self.peers[node].directory.quiet(now) {
            self.lost(node, index_of(&quiet));
        }
        if self.peers[node].advertise_at <= now {
            self.advertise(node);
        }
        for (to, pulse) in self.peers[node].pulses(now) {
            self.traffic.pulses.count(pulse.encode().len());
            if self.reaches(node, to) {
                self.schedule(self.latency(node, to), to, What::Pulse(node, Arc::new(pulse)));
            }
        }
        let peer = &self.peers[node];
        let links = peer.links.iter().map(|(to, link)| (*to, true, now - link.used));
        let others = peer.neighbours.iter().chain(peer.watchers.keys()).filter(|to| !peer.links.contains_key(to));
        let others = others.copied().collect::<BTreeSet<_>>().into_iter().map(|to| (to, false, now));
        let kept: Vec<Kept> = links
            .chain(others)
            .map(|(to, own, unused)| Kept { node: id_of(to), own, neighbour: peer.neighbours.contains(&to), unused })
            .collect();
        for to in surplus(&kept) {
            self.unlink(node, index_of(&to));
        }
        if kept.len() < LINKS_WANTED
            && let Some(other) = self.any_living()
            && other != node
            && !self.peers[node].connected(other)
            && self.routes(node, other)
            && self.reaches(node, other)
        {
            self.link(node, other, now.saturating_sub(cadence::USED));
        }
        if self.peers[node].probe_at <= now {
            self.peers[node].probe_at = now + PROBE.mul_f64(self.rng.random_range(0.5..1.5));
            let mut missing = self.peers[node].directory.missing();
            if self.peers[node].neighbours.is_empty() {
                // Its ticket names somebody.
                missing.extend(self.any_living().filter(|other| *other != node).map(id_of));
            }
            if !missing.is_empty() {
                let one = missing[self.rng.random_range(0..missing.len())];
                self.gossip(node, InEvent::Command(topic(), Command::Join(vec![one])));
            }
        }
    }

    fn unlink(&mut self, node: usize, to: usize) {
        self.peers[node].links.remove(&to);
        self.peers[node].parted(to);
        if self.reaches(node, to) {
            self.schedule(self.latency(node, to), to, What::Parted(node));
        }
    }

    /// There is a connection from one to another, last used at that time.
    pub fn link(&mut self, from: usize, to: usize, used: Duration) {
        let now = self.now;
        let round_trip = self.latency(from, to) * 2;
        if !self.peers[from].connected(to) {
            self.peers[from].directory.reached(id_of(to), Some(round_trip), now);
        }
        self.peers[from].links.insert(to, crate::peer::Link { used });
        self.peers[to].watchers.entry(from).or_default().used = Some(used);
    }

    /// A node comes: half of the time one that was there before.
    pub fn join(&mut self) -> usize {
        let dead: Vec<usize> = (0..self.peers.len()).filter(|index| !self.peers[*index].alive).collect();
        let place = (self.rng.random(), self.rng.random());
        let (side, seed, contact) = (self.rng.random(), self.rng.random(), self.any_living());
        let models = self.some_models();
        let back = !dead.is_empty() && self.rng.random_bool(0.5);
        let index = if back { dead[self.rng.random_range(0..dead.len())] } else { self.peers.len() };
        let life = self.peers.get(index).map_or(0, |peer| peer.life + 1);
        let peer = Peer::new(index, life, place, side, models, self.now, seed);
        if back {
            self.peers[index] = peer
        } else {
            self.peers.push(peer)
        }
        let offset = Duration::from_micros(self.rng.random_range(0..TICK.as_micros() as u64));
        self.schedule(offset, index, What::Tick);
        let contacts = contact.map(id_of).into_iter().collect();
        self.gossip(index, InEvent::Command(topic(), Command::Join(contacts)));
        index
    }

    /// A node says that it goes, and goes.
    pub fn leave(&mut self, node: usize) {
        let advert = self.peers[node].advert(true);
        (self.peers[node].serving, self.peers[node].left) = (false, true);
        self.changed(node, advert);
        self.schedule(LAST_WORDS, node, What::Gone);
    }

    /// A node is gone.
    pub fn die(&mut self, node: usize) {
        self.peers[node].alive = false;
        self.peers[node].serving = false;
        for other in 0..self.peers.len() {
            if self.peers[other].alive && self.peers[other].neighbours.contains(&node) {
                self.schedule(IDLE, other, What::Broken(node));
            }
        }
        // What it knew takes memory, and nobody asks it any more.
        self.peers[node].directory = mesh_peers::Directory::new(id_of(node), mesh_peers::Bounds::default());
    }

    /// The two sides do not reach one another, or do again.
    pub fn divide(&mut self, divided: bool) {
        self.divided = divided;
        for node in self.living() {
            for other in self.peers[node].neighbours.clone() {
                if !self.reaches(node, other) {
                    self.schedule(IDLE, node, What::Broken(other));
                }
            }
        }
    }

    /// Whether one node would route to another.
    pub fn routes(&self, from: usize, to: usize) -> bool {
        self.peers[from].directory.is_routable(&id_of(to), self.now)
    }

    /// How many living others would route to a node, and how many there are.
    pub fn knowing(&self, node: usize) -> (usize, usize) {
        let others: Vec<usize> = self.living().into_iter().filter(|other| *other != node).collect();
        (others.iter().filter(|other| self.routes(**other, node)).count(), others.len())
    }

    /// How many living others a node would route to, and how many there are.
    pub fn known(&self, node: usize) -> (usize, usize) {
        let others: Vec<usize> = self.living().into_iter().filter(|other| *other != node).collect();
        (others.iter().filter(|other| self.routes(node, **other)).count(), others.len())
    }
}
