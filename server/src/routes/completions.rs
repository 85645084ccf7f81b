//! `/v1/chat/completions` and `/v1/completions`.

use std::{sync::Arc, time::SystemTime};

use uuid::Uuid;
use warp::{Reply, reply::Response};

use super::{Call, Door, open::opened_all, route::Route};
use crate::{
    error::ApiError,
    openai::{
        ChatRequest, CompletionRequest,
        completion::CompletionAsk,
        parse,
        response::{ChatChunk, ChatCompletion, Envelope, TextCompletion, Warning, WireUsage},
    },
    pipeline::{self, AnswerStream, Subject},
    sse::{self, Shape},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/chat/completions", |door, call| generated(Shape::Chat, door, call))
            .says("The next message of a conversation.")
            .takes::<ChatRequest>()
            .gives::<ChatCompletion>()
            .streams::<ChatChunk>()
            .ends("[DONE]"),
        Route::post("/v1/completions", |door, call| generated(Shape::Text, door, call))
            .says("The continuation of a text.")
            .takes::<CompletionRequest>()
            .gives::<TextCompletion>()
            .streams::<TextCompletion>()
            .ends("[DONE]"),
    ]
}

/// One generation, streamed or not.
async fn generated(shape: Shape, door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let body = call.read().await?;
    let id = Uuid::new_v4().simple();
    let (id, shared, CompletionAsk { asks, n }) = match shape {
        Shape::Chat => {
            let id = format!("chatcmpl-{id}");
            let (shared, ask) = parse::<ChatRequest>(&body)?.ask(&id)?;
            let n = ask.choices;
            (id, shared, CompletionAsk { asks: vec![ask], n })
        }
        Shape::Text => {
            let id = format!("cmpl-{id}");
            let (shared, asked) = parse::<CompletionRequest>(&body)?.ask(&id)?;
            (id, shared, asked)
        }
    };
    drop(body);
    let field = if shape == Shape::Chat { "messages" } else { "prompt" };
    let logprobs = asks.iter().any(|ask| ask.logprobs.is_some());
    let choices = asks.first().map_or(1, |ask| ask.choices) as usize;
    let offers_tools = asks.iter().any(|ask| matches!(&ask.subject, Subject::Chat(chat) if !chat.tools.is_empty()));
    let ticket = door.running.enter([id.as_str()].into_iter().chain(call.request_id()))?;
    let opening = opened_all(&door.slots, &shared.model, asks);
    let named = |error: ApiError| error.prompt_in(field).renamed(&shared.names);
    let (model, answers) = ticket.unless_cancelled(opening).await.map_err(named)?;
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let reasoning_field = answers.first().map(|answer| answer.model().manner.reasoning_field).unwrap_or_default();
    let call_ids = answers.first().map(AnswerStream::call_ids).unwrap_or_default();
    let unseen = offers_tools && answers.first().is_some_and(|answer| !answer.model().shows_tools);
    let warnings = if unseen { vec![Warning::tools_not_shown()] } else { Vec::new() };
    let envelope = Envelope { id, created, model, reasoning_field, choices, call_ids, warnings };
    let answers: Vec<_> = answers.into_iter().map(|answer| ticket.watch(answer)).collect();
    drop(ticket);
    if shared.stream {
        return Ok(sse::reply(answers, envelope, shape, shared.include_usage));
    }
    let answers = futures::future::try_join_all(answers.into_iter().map(pipeline::collect)).await?;
    Ok(match shape {
        Shape::Chat => warp::reply::json(&ChatCompletion::new(envelope, answers, logprobs)).into_response(),
        Shape::Text => {
            let usage = WireUsage::of(answers.iter().map(|(_, finished)| finished), choices);
            let answers =
                if choices > n as usize { pipeline::likeliest(answers, choices, n as usize) } else { answers };
            warp::reply::json(&TextCompletion::whole(&envelope, answers, usage, logprobs)).into_response()
        }
    })
}
