use proptest::prelude::*;

use super::*;
use crate::testing::{GgufWriter, K_QUANTS, k_block};

fn tiny() -> Vec<u8> {
    GgufWriter::new("llama")
        .number("llama.block_count", 1)
        .float("llama.rope.freq_base", 10000.0)
        .bool("tokenizer.ggml.add_bos_token", true)
        .texts("tokenizer.ggml.tokens", &["<s>", "a", "ä"])
        .numbers("tokenizer.ggml.token_type", &[3, 1, -1])
        .floats("tokenizer.ggml.scores", &[0.5, -1.0])
        .tensor("token_embd.weight", &[32, 2], 2, (0..36).collect())
        .tensor("output_norm.weight", &[4], 0, vec![7; 16])
        .finish()
}

fn message(bytes: &[u8]) -> String {
    Gguf::parse(bytes).unwrap_err().0
}

/// Reads everything there is to read.
fn walk(bytes: &[u8]) {
    let Ok(gguf) = Gguf::parse(bytes) else { return };
    for tensor in &gguf.tensors {
        assert!(tensor.bytes.is_none() || gguf.tensor_data(tensor).is_some());
    }
    for key in gguf.keys() {
        let _ = (gguf.text(key), gguf.unsigned(key), gguf.float(key), gguf.bool(key));
        if let Some(array) = gguf.array(key) {
            assert!(array.texts().count() <= array.len() && array.unsigned().count() <= array.len());
        }
    }
}

#[test]
fn values_come_back() {
    let bytes = tiny();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.text("general.architecture"), Some("llama"));
    assert_eq!(gguf.unsigned("llama.block_count"), Some(1));
    assert_eq!(gguf.float("llama.rope.freq_base"), Some(10000.0));
    assert_eq!(gguf.bool("tokenizer.ggml.add_bos_token"), Some(true));
    let tokens = gguf.array("tokenizer.ggml.tokens").unwrap();
    assert_eq!(tokens.texts().collect::<Vec<_>>(), [&b"<s>"[..], b"a", "ä".as_bytes()]);
    assert_eq!(tokens.unsigned().count(), 0);
    assert_eq!(gguf.array("tokenizer.ggml.token_type").unwrap().unsigned().collect::<Vec<_>>(), [3, 1]);
    assert_eq!(gguf.array("tokenizer.ggml.scores").unwrap().floats().collect::<Vec<_>>(), [0.5, -1.0]);
    assert_eq!(tokens.floats().count(), 0);
    assert_eq!(gguf.text("llama.block_count"), None);
    let [embedding, norm] = &gguf.tensors[..] else { panic!() };
    assert_eq!((embedding.kind, embedding.elements(), embedding.rows()), (TensorType::Q4_0, 64, 2));
    assert_eq!(gguf.tensor_data(embedding).unwrap(), (0..36).collect::<Vec<u8>>());
    assert_eq!(gguf.tensor_data(norm).unwrap(), [7; 16]);
}

#[test]
fn k_quants_have_the_values_that_others_read() {
    for (name, kind) in K_QUANTS {
        let (stored, expected) = k_block(name);
        assert_eq!(TensorType(kind).to_string(), name);
        let block = Block::of(TensorType(kind)).unwrap();
        assert_eq!(TensorType(kind).block(), Some((block.elements() as u64, block.bytes() as u64)));
        assert_eq!((block.bytes(), block.elements()), (stored.len(), expected.len()));
        let mut distinct = expected.clone();
        distinct.sort_by(f32::total_cmp);
        distinct.dedup();
        assert!(distinct.len() > 20, "the block tells its values apart");
        let mut values = Vec::new();
        Packing::of(TensorType(kind)).unwrap().values(&[&stored[..], &stored].concat(), &mut values);
        assert_eq!(values[..256], expected, "{name}");
        assert_eq!(values[256..], expected, "{name}");
        // Where the values are affine groups, the groups are all there is.
        let mut groups = Vec::new();
        block.groups(&stored, |group| groups.extend(group.values()));
        assert_eq!(groups, if block.affine_bits().is_some() { expected } else { vec![] }, "{name}");
    }
    assert!(Block::NAMES.iter().all(|name| {
        (0..40).any(|kind| Block::of(TensorType(kind)).is_some() && TensorType(kind).to_string() == *name)
    }));
}

