use std::{collections::BTreeMap, path::PathBuf, sync::Mutex};

use mesh_core::Part;
use proptest::prelude::*;
use safetensors::{Dtype, SafeTensors};

use super::{repack::*, *};
use crate::{
    gguf::Block,
    testing::{BLOCKS as KINDS, GgufWriter, K_QUANTS, dequantized, golden, k_block, scaled, tiny_llama as tiny},
};

const TEXTS: &[&str] = &[
    "",
    "The capital of France is Paris.",
    "  two  spaces\n\n\tand tabs \r\n",
    "I'll say it's 12345 and 3.14 — 100%!",
    "<|im_start|>user\nhi<|im_end|>\n<think>\n</think><tool_call>{}</tool_call>",
    "Grüße, 你好, привет, नमस्ते, 👩‍👩‍👧 e\u{301}",
    "fn main() { println!(\"{:?}\", x[0]); }",
];

fn import(gguf: &Path) -> (tempfile::TempDir, PathBuf, ImportReport) {
    let root = tempfile::tempdir().unwrap();
    let out = root.path().join("imported");
    let report = import_gguf(gguf, &out, &ProgressSink::silent()).unwrap();
    let left: Vec<_> = fs::read_dir(root.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(left, ["imported"], "temporary directories are cleaned up");
    (root, out, report)
}

type Tensors = BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>;

fn tensors(path: &Path) -> Tensors {
    let bytes = fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let owned = |(name, view): (String, safetensors::tensor::TensorView<'_>)| {
        (name, (view.dtype(), view.shape().to_vec(), view.data().to_vec()))
    };
    file.tensors().into_iter().map(owned).collect()
}

fn json(path: PathBuf) -> Value {
    serde_json::from_slice(&fs::read(path).unwrap()).unwrap()
}

#[test]
fn golden_ggufs_give_back_the_checkpoint() {
    let Some(golden) = golden("golden_ggufs_give_back_the_checkpoint") else { return };
    for name in ["llama", "llama_untied", "qwen2", "qwen3"] {
        let original = golden.join(name);
        let (_root, out, report) = import(&original.join("model.gguf"));
        let (expected, actual) =
            (tensors(&original.join("model.safetensors")), tensors(&out.join("model.safetensors")));
        assert_eq!(expected.keys().collect::<Vec<_>>(), actual.keys().collect::<Vec<_>>(), "{name}");
        for (tensor, content) in &expected {
            assert!(content == &actual[tensor], "{name}: {tensor} differs");
        }
        assert_eq!(report.tensors_written, expected.len());
        assert_eq!(report.architecture, name.split('_').next().unwrap());

        let (expected, actual) = (json(original.join("config.json")), json(out.join("config.json")));
        for (key, value) in actual.as_object().unwrap() {
            if let Some(expected) = expected.get(key) {
                assert_eq!(value, expected, "{name}: {key}");
            } else {
                assert!(["head_dim", "rope_scaling", "pad_token_id"].contains(&key.as_str()), "{name}: {key}");
            }
        }
        for key in ["rope_theta", "rms_norm_eps", "tie_word_embeddings", "vocab_size", "eos_token_id"] {
            assert_eq!(actual[key], expected[key], "{name}: {key}");
        }
        assert_eq!(json(out.join("generation_config.json")), json(original.join("generation_config.json")), "{name}");
        let (expected, actual) =
            (json(original.join("tokenizer_config.json")), json(out.join("tokenizer_config.json")));
        for key in ["eos_token", "chat_template", "add_bos_token"] {
            assert_eq!(actual[key], expected[key], "{name}: {key}");
        }
    }
}

#[test]
fn imported_tokenizers_encode_alike() {
    let Some(golden) = golden("imported_tokenizers_encode_alike") else { return };
    for name in ["llama", "qwen3"] {
        let original = golden.join(name);
        let (_root, out, _) = import(&original.join("model.gguf"));
        let load = |directory: &Path| tokenizers::Tokenizer::from_file(directory.join("tokenizer.json")).unwrap();
        let (expected, actual) = (load(&original), load(&out));
        for text in TEXTS {
            let ids = |tokenizer: &tokenizers::Tokenizer| tokenizer.encode(*text, true).unwrap().get_ids().to_vec();
            assert_eq!(ids(&actual), ids(&expected), "{text:?}");
            let back = actual.decode(&ids(&actual), false).unwrap();
            assert_eq!(back, *text);
        }
    }
}

fn written(writer: &GgufWriter) -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), writer.finish()).unwrap();
    file
}

