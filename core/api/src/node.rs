//! Machines that serve for one another: what one offers, what it is asked, and what it answers.
//!
//! A node's own server is a [`Local`] to those who bring requests from elsewhere; what others serve is an [`Elsewhere`] to the
//! server. Both speak of requests and answers as [`ask`](crate::ask) and [`answer`](crate::answer) have them.

use std::{pin::Pin, time::Duration};

use async_trait::async_trait;
use futures::Stream;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::sync::watch;

use crate::{
    answer::Part,
    ask::{Ask, Chat, Subject},
    capability::Capabilities,
    engine::{Embedded, EngineHandle, Pooling},
    error::EngineError,
    family::Thinking,
    profile::WeightFormat,
};

/// The parts of one answer, bounded. It ends with exactly one [`Part::Finished`] or one error; dropping it cancels the
/// request within one step.
pub type PartStream = Pin<Box<dyn Stream<Item = Result<Part, EngineError>> + Send>>;

/// A request that was turned down, in the words its client reads: the form in which that passes between machines.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct Rejection {
    /// Whose fault it is.
    pub kind: RejectionKind,
    /// A word for programs, such as `context_length_exceeded`.
    pub code: String,
    /// What was wrong, and what to do next.
    pub message: String,
    /// The request's field that it is about.
    #[serde(default)]
    pub param: Option<String>,
    /// When to try again.
    #[serde(default)]
    pub retry_after: Option<Duration>,
}

/// Whose fault a rejection is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum RejectionKind {
    /// The request's.
    Invalid,
    /// The request's: it names what is not there.
    NotFound,
    /// Nobody's: another time it may be admitted.
    Unavailable,
    /// The machine's.
    Failed,
}

impl Rejection {
    /// The machine's own failure.
    pub fn failed(what: impl Into<String>) -> Self {
        Self::new(RejectionKind::Failed, "engine_failed", what)
    }

    /// Nobody can serve it now; try again.
    pub fn unavailable(code: &str, what: impl Into<String>, retry_after: Duration) -> Self {
        Self { retry_after: Some(retry_after), ..Self::new(RejectionKind::Unavailable, code, what) }
    }

    /// A rejection without further particulars.
    pub fn new(kind: RejectionKind, code: &str, what: impl Into<String>) -> Self {
        Self { kind, code: code.to_owned(), message: what.into(), param: None, retry_after: None }
    }

    /// Whether another machine might serve the same request.
    pub fn may_go_elsewhere(&self) -> bool {
        match self.kind {
            RejectionKind::Invalid => false,
            RejectionKind::NotFound | RejectionKind::Unavailable | RejectionKind::Failed => true,
        }
    }
}

/// What is asked of a model without having it generate.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Question {
    /// A conversation as its template writes it.
    Render {
        /// The conversation.
        chat: Chat,
        /// Whether the assistant's turn is opened.
        add_generation_prompt: bool,
    },
    /// The tokens of a text.
    Tokenize {
        /// The text; special tokens in it are recognised.
        text: String,
        /// Whether the tokenizer adds its own begin-of-text token and the like.
        add_special: bool,
        /// Whether each token's bytes are wanted, too.
        pieces: bool,
    },
    /// The text of tokens, special ones included.
    Detokenize {
        /// Their ids.
        ids: Vec<u32>,
    },
    /// How many tokens a prompt has.
    Count {
        /// What is asked.
        subject: Subject,
    },
    /// Texts as vectors.
    Embed {
        /// Names it in logs.
        id: String,
        /// The texts.
        inputs: Vec<Subject>,
        /// How the states of an input's tokens become one vector.
        pooling: Pooling,
    },
}

/// The answer to a [`Question`], of the kind that it asks for.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reply {
    /// To [`Question::Render`] and [`Question::Detokenize`].
    Text(String),
    /// To [`Question::Tokenize`].
    Tokens {
        /// Their ids.
        ids: Vec<u32>,
        /// Their bytes, where they were asked for.
        pieces: Vec<Vec<u8>>,
    },
    /// To [`Question::Count`].
    Count(u64),
    /// To [`Question::Embed`].
    Vectors(Embedded),
}

/// A model that is ready on some machine: what is known of it there, and what may be asked of it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct ModelOffer {
    /// The name it is served under.
    pub name: String,
    /// Where it is from, such as `org/repo`.
    #[serde(default)]
    pub reference: Option<String>,
    /// The commit of that.
    #[serde(default)]
    pub revision: Option<String>,
    /// A hash of its weights, in hexadecimal.
    #[serde(default)]
    pub hash: Option<String>,
    /// The backend that serves it.
    pub backend: String,
    /// How its weights are stored.
    #[serde(default)]
    pub format: Option<WeightFormat>,
    /// The prevailing quantization.
    #[serde(default)]
    pub quantization: Option<String>,
    /// Number of parameters.
    #[serde(default)]
    pub parameters: Option<u64>,
    /// Size of its weights, in bytes.
    #[serde(default)]
    pub weight_bytes: Option<u64>,
    /// The family that claims it.
    #[serde(default)]
    pub family: Option<String>,
    /// The dialect of its answers.
    #[serde(default)]
    pub dialect: Option<String>,
    /// What requests may ask of it.
    pub capabilities: Capabilities,
    /// Whether it has a chat template.
    #[serde(default)]
    pub chat: bool,
    /// Whether it calls tools.
    #[serde(default)]
    pub tools: bool,
    /// How its reasoning is switched.
    #[serde(default)]
    pub reasoning: Reasoning,
    /// Seconds since 1970 at which it became ready.
    #[serde(default)]
    pub since: u64,
    /// How busy it is.
    #[serde(default)]
    pub load: Load,
}

