//! One small enum for each moment that can fail. `Display` says what was wrong, [`Hint::hint`] what to do next; HTTP
//! status codes exist in the server alone.

use std::{path::PathBuf, sync::Arc, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    capability::{Knob, PromptForm},
    election::Refusal,
};

/// What to do next, for people.
pub trait Hint {
    /// A sentence or a command, where there is one.
    fn hint(&self) -> Option<String>;
}

/// Working out what a model is.
#[derive(Debug, thiserror::Error)]
pub enum ProbeError {
    /// Nothing there.
    #[error("{}: no such file or directory", .path.display())]
    Missing {
        /// What was looked for.
        path: PathBuf,
    },
    /// A file that the model cannot do without.
    #[error("{}: the model has no {file}", .root.display())]
    MissingFile {
        /// The model's directory.
        root: PathBuf,
        /// The file's name.
        file: String,
    },
    /// A file could not be read.
    #[error("{}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// A file is not what it claims to be, or exceeds a bound.
    #[error("{}: {what}", .path.display())]
    Malformed {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Several artifacts, and no flag to choose among them.
    #[error("{} holds several models: {}", .root.display(), .candidates.join(", "))]
    Ambiguous {
        /// The model's directory.
        root: PathBuf,
        /// What could be meant.
        candidates: Vec<String>,
        /// Commands that settle it.
        commands: Vec<String>,
    },
}

impl Hint for ProbeError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::Missing { .. } => Some("check the path, or give a repository as org/name".into()),
            Self::MissingFile { file, .. } => {
                Some(format!("download {file} from where the model was published, into the same directory"))
            }
            Self::Io { .. } => None,
            Self::Malformed { .. } => Some("the file may be truncated: download it again".into()),
            Self::Ambiguous { commands, .. } => Some(format!("say which one:\n  {}", commands.join("\n  "))),
        }
    }
}

/// Choosing a backend.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElectionError {
    /// `--backend` named something that is not there.
    #[error("no backend is called `{name}`; there are: {}", .known.join(", "))]
    UnknownBackend {
        /// What was asked for.
        name: String,
        /// What there is.
        known: Vec<&'static str>,
    },
    /// The forced backend refuses.
    #[error("{backend} cannot serve {model}: {refusal}")]
    ForcedRefused {
        /// The model as the user spelled it.
        model: String,
        /// The backend that was forced.
        backend: &'static str,
        /// Its reasons.
        refusal: Refusal,
        /// The command that would work, if one would.
        command: Option<String>,
    },
    /// Only a backend that has to be asked for would serve it.
    #[error("only the {backend} backend can serve {model}, and it has to be asked for")]
    NotAskedFor {
        /// The model as the user spelled it.
        model: String,
        /// The backend that would serve it.
        backend: &'static str,
        /// The command that would work.
        command: String,
    },
    /// Nobody would serve it.
    #[error("no backend can serve {model}: {}", list(.refusals))]
    Nobody {
        /// The model as the user spelled it.
        model: String,
        /// Each backend with its reasons.
        refusals: Vec<(&'static str, Refusal)>,
    },
}

fn list(refusals: &[(&'static str, Refusal)]) -> String {
    refusals.iter().map(|(id, refusal)| format!("{id}: {refusal}")).collect::<Vec<_>>().join("; ")
}

impl Hint for ElectionError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::UnknownBackend { .. } => Some("mesh-llm backends lists them".into()),
            Self::ForcedRefused { command: Some(command), .. } | Self::NotAskedFor { command, .. } => {
                Some(format!("run: {command}"))
            }
            Self::ForcedRefused { refusal, .. } => refusal.hint.clone(),
            Self::Nobody { model, refusals } => refusals
                .iter()
                .find_map(|(_, refusal)| refusal.hint.clone())
                .or_else(|| Some(format!("run: mesh-llm explain {model}"))),
        }
    }
}

