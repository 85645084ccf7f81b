//! `/v1/models`. Reads notes and snapshots: nothing here waits for a device.

use warp::{Reply, reply::Response};

use super::route::Route;
use crate::{
    openai::model::{Model, ModelCapabilities, ModelList},
    slots::{Slot, SlotState},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/v1/models", |door, _| async move {
            let list = ModelList { object: "list", data: door.slots.iter().map(model).collect() };
            Ok(warp::reply::json(&list).into_response())
        })
        .says("The models that are served, loaded or not.")
        .gives::<ModelList>(),
        // Names of repositories hold a slash, which clients send as it is or encoded.
        Route::get("/v1/models/{model*}", |door, call| async move {
            Ok::<Response, _>(warp::reply::json(&model(door.slots.get(call.param())?)).into_response())
        })
        .says("One model.")
        .gives::<Model>(),
    ]
}

fn model(slot: &Slot) -> Model {
    let (state, known) = (slot.state(), slot.known());
    let created = if let SlotState::Ready(model) = &state { model.since } else { 0 };
    let profile = known.profile.as_deref();
    let promised = known.elected.as_ref().map(|(_, capabilities)| capabilities);
    let mut capabilities = ModelCapabilities {
        chat: known.chat,
        tools: known.tools,
        reasoning: known.thinking.map(Into::into),
        ..ModelCapabilities::default()
    };
    if let Some(promised) = promised {
        capabilities = capabilities.with(promised);
    }
    Model {
        id: slot.name(),
        object: "model",
        created,
        owned_by: "mesh-llm",
        status: state.word(),
        backend: known.elected.as_ref().map(|(backend, _)| *backend),
        context_length: promised
            .map(|promised| promised.context_tokens_max)
            .or_else(|| Some(profile?.context_tokens_max.as_ref()?.value)),
        pinned: slot.pinned(),
        reserved_bytes: slot.reserved_bytes(),
        format: profile.map(|profile| profile.format.value.to_string().to_lowercase()),
        quantization: profile.and_then(|profile| Some(profile.quantization.as_ref()?.value.to_string())),
        parameters: profile.and_then(|profile| Some(profile.parameters.as_ref()?.value)),
        weight_bytes: profile.map(|profile| profile.weight_bytes.value),
        family: known.family.map(|family| family.id()),
        capabilities,
    }
}
