//! A loaded model: jobs in, events out.

use std::{fmt, ops::Deref, pin::Pin, sync::Arc, time::Duration};

use async_trait::async_trait;
use futures::Stream;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use crate::{
    ask::Ask,
    backend::{BackendInfo, Device},
    capability::{Capabilities, Knob},
    constraint::Constraint,
    error::{EmbedError, EngineError, SubmitError},
    node::{PartStream, Question, Rejection, Reply},
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
    /// Tokens before which no end-of-text token is drawn.
    pub tokens_min: Option<u32>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Alternatives to report with each token; absent reports no probabilities.
    pub logprobs: Option<u32>,
    /// What the answer has to be.
    pub constraint: Option<Constraint>,
    /// Special tokens that engines whose output form is text show in it; others are left out.
    pub shown: Vec<String>,
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
    /// A job that continues `prompt`, with nothing set.
    pub fn new(id: impl Into<String>, prompt: Prompt) -> Self {
        Self {
            id: id.into(),
            prompt,
            sampling: Sampling::default(),
            tokens_max: None,
            tokens_min: None,
            ignore_eos: false,
            logprobs: None,
            constraint: None,
            shown: Vec::new(),
            landmarks: Landmarks::default(),
        }
    }

    /// The request parameters that are set.
    pub fn knobs(&self) -> Vec<Knob> {
        let mut knobs = self.sampling.knobs();
        knobs.extend(self.tokens_min.map(|_| Knob::MinTokens));
        knobs.extend(self.ignore_eos.then_some(Knob::IgnoreEos));
        knobs.extend(self.logprobs.map(|_| Knob::Logprobs));
        knobs.extend(self.constraint.as_ref().map(|constraint| constraint.grammar.knob()));
        knobs
    }
}

/// Why a generation ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FinishReason {
    /// An end-of-text token.
    Stop,
    /// `tokens_max`, or the end of the context.
    Length,
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Usage {
    /// Tokens in the prompt.
    pub prompt_tokens: u32,
    /// Of those, how many were not computed again.
    pub cached_tokens: u32,
    /// Tokens generated, an end-of-text token included.
    pub completion_tokens: u32,
}

/// Where the time went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// Reading the prompt.
    pub prefill: Duration,
    /// Writing the answer.
    pub decode: Duration,
}

/// A token that could have been chosen.
#[derive(Clone, Debug, PartialEq)]
pub struct Candidate {
    /// Its id.
    pub id: u32,
    /// Its bytes, from engines whose output form is text.
    pub bytes: Option<Vec<u8>>,
    /// The natural logarithm of its probability before any sampling step: the softmax of the model's own logits.
    pub logprob: f32,
}

/// The token that was chosen, and the likeliest ones in its place.
#[derive(Clone, Debug, PartialEq)]
pub struct TokenLogprob {
    /// The chosen one.
    pub chosen: Candidate,
    /// As many as the job asks for, likeliest first.
    pub top: Vec<Candidate>,
}

/// Texts to be turned into vectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Embed {
    /// Names it in logs.
    pub id: String,
    /// The texts, each as in [`Job::prompt`].
    pub inputs: Vec<Prompt>,
    /// How the states of an input's tokens become one vector.
    pub pooling: Pooling,
}

/// How the last layer's states, after the last norm, become one vector.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Their mean.
    #[default]
    Mean,
    /// That of the last token.
    Last,
}

/// Vectors for texts.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Embedded {
    /// One for each input, of length 1.
    pub vectors: Vec<Vec<f32>>,
    /// Tokens in all inputs.
    pub prompt_tokens: u32,
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
        /// How likely it was, where the job asks for it.
        logprob: Option<Box<TokenLogprob>>,
    },
    /// A piece of text, from engines whose output form is text.
    Text {
        /// The text.
        text: String,
        /// Tokens it was made of.
        tokens: u32,
        /// How likely each was, where the job asks for it.
        logprobs: Vec<TokenLogprob>,
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

    /// Turns texts into vectors, where the capabilities say so. Dropping the future gives it up within one step.
    async fn embed(&self, embed: Embed) -> Result<Embedded, EmbedError> {
        let _ = embed;
        Err(EmbedError::Unsupported)
    }

    /// Token ids of a text, from engines that take text and let others see what they make of it; `None` from the rest.
    async fn tokenize(&self, text: &str, add_special: bool) -> Result<Option<Vec<u32>>, EngineError> {
        let _ = (text, add_special);
        Ok(None)
    }

    /// The text of token ids, special ones included, from engines that offer [`Engine::tokenize`]; `None` from the rest.
    async fn detokenize(&self, ids: &[u32]) -> Result<Option<String>, EngineError> {
        let _ = ids;
        Ok(None)
    }

    /// Answers a request whole, from engines that take conversations ([`PromptForm::Chat`](crate::PromptForm)). Dropping
    /// the stream cancels it within one step.
    async fn answer(&self, ask: Ask) -> Result<PartStream, Rejection> {
        let _ = ask;
        Err(Rejection::failed("the engine does not take conversations"))
    }

    /// Answers what can be said without generating, from the same engines.
    async fn reply(&self, question: Question) -> Result<Reply, Rejection> {
        let _ = question;
        Err(Rejection::failed("the engine does not take questions"))
    }

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
