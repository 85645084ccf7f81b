//! One job on its way through the engine, and the way its events go out.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

use mesh_core::{EngineError, Event, FinishReason, Landmarks, Timings, Usage};
use mesh_graph::Cache;
use tokio::sync::mpsc;

use crate::{engine::Place, sampler::Sampler, schedule::Id};

/// How long an answer may wait for a reader that does not read, before it is given up.
const READER_PATIENCE: Duration = Duration::from_secs(30);

/// A job that was admitted, wherever it stands.
pub struct Sequence {
    /// Names it here; later ones came later.
    pub id: Id,
    /// Names it in logs.
    pub job: String,
    /// Everything known of it: the prompt, then what was written.
    pub tokens: Vec<u32>,
    /// How many of them are the prompt.
    pub prompt: usize,
    /// Most tokens to write.
    pub tokens_max: u32,
    /// Tokens that end it.
    pub eos: Vec<u32>,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Points of the prompt worth remembering.
    pub landmarks: Landmarks,
    /// Where its events go.
    pub outlet: Outlet,
    /// Its place among the admitted; given up before its last event is seen, so that a client may send its next request
    /// at once.
    pub place: Option<Place>,
    /// What was read of it so far; empty before and after.
    pub cache: Option<Cache>,
    /// Whether it is computed as the models with a length limit compute sequences beyond it.
    pub long: bool,
    /// Tokens that were not computed, because they were known.
    pub cached: usize,
    /// Whether it was sent back after tokens of it were computed.
    pub computed_before: bool,
    /// Where it keeps a point for no longer than until its next chunk.
    pub own_point: Option<usize>,
    /// Chunks it has had.
    pub turns: u32,
    /// The position in the queue that was last told.
    pub told_ahead: Option<u32>,
    /// Whether the log has it that it waits, and why.
    pub told_why: bool,
    /// When it came.
    pub started: Instant,
    /// How long its prompt took, the wait included.
    pub prefill: Option<Duration>,
}

/// Whether a sequence goes on after a token.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum After {
    /// It does.
    GoesOn,
    /// It does not.
    Ends(FinishReason),
}

impl Sequence {
    /// Tokens written so far.
    pub fn written(&self) -> u32 {
        (self.tokens.len() - self.prompt) as u32
    }

    /// Takes one more token, and tells of it.
    pub fn take(&mut self, token: u32) -> After {
        self.prefill.get_or_insert_with(|| self.started.elapsed());
        self.tokens.push(token);
        if self.eos.contains(&token) {
            return After::Ends(FinishReason::Stop);
        }
        self.outlet.send(Event::Token { id: token, logprob: None });
        if self.written() >= self.tokens_max { After::Ends(FinishReason::Length) } else { After::GoesOn }
    }

    /// Ends it with an answer.
    pub fn finish(mut self, reason: FinishReason) -> Outlet {
        let usage = Usage {
            prompt_tokens: self.prompt as u32,
            cached_tokens: self.cached.min(self.prompt) as u32,
            completion_tokens: self.written(),
        };
        let prefill = self.prefill.unwrap_or_default();
        let timings = Timings { prefill, decode: self.started.elapsed().saturating_sub(prefill) };
        self.place = None;
        self.outlet.send(Event::Finished { reason, usage, timings });
        self.outlet
    }

    /// Ends it with an error.
    pub fn fail(mut self, error: EngineError) -> Outlet {
        self.place = None;
        self.outlet.push(Err(error));
        self.outlet
    }

    /// The smallest landmark beyond `done` tokens, as far as there is one within the part of the prompt that is read.
    pub fn next_landmark(&self, done: usize) -> Option<usize> {
        let ends = self.landmarks.message_ends.iter().chain(&self.landmarks.preamble_end);
        ends.map(|end| *end as usize).filter(|end| *end > done && *end < self.prompt).min()
    }

    /// Whether `length` tokens end at a landmark, or at the prompt's last token but one.
    pub fn is_landmark(&self, length: usize) -> bool {
        let ends = self.landmarks.message_ends.iter().chain(&self.landmarks.preamble_end);
        length + 1 == self.prompt || ends.into_iter().any(|end| *end as usize == length)
    }
}

