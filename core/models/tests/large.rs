//! A repository of more than 100 GB is understood from its headers, at once and with little memory. Its files are sparse.

mod common;

use std::{
    fs::{self, File},
    io::Write,
    path::Path,
    time::{Duration, Instant},
};

use common::{Entries, cost_of, gguf, safetensors};
use mesh_core::{ModelProfile, Part, ProgressSink};
use mesh_models::{Store, StoreOptions, Want, probe};
use serde_json::json;

/// What the understanding of any model may take.
const BYTES_MAX: usize = 50 << 20;
const TIME_MAX: Duration = Duration::from_millis(200);
/// The same where the parser of JSON was compiled without optimization.
const TIME_UNOPTIMIZED_MAX: Duration = Duration::from_secs(1);

const LAYERS: u64 = 48;
const EXPERTS: u64 = 128;
const HIDDEN: u64 = 4096;
const INNER: u64 = 768;
const VOCAB: u64 = 151_936;
const SHARDS: usize = 24;

/// A file that begins so and has so many bytes, most of them not on the disk.
fn sparse(path: &Path, header: &[u8], bytes: u64) {
    let mut file = File::create(path).unwrap();
    file.write_all(header).unwrap();
    file.set_len(bytes).unwrap();
}

/// A mixture of experts as it is published: every expert by itself.
fn checkpoint(root: &Path) {
    let mut tensors = vec![("model.embed_tokens.weight".to_owned(), vec![VOCAB, HIDDEN])];
    let mut add = |name: String, shape: &[u64]| tensors.push((name, shape.to_vec()));
    for layer in 0..LAYERS {
        let of = |part: &str| format!("model.layers.{layer}.{part}.weight");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            add(of(norm), &[HIDDEN]);
        }
        for (part, rows) in [("q_proj", 8192), ("k_proj", 1024), ("v_proj", 1024)] {
            add(of(&format!("self_attn.{part}")), &[rows, HIDDEN]);
        }
        add(of("self_attn.o_proj"), &[HIDDEN, 8192]);
        add(of("mlp.gate"), &[EXPERTS, HIDDEN]);
        for expert in 0..EXPERTS {
            for (part, shape) in
                [("gate_proj", [INNER, HIDDEN]), ("up_proj", [INNER, HIDDEN]), ("down_proj", [HIDDEN, INNER])]
            {
                add(of(&format!("mlp.experts.{expert}.{part}")), &shape);
            }
        }
    }
    add("model.norm.weight".into(), &[HIDDEN]);
    add("lm_head.weight".into(), &[VOCAB, HIDDEN]);
    let mut map = serde_json::Map::new();
    for (number, shard) in tensors.chunks(tensors.len().div_ceil(SHARDS)).enumerate() {
        let name = format!("model-{:05}-of-{SHARDS:05}.safetensors", number + 1);
        let (header, data) = safetensors(shard);
        sparse(&root.join(&name), &header, header.len() as u64 + data);
        map.extend(shard.iter().map(|(tensor, _)| (tensor.clone(), name.clone().into())));
    }
    let write = |name: &str, content: serde_json::Value| fs::write(root.join(name), content.to_string()).unwrap();
    write("model.safetensors.index.json", json!({ "metadata": {}, "weight_map": map }));
    write(
        "config.json",
        json!({
            "model_type": "qwen3_moe", "architectures": ["Qwen3MoeForCausalLM"], "hidden_size": HIDDEN, "head_dim": 128,
            "num_hidden_layers": LAYERS, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": VOCAB,
            "num_experts": EXPERTS, "num_experts_per_tok": 8, "moe_intermediate_size": INNER, "eos_token_id": 7,
            "max_position_embeddings": 262_144, "intermediate_size": 12_288,
        }),
    );
    let vocabulary: serde_json::Map<_, _> = (0..VOCAB).map(|id| (format!("\u{120}token{id}"), id.into())).collect();
    let merges: Vec<String> = (0..VOCAB).map(|id| format!("\u{120}to ken{id}")).collect();
    write(
        "tokenizer.json",
        json!({
            "added_tokens": [{ "id": 7, "content": "<|im_end|>" }],
            "model": { "type": "BPE", "vocab": vocabulary, "merges": merges },
        }),
    );
    write("tokenizer_config.json", json!({ "eos_token": "<|im_end|>", "chat_template": "{{ messages }}" }));
}

