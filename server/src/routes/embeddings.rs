//! `/v1/embeddings`.

use std::sync::Arc;

use uuid::Uuid;
use warp::{Reply, reply::Response};

use super::{Call, Door, open::on_model, route::Route};
use crate::{
    error::ApiError,
    lease::Lease,
    openai::{
        embedding::{Embedding, EmbeddingList, EmbeddingRequest, EmbeddingUsage, Vector},
        parse,
    },
    pipeline::embed::embed,
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/embeddings", embeddings)
            .says("Vectors of length 1 for texts, from any model whose backend gives them.")
            .takes::<EmbeddingRequest>()
            .gives::<EmbeddingList>(),
    ]
}

async fn embeddings(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let asked = &parse::<EmbeddingRequest>(&call.read().await?)?.check()?;
    let id = &format!("embd-{}", Uuid::new_v4().simple());
    let ticket = door.running.enter([id.as_str()].into_iter().chain(call.request_id()))?;
    let work = |lease: Lease| async move { embed(&lease, id.clone(), asked.inputs.clone(), asked.pooling).await };
    let (model, embedded) = ticket
        .unless_cancelled(on_model(&door.slots, &asked.model, work))
        .await
        .map_err(|error| error.prompt_in("input"))?;
    let data = embedded.vectors.into_iter().enumerate().map(|(index, vector)| Embedding {
        object: "embedding",
        index,
        embedding: Vector::new(vector, asked.encoding),
    });
    let tokens = embedded.prompt_tokens;
    let usage = EmbeddingUsage { prompt_tokens: tokens, total_tokens: tokens };
    let list = EmbeddingList { object: "list", data: data.collect(), model, usage };
    Ok(warp::reply::json(&list).into_response())
}