/// Loading a model.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The backend's settings are off.
    #[error("settings of {backend}: {what}")]
    Settings {
        /// Whose.
        backend: &'static str,
        /// What is wrong with them.
        what: String,
    },
    /// Something the backend needs is not installed and may not, or could not, be.
    #[error("{what}")]
    NotInstalled {
        /// What is missing and why.
        what: String,
        /// The command that installs it.
        command: String,
    },
    /// The model's files do not hold what its family needs.
    #[error("{what}")]
    Weights {
        /// Which tensors, with shapes.
        what: String,
    },
    /// It would not fit.
    #[error("{model} needs {needed_bytes} bytes of memory, {available_bytes} are available")]
    Memory {
        /// The model.
        model: String,
        /// What it needs.
        needed_bytes: u64,
        /// What there is.
        available_bytes: u64,
    },
    /// It did not become ready in time.
    #[error("{what} was not ready after {} s", .after.as_secs())]
    TimedOut {
        /// What was waited for.
        what: String,
        /// For how long.
        after: Duration,
    },
    /// A process the backend manages ended while loading.
    #[error("{what}")]
    Exited {
        /// Exit status and the last lines it wrote.
        what: String,
    },
    /// Anything else, with its cause.
    #[error("{what}: {source}")]
    Other {
        /// What was being done.
        what: String,
        /// Why it failed.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl Hint for LoadError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NotInstalled { command, .. } => Some(format!("run: {command}")),
            Self::Memory { .. } => Some("choose a smaller model or quantization, or a shorter --ctx".into()),
            _ => None,
        }
    }
}

/// Handing a job to an engine.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SubmitError {
    /// As many requests as may run and wait do so already.
    #[error("{running} requests are running or waiting, which is the most")]
    Busy {
        /// Requests running or waiting.
        running: u32,
        /// When to try again.
        retry_after: Duration,
    },
    /// Prompt and answer would not fit the context.
    #[error("the prompt has {prompt} tokens and the context {max}")]
    TooLong {
        /// Tokens in the prompt.
        prompt: u32,
        /// Tokens in the context.
        max: u32,
    },
    /// It would need more memory than there is, now or ever.
    #[error("the request needs {needed_bytes} bytes of memory for {tokens} tokens, and {available_bytes} can be had")]
    Memory {
        /// Tokens of the prompt and the first of the answer.
        tokens: u32,
        /// What they take.
        needed_bytes: u64,
        /// What there is for requests.
        available_bytes: u64,
    },
    /// The prompt is empty.
    #[error("the prompt has no tokens")]
    Empty,
    /// The prompt is not in the form that the engine's capabilities name.
    #[error("the engine takes prompts as {wanted}")]
    WrongForm {
        /// The form it takes.
        wanted: PromptForm,
    },
    /// A token id that the model does not have.
    #[error("token {id} is not in the vocabulary of {vocab_size} entries")]
    UnknownToken {
        /// The id.
        id: u32,
        /// Entries in the vocabulary.
        vocab_size: u32,
    },
    /// A parameter that the engine would not honour.
    #[error("`{knob}` is not supported by this model's backend")]
    Unsupported {
        /// The parameter.
        knob: Knob,
    },
    /// The constraint cannot be enforced.
    #[error("the answer cannot be made to keep to it: {what}")]
    Grammar {
        /// What of it, such as a keyword of a schema with its place.
        what: String,
    },
    /// The engine is draining or over.
    #[error("the engine is not serving: {why}")]
    Gone {
        /// Its state, for people.
        why: Arc<str>,
    },
}

/// A job that was admitted and could not be finished.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, thiserror::Error)]
#[serde(rename_all = "snake_case")]
pub enum EngineError {
    /// The engine broke.
    #[error("the engine failed: {what}")]
    Failed {
        /// Why.
        what: Arc<str>,
    },
    /// The engine broke before the job's turn came: nothing of it was computed, so that another engine may be handed it.
    #[error("the engine failed before the request's turn came: {what}")]
    NotBegun {
        /// Why.
        what: Arc<str>,
    },
    /// The engine was stopped before the job was done.
    #[error("the engine was stopped before the answer was complete")]
    Stopped,
}

/// Texts that could not be turned into vectors.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum EmbedError {
    /// The engine gives none.
    #[error("this model's backend gives no embeddings")]
    Unsupported,
    /// They were not admitted.
    #[error(transparent)]
    Submit(#[from] SubmitError),
    /// They were, and not finished.
    #[error(transparent)]
    Engine(#[from] EngineError),
}

/// Rendering a prompt.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TemplateError {
    /// The template itself is broken.
    #[error("the chat template does not parse: {what}")]
    Syntax {
        /// Where and why.
        what: String,
    },
    /// The template refuses the conversation (`raise_exception`).
    #[error("the model's chat template refuses this conversation: {what}")]
    Refused {
        /// The template's words.
        what: String,
    },
    /// The template failed on this conversation.
    #[error("the chat template failed: {what}")]
    Failed {
        /// Where and why.
        what: String,
    },
    /// The model has none, nor its family.
    #[error("the model has no chat template, and its family has no fallback")]
    None,
}

impl Hint for TemplateError {
    fn hint(&self) -> Option<String> {
        matches!(self, Self::None).then(|| "use /v1/completions with a plain prompt".into())
    }
}
