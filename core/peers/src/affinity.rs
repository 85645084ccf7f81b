//! Who has seen the beginning of a conversation: its next turn goes there, where the prefix need not be read again. Only
//! hashes are kept, and they stay on this machine.

#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, num::NonZeroUsize};

use lru::LruCache;
use mesh_core::{
    ask::{Chat, Subject},
    chat::Message,
};

use crate::{NodeId, policy::Candidate};

/// The hash of a prefix.
pub type Key = [u8; 16];

/// Prefixes of one request: its first ones, which conversations share, and its last ones, which its next turn has.
const FIRST_KEYS: usize = 8;
/// The last ones.
const LAST_KEYS: usize = 56;

/// Nodes that are remembered for one prefix.
const NODES_A_KEY: usize = 4;

/// Bytes of text that a token has, about.
const BYTES_A_TOKEN: u64 = 4;

/// The shortest prefix of a text that is worth a key, in bytes; the others are its doubles.
const TEXT_BYTES_MIN: usize = 256;

/// The shortest prefix of tokens that is worth a key; the others are its doubles.
const TOKENS_MIN: usize = 64;

/// Prefixes and the nodes that have seen them, the least recent forgotten first.
#[derive(Debug)]
pub struct Affinity {
    seen: LruCache<Key, Vec<NodeId>>,
}

impl Affinity {
    /// Remembers so many prefixes; one at least.
    pub fn new(prefixes_max: usize) -> Self {
        Self { seen: LruCache::new(NonZeroUsize::new(prefixes_max).unwrap_or(NonZeroUsize::MIN)) }
    }

    /// The node has read all these prefixes for the model, and probably still has them.
    pub fn note(&mut self, keys: &[(Key, u32)], model: &str, node: NodeId) {
        for (key, _) in keys {
            let nodes = self.seen.get_or_insert_mut(of_model(key, model), Vec::new);
            nodes.retain(|known| *known != node);
            nodes.insert(0, node);
            nodes.truncate(NODES_A_KEY);
        }
    }

    /// How many tokens of the prompt each node has probably read for the model.
    pub fn find(&self, keys: &[(Key, u32)], model: &str) -> BTreeMap<NodeId, u32> {
        let mut found: BTreeMap<NodeId, u32> = BTreeMap::new();
        for (key, tokens) in keys {
            for node in self.seen.peek(&of_model(key, model)).into_iter().flatten() {
                let most = found.entry(*node).or_default();
                *most = (*most).max(*tokens);
            }
        }
        found
    }

    /// Fills in [`Candidate::cached_tokens`].
    pub fn mark(&self, candidates: &mut [Candidate], keys: &[(Key, u32)], model: &str) {
        let found = self.find(keys, model);
        for candidate in candidates {
            candidate.cached_tokens = found.get(&candidate.node).copied().unwrap_or(0);
        }
    }

    /// The node is gone, or was started anew: it has nothing any more.
    pub fn forget(&mut self, node: NodeId) {
        let mut empty = Vec::new();
        for (key, nodes) in self.seen.iter_mut() {
            nodes.retain(|known| *known != node);
            if nodes.is_empty() {
                empty.push(*key);
            }
        }
        for key in empty {
            self.seen.pop(&key);
        }
    }

    /// How many prefixes are remembered.
    pub fn len(&self) -> usize {
        self.seen.len()
    }

    /// Whether none is.
    pub fn is_empty(&self) -> bool {
        self.seen.is_empty()
    }
}

fn of_model(key: &Key, model: &str) -> Key {
    short(blake3::Hasher::new().update(key).update(model.as_bytes()))
}

fn short(hasher: &blake3::Hasher) -> Key {
    hasher.finalize().as_bytes()[..16].try_into().expect("sixteen bytes")
}

