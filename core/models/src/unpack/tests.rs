use std::{
    path::PathBuf,
    sync::{Arc, Mutex},
};

use mesh_core::{Hint, WeightFormat};

use super::*;
use crate::{
    probe,
    store::Artifact,
    testing::{BLOCKS, GgufWriter, K_QUANTS, dequantized, k_block, scaled, tiny_llama as tiny},
};

/// Enough rows that a tensor is more than is unpacked at a time.
const MANY: u64 = 700;

/// `count` blocks of a kind, no two alike, and their values as 16-bit floats.
fn blocks(kind: u32, size: usize, count: usize) -> (Vec<u8>, Vec<f16>) {
    let mut bytes: Vec<u8> = (0..count * size).map(|i| (i * 31 + i / 7 + i / 251) as u8).collect();
    bytes.chunks_exact_mut(size).for_each(|block| scaled(block, kind));
    let values = bytes.chunks_exact(size).flat_map(|block| dequantized(kind, block)).map(f16::from_f32).collect();
    (bytes, values)
}

/// A source on disk and a place for what is made of it.
struct House {
    root: tempfile::TempDir,
    source: PathBuf,
    out: PathBuf,
}

impl House {
    fn new(content: &[u8]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let (source, out) = (root.path().join("tiny.gguf"), root.path().join("out.gguf"));
        fs::write(&source, content).unwrap();
        Self { root, source, out }
    }

    fn unpack(&self) -> Result<UnpackReport, ImportError> {
        self.unpack_into(Floats::F16)
    }

    fn unpack_into(&self, floats: Floats) -> Result<UnpackReport, ImportError> {
        unpack_gguf(&self.source, &self.out, floats, &ProgressSink::silent())
    }

    fn files(&self) -> Vec<String> {
        crate::local::files_below(self.root.path())
    }

    fn refusal(&self) -> ImportError {
        let error = self.unpack().unwrap_err();
        assert_eq!(self.files(), ["tiny.gguf"], "nothing is left behind");
        error
    }
}

fn halves(bytes: &[u8]) -> Vec<f16> {
    bytes.as_chunks::<2>().0.iter().map(|bytes| f16::from_le_bytes(*bytes)).collect()
}

/// What the file should be but for the weights' content, which is taken from `unpacked`; padded as files are.
fn expected(mut source: GgufWriter, unpacked: &Gguf<Mmap>, alignment: usize) -> Vec<u8> {
    for (written, read) in source.tensors.iter_mut().zip(&unpacked.tensors) {
        if BLOCKS.iter().any(|(kind, ..)| *kind == written.2) && written.1.len() > 1 {
            (written.2, written.3) = (1, unpacked.tensor_data(read).unwrap().to_vec());
        }
    }
    let file_type = ("general.file_type".to_owned(), [4u32, 1].map(u32::to_le_bytes).concat());
    match source.entries.iter_mut().find(|(key, _)| *key == file_type.0) {
        Some(entry) => *entry = file_type,
        None => source.entries.push(file_type),
    }
    let mut bytes = source.finish();
    bytes.resize(bytes.len().next_multiple_of(alignment), 0);
    bytes
}

#[test]
fn matrices_of_every_block_type_get_their_values_and_nothing_else_changes() {
    for (kind, size, _) in BLOCKS {
        for alignment in [32, 64, 8] {
            // `general.file_type` is another number, is not there, or is of another type.
            let mut writer = match alignment {
                32 => tiny("gpt-2").number("general.file_type", 3),
                64 => tiny("gpt-2").aligned(alignment),
                _ => tiny("gpt-2").aligned(alignment).float("general.file_type", 3.0),
            };
            let (matrix, values) = blocks(kind, size, 3 * MANY as usize);
            let (cube, cube_values) = blocks(kind, size, 12);
            let (row, _) = blocks(kind, size, 2);
            writer = writer
                .numbers("after.it", &[1, -2, 3])
                .tensor("matrix", &[96, MANY], kind, matrix)
                .tensor("odd.bytes", &[3], 24, vec![1, 2, 3])
                .tensor("cube", &[64, 3, 2], kind, cube)
                .tensor("row", &[64], kind, row.clone())
                .tensor("bfloats", &[3, 3], 30, (0..18).collect());
            let house = House::new(&writer.finish());
            let report = house.unpack().unwrap();
            assert_eq!((report.tensors, report.tensors_unpacked), (7, 2));
            assert_eq!(report.bytes, fs::metadata(&house.out).unwrap().len());
            assert_eq!(house.files(), ["out.gguf", "tiny.gguf"], "temporary files are cleaned up");

            let unpacked = Gguf::open(&house.out).unwrap();
            let tensor = |name: &str| unpacked.tensors.iter().find(|tensor| tensor.name == name).unwrap();
            let content = |name: &str| unpacked.tensor_data(tensor(name)).unwrap();
            assert_eq!((tensor("matrix").kind, tensor("cube").kind), (TensorType::F16, TensorType::F16));
            assert!(halves(content("matrix")) == values, "type {kind}");
            assert!(halves(content("cube")) == cube_values, "type {kind}");
            assert_eq!(content("row"), row);
            assert!(fs::read(&house.out).unwrap() == expected(writer, &unpacked, alignment as usize));
        }
    }
}

