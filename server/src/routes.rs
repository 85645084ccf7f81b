//! What is served where.

use std::{convert::Infallible, sync::Arc, time::SystemTime};

use futures::Stream;
use percent_encoding::percent_decode_str;
use serde_json::json;
use uuid::Uuid;
use warp::{
    Buf, Filter, Rejection, Reply,
    http::{HeaderMap, StatusCode, header},
    path::{FullPath, Tail},
    reply::Response,
};

use crate::{
    body,
    error::ApiError,
    openai::{
        ChatRequest, CompletionRequest,
        completion::CompletionAsk,
        fields::Shared,
        parse,
        response::{ChatCompletion, Envelope, Model, ModelList, TextCompletion, WireUsage},
    },
    pipeline::{self, AnswerStream, Ask, InLine, PipelineError},
    slots::{Slot, SlotState, Slots},
    sse::{self, Shape},
};

/// All routes. Only generation waits for anything; the rest reads snapshots.
pub fn routes(slots: Slots) -> impl Filter<Extract = (Response,), Error = Infallible> + Clone + Send + Sync + 'static {
    let slots = Arc::new(slots);
    let with_slots = {
        let slots = slots.clone();
        warp::any().map(move || slots.clone())
    };
    let for_generation = with_slots.clone();
    let generate = move |path: &'static str, kind: Shape| {
        warp::path("v1")
            .and(if kind == Shape::Chat { chat_path().boxed() } else { text_path().boxed() })
            .and(warp::path::end())
            .and(warp::post())
            .and(warp::header::headers_cloned())
            .and(warp::body::stream())
            .and(for_generation.clone())
            .then(move |headers: HeaderMap, stream, slots: Arc<Slots>| async move {
                generated(kind, headers, stream, &slots).await.unwrap_or_else(|error: ApiError| {
                    // Not the message: it may quote what was sent.
                    let object = error.body().error;
                    tracing::info!(
                        path,
                        status = error.status().as_u16(),
                        code = object.code,
                        param = object.param,
                        "refused"
                    );
                    error.into_response()
                })
            })
    };
    let models = warp::path!("v1" / "models").and(warp::get()).and(with_slots.clone()).map(|slots: Arc<Slots>| {
        let list = ModelList { object: "list", data: slots.iter().map(model).collect() };
        warp::reply::json(&list).into_response()
    });
    let one_model = warp::path("v1")
        .and(warp::path("models"))
        .and(warp::path::tail())
        .and(warp::get())
        .and(with_slots.clone())
        .map(|tail: Tail, slots: Arc<Slots>| {
            // Names of repositories hold a slash, which clients send as it is or encoded.
            let name = percent_decode_str(tail.as_str()).decode_utf8_lossy();
            match slots.get(&name) {
                Ok(slot) => warp::reply::json(&model(slot)).into_response(),
                Err(error) => ApiError::from(error).into_response(),
            }
        });
    let livez =
        warp::path!("livez").and(warp::get()).map(|| warp::reply::json(&json!({ "status": "ok" })).into_response());
    let readyz = warp::path!("readyz").and(warp::get()).and(with_slots.clone()).map(|slots: Arc<Slots>| {
        let status = if slots.ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
        warp::reply::with_status(warp::reply::json(&health(&slots)), status).into_response()
    });
    let healthy = warp::path!("health")
        .and(warp::get())
        .and(with_slots)
        .map(|slots: Arc<Slots>| warp::reply::json(&health(&slots)).into_response());
    let version = warp::path!("version").and(warp::get()).map(|| {
        warp::reply::json(&json!({ "name": "mesh-llm", "version": env!("CARGO_PKG_VERSION") })).into_response()
    });
    let found = generate("/v1/chat/completions", Shape::Chat)
        .or(generate("/v1/completions", Shape::Text))
        .unify()
        .or(models)
        .unify()
        .or(one_model)
        .unify()
        .or(livez)
        .unify()
        .or(readyz)
        .unify()
        .or(healthy)
        .unify()
        .or(version)
        .unify()
        .boxed();
    warp::path::full().and(warp::any().and(found).map(Some).or_else(recover)).map(
        |path: FullPath, reply: Option<Response>| {
            reply.unwrap_or_else(|| ApiError::no_such_path(path.as_str()).into_response())
        },
    )
}

