//! Hostile headers cost no more memory than they have bytes, and unpacking costs the same for every size.

mod common;

use std::fs;

use common::cost_of;
use mesh_core::{ProgressSink, WeightFormat};
use mesh_models::{Artifact, Floats, Store, StoreOptions, Want, probe, unpack_gguf};

/// More than any of these files may cost, in bytes; far less than what they claim.
const BOUND: usize = 2 << 20;

fn peak_of(name: &str, format: WeightFormat, content: &[u8]) -> usize {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join(name);
    fs::write(&path, content).unwrap();
    let artifact = Artifact { name: "x".into(), root: root.path().to_owned(), weights: vec![path], format };
    let (result, cost) = cost_of(|| probe(&artifact));
    assert!(result.is_err(), "{result:?}");
    cost.peak
}

/// A tensor of one row is no reason to hold all of it.
fn peak_of_unpacking(blocks: u64) -> usize {
    let head = [&b"GGUF\x03\0\0\0"[..], &1u64.to_le_bytes(), &0u64.to_le_bytes()].concat();
    let tensor =
        [&1u64.to_le_bytes()[..], b"t", &2u32.to_le_bytes(), &(32 * blocks).to_le_bytes(), &1u64.to_le_bytes()];
    let mut content = [head, tensor.concat(), 8u32.to_le_bytes().to_vec(), 0u64.to_le_bytes().to_vec()].concat();
    content.resize(content.len().next_multiple_of(32) + blocks as usize * 34, 0);
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("in.gguf");
    fs::write(&path, content).unwrap();
    let out = root.path().join("out.gguf");
    let (report, cost) = cost_of(|| unpack_gguf(&path, &out, Floats::F16, &ProgressSink::silent()).unwrap());
    assert!(report.bytes > 64 * blocks);
    cost.peak
}

/// What any files may cost, in bytes.
const BOMB_BOUND: usize = 64_000_000;

/// Files that are as long as they may be, and hold as much as fits in.
fn bombs() {
    let filled = |head: &str, unit: &str, tail: &str, bytes: usize| {
        let mut text = String::with_capacity(bytes);
        text.push_str(head);
        while text.len() + unit.len() + tail.len() <= bytes {
            text.push_str(unit);
        }
        text.push_str(tail);
        text
    };
    // Whole files, and as many values as are read.
    let config = 2 << 20;
    let few = 250_000;
    let keys = |bytes: usize| {
        let mut text = String::from("{");
        let mut number = 0u32;
        while text.len() + 16 < bytes {
            text.push_str(&format!("\"{number:x}\":0,"));
            number += 1;
        }
        text + "\"z\":0}"
    };
    let cases = [
        ("config.json", filled("{\"a\":[0", ",0", "]}", config)),
        ("config.json", filled("{\"a\":[[]", ",[]", "]}", config)),
        ("config.json", filled("{\"a\":[{}", ",{}", "]}", config)),
        ("config.json", filled("{\"a\":[\"\"", ",\"\"", "]}", config)),
        ("config.json", filled("{\"a\":[0", ",0", "]}", few)),
        ("config.json", filled("{\"a\":[[0]", ",[0]", "]}", few)),
        ("config.json", filled("{\"a\":[{\"a\":[0]}", ",{\"a\":[0]}", "]}", few * 5 / 3)),
        ("config.json", keys(1_200_000)),
        ("config.json", filled("{\"layer_types\":[\"conv\"", ",\"conv\"", "],\"num_hidden_layers\":4096}", config)),
        ("config.json", keys(config)),
        ("generation_config.json", filled("{\"eos_token_id\":[0", ",0", "]}", 256 << 10)),
        ("tokenizer_config.json", filled("{\"a\":[0", ",0", "]}", 16 << 20)),
        ("tokenizer_config.json", filled("{\"eos_token\":[0", ",0", "]}", 16 << 20)),
        ("tokenizer_config.json", filled("{\"chat_template\":[{}", ",{}", "]}", 16 << 20)),
        ("tokenizer_config.json", filled("{\"chat_template\":\"", "\\n", "\"}", 16 << 20)),
        (
            "tokenizer.json",
            filled("{\"added_tokens\":[{\"id\":0,\"content\":\"\"}", ",{\"id\":0,\"content\":\"\"}", "]}", 32 << 20),
        ),
        ("tokenizer.json", filled("{\"model\":[0", ",0", "]}", 64 << 20)),
        ("model.safetensors.index.json", filled("{\"weight_map\":{\"a\":\"b\"", ",\"a\":\"b\"", "}}", 48 << 20)),
    ];
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    let store =
        Store::new(StoreOptions { cache: Some("/nowhere".into()), offline: true, ..StoreOptions::default() }).unwrap();
    for (number, (name, text)) in cases.iter().enumerate() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("model.safetensors"), [&2u64.to_le_bytes()[..], b"{}"].concat()).unwrap();
        fs::write(root.path().join(name), text).unwrap();
        let reference = root.path().to_str().unwrap();
        let (_, cost) = cost_of(|| {
            let found = runtime.block_on(store.locate(reference, Want::Any, &ProgressSink::silent()));
            found.ok().and_then(|artifact| probe(&artifact).ok())
        });
        println!("{number} {name}: {cost:?}");
        assert!(cost.peak < BOMB_BOUND, "{number}: {name} of {} bytes took {cost:?}", text.len());
    }
    // Headers of many tensors: of as many as are read, and of more.
    let header = |count: usize| {
        let mut text = String::from("{\"first\":{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0]}");
        (0..count).for_each(|number| {
            text.push_str(&format!(",\"{number:x}\":{{\"dtype\":\"I8\",\"shape\":[0],\"data_offsets\":[0,0]}}"))
        });
        text.push('}');
        [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
    };
    for count in [(1 << 18) - 1, 400_000] {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("model.safetensors");
        fs::write(&path, header(count)).unwrap();
        let artifact = Artifact {
            name: "x".into(),
            root: root.path().to_owned(),
            weights: vec![path],
            format: WeightFormat::Safetensors,
        };
        let (result, cost) = cost_of(|| probe(&artifact));
        println!("{count} tensors: {cost:?}");
        assert!(cost.peak < BOMB_BOUND, "{count} tensors took {cost:?}");
        assert_eq!(result.is_ok(), count < 1 << 18, "{result:?}");
    }
}

