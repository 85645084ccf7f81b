//! What several tests need.

use std::path::{Path, PathBuf};

use half::f16;

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
    alignment: usize,
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

impl GgufWriter {
    pub fn new(architecture: &str) -> Self {
        Self { entries: vec![], tensors: vec![], alignment: 32 }.text("general.architecture", architecture)
    }

    fn entry(mut self, key: &str, kind: u32, value: Vec<u8>) -> Self {
        self.entries.push((key.to_owned(), [&kind.to_le_bytes()[..], &value].concat()));
        self
    }

    pub fn aligned(mut self, alignment: u32) -> Self {
        self.alignment = alignment as usize;
        self.number("general.alignment", alignment)
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

    pub fn floats(self, key: &str, values: &[f32]) -> Self {
        let head = [&6u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.entry(key, 9, values.iter().fold(head, |out, value| [&out[..], &value.to_le_bytes()].concat()))
    }

    pub fn bools(self, key: &str, values: &[bool]) -> Self {
        let head = [&7u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        self.entry(key, 9, values.iter().fold(head, |out, value| [&out[..], &[u8::from(*value)]].concat()))
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
            offset += content.len().next_multiple_of(self.alignment) as u64;
        }
        for (.., content) in &self.tensors {
            out.resize(out.len().next_multiple_of(self.alignment), 0);
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

/// What GGUF's blocks mean, from their definition and not from the code under test.
pub(crate) fn dequantized(kind: u32, block: &[u8]) -> Vec<f32> {
    let half = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let nibble = |at: usize, i: usize| i32::from(if i < 16 { block[at + i] % 16 } else { block[at + i - 16] / 16 });
    let fifth = |at: usize, i: usize| i32::from(block[at + i / 8] >> (i % 8) & 1) * 16;
    let value = |i: usize| match kind {
        2 => (nibble(2, i) - 8) as f32 * half(0),
        3 => nibble(4, i) as f32 * half(0) + half(2),
        6 => (nibble(6, i) + fifth(2, i) - 16) as f32 * half(0),
        7 => (nibble(8, i) + fifth(4, i)) as f32 * half(0) + half(2),
        8 => f32::from(block[2 + i] as i8) * half(0),
        _ => unreachable!(),
    };
    (0..32).map(value).collect()
}

/// The block types by number, with bytes and bits a code.
pub(crate) const BLOCKS: [(u32, usize, usize); 5] = [(2, 18, 4), (3, 20, 4), (6, 22, 5), (7, 24, 5), (8, 34, 8)];

/// A block of a K-quant and its values, by name: random ones with the values that the `gguf` package (Python, 0.19.0)
/// gives them.
pub(crate) fn k_block(name: &str) -> (Vec<u8>, Vec<f32>) {
    let all: serde_json::Value = serde_json::from_str(include_str!("gguf/k_blocks.json")).unwrap();
    let hex = all[name]["block"].as_str().unwrap();
    let block = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    let values = all[name]["values"].as_array().unwrap().iter().map(|value| value.as_f64().unwrap() as f32).collect();
    (block, values)
}

/// The K-quants by name, with their numbers.
pub(crate) const K_QUANTS: [(&str, u32); 5] = [("Q2_K", 10), ("Q3_K", 11), ("Q4_K", 12), ("Q5_K", 13), ("Q6_K", 14)];

/// Makes the scales of a block finite, and of the size that scales have.
pub(crate) fn scaled(bytes: &mut [u8], kind: u32) {
    for at in (0..if [3, 7].contains(&kind) { 4 } else { 2 }).step_by(2) {
        let half = f16::from_f32(f32::from(i16::from_le_bytes([bytes[at], bytes[at + 1]])) / 4096.0);
        bytes[at..at + 2].copy_from_slice(&half.to_le_bytes());
    }
}
