use std::fs;

use mesh_core::ProgressSink;
use proptest::prelude::*;

use super::*;
use crate::{
    Store, StoreOptions, Want,
    testing::{GgufWriter, golden},
};

/// A safetensors file with these names, each one 32-bit float.
fn weights(names: &[&str]) -> Vec<u8> {
    let zero = [0; 4];
    let view = || ::safetensors::tensor::TensorView::new(::safetensors::Dtype::F32, vec![1], &zero).unwrap();
    ::safetensors::serialize(names.iter().map(|name| (*name, view())), None).unwrap()
}

struct Model(tempfile::TempDir);

impl Model {
    fn new(files: &[(&str, &str)]) -> Self {
        let model = Self(tempfile::tempdir().unwrap());
        fs::write(model.0.path().join("model.safetensors"), weights(&["a.weight", "b.weight"])).unwrap();
        files.iter().for_each(|(name, text)| fs::write(model.0.path().join(name), text).unwrap());
        model
    }

    fn probe(&self) -> Result<ModelProfile, ProbeError> {
        probe(&crate::local::locate(self.0.path(), "x", Want::Any).unwrap())
    }
}

#[tokio::test]
async fn every_golden_probes() {
    let Some(golden) = golden("every_golden_probes") else { return };
    let cache = tempfile::tempdir().unwrap();
    let store =
        Store::new(StoreOptions { cache: Some(cache.path().to_owned()), offline: true, ..Default::default() }).unwrap();
    let mut count = 0;
    for entry in fs::read_dir(golden).unwrap().flatten().filter(|entry| entry.path().join("config.json").is_file()) {
        let root = entry.path();
        let reference = root.to_str().unwrap();
        let name = entry.file_name().into_string().unwrap();
        let artifact = store.locate(reference, Want::Safetensors, &ProgressSink::silent()).await.unwrap();
        assert_eq!(artifact.name, name);
        let profile = probe(&artifact).unwrap();
        assert!(profile.model_type.is_some(), "{name}");
        assert_eq!(profile.context_tokens_max.unwrap().value.max(4096) % 4096, 0, "{name}");
        assert!(profile.layers.unwrap().value >= 2, "{name}");
        assert_eq!(profile.vocab_size.unwrap().value, 512, "{name}");
        assert_eq!(profile.eos_token_ids.iter().map(|fact| fact.value).collect::<Vec<_>>(), [2], "{name}");
        assert_eq!(profile.eos_token.unwrap().value, "<|im_end|>", "{name}");
        assert!(profile.chat_template.unwrap().value.default.contains("<|im_start|>"), "{name}");
        assert!(profile.tokenizer.is_some() && profile.tensor_names.is_none(), "{name}");
        let quantized =
            name.contains("-q") || name.contains("mxfp4") || ["gpt_oss", "gpt_oss_truncate"].contains(&&*name);
        assert_eq!(profile.quantization.is_some(), quantized, "{name}");
        // note.json counts what the plain checkpoint holds.
        let note: Value = serde_json::from_slice(&fs::read(root.join("note.json")).unwrap()).unwrap();
        if let Some(parameters) = note["parameters"].as_u64().filter(|_| !quantized) {
            assert_eq!(profile.parameters.unwrap().value, parameters, "{name}");
        }
        let gguf = root.join("model.gguf");
        if gguf.is_file() {
            let both = store.locate(reference, Want::Any, &ProgressSink::silent()).await.unwrap_err();
            assert!(matches!(both, crate::FetchError::Probe(ProbeError::Ambiguous { .. })), "{both}");
            let artifact = store.locate(reference, Want::Gguf, &ProgressSink::silent()).await.unwrap();
            let profile = probe(&artifact).unwrap();
            assert_eq!(profile.gguf_architecture.unwrap().value, name.split('_').next().unwrap());
            assert_eq!(profile.parameters.unwrap().value, note["parameters"].as_u64().unwrap());
            assert_eq!((profile.layers.unwrap().value, profile.vocab_size.unwrap().value), (3, 512));
            assert_eq!(profile.quantization, None);
            assert_eq!(profile.eos_token.unwrap().value, "<|im_end|>");
        }
        count += 1;
    }
    assert!(count > 50, "{count} golden directories");
}

#[test]
fn quantized_parameters_are_counted_as_values() {
    let Some(golden) = golden("quantized_parameters_are_counted_as_values") else { return };
    let parameters = |name: &str| {
        let artifact = crate::local::locate(&golden.join(name), "x", Want::Safetensors).unwrap();
        probe(&artifact).unwrap().parameters.unwrap().value
    };
    for bits in ["q3", "q4", "q4g32", "q6", "q8"] {
        assert_eq!(parameters(&format!("llama-{bits}")), parameters("llama"), "{bits}");
    }
    assert_eq!(parameters("llama-mxfp4"), parameters("llama"));
}

