//! The contract of a backend. Adding one is one crate that implements [`InferenceBackend`] and calls
//! [`register_backend!`](crate::register_backend).

use std::{fmt, sync::Arc};

use async_trait::async_trait;
use serde::Serialize;

use crate::{
    election::{Offer, Verdict},
    engine::EngineHandle,
    error::LoadError,
    family::ModelFamily,
    node::NodeOffer,
    profile::{ModelProfile, WeightFormat},
    progress::ProgressSink,
};

/// A backend's constant identity.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct BackendInfo {
    /// Unique id, such as `llama-server`; what `--backend` takes.
    pub id: &'static str,
    /// One line on what it is.
    pub title: &'static str,
    /// The weight formats it reads; none if it needs no weights on this machine.
    pub formats: &'static [WeightFormat],
    /// Present if users have to ask for it.
    pub opt_in: Option<OptIn>,
}

/// How a backend that is not chosen on its own is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct OptIn {
    /// The command-line flag, such as `--mlx`.
    pub flag: &'static str,
    /// Printed once when it is used.
    pub notice: &'static str,
}

/// What kind of processor computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum DeviceKind {
    Cpu,
    Metal,
    Cuda,
    /// Chosen by a process of its own.
    External,
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Cpu => "cpu",
            Self::Metal => "metal",
            Self::Cuda => "cuda",
            Self::External => "external",
        })
    }
}

/// A device that a backend would compute on.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Device {
    /// Its kind.
    pub kind: DeviceKind,
    /// Its name, for people.
    pub name: String,
    /// Memory that models can use there, in bytes, where known.
    pub memory_bytes: Option<u64>,
}

/// What a backend found on this machine at this moment. Handed back to [`InferenceBackend::judge`].
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Host {
    /// The device it would use, or why it cannot run here at all and what would change that.
    pub device: Result<Device, String>,
    /// Remarks for `explain` and `backends`: which binary was found, what would be installed.
    pub notes: Vec<String>,
    /// What other machines have ready, for a backend that serves by them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub others: Vec<NodeOffer>,
}

impl Host {
    /// With a device of this machine, or without.
    pub fn new(device: Result<Device, String>, notes: Vec<String>) -> Self {
        Self { device, notes, others: Vec::new() }
    }
}

/// What serving one sequence takes, in bytes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Need {
    /// The weights as they lie in memory.
    pub weights_bytes: u64,
    /// What is kept of the sequence.
    pub cache_bytes: u64,
    /// What computing takes besides.
    pub workspace_bytes: u64,
    /// What the device has to have for that, with what is left for others.
    pub device_bytes: u64,
}

/// Everything a backend needs to load a model: the result of an election.
#[derive(Clone)]
pub struct LoadPlan {
    /// The model.
    pub profile: Arc<ModelProfile>,
    /// Its family, where one claims it.
    pub family: Option<&'static dyn ModelFamily>,
    /// What the backend offered.
    pub offer: Offer,
    /// Context asked for by the user, in tokens; absent leaves the choice to the backend.
    pub context_tokens: Option<u32>,
    /// What the engine may hold of its device's memory, in bytes, where it shares it with others; absent leaves it all of
    /// what the device has.
    pub memory_bytes: Option<u64>,
    /// The backend's own section of the settings.
    pub settings: serde_json::Value,
}

impl fmt::Debug for LoadPlan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LoadPlan")
            .field("model", &self.profile.name)
            .field("family", &self.family.map(|family| family.id()))
            .field("context_tokens", &self.context_tokens)
            .finish_non_exhaustive()
    }
}

/// A way to serve models.
#[async_trait]
pub trait InferenceBackend: Send + Sync {
    /// Constant identity.
    fn info(&self) -> &'static BackendInfo;

    /// Could it run on this machine at all, and on what? `settings` is its own section of the settings (`Null` where
    /// there is none). May look at the machine; must be quick.
    fn host(&self, settings: &serde_json::Value) -> Host;

    /// Would it serve this model, and how well? Pure: opens no file, asks no device.
    fn judge(&self, profile: &ModelProfile, family: Option<&dyn ModelFamily>, host: &Host) -> Verdict;

    /// What a sequence of so many tokens takes, by the arithmetic that loads plan with; `None` where that cannot be told, or
    /// the model would not be served. Pure.
    fn need(&self, profile: &ModelProfile, host: &Host, context_tokens: u32) -> Option<Need> {
        let _ = (profile, host, context_tokens);
        None
    }

    /// Loads the model; returns when a first request would be admitted. Dropping the future abandons the load.
    async fn load(&self, plan: LoadPlan, progress: ProgressSink) -> Result<EngineHandle, LoadError>;
}
