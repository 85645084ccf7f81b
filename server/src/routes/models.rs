//! `/v1/models`.

use warp::{Reply, reply::Response};

use super::route::Route;
use crate::{
    openai::response::{Model, ModelList},
    slots::{Slot, SlotState},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/v1/models", |door, _| async move {
            let list = ModelList { object: "list", data: door.slots.iter().map(model).collect() };
            Ok(warp::reply::json(&list).into_response())
        }),
        // Names of repositories hold a slash, which clients send as it is or encoded.
        Route::get("/v1/models/{model*}", |door, call| async move {
            Ok::<Response, _>(warp::reply::json(&model(door.slots.get(call.param())?)).into_response())
        }),
    ]
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
