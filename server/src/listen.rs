//! Connections: bounds on what a client may do to one, TLS, and the end.

use std::{
    net::SocketAddr,
    sync::{
        Arc, LazyLock,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use hyper::service::service_fn;
use hyper_util::{
    rt::{TokioExecutor, TokioIo, TokioTimer},
    server::conn::auto,
    service::TowerToHyperService,
};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{Semaphore, watch},
};

use crate::{
    body::BODY_BYTES_MAX, door::Door, guard::Policy, metrics::Metrics, routes::routes, slots::Slots, tls::Tls,
};

/// Most connections at a time; further ones wait to be accepted.
pub const CONNECTIONS_MAX: usize = 1024;
/// Most requests at a time on one connection of HTTP/2.
pub const STREAMS_MAX: u32 = 64;
/// Longest a client may take over its headers.
pub const HEADERS_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest a client may take to agree on TLS.
pub const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest that a connection stays without a request.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Longest that one which was told to end may take over what is not a request.
const LINGER: Duration = Duration::from_secs(2);
/// How often a connection of HTTP/2 is asked whether its client is still there, and how long that may take.
const PING: Duration = Duration::from_secs(20);
/// Most headers of a request.
pub const HEADERS_MAX: usize = 100;
/// Most bytes of headers, which are buffered whole.
pub const HEADER_BYTES_MAX: usize = 64 << 10;

/// The header with the request's name.
pub const REQUEST_ID: &str = "x-request-id";

/// What this program calls itself in `/version`, other than all others and each time it is started: a server that is
/// told to ask another one notices so that it would ask itself.
pub fn instance() -> &'static str {
    static INSTANCE: LazyLock<String> = LazyLock::new(|| uuid::Uuid::new_v4().simple().to_string());
    &INSTANCE
}

/// How a server deals with its clients.
#[derive(Clone, Debug)]
pub struct Options {
    /// Who may ask. The address in it is set to the one that is listened on.
    pub policy: Policy,
    /// TLS; without it, connections are in the clear.
    pub tls: Option<Tls>,
    /// Longest body that is read, in bytes.
    pub body_bytes_max: u64,
    /// Whether the log shows what was asked and answered.
    pub log_prompts: bool,
    /// Longest that a connection stays without a request.
    pub idle: Duration,
    /// Longest a client may take to agree on TLS.
    pub handshake: Duration,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            policy: Policy::default(),
            tls: None,
            body_bytes_max: BODY_BYTES_MAX,
            log_prompts: false,
            idle: IDLE_TIMEOUT,
            handshake: HANDSHAKE_TIMEOUT,
        }
    }
}

/// Binds an address.
pub async fn bind(address: impl tokio::net::ToSocketAddrs) -> std::io::Result<TcpListener> {
    TcpListener::bind(address).await
}

/// Serves until `shutdown` as [`serve_with`] does, with nothing set.
pub async fn serve(listener: TcpListener, slots: Slots, shutdown: impl Future<Output = ()>, grace: Duration) {
    serve_with(listener, slots, Options::default(), shutdown, grace).await;
}

