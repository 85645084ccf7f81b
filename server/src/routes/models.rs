//! `/v1/models`. Reads notes and snapshots: nothing here waits for a device.

use std::collections::BTreeMap;

use mesh_core::node::{Reasoning, RemoteModel};
use warp::{Reply, reply::Response};

use super::route::Route;
use crate::{
    error::ApiError,
    openai::model::{Model, ModelCapabilities, ModelList},
    slots::{Slot, SlotState, Slots},
};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/v1/models", |door, _| async move {
            let list = ModelList { object: "list", data: models(&door.slots) };
            Ok(warp::reply::json(&list).into_response())
        })
        .says("The models that are served, loaded or not.")
        .gives::<ModelList>(),
        // Names of repositories hold a slash, which clients send as it is or encoded.
        Route::get("/v1/models/{model*}", |door, call| async move {
            let name = call.param();
            let found = match door.slots.get(name) {
                Ok(slot) => model(slot, &door.slots.remote().list()),
                Err(error) => remote(&door.slots, name).ok_or(error)?,
            };
            Ok::<Response, ApiError>(warp::reply::json(&found).into_response())
        })
        .says("One model.")
        .gives::<Model>(),
    ]
}

/// Each once: those here, and then those that only others have.
fn models(slots: &Slots) -> Vec<Model> {
    let remote = slots.remote().list();
    let own = slots.iter().map(|slot| model(slot, &remote));
    let others = remote.values().filter(|(_, model)| slots.get(&model.name).is_err());
    own.chain(others.filter_map(|(kind, model)| elsewhere(kind, model))).collect()
}

/// One that only others have, by its name or as it is called on one of them.
fn remote(slots: &Slots, name: &str) -> Option<Model> {
    let list = slots.remote().list();
    if let Some((kind, found)) = list.get(name) {
        return elsewhere(kind, found);
    }
    let (model, node) = name.rsplit_once('@')?;
    let (kind, found) = list.get(model)?;
    let nodes: Vec<_> = found.nodes.iter().filter(|offer| offer.node == node).cloned().collect();
    elsewhere(kind, &RemoteModel { name: found.name.clone(), nodes })
}

fn elsewhere(kind: &str, model: &RemoteModel) -> Option<Model> {
    let offer = &model.nodes.first()?.offer;
    let capabilities = ModelCapabilities {
        chat: Some(offer.chat),
        tools: Some(offer.tools),
        reasoning: Some(offer.reasoning.into()),
        ..ModelCapabilities::default()
    };
    Some(Model {
        id: model.name.clone(),
        object: "model",
        created: offer.since,
        owned_by: "mesh-llm",
        status: "ready",
        // Here it is served by others; what they serve it with is said of each.
        backend: Some(kind.to_owned()),
        context_length: Some(offer.capabilities.context_tokens_max),
        pinned: false,
        reserved_bytes: 0,
        format: offer.format.map(|format| format.to_string().to_lowercase()),
        quantization: offer.quantization.clone(),
        parameters: offer.parameters,
        weight_bytes: offer.weight_bytes,
        family: offer.family.clone(),
        nodes: model.nodes.iter().map(Into::into).collect(),
        capabilities: capabilities.with(&offer.capabilities),
    })
}

fn model(slot: &Slot, remote: &BTreeMap<String, (&str, RemoteModel)>) -> Model {
    let (state, known) = (slot.state(), slot.known());
    let created = if let SlotState::Ready(model) = &state { model.since } else { 0 };
    let profile = known.profile.as_deref();
    let promised = known.elected.as_ref().map(|(_, capabilities)| capabilities);
    let mut capabilities = ModelCapabilities {
        chat: known.chat,
        tools: known.tools,
        reasoning: known.thinking.map(|thinking| Reasoning::from(thinking).into()),
        ..ModelCapabilities::default()
    };
    if let Some(promised) = promised {
        capabilities = capabilities.with(promised);
    }
    Model {
        nodes: remote
            .get(&slot.name())
            .map(|(_, model)| model.nodes.iter().map(Into::into).collect())
            .unwrap_or_default(),
        id: slot.name(),
        object: "model",
        created,
        owned_by: "mesh-llm",
        status: state.word(),
        backend: known.elected.as_ref().map(|(backend, _)| (*backend).to_owned()),
        context_length: promised
            .map(|promised| promised.context_tokens_max)
            .or_else(|| Some(profile?.context_tokens_max.as_ref()?.value)),
        pinned: slot.pinned(),
        reserved_bytes: slot.reserved_bytes(),
        format: profile.map(|profile| profile.format.value.to_string().to_lowercase()),
        quantization: profile.and_then(|profile| Some(profile.quantization.as_ref()?.value.to_string())),
        parameters: profile.and_then(|profile| Some(profile.parameters.as_ref()?.value)),
        weight_bytes: profile.map(|profile| profile.weight_bytes.value),
        family: known.family.map(|family| family.id().to_owned()),
        capabilities,
    }
}