/// The same as a GGUF in four parts.
fn split_gguf(root: &Path) {
    let arch = |key: &str| format!("qwen3moe.{key}");
    let entries = Entries::default()
        .text("general.architecture", "qwen3moe")
        .number(&arch("block_count"), LAYERS as u32)
        .number(&arch("context_length"), 262_144)
        .number(&arch("embedding_length"), HIDDEN as u32)
        .number(&arch("attention.head_count"), 64)
        .number(&arch("attention.head_count_kv"), 8)
        .number(&arch("attention.key_length"), 128)
        .number(&arch("expert_count"), EXPERTS as u32)
        .number(&arch("expert_used_count"), 8)
        .texts("tokenizer.ggml.tokens", (0..VOCAB).map(|id| format!("\u{120}token{id}")))
        .texts("tokenizer.ggml.merges", (0..VOCAB).map(|id| format!("\u{120}to ken{id}")))
        .text("tokenizer.chat_template", "{{ messages }}");
    let (none, parts) = (Entries::default(), 4);
    let each = LAYERS / parts;
    for part in 0..parts {
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[u64], kind| tensors.push((name, shape.to_vec(), kind));
        if part == 0 {
            add("token_embd.weight".into(), &[HIDDEN, VOCAB], 14);
            add("output_norm.weight".into(), &[HIDDEN], 0);
            add("output.weight".into(), &[HIDDEN, VOCAB], 14);
        }
        for layer in part * each..(part + 1) * each {
            let of = |name: &str| format!("blk.{layer}.{name}.weight");
            add(of("attn_norm"), &[HIDDEN], 0);
            for (name, rows) in [("attn_q", 8192), ("attn_k", 1024), ("attn_v", 1024)] {
                add(of(name), &[HIDDEN, rows], 12);
            }
            // Four times as wide, to be of the same size.
            add(of("ffn_gate_exps"), &[HIDDEN, 4 * INNER, EXPERTS], 12);
            add(of("ffn_up_exps"), &[HIDDEN, 4 * INNER, EXPERTS], 12);
            add(of("ffn_down_exps"), &[4 * INNER, HIDDEN, EXPERTS], 14);
        }
        let (header, bytes) = gguf(if part == 0 { &entries } else { &none }, &tensors);
        sparse(&root.join(format!("m-{:05}-of-{parts:05}.gguf", part + 1)), &header, bytes);
    }
}

/// Finds and probes the model at `path` a few times; the fastest is what it takes where nobody else computes.
fn understood(path: &Path, want: Want) -> ModelProfile {
    let cache = tempfile::tempdir().unwrap();
    let store =
        Store::new(StoreOptions { cache: Some(cache.path().to_owned()), offline: true, ..StoreOptions::default() })
            .unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let reference = path.to_str().unwrap();
    let silent = ProgressSink::silent();
    let mut runs: Vec<(Duration, ModelProfile)> = Vec::new();
    for _ in 0..5 {
        let start = Instant::now();
        let (profile, cost) = cost_of(|| {
            let artifact = runtime.block_on(store.locate(reference, want, &silent)).unwrap();
            probe(&artifact).unwrap()
        });
        println!("{reference}: {:?}, at most {} bytes at once", start.elapsed(), cost.peak);
        assert!(cost.peak < BYTES_MAX, "{reference} took {} bytes", cost.peak);
        runs.push((start.elapsed(), profile));
    }
    let (fastest, profile) = runs.into_iter().min_by_key(|(time, _)| *time).unwrap();
    let most = if cfg!(debug_assertions) { TIME_UNOPTIMIZED_MAX } else { TIME_MAX };
    assert!(fastest < most, "{reference} took {fastest:?}");
    profile
}

#[test]
fn a_hundred_gigabytes_are_understood_from_headers() {
    let root = tempfile::tempdir().unwrap();
    checkpoint(root.path());
    let profile = understood(root.path(), Want::Safetensors);
    assert!(profile.weight_bytes.value > 100_000_000_000, "{}", profile.weight_bytes.value);
    let experts = LAYERS * EXPERTS * 3 * INNER * HIDDEN;
    let (parameters, active) = (profile.parameters.unwrap().value, profile.parameters_active.unwrap());
    assert_eq!(parameters - active.value, experts / EXPERTS * (EXPERTS - 8));
    assert_eq!(active.source.to_string(), "`num_experts_per_tok` in config.json");
    let row = |part| profile.stored.as_ref().unwrap().value.iter().find(|row| row.part == part).unwrap();
    assert_eq!((row(Part::Experts).parameters, row(Part::Experts).form.as_str()), (experts, "BF16"));
    assert_eq!(row(Part::Experts).tensors, LAYERS * EXPERTS * 3);
    assert_eq!(profile.kept.unwrap().value.token_values, LAYERS * 2 * 8 * 128);

    let root = tempfile::tempdir().unwrap();
    split_gguf(root.path());
    let profile = understood(root.path(), Want::Gguf);
    assert!(profile.weight_bytes.value > 100_000_000_000, "{}", profile.weight_bytes.value);
    assert_eq!(profile.kept.unwrap().value.token_values, LAYERS * 2 * 8 * 128);
    assert_eq!(profile.vocab_size.unwrap().value, VOCAB as u32);
    let experts: Vec<_> = profile.stored.unwrap().value.into_iter().filter(|row| row.part == Part::Experts).collect();
    assert_eq!(experts.iter().map(|row| row.form.as_str()).collect::<Vec<_>>(), ["Q4_K", "Q6_K"]);
    assert!(profile.parameters_active.unwrap().value < profile.parameters.unwrap().value / 8);
}