/// The hashes of what is asked, each with the number of tokens up to there, about, shortest first. The last one is all of it.
pub fn keys(subject: &Subject) -> Vec<(Key, u32)> {
    match subject {
        Subject::Chat(chat) => of_chat(chat),
        Subject::Text(text) => {
            let lengths = doubles(TEXT_BYTES_MIN, text.len());
            chain(b"text", text.as_bytes(), lengths.map(|length| (length, length as u64 / BYTES_A_TOKEN)))
        }
        Subject::Tokens(tokens) => {
            let bytes: Vec<u8> = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
            let lengths = doubles(TOKENS_MIN, tokens.len());
            chain(b"tokens", &bytes, lengths.map(|length| (length * size_of::<u32>(), length as u64)))
        }
    }
}

/// About how many tokens the prompt has.
pub fn prompt_tokens(subject: &Subject) -> u32 {
    match subject {
        Subject::Text(text) => tokens(text.len() as u64),
        Subject::Tokens(tokens) => u32::try_from(tokens.len()).unwrap_or(u32::MAX),
        Subject::Chat(_) => keys(subject).last().map_or(0, |(_, tokens)| *tokens),
    }
}

fn tokens(bytes: u64) -> u32 {
    u32::try_from(bytes.div_ceil(BYTES_A_TOKEN)).unwrap_or(u32::MAX)
}

/// `least` and its doubles up to `all`, and `all`.
fn doubles(least: usize, all: usize) -> impl Iterator<Item = usize> {
    std::iter::successors(Some(least), |length| length.checked_mul(2))
        .take_while(move |length| *length < all)
        .chain((all >= least).then_some(all))
}

fn chain(kind: &[u8], bytes: &[u8], lengths: impl Iterator<Item = (usize, u64)>) -> Vec<(Key, u32)> {
    let mut hasher = blake3::Hasher::new();
    hasher.update(kind);
    let mut done = 0;
    let keys = lengths.map(|(length, tokens)| {
        hasher.update(&bytes[done..length]);
        done = length;
        (short(&hasher), u32::try_from(tokens).unwrap_or(u32::MAX))
    });
    keys.collect()
}

fn of_chat(chat: &Chat) -> Vec<(Key, u32)> {
    let mut prefix = Prefix::default();
    // Templates write tools, and what else they are told, in front of the first message.
    prefix.json(&chat.tools);
    prefix.json(&chat.kwargs);
    let last = chat.messages.len().saturating_sub(LAST_KEYS);
    let mut keys = Vec::new();
    for (index, message) in chat.messages.iter().enumerate() {
        prefix.message(message);
        if index < FIRST_KEYS || index >= last {
            keys.push((short(&prefix.hasher), tokens(prefix.bytes)));
        }
    }
    keys
}

/// A hash that grows, and how much text it has seen.
#[derive(Default)]
struct Prefix {
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Prefix {
    fn message(&mut self, message: &Message) {
        let Message { role, content, name, reasoning_content: _, tool_calls, tool_call_id } = message;
        // Reasoning is left out, as most templates leave that of earlier turns out, and most clients do not hand it back.
        self.text(Some(role));
        self.text(content.as_deref());
        self.text(name.as_deref());
        self.text(tool_call_id.as_deref());
        self.length(tool_calls.len());
        for call in tool_calls {
            self.text(Some(&call.function.name));
            self.json(&call.function.arguments);
        }
    }

    fn text(&mut self, text: Option<&str>) {
        self.length(text.map_or(0, |text| text.len() + 1));
        self.hasher.update(text.unwrap_or_default().as_bytes());
        self.bytes += text.map_or(0, str::len) as u64;
    }

    fn json(&mut self, value: &impl serde::Serialize) {
        let text = serde_json::to_string(value).unwrap_or_default();
        self.text(Some(&text));
    }

    // What stands where is part of the hash: "ab", "c" is not "a", "bc".
    fn length(&mut self, length: usize) {
        self.hasher.update(&(length as u64).to_le_bytes());
    }
}
