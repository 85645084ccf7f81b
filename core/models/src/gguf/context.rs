//! What a context takes, from the first entries of a header: before the rest of the file is there.

use super::{ENTRIES_MAX, Gguf, KEY_BYTES_MAX, MAGIC, Reader, value};

/// How much of a file is enough to know it; what is about tokens comes later.
pub(crate) const BEGINNING_BYTES: usize = 64 << 10;
/// Most layers that are believed.
const LAYERS_MAX: u64 = 1 << 12;
/// Bytes of a number that is kept of a token: keys and values are 16-bit floats.
const KEPT_BYTES: u64 = 2;

impl<D: AsRef<[u8]>> Gguf<D> {
    /// The entries that are whole in the beginning of a file.
    pub(crate) fn beginning(data: D) -> Option<Self> {
        let mut reader = Reader::new(data.as_ref());
        if reader.take(4).ok()? != MAGIC || !matches!(reader.u32().ok()?, 2 | 3) {
            return None;
        }
        let (_, entry_count) = (reader.u64().ok()?, reader.u64().ok()?);
        let mut entries = std::collections::BTreeMap::new();
        for _ in 0..entry_count.min(ENTRIES_MAX) {
            let Ok(key) = reader.name("a metadata key", KEY_BYTES_MAX) else { break };
            let Ok(value) = value(&mut reader) else { break };
            entries.insert(key, value);
        }
        Some(Self { data, entries, alignment: super::ALIGNMENT_DEFAULT, tensors: Vec::new() })
    }

    /// What a context of so many tokens takes, in bytes, if the header tells: a key and a value of each layer and head,
    /// for no more tokens than the model knows. Windows and states would take less.
    pub(crate) fn context_bytes(&self, tokens: u64) -> Option<u64> {
        let architecture = self.text("general.architecture")?;
        let named = |key: &str| format!("{architecture}.{key}");
        let number = |key: &str| self.unsigned(&named(key));
        let layers = number("block_count").filter(|layers| (1..=LAYERS_MAX).contains(layers))?;
        let heads = number("attention.head_count");
        // One number for all layers, or one for each.
        let kv_heads = match self.array(&named("attention.head_count_kv")) {
            Some(each) => each.unsigned().take(LAYERS_MAX as usize).fold(0, u64::saturating_add),
            None => number("attention.head_count_kv").or(heads)?.saturating_mul(layers),
        };
        let even = || number("embedding_length")?.checked_div(heads?);
        let length = |key: &str| number(key).or_else(even);
        let width = length("attention.key_length")?.saturating_add(length("attention.value_length")?);
        let tokens = number("context_length").map_or(tokens, |most| tokens.min(most));
        Some(kv_heads.saturating_mul(width).saturating_mul(KEPT_BYTES).saturating_mul(tokens))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{GgufWriter, tiny_llama};

    #[test]
    fn the_beginning_of_a_file_is_enough() {
        let whole = tiny_llama("gpt-2").finish();
        // Two heads of eight values, a key and a value, one layer; and the model knows 128 tokens.
        let token = 2 * (8 + 8) * 2;
        assert_eq!(Gguf::parse(&whole[..]).unwrap().context_bytes(64), Some(64 * token));
        let mut known = 0;
        for cut in 0..whole.len() {
            let beginning = Gguf::beginning(&whole[..cut]);
            if let Some(bytes) = beginning.and_then(|header| header.context_bytes(8192)) {
                known += 1;
                assert!([128 * token, 4 * (8 + 8) * 2 * 128].contains(&bytes), "{cut}: {bytes}");
            }
        }
        assert!(known > 100);
        assert!(Gguf::beginning(&b"GGML"[..]).is_none());
    }

    #[test]
    fn layers_may_differ_and_lies_are_bounded() {
        let layers = GgufWriter::new("x")
            .number("x.block_count", 3)
            .number("x.attention.key_length", 64)
            .number("x.attention.value_length", 32);
        let each = layers.numbers("x.attention.head_count_kv", &[8, 0, 2]).finish();
        assert_eq!(Gguf::beginning(&each[..]).unwrap().context_bytes(10), Some(10 * (64 + 32) * 10 * 2));
        let huge = GgufWriter::new("x")
            .number("x.block_count", 4096)
            .number("x.attention.head_count_kv", u32::MAX)
            .number("x.attention.key_length", u32::MAX)
            .number("x.attention.value_length", u32::MAX)
            .finish();
        assert_eq!(Gguf::beginning(&huge[..]).unwrap().context_bytes(u64::MAX), Some(u64::MAX));
        let many = GgufWriter::new("x").number("x.block_count", u32::MAX).finish();
        assert_eq!(Gguf::beginning(&many[..]).unwrap().context_bytes(1), None);
        let none = GgufWriter::new("x")
            .number("x.block_count", 1)
            .number("x.attention.head_count", 0)
            .number("x.embedding_length", 64)
            .finish();
        assert_eq!(Gguf::beginning(&none[..]).unwrap().context_bytes(1), None);
    }
}
