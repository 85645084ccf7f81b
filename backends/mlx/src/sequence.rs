//! One job on its way through the engine, and the way its events go out.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use mesh_core::{EngineError, Event, FinishReason, Follower, Landmarks, Timings, Usage};
use mesh_graph::Cache;
use tokio::sync::mpsc;

use crate::{
    engine::Place,
    group::Written,
    sampler::{Mask, Sampler},
    schedule::Id,
};

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
    /// Tokens before which none is drawn that ends it.
    pub tokens_min: u32,
    /// Tokens that end it.
    pub eos: Arc<[u32]>,
    /// Whether it goes on past those.
    pub ignore_eos: bool,
    /// How tokens are chosen.
    pub sampler: Sampler,
    /// Says which tokens keep to its grammar, if it has one. It has been told of every token that was written.
    pub follower: Option<Box<dyn Follower>>,
    /// How many of the likeliest tokens are reported with each, where it is reported how likely they were.
    pub logprobs: Option<u32>,
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
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// It does.
    GoesOn,
    /// It does not.
    Ends(Ending),
}

/// How a sequence ends.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// With an answer.
    Finished(FinishReason),
    /// With an error of its own, for people.
    Failed(String),
}

/// The tokens that may be written next, or how the sequence ends.
pub type Answer = Result<Mask, Ending>;

/// What a grammar is asked about a sequence. Any thread may work out the answer.
pub struct Question<'a> {
    follower: &'a mut dyn Follower,
    eos: &'a [u32],
    may_end: bool,
}

impl Question<'_> {
    /// Where nothing but an end is left, it ends. Until then a sequence that is not to end, or not yet, does not.
    pub fn answer(self, vocab_size: u32) -> Answer {
        let mut allowed = Mask::filled(vocab_size, |words| self.follower.allowed(words))
            .map_err(|what| Ending::Failed(format!("the answer's grammar cannot be followed further: {what}")))?;
        let ends = allowed.take(self.eos);
        if allowed.is_empty() {
            let what = "the answer's grammar leaves no token that the model has, and not the end either";
            return Err(if ends.is_empty() {
                Ending::Failed(what.into())
            } else {
                Ending::Finished(FinishReason::Stop)
            });
        }
        if self.may_end {
            allowed.put(&ends);
        }
        Ok(allowed)
    }
}

impl Sequence {
    /// Tokens written so far.
    pub fn written(&self) -> u32 {
        (self.tokens.len() - self.prompt) as u32
    }

    /// Whether every token has to be read before the next is drawn, because that depends on it beyond what the device knows.
    pub fn reads_first(&self) -> bool {
        self.follower.is_some() || self.sampler.reads_first()
    }

    /// Takes one more token, and tells of it.
    pub fn take(&mut self, token: Written) -> After {
        let Written { id, logprob } = token;
        self.prefill.get_or_insert_with(|| self.started.elapsed());
        self.tokens.push(id);
        if !self.ignore_eos && self.eos.contains(&id) {
            return After::Ends(Ending::Finished(FinishReason::Stop));
        }
        if let Some(Err(what)) = self.follower.as_mut().map(|follower| follower.take(id)) {
            return After::Ends(Ending::Failed(format!("token {id} does not keep to the answer's grammar: {what}")));
        }
        self.outlet.send(Event::Token { id, logprob });
        match self.written() >= self.tokens_max {
            true => After::Ends(Ending::Finished(FinishReason::Length)),
            false => After::GoesOn,
        }
    }

    /// What there is to ask its grammar about the next token, once all of its tokens are read; nothing without a grammar.
    pub fn question(&mut self) -> Option<Question<'_>> {
        let may_end = !self.ignore_eos && self.written() >= self.tokens_min;
        let follower = self.follower.as_deref_mut()?;
        Some(Question { follower, eos: &self.eos, may_end })
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
