//! The way back: events of an engine become deltas of an answer.

use std::{
    collections::VecDeque,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
};

use futures::{FutureExt, Stream, StreamExt, future::BoxFuture};
use mesh_core::{
    Delta, EngineError, Event, EventStream, FinishReason, Timings, Usage,
    answer::{Finish, Finished, Part},
    node::PartStream,
};
use mesh_text::{Answer, DialectParser, StopFilter, StreamDecoder, assemble};

use super::{
    CallIds,
    hand_over::{HandOver, InLine},
    ledger::Ledger,
    prompt::Reader,
};
use crate::{lease::Lease, metrics::Watch, served::ServedModel};

/// The answer to one request. Holds the engine's stream; dropping it cancels the request.
pub struct AnswerStream {
    /// None once the engine has nothing more to say, or is not listened to any more.
    source: Option<Source>,
    decoder: Option<StreamDecoder>,
    stop: StopFilter,
    parser: Option<Box<dyn DialectParser>>,
    ready: VecDeque<Part>,
    usage: Usage,
    stopped_by: Option<String>,
    watch: Watch,
    ledger: Ledger,
    calls: u32,
    calls_max: Option<u32>,
    malformed_calls: u32,
    call_ids: CallIds,
    /// As long as nothing was computed.
    hand_over: Option<HandOver>,
    /// The way to the next engine.
    moving: Option<BoxFuture<'static, Result<AnswerStream, EngineError>>>,
    /// Given up last: nobody stops the engine before.
    model: Arc<Lease>,
}

/// Where an answer comes from.
enum Source {
    /// An engine's events, to be read here.
    Events(EventStream),
    /// An answer that was read elsewhere.
    Parts(PartStream),
}

/// How an answer is read.
#[derive(Default)]
pub(crate) struct Reading {
    /// Strings that end it.
    pub stop: Vec<String>,
    /// Absent for text completions.
    pub reader: Option<Reader>,
    /// Tokens of the prompt, where they are known beforehand.
    pub prompt_tokens: Option<u32>,
    /// What is put in front of it.
    pub echo: Option<String>,
    /// Report its tokens.
    pub logprobs: bool,
    /// How its calls are named.
    pub call_ids: CallIds,
}

impl AnswerStream {
    /// An answer made of `events`.
    pub(crate) fn new(model: Arc<Lease>, events: EventStream, reading: Reading) -> Self {
        Self::of(model, Source::Events(events), reading)
    }

    /// An answer that was read by whoever gave it.
    pub(crate) fn passed(model: Arc<Lease>, parts: PartStream, call_ids: CallIds) -> Self {
        Self::of(model, Source::Parts(parts), Reading { call_ids, ..Reading::default() })
    }

    fn of(model: Arc<Lease>, source: Source, reading: Reading) -> Self {
        let Reading { stop, reader, prompt_tokens, echo, logprobs, call_ids } = reading;
        // A text completion continues its prompt, down to the space between them.
        let (markers, continues) = reader.as_ref().map_or((&[][..], true), |reader| (reader.markers, false));
        let chars = echo.as_ref().map_or(0, |echo| echo.chars().count());
        let echo = echo.filter(|echo| !echo.is_empty()).map(|echo| Part::Delta(Delta::Content(echo)));
        Self {
            source: Some(source),
            decoder: model.decoder(markers, continues),
            stop: StopFilter::new(stop),
            calls_max: reader.as_ref().and_then(|reader| reader.calls_max),
            parser: reader.map(|reader| reader.parser),
            ready: echo.into_iter().collect(),
            usage: Usage { prompt_tokens: prompt_tokens.unwrap_or(0), ..Usage::default() },
            stopped_by: None,
            watch: Watch::begin(&model),
            ledger: Ledger::new(logprobs, chars),
            calls: 0,
            malformed_calls: 0,
            call_ids,
            hand_over: None,
            moving: None,
            model,
        }
    }

    /// Who answers.
    pub fn model(&self) -> &Arc<ServedModel> {
        &self.model
    }

