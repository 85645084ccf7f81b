//! What every request passes on its way in and out: a name, the guard, the counts, and a line in the log.

use std::{
    convert::Infallible,
    net::SocketAddr,
    pin::{Pin, pin},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};

use futures::future::poll_fn;
use hyper::{
    Request, Response,
    body::{Body, Frame, SizeHint},
};
use serde_json::json;
use tokio::sync::watch;
use tracing::{Instrument, Span, field::Empty};
use uuid::Uuid;
use warp::{
    Reply,
    http::{HeaderMap, HeaderValue, Method, StatusCode, Version, header::VIA},
    reply::Response as Answer,
};

use crate::{
    error::{ApiError, Refused},
    guard::{self, KeyName, METRICS_PATH, Policy, Verdict},
    listen::REQUEST_ID,
    metrics::{Metrics, route},
    record::Record,
};

/// Longest request id that is taken over from a client, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// Longest path that the log shows, in characters.
const LOGGED_PATH_MAX: usize = 200;
/// Most bytes of a refused request that are read, so that its client gets to see why rather than a reset connection.
const DISCARD_BYTES_MAX: u64 = 1 << 20;
/// Longest that is waited for them.
const DISCARD_MAX: Duration = Duration::from_secs(2);

/// What all requests of a server pass.
#[derive(Debug)]
pub(crate) struct Door {
    pub policy: Policy,
    pub metrics: Metrics,
    pub body_bytes_max: u64,
    pub log_prompts: bool,
    /// True once no more is begun.
    pub draining: AtomicBool,
}

impl Door {
    /// Serves one request by `service`, if it may. `busy` counts what is served on its connection.
    pub async fn pass<S, I>(
        self: Arc<Self>,
        service: S,
        mut request: Request<I>,
        peer: SocketAddr,
        busy: watch::Sender<usize>,
    ) -> Result<Response<Watched>, Infallible>
    where
        S: hyper::service::Service<Request<I>, Response = Answer, Error = Infallible>,
        I: Body,
    {
        let id = named(request.headers());
        let trace = Trace::of(request.headers());
        let span =
            tracing::info_span!("request", id = id.to_str().unwrap_or_default(), trace_id = Empty, span_id = Empty);
        if let Some(trace) = &trace {
            span.record("trace_id", &*trace.trace_id).record("span_id", &*trace.span_id);
        }
        let record = Record::new(self.body_bytes_max, self.log_prompts, passed_on(request.headers()));
        let decision = guard::decide(&request, &self.policy);
        let mut exchange =
            Exchange::new(self.clone(), &request, peer, decision.key.clone(), record.clone(), span.clone(), busy);
        let path = request.uri().path().to_owned();
        request.headers_mut().insert(REQUEST_ID, id.clone());
        let answer = async {
            match decision.verdict {
                Verdict::Allow => match self.own(&request) {
                    Some(answer) => Ok(answer),
                    None => service.call(request).await,
                },
                Verdict::Preflight => Ok(StatusCode::NO_CONTENT.into_response()),
                Verdict::Refuse(error) => {
                    discard(request.into_body()).await;
                    Ok(refusal(&path, *error, &id))
                }
            }
        };
        let mut answer = record.scope(answer).instrument(span).await?;
        let headers = answer.headers_mut();
        for (name, value) in decision.headers {
            headers.append(name, value);
        }
        headers.insert(REQUEST_ID, id);
        exchange.status = Some(answer.status());
        exchange.refused = answer.extensions_mut().remove::<Refused>();
        Ok(answer.map(|body| Watched { over: body.is_end_stream(), body, exchange }))
    }

    /// What is answered here rather than by the routes: what they know nothing of.
    fn own<I>(&self, request: &Request<I>) -> Option<Answer> {
        let reads = [Method::GET, Method::HEAD].contains(request.method());
        match request.uri().path() {
            METRICS_PATH if reads => Some(self.metrics.page()),
            METRICS_PATH => Some(ApiError::method_not_allowed("GET, HEAD")),
            "/readyz" if reads && self.draining.load(Ordering::Relaxed) => {
                let reply = warp::reply::json(&json!({ "status": "draining" }));
                Some(warp::reply::with_status(reply, StatusCode::SERVICE_UNAVAILABLE).into_response())
            }
            _ => None,
        }
    }
}

/// A client's own name for its request is kept, if it is a short word.
fn named(headers: &HeaderMap) -> HeaderValue {
    let fits = |id: &&HeaderValue| {
        (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic)
    };
    headers.get(REQUEST_ID).filter(fits).cloned().unwrap_or_else(|| {
        let id = format!("req_{}", Uuid::new_v4().simple());
        HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("req_unnamed"))
    })
}

