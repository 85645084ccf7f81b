//! `/v1/messages` and `/v1/messages/count_tokens`.

use std::{sync::Arc, time::Instant};

use futures::{Stream, StreamExt, stream};
use serde::Serialize;
use uuid::Uuid;
use warp::{Reply, reply::Response, sse::Event};

use super::{
    Call, Door,
    open::{on_model, opened},
    route::Route,
};
use crate::{
    anthropic::{
        CountRequest, Message, MessagesRequest, Writer,
        answer::{self, Counted},
        error::ErrorBody,
        request::Asked,
    },
    error::ApiError,
    lease::Lease,
    openai::parse,
    pipeline::{Part, tokens},
    running::Broken,
    sse::{self, Comments},
};

/// What fields are called here that the pipeline knows by other names.
const NAMES: &[(&str, &str)] = &[
    ("enable_thinking", "thinking"),
    ("reasoning_effort", "output_config.effort"),
    ("thinking_budget", "thinking.budget_tokens"),
    ("prompt", "messages"),
    ("stop", "stop_sequences"),
    ("response_format", "output_config.format"),
];

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/messages", messages)
            .says("The next message of a conversation, in Anthropic's form.")
            .takes::<MessagesRequest>()
            .gives::<Message>()
            .streams::<answer::Event>()
            .anthropic(),
        Route::post("/v1/messages/count_tokens", count)
            .says("The number of tokens of a conversation.")
            .takes::<CountRequest>()
            .gives::<Counted>()
            .anthropic(),
    ]
}

async fn messages(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let body = call.read().await?;
    let id = format!("msg_{}", Uuid::new_v4().simple());
    let Asked { model, stream, ask } = parse::<MessagesRequest>(&body)?.ask(&id)?;
    drop(body);
    let ticket = door.running.enter([id.as_str()].into_iter().chain(call.request_id()))?;
    let opening = opened(&door.slots, &model, ask);
    let (model, parts) = ticket.unless_cancelled(opening).await.map_err(|error| error.renamed(NAMES))?;
    let writer = Writer::new(id, model, parts.call_ids());
    let parts = ticket.watch(parts);
    drop(ticket);
    if stream {
        return Ok(streamed(parts, writer, call.request_id().map(str::to_owned)));
    }
    Ok(warp::reply::json(&whole(parts, writer).await?).into_response())
}

async fn count(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let (model, subject) = &parse::<CountRequest>(&call.read().await?)?.check()?;
    let work = |lease: Lease| async move { tokens::count(&lease, subject.clone()).await };
    let (_, input_tokens) = on_model(&door.slots, model, work).await.map_err(|error| error.renamed(NAMES))?;
    Ok(warp::reply::json(&Counted { input_tokens }).into_response())
}

/// The same events, added up.
async fn whole(
    mut parts: impl Stream<Item = Result<Part, Broken>> + Unpin,
    mut writer: Writer,
) -> Result<Message, Broken> {
    while let Some(part) = parts.next().await {
        match part? {
            Part::Delta(delta) => drop(writer.delta(delta)),
            Part::Finished(finished) => {
                writer.finish(finished);
                return Ok(writer.into_message());
            }
            _ => {}
        }
    }
    Err(mesh_core::EngineError::Stopped.into())
}

fn streamed(
    parts: impl Stream<Item = Result<Part, Broken>> + Send + 'static,
    mut writer: Writer,
    request_id: Option<String>,
) -> Response {
    let first: Vec<_> = writer.start().iter().map(event).collect();
    let mut comments = Comments::default();
    let rest = parts.flat_map(move |part| {
        let comment = part.as_ref().ok().and_then(|part| comments.on(part, Instant::now()));
        let comment = comment.map(|text| Event::default().comment(format!(" {text}")));
        let events: Vec<_> = match part {
            Ok(Part::Delta(delta)) => writer.delta(delta).iter().map(event).collect(),
            Ok(Part::Finished(finished)) => writer.finish(finished).iter().map(event).collect(),
            Ok(_) => Vec::new(),
            Err(broken) => {
                sse::broke_off(writer.id(), &broken);
                vec![named("error", &ErrorBody::new(&broken.into(), request_id.as_deref()))]
            }
        };
        stream::iter(comment.into_iter().chain(events))
    });
    sse::respond(stream::iter(first).chain(rest))
}

fn event(event: &answer::Event) -> Event {
    named(event.name(), event)
}

fn named(name: &str, value: &impl Serialize) -> Event {
    sse::data(value).event(format!(" {name}"))
}
