//! `/v1/mesh`: who serves for whom. Names and counts; no address of anybody.

use mesh_core::node::Routing;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Value, json};
use warp::{Reply, reply::Response};

use super::route::Route;
use crate::error::ApiError;

/// Other machines, by where they come from.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct Others {
    /// What this server is part of, or has beside it.
    sources: Vec<Source>,
}

/// One mesh, or one shared server.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct Source {
    /// `mesh` or `share`.
    kind: &'static str,
    /// What it says of itself.
    status: Value,
    /// The models that are ready there, each with the machine that has it.
    offers: Vec<Value>,
}

/// Why a request would go where it goes.
#[derive(Clone, Debug, Serialize, JsonSchema)]
struct Way {
    /// Whether it goes to another machine.
    elsewhere: bool,
    /// Why.
    why: String,
    /// The machines that offer the model, best first, each with what is expected of it.
    machines: Vec<String>,
}

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/v1/mesh", |door, _| async move {
            let sources = door.slots.remote().sources();
            let sources = sources.iter().map(|source| {
                let offers = source.models().into_iter().flat_map(|model| model.nodes);
                let offers = offers.map(|offer| json!(offer)).collect();
                Source { kind: source.kind(), status: source.status(), offers }
            });
            let others = Others { sources: sources.collect() };
            Ok::<Response, ApiError>(warp::reply::json(&others).into_response())
        })
        .says("The machines that serve for this one and that it serves for.")
        .gives::<Others>(),
        // Names of models hold slashes.
        Route::get("/v1/mesh/routes/{model*}", |door, call| async move {
            let Routing { elsewhere, why, machines } = door.slots.explain(call.param())?;
            Ok::<Response, ApiError>(warp::reply::json(&Way { elsewhere, why, machines }).into_response())
        })
        .says("Why a request for a model would go where it goes now.")
        .gives::<Way>(),
    ]
}
