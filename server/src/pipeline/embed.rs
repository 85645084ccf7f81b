//! Texts become vectors.

use std::sync::Arc;

use mesh_core::{Embed, Embedded, EngineError, Pooling};

use super::{PipelineError, Subject, constraint::Wish, prompt};
use crate::served::ServedModel;

/// One vector for each of `inputs`, in order.
pub async fn embed(
    model: &Arc<ServedModel>,
    id: String,
    inputs: Vec<Subject>,
    pooling: Pooling,
) -> Result<Embedded, PipelineError> {
    if !model.handle.capabilities().embeddings {
        return Err(PipelineError::NoEmbeddings);
    }
    let asked = inputs.len();
    let mut prompts = Vec::with_capacity(asked);
    for input in inputs {
        prompts.push(prompt::prepare(model, input, Wish::default(), false).await?.prompt);
    }
    tracing::debug!(job = %id, inputs = asked, "embedding");
    let embedded = model.handle.embed(Embed { id, inputs: prompts, pooling }).await?;
    if embedded.vectors.len() != asked {
        let what = format!("it gave {} vectors for {asked} inputs", embedded.vectors.len());
        return Err(EngineError::Failed { what: what.into() }.into());
    }
    Ok(embedded)
}
