//! What this server does for other nodes: it answers with what is ready here, and passes nothing on.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use async_trait::async_trait;
use mesh_core::{
    ask::Ask,
    node::{Elsewhere, Load, Local, ModelOffer, PartStream, Question, Rejection, RejectionKind, Reply},
};
use mesh_models::reference::Reference;
use tokio::sync::watch;

use crate::{
    error::ApiError,
    lease::Lease,
    metrics::Tally,
    pipeline::{self, InLine, PipelineError, tokens},
    served::ServedModel,
    slots::{Slot, SlotState, Slots},
};

/// The models of this server as others see them.
pub struct Hosting {
    slots: Slots,
    /// Servers beside this one whose models it offers as its own.
    shared: Vec<Arc<dyn Elsewhere>>,
    changes: watch::Sender<u64>,
    /// Offers by the models' names here, each as long as its model is loaded: only the load of one changes.
    made: Mutex<BTreeMap<String, (Weak<ServedModel>, ModelOffer)>>,
}

impl Hosting {
    /// Offers what becomes ready. Has to be called within a tokio runtime.
    pub fn new(slots: Slots, shared: Vec<Arc<dyn Elsewhere>>) -> Arc<Self> {
        let changes = watch::Sender::new(0);
        for slot in slots.iter() {
            tokio::spawn(tell(slot.changes(), changes.clone()));
        }
        for source in &shared {
            tokio::spawn(tell(source.changes(), changes.clone()));
        }
        Arc::new(Self { slots, shared, changes, made: Mutex::default() })
    }

    /// The model that is offered under that name, if it is ready at this moment.
    fn ready(&self, name: &str) -> Option<(&Slot, Lease)> {
        self.slots.iter().find_map(|slot| match slot.state() {
            SlotState::Ready(model) if !model.takes_conversations() && self.offer(slot, &model).name == name => {
                Some((slot, Lease::of(&model)?))
            }
            _ => None,
        })
    }

    /// What a ready model is offered as.
    fn offer(&self, slot: &Slot, model: &Arc<ServedModel>) -> ModelOffer {
        let (name, load) = (slot.name(), slot.tally().load());
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((of, offer)) = made.get(&name)
            && std::ptr::eq(of.as_ptr(), Arc::as_ptr(model))
        {
            return ModelOffer { load, ..offer.clone() };
        }
        made.retain(|_, (of, _)| of.strong_count() > 0);
        let offer = offer(slot, model);
        made.insert(name, (Arc::downgrade(model), offer.clone()));
        offer
    }

    /// What is ready here.
    fn own(&self) -> impl Iterator<Item = ModelOffer> {
        self.slots.iter().filter_map(|slot| match slot.state() {
            SlotState::Ready(model) if !model.takes_conversations() => Some(self.offer(slot, &model)),
            _ => None,
        })
    }

    async fn answer_here(&self, slot: &Slot, lease: Lease, ask: Ask) -> Result<PartStream, PipelineError> {
        let stream = pipeline::open(lease, ask.clone()).await?;
        Ok(Box::pin(stream.in_line(InLine::new(self.slots.clone(), slot.name(), ask))))
    }
}

/// Ticks `changes` whenever something changes.
async fn tell<T>(mut changed: watch::Receiver<T>, changes: watch::Sender<u64>) {
    while changed.changed().await.is_ok() {
        changes.send_modify(|count| *count += 1);
    }
}

#[async_trait]
impl Local for Hosting {
    fn offers(&self) -> Vec<ModelOffer> {
        let shared = self.shared.iter().flat_map(|source| source.models());
        let shared = shared.filter_map(|model| model.nodes.into_iter().next().map(|node| node.offer));
        let mut offers: Vec<ModelOffer> = self.own().chain(shared).collect();
        offers.sort_by(|one, other| one.name.cmp(&other.name));
        offers.dedup_by(|one, other| one.name == other.name);
        offers
    }