fn chat_path() -> impl Filter<Extract = (), Error = Rejection> + Clone {
    warp::path("chat").and(warp::path("completions"))
}

fn text_path() -> impl Filter<Extract = (), Error = Rejection> + Clone {
    warp::path("completions")
}

async fn recover(rejection: Rejection) -> Result<(Option<Response>,), Infallible> {
    if rejection.is_not_found() {
        return Ok((None,));
    }
    if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
        return Ok((Some(ApiError::method_not_allowed().into_response()),));
    }
    tracing::error!(?rejection, "a request was rejected for a reason nobody foresaw");
    Ok((Some(ApiError::internal().into_response()),))
}

/// One generation, streamed or not.
async fn generated<B: Buf>(
    shape: Shape,
    headers: HeaderMap,
    stream: impl Stream<Item = Result<B, warp::Error>>,
    slots: &Slots,
) -> Result<Response, ApiError> {
    let number = |name| headers.get(name)?.to_str().ok()?.parse().ok();
    let body = body::read(number(header::CONTENT_LENGTH), headers.contains_key(header::EXPECT), stream).await?;
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
    let (model, answers) = opened(slots, &shared, asks).await.map_err(|error| error.prompt_in(field))?;
    let created = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
    let reasoning_field = answers.first().map(|answer| answer.model().manner.reasoning_field).unwrap_or_default();
    let envelope = Envelope { id, created, model, reasoning_field, choices };
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

/// Finds the model and hands the requests to it; returns the name it is served under, and the answers in order. An engine
/// that turns out to be over is started again, once. One that is to make room is not over before the lease is.
async fn opened(slots: &Slots, shared: &Shared, asks: Vec<Ask>) -> Result<(String, Vec<AnswerStream>), ApiError> {
    let slot = slots.get(&shared.model)?;
    let lease = slot.model(None).await?;
    let model = Arc::clone(&lease);
    let answers = match pipeline::open_all(lease, asks.clone()).await {
        Err(PipelineError::Submit(mesh_core::SubmitError::Gone { why })) => {
            tracing::warn!(%why, "the engine is gone; trying once more");
            pipeline::open_all(slot.model(Some(model)).await?, asks.clone()).await?
        }
        outcome => outcome?,
    };
    let each = asks.iter().flat_map(|ask| (0..ask.choices).map(|choice| ask.choice(choice)));
    let in_line = answers
        .into_iter()
        .zip(each)
        .map(|(answer, ask)| answer.in_line(InLine::new(slots.clone(), &shared.model, ask)));
    Ok((slot.name(), in_line.collect()))
}

fn model(slot: &Slot) -> Model {
    let state = slot.state();
    let (created, backend, context_length) = match &state {
        SlotState::Ready(model) => {
            let context = model.handle.capabilities().context_tokens_max;
            (model.since, Some(model.handle.backend.id), Some(context))
        }
        _ => (0, None, None),
    };
    Model {
        id: slot.name(),
        object: "model",
        created,
        owned_by: "mesh-llm",
        status: state.word(),
        backend,
        context_length,
        pinned: slot.pinned(),
        reserved_bytes: slot.reserved_bytes(),
    }
}

/// The server is healthy as long as it answers; what its models are up to is said beside it.
fn health(slots: &Slots) -> serde_json::Value {
    let models: Vec<_> = slots
        .iter()
        .map(|slot| {
            let state = slot.state();
            let mut entry = json!({
                "id": slot.name(), "status": state.word(), "pinned": slot.pinned(),
                "reserved_bytes": slot.reserved_bytes(),
            });
            if let SlotState::Ready(model) = &state {
                let usage = model.usage();
                entry["requests"] = usage.requests.into();
                entry["unused_s"] = usage.last.elapsed().as_secs().into();
            }
            if let SlotState::Failed { failures, reason, .. } = &state {
                entry["failures"] = (*failures).into();
                entry["reason"] = reason.to_string().into();
            }
            entry
        })
        .collect();
    json!({ "status": "ok", "models": models, "memory": slots.memory() })
}
