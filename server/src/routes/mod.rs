//! What is served where. One file a surface; `all` is the one list of what there is.

mod cancel;
mod completions;
mod embeddings;
mod health;
mod mesh;
mod messages;
mod models;
mod open;
mod openapi;
mod responses;
mod route;
mod tokens;

use std::{
    collections::BTreeSet,
    convert::Infallible,
    sync::{Arc, LazyLock},
};

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
        mesh::routes(),
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
    warp::path::full()
        .and(warp::any().and(found).map(Ok).or_else(|rejection| async { Ok::<_, Infallible>((Err(rejection),)) }))
        .map(|path: FullPath, reply: Result<Response, Rejection>| {
            reply.unwrap_or_else(|rejection| turned_away(path.as_str(), &rejection))
        })
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
                    tracing::debug!(
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

fn turned_away(path: &str, rejection: &Rejection) -> Response {
    if rejection.is_not_found() {
        return ApiError::no_such_path(path).into_response();
    }
    if rejection.find::<warp::reject::MethodNotAllowed>().is_some() {
        return ApiError::method_not_allowed(&allowed(path));
    }
    tracing::error!(?rejection, "a request was rejected for a reason nobody foresaw");
    ApiError::internal().into_response()
}

/// The methods that a path takes. What is not a route is a page.
fn allowed(path: &str) -> String {
    static ROUTES: LazyLock<Vec<(Method, &str)>> =
        LazyLock::new(|| all().into_iter().map(|route| (route.method, route.path)).collect());
    let methods: BTreeSet<_> = ROUTES
        .iter()
        .filter(|(_, template)| matched(template, path).is_some())
        .map(|(method, _)| method.as_str())
        .collect();
    if methods.is_empty() { "GET".into() } else { methods.into_iter().collect::<Vec<_>>().join(", ") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_say_what_they_take() {
        assert_eq!(allowed("/v1/chat/completions"), "POST");
        assert_eq!(allowed("/v1/responses/resp_1"), "DELETE, GET");
        assert_eq!(allowed("/v1/models/a/b"), "GET");
        assert_eq!(allowed("/"), "GET");
        let reply = ApiError::method_not_allowed("DELETE, GET");
        assert_eq!(reply.headers()["allow"], "DELETE, GET");
    }
}
