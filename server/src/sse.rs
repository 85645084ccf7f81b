//! Answers as server-sent events.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Mutex,
    task::{Context, Poll},
    time::{Duration, Instant},
};

use futures::{Stream, StreamExt, stream};
use mesh_core::EngineError;
use mesh_text::Delta;
use serde::Serialize;
use warp::{
    Reply,
    http::{HeaderValue, header::CACHE_CONTROL},
    reply::Response,
    sse::Event,
};

use crate::{
    error::ApiError,
    openai::response::{ChatChunk, Envelope, TextCompletion, WireUsage},
    pipeline::{AnswerStream, Choices, Finished, Part, TokenText},
};

/// Silence after which a comment is sent, so that nobody in between takes the connection for dead.
pub const KEEP_ALIVE: Duration = Duration::from_secs(10);

/// Shortest time between two comments on how far the prompt is read.
const PREFILL_COMMENT_PAUSE: Duration = Duration::from_secs(1);

/// Which API the events belong to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// `chat.completion.chunk`.
    Chat,
    /// `text_completion`.
    Text,
}

/// Whole answers in events: chunks, the usage if asked for, `[DONE]`. An engine that fails underway ends them with an
/// `error` event.
pub fn reply(answers: Vec<AnswerStream>, envelope: Envelope, shape: Shape, include_usage: bool) -> Response {
    let count = answers.len();
    let roles: Vec<_> = (0..count as u32)
        .filter(|_| shape == Shape::Chat)
        .map(|index| data(&ChatChunk::role(&envelope, index)))
        .collect();
    let mut comments = Comments::default();
    let mut writer =
        Writer { envelope, shape, include_usage, waiting: vec![Vec::new(); count], ended: vec![None; count] };
    let rest = Choices::from(answers).flat_map(move |(index, part)| {
        let comment = part.as_ref().ok().and_then(|part| comments.on(part, Instant::now()));
        let comment = comment.map(|text| Event::default().comment(format!(" {text}")));
        stream::iter(comment.into_iter().chain(writer.events(index, part)))
    });
    let events = stream::iter(roles).chain(rest).map(Ok::<_, Infallible>);
    let kept_alive = warp::sse::keep_alive().interval(KEEP_ALIVE).stream(Exclusive::new(events));
    let mut response = warp::sse::reply(kept_alive).into_response();
    // no-transform and x-accel-buffering keep proxies from collecting events.
    response.headers_mut().insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, no-transform"));
    response.headers_mut().insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

/// Writes events, and remembers for each answer what belongs to its next one.
struct Writer {
    envelope: Envelope,
    shape: Shape,
    include_usage: bool,
    /// Tokens of the piece that follows.
    waiting: Vec<Vec<TokenText>>,
    ended: Vec<Option<Finished>>,
}

impl Writer {
    fn events(&mut self, index: u32, part: Result<Part, EngineError>) -> Vec<Event> {
        let (envelope, at) = (&self.envelope, index as usize);
        match part {
            // What comments are for.
            Ok(Part::Queued { .. } | Part::Prefill { .. }) => Vec::new(),
            Ok(Part::Tokens(tokens)) => {
                self.waiting[at].extend(tokens);
                Vec::new()
            }
            Ok(Part::Delta(delta)) => {
                let tokens = std::mem::take(&mut self.waiting[at]);
                vec![match self.shape {
                    Shape::Chat => data(&ChatChunk::delta(envelope, index, delta, &tokens)),
                    Shape::Text => data(&TextCompletion::delta(envelope, index, text(delta), &tokens)),
                }]
            }
            Ok(Part::Finished(finished)) => {
                let mut events = match self.shape {
                    Shape::Chat => vec![data(&ChatChunk::finish(envelope, index, &finished))],
                    Shape::Text => vec![data(&TextCompletion::finish(envelope, index, &finished))],
                };
                self.ended[at] = Some(finished);
                events.extend(self.end());
                events
            }
            Err(error) => {
                tracing::error!(answer = %envelope.id, %error, "an answer broke off");
                vec![data(&ApiError::from(error).body()).event(" error")]
            }
        }
    }

    /// What follows the last answer.
    fn end(&self) -> Vec<Event> {
        if self.ended.iter().any(Option::is_none) {
            return Vec::new();
        }
        let usage = WireUsage::of(self.ended.iter().flatten(), self.envelope.choices);
        let usage = self.include_usage.then(|| match self.shape {
            Shape::Chat => data(&ChatChunk::usage(&self.envelope, usage)),
            Shape::Text => data(&TextCompletion::usage(&self.envelope, usage)),
        });
        usage.into_iter().chain([Event::default().data(" [DONE]")]).collect()
    }
}

/// What a stream says before the answer begins: comments, which no client takes for a part of it, and which keep those in
/// between from taking the connection for dead.
#[derive(Debug, Default)]
struct Comments {
    ahead: Option<u32>,
    prefill: Option<Instant>,
}

impl Comments {
    /// The comment on `part` at `now`, if there is something new to say and it was not said just before.
    fn on(&mut self, part: &Part, now: Instant) -> Option<String> {
        match *part {
            Part::Queued { ahead } => {
                (self.ahead.replace(ahead) != Some(ahead)).then(|| format!("queued, {ahead} ahead"))
            }
            Part::Prefill { done, total } => {
                let recent = self.prefill.is_some_and(|last| now.duration_since(last) < PREFILL_COMMENT_PAUSE);
                // A prompt that is read needs no comment: the answer follows.
                if recent || done >= total {
                    return None;
                }
                self.prefill = Some(now);
                Some(format!("reading the prompt, {done} of {total} tokens"))
            }
            Part::Tokens(_) | Part::Delta(_) | Part::Finished(_) => None,
        }
    }
}

/// The text of a delta of a text completion, which has no dialect and thus no other deltas.
pub(crate) fn text(delta: Delta) -> String {
    match delta {
        Delta::Content(text) | Delta::Reasoning(text) | Delta::Malformed { text } => text,
        Delta::ToolCall { arguments, .. } => arguments,
    }
}

/// The space after the colon is not part of the data, but many clients look for `data: `.
fn data(value: &impl Serialize) -> Event {
    // Serialization of our own types to a string has no way to fail.
    Event::default().data(format!(" {}", serde_json::to_string(value).unwrap_or_default()))
}

/// Makes a stream `Sync`, which warp asks for, without locking: the stream is only ever reached exclusively.
struct Exclusive<T>(Mutex<Pin<Box<dyn Stream<Item = T> + Send>>>);

impl<T> Exclusive<T> {
    fn new(stream: impl Stream<Item = T> + Send + 'static) -> Self {
        Self(Mutex::new(Box::pin(stream)))
    }
}

impl<T> Stream for Exclusive<T> {
    type Item = T;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        match self.0.get_mut() {
            Ok(stream) => stream.poll_next_unpin(cx),
            Err(_) => Poll::Ready(None),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_say_what_is_new_and_not_too_often() {
        let mut comments = Comments::default();
        let start = Instant::now();
        let mut at = |ms: u64, part: Part| comments.on(&part, start + Duration::from_millis(ms));
        let queued = |ahead| Part::Queued { ahead };
        assert_eq!(at(0, queued(2)).as_deref(), Some("queued, 2 ahead"));
        assert_eq!(at(0, queued(2)), None);
        assert_eq!(at(1, queued(1)).as_deref(), Some("queued, 1 ahead"));
        let read = |done| Part::Prefill { done, total: 16_000 };
        assert_eq!(at(2, read(0)).as_deref(), Some("reading the prompt, 0 of 16000 tokens"));
        assert_eq!(at(1001, read(2048)), None);
        assert_eq!(at(1002, read(4096)).as_deref(), Some("reading the prompt, 4096 of 16000 tokens"));
        assert_eq!(at(9000, read(16_000)), None, "it is read");
        assert_eq!(at(9001, Part::Delta(Delta::Content("x".into()))), None);
    }
}
