//! Handing a request to a model, whatever surface it came through.

use std::sync::Arc;

use mesh_core::SubmitError;

use crate::{
    error::ApiError,
    lease::Lease,
    pipeline::{self, AnswerStream, Ask, InLine, PipelineError},
    record,
    slots::{Found, SlotError, Slots},
};

/// Finds the model and hands the request to it, or to the next one should the engine end before the request's turn; returns
/// the name it is served under.
pub(super) async fn opened(slots: &Slots, model: &str, ask: Ask) -> Result<(String, AnswerStream), ApiError> {
    let (name, mut answers) = opened_all(slots, model, vec![Ask { choices: 1, ..ask }]).await?;
    // One was asked for, and none is left out.
    Ok((name, answers.pop().ok_or_else(ApiError::internal)?))
}

/// The same for several answers, in order.
pub(super) async fn opened_all(
    slots: &Slots,
    model: &str,
    asks: Vec<Ask>,
) -> Result<(String, Vec<AnswerStream>), ApiError> {
    let (name, answers) = on_model(slots, model, |lease| pipeline::open_all(lease, asks.clone())).await?;
    let each = asks.iter().flat_map(|ask| (0..ask.choices).map(|choice| ask.choice(choice)));
    let in_line =
        answers.into_iter().zip(each).map(|(answer, ask)| answer.in_line(InLine::new(slots.clone(), model, ask)));
    Ok((name, in_line.collect()))
}

/// Does something with a model; returns the name it is served under beside. An engine that turns out to be over is started
/// again, once. One that is to make room is not over before the lease is.
pub(super) async fn on_model<T, F>(
    slots: &Slots,
    model: &str,
    attempt: impl Fn(Lease) -> F,
) -> Result<(String, T), ApiError>
where
    F: Future<Output = Result<T, PipelineError>>,
{
    // What another server has passed on is answered here: it could come back otherwise, and again.
    let found = if record::passed_on() { slots.get(model).map(Found::Here) } else { slots.find(model) };
    let slot = match found? {
        Found::Here(slot) => slot,
        Found::There(model) => {
            let (name, lease) = (model.profile.name.clone(), Lease::of(&model).ok_or(SlotError::Stopped)?);
            return Ok((name, attempt(lease).await?));
        }
    };
    let lease = slot.model(None).await?;
    let model = Arc::clone(&lease);
    let outcome = match attempt(lease).await {
        Err(PipelineError::Submit(SubmitError::Gone { why })) => {
            tracing::warn!(%why, "the engine is gone; trying once more");
            attempt(slot.model(Some(model)).await?).await?
        }
        outcome => outcome?,
    };
    Ok((slot.name(), outcome))
}
