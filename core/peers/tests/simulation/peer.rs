//! A simulated node: iroh-gossip's own state machine, and this crate's directory, policy and affinity.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use iroh_gossip::proto::{Config, PeerData, State};
use mesh_core::{
    Capabilities, Knob, OutputForm, PromptForm, WeightFormat,
    chat::Message,
    node::{Load, ModelOffer, Reasoning},
};
use mesh_peers::{
    Advert, Affinity, Bounds, Directory, NodeId, Pulse,
    advert::{MESSAGE_BYTES_MAX, VERSION},
    cadence,
};
use rand::{SeedableRng, rngs::StdRng};

use crate::world::TICK;

/// Requests that a model computes at the same time.
const PARALLEL: u32 = 4;

/// A connection that this node opened to send requests.
pub struct Link {
    pub used: Duration,
}

/// Somebody whom this node sends pulses.
#[derive(Default)]
pub struct Watcher {
    pub neighbour: bool,
    pub used: Option<Duration>,
    pub due: Duration,
}

/// A conversation of this node's user.
#[derive(Clone)]
pub struct Conversation {
    pub model: usize,
    pub messages: Vec<Message>,
    pub answered_by: Option<usize>,
}

pub struct Peer {
    pub id: NodeId,
    /// Counts its starts: what was meant for an earlier one does not reach a later one.
    pub life: u32,
    pub place: (f32, f32),
    pub side: bool,
    pub alive: bool,
    /// Its offers stand: it has not begun to leave.
    pub serving: bool,
    /// It said that it goes.
    pub left: bool,
    pub models: Vec<usize>,
    pub loads: Vec<Load>,
    pub incarnation: u64,
    pub sequence: u64,
    pub latest: Option<Arc<Advert>>,
    pub gossip: State<NodeId, StdRng>,
    pub directory: Directory,
    pub affinity: Affinity,
    pub neighbours: BTreeSet<usize>,
    pub links: BTreeMap<usize, Link>,
    pub watchers: BTreeMap<usize, Watcher>,
    pub conversations: Vec<Conversation>,
    pub advertise_at: Duration,
    pub probe_at: Duration,
    pub advertised: bool,
}

/// Ids end with the node's number, and begin with anything.
pub fn id_of(index: usize) -> NodeId {
    let mut id = *blake3::hash(&index.to_le_bytes()).as_bytes();
    id[28..].copy_from_slice(&(index as u32).to_be_bytes());
    NodeId(id)
}

pub fn index_of(id: &NodeId) -> usize {
    u32::from_be_bytes(id.0[28..].try_into().expect("four bytes")) as usize
}

pub fn model_name(model: usize) -> String {
    format!("org-{}/model-{model}-Instruct-4bit", model % 7)
}

impl Peer {
    pub fn new(
        index: usize,
        life: u32,
        place: (f32, f32),
        side: bool,
        models: Vec<usize>,
        now: Duration,
        seed: u64,
    ) -> Self {
        let mut config = Config { max_message_size: 2 * MESSAGE_BYTES_MAX, ..Config::default() };
        // A thousand nodes are in one memory here.
        config.broadcast.message_cache_retention = Duration::from_secs(10);
        config.broadcast.message_id_retention = Duration::from_secs(30);
        let id = id_of(index);
        let rng = StdRng::seed_from_u64(seed);
        Self {
            id,
            life,
            place,
            side,
            alive: true,
            serving: true,
            left: false,
            loads: vec![Load { prefill_per_s: Some(800.0), decode_per_s: Some(30.0), ..Load::default() }; models.len()],
            models,
            incarnation: 1_700_000_000_000 + now.as_millis() as u64,
            sequence: 0,
            latest: None,
            gossip: State::new(id, PeerData::default(), config, rng),
            directory: Directory::new(id, Bounds::default()),
            affinity: Affinity::new(4096),
            neighbours: BTreeSet::new(),
            links: BTreeMap::new(),
            watchers: BTreeMap::new(),
            conversations: Vec::new(),
            advertise_at: Duration::MAX,
            probe_at: now,
            advertised: false,
        }
    }