/// Whether a server like this one has passed the request on, as `via` names everybody who did.
fn passed_on(headers: &HeaderMap) -> bool {
    let all = headers.get_all(VIA).iter().filter_map(|value| value.to_str().ok());
    let hops = all.flat_map(|value| value.split(','));
    hops.into_iter().any(|hop| hop.split_whitespace().nth(1) == Some(env!("CARGO_PKG_NAME")))
}

/// A refusal in the words of the API that the path belongs to.
fn refusal(path: &str, error: ApiError, id: &HeaderValue) -> Answer {
    if path != "/v1/messages" && !path.starts_with("/v1/messages/") {
        return error.into_response();
    }
    let object = error.body().error;
    let kind = match error.status() {
        StatusCode::UNAUTHORIZED => "authentication_error",
        StatusCode::FORBIDDEN => "permission_error",
        _ => "invalid_request_error",
    };
    let body = json!({
        "type": "error",
        "error": { "type": kind, "message": object.message },
        "request_id": id.to_str().unwrap_or_default(),
    });
    let (mut parts, _) = error.into_response().into_parts();
    let (own, body) = warp::reply::json(&body).into_response().into_parts();
    parts.headers.extend(own.headers);
    Answer::from_parts(parts, body)
}

async fn discard(body: impl Body) {
    let mut body = pin!(body);
    let all = async {
        let mut left = DISCARD_BYTES_MAX;
        while let Some(Ok(frame)) = poll_fn(|cx| body.as_mut().poll_frame(cx)).await {
            let read = frame.data_ref().map_or(0, |data| warp::Buf::remaining(data) as u64);
            left = match left.checked_sub(read) {
                Some(left) => left,
                None => break,
            };
        }
    };
    tokio::time::timeout(DISCARD_MAX, all).await.ok();
}

/// The trace that a client's request belongs to: `traceparent`, as the W3C has it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Trace {
    trace_id: String,
    span_id: String,
}

impl Trace {
    fn of(headers: &HeaderMap) -> Option<Self> {
        let given = headers.get("traceparent")?.to_str().ok()?;
        let mut parts = given.split('-');
        let (version, trace, span, flags) = (parts.next()?, parts.next()?, parts.next()?, parts.next()?);
        let hex = |text: &str, length: usize| {
            text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
        };
        let is_zero = |text: &str| text.bytes().all(|byte| byte == b'0');
        // Later versions may have more parts; the first has not.
        let form = hex(version, 2) && version != "ff" && hex(flags, 2) && (version != "00" || parts.next().is_none());
        let ids = hex(trace, 32) && hex(span, 16) && !is_zero(trace) && !is_zero(span);
        (form && ids).then(|| Self { trace_id: trace.into(), span_id: span.into() })
    }
}

/// A request and its answer. When it is dropped it is over, and gets its line.
struct Exchange {
    door: Arc<Door>,
    method: Method,
    path: String,
    version: Version,
    peer: SocketAddr,
    key: Option<KeyName>,
    record: Arc<Record>,
    span: Span,
    busy: watch::Sender<usize>,
    status: Option<StatusCode>,
    refused: Option<Refused>,
    /// True if the client left before the end of the answer.
    left: bool,
}

impl Exchange {
    fn new<I>(
        door: Arc<Door>,
        request: &Request<I>,
        peer: SocketAddr,
        key: Option<KeyName>,
        record: Arc<Record>,
        span: Span,
        busy: watch::Sender<usize>,
    ) -> Self {
        door.metrics.active.inc();
        busy.send_modify(|busy| *busy += 1);
        let (method, path, version) = (request.method().clone(), request.uri().path().to_owned(), request.version());
        Self { door, method, path, version, peer, key, record, span, busy, status: None, refused: None, left: false }
    }

    fn log(&self, route: &str, noted: &crate::record::Noted, took: Duration) {
        let path: String = self.path.chars().take(LOGGED_PATH_MAX).collect();
        let status = self.status.map(|status| u64::from(status.as_u16()));
        let error = if self.left || self.status.is_none() {
            Some("client_left")
        } else {
            self.refused.as_ref().and_then(|refused| refused.code.as_deref())
        };
        let counted = |count: u32| (noted.answers > 0).then_some(u64::from(count));
        let finish = (!noted.finish.is_empty()).then(|| noted.finish.join(","));
        macro_rules! line {
            ($level:ident) => {
                tracing::$level!(
                    http.request.method = self.method.as_str(),
                    url.path = path,
                    http.route = route,
                    http.response.status_code = status,
                    http.server.request.duration = took.as_secs_f64(),
                    network.protocol.version = protocol(self.version),
                    client.address = %self.peer.ip(),
                    enduser.id = self.key.as_deref(),
                    error.r#type = error,
                    error.param = self.refused.as_ref().and_then(|refused| refused.param.as_deref()),
                    gen_ai.request.model = noted.model.as_deref(),
                    gen_ai.usage.input_tokens = counted(noted.usage.prompt_tokens),
                    gen_ai.usage.cache_read.input_tokens = counted(noted.usage.cached_tokens),
                    gen_ai.usage.output_tokens = counted(noted.usage.completion_tokens),
                    gen_ai.response.time_to_first_chunk = noted.first_token.map(|time| time.as_secs_f64()),
                    gen_ai.response.finish_reasons = finish.as_deref(),
                    gen_ai.input.messages = noted.input.as_deref(),
                    gen_ai.output.messages = noted.output.as_deref(),
                    "request finished"
                )
            };
        }
        // Probes come every few seconds, and say nothing.
        let probe = matches!(route, "/health" | "/livez" | "/readyz" | "/version" | "/metrics");
        if probe && self.status.is_some_and(|status| status.is_success()) { line!(debug) } else { line!(info) }
    }
}