fn refusal(writer: &GgufWriter) -> ImportError {
    let (file, root) = (written(writer), tempfile::tempdir().unwrap());
    let error = import_gguf(file.path(), &root.path().join("out"), &ProgressSink::silent()).unwrap_err();
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0, "nothing is left behind");
    error
}

fn encode(pre: &str, text: &str) -> Vec<u32> {
    let (_root, out, _) = import(written(&tiny(pre)).path());
    let tokenizer = tokenizers::Tokenizer::from_file(out.join("tokenizer.json")).unwrap();
    tokenizer.encode(text, true).unwrap().get_ids().to_vec()
}

#[test]
fn pre_tokenizers_cut_as_named() {
    assert_eq!(encode("gpt-2", "ab12 a"), [5, 6, 8]);
    assert_eq!(encode("smollm", "ab12 a"), [5, 3, 4, 8], "digits stand alone");
    assert_eq!(encode("qwen2", "ab12 a"), [5, 3, 4, 8], "digits stand alone");
    assert_eq!(encode("llama-bpe", "ab12 a"), [0, 5, 6, 8], "up to three digits; begins with <s>");
    assert_eq!(encode("gpt-2", "a<s>b"), [1, 0, 2]);
}

/// What MLX's affine groups mean: code `i` is at bits `bits * i` of the row's little-endian bit string.
fn affine(codes: &[u8], bits: usize, scales: &[u8], biases: &[u8]) -> Vec<f32> {
    let float = |bytes: &[u8], at: usize| f32::from_le_bytes(bytes[4 * at..4 * at + 4].try_into().unwrap());
    let bit = |at: usize| u32::from(codes[at / 8] >> (at % 8) & 1);
    let code = |i: usize| (0..bits).map(|b| bit(i * bits + b) << b).sum::<u32>();
    let count = codes.len() * 8 / bits;
    (0..count).map(|i| code(i) as f32 * float(scales, i / 32) + float(biases, i / 32)).collect()
}

proptest! {
    #[test]
    fn blocks_keep_every_value(mut bytes in proptest::collection::vec(any::<u8>(), 34), which in 0..5usize) {
        let (kind, size, bits) = KINDS[which];
        bytes.truncate(size);
        scaled(&mut bytes, kind);
        let block = Block::of(crate::gguf::TensorType(kind)).unwrap();
        prop_assert_eq!((block.bytes(), block.affine_bits()), (size, Some(bits)));
        let mut groups = Vec::new();
        block.groups(&bytes, |group| groups.push(group.clone()));
        prop_assert_eq!(groups.len(), 1);
        let group = &groups[0];
        let mut packed = Vec::new();
        pack(&group.codes, bits, &mut packed);
        prop_assert_eq!(packed.len(), 4 * bits);
        let values = affine(&packed, bits, &group.scale.to_le_bytes(), &group.bias.to_le_bytes());
        prop_assert_eq!(values, dequantized(kind, &bytes));
    }
}