/// Serves until `shutdown`, then refuses new connections and lets running requests finish for `grace`, and engines
/// with them.
pub async fn serve_with(
    listener: TcpListener,
    slots: Slots,
    mut options: Options,
    shutdown: impl Future<Output = ()>,
    grace: Duration,
) {
    let service = warp::service(routes(slots.clone()));
    if let Ok(address) = listener.local_addr() {
        options.policy.bound = address.ip();
    }
    let door = Arc::new(Door {
        policy: options.policy,
        metrics: Metrics::new(slots.clone(), CONNECTIONS_MAX),
        body_bytes_max: options.body_bytes_max,
        log_prompts: options.log_prompts,
        draining: AtomicBool::new(false),
    });
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let builder = Arc::new(builder());
    let (draining, told) = watch::channel(false);

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
        let connection = Connection {
            builder: builder.clone(),
            door: door.clone(),
            peer,
            idle: options.idle,
            draining: told.clone(),
        };
        let (tls, handshake) = (options.tls.as_ref().map(Tls::acceptor), options.handshake);
        let service = TowerToHyperService::new(service.clone());
        tokio::spawn(async move {
            let _place = place;
            let Some(tls) = tls else { return connection.serve(stream, service).await };
            match tokio::time::timeout(handshake, tls.accept(stream)).await {
                Ok(Ok(stream)) => connection.serve(stream, service).await,
                Ok(Err(error)) => tracing::debug!(%peer, %error, "TLS was not agreed on"),
                Err(_) => tracing::debug!(%peer, "TLS was not agreed on in time"),
            }
        });
    }
    door.draining.store(true, Ordering::Relaxed);
    drop((listener, told));
    tracing::info!(grace_s = grace.as_secs(), "draining");
    draining.send_replace(true);
    let engines = slots.drain(grace);
    let answers = async {
        // Engines end their streams within the grace; what is left after it is a client that does not read.
        tokio::time::timeout(grace + Duration::from_secs(1), draining.closed()).await.ok();
    };
    futures::join!(engines, answers);
}

fn builder() -> auto::Builder<TokioExecutor> {
    let mut builder = auto::Builder::new(TokioExecutor::new());
    builder
        .http1()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADERS_TIMEOUT)
        .max_headers(HEADERS_MAX)
        .max_buf_size(HEADER_BYTES_MAX);
    builder
        .http2()
        .timer(TokioTimer::new())
        .max_header_list_size(HEADER_BYTES_MAX as u32)
        .max_concurrent_streams(STREAMS_MAX)
        .keep_alive_interval(PING)
        .keep_alive_timeout(PING);
    builder
}

/// One connection, and what ends it.
struct Connection {
    builder: Arc<auto::Builder<TokioExecutor>>,
    door: Arc<Door>,
    peer: SocketAddr,
    idle: Duration,
    draining: watch::Receiver<bool>,
}

impl Connection {
    async fn serve<S>(mut self, stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + 'static, service: S)
    where
        S: hyper::service::Service<
                hyper::Request<hyper::body::Incoming>,
                Response = warp::reply::Response,
                Error = std::convert::Infallible,
            > + Clone
            + Send
            + Sync
            + 'static,
        S::Future: Send + 'static,
    {
        let _counted = Counted::new(&self.door);
        let (busy, mut requests) = watch::channel(0);
        let (door, peer) = (self.door.clone(), self.peer);
        let service = service_fn(move |request| door.clone().pass(service.clone(), request, peer, busy.clone()));
        let mut connection = std::pin::pin!(self.builder.serve_connection(TokioIo::new(stream), service));
        let mut ending = false;
        loop {
            let patience = if ending { LINGER } else { self.idle };
            tokio::select! {
                outcome = connection.as_mut() => {
                    if let Err(error) = outcome {
                        tracing::debug!(%peer, error, "a connection broke");
                    }
                    return;
                }
                () = quiet(&mut requests, patience) => {
                    if ending {
                        return;
                    }
                }
                _ = self.draining.wait_for(|draining| *draining), if !ending => {}
            }
            ending = true;
            connection.as_mut().graceful_shutdown();
        }
    }
}

/// Waits until no request was served for so long.
async fn quiet(requests: &mut watch::Receiver<usize>, patience: Duration) {
    loop {
        if *requests.borrow_and_update() > 0 {
            if requests.changed().await.is_err() {
                return;
            }
            continue;
        }
        tokio::select! {
            () = tokio::time::sleep(patience) => return,
            changed = requests.changed() => if changed.is_err() {
                tokio::time::sleep(patience).await;
                return;
            },
        }
    }
}

/// Counts a connection for as long as it is there.
struct Counted(Arc<Door>);

impl Counted {
    fn new(door: &Arc<Door>) -> Self {
        door.metrics.connections.inc();
        Self(door.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.metrics.connections.dec();
    }
}

/// Events are small and must not wait for more of them.
fn prepare(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
}
