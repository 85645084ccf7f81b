//! What Prometheus reads at `/metrics`.
//!
//! Labels are bounded: models are those that are served, paths those that are known, and whatever else a client thinks of
//! counts as `other`.

mod models;
mod peers;
mod tally;
mod watch;

use std::time::Duration;

use prometheus_client::{
    encoding::{EncodeLabelSet, text},
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram, info::Info},
    registry::{Registry, Unit},
};
use warp::{
    Reply,
    http::{HeaderValue, Method, StatusCode, header::CONTENT_TYPE},
    reply::Response,
};

use crate::slots::Slots;

pub use tally::Tally;
pub(crate) use watch::Watch;

/// What the answer to `/metrics` is written in.
const FORM: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Seconds for a whole exchange over HTTP.
const EXCHANGE_S: [f64; 14] = [0.001, 0.005, 0.01, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 15.0, 60.0, 300.0, 1800.0];

/// What counts as the status of an exchange that the client left before it had one. Proxies log it so.
const LEFT: u16 = 499;

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Exchange {
    method: &'static str,
    path: &'static str,
    status: u16,
    /// Empty where no model had a part in it.
    model: String,
}

#[derive(Clone, Debug, Hash, PartialEq, Eq, EncodeLabelSet)]
struct Path {
    path: &'static str,
}

/// All that is counted of a server.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Exchange, Counter>,
    durations: Family<Path, Histogram, fn() -> Histogram>,
    /// Exchanges that are not over.
    pub active: Gauge,
    /// Connections that are open.
    pub connections: Gauge,
}

impl Metrics {
    pub fn new(slots: Slots, connections_max: usize) -> Self {
        let requests = Family::<Exchange, Counter>::default();
        let durations = Family::new_with_constructor((|| Histogram::new(EXCHANGE_S)) as fn() -> Histogram);
        let (active, connections) = (Gauge::default(), Gauge::default());
        let mut whole = Registry::default();
        whole.register_collector(Box::new(models::Process));
        let registry = whole.sub_registry_with_prefix("mesh_llm");
        let build = Info::new([("version", env!("CARGO_PKG_VERSION"))]);
        registry.register("build", "The program", build);
        registry.register("http_requests", "Requests that are over", requests.clone());
        registry.register_with_unit(
            "http_request_duration",
            "From a request's head to the end of its answer",
            Unit::Seconds,
            durations.clone(),
        );
        registry.register("http_requests_active", "Requests that are not over", active.clone());
        registry.register("connections", "Connections that are open", connections.clone());
        let most = Gauge::<i64>::default();
        most.set(i64::try_from(connections_max).unwrap_or(i64::MAX));
        registry.register("connections_max", "Connections that may be open", most);
        registry.register_collector(Box::new(peers::Peers(slots.clone())));
        registry.register_collector(Box::new(models::Models(slots)));
        Self { registry: whole, requests, durations, active, connections }
    }

    /// An exchange is over; `status` is absent where the client left before there was an answer.
    pub fn exchanged(
        &self,
        method: &Method,
        route: &'static str,
        status: Option<StatusCode>,
        model: String,
        took: Duration,
    ) {
        let status = status.map_or(LEFT, |status| status.as_u16());
        self.requests.get_or_create(&Exchange { method: known(method), path: route, status, model }).inc();
        self.durations.get_or_create(&Path { path: route }).observe(took.as_secs_f64());
    }

    /// All of it, in words that Prometheus reads.
    pub fn page(&self) -> Response {
        let mut page = String::new();
        if text::encode(&mut page, &self.registry).is_err() {
            return crate::error::ApiError::internal().into_response();
        }
        let mut response = page.into_response();
        response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(FORM));
        response
    }
}

fn known(method: &Method) -> &'static str {
    const KNOWN: [&str; 7] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"];
    KNOWN.into_iter().find(|known| *known == method.as_str()).unwrap_or("other")
}

/// Paths without a part that differs from request to request.
const PATHS: [&str; 18] = [
    "/",
    "/apply-template",
    "/detokenize",
    "/health",
    "/livez",
    "/metrics",
    "/openapi.json",
    "/readyz",
    "/tokenize",
    "/v1/chat/completions",
    "/v1/completions",
    "/v1/embeddings",
    "/v1/mesh",
    "/v1/messages",
    "/v1/messages/count_tokens",
    "/v1/models",
    "/v1/responses",
    "/version",
];

/// The path as labels have it.
pub(crate) fn route(path: &str) -> &'static str {
    if let Some(path) = PATHS.into_iter().find(|known| *known == path) {
        return path;
    }
    match path {
        _ if path.starts_with("/v1/mesh/routes/") => "/v1/mesh/routes/{model}",
        _ if path.starts_with("/v1/models/") => "/v1/models/{model}",
        _ if path.starts_with("/v1/responses/") => "/v1/responses/{id}",
        _ if path.starts_with("/v1/requests/") => "/v1/requests/{id}",
        _ if path.starts_with("/ui/") => "/ui/{file}",
        _ => "other",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_bounded_whatever_clients_think_of() {
        for (path, want) in [
            ("/", "/"),
            ("/v1/models", "/v1/models"),
            ("/v1/models/org/name", "/v1/models/{model}"),
            ("/v1/responses/resp_1/cancel", "/v1/responses/{id}"),
            ("/v1/requests/req_1/cancel", "/v1/requests/{id}"),
            ("/ui/a.js", "/ui/{file}"),
            ("/v1/nothing", "other"),
            ("//", "other"),
            ("", "other"),
        ] {
            assert_eq!(route(path), want, "{path}");
        }
        assert_eq!(known(&Method::from_bytes(b"BREW").unwrap()), "other");
        assert_eq!(known(&Method::POST), "POST");
    }
}
