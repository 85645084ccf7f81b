//! Answers that are free but for what follows a trigger: calls that a model may make or not, and that have to fit their
//! functions if it does.

use std::{fmt, sync::Arc};

use mesh_core::{Follower, Rules};

use super::{ConstraintError, Vocabulary, begun, clear, has};

/// Rules for an answer in which everything may come, until the token `trigger` does: from there to its end, `part` holds,
/// which begins with that token. Then everything may come again.
///
/// # Errors
///
/// The trigger is not one token.
pub fn watched(
    vocabulary: &Arc<Vocabulary>,
    trigger: &'static str,
    part: Arc<dyn Rules>,
) -> Result<Arc<dyn Rules>, ConstraintError> {
    let ids = vocabulary.tokenizer.encode(trigger, false);
    let ids = ids.map_err(|error| ConstraintError::Tokenizer { what: error.to_string() })?;
    let [id] = ids[..] else {
        return Err(ConstraintError::Tokenizer { what: format!("`{trigger}` is not one of its tokens") });
    };
    let trie = vocabulary.trie();
    let spelled = |other: &u32| *other != id && has(trie.token(*other), trigger.as_bytes());
    let containing = (0..trie.vocab_size() as u32).filter(spelled).collect();
    Ok(Arc::new(Watched { vocabulary: vocabulary.clone(), trigger, id, containing, part }))
}

struct Watched {
    vocabulary: Arc<Vocabulary>,
    trigger: &'static str,
    id: u32,
    /// Other tokens that hold the trigger.
    containing: Arc<[u32]>,
    part: Arc<dyn Rules>,
}

impl fmt::Debug for Watched {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Watched").field("trigger", &self.trigger).finish_non_exhaustive()
    }
}

impl Rules for Watched {
    fn follow(&self) -> Box<dyn Follower> {
        Box::new(WatchedFollower {
            vocabulary: self.vocabulary.clone(),
            trigger: self.trigger,
            id: self.id,
            containing: self.containing.clone(),
            rules: self.part.clone(),
            tail: Vec::new(),
            part: None,
        })
    }
}

struct WatchedFollower {
    vocabulary: Arc<Vocabulary>,
    trigger: &'static str,
    id: u32,
    containing: Arc<[u32]>,
    rules: Arc<dyn Rules>,
    /// The end of the free text, which may begin the trigger.
    tail: Vec<u8>,
    part: Option<Box<dyn Follower>>,
}

impl WatchedFollower {
    /// Everything, but for other spellings of the trigger: the dialect would read them as such.
    fn free(&self, allowed: &mut [u32]) {
        allowed.fill(u32::MAX);
        self.containing.iter().for_each(|id| clear(allowed, *id));
        let rests = begun(&self.tail, self.trigger.as_bytes());
        if rests.is_empty() {
            return;
        }
        let trie = self.vocabulary.trie();
        for id in 0..trie.vocab_size() as u32 {
            if rests.iter().any(|rest| trie.token(id).starts_with(rest)) {
                clear(allowed, id);
            }
        }
    }
}

impl Follower for WatchedFollower {
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        if let Some(part) = &mut self.part {
            part.allowed(allowed)?;
            let ends = self.vocabulary.trie().eos_tokens();
            let more = (0..).zip(allowed.iter()).any(|(at, word): (u32, &u32)| {
                let ends = ends.iter().filter(|id| *id / 32 == at).fold(0, |ends, id| ends | 1 << (id % 32));
                word & !ends != 0
            });
            if more {
                return Ok(());
            }
            self.part = None;
            self.tail.clear();
        }
        self.free(allowed);
        Ok(())
    }

    fn take(&mut self, id: u32) -> Result<(), String> {
        match &mut self.part {
            Some(part) => part.take(id),
            None if id == self.id => self.part.insert(self.rules.follow()).take(id),
            None => {
                self.tail.extend_from_slice(self.vocabulary.trie().token(id));
                self.tail.drain(..self.tail.len().saturating_sub(self.trigger.len()));
                Ok(())
            }
        }
    }
}
