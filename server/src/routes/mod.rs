//! What is served where. One file a surface; [`all`] is the one list of what there is.

mod cancel;
mod completions;
mod embeddings;
mod health;
mod messages;
mod models;
mod open;
mod openapi;
mod responses;
mod route;
mod tokens;

use std::{convert::Infallible, sync::Arc};

use warp::{
    Filter, Rejection, Reply,
    filters::BoxedFilter,
    http::{HeaderMap, Method},
    path::FullPath,
    reply::Response,
};

use crate::{error::ApiError, openai::responses::Store, running::Running, slots::Slots};
pub(crate) use route::{Call, Door};
use route::{Route, matched};

/// Every route, in the order in which they are tried.
fn all() -> Vec<Route> {
    [
        completions::routes(),
        messages::routes(),
        responses::routes(),
        embeddings::routes(),
        tokens::routes(),
        cancel::routes(),
        models::routes(),
        health::routes(),
        openapi::routes(),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// All routes. Only generation waits for anything; the rest reads snapshots.
pub fn routes(slots: Slots) -> impl Filter<Extract = (Response,), Error = Infallible> + Clone + Send + Sync + 'static {
    let door = Arc::new(Door { slots, running: Running::default(), store: Store::default() });
    let found = all()
        .into_iter()
        .map(|route| filter(route, door.clone()))
        .chain([crate::page::routes().boxed()])
        .reduce(|one, other| one.or(other).unify().boxed())
        .unwrap_or_else(|| warp::any().and_then(|| async { Err(warp::reject::not_found()) }).boxed());
    warp::path::full().and(warp::any().and(found).map(Some).or_else(recover)).map(
        |path: FullPath, reply: Option<Response>| {
            reply.unwrap_or_else(|| ApiError::no_such_path(path.as_str()).into_response())
        },
    )
}

fn filter(route: Route, door: Arc<Door>) -> BoxedFilter<(Response,)> {
    let Route { method, path, handler, form, .. } = route;
    let here = warp::path::full().and_then(move |full: FullPath| async move {
        matched(path, full.as_str()).ok_or_else(warp::reject::not_found)
    });
    let method = match method {
        Method::POST => warp::post().boxed(),
        Method::DELETE => warp::delete().boxed(),
        _ => warp::get().boxed(),
    };
    let query = warp::query::raw().map(Some).or_else(|_| async { Ok::<_, Rejection>((None,)) });
    here.and(method)
        .and(query)
        .and(warp::header::headers_cloned())
        .and(warp::body::stream())
        .then(move |params: Vec<String>, query: Option<String>, headers: HeaderMap, body| {
            let call = Call::new(params, query, headers, body);
            let request_id = call.request_id().map(str::to_owned);
            let answer = handler(door.clone(), call);
            async move {
                answer.await.unwrap_or_else(|error| {
                    // Not the message: it may quote what was sent.
                    let object = error.body().error;
                    tracing::info!(
                        path,
                        status = error.status().as_u16(),
                        code = object.code,
                        param = object.param,
                        "refused"
                    );
                    form.reply(error, request_id.as_deref())
                })
            }
        })
        .boxed()
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
