//! Ten thousand files that are nearly right: nothing panics, and none costs more than its bound.

mod common;

use std::fs;

use common::{Entries, cost_of, gguf, safetensors};
use mesh_core::ProgressSink;
use mesh_models::{Store, StoreOptions, Want, import_gguf, probe};
use rand::{RngExt, SeedableRng, rngs::StdRng};

const FILES: usize = 10_000;
const SEED: u64 = 6;
/// What any of them may cost, in bytes, together and in one piece.
const BYTES_MAX: usize = 64_000_000;
/// How long a mutated file may become, in bytes.
const LENGTH_MAX: usize = 256 << 10;

/// Numbers that sizes are not.
const NUMBERS: &[&str] = &[
    "-1",
    "0",
    "1",
    "1.5",
    "1e308",
    "-1e308",
    "NaN",
    "Infinity",
    "null",
    "true",
    "\"x\"",
    "[]",
    "{}",
    "4294967295",
    "4294967296",
    "9223372036854775807",
    "18446744073709551615",
    "99999999999999999999999",
    "[[[[[[[[]]]]]]]]",
];
/// Counts that headers do not have.
const COUNTS: &[u64] = &[0, 1, 1 << 16, 1 << 20, 1 << 31, 1 << 32, 1 << 40, 1 << 62, u64::MAX - 7, u64::MAX];

/// Changes a few things.
fn mutated(content: &[u8], rng: &mut StdRng) -> Vec<u8> {
    let mut content = content.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        if content.is_empty() {
            return content;
        }
        let at = rng.random_range(0..content.len());
        let run = rng.random_range(1..=64usize).min(content.len() - at);
        match rng.random_range(0..9) {
            0 => content[at] ^= 1 << rng.random_range(0..8),
            1 => content[at] = rng.random(),
            2 => content.truncate(at),
            3 => drop(content.drain(at..at + run)),
            4 => {
                let times = rng.random_range(1..=2000usize).min(LENGTH_MAX / run);
                let copy = content[at..at + run].repeat(times);
                content.splice(at..at, copy);
            }
            5 => {
                let count = COUNTS[rng.random_range(0..COUNTS.len())].to_le_bytes();
                let end = (at + 8).min(content.len());
                content[at..end].copy_from_slice(&count[..end - at]);
            }
            6 => {
                let from = rng.random_range(0..content.len());
                let run = run.min(content.len() - from);
                let copy = content[from..from + run].to_vec();
                content.splice(at..at, copy);
            }
            // A number becomes another one, or none.
            _ => {
                let number = |byte: &u8| byte.is_ascii_digit();
                let Some(start) = content[at..].iter().position(number).map(|start| at + start) else { continue };
                let digits = content[start..].iter().take_while(|byte| number(byte)).count();
                let other = NUMBERS[rng.random_range(0..NUMBERS.len())];
                content.splice(start..start + digits, other.bytes());
            }
        }
    }
    content.truncate(LENGTH_MAX);
    content
}

/// Files that belong together, by name; one at a time is mutated.
fn checkpoint() -> Vec<(&'static str, Vec<u8>)> {
    let tensor = |name: &str, shape: &[u64]| (name.to_owned(), shape.to_vec());
    let first =
        [tensor("model.embed_tokens.weight", &[8, 4]), tensor("model.layers.0.mlp.experts.0.up_proj.weight", &[4, 4])];
    let second = [tensor("model.layers.0.mlp.gate.weight", &[2, 4]), tensor("model.norm.weight", &[4])];
    let shard = |tensors: &[(String, Vec<u64>)]| {
        let (mut content, data) = safetensors(tensors);
        content.resize(content.len() + data as usize, 0);
        content
    };
    let config = r#"{"model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": 4,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "vocab_size": 8,
        "max_position_embeddings": 4096, "sliding_window": 64, "num_experts": 2, "num_experts_per_tok": 1,
        "layer_types": ["full_attention", "sliding_attention"], "eos_token_id": [1, 2],
        "quantization": {"group_size": 64, "bits": 4, "model.norm": {"group_size": 32, "bits": 8}},
        "text_config": {"model_type": "x", "kv_lora_rank": 4, "qk_rope_head_dim": 2, "num_hidden_layers": 2,
        "linear_attn_config": {"kda_layers": [1], "num_heads": 2, "head_dim": 2, "short_conv_kernel_size": 4}}}"#;
    let index = r#"{"metadata": {"total_size": 1}, "weight_map": {
        "model.embed_tokens.weight": "model-00001-of-00002.safetensors",
        "model.norm.weight": "model-00002-of-00002.safetensors"}}"#;
    let tokenizer = r#"{"version": "1.0", "added_tokens": [{"id": 1, "content": "<e>", "special": true}],
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 2}, "merges": ["a b"]}}"#;
    let tokenizer_config = r#"{"eos_token": {"content": "<e>"}, "bos_token": "<b>", "model_max_length": 1e30,
        "chat_template": [{"name": "default", "template": "{% for m in messages %}{{ m.content }}{% endfor %}"},
        {"name": "tool_use", "template": "{{ tools }}"}], "added_tokens_decoder": {"1": {"content": "<e>"}}}"#;
    vec![
        ("model-00001-of-00002.safetensors", shard(&first)),
        ("model-00002-of-00002.safetensors", shard(&second)),
        ("model.safetensors.index.json", index.into()),
        ("config.json", config.into()),
        ("config.json", config.into()),
        ("generation_config.json", br#"{"eos_token_id": [1, 2], "temperature": 0.7}"#.to_vec()),
        ("tokenizer.json", tokenizer.into()),
        ("tokenizer_config.json", tokenizer_config.into()),
    ]
}

