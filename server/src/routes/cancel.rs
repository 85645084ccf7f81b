//! `/v1/requests/{id}/cancel`.

use warp::Reply;

use super::route::Route;
use crate::{error::ApiError, openai::cancel::Cancelled};

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::post("/v1/requests/{id}/cancel", |door, call| async move {
            let id = call.param();
            if !door.running.cancel(id) {
                return Err(ApiError::not_running(id));
            }
            tracing::debug!(id, "cancelled");
            Ok(warp::reply::json(&Cancelled { id: id.to_owned(), object: "request", cancelled: true }).into_response())
        })
        .says("Cancels a running request, named by its answer's id or by its `x-request-id`.")
        .gives::<Cancelled>(),
    ]
}