#[test]
fn quantized_files_keep_every_value_and_their_rows() {
    for (kind, size, bits) in KINDS {
        // Two groups a row; q is permuted, down is not.
        let content = |rows: usize, seed: usize| {
            let mut bytes: Vec<u8> = (0..rows * 2 * size).map(|i| (i * 31 + seed * 17 + i / 7) as u8).collect();
            bytes.chunks_exact_mut(size).for_each(|block| scaled(block, kind));
            bytes
        };
        let (q, down) = (content(32, 1), content(5, 2));
        let mut writer = tiny("gpt-2").tensor("blk.0.attn_q.weight", &[64, 32], kind, q.clone()).tensor(
            "blk.0.ffn_down.weight",
            &[64, 5],
            kind,
            down.clone(),
        );
        // An embedding with other bits than the rest.
        writer.tensors[0] = ("token_embd.weight".into(), vec![32, 10], 8, vec![1; 340]);
        let (_root, out, _) = import(written(&writer).path());
        let tensors = tensors(&out.join("model.safetensors"));
        let values = |module: &str| {
            let of = |leaf: &str| &tensors[&format!("{module}.{leaf}")];
            assert_eq!(of("weight").0, Dtype::U32);
            assert_eq!(of("weight").1[1], 2 * bits);
            assert_eq!(of("scales").1, [of("weight").1[0], 2]);
            affine(&of("weight").2, bits, &of("scales").2, &of("biases").2)
        };
        let reference = |bytes: &[u8]| bytes.chunks_exact(size).flat_map(|b| dequantized(kind, b)).collect::<Vec<_>>();
        assert_eq!(values("model.layers.0.mlp.down_proj"), reference(&down));
        // llama.cpp: (heads, 2, head_dim / 2) of the checkpoint stored as (heads, head_dim / 2, 2); heads of 8 here.
        let rows: Vec<Vec<f32>> = reference(&q).chunks(64).map(<[f32]>::to_vec).collect();
        let order = |row: usize| (row / 8) * 8 + (row % 4) * 2 + (row % 8) / 4;
        let expected: Vec<f32> = (0..32).flat_map(|row| rows[order(row)].clone()).collect();
        assert_eq!(values("model.layers.0.self_attn.q_proj"), expected);

        let config = json(out.join("config.json"));
        if bits == 8 {
            assert_eq!(config["quantization"], serde_json::json!({ "group_size": 32, "bits": 8, "mode": "affine" }));
        } else {
            assert_eq!(config["quantization"]["bits"], bits);
            assert_eq!(
                config["quantization"]["model.embed_tokens"],
                serde_json::json!({ "group_size": 32, "bits": 8 })
            );
        }
    }
}

#[test]
fn k_quants_are_repacked_where_mlx_has_their_groups_and_floats_elsewhere() {
    for (name, kind) in K_QUANTS {
        let (block, values) = k_block(name);
        let bits = match name {
            "Q4_K" => Some(4),
            "Q5_K" => Some(5),
            _ => None,
        };
        // Q is permuted: heads of 8 rows, each a block, told apart by the first byte of codes.
        let content = |rows: usize| {
            let blocks = (0..rows).map(|row| {
                let mut block = block.clone();
                block[60] = row as u8;
                block
            });
            blocks.collect::<Vec<_>>()
        };
        let mut writer = tiny("gpt-2").tensor("blk.0.attn_q.weight", &[256, 32], kind, content(32).concat()).tensor(
            "blk.0.ffn_down.weight",
            &[512, 3],
            kind,
            block.repeat(6),
        );
        writer.tensors[0] = ("token_embd.weight".into(), vec![32, 10], 8, vec![1; 340]);
        let (_root, out, _) = import(written(&writer).path());
        let tensors = tensors(&out.join("model.safetensors"));
        let of = |module: &str| -> Vec<f32> {
            let of = |leaf: &str| &tensors[&format!("{module}.{leaf}")];
            match bits {
                Some(bits) => affine(&of("weight").2, bits, &of("scales").2, &of("biases").2),
                None => of("weight").2.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect(),
            }
        };
        assert!(of("model.layers.0.mlp.down_proj") == values.repeat(6), "{name}");
        let kept = crate::gguf::Packing::of(crate::gguf::TensorType(kind)).unwrap();
        let order = |row: usize| (row / 8) * 8 + (row % 4) * 2 + (row % 8) / 4;
        let mut expected = Vec::new();
        (0..32).for_each(|row| kept.values(&content(32)[order(row)], &mut expected));
        assert!(of("model.layers.0.self_attn.q_proj") == expected, "{name}");
        let weight = &tensors["model.layers.0.mlp.down_proj.weight"];
        let config = json(out.join("config.json"));
        match bits {
            Some(bits) => {
                assert_eq!((weight.0, &weight.1[..]), (Dtype::U32, &[3, 16 * bits][..]));
                assert_eq!(config["quantization"]["bits"], bits);
            }
            None => {
                assert_eq!((weight.0, &weight.1[..]), (Dtype::F32, &[3, 512][..]));
                assert!(!tensors.contains_key("model.layers.0.mlp.down_proj.scales"));
                assert_eq!(config["quantization"]["bits"], 8, "what is quantized is the embedding");
            }
        }
    }
}

