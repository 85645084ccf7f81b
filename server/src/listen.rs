//! Connections: bounds on what a client may do to one, request ids, and the end.

use std::{convert::Infallible, net::SocketAddr, sync::Arc, time::Duration};

use hyper::{Request, Response, body::Incoming, service::service_fn};
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::{conn::auto, graceful::GracefulShutdown},
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::Semaphore,
};
use tracing::Instrument;
use uuid::Uuid;
use warp::http::HeaderValue;

use crate::{routes::routes, slots::Slots};

/// Most connections at a time; further ones wait to be accepted.
pub const CONNECTIONS_MAX: usize = 1024;
/// Longest a client may take over its headers.
pub const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Most headers of a request.
pub const HEADERS_MAX: usize = 100;
/// Most bytes of headers, which are buffered whole.
pub const HEADER_BYTES_MAX: usize = 64 << 10;

/// Longest request id that is taken over from a client, in bytes.
const REQUEST_ID_BYTES_MAX: usize = 128;
/// The header with the request's name.
pub const REQUEST_ID: &str = "x-request-id";

/// Binds an address.
pub async fn bind(address: impl tokio::net::ToSocketAddrs) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `shutdown`, then refuses new connections and lets running requests finish for `grace`, and engines
/// with them.
pub async fn serve(listener: TcpListener, slots: Slots, shutdown: impl Future<Output = ()>, grace: Duration) {
    let service = warp::service(routes(slots.clone()));
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let connections = GracefulShutdown::new();
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEADER_BYTES_MAX);
    builder.http2().timer(TokioTimer::new()).max_header_list_size(HEADER_BYTES_MAX as u32);
    let builder = Arc::new(builder);

    let mut shutdown = std::pin::pin!(shutdown);
    loop {
        let accepted = async {
            let place = places.clone().acquire_owned().await;
            (listener.accept().await, place)
        };
        let (stream, peer, place) = tokio::select! {
            () = &mut shutdown => break,
            (accepted, place) = accepted => match accepted {
                Ok((stream, peer)) => (stream, peer, place),
                Err(error) => {
                    // Out of file descriptors, mostly. Connections that end will free some.
                    tracing::warn!(%error, "a connection could not be accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
        };
        prepare(&stream);
        let inner = TowerToHyperService::new(service.clone());
        let service = service_fn(move |request| identified(inner.clone(), request, peer));
        let (builder, watcher) = (builder.clone(), connections.watcher());
        tokio::spawn(async move {
            let _place = place;
            let connection = builder.serve_connection(TokioIo::new(stream), service);
            if let Err(error) = watcher.watch(connection.into_owned()).await {
                tracing::debug!(%peer, error, "a connection broke");
            }
        });
    }
    drop(listener);
    tracing::info!(grace_s = grace.as_secs(), "draining");
    let engines = slots.drain(grace);
    let answers = async {
        // Engines end their streams within the grace; what is left after it is a client that does not read.
        tokio::time::timeout(grace + Duration::from_secs(1), connections.shutdown()).await.ok();
    };
    futures::join!(engines, answers);
}

/// Events are small and must not wait for more of them.
fn prepare(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
}

/// Names the request, in the log as in the answer. A client's own name for it is kept.
async fn identified<S, B>(
    service: S,
    mut request: Request<Incoming>,
    peer: SocketAddr,
) -> Result<Response<B>, Infallible>
where
    S: hyper::service::Service<Request<Incoming>, Response = Response<B>, Error = Infallible>,
{
    let given = request
        .headers()
        .get(REQUEST_ID)
        .filter(|id| (1..=REQUEST_ID_BYTES_MAX).contains(&id.len()) && id.as_bytes().iter().all(u8::is_ascii_graphic));
    let id = given.cloned().unwrap_or_else(|| {
        let id = format!("req_{}", Uuid::new_v4().simple());
        HeaderValue::try_from(id).unwrap_or(HeaderValue::from_static("req_unnamed"))
    });
    request.headers_mut().insert(REQUEST_ID, id.clone());
    let span = tracing::info_span!("request", id = id.to_str().unwrap_or_default());
    async {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let began = std::time::Instant::now();
        let mut response = service.call(request).await?;
        tracing::debug!(%peer, %method, path, status = response.status().as_u16(), ms = began.elapsed().as_millis() as u64, "answered");
        response.headers_mut().insert(REQUEST_ID, id);
        Ok(response)
    }
    .instrument(span)
    .await
}
