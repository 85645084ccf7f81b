//! Other machines without a network: each is a server of this process, asked as a mesh asks it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, Weak},
    time::Duration,
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use mesh_core::{
    BackendInfo, Capabilities, Device, DeviceKind, Engine, EngineError, EngineHandle, EngineState, EventStream, Job,
    OutputForm, PromptForm, SubmitError,
    answer::Part,
    ask::Ask,
    node::{
        Elsewhere, Here, Local, ModelOffer, NodeOffer, PartStream, Question, Rejection, RejectionKind, RemoteModel,
        Reply, Routing,
    },
};
use mesh_llm::{
    defaults::Manner,
    hosting::Hosting,
    slots::{Keeping, RemoteModels, SlotPlan, Slots},
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::fake::{Fake, Form, Step};

static INFO: BackendInfo = BackendInfo { id: "elsewhere", title: "another machine", formats: &[], opt_in: None };

/// A server that others bring requests to.
pub struct Peer {
    pub fake: Arc<Fake>,
    pub slots: Slots,
    pub hosting: Arc<Hosting>,
}

impl Peer {
    /// With the model `org/MODEL-model`, ready.
    pub async fn ready(model: &str, script: Vec<Step>) -> Self {
        let fake = Fake::new(Form::Text, script);
        let plan = fake.starter(model, Form::Text).into();
        Self::with(fake, vec![plan], Vec::new()).await
    }

    /// With these models, all of them ready, and others it knows of.
    pub async fn with(fake: Arc<Fake>, plans: Vec<SlotPlan>, sources: Vec<Arc<dyn Elsewhere>>) -> Self {
        let remote = RemoteModels::new(sources, Manner::default());
        let slots = Slots::spawn_beside(plans, Keeping::default(), remote);
        for slot in slots.iter() {
            slot.model(None).await.unwrap();
        }
        Self { fake, hosting: Hosting::new(slots.clone(), Vec::new()), slots }
    }

    /// The requests that it was handed.
    pub fn jobs(&self) -> usize {
        self.fake.jobs.lock().unwrap().len()
    }
}

/// What passed between a machine and the one that asks.
#[derive(Clone, Copy, Default)]
pub struct Count {
    pub sent: u64,
    pub failed: u64,
    pub failed_over: u64,
    pub served: u64,
}

struct Machine {
    local: Arc<dyn Local>,
    routable: bool,
    count: Count,
}

/// Machines by name, the first of which is asked first.
pub struct FakeMesh {
    own: Weak<Self>,
    machines: Mutex<BTreeMap<String, Machine>>,
    changes: watch::Sender<u64>,
}

impl FakeMesh {
    pub fn new(peers: &[(&str, &Peer)]) -> Arc<Self> {
        let machine = |peer: &Peer| Machine { local: peer.hosting.clone(), routable: true, count: Count::default() };
        let machines = peers.iter().map(|(name, peer)| ((*name).to_owned(), machine(peer))).collect();
        Arc::new_cyclic(|own| Self { own: own.clone(), machines: Mutex::new(machines), changes: watch::Sender::new(0) })
    }

    /// It is gone; what is known of it is shown.
    pub fn lose(&self, name: &str) {
        self.machines.lock().unwrap().get_mut(name).unwrap().routable = false;
        self.changes.send_modify(|count| *count += 1);
    }

    /// It is gone and forgotten.
    pub fn forget(&self, name: &str) {
        self.machines.lock().unwrap().remove(name).unwrap();
        self.changes.send_modify(|count| *count += 1);
    }

    pub fn count(&self, name: &str, count: impl FnOnce(&mut Count)) {
        if let Some(machine) = self.machines.lock().unwrap().get_mut(name) {
            count(&mut machine.count);
        }
    }

    /// Who offers the model of that name, or of that name on one machine.
    fn offers(&self, name: &str) -> Vec<(NodeOffer, Arc<dyn Local>)> {
        let (model, only) = name.rsplit_once('@').map_or((name, None), |(model, node)| (model, Some(node)));
        let machines = self.machines.lock().unwrap();
        let asked = machines.iter().filter(|(node, machine)| machine.routable && only.is_none_or(|only| only == *node));
        let offers = asked.filter_map(|(node, machine)| {
            let offer = machine.local.offers().into_iter().find(|offer| offer.name == model)?;
            Some((NodeOffer { node: node.clone(), offer }, machine.local.clone()))
        });
        offers.collect()
    }
}

impl Elsewhere for FakeMesh {
    fn kind(&self) -> &'static str {
        "mesh"
    }

    fn models(&self) -> Vec<RemoteModel> {
        let mut models = BTreeMap::<String, Vec<NodeOffer>>::new();
        for (node, machine) in self.machines.lock().unwrap().iter().filter(|(_, machine)| machine.routable) {
            for offer in machine.local.offers() {
                models.entry(offer.name.clone()).or_default().push(NodeOffer { node: node.clone(), offer });
            }
        }
        models.into_iter().map(|(name, nodes)| RemoteModel { name, nodes }).collect()
    }

    fn engine(&self, name: &str) -> Option<(EngineHandle, NodeOffer)> {
        let (first, _) = self.offers(name).into_iter().next()?;
        let device = Device { kind: DeviceKind::External, name: "elsewhere".into(), memory_bytes: None };
        let ModelOffer { capabilities, .. } = first.offer.clone();
        let capabilities = Capabilities { prompt: PromptForm::Chat, output: OutputForm::Parts, ..capabilities };
        let state = watch::Sender::new(EngineState::Ready);
        let engine = Remote { mesh: self.own.upgrade()?, model: name.to_owned(), capabilities, state };
        Some((EngineHandle::new(&INFO, device, Arc::new(engine)), first))
    }

    fn explain(&self, name: &str, here: Option<Here>) -> Option<Routing> {
        let machines: Vec<String> = self.offers(name).into_iter().map(|(offer, _)| offer.node).collect();
        let elsewhere = here.is_none_or(|here| here == Here::Cold);
        let why = if elsewhere { "ready there" } else { "ready here" }.to_owned();
        (!machines.is_empty()).then_some(Routing { elsewhere, why, machines })
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    fn status(&self) -> Value {
        let machines = self.machines.lock().unwrap();
        let row = |(name, Machine { local, routable, count }): (&String, &Machine)| {
            let offers: Vec<Value> = local.offers().iter().map(|offer| json!({ "name": offer.name })).collect();
            json!({
                "name": name, "offers": offers, "routable": routable,
                "round_trip_ms": if *routable { json!(1.5) } else { Value::Null },
                "sent": count.sent, "failed": count.failed, "failed_over": count.failed_over, "served": count.served,
            })
        };
        let nodes: Vec<Value> = machines.iter().map(row).collect();
        json!({ "mesh": "lab", "node": { "name": "here" }, "nodes": nodes })
    }
}

struct Remote {
    mesh: Arc<FakeMesh>,
    model: String,
    capabilities: Capabilities,
    state: watch::Sender<EngineState>,
}

#[async_trait]
impl Engine for Remote {
    fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.state.subscribe()
    }

    async fn submit(&self, _: Job) -> Result<EventStream, SubmitError> {
        Err(SubmitError::WrongForm { wanted: PromptForm::Chat })
    }

    async fn answer(&self, ask: Ask) -> Result<PartStream, Rejection> {
        let (mesh, model) = (self.mesh.clone(), self.model.clone());
        let mut way = Way { mesh, model, ask, tried: Vec::new(), parts: None, begun: false };
        way.begin().await?;
        Ok(stream::unfold(way, Way::next).boxed())
    }

    async fn reply(&self, question: Question) -> Result<Reply, Rejection> {
        let (offer, local) = self.mesh.offers(&self.model).into_iter().next().unwrap();
        local.reply(&offer.offer.name, question).await
    }

    async fn drain(&self, _: Duration) {
        self.state.send_replace(EngineState::Stopped);
    }
}

