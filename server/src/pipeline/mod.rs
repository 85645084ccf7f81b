//! The one walk of a request, for streamed and blocking answers alike: knobs against capabilities, template, tokens,
//! submit, and on the way back decoder, stop filter and dialect.
//!
//! Knows neither HTTP nor JSON of any API.

pub mod answer;
pub mod error;
mod hand_over;
mod landmarks;
pub mod prompt;

use mesh_core::{Grammar, Job, Knob, Sampling, chat::Message};
use serde_json::{Map, Value};

pub use answer::{AnswerStream, Finish, Finished, Part, collect};
pub use error::PipelineError;
pub use hand_over::InLine;

use crate::{lease::Lease, served::ServedModel};

/// One request, translated and within its ranges.
#[derive(Clone, Debug)]
pub struct Ask {
    /// Names it in logs.
    pub id: String,
    /// What is asked.
    pub subject: Subject,
    /// How tokens are chosen.
    pub sampling: Sampling,
    /// Most tokens to generate; absent means up to the end of the context.
    pub tokens_max: Option<u32>,
    /// Tokens before which the answer does not end by itself.
    pub tokens_min: Option<u32>,
    /// Go on past end-of-text tokens.
    pub ignore_eos: bool,
    /// Alternatives to report with each token.
    pub logprobs: Option<u32>,
    /// Strings that end the answer and are not part of it.
    pub stop: Vec<String>,
    /// What the answer has to be.
    pub grammar: Option<Grammar>,
}

impl Ask {
    /// A request for the answer to `subject`, with nothing set.
    pub fn new(id: impl Into<String>, subject: Subject) -> Self {
        Self {
            id: id.into(),
            subject,
            sampling: Sampling::default(),
            tokens_max: None,
            tokens_min: None,
            ignore_eos: false,
            logprobs: None,
            stop: Vec::new(),
            grammar: None,
        }
    }
}

/// What is asked.
#[derive(Clone, Debug)]
pub enum Subject {
    /// The next message of a conversation.
    Chat(Chat),
    /// The continuation of a text.
    Text(String),
    /// The continuation of tokens, to which nothing is added.
    Tokens(Vec<u32>),
}

/// A conversation to be continued.
#[derive(Clone, Debug, Default)]
pub struct Chat {
    /// The messages so far.
    pub messages: Vec<Message>,
    /// Tools the model may call, as JSON schemas for the template.
    pub tools: Vec<Value>,
    /// Further template variables.
    pub kwargs: Map<String, Value>,
    /// How much reasoning is asked for, if the request says.
    pub effort: Option<Effort>,
}

/// How much reasoning is asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Effort {
    /// On or off: `enable_thinking`.
    Switch(bool),
    /// A named level: `reasoning_effort`. `none` switches it off.
    Level(String),
}

/// Hands a request to the model and returns its answer as a stream, which keeps the lease. Dropping the stream cancels
/// the request.
pub async fn open(model: Lease, ask: Ask) -> Result<AnswerStream, PipelineError> {
    let mut job = Job {
        sampling: ask.sampling,
        tokens_max: ask.tokens_max,
        tokens_min: ask.tokens_min,
        ignore_eos: ask.ignore_eos,
        logprobs: ask.logprobs,
        ..Job::new(ask.id, mesh_core::Prompt::Tokens(Vec::new()))
    };
    settle_knobs(&model, &mut job)?;
    let prepared = prompt::prepare(&model, ask.subject).await?;
    job.prompt = prepared.prompt;
    job.landmarks = prepared.landmarks;
    let prompt_tokens = match &job.prompt {
        mesh_core::Prompt::Tokens(ids) => u32::try_from(ids.len()).ok(),
        mesh_core::Prompt::Text { .. } => None,
    };
    tracing::debug!(job = %job.id, prompt_tokens, tokens_max = job.tokens_max, "submitting");
    let events = model.handle.submit(job).await?;
    Ok(AnswerStream::new(model, events, ask.stop, prepared.reader, prompt_tokens))
}

/// Refuses what the engine would not honour. A value that changes nothing is dropped instead: clients send such values
/// unasked.
fn settle_knobs(model: &ServedModel, job: &mut Job) -> Result<(), PipelineError> {
    let lacking = model.handle.capabilities().lacking(job);
    for knob in lacking {
        let sampling = &mut job.sampling;
        let neutral = match knob {
            Knob::Temperature => take_if(&mut sampling.temperature, 1.0),
            Knob::TopP => take_if(&mut sampling.top_p, 1.0),
            Knob::TopK => take_if(&mut sampling.top_k, 0),
            Knob::MinP => take_if(&mut sampling.min_p, 0.0),
            Knob::RepetitionPenalty => take_if(&mut sampling.repetition_penalty, 1.0),
            Knob::PresencePenalty => take_if(&mut sampling.presence_penalty, 0.0),
            Knob::FrequencyPenalty => take_if(&mut sampling.frequency_penalty, 0.0),
            Knob::TypicalP => take_if(&mut sampling.typical_p, 1.0),
            Knob::MinTokens => take_if(&mut job.tokens_min, 0),
            Knob::Xtc
            | Knob::Dry
            | Knob::Seed
            | Knob::LogitBias
            | Knob::IgnoreEos
            | Knob::Logprobs
            | Knob::JsonSchema
            | Knob::Regex
            | Knob::Lark => false,
        };
        if !neutral {
            return Err(PipelineError::Submit(mesh_core::SubmitError::Unsupported { knob }));
        }
    }
    // Only engines report probabilities, and no engine's report reaches an answer yet.
    if job.logprobs.is_some() {
        return Err(PipelineError::Submit(mesh_core::SubmitError::Unsupported { knob: Knob::Logprobs }));
    }
    Ok(())
}

fn take_if<T: PartialEq + Copy>(slot: &mut Option<T>, neutral: T) -> bool {
    slot.take_if(|value| *value == neutral).is_some()
}
