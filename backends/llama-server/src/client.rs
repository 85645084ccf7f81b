//! The HTTP client of one child: loopback only, everything it reads bounded.
//!
//! Each request has a connection of its own. On loopback that costs a tenth of a millisecond, and what can go wrong with a
//! kept one costs a request: the child closes it just as it is used again, or (seen with hyper 1.12 under load, where the
//! answer before had been dropped early) a request handed to it is never sent, and nobody is told, not even when the
//! child is gone.

use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};

use eventsource_stream::{EventStreamError, Eventsource};
use futures::{Stream, StreamExt, TryStreamExt};
use reqwest::{Response, StatusCode};
use serde::{Serialize, de::DeserializeOwned};
use tokio::time::timeout;

use crate::wire::{
    Ahead, Candidate, Completion, Detokenize, Detokenized, ErrorAnswer, Models, Piece, Props, Steps, Tokenize,
    Tokenized,
};

/// Longest wait for a connection to loopback.
const CONNECT_MAX: Duration = Duration::from_secs(5);
/// Longest wait for an answer that needs no model.
const ANSWER_MAX: Duration = Duration::from_secs(60);
/// Longest silence of a generation. A batch of a long prompt on a slow processor takes minutes, and nothing is said meanwhile.
pub(crate) const SILENCE_MAX: Duration = Duration::from_secs(30 * 60);
/// Largest body read whole, in bytes.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Largest single event, in bytes.
const EVENT_BYTES_MAX: usize = 1 << 20;
/// Longest error text passed on, in bytes.
const MESSAGE_BYTES_MAX: usize = 2048;

/// A conversation with the child that went wrong.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum ClientError {
    /// No connection: nothing was sent.
    #[error("llama-server cannot be reached: {0}")]
    Unreachable(String),
    /// The connection broke.
    #[error("the connection to llama-server broke: {0}")]
    Transport(String),
    /// An answer other than success.
    #[error("llama-server refused ({status}): {message}")]
    Refused {
        /// HTTP status.
        status: u16,
        /// The child's words.
        message: String,
    },
    /// An error in the middle of a stream.
    #[error("llama-server reported an error: {0}")]
    Reported(String),
    /// Something this client does not understand.
    #[error("llama-server sent something malformed: {0}")]
    Malformed(String),
    /// More than is read.
    #[error("llama-server sent more than {0} bytes at once")]
    TooLarge(usize),
    /// The stream ended early.
    #[error("llama-server ended the stream before the answer was complete")]
    CutOff,
    /// Nothing came for too long.
    #[error("llama-server was silent for {} s", .0.as_secs())]
    Silent(Duration),
}

/// Whether the model is loaded.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Health {
    Ready,
    NotYet,
}

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: Arc<str>,
    key: Arc<str>,
    silence_max: Duration,
}

impl Client {
    /// A client of the child at `port` of the loopback interface.
    pub fn new(port: u16, key: &str, silence_max: Duration) -> Result<Self, ClientError> {
        // A proxy configured for the outside world has no business with loopback.
        let builder = reqwest::Client::builder().no_proxy().http1_only().tcp_nodelay(true).pool_max_idle_per_host(0);
        let builder = builder.connect_timeout(CONNECT_MAX).redirect(reqwest::redirect::Policy::none());
        let http = builder.build().map_err(transport)?;
        Ok(Self { http, base: format!("http://127.0.0.1:{port}").into(), key: key.into(), silence_max })
    }

    /// Whether it is ready. An answer that never comes counts as not yet.
    pub async fn health(&self) -> Health {
        let answer = self.http.get(format!("{}/health", self.base)).timeout(CONNECT_MAX).send().await;
        match answer {
            Ok(answer) if answer.status().is_success() => Health::Ready,
            _ => Health::NotYet,
        }
    }

    /// The context of one request, in tokens, as the child has it.
    pub async fn context_tokens(&self) -> Result<u32, ClientError> {
        let props: Props = self.get("/props").await?;
        Ok(props.default_generation_settings.n_ctx)
    }

    /// The size of the vocabulary, where the child tells.
    pub async fn vocab_size(&self) -> Result<Option<u32>, ClientError> {
        let models: Models = self.get("/v1/models").await?;
        Ok(models.data.into_iter().find_map(|model| model.meta?.n_vocab))
    }

    /// The tokens of `text`.
    pub async fn tokenize(&self, text: &str, add_special: bool) -> Result<Vec<u32>, ClientError> {
        let body = Tokenize { content: text, add_special, parse_special: true };
        let work = async { json::<Tokenized>(self.post("/tokenize", &body).await?).await };
        Ok(timeout(ANSWER_MAX, work).await.map_err(|_| ClientError::Silent(ANSWER_MAX))??.tokens)
    }

    /// The text of tokens, special ones included.
    pub async fn detokenize(&self, tokens: &[u32]) -> Result<String, ClientError> {
        let work = async { json::<Detokenized>(self.post("/detokenize", &Detokenize { tokens }).await?).await };
        Ok(timeout(ANSWER_MAX, work).await.map_err(|_| ClientError::Silent(ANSWER_MAX))??.content)
    }

