//! Requests, and nodes that come, go and swap models.

use std::time::Duration;

use mesh_core::{
    ask::{Chat, Subject},
    chat::Message,
};
use mesh_peers::{
    Asked, NodeId, Policy,
    affinity::{keys, prompt_tokens},
    choose,
};
use rand::RngExt;

use crate::{
    peer::{Conversation, id_of, index_of, model_name},
    world::{What, World},
};

/// Turns after which a conversation ends.
const TURNS: usize = 10;

/// Conversations that a node's users have at once.
const CONVERSATIONS: usize = 3;

/// How long a node tries to reach another before it counts as lost.
const TRY: Duration = Duration::from_secs(2);

/// Times that a request is sent.
const TRIES: u32 = 3;

pub struct Request {
    pub from: usize,
    pub life: u32,
    pub to: usize,
    pub model: usize,
    pub tried: Vec<NodeId>,
    pub conversation: Option<usize>,
    pub connected: bool,
}

/// What became of requests for which there was a live offer.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    pub first_try: u64,
    /// Of the others, those that somebody answered at a later try.
    pub later: u64,
    /// And those that nobody did.
    pub never: u64,
    /// First tries that went to one that had crashed, over a connection and without one.
    pub to_dead: [u64; 2],
    /// To one that had left, or swapped the model.
    pub to_withdrawn: u64,
    /// To nobody, though somebody offered it.
    pub to_nobody: u64,
    /// For models that nobody offered.
    pub unservable: u64,
    /// First tries over a connection that was there.
    pub connected: u64,
    /// Turns of conversations whose last answerer was there, and those that went to it.
    pub turns: [u64; 2],
    /// Nodes that were said to be lost, and lived.
    pub wrong_losses: u64,
}

impl Outcome {
    pub fn requests(&self) -> u64 {
        self.first_try + self.to_dead[0] + self.to_dead[1] + self.to_withdrawn + self.to_nobody
    }

    pub fn first_try_part(&self) -> f64 {
        self.first_try as f64 / self.requests().max(1) as f64
    }
}

impl World {
    fn models(&self) -> usize {
        (self.setup.nodes / 10).max(4)
    }

    /// Few models are everywhere, and many are here and there.
    fn some_model(&mut self) -> usize {
        let models = self.models();
        let total: f64 = (1..=models).map(|rank| 1.0 / rank as f64).sum();
        let mut left = self.rng.random_range(0.0..total);
        for model in 0..models {
            left -= 1.0 / (model + 1) as f64;
            if left <= 0.0 {
                return model;
            }
        }
        models - 1
    }

    pub fn some_models(&mut self) -> Vec<usize> {
        let mut models = Vec::new();
        for _ in 0..self.rng.random_range(1..=3) {
            let model = self.some_model();
            if !models.contains(&model) {
                models.push(model);
            }
        }
        models
    }

    fn soon(&mut self, per_s: f64, what: What) {
        if per_s > 0.0 {
            let wait = -self.rng.random_range(f64::EPSILON..1.0).ln() / per_s;
            self.schedule(Duration::from_secs_f64(wait), 0, what);
        }
    }

    pub fn churn(&mut self) {
        let per_s = self.setup.nodes as f64 * self.setup.churn_per_minute / 60.0;
        self.soon(per_s, What::Churn);
        // One event is one who goes and one who comes; the first call only starts it.
        if let Some(node) = self.any_living().filter(|_| per_s > 0.0) {
            if self.rng.random_bool(0.5) {
                self.die(node)
            } else {
                self.leave(node)
            }
            self.join();
        }
    }

    pub fn swap(&mut self) {
        let per_s = self.setup.nodes as f64 * self.setup.swaps_per_minute / 60.0;
        self.soon(per_s, What::Swap);
        if let Some(node) = self.any_living().filter(|_| per_s > 0.0) {
            let model = self.some_model();
            if !self.peers[node].models.contains(&model) {
                let place = self.rng.random_range(0..self.peers[node].models.len());
                self.peers[node].models[place] = model;
                let load = &mut self.peers[node].loads[place];
                (load.running, load.waiting) = (0, 0);
                let advert = self.peers[node].advert(false);
                self.changed(node, advert);
            }
        }
    }

    fn offered(&self, from: usize, model: usize) -> bool {
        (0..self.peers.len()).any(|to| to != from && self.peers[to].serves(model) && self.reaches(from, to))
    }

    pub fn request(&mut self) {
        self.soon(self.setup.requests_per_s, What::Request);
        if self.setup.requests_per_s == 0.0 {
            return;
        }
        let Some(from) = self.any_living() else { return };
        // Half of all requests are for what many ask for, and half for anything.
        let model = if self.rng.random_bool(0.5) { self.some_model() } else { self.rng.random_range(0..self.models()) };
        let continued = !self.peers[from].conversations.is_empty() && self.rng.random_bool(0.7);
        let conversation = if continued {
            self.rng.random_range(0..self.peers[from].conversations.len())
        } else {
            let system = format!("You are the assistant of node {from}. {}", "Rules are rules. ".repeat(20));
            let system = Message { role: "system".to_owned(), content: Some(system), ..Message::default() };
            let place = self.rng.random_range(0..CONVERSATIONS);
            let new = Conversation { model, messages: vec![system], answered_by: None };
            let conversations = &mut self.peers[from].conversations;
            if place < conversations.len() {
                conversations[place] = new
            } else {
                conversations.push(new)
            }
            place.min(self.peers[from].conversations.len() - 1)
        };
        let text = format!("{:x} {}", self.rng.random::<u64>(), "and so on ".repeat(40));
        let talk = &mut self.peers[from].conversations[conversation];
        if talk.messages.len() > 2 * TURNS {
            talk.messages.truncate(1);
            talk.answered_by = None;
        }
        talk.messages.push(Message { role: "user".to_owned(), content: Some(text), ..Message::default() });
        let model = talk.model;
        if self.peers[from].models.contains(&model) {
            return; // It is answered at home.
        }
        let life = self.peers[from].life;
        let conversation = Some(conversation);
        self.route(Request { from, life, to: from, model, tried: Vec::new(), conversation, connected: false });
    }