/// A request on its way from one machine to the next.
struct Way {
    mesh: Arc<FakeMesh>,
    model: String,
    ask: Ask,
    tried: Vec<String>,
    parts: Option<PartStream>,
    /// Whether anything of the answer has come.
    begun: bool,
}

impl Way {
    async fn begin(&mut self) -> Result<(), Rejection> {
        let mut last = None;
        loop {
            let next = self.mesh.offers(&self.model).into_iter().find(|(offer, _)| !self.tried.contains(&offer.node));
            let Some((NodeOffer { node, offer }, local)) = next else {
                let nobody = || Rejection::new(RejectionKind::Unavailable, "model_gone", "no node serves it");
                return Err(last.unwrap_or_else(nobody));
            };
            let again = !self.tried.is_empty();
            self.mesh.count(&node, |count| {
                count.sent += 1;
                count.failed_over += u64::from(again);
            });
            self.tried.push(node);
            match local.answer(&offer.name, self.ask.clone()).await {
                Ok(parts) => {
                    self.parts = Some(parts);
                    return Ok(());
                }
                Err(rejection) if rejection.may_go_elsewhere() => last = Some(rejection),
                Err(rejection) => return Err(rejection),
            }
        }
    }

    async fn next(mut self) -> Option<(Result<Part, EngineError>, Self)> {
        loop {
            let why = match self.parts.as_mut()?.next().await {
                Some(Ok(part)) => {
                    self.begun |= !matches!(part, Part::Queued { .. } | Part::Prefill { .. });
                    if matches!(part, Part::Finished(_)) {
                        self.parts = None;
                    }
                    return Some((Ok(part), self));
                }
                Some(Err(error)) => error.to_string(),
                None => "its answer ended before it was whole".to_owned(),
            };
            let node = self.tried.last().unwrap().clone();
            self.mesh.count(&node, |count| count.failed += 1);
            self.parts = None;
            let failed = |what: String| Err(EngineError::Failed { what: what.into() });
            if self.begun {
                return Some((failed(format!("node {node} did not finish the answer: {why}")), self));
            }
            if let Err(rejection) = self.begin().await {
                return Some((failed(format!("node {node} failed, and no other took it: {rejection}")), self));
            }
        }
    }
}