#[test]
fn every_type_becomes_32_bit_floats_without_rounding() {
    let half = |value: f32| f16::from_f32(value).to_le_bytes();
    let mut writer = tiny("gpt-2")
        .number("general.file_type", 15)
        .tensor("halves", &[2, 2], 1, [half(1.5), half(-0.25), half(3.0), half(0.0)].concat())
        .tensor("bfloats", &[2], 30, vec![0x80, 0x3f, 0, 0xc0])
        .tensor("whole.numbers", &[2], 26, vec![7; 8]);
    let mut expected: Vec<(String, Vec<f32>)> =
        vec![("halves".into(), vec![1.5, -0.25, 3.0, 0.0]), ("bfloats".into(), vec![1.0, -2.0])];
    for (kind, size, _) in BLOCKS {
        let (content, _) = blocks(kind, size, 6);
        let values = content.chunks_exact(size).flat_map(|block| dequantized(kind, block)).collect();
        expected.push((format!("legacy.{kind}"), values));
        writer = writer.tensor(&format!("legacy.{kind}"), &[96, 2], kind, content);
    }
    for (name, kind) in K_QUANTS {
        let (block, values) = k_block(name);
        // More than is unpacked at a time.
        expected.push((name.into(), values.repeat(600)));
        writer = writer.tensor(name, &[512, 300], kind, block.repeat(600));
    }
    let house = House::new(&writer.finish());
    let report = house.unpack_into(Floats::F32).unwrap();
    assert_eq!((report.tensors, report.tensors_unpacked), (15, 12));
    let unpacked = Gguf::open(&house.out).unwrap();
    assert_eq!(unpacked.unsigned("general.file_type"), Some(0));
    let tensor = |name: &str| unpacked.tensors.iter().find(|tensor| tensor.name == name).unwrap();
    for (name, values) in expected {
        let (kind, content) = (tensor(&name).kind, unpacked.tensor_data(tensor(&name)).unwrap());
        let floats: Vec<f32> = content.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        assert!((kind, floats) == (TensorType::F32, values), "{name}");
    }
    assert_eq!(unpacked.tensor_data(tensor("whole.numbers")).unwrap(), [7; 8]);

    let block = [&f16::INFINITY.to_le_bytes()[..], &[2; 32]].concat();
    let house = House::new(&tiny("gpt-2").tensor("x", &[32, 1], 8, block).finish());
    assert!(matches!(house.unpack_into(Floats::F32), Err(ImportError::Range { .. })));
}

#[test]
fn k_quants_become_16_bit_floats_too() {
    let (block, values) = k_block("Q6_K");
    let house = House::new(&tiny("gpt-2").tensor("matrix", &[256, 2], 14, block.repeat(2)).finish());
    house.unpack().unwrap();
    let unpacked = Gguf::open(&house.out).unwrap();
    let expected: Vec<f16> = values.repeat(2).into_iter().map(f16::from_f32).collect();
    assert!(halves(unpacked.tensor_data(&unpacked.tensors[2]).unwrap()) == expected);
}

#[test]
fn what_is_known_about_a_model_stays_but_for_its_storage() {
    let (embedding, _) = blocks(3, 20, 10);
    let mut writer = tiny("gpt-2").number("general.file_type", 3).text("tokenizer.chat_template", "{{ messages }}");
    writer.tensors[0] = ("token_embd.weight".into(), vec![32, 10], 3, embedding);
    let house = House::new(&writer.finish());
    house.unpack().unwrap();
    let profile = |path: &Path| {
        let (name, root) = ("tiny".to_owned(), house.root.path().to_owned());
        let artifact = Artifact { name, root, weights: vec![path.to_owned()], format: WeightFormat::Gguf };
        probe(&artifact).unwrap()
    };
    let (before, after) = (profile(&house.source), profile(&house.out));
    assert_eq!(before.quantization.as_ref().unwrap().value.mode, "Q4_1");
    assert_eq!(after.quantization, None);
    let facts = |profile: &mesh_core::ModelProfile| {
        let rows = profile.facts().into_iter().map(|(name, value, _)| (name, value));
        rows.filter(|(name, _)| !["quantization", "weight_bytes"].contains(name)).collect::<Vec<_>>()
    };
    assert_eq!(facts(&after), facts(&before));
    assert!(facts(&after).len() > 8, "{:?}", facts(&after));
    assert_eq!(after.chat_template.unwrap().value, before.chat_template.unwrap().value);
}

