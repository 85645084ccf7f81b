//! Texts become vectors.

use std::sync::Arc;

use mesh_core::{
    Embed, Embedded, EngineError, Pooling,
    node::{Question, Reply},
};

use super::{PipelineError, Subject, constraint::Wish, prompt, tokens};
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
    if model.takes_conversations() {
        return match model.handle.reply(Question::Embed { id, inputs, pooling }).await? {
            Reply::Vectors(embedded) if embedded.vectors.len() == asked => Ok(embedded),
            other => Err(tokens::unasked(&other)),
        };
    }
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