    fn loads(&self) -> Vec<(String, Load)> {
        let shared = self.shared.iter().flat_map(|source| source.models());
        let shared = shared.filter_map(|model| Some((model.name, model.nodes.into_iter().next()?.offer.load)));
        self.own().map(|offer| (offer.name, offer.load)).chain(shared).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn answer(&self, model: &str, ask: Ask) -> Result<PartStream, Rejection> {
        let refused = |error: PipelineError| Rejection::from(ApiError::from(error));
        if let Some((slot, lease)) = self.ready(model) {
            return self.answer_here(slot, lease, ask).await.map_err(refused);
        }
        match self.shared.iter().find_map(|source| source.engine(model)) {
            Some((engine, _)) => engine.answer(ask).await,
            None => Err(gone(model)),
        }
    }

    async fn reply(&self, model: &str, question: Question) -> Result<Reply, Rejection> {
        if let Some((_, lease)) = self.ready(model) {
            return reply(&lease, question).await.map_err(|error| ApiError::from(error).into());
        }
        match self.shared.iter().find_map(|source| source.engine(model)) {
            Some((engine, _)) => engine.reply(question).await,
            None => Err(gone(model)),
        }
    }
}

async fn reply(model: &Arc<ServedModel>, question: Question) -> Result<Reply, PipelineError> {
    Ok(match question {
        Question::Render { chat, add_generation_prompt } => {
            Reply::Text(tokens::render(model, chat, add_generation_prompt).await?)
        }
        Question::Tokenize { text, add_special, pieces: true } => {
            let (ids, pieces) = tokens::pieces(model, text, add_special).await?;
            Reply::Tokens { ids, pieces }
        }
        Question::Tokenize { text, add_special, pieces: false } => {
            Reply::Tokens { ids: tokens::tokenize(model, text, add_special).await?, pieces: Vec::new() }
        }
        Question::Detokenize { ids } => Reply::Text(tokens::detokenize(model, ids).await?),
        Question::Count { subject } => Reply::Count(tokens::count(model, subject).await? as u64),
        Question::Embed { id, inputs, pooling } => {
            Reply::Vectors(pipeline::embed::embed(model, id, inputs, pooling).await?)
        }
    })
}

/// The model was ready when it was offered, and is not any more.
fn gone(model: &str) -> Rejection {
    Rejection::new(RejectionKind::NotFound, "model_not_found", format!("`{model}` is not ready there any more"))
}

/// Where a ready model is from, as others are told.
fn reference(slot: &Slot, model: &ServedModel) -> Option<String> {
    let profile = &model.profile;
    // A directory that was deleted since is a directory still.
    let here = |path: &Path| {
        path.exists() || profile.root.ends_with(path) || profile.weights.iter().any(|file| file.ends_with(path))
    };
    Reference::parse(slot.reference(), here).ok()?.public()
}

/// What a ready model is called elsewhere: what it is called here, unless that is a path.
fn offered(slot: &Slot, model: &ServedModel) -> String {
    let name = slot.name();
    if name != slot.reference() {
        return name;
    }
    reference(slot, model).unwrap_or_else(|| model.profile.name.clone())
}

/// What a ready model is offered as.
fn offer(slot: &Slot, model: &ServedModel) -> ModelOffer {
    let (profile, tally): (_, &Tally) = (&model.profile, slot.tally());
    let weights = profile.weights.first();
    ModelOffer {
        name: offered(slot, model),
        reference: reference(slot, model),
        revision: mesh_models::revision_of(&profile.root),
        hash: weights.and_then(|weights| mesh_models::hash_of(weights)),
        backend: model.handle.backend.id.to_owned(),
        format: Some(profile.format.value),
        quantization: profile.quantization.as_ref().map(|fact| fact.value.to_string()),
        parameters: profile.parameters.as_ref().map(|fact| fact.value),
        weight_bytes: Some(profile.weight_bytes.value),
        family: slot.known().family.map(|family| family.id().to_owned()),
        dialect: Some(model.dialect.id().to_owned()),
        capabilities: model.handle.capabilities().clone(),
        chat: model.template(false).is_ok(),
        tools: model.dialect.tools() && model.shows_tools,
        reasoning: model.thinking.into(),
        since: model.since,
        load: tally.load(),
    }
}
