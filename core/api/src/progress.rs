//! Progress of long work (downloads, loads), told to whoever draws it.

use std::{fmt, sync::Arc};

/// What is going on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Stage {
    /// A file is being fetched; `done` and `total` count bytes.
    Download {
        /// The file's name.
        file: String,
    },
    /// Software a backend needs is being installed.
    Install {
        /// What is installed.
        what: String,
    },
    /// A file is being converted; `done` and `total` count tensors.
    Import {
        /// What is converted.
        what: String,
    },
    /// Weights are being quantized; `done` and `total` count values.
    Convert {
        /// What is converted.
        what: String,
    },
    /// Files are being hashed; `done` and `total` count bytes.
    Check {
        /// What is checked.
        what: String,
    },
    /// Weights are being read; `done` and `total` count bytes where known.
    Load {
        /// The model's name.
        what: String,
    },
}

/// One report of progress.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Progress {
    /// What is going on.
    pub stage: Stage,
    /// Units done so far.
    pub done: u64,
    /// Units in all, where known. `done == total` is the last report of a stage.
    pub total: Option<u64>,
}

/// Where progress is reported. Cheap to clone; never blocks the work.
#[derive(Clone)]
pub struct ProgressSink(Arc<dyn Fn(Progress) + Send + Sync>);

impl ProgressSink {
    /// A sink that calls `report`, which has to return quickly.
    pub fn new(report: impl Fn(Progress) + Send + Sync + 'static) -> Self {
        Self(Arc::new(report))
    }

    /// A sink that nobody watches.
    pub fn silent() -> Self {
        Self::new(|_| {})
    }

    /// Reports `done` of `total` units of `stage`.
    pub fn report(&self, stage: &Stage, done: u64, total: Option<u64>) {
        (self.0)(Progress { stage: stage.clone(), done, total });
    }
}

impl fmt::Debug for ProgressSink {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("ProgressSink")
    }
}
