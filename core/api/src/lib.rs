//! The words and contracts every other room of mesh-llm speaks: no HTTP, no device, no process, no file access.
//!
//! - [`profile`]: what is known about a model, each fact with its source; [`anatomy`]: what its weights are parts of.
//! - [`family`]: who a model is and how it talks; its graph lives in `mesh-graph`.
//! - [`backend`], [`capability`], [`election`]: who can serve it, how well, and who is chosen.
//! - [`engine`]: a loaded model: jobs in, events out.
//! - [`ask`], [`answer`]: a request and its answer, as all surfaces and nodes have them; [`node`]: machines that serve for one
//!   another.
//! - [`queue`]: who waits for a place in an engine, and for how long.
//! - [`sampling`], [`constraint`], [`formats`], [`chat`]: what a request says.
//! - [`registry`]: discovery of what the binary links.
//! - [`error`]: one small enum for each moment that can fail.

pub mod anatomy;
pub mod answer;
pub mod ask;
pub mod backend;
pub mod capability;
pub mod chat;
pub mod constraint;
pub mod election;
pub mod engine;
pub mod error;
pub mod family;
pub mod formats;
pub mod node;
pub mod profile;
pub mod progress;
pub mod queue;
pub mod registry;
pub mod sampling;

/// Used by the registration macros; not part of the API.
#[doc(hidden)]
pub use inventory as __inventory;

pub use anatomy::{Kept, Part, Stored};
pub use answer::Delta;
pub use backend::{BackendInfo, Device, DeviceKind, Host, InferenceBackend, LoadPlan, Need, OptIn};
pub use capability::{Capabilities, Knob, OutputForm, PromptForm};
pub use constraint::{Constraint, Follower, Grammar, Rules};
pub use election::{Ballot, Elected, ElectionRequest, Offer, Reason, Refusal, Verdict, elect};
pub use engine::{
    Candidate, Embed, Embedded, Engine, EngineHandle, EngineState, Event, EventStream, FinishReason, Job, Landmarks,
    Pooling, Prompt, Timings, TokenLogprob, Usage,
};
pub use error::{ElectionError, EmbedError, EngineError, Hint, LoadError, ProbeError, SubmitError, TemplateError};
pub use family::{Claims, Conventions, Fingerprint, ModelFamily, Thinking};
pub use profile::{ChatTemplate, Fact, ModelProfile, Quantization, Source, WeightFormat};
pub use progress::{Progress, ProgressSink, Stage};
pub use registry::{Registry, RegistryError, UnknownName};
pub use sampling::{Dry, Sampling, Xtc};