    /// The `count` likeliest tokens after `prompt`, best first.
    pub async fn likeliest(&self, prompt: &[u32], count: u32) -> Result<Vec<Candidate>, ClientError> {
        let malformed = |what: &str| ClientError::Malformed(what.to_owned());
        let whole = self.tokenize("a", false).await?.pop().ok_or_else(|| malformed("no tokens of a letter"))?;
        let body = Ahead::new(prompt, count, whole);
        let work = async { json::<Steps>(self.post("/completion", &body).await?).await };
        let steps = timeout(self.silence_max, work).await.map_err(|_| ClientError::Silent(self.silence_max))??;
        match steps.completion_probabilities.into_iter().next() {
            Some(step) if !step.top_logprobs.is_empty() => Ok(step.top_logprobs),
            _ => Err(malformed("an answer without probabilities")),
        }
    }

    /// Starts a generation. Dropping the pieces, or this future, cancels it.
    pub async fn complete(&self, body: &Completion) -> Result<Pieces, ClientError> {
        let silent = |_| ClientError::Silent(self.silence_max);
        let answer = timeout(self.silence_max, self.post("/completion", body)).await.map_err(silent)??;
        let unread = Arc::new(AtomicUsize::new(0));
        let counter = unread.clone();
        let bytes = answer.bytes_stream().map_err(transport).and_then(move |bytes| {
            let total = counter.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
            // Several events may arrive at once; only what none of them ended counts for long.
            std::future::ready(if total > EVENT_BYTES_MAX {
                Err(ClientError::TooLarge(EVENT_BYTES_MAX))
            } else {
                Ok(bytes)
            })
        });
        let events = bytes.eventsource().map(|event| match event {
            Ok(event) => Ok(event.data),
            Err(EventStreamError::Transport(error)) => Err(error),
            Err(other) => Err(ClientError::Malformed(other.to_string())),
        });
        Ok(Pieces { events: Box::pin(events), unread, silence_max: self.silence_max })
    }

    /// Any request and its answer.
    #[cfg(test)]
    pub async fn raw(&self, path: &str, body: &serde_json::Value) -> Result<serde_json::Value, ClientError> {
        json(self.post(path, body).await?).await
    }

    async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        let request = self.http.get(format!("{}{path}", self.base)).bearer_auth(&self.key).timeout(ANSWER_MAX);
        json(accepted(request.send().await.map_err(transport)?).await?).await
    }

    async fn post(&self, path: &str, body: &impl Serialize) -> Result<Response, ClientError> {
        let request = self.http.post(format!("{}{path}", self.base)).bearer_auth(&self.key).json(body);
        match request.send().await {
            Err(error) if error.is_connect() => Err(ClientError::Unreachable(transport(error).to_string())),
            answer => accepted(answer.map_err(transport)?).await,
        }
    }
}

async fn accepted(answer: Response) -> Result<Response, ClientError> {
    let status = answer.status();
    if status == StatusCode::OK {
        return Ok(answer);
    }
    let body = body(answer).await.unwrap_or_default();
    let message = match serde_json::from_slice::<ErrorAnswer>(&body) {
        Ok(answer) => answer.error.message,
        Err(_) => String::from_utf8_lossy(&body).into_owned(),
    };
    Err(ClientError::Refused { status: status.as_u16(), message: shortened(message) })
}

async fn body(answer: Response) -> Result<Vec<u8>, ClientError> {
    let mut body = Vec::new();
    let mut chunks = answer.bytes_stream();
    while let Some(chunk) = chunks.next().await {
        let chunk = chunk.map_err(transport)?;
        if body.len() + chunk.len() > BODY_BYTES_MAX {
            return Err(ClientError::TooLarge(BODY_BYTES_MAX));
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body)
}

async fn json<T: DeserializeOwned>(answer: Response) -> Result<T, ClientError> {
    serde_json::from_slice(&body(answer).await?).map_err(|error| ClientError::Malformed(error.to_string()))
}

fn transport(error: reqwest::Error) -> ClientError {
    let error = error.without_url();
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(&error);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    ClientError::Transport(text)
}

fn shortened(mut message: String) -> String {
    message.truncate(message.floor_char_boundary(MESSAGE_BYTES_MAX));
    message
}

/// The events of one generation.
pub(crate) struct Pieces {
    events: Pin<Box<dyn Stream<Item = Result<String, ClientError>> + Send>>,
    unread: Arc<AtomicUsize>,
    silence_max: Duration,
}

impl Pieces {
    /// The next event. A stream that ends without its last one is an error, and so is one that falls silent.
    pub async fn next(&mut self) -> Result<Piece, ClientError> {
        let next = timeout(self.silence_max, self.events.next()).await;
        let data = next.map_err(|_| ClientError::Silent(self.silence_max))?.ok_or(ClientError::CutOff)??;
        self.unread.store(0, Ordering::Relaxed);
        let piece: Piece = serde_json::from_str(&data).map_err(|error| ClientError::Malformed(error.to_string()))?;
        match (piece.error, piece.stop) {
            (Some(error), _) => Err(ClientError::Reported(shortened(error.message))),
            (None, Some(_)) => Ok(Piece { error: None, ..piece }),
            (None, None) => Err(ClientError::Malformed("an event without `stop`".into())),
        }
    }
}
