//! Whether the server lives, is ready, and which one it is.

use serde_json::{Map, Value, json};
use warp::{Reply, http::StatusCode};

use super::route::Route;
use crate::{
    listen,
    slots::{SlotState, Slots},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/livez", |_, _| async { Ok(warp::reply::json(&json!({ "status": "ok" })).into_response()) })
            .says("Whether the server lives.")
            .gives::<Map<String, Value>>(),
        Route::get("/readyz", |door, _| async move {
            let status = if door.slots.ready() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            Ok(warp::reply::with_status(warp::reply::json(&health(&door.slots)), status).into_response())
        })
        .says("Whether every model that is to be loaded at the start was.")
        .gives::<Map<String, Value>>(),
        Route::get("/health", |door, _| async move { Ok(warp::reply::json(&health(&door.slots)).into_response()) })
            .says("What the models are up to.")
            .gives::<Map<String, Value>>(),
        Route::get("/version", |_, _| async {
            let version = env!("CARGO_PKG_VERSION");
            let version = json!({ "name": "mesh-llm", "version": version, "instance": listen::instance() });
            Ok(warp::reply::json(&version).into_response())
        })
        .says("Which server this is.")
        .gives::<Map<String, Value>>(),
    ]
}

/// The server is healthy as long as it answers; what its models are up to is said beside it.
fn health(slots: &Slots) -> Value {
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
