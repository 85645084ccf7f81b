//! The way back: events of an engine become deltas of an answer.

use std::{
    collections::VecDeque,
    pin::Pin,
    task::{Context, Poll, ready},
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture};
use mesh_core::{EngineError, Event, EventStream, FinishReason, Timings, Usage};
use mesh_text::{Answer, Delta, DialectParser, StopFilter, StreamDecoder, assemble};

use super::{
    hand_over::{HandOver, InLine},
    prompt::Reader,
};
use crate::{lease::Lease, metrics::Watch};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Finish {
    /// The engine's own reason.
    Engine(FinishReason),
    /// A stop string of the request.
    StopString,
    /// The model ended its turn to have tools called.
    ToolCalls,
}

/// The end of an answer.
#[derive(Clone, Debug, PartialEq)]
pub struct Finished {
    /// Why.
    pub finish: Finish,
    /// How many tokens.
    pub usage: Usage,
    /// How long, where the engine came to say it.
    pub timings: Option<Timings>,
}

/// What an answer's stream yields. It ends with exactly one [`Part::Finished`] or one error.
#[derive(Clone, Debug, PartialEq)]
pub enum Part {
    /// The request waits for a place; so many are before it.
    Queued {
        /// Requests before it.
        ahead: u32,
    },
    /// The prompt is being read: `done` of `total` tokens.
    Prefill {
        /// Tokens read.
        done: u32,
        /// Tokens in the prompt.
        total: u32,
    },
    /// A piece of the answer.
    Delta(Delta),
    /// The end.
    Finished(Finished),
}

/// The answer to one request. Holds the engine's stream; dropping it cancels the request.
pub struct AnswerStream {
    /// None once the engine has nothing more to say, or is not listened to any more.
    events: Option<EventStream>,
    decoder: Option<StreamDecoder>,
    stop: StopFilter,
    parser: Option<Box<dyn DialectParser>>,
    ready: VecDeque<Part>,
    usage: Usage,
    called_tools: bool,
    watch: Watch,
    /// As long as nothing was computed.
    hand_over: Option<HandOver>,
    /// The way to the next engine.
    moving: Option<BoxFuture<'static, Result<AnswerStream, EngineError>>>,
    /// Given up last: nobody stops the engine before.
    model: Lease,
}

impl AnswerStream {
    /// An answer made of `events`. `prompt_tokens` where they are known beforehand.
    pub(crate) fn new(
        model: Lease,
        events: EventStream,
        stop: Vec<String>,
        reader: Option<Reader>,
        prompt_tokens: Option<u32>,
    ) -> Self {
        // A text completion continues its prompt, down to the space between them.
        let (markers, continues) = reader.as_ref().map_or((&[][..], true), |reader| (reader.markers, false));
        Self {
            events: Some(events),
            decoder: model.decoder(markers, continues),
            stop: StopFilter::new(stop),
            parser: reader.map(|reader| reader.parser),
            ready: VecDeque::new(),
            usage: Usage { prompt_tokens: prompt_tokens.unwrap_or(0), ..Usage::default() },
            called_tools: false,
            watch: Watch::begin(&model),
            hand_over: None,
            moving: None,
            model,
        }
    }

    /// The same, and should the engine end before the request's turn, the next one is handed it.
    pub fn in_line(self, request: InLine) -> Self {
        Self { hand_over: Some(request.hand_over()), ..self }
    }

