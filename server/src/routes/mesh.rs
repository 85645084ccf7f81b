//! `/v1/mesh`: who serves for whom. Names and counts; no address of anybody.

use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;
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
}

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::get("/v1/mesh", |door, _| async move {
            let sources = door.slots.remote().sources();
            let sources = sources.iter().map(|source| Source { kind: source.kind(), status: source.status() });
            let others = Others { sources: sources.collect() };
            Ok::<Response, ApiError>(warp::reply::json(&others).into_response())
        })
        .says("The machines that serve for this one and that it serves for.")
        .gives::<Others>(),
    ]
}
