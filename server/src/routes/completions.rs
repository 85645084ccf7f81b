//! `/v1/chat/completions` and `/v1/completions`.

use std::{sync::Arc, time::SystemTime};

use uuid::Uuid;
use warp::{Reply, reply::Response};

use super::{Call, Door, open::opened, route::Route};
use crate::{
    error::ApiError,
    openai::{
        ChatRequest, CompletionRequest, parse,
        response::{ChatChunk, ChatCompletion, Envelope, TextCompletion},
    },
    pipeline,
    sse::{self, Shape},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/chat/completions", |door, call| generated(Shape::Chat, door, call))
            .says("The next message of a conversation.")
            .takes::<ChatRequest>()
            .gives::<ChatCompletion>()
            .streams::<ChatChunk>(),
        Route::post("/v1/completions", |door, call| generated(Shape::Text, door, call))
            .says("The continuation of a text.")
            .takes::<CompletionRequest>()
            .gives::<TextCompletion>()
            .streams::<TextCompletion>(),
    ]
}

/// One generation, streamed or not.
async fn generated(shape: Shape, door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let body = call.read().await?;
    let id = Uuid::new_v4().simple();
    let (id, (shared, ask)) = match shape {
        Shape::Chat => {
            let id = format!("chatcmpl-{id}");
            let asked = parse::<ChatRequest>(&body)?.ask(&id)?;
            (id, asked)
        }
        Shape::Text => {
            let id = format!("cmpl-{id}");
            let asked = parse::<CompletionRequest>(&body)?.ask(&id)?;
            (id, asked)
        }
    };
    drop(body);
    let field = if shape == Shape::Chat { "messages" } else { "prompt" };
    let ticket = door.running.enter([id.as_str()].into_iter().chain(call.request_id()))?;
    let opening = opened(&door.slots, &shared.model, ask);
    let (model, parts) = ticket.unless_cancelled(opening).await.map_err(|error| error.prompt_in(field))?;
    let parts = ticket.watch(parts);
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let envelope = Envelope { id, created, model };
    if shared.stream {
        return Ok(sse::reply(parts, envelope, shape, shared.include_usage));
    }
    let (answer, finished) = pipeline::collect(parts).await?;
    Ok(match shape {
        Shape::Chat => warp::reply::json(&ChatCompletion::new(envelope, answer, &finished)).into_response(),
        Shape::Text => warp::reply::json(&TextCompletion::whole(&envelope, answer.content, &finished)).into_response(),
    })
}