    fn admit(&mut self, event: Event) {
        self.watch.event(&event);
        if !matches!(event, Event::Queued { .. }) {
            self.hand_over = None;
        }
        match event {
            Event::Queued { ahead } => self.ready.push_back(Part::Queued { ahead }),
            Event::Prefill { done, total, cached } => {
                // An answer that a stop string ends never hears the engine's own count.
                (self.usage.prompt_tokens, self.usage.cached_tokens) = (total, cached);
                self.ready.push_back(Part::Prefill { done, total });
            }
            Event::Token { id, .. } => {
                self.usage.completion_tokens += 1;
                let text = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
                self.text(&text);
            }
            Event::Text { text, tokens, .. } => {
                self.usage.completion_tokens += tokens;
                self.text(&text);
            }
            Event::Finished { reason, usage, timings } => {
                self.usage = usage;
                let held = self.decoder.as_mut().map(StreamDecoder::finish).unwrap_or_default();
                self.text(&held);
                if self.events.take().is_none() {
                    return; // the held text completed a stop string
                }
                let held = self.stop.finish();
                self.parse(&held);
                self.finish(Finish::Engine(reason), Some(timings));
            }
        }
    }

    fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let output = self.stop.push(text);
        self.parse(&output.text);
        if output.stopped.is_some() {
            // Nobody will read on: dropping the events is what cancels the job.
            self.events = None;
            self.finish(Finish::StopString, None);
        }
    }

    fn parse(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        self.watch.text(text);
        let deltas = match &mut self.parser {
            Some(parser) => parser.push(text),
            None => vec![Delta::Content(text.to_owned())],
        };
        self.deltas(deltas);
    }

    fn deltas(&mut self, deltas: Vec<Delta>) {
        for delta in deltas {
            match &delta {
                Delta::ToolCall { .. } => self.called_tools = true,
                Delta::Malformed { .. } => tracing::warn!("the model wrote a tool call that does not parse"),
                Delta::Content(_) | Delta::Reasoning(_) => {}
            }
            self.ready.push_back(Part::Delta(delta));
        }
    }

    fn finish(&mut self, finish: Finish, timings: Option<Timings>) {
        self.model.note_answer();
        let rest = self.parser.as_mut().map(|parser| parser.finish()).unwrap_or_default();
        self.deltas(rest);
        let finish = match finish {
            // An answer that was cut short says so, whatever it called before.
            Finish::Engine(FinishReason::Length) => finish,
            _ if self.called_tools => Finish::ToolCalls,
            _ => finish,
        };
        let finished = Finished { finish, usage: self.usage, timings };
        self.watch.finished(&finished);
        self.ready.push_back(Part::Finished(finished));
    }
}

impl Stream for AnswerStream {
    type Item = Result<Part, EngineError>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        loop {
            if let Some(part) = self.ready.pop_front() {
                return Poll::Ready(Some(Ok(part)));
            }
            if let Some(moving) = &mut self.moving {
                let moved = ready!(moving.poll_unpin(cx));
                self.moving = None;
                match moved {
                    Ok(next) => {
                        self.watch.handed_on();
                        *self = next;
                    }
                    Err(error) => {
                        self.watch.broke();
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                continue;
            }
            let Some(events) = &mut self.events else { return Poll::Ready(None) };
            match ready!(events.poll_next_unpin(cx)) {
                Some(Ok(event)) => self.admit(event),
                Some(Err(error)) => {
                    self.events = None;
                    if let (EngineError::NotBegun { .. }, Some(hand_over)) = (&error, self.hand_over.take()) {
                        self.moving = Some(hand_over(self.model.clone()));
                        continue;
                    }
                    self.watch.broke();
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.events = None;
                    self.watch.broke();
                    let what = "its events ended before the answer did".into();
                    return Poll::Ready(Some(Err(EngineError::Failed { what })));
                }
            }
        }
    }
}

/// Puts the whole answer together: the same deltas, folded.
pub async fn collect(mut parts: AnswerStream) -> Result<(Answer, Finished), EngineError> {
    let mut deltas = Vec::new();
    while let Some(part) = parts.next().await {
        match part? {
            Part::Queued { .. } | Part::Prefill { .. } => {}
            Part::Delta(delta) => deltas.push(delta),
            Part::Finished(finished) => return Ok((assemble(deltas), finished)),
        }
    }
    Err(EngineError::Stopped)
}
