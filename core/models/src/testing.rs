//! What several tests need.

use std::path::{Path, PathBuf};

/// A directory of the golden checkpoints; without them the test says so and is skipped, except in CI.
pub(crate) fn golden(test: &str) -> Option<PathBuf> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().find(|path| path.join("Cargo.lock").is_file())?;
    let golden = workspace.parent()?.join("shared/golden");
    if golden.is_dir() {
        return Some(golden);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is missing", golden.display());
    println!("skipped: {test} (no golden checkpoints beside the workspace)");
    None
}

/// Writes GGUF files for tests, well-formed or not.
pub(crate) struct GgufWriter {
    pub entries: Vec<(String, Vec<u8>)>,
    /// Name, shape with the fastest dimension first, type, content.
    pub tensors: Vec<(String, Vec<u64>, u32, Vec<u8>)>,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

impl GgufWriter {
    pub fn new(architecture: &str) -> Self {
        Self { entries: vec![], tensors: vec![] }.text("general.architecture", architecture)
    }

    fn entry(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.entries.push((key.to_owned(), [&kind.to_le_bytes()[..], &value].concat()));
        self
    }

    pub fn text(self, key: &str, value: &str) -> Self {
        self.entry(key, 8, text(value))
    }

    pub fn number(self, key: &str, value: u32) -> Self {
        self.entry(key, 4, value.to_le_bytes().to_vec())
    }

    pub fn float(self, key: &str, value: f32) -> Self {
        self.entry(key, 6, value.to_le_bytes().to_vec())
    }

    pub fn bool(self, key: &str, value: bool) -> Self {
        self.entry(key, 7, vec![value.into()])
    }

    pub fn texts(self, key: &str, values: &[&str]) -> Self {
        let head = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.entry(key, 9, values.iter().fold(head, |out, value| [out, text(value)].concat()))
    }

    pub fn numbers(self, key: &str, values: &[i32]) -> Self {
        let head = [&5u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.entry(key, 9, values.iter().fold(head, |out, value| [&out[..], &value.to_le_bytes()].concat()))
    }

    pub fn tensor(mut self, name: &str, shape: &[u64], kind: u32, content: Vec<u8>) -> Self {
        self.tensors.push((name.to_owned(), shape.to_vec(), kind, content));
        self
    }

    pub fn finish(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend(3u32.to_le_bytes());
        out.extend((self.tensors.len() as u64).to_le_bytes());
        out.extend((self.entries.len() as u64).to_le_bytes());
        for (key, value) in &self.entries {
            out.extend(text(key));
            out.extend(value);
        }
        let mut offset = 0u64;
        for (name, shape, kind, content) in &self.tensors {
            out.extend(text(name));
            out.extend((shape.len() as u32).to_le_bytes());
            shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
            out.extend(kind.to_le_bytes());
            out.extend(offset.to_le_bytes());
            offset += (content.len() as u64).next_multiple_of(32);
        }
        for (.., content) in &self.tensors {
            out.resize(out.len().next_multiple_of(32), 0);
            out.extend(content);
        }
        out
    }
}

/// A GGUF of architecture llama with one layer, `heads` heads of 4 and a vocabulary of ten tokens.
pub(crate) fn tiny_llama(pre: &str) -> GgufWriter {
    let floats = |count: usize| (0..count).flat_map(|i| (i as f32).to_le_bytes()).collect::<Vec<u8>>();
    GgufWriter::new("llama")
        .number("llama.block_count", 1)
        .number("llama.context_length", 128)
        .number("llama.embedding_length", 32)
        .number("llama.feed_forward_length", 32)
        .number("llama.attention.head_count", 4)
        .number("llama.attention.head_count_kv", 2)
        .float("llama.attention.layer_norm_rms_epsilon", 1e-5)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", pre)
        .texts("tokenizer.ggml.tokens", &["<s>", "a", "b", "1", "2", "ab", "12", "Ġ", "Ġa", "[PAD]"])
        .numbers("tokenizer.ggml.token_type", &[3, 1, 1, 1, 1, 1, 1, 1, 1, 5])
        .texts("tokenizer.ggml.merges", &["a b", "1 2", "Ġ a"])
        .number("tokenizer.ggml.bos_token_id", 0)
        .tensor("token_embd.weight", &[32, 10], 0, floats(320))
        .tensor("output_norm.weight", &[32], 0, floats(32))
}
