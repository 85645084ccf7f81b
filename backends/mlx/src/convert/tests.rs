use std::{
    fs,
    path::PathBuf,
    sync::{Mutex, PoisonError},
};

use mesh_core::{Fact, Hint, Quantization, Source};
use mesh_graph::{ffi, memory};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use super::*;

/// A tensor's name, shape and values.
type Tensor<'a> = (&'a str, &'a [usize], Vec<f32>);

/// Values that repeat after a prime number.
fn wave(count: usize) -> Vec<f32> {
    (0..count).map(|i| ((i * 7919 % 1009) as f32 - 504.0) / 300.0).collect()
}

struct Model {
    root: tempfile::TempDir,
    profile: ModelProfile,
}

impl Model {
    fn new(shards: &[&[Tensor<'_>]]) -> Self {
        let root = tempfile::tempdir().unwrap();
        let at = |name: &str| root.path().join(name);
        let mut weights = Vec::new();
        for (number, shard) in shards.iter().enumerate() {
            let bytes: Vec<Vec<u8>> = shard
                .iter()
                .map(|(.., values)| values.iter().flat_map(|value| value.to_le_bytes()).collect())
                .collect();
            let views = shard
                .iter()
                .zip(&bytes)
                .map(|((name, shape, _), bytes)| (*name, TensorView::new(Dtype::F32, shape.to_vec(), bytes).unwrap()));
            let path = at(&shard_name(number, shards.len()));
            fs::write(&path, safetensors::serialize(views, None).unwrap()).unwrap();
            weights.push(path);
        }
        for name in ["tokenizer.json", "merges.txt", "LICENSE", "modeling.py", "pytorch_model.bin", INDEX] {
            fs::write(at(name), format!("{name}\n")).unwrap();
        }
        fs::create_dir(at("additional_chat_templates")).unwrap();
        fs::write(at("additional_chat_templates/tools.jinja"), "{{ tools }}").unwrap();
        let format = Fact::new(WeightFormat::Safetensors, Source::file("model.safetensors"));
        let mut profile = ModelProfile::of_files("m".into(), root.path().to_owned(), weights, format, 1);
        profile.config = json!({ "model_type": "llama", "hidden_size": 64 });
        Self { root, profile }
    }

    fn out(&self) -> PathBuf {
        self.root.path().join("made/out")
    }

    fn convert(&self, scheme: Scheme, slab_bytes: usize) -> Result<ConvertReport, ConvertError> {
        // What MLX holds is counted for the whole process.
        static GATE: Mutex<()> = Mutex::new(());
        let _gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
        memory::clear_cache();
        memory::reset_peak();
        ffi::use_device(mesh_core::DeviceKind::Cpu);
        convert_by(&self.profile, &self.out(), scheme, slab_bytes, &ProgressSink::silent())
    }

    fn read(&self, name: &str) -> Vec<u8> {
        fs::read(self.out().join(name)).unwrap()
    }
}

fn affine(bits: u32, group_size: u32) -> Scheme {
    scheme("affine", Some(bits), Some(group_size)).unwrap()
}

#[test]
fn ways_to_quantize_are_those_that_mlx_has() {
    assert_eq!(scheme("affine", None, None).unwrap(), affine(4, 64));
    assert_eq!(scheme("nvfp4", None, None).unwrap(), Scheme { group_size: 16, bits: 4, mode: Mode::Nvfp4 });
    for (mode, bits, group, said) in [
        ("gptq", None, None, "there is no mode `gptq`; there are: affine, mxfp4, mxfp8, nvfp4"),
        ("affine", Some(7), None, "affine has no codes of 7 bits; it has: 2, 3, 4, 5, 6, 8"),
        ("affine", None, Some(16), "affine has no groups of 16; it has: 32, 64, 128"),
        ("mxfp4", Some(8), None, "mxfp4 has no codes of 8 bits; it has: 4"),
        ("mxfp8", None, Some(64), "mxfp8 has no groups of 64; it has: 32"),
    ] {
        assert_eq!(scheme(mode, bits, group).unwrap_err().to_string(), said);
    }
}

#[test]
fn matrices_are_quantized_and_everything_else_goes_along() {
    let model = Model::new(&[
        &[("model.embed_tokens.weight", &[10, 64], wave(640)), ("model.norm.weight", &[64], wave(64))],
        &[
            ("model.layers.0.mlp.gate.weight", &[4, 64], wave(256)),
            ("model.layers.0.mlp.switch_mlp.up_proj.weight", &[2, 3, 64], wave(384)),
            ("model.layers.0.conv.conv.weight", &[64, 1, 64], wave(4096)),
            ("model.layers.0.mlp.odd.weight", &[2, 40], wave(80)),
            ("model.layers.0.self_attn.q_proj.bias", &[64], wave(64)),
        ],
    ]);
    let report = model.convert(affine(4, 32), SLAB_BYTES).unwrap();
    let config: Value = serde_json::from_slice(&model.read(CONFIG)).unwrap();
    let quantization = json!({ "group_size": 32, "bits": 4, "mode": "affine" });
    assert_eq!(
        config,
        json!({
            "model_type": "llama", "hidden_size": 64, "quantization": quantization, "quantization_config": quantization,
        })
    );
    let (first, second) = (shard_name(0, 2), shard_name(1, 2));
    let index: Value = serde_json::from_slice(&model.read(INDEX)).unwrap();
    let mut listed = BTreeMap::new();
    for name in [&first, &second] {
        let bytes = model.read(name);
        let file = SafeTensors::deserialize(&bytes).unwrap();
        for (tensor, view) in file.tensors() {
            assert_eq!(index["weight_map"][&tensor], **name, "{tensor}");
            assert_eq!(view.data().as_ptr() as usize % 4, bytes.as_ptr() as usize % 4, "{tensor} is aligned");
            listed.insert(tensor, (view.dtype(), view.shape().to_vec()));
        }
    }
    assert_eq!(index["weight_map"].as_object().unwrap().len(), listed.len());
    let of = |name: &str| listed[name].clone();
    assert_eq!(of("model.embed_tokens.weight"), (Dtype::U32, vec![10, 8]));
    assert_eq!(of("model.embed_tokens.scales"), (Dtype::F32, vec![10, 2]));
    assert_eq!(of("model.layers.0.mlp.switch_mlp.up_proj.weight"), (Dtype::U32, vec![2, 3, 8]));
    assert_eq!(of("model.layers.0.mlp.switch_mlp.up_proj.biases"), (Dtype::F32, vec![2, 3, 2]));
    assert_eq!(of("model.layers.0.mlp.gate.weight"), (Dtype::F32, vec![4, 64]));
    assert_eq!(of("model.layers.0.conv.conv.weight"), (Dtype::F32, vec![64, 1, 64]));
    assert_eq!(listed.len(), 6 + 2 + 3);

    let mut files: Vec<_> = fs::read_dir(model.out()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    files.sort();
    let expected =
        ["LICENSE", "additional_chat_templates", CONFIG, "merges.txt", &first, &second, INDEX, "tokenizer.json"];
    assert_eq!(files, expected);
    assert_eq!(model.read("additional_chat_templates/tools.jinja"), b"{{ tools }}");
    assert_eq!(fs::read_dir(model.out().parent().unwrap()).unwrap().count(), 1, "nothing else is left");

    let row = |part, form: &str| report.parts.iter().find(|row| row.part == part && row.form == form).unwrap();
    let embedding = row(Part::Embedding, "affine 4-bit group 32");
    assert!(embedding.relative_rms > 0.01 && embedding.relative_rms < 0.15, "{embedding:?}");
    assert_eq!((embedding.bytes_before, embedding.bytes_after), (2560, 320 + 80 + 80));
    assert_eq!(row(Part::Router, "F32").kept, Some("decides which experts are asked"));
    assert_eq!((row(Part::Router, "F32").relative_rms, row(Part::Norm, "F32").tensors), (0.0, 1));
    assert_eq!(report.bytes_before, 4 * (640 + 64 + 256 + 384 + 4096 + 80 + 64));
}

/// Experts by themselves, in whatever files, become mlx-lm's stacks; where one is missing or unlike they stay.
#[test]
fn experts_are_stacked_across_shards() {
    let up = |expert: usize| format!("model.layers.0.mlp.experts.{expert}.up_proj.weight");
    let w2 = |expert: usize| format!("model.layers.1.block_sparse_moe.experts.{expert}.w2.weight");
    let names: Vec<String> =
        (0..3).map(up).chain((0..2).map(w2)).chain([up(7).replace("up_proj", "gate_proj")]).collect();
    let of =
        |index: usize| (names[index].as_str(), &[2usize, 64][..], wave(128).iter().map(|v| v + index as f32).collect());
    let model = Model::new(&[&[of(2), of(3), of(5)], &[of(0), of(4)], &[of(1)]]);
    let report = model.convert(affine(4, 64), SLAB_BYTES).unwrap();
    let index: Value = serde_json::from_slice(&model.read(INDEX)).unwrap();
    let read = |name: &str| {
        let file = model.read(index["weight_map"][name].as_str().unwrap_or_else(|| panic!("{name}")));
        let file = SafeTensors::deserialize(&file).unwrap();
        let view = file.tensor(name).unwrap();
        (view.shape().to_vec(), view.data().to_vec())
    };
    let (shape, biases) = read("model.layers.0.mlp.switch_mlp.up_proj.biases");
    assert_eq!(shape, [3, 2, 1]);
    // The least value of each row, which grows with the expert.
    let biases: Vec<f32> = biases.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
    assert!(biases[2] > biases[0] + 0.9 && biases[4] > biases[2] + 0.9, "{biases:?}");
    assert_eq!(read("model.layers.1.block_sparse_moe.switch_mlp.down_proj.weight").0, [2, 2, 8]);
    assert_eq!(read(&names[5]).0, [2, 8], "the only one that is there is not the first");
    assert_eq!(index["weight_map"].as_object().unwrap().len(), 9);
    let experts: u64 = report.parts.iter().filter(|row| row.part == Part::Experts).map(|row| row.tensors).sum();
    assert_eq!(experts, 6);
}

/// However the rows are cut, the same comes out; and what MLX holds at a time is what a slab takes.
#[test]
fn slabs_bound_memory_and_change_nothing() {
    const ROWS: usize = 16 << 10;
    let name = "lm_head.weight";
    for scheme in [affine(3, 32), scheme("mxfp4", None, None).unwrap()] {
        let model = |_: ()| Model::new(&[&[(name, &[ROWS, 256], wave(ROWS * 256))]]);
        let (whole, slabs) = (model(()), model(()));
        whole.convert(scheme, usize::MAX).unwrap();
        let slab_bytes = 64 << 10;
        slabs.convert(scheme, slab_bytes).unwrap();
        let peak = memory::peak_bytes();
        assert!(peak < 32 * slab_bytes as u64, "{peak} bytes, of a tensor of {}", ROWS * 256 * 4);
        let file = shard_name(0, 1);
        assert!(whole.read(&file) == slabs.read(&file), "{scheme:?}");
    }
}

#[test]
fn what_cannot_be_converted_is_refused_and_nothing_is_left() {
    let refused = |model: &Model, scheme| {
        let error = model.convert(scheme, SLAB_BYTES).unwrap_err();
        assert!(!model.out().exists() && error.hint().is_some(), "{error}");
        let left = model.out().parent().unwrap().read_dir().map_or(0, Iterator::count);
        assert_eq!(left, 0, "{error}");
        error.to_string()
    };
    let plain = || Model::new(&[&[("a.weight", &[2, 64], wave(128))]]);
    let mut quantized = plain();
    let fact = Quantization { mode: "affine".into(), bits: Some(4), group_size: Some(64) };
    quantized.profile.quantization = Some(Fact::new(fact, Source::key(CONFIG, "quantization")));
    assert_eq!(
        refused(&quantized, affine(4, 64)),
        "the weights of m are quantized already: affine 4-bit group 64 (`quantization` in config.json)"
    );
    let scales = Model::new(&[&[("a.weight", &[2, 64], wave(128)), ("a.scales", &[2, 2], wave(4))]]);
    assert!(refused(&scales, affine(4, 64)).contains("tensor `a.scales`"));
    assert!(refused(&plain(), affine(4, 128)).contains("groups of 128"));
    let mut values = wave(128);
    values[77] = f32::NAN;
    let broken = Model::new(&[&[("a.weight", &[2, 64], values)]]);
    assert!(refused(&broken, affine(4, 64)).contains("`a.weight` holds values that are not finite"));
    let mut gguf = plain();
    gguf.profile.format.value = WeightFormat::Gguf;
    assert!(refused(&gguf, affine(4, 64)).contains("are GGUF"));
    let mut bare = plain();
    bare.profile.config = Value::Null;
    assert!(refused(&bare, affine(4, 64)).contains("no config.json"));
    let cut = plain();
    let path = &cut.profile.weights[0];
    let bytes = fs::read(path).unwrap();
    fs::write(path, &bytes[..bytes.len() - 1]).unwrap();
    refused(&cut, affine(4, 64));

    let taken = plain();
    fs::create_dir_all(taken.out()).unwrap();
    let error = taken.convert(affine(4, 64), SLAB_BYTES).unwrap_err();
    assert!(error.to_string().ends_with("exists already"), "{error}");
    assert_eq!(fs::read_dir(taken.out()).unwrap().count(), 0);
}
