//! Answers that reason before they say what the grammar is about: the grammar begins where the reasoning ends, and the
//! reasoning ends after so many tokens at the latest.

use std::{collections::VecDeque, fmt, sync::Arc};

use mesh_core::{Follower, Rules};

use super::{ConstraintError, Vocabulary, begun, clear, has, set};
use crate::dialect::ReasoningForm;

/// Most tokens of newlines between the reasoning and what the grammar is about.
const NEWLINE_TOKENS_MAX: u32 = 2;

/// What holds for the reasoning of one answer.
#[derive(Clone, Debug)]
pub struct Reasoning {
    /// How the answer shows it.
    pub form: ReasoningForm,
    /// The prompt has opened it.
    pub opened: bool,
    /// Most tokens of it.
    pub tokens_max: Option<u32>,
}

/// Rules for an answer that may reason first. Without `content`, all that is asked is that the reasoning ends in time.
///
/// # Errors
///
/// The markers are not in the vocabulary.
pub fn reasoned(
    vocabulary: &Arc<Vocabulary>,
    reasoning: Reasoning,
    content: Option<Arc<dyn Rules>>,
) -> Result<Arc<dyn Rules>, ConstraintError> {
    let ids = |text: &str| {
        let ids = vocabulary.tokenizer.encode(text, false);
        ids.map_err(|error| ConstraintError::Tokenizer { what: error.to_string() })
    };
    let ReasoningForm { open, close, content: opening } = reasoning.form;
    let markers = Markers { open: ids(open)?, close: ids(close)?, content: ids(opening)? };
    let trie = vocabulary.trie();
    let mut free = vec![0u32; trie.vocab_size().div_ceil(32)];
    let mut newlines = Vec::new();
    for id in 0..trie.vocab_size() as u32 {
        let bytes = trie.token(id);
        if bytes.is_empty() || trie.is_special_token(id) {
            continue;
        }
        if bytes.iter().all(|byte| *byte == b'\n') {
            newlines.push(id);
        }
        if !crosses(bytes, close.as_bytes()) {
            set(&mut free, id);
        }
    }
    Ok(Arc::new(Reasoned { vocabulary: vocabulary.clone(), reasoning, markers, free, newlines, content }))
}

/// Whether the marker ends inside `bytes`, before something that is no newline.
fn crosses(bytes: &[u8], marker: &[u8]) -> bool {
    let at = bytes.windows(marker.len().max(1)).position(|window| window == marker);
    at.is_some_and(|at| !bytes[at + marker.len()..].iter().all(|byte| *byte == b'\n'))
}

#[derive(Clone, Debug)]
struct Markers {
    open: Vec<u32>,
    close: Vec<u32>,
    content: Vec<u32>,
}

struct Reasoned {
    vocabulary: Arc<Vocabulary>,
    reasoning: Reasoning,
    markers: Markers,
    /// Tokens of text that do not reach beyond the closing marker.
    free: Vec<u32>,
    newlines: Vec<u32>,
    content: Option<Arc<dyn Rules>>,
}

impl fmt::Debug for Reasoned {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Reasoned").field("reasoning", &self.reasoning).field("content", &self.content).finish()
    }
}

impl Rules for Reasoned {
    fn follow(&self) -> Box<dyn Follower> {
        let Reasoning { form, opened, tokens_max } = self.reasoning;
        let content = self.content.as_ref().map(|rules| rules.follow());
        let phase = match opened {
            true => Phase::Inside { tokens: 0, tail: Vec::new() },
            false => Phase::Start { taken: Vec::new(), text: Vec::new() },
        };
        Box::new(ReasonedFollower {
            vocabulary: self.vocabulary.clone(),
            form,
            tokens_max,
            markers: self.markers.clone(),
            free: self.free.clone(),
            newlines: self.newlines.clone(),
            content,
            phase,
        })
    }
}

enum Phase {
    /// Before a marker.
    Start { taken: Vec<u32>, text: Vec<u8> },
    /// In the reasoning; `tail` is the end of its text, which may begin the closing marker.
    Inside { tokens: u32, tail: Vec<u8> },
    /// These tokens come next.
    Forced { ids: VecDeque<u32>, then: Then },
    /// After the reasoning, before anything but newlines.
    Closed { newlines: u32 },
    /// In what the grammar is about.
    Content,
}

#[derive(Clone, Copy)]
enum Then {
    Closed,
    Content,
}

struct ReasonedFollower {
    vocabulary: Arc<Vocabulary>,
    form: ReasoningForm,
    tokens_max: Option<u32>,
    markers: Markers,
    free: Vec<u32>,
    newlines: Vec<u32>,
    content: Option<Box<dyn Follower>>,
    phase: Phase,
}

impl ReasonedFollower {
    /// What the content's grammar allows; without one, everything.
    fn content(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        match &mut self.content {
            Some(content) => content.allowed(allowed),
            None => {
                allowed.fill(u32::MAX);
                Ok(())
            }
        }
    }

    fn take_content(&mut self, id: u32) -> Result<(), String> {
        self.phase = Phase::Content;
        self.content.as_mut().map_or(Ok(()), |content| content.take(id))
    }

