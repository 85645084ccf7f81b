//! Hostile headers cost no more memory than they have bytes, and unpacking costs the same for every size.

mod common;

use std::fs;

use common::cost_of;
use mesh_core::{ProgressSink, WeightFormat};
use mesh_models::{Artifact, Floats, probe, unpack_gguf};

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
    let peak = peak_of_unpacking(200_000);
    assert!(peak < BOUND, "unpacking took {peak} bytes");
}