/// Where events go. A reader that does not keep up holds back its own sequence and nobody else's.
pub struct Outlet {
    sender: mpsc::Sender<Result<Event, EngineError>>,
    backlog: VecDeque<Result<Event, EngineError>>,
    since: Option<Instant>,
    /// Set when the reader did not keep up, until it has caught up by half: a sequence that is set apart and put back for
    /// each single event would have everybody's rows copied each time.
    behind: bool,
    /// Events that there was room for at the last look.
    room: usize,
}

/// How an outlet stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Flow {
    /// Everything was handed over.
    Clear,
    /// Something waits for the reader.
    Blocked,
    /// Nobody reads any more, or for too long.
    Lost,
}

impl Outlet {
    /// Over a bounded channel.
    pub fn new(sender: mpsc::Sender<Result<Event, EngineError>>) -> Self {
        Self { sender, backlog: VecDeque::new(), since: None, behind: false, room: 0 }
    }

    /// Tells of progress, which may be left out where the reader does not keep up.
    pub fn tell(&self, event: Event) {
        if self.backlog.is_empty() {
            let _ = self.sender.try_send(Ok(event));
        }
    }

    /// Whether everything was handed over, and there is room for more.
    pub fn is_clear(&self) -> bool {
        self.backlog.is_empty() && !self.behind
    }

    /// Whether something was not handed over yet.
    pub fn has_backlog(&self) -> bool {
        !self.backlog.is_empty()
    }

    /// Hands over an event; what the reader has no room for yet is kept. Its sequence writes no more until
    /// [`flush`](Self::flush) finds the way clear, so that no more than two events are ever kept.
    pub fn send(&mut self, event: Event) {
        self.push(Ok(event));
    }

    fn push(&mut self, event: Result<Event, EngineError>) {
        self.backlog.push_back(event);
        self.flush();
    }

    /// A reader that took nothing for too long is given up.
    fn patience(&mut self) -> Flow {
        let since = *self.since.get_or_insert_with(Instant::now);
        if since.elapsed() > READER_PATIENCE { Flow::Lost } else { Flow::Blocked }
    }

    /// Hands over what was kept, as far as there is room.
    pub fn flush(&mut self) -> Flow {
        while let Some(event) = self.backlog.pop_front() {
            match self.sender.try_send(event) {
                Ok(()) => self.since = None,
                Err(mpsc::error::TrySendError::Closed(_)) => {
                    self.backlog.clear();
                    return Flow::Lost;
                }
                Err(mpsc::error::TrySendError::Full(event)) => {
                    self.backlog.push_front(event);
                    self.behind = true;
                    return self.patience();
                }
            }
        }
        if self.sender.is_closed() {
            return Flow::Lost;
        }
        let room = self.sender.capacity();
        self.behind &= room < self.sender.max_capacity().div_ceil(2);
        if !self.behind {
            self.since = None;
            return Flow::Clear;
        }
        if std::mem::replace(&mut self.room, room) != room {
            self.since = None;
        }
        self.patience()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slow_reader_loses_no_token_and_is_told_of_progress_only_when_it_keeps_up() {
        let (sender, mut receiver) = mpsc::channel(1);
        let mut outlet = Outlet::new(sender);
        outlet.send(Event::Token { id: 1, logprob: None });
        outlet.send(Event::Token { id: 2, logprob: None });
        outlet.tell(Event::Queued { ahead: 1 });
        assert_eq!(outlet.flush(), Flow::Blocked);
        assert_eq!(receiver.try_recv().unwrap(), Ok(Event::Token { id: 1, logprob: None }));
        assert_eq!(outlet.flush(), Flow::Blocked, "it has caught up by nothing yet");
        assert!(!outlet.has_backlog() && !outlet.is_clear());
        assert_eq!(receiver.try_recv().unwrap(), Ok(Event::Token { id: 2, logprob: None }));
        assert_eq!(outlet.flush(), Flow::Clear);
        assert!(receiver.try_recv().is_err());
        drop(receiver);
        assert_eq!(outlet.flush(), Flow::Lost);
    }
}