/// What a compact import says of each K-quant: repacked ones are the same bits, the others nearly the same values.
#[test]
fn a_compact_import_says_what_it_lost() {
    for (name, kind) in K_QUANTS {
        let (block, values) = k_block(name);
        let mut writer = tiny("gpt-2").tensor("blk.0.attn_q.weight", &[256, 32], kind, block.repeat(32)).tensor(
            "blk.0.ffn_down.weight",
            &[512, 3],
            kind,
            block.repeat(6),
        );
        writer.tensors[0] = ("token_embd.weight".into(), vec![32, 10], 8, vec![1; 340]);
        let (file, root) = (written(&writer), tempfile::tempdir().unwrap());
        let out = root.path().join("out");
        let files = [file.path().to_owned()];
        let report = import_measured(&files, &out, Manner::Compact, &ProgressSink::silent()).unwrap();
        let (bits, most) = match name {
            "Q2_K" => (5, 0.04),
            "Q3_K" => (6, 0.02),
            "Q4_K" => (4, 0.0),
            "Q5_K" => (5, 0.0),
            _ => (8, 0.01),
        };
        for part in report.parts.iter().filter(|part| part.from == name) {
            assert_eq!(part.to, format!("affine {bits}-bit group 32"), "{name}");
            assert!(part.relative_rms <= most, "{name}: {}", part.relative_rms);
            assert_eq!(part.changed == 0, most == 0.0, "{name}: {}", part.changed);
        }
        assert_eq!(report.parts.iter().filter(|part| part.from == name).map(|part| part.tensors).sum::<u64>(), 2);
        let others = report.parts.iter().filter(|part| part.from != name);
        others.for_each(|part| assert_eq!((part.changed, part.relative_rms), (0, 0.0), "{part:?}"));
        // The error is what an independent reading of the codes finds.
        let tensors = tensors(&out.join("model.safetensors"));
        let of = |leaf: &str| &tensors[&format!("model.layers.0.mlp.down_proj.{leaf}")].2;
        let kept = affine(of("weight"), bits, of("scales"), of("biases"));
        let pairs = || kept.iter().zip(values.repeat(6)).map(|(kept, value)| (f64::from(*kept), f64::from(value)));
        let (lost, all) =
            (pairs().map(|(a, b)| (a - b).powi(2)).sum::<f64>(), pairs().map(|(_, b)| b * b).sum::<f64>());
        let down = report.parts.iter().find(|part| part.part == Part::Mlp).unwrap();
        assert!(((lost / all).sqrt() - down.relative_rms).abs() < 1e-9, "{name}");
        assert_eq!(json(out.join("config.json"))["quantization"]["mode"], "affine");
        let exact =
            import_measured(&files, &root.path().join("exact"), Manner::Exact, &ProgressSink::silent()).unwrap();
        assert!(exact.parts.iter().all(|part| part.changed == 0 && part.relative_rms == 0.0), "{:?}", exact.parts);
    }
}

#[test]
fn parts_of_a_gguf_are_imported_together() {
    let mut whole = tiny("gpt-2").tensor("blk.0.ffn_down.weight", &[32, 3], 0, 1f32.to_le_bytes().repeat(96));
    let mut second = GgufWriter::new("llama");
    second.entries.clear();
    second.tensors.push(whole.tensors.pop().unwrap());
    let (first, second) = (written(&whole), written(&second));
    let root = tempfile::tempdir().unwrap();
    let files = [first.path().to_owned(), second.path().to_owned()];
    let out = root.path().join("out");
    let report = import_measured(&files, &out, Manner::Exact, &ProgressSink::silent()).unwrap();
    assert_eq!((report.tensors_read, report.tensors_written), (3, 3));
    assert!(tensors(&out.join("model.safetensors")).contains_key("model.layers.0.mlp.down_proj.weight"));
    let twice = [first.path().to_owned(), first.path().to_owned()];
    let error =
        import_measured(&twice, &root.path().join("other"), Manner::Exact, &ProgressSink::silent()).unwrap_err();
    assert!(error.to_string().contains("it is there twice"), "{error}");
}

