//! Models that others serve: each becomes a model like those here, with an engine that hands requests on.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use mesh_core::node::{Elsewhere, Here, ModelOffer, NodeOffer, RemoteModel, Routing};

use super::Slot;
use crate::{defaults::Manner, metrics::Tally, served::ServedModel};

/// Models of others that are kept at hand, and counted.
const MODELS_MAX: usize = 1024;

/// Everything that others serve.
#[derive(Default)]
pub struct RemoteModels {
    sources: Vec<Arc<dyn Elsewhere>>,
    manner: Manner,
    made: Mutex<AllMade>,
}

#[derive(Default)]
struct AllMade {
    /// By the name that is asked for.
    models: BTreeMap<String, (ModelOffer, Arc<ServedModel>)>,
    /// By the name that is shown.
    tallies: BTreeMap<String, Arc<Tally>>,
}

impl RemoteModels {
    /// Of so many sources, the first one first, presented to clients in this manner.
    pub fn new(sources: Vec<Arc<dyn Elsewhere>>, manner: Manner) -> Self {
        Self { sources, manner, made: Mutex::default() }
    }

    /// The sources.
    pub fn sources(&self) -> &[Arc<dyn Elsewhere>] {
        &self.sources
    }

    /// The models, by name, each with all who offer it and the kind of the first.
    pub fn list(&self) -> BTreeMap<String, (&'static str, RemoteModel)> {
        let mut found = BTreeMap::<String, (&'static str, RemoteModel)>::new();
        for source in &self.sources {
            for model in source.models() {
                match found.entry(model.name.clone()) {
                    Entry::Vacant(free) => drop(free.insert((source.kind(), model))),
                    Entry::Occupied(mut taken) => taken.get_mut().1.nodes.extend(model.nodes),
                }
            }
        }
        found
    }

    /// Their names.
    pub fn names(&self) -> Vec<String> {
        self.list().into_keys().collect()
    }

    /// The model of that name, if anybody offers it.
    pub(super) fn model(&self, name: &str) -> Option<Arc<ServedModel>> {
        self.sources.iter().find_map(|source| self.model_of(&**source, name))
    }

    /// The same, where a request goes there though the model is here as well.
    pub(super) fn instead_of(&self, slot: &Slot, name: &str) -> Option<Arc<ServedModel>> {
        if self.sources.is_empty() {
            return None;
        }
        let (here, shown) = (slot.here(), slot.name());
        let asked = [name, &shown].into_iter().take(if shown == name { 1 } else { 2 });
        asked.flat_map(|name| self.sources.iter().map(move |source| (name, source))).find_map(|(name, source)| {
            if source.goes_there(name, here) { self.model_of(&**source, name) } else { None }
        })
    }

    /// Why a request goes where it goes, as the first says that knows the model.
    pub(super) fn explain(&self, name: &str, here: Option<Here>) -> Option<Routing> {
        self.sources.iter().find_map(|source| source.explain(name, here))
    }

    fn model_of(&self, source: &dyn Elsewhere, name: &str) -> Option<Arc<ServedModel>> {
        let (handle, NodeOffer { offer, .. }) = source.engine(name)?;
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        let before = made.models.get(name);
        if let Some((_, model)) = before.filter(|(before, _)| same(before, &offer)) {
            return Some(model.clone());
        }
        let model = match ServedModel::elsewhere(&offer, handle, self.manner) {
            Ok(model) => Arc::new(model),
            Err(error) => {
                tracing::error!(model = name, %error, "what others offer cannot be used");
                return None;
            }
        };
        // Apart from what is counted of a model of that name here: that says how busy this machine is.
        let shown = format!("{}@{}", offer.name, source.kind());
        if made.tallies.len() < MODELS_MAX || made.tallies.contains_key(&shown) {
            model.count(shown.clone(), made.tallies.entry(shown).or_default().clone());
        }
        if made.models.len() >= MODELS_MAX && !made.models.contains_key(name) {
            // Any will do: it is made again when it is asked for.
            made.models.pop_first();
        }
        made.models.insert(name.to_owned(), (offer, model.clone()));
        Some(model)
    }

    /// What is counted of those that were asked for, by name.
    pub(crate) fn tallies(&self) -> Vec<(String, Arc<Tally>)> {
        let made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        made.tallies.iter().map(|(name, tally)| (name.clone(), tally.clone())).collect()
    }
}

/// Whether the same may be asked of both. How busy they are is for each request to look at.
fn same(one: &ModelOffer, other: &ModelOffer) -> bool {
    let timeless = |offer: &ModelOffer| ModelOffer { load: Default::default(), since: 0, ..offer.clone() };
    timeless(one) == timeless(other)
}

impl fmt::Debug for RemoteModels {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.sources.iter().map(|source| source.kind())).finish()
    }
}
