//! What is known about a slot's model, whether it is loaded or not.

use std::sync::{Arc, Mutex, PoisonError};

use mesh_core::{Capabilities, ModelFamily, ModelProfile, Thinking};

use super::StartStep;
use crate::voting::Electorate;

/// What is known about a model. It stays known when the model is unloaded.
#[derive(Clone, Default)]
pub struct Known {
    /// Its facts, once it was located.
    pub profile: Option<Arc<ModelProfile>>,
    /// Its family, where one claims it.
    pub family: Option<&'static dyn ModelFamily>,
    /// How its reasoning is switched.
    pub thinking: Option<Thinking>,
    /// The backend that was elected, and what it promised.
    pub elected: Option<(&'static str, Capabilities)>,
    /// Whether it can call tools, once it was ready.
    pub tools: Option<bool>,
    /// Whether it has a chat template that compiles, once it was ready.
    pub chat: Option<bool>,
}

impl std::fmt::Debug for Known {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Known").field("family", &self.family.map(|family| family.id())).finish_non_exhaustive()
    }
}

/// Filled by the steps of starts.
#[derive(Debug, Default)]
pub(super) struct Notes(Mutex<Known>);

impl Notes {
    pub fn now(&self) -> Known {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub fn located(&self, profile: &Arc<ModelProfile>, electorate: &Electorate) {
        let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        known.profile = Some(profile.clone());
        known.family = electorate.family(profile);
        known.thinking = known.family.map(|family| family.conventions().thinking);
    }

    pub fn step(&self, step: &StartStep, electorate: &Electorate) {
        match step {
            StartStep::Located(profile) => self.located(profile, electorate),
            StartStep::Elected(elected) => {
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                known.elected = Some((elected.backend.id, elected.offer.capabilities.clone()));
            }
            StartStep::Ready(model) => {
                let mut known = self.0.lock().unwrap_or_else(PoisonError::into_inner);
                known.elected = Some((model.handle.backend.id, model.handle.capabilities().clone()));
                known.thinking = Some(model.thinking);
                known.tools = Some(model.dialect.tools() && model.shows_tools);
                known.chat = Some(model.template(false).is_ok());
            }
            StartStep::Locating { .. } | StartStep::Failed(_) => {}
        }
    }
}