#[test]
fn wrappers_are_looked_into_and_facts_name_their_source() {
    let config = r#"{
        "model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "eos_token_id": [1, 106],
        "vision_config": {}, "vocab_size": 7,
        "text_config": {"model_type": "gemma3_text", "num_hidden_layers": 26, "hidden_size": 1152,
            "num_attention_heads": 4, "num_key_value_heads": 1, "vocab_size": 262144, "eos_token_id": 5,
            "max_position_embeddings": 32768},
        "quantization": {"bits": 4, "group_size": 64}
    }"#;
    let model = Model::new(&[
        ("config.json", config),
        ("generation_config.json", r#"{"eos_token_id": [106, 9]}"#),
        ("tokenizer_config.json", r#"{"eos_token": {"content": "<end>"}, "bos_token": "<bos>"}"#),
        ("tokenizer.json", r#"{"added_tokens": [{"id": 77, "content": "<end>"}], "model": {"vocab": {"a": 0}}}"#),
    ]);
    let profile = model.probe().unwrap();
    assert_eq!(profile.model_type.unwrap().value, "gemma3");
    let layers = profile.layers.unwrap();
    assert_eq!(
        (layers.value, layers.source.to_string().as_str()),
        (26, "`text_config.num_hidden_layers` in config.json")
    );
    assert_eq!(profile.vocab_size.unwrap().value, 262_144);
    assert_eq!(profile.head_dim.unwrap().value, 288);
    assert_eq!(profile.vision.unwrap().source.to_string(), "`vision_config` in config.json");
    assert_eq!(profile.quantization.unwrap().value.to_string(), "affine 4-bit group 64");
    let eos: Vec<_> = profile.eos_token_ids.iter().map(|fact| format!("{} {}", fact.value, fact.source)).collect();
    assert_eq!(
        eos,
        [
            "1 `eos_token_id` in config.json",
            "106 `eos_token_id` in config.json",
            "5 `text_config.eos_token_id` in config.json",
            "9 `eos_token_id` in generation_config.json",
            "77 `eos_token` in tokenizer_config.json",
        ]
    );
    assert_eq!(profile.bos_token.unwrap().value, "<bos>");
}

#[test]
fn templates_are_looked_for_in_order() {
    let all = [
        (
            "tokenizer_config.json",
            r#"{"chat_template": [{"name": "default", "template": "C"}, {"name": "tool_use", "template": "T"}]}"#,
        ),
        ("chat_template.json", r#"{"chat_template": "B"}"#),
        ("chat_template.jinja", "A"),
    ];
    for (count, default, source) in [
        (3, "A", "chat_template.jinja"),
        (2, "B", "`chat_template` in chat_template.json"),
        (1, "C", "`chat_template` in tokenizer_config.json"),
    ] {
        let fact = Model::new(&all[..count]).probe().unwrap().chat_template.unwrap();
        assert_eq!((fact.value.default.as_str(), fact.source.to_string().as_str()), (default, source));
        assert_eq!(fact.value.named.contains_key("tool_use"), count == 1);
    }
    assert_eq!(Model::new(&[]).probe().unwrap().chat_template, None);
}

#[test]
fn without_a_config_the_tensor_names_are_given() {
    let profile = Model::new(&[]).probe().unwrap();
    assert_eq!(profile.tensor_names.unwrap().value, ["a.weight", "b.weight"]);
    assert_eq!(profile.config, Value::Null);
    assert_eq!(Model::new(&[("config.json", r#"{"model_type": "x"}"#)]).probe().unwrap().tensor_names, None);
}

#[test]
fn broken_and_oversized_files_are_errors_that_name_them() {
    let message = |name: &str, text: &str| Model::new(&[(name, text)]).probe().unwrap_err().to_string();
    assert!(message("config.json", "{").contains("config.json: EOF"));
    assert!(message("config.json", "[]").contains("not a JSON object"));
    let huge = " ".repeat((CONFIG_BYTES_MAX + 1) as usize);
    assert!(message("config.json", &huge).contains("larger than the 2097152 bytes"));
    assert!(message("tokenizer.json", "{\"added_tokens\": 1}").contains("tokenizer.json"));
    // What is no size is no fact; what claims to be one and is none is an error.
    let odd = r#"{"model_type": 3, "hidden_size": 8, "num_attention_heads": 0, "num_key_value_heads": [1, 2], "eos_token_id": "x"}"#;
    let profile = Model::new(&[("config.json", odd)]).probe().unwrap();
    assert!(profile.model_type.is_none() && profile.layers.is_none() && profile.head_dim.is_none());
    for (key, value) in [
        ("num_hidden_layers", "-1"),
        ("num_hidden_layers", "4097"),
        ("num_hidden_layers", "1e300"),
        ("num_hidden_layers", "\"12\""),
        ("num_key_value_heads", "[1, true]"),
        ("hidden_size", "0.5"),
        ("vocab_size", "{}"),
        ("num_experts", "18446744073709551616"),
    ] {
        for config in [format!(r#"{{"{key}": {value}}}"#), format!(r#"{{"text_config": {{"{key}": {value}}}}}"#)] {
            let message = message("config.json", &config);
            assert!(message.contains(&format!("config.json: `{key}` is ")), "{message}");
        }
    }
    assert!(message("config.json", r#"{"num_hidden_layers": NaN}"#).contains("config.json"));
    assert!(message("config.json", &"[".repeat(1 << 16)).contains("recursion limit"));
    assert!(message("config.json", &"[".repeat(1 << 20)).contains("may hold 1048576 values; at most 131072 are read"));
}

#[test]
fn long_files_are_passed_over_where_they_lie() {
    let config = r#"{"eos_token": {"content": "<e>", "lstrip": false}, "bos_token": null, "model_max_length": 1e30,
        "added_tokens_decoder": {"0": {"content": "x"}}, "chat_template": [{"name": "a", "template": "A"},
        {"name": "default", "template": "D"}, {"name": 5}]}"#;
    let error = Model::new(&[("tokenizer_config.json", config)]).probe().unwrap_err().to_string();
    assert!(error.contains("tokenizer_config.json: invalid type: integer `5`"), "{error}");
    let config = config.replace(", {\"name\": 5}", "").replace("{\"name\": 5}", "{\"name\": \"b\"}");
    let profile = Model::new(&[("tokenizer_config.json", &config)]).probe().unwrap();
    assert_eq!((profile.eos_token.unwrap().value.as_str(), profile.bos_token), ("<e>", None));
    let template = profile.chat_template.unwrap().value;
    assert_eq!((template.default.as_str(), template.named["a"].as_str()), ("D", "A"));
    let tokens = r#"{"added_tokens": [{"id": 1, "content": "<\u0065>", "special": true}]}"#;
    let model = Model::new(&[("tokenizer_config.json", r#"{"eos_token": "<e>"}"#), ("tokenizer.json", tokens)]);
    assert_eq!(model.probe().unwrap().eos_token_ids[0].value, 1);
    let token = r#"{"id": 1, "content": ""}"#;
    let many = format!(r#"{{"added_tokens": [{}{token}]}}"#, format!("{token},").repeat(1 << 16));
    let error = Model::new(&[("tokenizer.json", &many)]).probe().unwrap_err().to_string();
    assert!(error.contains("more than 65536 added tokens"), "{error}");
}

#[test]
fn headers_of_safetensors_are_checked_whole() {
    let header = |json: &str, data: usize| {
        let model = Model::new(&[]);
        let content = [&(json.len() as u64).to_le_bytes()[..], json.as_bytes(), &vec![0; data]].concat();
        fs::write(model.0.path().join("model.safetensors"), content).unwrap();
        model.probe().map_err(|error| error.to_string())
    };
    let one =
        |shape: &str, offsets: &str| format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#);
    assert_eq!(header(&one("[2]", "[0,8]"), 8).unwrap().parameters.unwrap().value, 2);
    assert_eq!(header(&one("[]", "[0,4]"), 4).unwrap().parameters.unwrap().value, 1);
    for (json, data, said) in [
        (one("[3]", "[0,8]"), 8, "not as long as its shape says"),
        (one("[2]", "[8,0]"), 8, "not as long as its shape says"),
        (one("[4294967296,4294967296]", "[0,8]"), 8, "a shape that no tensor has"),
        (one("[1,1,1,1,1,1,1,1,1]", "[0,4]"), 4, "a shape that no tensor has"),
        (one("[2]", "[4,12]"), 12, "a hole between tensors at byte 4"),
        (one("[2]", "[0,8]").replace("\"a\"", &format!("\"{}\"", "a".repeat(600))), 8, "a name of 600 bytes"),
        (one("[2]", "[0,8]").replace("F32", "F31"), 8, "unknown variant"),
        (one("[-2]", "[0,8]"), 8, "invalid value"),
        ("[]".into(), 0, "a table of tensors"),
        ("{}x".into(), 0, "trailing"),
    ] {
        let error = header(&json, data).unwrap_err();
        assert!(error.contains(said), "{json}: {error}");
    }
    let entry = r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
    assert!(header(&format!("{{{entry},{entry}}}"), 4).unwrap_err().contains("`a` is there twice"));
    let other = entry.replace("\"a\"", "\"b\"");
    assert!(header(&format!("{{{entry},{other}}}"), 4).unwrap_err().contains("tensors overlap at byte 0"));
}

#[test]
fn a_truncated_safetensors_file_says_by_how_much() {
    let model = Model::new(&[("config.json", r#"{"model_type": "x"}"#)]);
    let path = model.0.path().join("model.safetensors");
    let whole = fs::read(&path).unwrap();
    for end in 0..whole.len() {
        fs::write(&path, &whole[..end]).unwrap();
        assert!(matches!(model.probe(), Err(ProbeError::Malformed { .. })), "cut at {end}");
    }
    let message = model.probe().unwrap_err().to_string();
    let expected = format!("cut off: {} bytes expected, the file has {}", whole.len(), whole.len() - 1);
    assert!(message.ends_with(&expected), "{message}");
    fs::write(&path, [&whole[..], b"x"].concat()).unwrap();
    assert!(model.probe().unwrap_err().to_string().contains("too long"));
    fs::write(&path, [&u64::MAX.to_le_bytes()[..], b"{}"].concat()).unwrap();
    assert!(model.probe().unwrap_err().to_string().contains("at most 33554432 are read"));
}

fn gguf(writer: &GgufWriter) -> Result<ModelProfile, ProbeError> {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    fs::write(&path, writer.finish()).unwrap();
    probe(&crate::local::locate(&path, "x", Want::Any).unwrap())
}

fn header() -> GgufWriter {
    GgufWriter::new("lfm2")
        .number("lfm2.context_length", 128_000)
        .number("lfm2.block_count", 16)
        .number("lfm2.embedding_length", 1024)
        .number("lfm2.attention.head_count", 16)
        .numbers("lfm2.attention.head_count_kv", &[0, 8, 0])
        .texts("tokenizer.ggml.tokens", &["<s>", "</s>", "<eot>"])
        .number("tokenizer.ggml.bos_token_id", 0)
        .number("tokenizer.ggml.eos_token_id", 1)
        .number("tokenizer.ggml.eot_token_id", 2)
        .text("tokenizer.chat_template", "D")
        .text("tokenizer.chat_template.tool_use", "T")
        .tensor("a", &[32], 0, vec![0; 128])
        .tensor("b", &[64], 2, vec![0; 36])
        .tensor("rope_freqs.weight", &[128], 0, vec![0; 512])
}

#[test]
fn a_gguf_header_gives_its_facts() {
    let profile = gguf(&header()).unwrap();
    assert_eq!(profile.name, "m");
    assert_eq!(profile.context_tokens_max.unwrap().value, 128_000);
    assert_eq!(profile.kv_heads.unwrap().value, 8, "the most of any layer");
    assert_eq!(profile.head_dim.unwrap().value, 64);
    assert_eq!(profile.vocab_size.unwrap().value, 3);
    assert_eq!(profile.parameters.unwrap().value, 96);
    assert_eq!(profile.quantization.unwrap().value.to_string(), "Q4_0");
    assert_eq!(profile.eos_token_ids.iter().map(|fact| fact.value).collect::<Vec<_>>(), [1, 2]);
    assert_eq!((profile.bos_token.unwrap().value, profile.eos_token.unwrap().value), ("<s>".into(), "</s>".into()));
    let template = profile.chat_template.unwrap().value;
    assert_eq!((template.default.as_str(), template.named["tool_use"].as_str()), ("D", "T"));
}

#[test]
fn a_gguf_without_an_architecture_or_content_is_an_error() {
    let mut writer = header();
    writer.entries.remove(0);
    assert!(gguf(&writer).unwrap_err().to_string().contains("general.architecture"));
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("m.gguf");
    fs::write(&path, "").unwrap();
    let error = probe(&crate::local::locate(&path, "x", Want::Any).unwrap()).unwrap_err();
    assert!(error.to_string().contains("at least 24"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn a_damaged_gguf_never_panics(at in any::<proptest::sample::Index>(), byte in any::<u8>()) {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("m.gguf");
        let mut bytes = header().finish();
        let at = at.index(bytes.len() - 4) + 4;
        bytes[at] = byte;
        fs::write(&path, bytes).unwrap();
        let _ = probe(&crate::local::locate(&path, "x", Want::Any).unwrap());
    }
}