    /// Asks whom the policy says.
    fn route(&mut self, mut request: Request) {
        let (from, now, salt) = (request.from, self.now, self.rng.random());
        let peer = &self.peers[from];
        let name = model_name(request.model);
        let talk = request.conversation.map(|index| &peer.conversations[index]);
        let messages = talk.map(|talk| talk.messages.clone()).unwrap_or_default();
        let subject = Subject::Chat(Chat { messages, ..Chat::default() });
        let keys = keys(&subject);
        let mut candidates = peer.directory.offers(&name, now);
        peer.affinity.mark(&mut candidates, &keys, &name);
        let asked = Asked { prompt_tokens: prompt_tokens(&subject), answer_tokens_max: None, excluded: &request.tried };
        let choice = choose(&candidates, &asked, &Policy::default(), salt);
        let Some(choice) = choice else {
            match (self.offered(from, request.model), request.tried.is_empty()) {
                (true, true) => self.outcome.to_nobody += 1,
                (true, false) => self.outcome.never += 1,
                (false, true) => self.outcome.unservable += 1,
                (false, false) => {}
            }
            return;
        };
        request.to = index_of(&choice.node);
        request.connected = self.peers[from].connected(request.to);
        if let Some(before) = talk_answerer(self, &request).filter(|_| request.tried.is_empty()) {
            let there = self.peers[before].serves(request.model) && self.reaches(from, before);
            if there && self.peers[from].directory.is_routable(&id_of(before), now) {
                self.outcome.turns[0] += 1;
                self.outcome.turns[1] += u64::from(before == request.to);
            }
        }
        // A connection takes a round trip to make.
        let latency = self.latency(from, request.to) * if request.connected { 1 } else { 3 };
        let to = request.to;
        self.schedule(latency, to, What::Arrive(Box::new(request)));
    }

    pub fn arrive(&mut self, request: Request) {
        let Request { from, to, model, .. } = request;
        let reaches = self.reaches(to, from) && self.peers[from].life == request.life;
        if !self.peers[from].alive || self.peers[from].life != request.life {
            return;
        }
        if !reaches || !self.peers[to].serves(model) {
            return self.arrive_nowhere(Box::new(request));
        }
        if request.tried.is_empty() {
            self.outcome.first_try += 1;
            self.outcome.connected += u64::from(request.connected);
        } else {
            self.outcome.later += 1;
        }
        self.link(from, to, self.now);
        self.peers[to].begun(model);
        let time = self.setup.answer.mul_f64(self.rng.random_range(0.3..2.0));
        self.schedule(time, to, What::Done(model));
        let Some(index) = request.conversation else { return };
        let talk = &mut self.peers[from].conversations[index];
        if talk.model == model {
            talk.answered_by = Some(to);
            let messages = talk.messages.clone();
            let keys = keys(&Subject::Chat(Chat { messages, ..Chat::default() }));
            let answer = "so it is ".repeat(30);
            talk.messages.push(Message { role: "assistant".to_owned(), content: Some(answer), ..Message::default() });
            self.peers[from].affinity.note(&keys, &model_name(model), id_of(to));
        }
    }

    /// Nobody is there, or not what was offered.
    pub fn arrive_nowhere(&mut self, mut request: Box<Request>) {
        let Request { from, to, model, .. } = *request;
        if !self.peers[from].alive || self.peers[from].life != request.life {
            return;
        }
        let first = request.tried.is_empty();
        if first && !self.offered(from, model) {
            self.outcome.unservable += 1;
            return;
        }
        let dead = !self.reaches(from, to);
        if first {
            if dead && !self.peers[to].left {
                self.outcome.to_dead[usize::from(!request.connected)] += 1;
            } else {
                self.outcome.to_withdrawn += 1;
            }
        }
        request.tried.push(id_of(to));
        let wait = if dead { TRY } else { self.latency(from, to) };
        self.schedule(wait, from, What::Failed(request, dead));
    }

    pub fn failed(&mut self, request: Request, dead: bool) {
        if dead && request.connected {
            self.lost(request.from, request.to);
        } else if dead {
            // Others may reach it, and those who watch it tell if it is gone.
            let now = self.now;
            self.peers[request.from].directory.lost(id_of(request.to), now);
        }
        if request.tried.len() < TRIES as usize {
            self.route(request);
        } else {
            self.outcome.never += 1;
        }
    }
}

fn talk_answerer(world: &World, request: &Request) -> Option<usize> {
    let talk = world.peers[request.from].conversations.get(request.conversation?)?;
    talk.answered_by.filter(|_| talk.model == request.model)
}
