//! Has every linked backend vote on a model, and the election decide.

use std::collections::BTreeMap;

use mesh_core::{
    Ballot, Device, Elected, ElectionError, ElectionRequest, Host, InferenceBackend, ModelFamily, ModelProfile,
    RegistryError, elect, registry,
};
use serde_json::Value;

/// Who may vote, and with what settings.
#[derive(Clone)]
pub struct Electorate {
    backends: Vec<&'static dyn InferenceBackend>,
    families: Vec<&'static dyn ModelFamily>,
    /// Settings by backend id.
    settings: BTreeMap<String, Value>,
}

/// All votes on one model.
#[derive(Clone, Debug)]
pub struct Votes {
    /// One for each backend, sorted by id.
    pub ballots: Vec<Ballot>,
    /// What each backend found on this machine, in the same order.
    pub hosts: Vec<Host>,
}

impl Electorate {
    /// Every backend and family that is linked. `settings` by backend id.
    pub fn linked(settings: BTreeMap<String, Value>) -> Result<Self, RegistryError> {
        let (backends, families) = (registry::backends()?, registry::families()?);
        Ok(Self { backends: backends.iter().collect(), families: families.iter().collect(), settings })
    }

    /// These backends and families.
    pub fn of(
        backends: Vec<&'static dyn InferenceBackend>,
        families: Vec<&'static dyn ModelFamily>,
        settings: BTreeMap<String, Value>,
    ) -> Self {
        Self { backends, families, settings }
    }

    /// The same, with one backend's settings.
    pub fn with_settings(mut self, id: &str, settings: Value) -> Self {
        self.settings.insert(id.to_owned(), settings);
        self
    }

    /// The backends.
    pub fn backends(&self) -> &[&'static dyn InferenceBackend] {
        &self.backends
    }

    /// The backend of that id.
    pub fn backend(&self, id: &str) -> Option<&'static dyn InferenceBackend> {
        self.backends.iter().copied().find(|backend| backend.info().id == id)
    }

    /// A backend's own settings, `Null` where there are none.
    pub fn settings(&self, id: &str) -> Value {
        self.settings.get(id).cloned().unwrap_or_default()
    }

    /// What a backend finds on this machine.
    pub fn host(&self, backend: &dyn InferenceBackend) -> Host {
        backend.host(&self.settings(backend.info().id))
    }

    /// The family that claims a model.
    pub fn family(&self, profile: &ModelProfile) -> Option<&'static dyn ModelFamily> {
        self.families.iter().copied().find(|family| mesh_core::family::claims(*family, profile))
    }

    /// Asks every backend. `memory_bytes` is what a device has for models, as they shall see it: what is available at the
    /// moment lacks what other models hold, and those can be unloaded. Looks at the machine, so not for a thread that
    /// serves connections.
    pub fn votes(&self, profile: &ModelProfile, memory_bytes: impl Fn(&Device) -> Option<u64>) -> Votes {
        let family = self.family(profile);
        let (ballots, hosts) = self
            .backends
            .iter()
            .map(|backend| {
                let mut host = self.host(*backend);
                if let Ok(device) = &mut host.device {
                    device.memory_bytes = memory_bytes(device);
                }
                let verdict = backend.judge(profile, family, &host);
                (Ballot { backend: backend.info(), verdict }, host)
            })
            .unzip();
        Votes { ballots, hosts }
    }
}

impl Votes {
    /// The decision.
    pub fn elect(&self, request: &ElectionRequest) -> Result<Elected, ElectionError> {
        elect(&self.ballots, request)
    }
}