impl Drop for Exchange {
    fn drop(&mut self) {
        let (noted, took, route) = (self.record.taken(), self.record.began.elapsed(), route(&self.path));
        self.span.in_scope(|| self.log(route, &noted, took));
        let metrics = &self.door.metrics;
        metrics.exchanged(&self.method, route, self.status, noted.model.unwrap_or_default(), took);
        metrics.active.dec();
        self.busy.send_modify(|busy| *busy -= 1);
    }
}

fn protocol(version: Version) -> &'static str {
    match version {
        Version::HTTP_10 => "1.0",
        Version::HTTP_2 => "2",
        _ => "1.1",
    }
}

/// An answer's body, whose end is the end of the exchange.
pub(crate) struct Watched {
    over: bool,
    // In this order: what makes the answer is dropped before the exchange is over, and has told what it knows by then.
    body: warp_body::Body,
    exchange: Exchange,
}

/// The body of warp's replies, which it does not name.
mod warp_body {
    pub type Body = <super::Answer as Inner>::Body;

    pub trait Inner {
        type Body;
    }

    impl<B> Inner for hyper::Response<B> {
        type Body = B;
    }
}

impl Body for Watched {
    type Data = <warp_body::Body as Body>::Data;
    type Error = <warp_body::Body as Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Self::Data>, Self::Error>>> {
        let Self { over, body, exchange } = &mut *self;
        let _entered = exchange.span.enter();
        let frame = exchange.record.sync_scope(|| Pin::new(&mut *body).poll_frame(cx));
        *over |= matches!(frame, Poll::Ready(None)) || body.is_end_stream();
        frame
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Watched {
    fn drop(&mut self) {
        // An answer to HEAD has a body that nobody reads.
        self.exchange.left = !self.over && self.exchange.method != Method::HEAD;
    }
}

#[cfg(test)]
mod tests {
    use warp::http::HeaderName;

    use super::*;

    #[test]
    fn what_was_passed_on_is_known_by_who_did() {
        let of = |values: &[&str]| {
            let name: HeaderName = VIA;
            passed_on(&values.iter().map(|value| (name.clone(), value.parse().unwrap())).collect())
        };
        for values in [&["1.1 mesh-llm"][..], &["1.0 proxy, 1.1 mesh-llm (box)"], &["1.1 proxy", "HTTP/2 mesh-llm"]] {
            assert!(of(values), "{values:?}");
        }
        for values in [&[][..], &["1.1 nginx"], &["mesh-llm"], &["1.1 mesh-llm.example"], &["1.1 a (mesh-llm)", ","]] {
            assert!(!of(values), "{values:?}");
        }
    }

    #[test]
    fn traces_are_taken_over_if_they_are_well_formed() {
        let of = |value: &str| {
            let headers = HeaderMap::from_iter([("traceparent".parse().unwrap(), value.parse().unwrap())]);
            Trace::of(&headers).map(|trace| format!("{}/{}", trace.trace_id, trace.span_id))
        };
        let (trace, span) = ("0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331");
        let want = Some(format!("{trace}/{span}"));
        assert_eq!(of(&format!("00-{trace}-{span}-01")), want);
        assert_eq!(of(&format!("01-{trace}-{span}-01-more")), want);
        for malformed in [
            "",
            "00",
            &format!("00-{trace}-{span}"),
            &format!("00-{trace}-{span}-01-more"),
            &format!("ff-{trace}-{span}-01"),
            &format!("00-{}-{span}-01", trace.to_uppercase()),
            &format!("00-{}-{span}-01", "0".repeat(32)),
            &format!("00-{trace}-{}-01", "0".repeat(16)),
            &format!("00-{trace}-{span}0-01"),
        ] {
            assert_eq!(of(malformed), None, "{malformed}");
        }
    }
}