fn one_gguf() -> Vec<u8> {
    let entries = Entries::default()
        .text("general.architecture", "llama")
        .number("general.alignment", 32)
        .number("llama.block_count", 1)
        .number("llama.context_length", 128)
        .number("llama.embedding_length", 32)
        .number("llama.feed_forward_length", 32)
        .number("llama.attention.head_count", 4)
        .number("llama.attention.head_count_kv", 2)
        .number("llama.attention.sliding_window", 0)
        .number("llama.expert_count", 0)
        .number("llama.attention.layer_norm_rms_epsilon", 1)
        .text("tokenizer.ggml.model", "gpt2")
        .text("tokenizer.ggml.pre", "gpt-2")
        .texts("tokenizer.ggml.tokens", ["<s>", "a", "b", "ab"].map(str::to_owned).into_iter())
        .texts("tokenizer.ggml.merges", ["a b".to_owned()].into_iter())
        .number("tokenizer.ggml.bos_token_id", 0)
        .number("tokenizer.ggml.eos_token_id", 1)
        .text("tokenizer.chat_template", "{{ messages }}");
    let tensors = [
        ("token_embd.weight".to_owned(), vec![32, 4], 0),
        ("output_norm.weight".to_owned(), vec![32], 0),
        ("blk.0.ffn_down.weight".to_owned(), vec![256, 2], 12),
        ("blk.0.ffn_up.weight".to_owned(), vec![256, 2], 14),
    ];
    let (mut content, bytes) = gguf(&entries, &tensors);
    content.resize(bytes as usize, 0);
    content
}

#[test]
fn mutated_files_neither_panic_nor_cost_much() {
    let mut rng = StdRng::seed_from_u64(SEED);
    let (root, made) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (directory, file) = (root.path().join("checkpoint"), root.path().join("m.gguf"));
    fs::create_dir(&directory).unwrap();
    let parts = checkpoint();
    parts.iter().for_each(|(name, content)| fs::write(directory.join(name), content).unwrap());
    let whole = one_gguf();
    let store =
        Store::new(StoreOptions { cache: Some(root.path().join("cache")), offline: true, ..StoreOptions::default() })
            .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let silent = ProgressSink::silent();
    let understood = |path: &std::path::Path| {
        let found = runtime.block_on(store.locate(path.to_str().unwrap(), Want::Any, &silent));
        found.is_ok_and(|artifact| probe(&artifact).is_ok())
    };
    fs::write(&file, &whole).unwrap();
    assert!(understood(&directory) && understood(&file), "what is mutated is right");
    let (mut right, mut imported) = (0, 0);
    for number in 0..FILES {
        let (ok, cost) = if number % 3 == 0 {
            let content = mutated(&whole, &mut rng);
            fs::write(&file, &content).unwrap();
            let out = made.path().join("out");
            let (ok, cost) = cost_of(|| {
                // What is imported waits for the disk.
                if number % 30 == 0 {
                    imported += usize::from(import_gguf(&file, &out, &silent).is_ok());
                }
                understood(&file)
            });
            let _ = fs::remove_dir_all(&out);
            (ok, cost)
        } else {
            let (name, content) = &parts[rng.random_range(0..parts.len())];
            fs::write(directory.join(name), mutated(content, &mut rng)).unwrap();
            let result = cost_of(|| understood(&directory));
            fs::write(directory.join(name), content).unwrap();
            result
        };
        assert!(cost.peak < BYTES_MAX && cost.largest < BYTES_MAX, "file {number} took {cost:?}");
        right += usize::from(ok);
    }
    println!("{right} of {FILES} were understood, {imported} imported");
    // Neither was everything broken at the first byte, nor did nothing break.
    assert!(
        right > FILES / 20 && right < FILES * 19 / 20 && imported > 0,
        "{right} were understood, {imported} imported"
    );
}
