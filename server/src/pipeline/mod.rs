//! The one walk of a request, for streamed and blocking answers alike: knobs against capabilities, template, tokens,
//! submit, and on the way back decoder, stop filter and dialect.
//!
//! Knows neither HTTP nor JSON of any API.

pub mod answer;
pub mod call_ids;
pub mod choices;
mod constraint;
pub mod embed;
pub mod error;
mod forced;
mod hand_over;
mod landmarks;
pub mod ledger;
pub mod prompt;
pub mod tokens;

use std::sync::Arc;

use mesh_core::{Job, Knob, Sampling};

pub use answer::{AnswerStream, collect};
pub use call_ids::CallIds;
pub use choices::{Choices, likeliest};
pub use error::PipelineError;
pub use hand_over::InLine;
pub use mesh_core::{
    answer::{Finish, Finished, Likely, Part, TokenText},
    ask::{Ask, Chat, Effort, Subject, ToolChoice},
};

use crate::{lease::Lease, served::ServedModel};

/// Hands a request to the model and returns its answer as a stream, which keeps the lease. Dropping the stream cancels
/// the request.
pub async fn open(model: Lease, ask: Ask) -> Result<AnswerStream, PipelineError> {
    let mut answers = open_all(model, vec![Ask { choices: 1, ..ask }]).await?;
    // One was asked for, and none is left out.
    answers.pop().ok_or(PipelineError::Panicked)
}

/// The same for several answers: those to the first request, then those to the next one. All are admitted, or none is.
pub async fn open_all(model: Lease, asks: Vec<Ask>) -> Result<Vec<AnswerStream>, PipelineError> {
    let model = Arc::new(model);
    let mut answers = Vec::new();
    for ask in asks {
        if model.takes_conversations() {
            let call_ids = CallIds::new(model.dialect.call_ids(), &ask.subject);
            for choice in 0..ask.choices {
                // What was admitted before is cancelled as it is dropped.
                let parts = model.handle.answer(ask.choice(choice)).await?;
                answers.push(AnswerStream::passed(model.clone(), parts, call_ids));
            }
            continue;
        }
        let (seed, id) = (ask.sampling.seed, ask.id.clone());
        if ask.ranked && ask.logprobs.is_none() && !model.handle.capabilities().knobs.contains(&Knob::Logprobs) {
            let why = "is served by a backend that does not say how likely tokens are".into();
            return Err(PipelineError::NoSwitch { field: "best_of", why });
        }
        let mut job = Job {
            sampling: with_defaults(ask.sampling, model.defaults()),
            tokens_max: ask.tokens_max,
            tokens_min: ask.tokens_min,
            ignore_eos: ask.ignore_eos,
            logprobs: ask.logprobs.or(ask.ranked.then_some(0)),
            ..Job::new(id.clone(), mesh_core::Prompt::Tokens(Vec::new()))
        };
        let call_ids = CallIds::new(model.dialect.call_ids(), &ask.subject);
        let wish = constraint::Wish { grammar: ask.grammar, breakers: breakers(&job.sampling) };
        settle_knobs(&model, &mut job)?;
        let prepared = prompt::prepare(&model, ask.subject, wish, ask.echo).await?;
        job.prompt = prepared.prompt;
        job.landmarks = prepared.landmarks;
        job.constraint = prepared.constraint;
        job.shown = prepared.reader.as_ref().map(prompt::ReaderPlan::shown).unwrap_or_default();
        if let Some(dry) = &mut job.sampling.dry {
            dry.breaker_ids = prepared.breaker_ids;
        }
        settle_knobs(&model, &mut job)?;
        let prompt_tokens = match &job.prompt {
            mesh_core::Prompt::Tokens(ids) => u32::try_from(ids.len()).ok(),
            mesh_core::Prompt::Text { .. } => None,
        };
        for choice in 0..ask.choices {
            let mut job = job.clone();
            if choice > 0 {
                job.id = format!("{id}-{choice}");
                job.sampling.seed = seed.map(|seed| seed.wrapping_add(choice.into()));
            }
            tracing::debug!(job = %job.id, prompt_tokens, tokens_max = job.tokens_max, "submitting");
            let reading = answer::Reading {
                stop: ask.stop.clone(),
                reader: prepared.reader.as_ref().map(prompt::ReaderPlan::reader),
                prompt_tokens,
                echo: prepared.echo.clone(),
                logprobs: ask.logprobs.is_some(),
                call_ids,
            };
            // What was admitted before is cancelled as it is dropped.
            let events = model.handle.submit(job).await?;
            answers.push(AnswerStream::new(model.clone(), events, reading));
        }
    }
    Ok(answers)
}

/// A request's own values, and the model's where it has none.
fn with_defaults(asked: Sampling, defaults: &Sampling) -> Sampling {
    Sampling {
        temperature: asked.temperature.or(defaults.temperature),
        top_p: asked.top_p.or(defaults.top_p),
        top_k: asked.top_k.or(defaults.top_k),
        min_p: asked.min_p.or(defaults.min_p),
        typical_p: asked.typical_p.or(defaults.typical_p),
        repetition_penalty: asked.repetition_penalty.or(defaults.repetition_penalty),
        ..asked
    }
}

fn breakers(sampling: &Sampling) -> Vec<String> {
    sampling.dry.as_ref().map(|dry| dry.sequence_breakers.clone()).unwrap_or_default()
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
    Ok(())
}

fn take_if<T: PartialEq + Copy>(slot: &mut Option<T>, neutral: T) -> bool {
    slot.take_if(|value| *value == neutral).is_some()
}
