//! A loaded model: jobs in, events out.

use std::{fmt, ops::Deref, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::Stream;
use serde::Serialize;
use tokio::sync::watch;

use crate::{
    backend::{BackendInfo, Device},
    capability::{Capabilities, Knob},
    error::{EngineError, SubmitError},
    sampling::Sampling,
};

/// A prompt in one of the forms of [`PromptForm`](crate::PromptForm).
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Prompt {
    /// Token ids, complete: nothing is added to them.
    Tokens(Vec<u32>),
    /// Text for the engine to tokenize.
    Text {
        /// The text; special tokens in it are recognised.
        text: String,
        /// Whether the tokenizer adds its own begin-of-text token, as for raw text. False for rendered templates,
        /// which write it themselves.
        add_special: bool,
    },
}

/// One generation.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    /// Names it in logs.
    pub id: String,
    /// What to continue.
    pub prompt: Prompt,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate; absent means up to the end of the context.
    pub tokens_max: Option<u32>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Alternatives to report with each token; absent reports no probabilities.
    pub logprobs: Option<u32>,
    /// Where other prompts are likely to part from this one.
    pub landmarks: Landmarks,
}

/// Points of a prompt that are worth remembering, counted in tokens from its start. They change no answer, only how much
/// of the next prompt is known already.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Landmarks {
    /// Where messages end, ascending. Templates that rewrite history, as those do that strip old reasoning, keep it up to
    /// one of these.
    pub message_ends: Vec<u32>,
    /// Where what conversations begin with ends: the system prompt and the tools. Kept longest.
    pub preamble_end: Option<u32>,
}

impl Job {
    /// The request parameters that are set.
    pub fn knobs(&self) -> Vec<Knob> {
        let mut knobs = self.sampling.knobs();
        knobs.extend(self.ignore_eos.then_some(Knob::IgnoreEos));
        knobs.extend(self.logprobs.map(|_| Knob::Logprobs));
        knobs
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token.
    Stop,
    /// `tokens_max`, or the end of the context.
    Length,
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Of those, how many were not computed again.
    pub cached_tokens: u32,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: u32,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Timings {
    /// Reading the prompt.
    pub prefill: Duration,
    /// Writing the answer.
    pub decode: Duration,
}

/// What an engine reports about one job. The stream ends with exactly one [`Event::Finished`] or one error.
#[derive(Clone, Debug, PartialEq)]
pub enum Event {
    /// The job waits for a place.
    Queued {
        /// Jobs before it.
        ahead: u32,
    },
    /// The prompt is being read: `done` of `total` tokens.
    Prefill {
        /// Tokens read, cached ones included.
        done: u32,
        /// Tokens in the prompt.
        total: u32,
        /// Tokens that were not computed, because they were known.
        cached: u32,
    },
    /// One token, from engines whose output form is tokens. End-of-text tokens are not reported.
    Token {
        /// Its id.
        id: u32,
    },
    /// A piece of text, from engines whose output form is text.
    Text {
        /// The text.
        text: String,
        /// Tokens it was made of.
        tokens: u32,
    },
    /// The end.
    Finished {
        /// Why.
        reason: FinishReason,
        /// How much.
        usage: Usage,
        /// How long.
        timings: Timings,
    },
}

/// The events of one job, bounded. Dropping it cancels the job within one step.
pub type EventStream = Pin<Box<dyn Stream<Item = Result<Event, EngineError>> + Send>>;

/// `Starting → Ready → Draining → Stopped`, and from any of them `Failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum EngineState {
    Starting,
    Ready,
    Draining,
    Stopped,
    /// It broke; the reason is for people.
    Failed(Arc<str>),
}

impl EngineState {
    /// True once nothing will be served any more.
    pub fn is_over(&self) -> bool {
        matches!(self, Self::Stopped | Self::Failed(_))
    }
}

/// What a backend implements for a loaded model.
#[async_trait]
pub trait Engine: Send + Sync {
    /// What it accepts and promises; constant.
    fn capabilities(&self) -> &Capabilities;

    /// Its state, to look at or to wait on.
    fn state(&self) -> watch::Receiver<EngineState>;

    /// Admits or refuses at once. An admitted job ends by itself, or when the stream is dropped.
    async fn submit(&self, job: Job) -> Result<EventStream, SubmitError>;

    /// Refuses new jobs, lets running ones finish for `grace`, cancels the rest, gives back what it holds, and returns
    /// when the state is over. May be called more than once.
    async fn drain(&self, grace: Duration);
}

/// A loaded model with its identity: what callers hold.
#[derive(Clone)]
pub struct EngineHandle {
    /// Who serves it.
    pub backend: &'static BackendInfo,
    /// What it runs on.
    pub device: Device,
    engine: Arc<dyn Engine>,
}

impl EngineHandle {
    /// Wraps an engine that is ready.
    pub fn new(backend: &'static BackendInfo, device: Device, engine: Arc<dyn Engine>) -> Self {
        Self { backend, device, engine }
    }

    /// The state at this moment.
    pub fn state_now(&self) -> EngineState {
        self.engine.state().borrow().clone()
    }

    /// Waits until nothing will be served any more, and says how it ended.
    pub async fn ended(&self) -> EngineState {
        let mut state = self.engine.state();
        match state.wait_for(EngineState::is_over).await {
            Ok(state) => state.clone(),
            Err(_) => EngineState::Stopped,
        }
    }
}

impl Deref for EngineHandle {
    type Target = dyn Engine;

    fn deref(&self) -> &Self::Target {
        &*self.engine
    }
}

impl fmt::Debug for EngineHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EngineHandle").field("backend", &self.backend.id).field("state", &self.state_now()).finish()
    }
}