#[test]
fn a_file_that_is_cut_off_is_an_error() {
    let (matrix, _) = blocks(8, 34, 8);
    let content = tiny("gpt-2").tensor("matrix", &[64, 4], 8, matrix).finish();
    for end in (0..content.len()).step_by(7).chain([content.len() - 1]) {
        let error = House::new(&content[..end]).refusal();
        assert!(matches!(error, ImportError::Probe(ProbeError::Malformed { .. })), "cut at {end}: {error}");
    }
    let absent = House::new(&content);
    fs::remove_file(&absent.source).unwrap();
    assert!(matches!(absent.unpack(), Err(ImportError::Probe(ProbeError::Missing { .. }))));
}

#[test]
fn what_cannot_be_unpacked_is_refused_by_name() {
    let with = |shape: &[u64], kind: u32, content: Vec<u8>| {
        House::new(&tiny("gpt-2").tensor("blk.0.ffn_up.weight", shape, kind, content).finish()).refusal()
    };
    let error = with(&[32, 1], 20, vec![0; 18]);
    assert_eq!(
        error.to_string(),
        "tensor `blk.0.ffn_up.weight` is IQ4_NL, which cannot be unpacked; these types can: Q4_0, Q4_1, Q5_0, Q5_1, \
         Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K"
    );
    assert!(error.hint().is_some());
    for (kind, bytes) in [(9, 36), (39, 17), (250, 64)] {
        assert!(matches!(with(&[32, 1], kind, vec![0; bytes]), ImportError::Packed { .. }), "type {kind}");
    }
    // The largest scale there is times 2, and a scale that is no number.
    for scale in [f16::MAX, f16::NAN] {
        let block = [&scale.to_le_bytes()[..], &[2; 32]].concat();
        let error = with(&[32, 1], 8, block);
        assert_eq!(error.to_string(), "tensor `blk.0.ffn_up.weight` holds values that are not finite in F16");
    }
}

#[test]
fn tensors_that_share_bytes_are_refused() {
    let mut content = GgufWriter::new("x");
    for name in ["first", "other"] {
        content = content.tensor(name, &[64, 2], 8, vec![1; 136]);
    }
    let mut bytes = content.finish();
    let offset = bytes.windows(5).position(|window| window == b"other").unwrap() + 5 + 4 + 16 + 4;
    assert_eq!(bytes[offset..offset + 8], 160u64.to_le_bytes());
    bytes[offset..offset + 8].fill(0);
    bytes.truncate(bytes.len() - 160);
    let error = House::new(&bytes).refusal();
    assert!(error.to_string().ends_with("its tensors overlap"), "{error}");
}

#[test]
fn an_existing_file_is_left_alone() {
    let house = House::new(&tiny("gpt-2").finish());
    fs::write(&house.out, "mine").unwrap();
    assert!(matches!(house.unpack(), Err(ImportError::Exists { .. })));
    assert_eq!(fs::read(&house.out).unwrap(), b"mine");
}

#[test]
fn several_at_once_make_one_file() {
    let (matrix, values) = blocks(3, 20, 3 * MANY as usize);
    let house = House::new(&tiny("gpt-2").tensor("matrix", &[96, MANY], 3, matrix).finish());
    std::thread::scope(|scope| {
        for _ in 0..4 {
            scope.spawn(|| assert!(matches!(house.unpack(), Ok(_) | Err(ImportError::Exists { .. }))));
        }
    });
    assert_eq!(house.files(), ["out.gguf", "tiny.gguf"]);
    let unpacked = Gguf::open(&house.out).unwrap();
    assert!(halves(unpacked.tensor_data(&unpacked.tensors[2]).unwrap()) == values);
}

#[test]
fn progress_counts_up_to_the_total() {
    let house = House::new(&tiny("gpt-2").finish());
    let reports = Arc::new(Mutex::new(Vec::new()));
    let seen = reports.clone();
    let sink = ProgressSink::new(move |progress| seen.lock().unwrap().push((progress.done, progress.total)));
    unpack_gguf(&house.source, &house.out, Floats::F16, &sink).unwrap();
    assert_eq!(*reports.lock().unwrap(), [(0, Some(2)), (1, Some(2)), (2, Some(2))]);
}