// One test: what others allocate at the same time would count.
#[test]
fn claims_are_not_allocated() {
    let gguf = |counts: &[u64], rest: &[u8]| {
        let counts: Vec<u8> = counts.iter().flat_map(|count| count.to_le_bytes()).collect();
        [&b"GGUF\x03\0\0\0"[..], &counts, rest].concat()
    };
    let zeros = vec![0; 1 << 16];
    let text = |length: u64| [&length.to_le_bytes()[..], &zeros].concat();
    // A key `k` that is an array of 32-bit numbers, or of texts, with a huge count.
    let array = |kind: u32, count: u64| {
        let head = [&1u64.to_le_bytes()[..], b"k", &9u32.to_le_bytes(), &kind.to_le_bytes(), &count.to_le_bytes()];
        [head.concat(), zeros.clone()].concat()
    };
    let cases = [
        gguf(&[u64::MAX, 0], &zeros),
        gguf(&[1 << 20, 0], &zeros),
        gguf(&[0, u64::MAX], &zeros),
        gguf(&[0, 1 << 16], &zeros),
        gguf(&[0, 1], &text(1 << 16)),
        gguf(&[0, 1], &text(u64::MAX)),
        gguf(&[0, 1], &array(4, 1 << 40)),
        gguf(&[0, 1], &array(8, 1 << 40)),
        gguf(&[0, 1], &array(8, u64::MAX)),
        gguf(&[1, 0], &text(1 << 30)),
    ];
    for (number, case) in cases.iter().enumerate() {
        let peak = peak_of("m.gguf", WeightFormat::Gguf, case);
        assert!(peak < BOUND, "GGUF {number} took {peak} bytes");
    }
    for length in [u64::MAX, 99_999_999, 100_000_001, 1 << 40] {
        let content = [&length.to_le_bytes()[..], b"{}"].concat();
        let peak = peak_of("model.safetensors", WeightFormat::Safetensors, &content);
        assert!(peak < BOUND, "safetensors {length} took {peak} bytes");
    }
    bombs();
    let peak = peak_of_unpacking(200_000);
    assert!(peak < BOUND, "unpacking took {peak} bytes");
}