    /// How its calls are named.
    pub fn call_ids(&self) -> CallIds {
        self.call_ids
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
            Event::Token { id, logprob } => {
                self.usage.completion_tokens += 1;
                let text = self.decoder.as_mut().map(|decoder| decoder.push(id)).unwrap_or_default();
                let logprobs = logprob.map(|logprob| *logprob).into_iter().collect();
                self.ledger.came(1, &text, logprobs, self.model.tokenizer.as_ref());
                self.text(&text);
            }
            Event::Text { text, tokens, logprobs } => {
                self.usage.completion_tokens += tokens;
                self.ledger.came(tokens, &text, logprobs, self.model.tokenizer.as_ref());
                self.text(&text);
            }
            Event::Finished { reason, usage, timings } => {
                self.usage = usage;
                let held = self.decoder.as_mut().map(StreamDecoder::finish).unwrap_or_default();
                self.ledger.came(0, &held, Vec::new(), None);
                self.text(&held);
                if self.source.take().is_none() {
                    return; // the held text completed a stop string, or a last call
                }
                let held = self.stop.finish();
                self.ledger.end();
                self.parse(&held);
                self.finish(Finish::Engine(reason), Some(timings));
            }
        }
    }

    /// A part that is passed on as it is.
    fn pass(&mut self, part: Part) {
        match &part {
            Part::Queued { ahead } => self.watch.event(&Event::Queued { ahead: *ahead }),
            Part::Prefill { done, total } => {
                self.watch.event(&Event::Prefill { done: *done, total: *total, cached: self.usage.cached_tokens });
            }
            Part::Tokens(_) => {}
            Part::Delta(delta) => {
                let (Delta::Content(text)
                | Delta::Reasoning(text)
                | Delta::Malformed { text }
                | Delta::ToolCall { arguments: text, .. }) = delta;
                self.watch.event(&Event::Text { text: String::new(), tokens: 1, logprobs: Vec::new() });
                self.watch.text(text);
            }
            Part::Finished(finished) => {
                self.source = None;
                self.model.note_answer();
                self.watch.finished(finished);
            }
        }
        self.ready.push_back(part);
    }

    fn text(&mut self, text: &str) {
        if text.is_empty() {
            return;
        }
        let output = self.stop.push(text);
        self.ledger.passed(output.text.len());
        if output.stopped.is_some() {
            self.ledger.stopped();
        }
        self.stopped_by = output.stopped;
        self.parse(&output.text);
        if self.stopped_by.is_some() || self.called_enough() {
            // Nobody will read on: dropping the events is what cancels the job.
            self.source = None;
            self.finish(Finish::StopString, None);
        }
    }

    /// Whether an answer that may hold so many calls holds them.
    fn called_enough(&self) -> bool {
        self.calls_max.is_some_and(|max| self.calls >= max)
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
            if self.called_enough() {
                return;
            }
            match &delta {
                Delta::ToolCall { .. } => self.calls += 1,
                Delta::Malformed { .. } => {
                    self.malformed_calls += 1;
                    tracing::warn!("the model wrote a tool call that does not parse");
                }
                Delta::Content(_) | Delta::Reasoning(_) => {}
            }
            let tokens = self.ledger.made(&delta);
            if !tokens.is_empty() {
                self.ready.push_back(Part::Tokens(tokens));
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
            _ if self.calls > 0 => Finish::ToolCalls,
            _ => finish,
        };
        let tokens = self.ledger.rest();
        let finished = Finished {
            finish,
            usage: self.usage,
            timings,
            stopped_by: self.stopped_by.take(),
            reasoning_tokens: self.ledger.reasoning_tokens,
            malformed_calls: self.malformed_calls,
            tokens,
            logprob_mean: self.ledger.logprob_mean(),
        };
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
                        // The prompt that may stand in front was given already.
                        self.ready.clear();
                    }
                    Err(error) => {
                        self.watch.broke();
                        return Poll::Ready(Some(Err(error)));
                    }
                }
                continue;
            }
            let next = match &mut self.source {
                None => return Poll::Ready(None),
                Some(Source::Events(events)) => ready!(events.poll_next_unpin(cx)).map(|event| event.map(Ok)),
                Some(Source::Parts(parts)) => ready!(parts.poll_next_unpin(cx)).map(|part| part.map(Err)),
            };
            match next {
                Some(Ok(Ok(event))) => self.admit(event),
                Some(Ok(Err(part))) => self.pass(part),
                Some(Err(error)) => {
                    self.source = None;
                    if let (EngineError::NotBegun { .. }, Some(hand_over)) = (&error, self.hand_over.take()) {
                        self.moving = Some(hand_over(self.model().clone()));
                        continue;
                    }
                    self.watch.broke();
                    return Poll::Ready(Some(Err(error)));
                }
                None => {
                    self.source = None;
                    self.watch.broke();
                    let what = "its events ended before the answer did".into();
                    return Poll::Ready(Some(Err(EngineError::Failed { what })));
                }
            }
        }
    }
}

/// Puts the whole answer together: the same deltas, folded.
pub async fn collect<E: From<EngineError>>(
    mut parts: impl Stream<Item = Result<Part, E>> + Unpin,
) -> Result<(Answer, Finished), E> {
    let (mut deltas, mut reported) = (Vec::new(), Vec::new());
    while let Some(part) = parts.next().await {
        match part? {
            Part::Queued { .. } | Part::Prefill { .. } => {}
            Part::Tokens(tokens) => reported.extend(tokens),
            Part::Delta(delta) => deltas.push(delta),
            Part::Finished(finished) => {
                reported.extend(finished.tokens);
                return Ok((assemble(deltas), Finished { tokens: reported, ..finished }));
            }
        }
    }
    Err(EngineError::Stopped.into())
}
