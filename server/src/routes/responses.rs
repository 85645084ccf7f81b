//! `/v1/responses`.

use std::{
    sync::Arc,
    time::{Instant, SystemTime},
};

use futures::{Stream, StreamExt, stream};
use mesh_core::{EngineError, chat::Message};
use serde_json::Value;
use uuid::Uuid;
use warp::{Reply, reply::Response, sse::Event as ServerEvent};

use super::{Call, Door, open::opened, route::Route};
use crate::{
    error::ApiError,
    openai::{
        BadRequest, parse,
        responses::{
            Event, ResponseObject, ResponsesRequest, Store, Writer,
            object::{Deleted, ItemList, Status},
            store::Stored,
        },
    },
    pipeline::Part,
    running::Broken,
    sse::{self, Comments},
};

/// What fields are called here that the pipeline knows by other names.
const NAMES: &[(&str, &str)] = &[
    ("messages", "input"),
    ("prompt", "input"),
    ("enable_thinking", "reasoning.effort"),
    ("reasoning_effort", "reasoning.effort"),
    ("response_format", "text.format"),
];

/// Most items of a page.
const PAGE_MAX: usize = 100;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/responses", responses)
            .says("The next turn of a conversation, which the server may keep.")
            .takes::<ResponsesRequest>()
            .gives::<ResponseObject>()
            .streams::<Event>(),
        Route::get("/v1/responses/{response_id}", |door, call| async move {
            known_queries(&call, &[])?;
            let stored = stored(&door, call.param())?;
            Ok(warp::reply::json(&stored.response).into_response())
        })
        .says("A response that was kept.")
        .gives::<ResponseObject>(),
        Route::delete("/v1/responses/{response_id}", |door, call| async move {
            let id = call.param();
            if !door.store.remove(id) {
                return Err(ApiError::no_such_response(id));
            }
            Ok(warp::reply::json(&Deleted { id: id.to_owned(), object: "response", deleted: true }).into_response())
        })
        .says("Forgets a response.")
        .gives::<Deleted>(),
        Route::get("/v1/responses/{response_id}/input_items", |door, call| async move {
            let stored = stored(&door, call.param())?;
            Ok(warp::reply::json(&page(&call, &stored.items)?).into_response())
        })
        .says("The items of a response's request.")
        .queried(&[
            ("limit", r#"{"type": "integer", "minimum": 1, "maximum": 100, "default": 20}"#),
            ("order", r#"{"type": "string", "enum": ["asc", "desc"], "default": "desc"}"#),
            ("after", r#"{"type": "string"}"#),
        ])
        .gives::<ItemList>(),
        Route::post("/v1/responses/{response_id}/cancel", cancel)
            .says("Cancels a response that is being written.")
            .gives::<ResponseObject>(),
    ]
}

fn stored(door: &Door, id: &str) -> Result<Arc<Stored>, ApiError> {
    door.store.get(id).ok_or_else(|| ApiError::no_such_response(id))
}

async fn responses(door: Arc<Door>, mut call: Call) -> Result<Response, ApiError> {
    let body = call.read().await?;
    let id = format!("resp_{}", Uuid::new_v4().simple());
    let asked = parse::<ResponsesRequest>(&body)?.check(&id)?;
    drop(body);
    let before = match &asked.echo.previous_response_id {
        None => Vec::new(),
        Some(previous) => {
            let stored = stored(&door, previous).map_err(|error| error.about("previous_response_id"))?;
            if stored.response.status == Status::InProgress {
                return Err(
                    BadRequest::value("previous_response_id", "is still being written; wait for its end").into()
                );
            }
            stored.conversation.clone()
        }
    };
    let ticket = door.running.enter([id.as_str()].into_iter().chain(call.request_id()))?;
    let opening = opened(&door.slots, &asked.model, asked.ask(&id, &before));
    let (model, parts) = ticket.unless_cancelled(opening).await.map_err(|error| error.renamed(NAMES))?;
    let call_ids = parts.call_ids();
    let parts = ticket.watch(parts);
    drop(ticket);
    let created_at = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let store = asked.echo.store.then(|| door.store.clone());
    let conversation = before.into_iter().chain(asked.messages).collect();
    let writer = Writer::new(id, created_at, model, asked.echo, asked.sealed, call_ids);
    let record = Record::new(writer, store, asked.items, conversation);
    if asked.stream {
        return Ok(streamed(parts, record));
    }
    Ok(warp::reply::json(&whole(parts, record).await?).into_response())
}

/// A response that is being written, and kept from its first moment if it is to be.
struct Record {
    writer: Writer,
    store: Option<Store>,
    items: Vec<Value>,
    conversation: Vec<Message>,
}

impl Record {
    fn new(writer: Writer, store: Option<Store>, items: Vec<Value>, conversation: Vec<Message>) -> Self {
        let record = Self { writer, store, items, conversation };
        if let Some(store) = &record.store {
            store.put(Stored {
                response: record.writer.response().clone(),
                items: record.items.clone(),
                conversation: Vec::new(),
            });
        }
        record
    }

    /// Keeps it as it is now, for good.
    fn over(&mut self) {
        let Some(store) = self.store.take() else { return };
        let response = self.writer.response().clone();
        // Nobody wants what was forgotten while it was written.
        if store.get(&response.id).is_none() {
            return;
        }
        let mut conversation = std::mem::take(&mut self.conversation);
        conversation.push(self.writer.message());
        store.put(Stored { response, items: std::mem::take(&mut self.items), conversation });
    }

    /// What a part of the answer amounts to.
    fn events(&mut self, part: Result<Part, Broken>) -> Vec<Event> {
        match part {
            Ok(Part::Delta(delta)) => self.writer.delta(delta),
            Ok(Part::Finished(finished)) => {
                let events = self.writer.finish(&finished);
                self.over();
                events
            }
            Ok(_) => Vec::new(),
            Err(broken) => {
                sse::broke_off(&self.writer.response().id, &broken);
                let events = self.writer.fail(&broken.into());
                self.over();
                events
            }
        }
    }
}

impl Drop for Record {
    fn drop(&mut self) {
        if self.store.is_some() {
            self.writer.leave();
            self.over();
        }
    }
}

/// The same events, added up.
async fn whole(
    mut parts: impl Stream<Item = Result<Part, Broken>> + Unpin,
    mut record: Record,
) -> Result<ResponseObject, ApiError> {
    while let Some(part) = parts.next().await {
        let (broken, over) = (part.as_ref().err().cloned(), matches!(part, Ok(Part::Finished(_))));
        record.events(part);
        match broken {
            Some(broken) => return Err(broken.into()),
            None if over => return Ok(record.writer.response().clone()),
            None => {}
        }
    }
    Err(EngineError::Stopped.into())
}

fn streamed(parts: impl Stream<Item = Result<Part, Broken>> + Send + 'static, mut record: Record) -> Response {
    let first: Vec<_> = record.writer.start().iter().map(event).collect();
    let mut comments = Comments::default();
    let rest = parts.flat_map(move |part| {
        let comment = part.as_ref().ok().and_then(|part| comments.on(part, Instant::now()));
        let comment = comment.map(|text| ServerEvent::default().comment(format!(" {text}")));
        let events: Vec<_> = record.events(part).iter().map(event).collect();
        stream::iter(comment.into_iter().chain(events))
    });
    sse::respond(stream::iter(first).chain(rest))
}

fn event(event: &Event) -> ServerEvent {
    sse::data(event).event(format!(" {}", event.kind))
}

async fn cancel(door: Arc<Door>, call: Call) -> Result<Response, ApiError> {
    let id = call.param();
    let status = stored(&door, id)?.response.status;
    if status != Status::InProgress || !door.running.cancel(id) {
        // It may have come to its end just now.
        return Err(ApiError::response_is_over(stored(&door, id)?.response.status.word()));
    }
    // What was written is kept by whoever writes it, once it notices; nobody waits for that.
    let mut response = stored(&door, id)?.response.clone();
    response.status = Status::Cancelled;
    Ok(warp::reply::json(&response).into_response())
}

/// The fields of the query, which are to be among `known`.
fn known_queries(call: &Call, known: &[&str]) -> Result<Vec<(String, String)>, ApiError> {
    let query = call.query.as_deref().unwrap_or_default();
    let decoded = |text: &str| percent_encoding::percent_decode_str(text).decode_utf8_lossy().into_owned();
    let fields = query.split('&').filter(|field| !field.is_empty()).map(|field| {
        let (name, value) = field.split_once('=').unwrap_or((field, ""));
        let name = decoded(name);
        if !known.contains(&name.as_str()) {
            return Err(BadRequest::Unknown { param: name.chars().take(40).collect() }.into());
        }
        Ok((name, decoded(value)))
    });
    fields.collect()
}

/// A page of items: the latest first, unless asked otherwise.
fn page(call: &Call, items: &[Value]) -> Result<ItemList, ApiError> {
    let (mut limit, mut latest_first, mut after) = (20, true, None);
    for (name, value) in known_queries(call, &["limit", "order", "after"])? {
        match (name.as_str(), value.as_str()) {
            ("limit", value) => {
                limit = value
                    .parse()
                    .ok()
                    .filter(|limit| (1..=PAGE_MAX).contains(limit))
                    .ok_or_else(|| BadRequest::value("limit", format!("has to be between 1 and {PAGE_MAX}")))?;
            }
            ("order", "asc") => latest_first = false,
            ("order", "desc") => latest_first = true,
            ("order", _) => return Err(BadRequest::value("order", "has to be asc or desc").into()),
            _ => after = Some(value),
        }
    }
    let id = |item: &Value| item.get("id").and_then(Value::as_str).map(str::to_owned);
    let mut ordered: Vec<&Value> = items.iter().collect();
    if latest_first {
        ordered.reverse();
    }
    let start = match &after {
        None => 0,
        Some(after) => {
            let at = ordered.iter().position(|item| id(item).as_ref() == Some(after));
            1 + at.ok_or_else(|| BadRequest::value("after", "has to be the id of one of the items"))?
        }
    };
    let data: Vec<Value> = ordered[start..].iter().take(limit).map(|item| (*item).clone()).collect();
    let has_more = start + data.len() < ordered.len();
    let (first_id, last_id) = (data.first().and_then(id), data.last().and_then(id));
    Ok(ItemList { object: "list", data, first_id, last_id, has_more })
}
