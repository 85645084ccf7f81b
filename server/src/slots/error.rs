//! Why a model is not there to answer.

use std::{sync::Arc, time::Duration};

use bytesize::ByteSize;
use mesh_core::{ElectionError, Hint, LoadError, ProbeError};
use mesh_models::FetchError;

use super::Pool;
use crate::served::VoiceError;

/// Finding room for a model.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RoomError {
    /// It would not fit if all that may be evicted were.
    #[error(
        "{model} needs {} for its weights, and models may hold {} in {pool}{}",
        ByteSize(*.needed_bytes), ByteSize(*.budget_bytes), pinned(*.pinned_bytes)
    )]
    Never {
        /// The model.
        model: String,
        /// Where it would be.
        pool: Pool,
        /// What it needs at least.
        needed_bytes: u64,
        /// What all models may hold.
        budget_bytes: u64,
        /// What those hold that are never evicted.
        pinned_bytes: u64,
    },
    /// Others were busy for too long.
    #[error(
        "{model} needs {}, and for {} s others were busy with {} of the {} that models may hold in {pool}",
        ByteSize(*.needed_bytes), .waited.as_secs(), ByteSize(*.held_bytes), ByteSize(*.budget_bytes)
    )]
    Late {
        /// The model.
        model: String,
        /// Where it would be.
        pool: Pool,
        /// What it needs.
        needed_bytes: u64,
        /// What others hold.
        held_bytes: u64,
        /// What all models may hold.
        budget_bytes: u64,
        /// How long it waited.
        waited: Duration,
    },
}

fn pinned(bytes: u64) -> String {
    if bytes == 0 { String::new() } else { format!(", of which pinned ones hold {}", ByteSize(bytes)) }
}

impl Hint for RoomError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Never { pinned_bytes: 0, .. } => {
                Some("choose a smaller model or quantization, or give models more with --memory".into())
            }
            Self::Never { .. } => {
                Some("pin fewer models, choose a smaller one, or give them more with --memory".into())
            }
            Self::Late { .. } => Some("try again later".into()),
        }
    }
}

/// Getting a model ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// It could not be found or fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It could not be read.
    #[error(transparent)]
    Probe(#[from] ProbeError),
    /// Nobody may or would serve it.
    #[error(transparent)]
    Election(#[from] ElectionError),
    /// It cannot be talked with.
    #[error(transparent)]
    Voice(#[from] VoiceError),
    /// There is no room for it.
    #[error(transparent)]
    Room(#[from] RoomError),
    /// The backend could not load it.
    #[error(transparent)]
    Load(#[from] LoadError),
    /// Its engine was ready and broke.
    #[error("the engine failed: {what}")]
    Engine {
        /// Why.
        what: Arc<str>,
    },
    /// A part of the server broke.
    #[error("the server failed while {what}")]
    Panicked {
        /// What was being done.
        what: &'static str,
    },
}

impl Hint for StartError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Fetch(error) => error.hint(),
            Self::Probe(error) => error.hint(),
            Self::Election(error) => error.hint(),
            Self::Voice(error) => error.hint(),
            Self::Room(error) => error.hint(),
            Self::Load(error) => error.hint(),
            Self::Engine { .. } | Self::Panicked { .. } => None,
        }
    }
}

/// A request for a model that could not be had.
#[derive(Clone, Debug, thiserror::Error)]
pub enum SlotError {
    /// No slot has that name.
    #[error("no model is called `{name}`; served here: {}", .served.join(", "))]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        served: Vec<String>,
    },
    /// No slot has that name, but one is still looking for its model, whose name may be it.
    #[error("no model is called `{name}`, but {loading} is still being looked for")]
    NotYetKnown {
        /// What was asked for.
        name: String,
        /// What is looked for.
        loading: String,
    },
    /// It failed, and may not be tried again yet.
    #[error("{model} failed {}: {reason}", times(.failures))]
    Failed {
        /// The model.
        model: String,
        /// Failures in a row.
        failures: u32,
        /// The last one.
        reason: Arc<StartError>,
        /// When the next request may try again.
        retry_after: Duration,
    },
    /// No room came free for it in time.
    #[error("{0}")]
    NoRoom(RoomError),
    /// As many requests as may wait for the model do so already.
    #[error("{model} is still loading, and {waiting} requests wait for it already")]
    Crowded {
        /// The model.
        model: String,
        /// Requests waiting.
        waiting: usize,
    },
    /// The server is shutting down.
    #[error("the server is shutting down")]
    Stopped,
}

fn times(failures: &u32) -> String {
    if *failures == 1 { "once".into() } else { format!("{failures} times in a row") }
}

impl Hint for SlotError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Unknown { .. } => Some("GET /v1/models lists the models".into()),
            Self::Failed { reason, .. } => reason.hint(),
            Self::NoRoom(error) => error.hint(),
            Self::Crowded { .. } | Self::NotYetKnown { .. } => Some("try again once /readyz answers 200".into()),
            Self::Stopped => None,
        }
    }
}
