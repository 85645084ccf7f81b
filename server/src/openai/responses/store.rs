//! Responses that can be continued and looked at. In memory, within bounds: those that were used longest ago go first.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use lru::LruCache;
use mesh_core::chat::Message;
use serde_json::Value;

use super::object::ResponseObject;

/// Most responses that are kept.
pub const ENTRIES_MAX: usize = 1024;
/// Most bytes that they take together, written as JSON.
pub const BYTES_MAX: usize = 128 << 20;

/// What is kept of a response.
#[derive(Clone, Debug)]
pub struct Stored {
    /// The response itself.
    pub response: ResponseObject,
    /// The items of its request.
    pub items: Vec<Value>,
    /// The conversation with its answer, without the instructions.
    pub conversation: Vec<Message>,
}

impl Stored {
    fn bytes(&self) -> usize {
        let length = |json: serde_json::Result<String>| json.map_or(0, |text| text.len());
        length(serde_json::to_string(&self.response))
            + length(serde_json::to_string(&self.items))
            + length(serde_json::to_string(&self.conversation))
    }
}

/// The responses that are kept.
#[derive(Clone, Debug)]
pub struct Store(Arc<Mutex<Kept>>);

#[derive(Debug)]
struct Kept {
    entries: LruCache<String, (usize, Arc<Stored>)>,
    bytes: usize,
    entries_max: usize,
    bytes_max: usize,
}

impl Default for Store {
    fn default() -> Self {
        Self::bounded(ENTRIES_MAX, BYTES_MAX)
    }
}

impl Store {
    /// A store with these bounds.
    pub fn bounded(entries_max: usize, bytes_max: usize) -> Self {
        Self(Arc::new(Mutex::new(Kept { entries: LruCache::unbounded(), bytes: 0, entries_max, bytes_max })))
    }

    fn lock(&self) -> MutexGuard<'_, Kept> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Keeps a response, in the place of what was kept of it before. Others go to make room.
    pub fn put(&self, stored: Stored) {
        let (id, bytes) = (stored.response.id.clone(), stored.bytes());
        let mut kept = self.lock();
        kept.remove(&id);
        if bytes > kept.bytes_max {
            // Nobody else goes for what does not fit anyway.
            tracing::warn!(response = id, bytes, "a response is too large to be kept");
            return;
        }
        kept.bytes += bytes;
        kept.entries.put(id, (bytes, Arc::new(stored)));
        while kept.entries.len() > kept.entries_max || kept.bytes > kept.bytes_max {
            let Some((id, (bytes, _))) = kept.entries.pop_lru() else { break };
            kept.bytes -= bytes;
            tracing::debug!(response = id, "a stored response makes room");
        }
    }

    /// The response of that id, which is used with that.
    pub fn get(&self, id: &str) -> Option<Arc<Stored>> {
        self.lock().entries.get(id).map(|(_, stored)| stored.clone())
    }

    /// Forgets a response; tells whether there was one.
    pub fn remove(&self, id: &str) -> bool {
        self.lock().remove(id)
    }
}

impl Kept {
    fn remove(&mut self, id: &str) -> bool {
        let removed = self.entries.pop(id);
        self.bytes -= removed.as_ref().map_or(0, |(bytes, _)| *bytes);
        removed.is_some()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::{
        openai::responses::{ResponsesRequest, Writer},
        pipeline::CallIds,
    };

    fn stored(id: &str, text: &str) -> Stored {
        let request: ResponsesRequest = serde_json::from_value(json!({ "model": "m", "input": text })).unwrap();
        let asked = request.check(id).unwrap();
        let writer = Writer::new(id.into(), 0, "m".into(), asked.echo, false, CallIds::default());
        Stored { response: writer.response().clone(), items: asked.items, conversation: asked.messages }
    }

    #[test]
    fn what_was_used_longest_ago_makes_room() {
        let store = Store::bounded(2, BYTES_MAX);
        ["a", "b"].into_iter().for_each(|id| store.put(stored(id, "x")));
        assert!(store.get("a").is_some());
        store.put(stored("c", "x"));
        assert_eq!(["a", "b", "c"].map(|id| store.get(id).is_some()), [true, false, true]);
        assert!(store.remove("a") && !store.remove("a") && !store.remove("b"));
        store.put(stored("c", "y"));
        assert_eq!(store.lock().entries.len(), 1, "the same one again");
    }

    #[test]
    fn bytes_are_bounded_and_counted_right() {
        let one = stored("a", &"x".repeat(1000)).bytes();
        let store = Store::bounded(100, one * 2);
        ["a", "b", "c"].into_iter().for_each(|id| store.put(stored(id, &"x".repeat(1000))));
        assert_eq!(["a", "b", "c"].map(|id| store.get(id).is_some()), [false, true, true]);
        assert_eq!(store.lock().bytes, one * 2);
        store.put(stored("d", &"x".repeat(10_000)));
        assert!(store.get("d").is_none(), "it does not fit at all");
        assert!(store.remove("b") && store.remove("c"));
        assert_eq!(store.lock().bytes, 0);
    }
}
