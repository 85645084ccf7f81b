//! The HTTP client of one server. All that it reads is bounded, in bytes and in time.
//!
//! Each request has a connection of its own: dropping an answer closes it, which is how a server learns that nobody reads on,
//! and none is used again just as the server closes it.

use std::{
    error::Error as _,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use eventsource_stream::{EventStreamError, Eventsource};
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::{
    RequestBuilder, Response,
    header::{ACCEPT, HeaderValue, RETRY_AFTER, VIA},
};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::timeout;

use crate::{
    error::{Trouble, Veil},
    options::{self, ShareError, ShareOptions},
    wire::ErrorAnswer,
};

/// Longest wait for a connection.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Largest answer read whole, in bytes.
pub(crate) const BODY_BYTES_MAX: usize = 64 << 20;
/// Largest body of a refusal that is read, in bytes.
const REFUSAL_BYTES_MAX: usize = 64 << 10;
/// Largest single event, in bytes.
pub(crate) const EVENT_BYTES_MAX: usize = 1 << 20;
/// Largest answer in events, in bytes.
pub(crate) const ANSWER_BYTES_MAX: usize = 256 << 20;

/// By which another mesh-llm knows a request that it is to answer itself: passed on again, it could come back.
const PASSED_ON: &str = "1.1 mesh-llm";

/// What some servers write in front of text.
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

/// The server as it is asked.
pub(crate) struct Upstream {
    http: reqwest::Client,
    base: String,
    key: Option<HeaderValue>,
    first_byte_max: Duration,
    idle_max: Duration,
    pub veil: Veil,
}

impl Upstream {
    pub fn new(options: &ShareOptions) -> Result<Self, ShareError> {
        let address = options::address(&options.url)?;
        let key = options.key.as_deref().map(|key| {
            let mut value = HeaderValue::from_str(&format!("Bearer {key}")).map_err(|_| ShareError::Key)?;
            value.set_sensitive(true);
            Ok(value)
        });
        let builder = reqwest::Client::builder().http1_only().tcp_nodelay(true).pool_max_idle_per_host(0);
        let builder = builder.connect_timeout(CONNECT_MAX).redirect(reqwest::redirect::Policy::none());
        // A proxy configured for the outside world has no business with loopback.
        let builder = if address.loopback { builder.no_proxy() } else { builder };
        let http = builder.build().map_err(|error| ShareError::Client { what: error.to_string() })?;
        Ok(Self {
            http,
            key: key.transpose()?,
            first_byte_max: options.first_byte_max,
            idle_max: options.idle_max,
            veil: Veil::new(&address, options.key.as_deref()),
            base: address.base,
        })
    }

    /// What is at `path`, if it comes in time and in `bytes_max`.
    pub async fn get(&self, path: &str, within: Duration, bytes_max: usize) -> Result<Vec<u8>, Trouble> {
        let request = self.http.get(format!("{}{path}", self.base));
        self.whole(request, within, bytes_max).await
    }

    /// The same, as JSON.
    pub async fn get_json<T: DeserializeOwned>(
        &self,
        path: &str,
        within: Duration,
        bytes_max: usize,
    ) -> Result<T, Trouble> {
        json(&self.get(path, within, bytes_max).await?)
    }

    /// The answer to `body`, if it comes in time and in `bytes_max`.
    pub async fn post<T: DeserializeOwned>(
        &self,
        path: &str,
        body: &impl Serialize,
        within: Duration,
        bytes_max: usize,
    ) -> Result<T, Trouble> {
        let request = self.http.post(format!("{}{path}", self.base)).json(body);
        json(&self.whole(request, within, bytes_max).await?)
    }

    /// The same for a question of a client.
    pub async fn ask<T: DeserializeOwned>(&self, path: &str, body: &impl Serialize) -> Result<T, Trouble> {
        self.post(path, body, self.first_byte_max, BODY_BYTES_MAX).await
    }

    /// An answer in events. Dropping them, or this future, closes the connection.
    pub async fn events(&self, path: &str, body: &impl Serialize) -> Result<Events, Trouble> {
        let request = self.http.post(format!("{}{path}", self.base)).json(body).header(ACCEPT, "text/event-stream");
        let work = async { accepted(self.send(request).await?).await };
        let answer = timeout(self.first_byte_max, work).await.map_err(|_| Trouble::Silent(self.first_byte_max))??;
        Ok(Events::new(answer, self.idle_max))
    }

    async fn whole(&self, request: RequestBuilder, within: Duration, bytes_max: usize) -> Result<Vec<u8>, Trouble> {
        let work = async { body(accepted(self.send(request).await?).await?, bytes_max).await };
        timeout(within, work).await.map_err(|_| Trouble::Silent(within))?
    }

    async fn send(&self, request: RequestBuilder) -> Result<Response, Trouble> {
        let request = request.header(VIA, PASSED_ON);
        let request = match &self.key {
            Some(key) => request.header(reqwest::header::AUTHORIZATION, key.clone()),
            None => request,
        };
        request.send().await.map_err(|error| {
            if error.is_connect() { Trouble::Unreachable(told(error)) } else { Trouble::Broke(told(error)) }
        })
    }
}

async fn accepted(answer: Response) -> Result<Response, Trouble> {
    let status = answer.status();
    if status.is_success() {
        return Ok(answer);
    }
    let seconds = answer.headers().get(RETRY_AFTER).and_then(|after| after.to_str().ok()?.trim().parse().ok());
    let body = body(answer, REFUSAL_BYTES_MAX).await.unwrap_or_default();
    let retry_after = seconds.map(Duration::from_secs);
    Err(Trouble::Refused { status: status.as_u16(), said: ErrorAnswer::read(&body), retry_after })
}

async fn body(answer: Response, bytes_max: usize) -> Result<Vec<u8>, Trouble> {
    let mut body = Vec::new();
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(|error| Trouble::Broke(told(error)))?;
        if body.len() + chunk.len() > bytes_max {
            return Err(Trouble::TooLarge(bytes_max));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

fn json<T: DeserializeOwned>(body: &[u8]) -> Result<T, Trouble> {
    serde_json::from_slice(body).map_err(|error| Trouble::Malformed(error.to_string()))
}

/// An error with its causes, for the log.
fn told(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// The lines of `bytes`, each with its end. The reader of events looks through all that it holds whenever something is added, and
/// copies the rest for each line that it takes: by single lines that costs nothing, by pieces as a server chooses them it is
/// quadratic.
fn lines<B: AsRef<[u8]>>(
    bytes: impl Stream<Item = Result<B, Trouble>>,
) -> impl Stream<Item = Result<Vec<u8>, Trouble>> {
    let (mut begun, mut total, mut first) = (Vec::new(), 0, true);
    let cut = move |bytes: Result<B, Trouble>| {
        let bytes = match bytes {
            Ok(bytes) => bytes,
            Err(trouble) => return vec![Err(trouble)],
        };
        let bytes = bytes.as_ref();
        total += bytes.len();
        if total > ANSWER_BYTES_MAX {
            return vec![Err(Trouble::TooLarge(ANSWER_BYTES_MAX))];
        }
        let mut whole = Vec::new();
        for line in bytes.split_inclusive(|byte| matches!(byte, b'\n' | b'\r')) {
            begun.extend_from_slice(line);
            if line.ends_with(b"\n") || line.ends_with(b"\r") {
                let mut line = std::mem::take(&mut begun);
                // The reader would panic at one.
                while first && line.starts_with(BYTE_ORDER_MARK) {
                    line.drain(..BYTE_ORDER_MARK.len());
                }
                first = false;
                whole.push(Ok(line));
            } else if begun.len() > EVENT_BYTES_MAX {
                whole.push(Err(Trouble::TooLarge(EVENT_BYTES_MAX)));
            }
        }
        whole
    };
    bytes.map(cut).flat_map(futures::stream::iter)
}

/// The events of one answer.
pub(crate) struct Events {
    events: Pin<Box<dyn Stream<Item = Result<String, Trouble>> + Send>>,
    /// Bytes since the last event.
    unread: Arc<AtomicUsize>,
    pub idle_max: Duration,
}

impl Events {
    fn new(answer: Response, idle_max: Duration) -> Self {
        Self::of(answer.bytes_stream().map_err(|error| Trouble::Broke(told(error))), idle_max)
    }

    /// The events that are written in `bytes`, however they are cut.
    pub fn of<B: AsRef<[u8]> + Send + 'static>(
        bytes: impl Stream<Item = Result<B, Trouble>> + Send + 'static,
        idle_max: Duration,
    ) -> Self {
        let unread = Arc::new(AtomicUsize::new(0));
        let counter = unread.clone();
        let lines = lines(bytes).and_then(move |line| {
            let unread = counter.fetch_add(line.len(), Ordering::Relaxed) + line.len();
            let fine = if unread > EVENT_BYTES_MAX { Err(Trouble::TooLarge(EVENT_BYTES_MAX)) } else { Ok(line) };
            std::future::ready(fine)
        });
        let events = lines.eventsource().map(|event| match event {
            Ok(event) => Ok(event.data),
            Err(EventStreamError::Transport(error)) => Err(error),
            Err(other) => Err(Trouble::Malformed(other.to_string())),
        });
        Self { events: Box::pin(events), unread, idle_max }
    }

    /// The data of the next event; `None` at the end.
    pub async fn next(&mut self) -> Result<Option<String>, Trouble> {
        let next = timeout(self.idle_max, self.events.next()).await.map_err(|_| Trouble::Silent(self.idle_max))?;
        self.unread.store(0, Ordering::Relaxed);
        next.transpose()
    }
}