    pub fn serves(&self, model: usize) -> bool {
        self.alive && self.serving && self.models.contains(&model)
    }

    /// Its next advert.
    pub fn advert(&mut self, leaving: bool) -> Advert {
        self.sequence += 1;
        let members = self.directory.len() + 1;
        let offers = self.models.iter().zip(&self.loads).map(|(model, load)| Arc::new(offer(*model, *load)));
        let advert = Advert {
            version: VERSION,
            node: self.id,
            name: format!("machine-{}", self.id.short()),
            incarnation: self.incarnation,
            sequence: self.sequence,
            lease_ms: cadence::lease(members).as_millis() as u32,
            leaving,
            offers: if leaving { Vec::new() } else { offers.collect() },
        };
        self.latest = Some(Arc::new(advert.clone()));
        advert
    }

    /// Its next pulses: to whom, and when each is to expect another.
    pub fn pulses(&mut self, now: Duration) -> Vec<(usize, Pulse)> {
        let connections = self.watchers.len();
        let loads: Vec<_> = self.loads.iter().enumerate().map(|(place, load)| (place as u16, *load)).collect();
        let mut pulses = Vec::new();
        for (to, watcher) in self.watchers.iter_mut().filter(|(_, watcher)| watcher.due <= now) {
            let unused = if watcher.neighbour { Duration::ZERO } else { now - watcher.used.unwrap_or_default() };
            let ticks = cadence::pulse(unused, connections).as_nanos().div_ceil(TICK.as_nanos());
            let next = TICK * ticks as u32;
            watcher.due = now + next;
            let (incarnation, sequence) = (self.incarnation, self.sequence);
            pulses.push((*to, Pulse { incarnation, sequence, next_ms: next.as_millis() as u32, loads: loads.clone() }));
        }
        pulses
    }

    pub fn connected(&self, to: usize) -> bool {
        self.neighbours.contains(&to) || self.links.contains_key(&to)
    }

    /// Whether the connection to a node may be taken for closed.
    pub fn parted(&mut self, from: usize) {
        if !self.connected(from) {
            self.directory.closed(id_of(from));
        }
    }

    pub fn begun(&mut self, model: usize) {
        if let Some(place) = self.models.iter().position(|known| *known == model) {
            let load = &mut self.loads[place];
            if load.running < PARALLEL { load.running += 1 } else { load.waiting += 1 }
        }
    }

    pub fn done(&mut self, model: usize) {
        if let Some(place) = self.models.iter().position(|known| *known == model) {
            let load = &mut self.loads[place];
            if load.waiting > 0 { load.waiting -= 1 } else { load.running = load.running.saturating_sub(1) }
        }
    }
}

fn offer(model: usize, load: Load) -> ModelOffer {
    use Knob::*;
    ModelOffer {
        name: model_name(model),
        reference: Some(format!("org-{}/model-{model}-Instruct", model % 7)),
        revision: Some("0123456789abcdef0123456789abcdef01234567".to_owned()),
        hash: None,
        backend: "mlx".to_owned(),
        format: Some(WeightFormat::Safetensors),
        quantization: Some("4-bit affine".to_owned()),
        parameters: Some(7_600_000_000),
        weight_bytes: Some(4_300_000_000),
        family: Some("qwen3".to_owned()),
        dialect: Some("hermes".to_owned()),
        capabilities: Capabilities {
            prompt: PromptForm::Tokens,
            output: OutputForm::Tokens,
            knobs: [Temperature, TopP, TopK, MinP, Seed, RepetitionPenalty, PresencePenalty, LogitBias, JsonSchema]
                .into(),
            context_tokens_max: 32_768,
            requests_parallel_max: PARALLEL,
            requests_queued_max: 64,
            prefix_reuse: true,
            embeddings: true,
            vision: false,
        },
        chat: true,
        tools: true,
        reasoning: Reasoning::Switch,
        since: 1_700_000_000,
        load,
    }
}
