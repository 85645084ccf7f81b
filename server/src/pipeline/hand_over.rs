//! What becomes of requests in line when their engine ends: the next engine is handed them.

use std::{sync::Arc, time::Duration};

use futures::{FutureExt, future::BoxFuture};
use mesh_core::{EngineError, SubmitError};
use tokio::time::{Instant, sleep};

use super::{AnswerStream, Ask, PipelineError};
use crate::{
    served::ServedModel,
    slots::{SlotError, Slots},
};

/// How long a request is kept for an engine that takes it.
const PATIENCE: Duration = Duration::from_secs(120);
/// Longest pause between two attempts, so that nobody waits much longer than an engine does.
const PAUSE_MAX: Duration = Duration::from_secs(1);
/// Shortest pause: an engine that was found over is known to be so a moment later.
const PAUSE_MIN: Duration = Duration::from_millis(20);
/// Engines that one request may see end.
const HAND_OVERS_MAX: u32 = 16;

/// Hands a request on, given the model whose engine ended.
pub(super) type HandOver =
    Box<dyn FnOnce(Arc<ServedModel>) -> BoxFuture<'static, Result<AnswerStream, EngineError>> + Send>;

/// A request that may be handed on.
#[derive(Clone, Debug)]
pub struct InLine {
    slots: Slots,
    name: String,
    ask: Ask,
    left: u32,
}

impl InLine {
    /// A request to the model of that name.
    pub fn new(slots: Slots, name: impl Into<String>, ask: Ask) -> Self {
        Self { slots, name: name.into(), ask, left: HAND_OVERS_MAX }
    }

    pub(super) fn hand_over(self) -> HandOver {
        Box::new(move |gone| self.next(gone).boxed())
    }

    async fn next(mut self, gone: Arc<ServedModel>) -> Result<AnswerStream, EngineError> {
        let failed = |what: String| EngineError::Failed { what: what.into() };
        self.left = self.left.checked_sub(1).ok_or_else(|| failed(format!("{HAND_OVERS_MAX} engines in a row")))?;
        tracing::info!(request = self.ask.id, "the engine ended before the request's turn; it goes to the next");
        let deadline = Instant::now() + PATIENCE;
        let mut gone = gone;
        loop {
            let slot = self.slots.get(&self.name).map_err(|error| failed(error.to_string()))?;
            let (pause, why) = match slot.model(Some(gone.clone())).await {
                Ok(lease) => {
                    let model = Arc::clone(&lease);
                    match super::open(lease, self.ask.clone()).await {
                        Ok(parts) => return Ok(parts.in_line(self)),
                        Err(PipelineError::Submit(error @ SubmitError::Busy { retry_after, .. })) => {
                            (retry_after, error.to_string())
                        }
                        Err(PipelineError::Submit(error @ SubmitError::Gone { .. })) => {
                            gone = model;
                            (PAUSE_MIN, error.to_string())
                        }
                        Err(error) => return Err(failed(error.to_string())),
                    }
                }
                Err(error @ SlotError::Failed { retry_after, .. }) => (retry_after, error.to_string()),
                Err(error @ (SlotError::Crowded { .. } | SlotError::NoRoom(_))) => (PAUSE_MAX, error.to_string()),
                Err(SlotError::Stopped) => return Err(EngineError::Stopped),
                Err(error) => return Err(failed(error.to_string())),
            };
            if Instant::now() + pause > deadline {
                return Err(failed(format!("no other took the request in its place: {why}")));
            }
            sleep(pause.clamp(PAUSE_MIN, PAUSE_MAX)).await;
        }
    }
}