    /// After the closing marker.
    fn closed(&self) -> Phase {
        match self.markers.content.is_empty() || self.content.is_none() {
            true => Phase::Closed { newlines: 0 },
            false => Phase::Forced { ids: self.markers.content.iter().copied().collect(), then: Then::Content },
        }
    }

    /// Leaves out what would reach beyond a closing marker that has begun.
    fn leave_out_crossing(&self, tail: &[u8], allowed: &mut [u32]) {
        let rests = begun(tail, self.form.close.as_bytes());
        if rests.is_empty() {
            return;
        }
        let trie = self.vocabulary.trie();
        for id in 0..trie.vocab_size() as u32 {
            let bytes = trie.token(id);
            let crosses =
                |rest: &&[u8]| bytes.strip_prefix(*rest).is_some_and(|over| !over.iter().all(|byte| *byte == b'\n'));
            if rests.iter().any(crosses) {
                clear(allowed, id);
            }
        }
    }

    fn start(&mut self, id: u32, mut taken: Vec<u32>, mut text: Vec<u8>) -> Result<(), String> {
        let inside = Phase::Inside { tokens: 0, tail: Vec::new() };
        if self.content.is_none() {
            text.extend_from_slice(self.vocabulary.trie().token(id));
            let (open, begin) = (self.form.open.as_bytes(), text.trim_ascii_start());
            self.phase = match () {
                () if begin.starts_with(open) => inside,
                () if open.starts_with(begin) => Phase::Start { taken, text },
                () => Phase::Content,
            };
            return Ok(());
        }
        if self.markers.content.is_empty() && (!taken.is_empty() || self.markers.open != [id]) {
            return self.take_content(id);
        }
        taken.push(id);
        self.phase = match () {
            () if taken == self.markers.open => inside,
            () if taken == self.markers.content => Phase::Content,
            () => Phase::Start { taken, text },
        };
        Ok(())
    }
}

impl Follower for ReasonedFollower {
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        if let (Phase::Inside { tokens, .. }, Some(max)) = (&self.phase, self.tokens_max)
            && *tokens >= max
        {
            let ids = self.markers.close.iter().copied().collect();
            self.phase = Phase::Forced { ids, then: Then::Closed };
        }
        match &self.phase {
            Phase::Start { .. } if self.content.is_none() => allowed.fill(u32::MAX),
            Phase::Start { taken, .. } => {
                let (open, content, at) = (&self.markers.open, &self.markers.content, taken.len());
                let mut next = Vec::new();
                if !content.is_empty() {
                    let along = [open, content].into_iter().filter(|ids| ids.starts_with(taken));
                    next.extend(along.filter_map(|ids| ids.get(at).copied()));
                    allowed.fill(0);
                } else {
                    // A marker of several tokens could be what the grammar is about.
                    next.extend(open.first().filter(|_| open.len() == 1));
                    self.content(allowed)?;
                }
                next.into_iter().for_each(|id| set(allowed, id));
            }
            Phase::Inside { .. } if self.content.is_none() => allowed.fill(u32::MAX),
            Phase::Inside { tail, .. } => {
                let common = self.free.len().min(allowed.len());
                allowed[..common].copy_from_slice(&self.free[..common]);
                allowed[common..].fill(0);
                self.leave_out_crossing(tail, allowed);
            }
            Phase::Forced { ids, .. } => {
                allowed.fill(0);
                ids.front().into_iter().for_each(|id| set(allowed, *id));
            }
            Phase::Closed { newlines } => {
                let more = *newlines < NEWLINE_TOKENS_MAX;
                self.content(allowed)?;
                self.newlines.iter().filter(|_| more).for_each(|id| set(allowed, *id));
            }
            Phase::Content => self.content(allowed)?,
        }
        Ok(())
    }

    fn take(&mut self, id: u32) -> Result<(), String> {
        match std::mem::replace(&mut self.phase, Phase::Content) {
            Phase::Start { taken, text } => self.start(id, taken, text)?,
            Phase::Inside { tokens, mut tail } => {
                tail.extend_from_slice(self.vocabulary.trie().token(id));
                let close = self.form.close.as_bytes();
                self.phase = match has(&tail, close) {
                    true => self.closed(),
                    false => {
                        tail.drain(..tail.len().saturating_sub(close.len()));
                        Phase::Inside { tokens: tokens.saturating_add(1), tail }
                    }
                };
            }
            Phase::Forced { mut ids, then } => {
                if ids.pop_front() != Some(id) {
                    return Err("another token than the one that had to come".into());
                }
                self.phase = match then {
                    _ if !ids.is_empty() => Phase::Forced { ids, then },
                    Then::Closed => self.closed(),
                    Then::Content => Phase::Content,
                };
            }
            Phase::Closed { newlines } if self.newlines.contains(&id) && newlines < NEWLINE_TOKENS_MAX => {
                self.phase = Phase::Closed { newlines: newlines + 1 };
            }
            Phase::Closed { .. } | Phase::Content => self.take_content(id)?,
        }
        Ok(())
    }
}