impl ModelOffer {
    /// A model of which no more is known than what may be asked of it, and that takes texts only.
    pub fn new(name: impl Into<String>, backend: impl Into<String>, capabilities: Capabilities) -> Self {
        Self {
            name: name.into(),
            reference: None,
            revision: None,
            hash: None,
            backend: backend.into(),
            format: None,
            quantization: None,
            parameters: None,
            weight_bytes: None,
            family: None,
            dialect: None,
            capabilities,
            chat: false,
            tools: false,
            reasoning: Reasoning::None,
            since: 0,
            load: Load::default(),
        }
    }
}

/// How reasoning is switched.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reasoning {
    /// Not at all.
    #[default]
    None,
    /// On and off.
    Switch,
    /// In levels.
    Effort,
}

impl From<Thinking> for Reasoning {
    fn from(thinking: Thinking) -> Self {
        match thinking {
            Thinking::Fixed => Self::None,
            Thinking::Variable(_) => Self::Switch,
            Thinking::Effort(_) => Self::Effort,
        }
    }
}

/// How busy a model is, and how fast.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Load {
    /// Requests that are computed.
    pub running: u32,
    /// Requests in line.
    pub waiting: u32,
    /// Prompt tokens that one request's prompt is read by a second, as measured; absent before there was one.
    pub prefill_per_s: Option<f32>,
    /// Tokens that one request gets a second, as measured.
    pub decode_per_s: Option<f32>,
}

/// What one machine offers of a model, as clients are told: no address.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct NodeOffer {
    /// The machine's name among those it serves for.
    pub node: String,
    /// The offer.
    pub offer: ModelOffer,
}

/// A model that others serve.
#[derive(Clone, Debug, PartialEq)]
pub struct RemoteModel {
    /// Its name.
    pub name: String,
    /// Who offers it; one at least.
    pub nodes: Vec<NodeOffer>,
}

/// How a model is on this machine that others may have, too.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Here {
    /// It has to be loaded first.
    Cold,
    /// It is loaded.
    Ready {
        /// Requests that are computed.
        running: u32,
        /// Requests in line.
        waiting: u32,
        /// Requests that are computed at the same time.
        parallel: u32,
    },
}

/// Why a request would go where it goes.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Routing {
    /// Whether it goes to another machine.
    pub elsewhere: bool,
    /// Why, in a clause.
    pub why: String,
    /// The machines that offer the model, best first, each with what is expected of it.
    pub machines: Vec<String>,
}

/// What a server does for requests that come from elsewhere. It serves what is ready there, and passes nothing on.
#[async_trait]
pub trait Local: Send + Sync {
    /// What is ready at this moment.
    fn offers(&self) -> Vec<ModelOffer>;

    /// How busy that is, by name. This is asked several times a second, and should cost little.
    fn loads(&self) -> Vec<(String, Load)> {
        self.offers().into_iter().map(|offer| (offer.name, offer.load)).collect()
    }

    /// Changes whenever something became ready or is not any more.
    fn changes(&self) -> watch::Receiver<u64>;

    /// Answers a request.
    async fn answer(&self, model: &str, ask: Ask) -> Result<PartStream, Rejection>;

    /// Answers a question.
    async fn reply(&self, model: &str, question: Question) -> Result<Reply, Rejection>;
}

/// What a server cannot do itself and others can. Nothing here waits.
pub trait Elsewhere: Send + Sync {
    /// What it is, in a word: `mesh`.
    fn kind(&self) -> &'static str;

    /// The models, by name.
    fn models(&self) -> Vec<RemoteModel>;

    /// An engine for the model of that name, or for the one on a certain machine (`model@node`); `None` if nobody offers
    /// it. Where those who did were lost just now, it turns requests down with the advice to try again. Its prompts are [`PromptForm::Chat`](crate::PromptForm); each request finds its own way.
    fn engine(&self, name: &str) -> Option<(EngineHandle, NodeOffer)>;

    /// Whether a request for the model goes there, though the model is here as well.
    fn goes_there(&self, name: &str, here: Here) -> bool {
        let _ = name;
        here == Here::Cold
    }

    /// Why a request for the model would go where it goes now; `here` is how this machine has it, if it does. `None` if
    /// nobody offers it.
    fn explain(&self, name: &str, here: Option<Here>) -> Option<Routing> {
        let _ = (name, here);
        None
    }

    /// Changes whenever the models do.
    fn changes(&self) -> watch::Receiver<u64>;

    /// What is to be seen of it: nodes, offers, counts. For people and programs, without addresses.
    fn status(&self) -> Value;
}