proptest! {
    #[test]
    fn groups_quantized_anew_are_within_half_a_step(values in proptest::array::uniform32(-10f32..10.0), bits in 2usize..=8) {
        let group = quantized(&values, bits);
        let range = values.iter().copied().fold(f32::MIN, f32::max) - values.iter().copied().fold(f32::MAX, f32::min);
        let half = range / ((1 << bits) - 1) as f32 / 2.0;
        for (value, code) in values.iter().zip(group.codes) {
            prop_assert!((f32::from(code) * group.scale + group.bias - value).abs() <= half * 1.001 + 1e-6);
        }
        let flat = quantized(&[values[0]; 32], bits);
        prop_assert!(flat.codes == [0; 32] && flat.scale == 0.0 && flat.bias == values[0]);
    }
}

#[test]
fn what_cannot_be_imported_is_refused_by_name() {
    let mut other = tiny("gpt-2");
    other.entries[0] = GgufWriter::new("falcon").entries[0].clone();
    assert!(matches!(refusal(&other), ImportError::Architecture { architecture, .. } if architecture == "falcon"));

    let iq4 = tiny("gpt-2").tensor("blk.0.ffn_up.weight", &[32, 1], 20, vec![0; 18]);
    let error = refusal(&iq4);
    assert_eq!(
        error.to_string(),
        "tensor `blk.0.ffn_up.weight` is IQ4_NL, which cannot be imported; these types can: F32, F16, BF16, Q4_0, \
         Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"
    );
    let strange = tiny("gpt-2").tensor("blk.0.ffn_gate_exps.weight", &[32], 0, vec![0; 128]);
    assert!(matches!(refusal(&strange), ImportError::UnknownTensor { .. }));
    let beyond = tiny("gpt-2").tensor("blk.1.ffn_up.weight", &[32], 0, vec![0; 128]);
    assert!(matches!(refusal(&beyond), ImportError::UnknownTensor { .. }));
    let rows = tiny("gpt-2").tensor("blk.0.attn_k.weight", &[32, 12], 0, vec![0; 1536]);
    assert!(matches!(refusal(&rows), ImportError::Setting { .. }));
    assert!(matches!(
        refusal(&tiny("gpt-2").float("llama.rope.scaling.factor", 2.0).text("llama.rope.scaling.type", "yarn")),
        ImportError::Setting { .. }
    ));
    assert!(matches!(refusal(&tiny("gpt-2").number("llama.attention.sliding_window", 8)), ImportError::Setting { .. }));
    assert!(matches!(refusal(&tiny("tekken")), ImportError::Tokenizer { .. }));
    let twice = tiny("gpt-2").tensor("output_norm.weight", &[32], 0, vec![0; 128]);
    assert!(matches!(refusal(&twice), ImportError::Setting { .. }));
    let factors =
        tiny("gpt-2").tensor("rope_freqs.weight", &[4], 0, [1f32, 5.0, 2.0, 9.0].map(f32::to_le_bytes).concat());
    assert!(matches!(refusal(&factors), ImportError::Setting { .. }));
}

#[test]
fn an_existing_directory_is_left_alone() {
    let (file, root) = (written(&tiny("gpt-2")), tempfile::tempdir().unwrap());
    let error = import_gguf(file.path(), root.path(), &ProgressSink::silent()).unwrap_err();
    assert!(matches!(error, ImportError::Exists { .. }));
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 0);
}

#[test]
fn progress_counts_up_to_the_total() {
    let (file, root) = (written(&tiny("gpt-2")), tempfile::tempdir().unwrap());
    let reports = std::sync::Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    let sink = ProgressSink::new(move |progress| seen.lock().unwrap().push((progress.done, progress.total)));
    import_gguf(file.path(), &root.path().join("out"), &sink).unwrap();
    assert_eq!(*reports.lock().unwrap(), [(0, Some(2)), (1, Some(2)), (2, Some(2))]);
}
