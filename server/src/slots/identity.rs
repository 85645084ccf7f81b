//! What a slot is called, and what does not change about it.

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use super::SlotPlan;
use crate::metrics::Tally;

/// Names that slots answer to. A model's own name goes to the first that has it.
pub(super) type Taken = Arc<Mutex<BTreeSet<String>>>;

/// A slot's names and what does not change about it.
#[derive(Debug)]
pub(super) struct Identity {
    /// The model as the user spelled it.
    pub reference: String,
    /// The name it was given.
    pub alias: Option<String>,
    /// Whether it stays in memory whatever comes.
    pub pinned: bool,
    /// Memory it shall have, in bytes, if not what it needs for itself.
    pub share_bytes: Option<u64>,
    /// Whether it is loaded before anybody asks.
    pub at_start: bool,
    /// What is counted of it, however often it is loaded.
    pub tally: Arc<Tally>,
    /// The model's own name, once it was located; none if that goes to another slot.
    own: OnceLock<Option<String>>,
    taken: Taken,
    /// True from when it was ready until it fails.
    served: AtomicBool,
}

impl Identity {
    pub fn new(plan: &SlotPlan, taken: Taken) -> Self {
        let (reference, alias) = (plan.starter.reference.clone(), plan.name.clone());
        {
            let mut taken = taken.lock().unwrap_or_else(PoisonError::into_inner);
            taken.insert(reference.clone());
            taken.extend(alias.clone());
        }
        Self {
            reference,
            alias,
            pinned: plan.pinned,
            share_bytes: plan.share_bytes,
            at_start: plan.at_start,
            tally: Arc::default(),
            own: OnceLock::new(),
            taken,
            served: AtomicBool::new(false),
        }
    }

    /// Takes note of the model's own name.
    pub fn located(&self, name: &str) {
        self.own.get_or_init(|| {
            let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
            let free = taken.insert(name.to_owned());
            let mine = name == self.reference || self.alias.as_deref() == Some(name);
            if !free && !mine {
                tracing::warn!(
                    "{} and another model are both called {name}; this one is served as {}",
                    self.reference,
                    self.alias.as_ref().unwrap_or(&self.reference)
                );
            }
            (free || mine).then(|| name.to_owned())
        });
    }

    /// Whether the model's own name is known.
    pub fn is_located(&self) -> bool {
        self.own.get().is_some()
    }

    /// The name it is served under: the given one, or else the model's own once that is known.
    pub fn shown(&self) -> String {
        let own = || self.own.get().and_then(Option::as_ref);
        self.alias.as_ref().or_else(own).unwrap_or(&self.reference).clone()
    }

    pub fn answers_to(&self, name: &str) -> bool {
        let own = self.own.get().and_then(Option::as_deref);
        [Some(self.reference.as_str()), self.alias.as_deref(), own].contains(&Some(name))
    }

    pub fn set_served(&self, served: bool) {
        self.served.store(served, Ordering::Relaxed);
    }

    pub fn served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }
}