#[test]
fn floats_have_their_values() {
    let values = |kind: TensorType, stored: &[u8]| {
        let mut values = Vec::new();
        Packing::of(kind).unwrap().values(stored, &mut values);
        values
    };
    assert_eq!(values(TensorType::F32, &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0]), [1.0, -2.0]);
    assert_eq!(values(TensorType::F16, &[0, 0x3c, 0, 0xc0]), [1.0, -2.0]);
    assert_eq!(values(TensorType::BF16, &[0x80, 0x3f, 0, 0xc0]), [1.0, -2.0]);
    assert_eq!(Packing::of(TensorType::F64), None);
}

#[test]
fn a_cut_at_any_byte_is_an_error() {
    let bytes = tiny();
    for end in 0..bytes.len() {
        assert!(Gguf::parse(&bytes[..end]).is_err(), "cut at {end}");
    }
    assert_eq!(
        message(&bytes[..bytes.len() - 3]),
        format!(
            "tensor `output_norm.weight` ends at byte {}, the file has {}: 3 bytes are missing",
            bytes.len(),
            bytes.len() - 3
        )
    );
}

#[test]
fn claims_are_checked_before_they_are_believed() {
    let bytes = tiny();
    let with = |at: usize, value: u64| {
        let mut bytes = bytes.clone();
        bytes[at..at + 8].copy_from_slice(&value.to_le_bytes());
        message(&bytes)
    };
    assert_eq!(with(8, u64::MAX), "the file claims 18446744073709551615 tensors; at most 65536 are read");
    assert!(with(8, 1 << 15).starts_with("the file claims 32768 tensors; at most"));
    assert!(with(16, 1 << 60).starts_with("the file claims 1152921504606846976 metadata entries; at most"));
    assert!(with(24, u64::MAX).starts_with("the file claims a text of 18446744073709551615 bytes"));
    assert!(with(24, 60_000).starts_with("the file ends too early: 60000 bytes are expected"));
    let array = bytes.windows(21).position(|window| window == b"tokenizer.ggml.tokens").unwrap() + 21 + 8;
    assert!(
        with(array, u64::MAX).contains("`tokenizer.ggml.tokens`: the file claims 18446744073709551615 array elements")
    );

    assert!(message(b"not a GGUF at all, but long enough").starts_with("not a GGUF"));
    let version = |version: [u8; 4]| message(&[&b"GGUF"[..], &version, &[0; 16]].concat());
    assert!(version([1, 0, 0, 0]).contains("version 1"));
    assert!(version([0, 0, 0, 3]).contains("big-endian"));
}

#[test]
fn shapes_have_to_make_sense() {
    let refused =
        |shape: &[u64], kind: u32| message(&GgufWriter::new("x").tensor("t", shape, kind, vec![0; 64]).finish());
    assert!(refused(&[u64::MAX, u64::MAX], 0).contains("cannot have the shape"));
    assert!(refused(&[33], 2).contains("cannot have the shape"), "no multiple of a block");
    assert!(refused(&[0], 0).contains("cannot have the shape"));
    assert!(refused(&[1; 5], 0).contains("5 dimensions"));
    assert!(refused(&[u64::MAX / 4], 0).contains("lies outside any file"));
    assert!(refused(&[1 << 40], 0).contains("bytes are missing"));
    let twice = GgufWriter::new("x").text("general.architecture", "y");
    assert_eq!(message(&twice.finish()), "`general.architecture` is there twice");
}

#[test]
fn types_that_are_not_known_are_carried() {
    let bytes = GgufWriter::new("x").tensor("t", &[7], 250, vec![0; 64]).finish();
    let gguf = Gguf::parse(&bytes).unwrap();
    assert_eq!(gguf.tensors[0].bytes, None);
    assert_eq!(gguf.tensors[0].kind.to_string(), "type 250");
    assert_eq!(gguf.tensor_data(&gguf.tensors[0]), None);
}

proptest! {
    #[test]
    fn damaged_headers_never_panic(damage in proptest::collection::vec((any::<proptest::sample::Index>(), any::<u8>()), 1..6)) {
        let mut bytes = tiny();
        for (at, byte) in damage {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        walk(&bytes);
    }

    #[test]
    fn noise_never_panics(noise in proptest::collection::vec(any::<u8>(), 0..200)) {
        walk(&[&b"GGUF\x03\0\0\0\x01\0\0\0\0\0\0\0\x02\0\0\0\0\0\0\0"[..], &noise].concat());
    }
}
