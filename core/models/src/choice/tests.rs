//! On names and sizes.

use mesh_core::Hint;

use super::*;

fn pick(files: &[&str], want: Want, quant: Option<&str>) -> Result<Choice, FetchError> {
    weigh(&files.iter().map(|file| (*file, 1 << 30)).collect::<Vec<_>>(), want, quant, None).map(|(choice, _)| choice)
}

fn weigh(files: &[(&str, u64)], want: Want, quant: Option<&str>, room: Option<Room>) -> Result<Chosen, FetchError> {
    let files: Vec<_> = files.iter().map(|(path, bytes)| Candidate { path: (*path).into(), bytes: *bytes }).collect();
    let reference = quant.map_or("o/r".to_owned(), |quant| format!("o/r:{quant}"));
    choose(Wish { reference: &reference, want, quant, room }, &files)
}

fn said(error: FetchError) -> String {
    format!("{error}\nhint: {}", error.hint().unwrap())
}

#[test]
fn one_kind_needs_no_flag() {
    assert_eq!(pick(&["config.json", INDEX, "model.safetensors"], Want::Any, None).unwrap(), Choice::Indexed);
    assert_eq!(
        pick(&["model.safetensors", "reference.safetensors"], Want::Any, None).unwrap(),
        Choice::Safetensors(vec!["model.safetensors".into()])
    );
    assert_eq!(
        pick(&["mmproj-x.gguf", "x.Q4_1.gguf"], Want::Any, None).unwrap(),
        Choice::Gguf(vec!["x.Q4_1.gguf".into()])
    );
}

#[test]
fn both_kinds_need_one() {
    let files = ["model.safetensors", "model.gguf"];
    let error = pick(&files, Want::Any, None).unwrap_err();
    assert_eq!(error.hint().unwrap(), "say which one:\n  mesh-llm --model o/r --mlx\n  mesh-llm --model o/r --gguf");
    assert!(matches!(pick(&files, Want::Gguf, None), Ok(Choice::Gguf(_))));
    assert!(matches!(pick(&files, Want::Safetensors, None), Ok(Choice::Safetensors(_))));
}

#[test]
fn quantizations_are_words() {
    let files = ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"];
    assert_eq!(pick(&files, Want::Any, Some("q4_k_m")).unwrap(), Choice::Gguf(vec!["m-Q4_K_M.gguf".into()]));
    assert_eq!(pick(&files, Want::Any, Some("Q8_0")).unwrap(), Choice::Gguf(vec![files[2].into(), files[3].into()]));
    let error = pick(&files, Want::Any, None).unwrap_err();
    assert!(error.hint().unwrap().ends_with("mesh-llm --model o/r:Q4_K_S"), "{error}");
    let error = pick(&files, Want::Any, Some("Q4_K")).unwrap_err();
    assert_eq!(error.to_string(), "the hub has no Q4_K in o/r; did you mean o/r:Q4_K_M or o/r:Q4_K_S?");
}

#[test]
fn ambiguity_is_answered_with_commands() {
    let files =
        [("model.safetensors", 8 << 30), ("m-Q4_K_M.gguf", 2 << 30), ("m-Q8_0.gguf", 4 << 30), ("mmproj.gguf", 1)];
    insta::assert_snapshot!(said(weigh(&files, Want::Any, None, None).unwrap_err()));
    insta::assert_snapshot!(said(weigh(&files, Want::Gguf, None, None).unwrap_err()));
    let models = [("small-Q4_0.gguf", 2 << 30), ("large-Q4_0.gguf", 4 << 30)];
    let room = Some(Room { memory_bytes: 64 << 30, context_bytes: 1 << 30, context_tokens: 8192 });
    // Different models are not chosen among, whatever fits.
    insta::assert_snapshot!(said(weigh(&models, Want::Any, None, room).unwrap_err()));
    insta::assert_snapshot!(said(
        weigh(&[("a.safetensors", 1), ("b.safetensors", 1)], Want::Any, None, room).unwrap_err()
    ));
}

#[test]
fn of_quantizations_the_largest_that_fits_is_chosen_and_said() {
    let files = [
        ("BF16/m-BF16-00001-of-00002.gguf", 4 << 30),
        ("BF16/m-BF16-00002-of-00002.gguf", 4 << 30),
        ("m-Q8_0.gguf", 4 << 30),
        ("m-UD-Q4_K_XL.gguf", 2 << 30),
    ];
    let chosen = |memory: u64| {
        let room = Some(Room { memory_bytes: memory << 30, context_bytes: 1 << 30, context_tokens: 8192 });
        weigh(&files, Want::Any, None, room)
    };
    for (memory, expected) in [(16, &files[..2]), (9, &files[..2]), (8, &files[2..3]), (4, &files[3..4])] {
        let (choice, note) = chosen(memory).unwrap();
        let names: Vec<String> = expected.iter().map(|(name, _)| (*name).to_owned()).collect();
        assert_eq!(choice, Choice::Gguf(names.clone()), "{memory}");
        assert!(note.unwrap().contains(&names[0]), "never silent");
    }
    insta::assert_snapshot!(chosen(8).unwrap().1.unwrap());
    let none = chosen(2).unwrap_err();
    assert!(matches!(none, FetchError::Probe(ProbeError::Ambiguous { .. })), "{none}");
    // What was named is not chosen among.
    assert_eq!(weigh(&files, Want::Any, Some("Q8_0"), None).unwrap().1, None);
}

#[test]
fn what_is_no_model_is_never_primary() {
    let gguf = |name: &str| Choice::Gguf(vec![name.to_owned()]);
    let files = ["m-Q4_0.gguf", "mmproj-m-f16.gguf", "m.mmproj-Q8_0.gguf", "m-lora-f16.gguf", "m.imatrix.gguf"];
    assert_eq!(pick(&files, Want::Any, None).unwrap(), gguf("m-Q4_0.gguf"));
    assert_eq!(pick(&["m-lora-merged-Q4_0.gguf"], Want::Any, None).unwrap(), gguf("m-lora-merged-Q4_0.gguf"));
    assert_eq!(pick(&["explora.gguf"], Want::Any, None).unwrap(), gguf("explora.gguf"));
    let files = ["weights.safetensors", "adapter_model.safetensors", "my-lora.safetensors", "consolidated.safetensors"];
    assert_eq!(pick(&files, Want::Any, None).unwrap(), Choice::Safetensors(vec!["weights.safetensors".into()]));
    insta::assert_snapshot!(said(pick(&["adapter_model.safetensors", "README.md"], Want::Any, None).unwrap_err()));
    insta::assert_snapshot!(said(pick(&["pytorch_model.bin", "config.json"], Want::Any, None).unwrap_err()));
}

#[test]
fn incomplete_and_missing_sets_are_named() {
    let error = pick(&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], Want::Any, None).unwrap_err();
    assert!(error.to_string().contains("m-00002-of-00003.gguf"), "{error}");
    let shards = ["model-00001-of-00003.safetensors", "model-00002-of-00003.safetensors"];
    let error = pick(&shards, Want::Any, None).unwrap_err();
    assert!(error.to_string().contains("model-00003-of-00003.safetensors"), "{error}");
    let error = pick(&["model.safetensors"], Want::Gguf, None).unwrap_err();
    assert_eq!(error.to_string(), "o/r has no GGUF weights, only safetensors");
    let error = pick(&["README.md"], Want::Any, None).unwrap_err();
    assert_eq!(error.to_string(), "o/r has no weights");
}

#[test]
fn an_index_cannot_reach_outside() {
    let index = |name: &str| format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
    assert_eq!(index_shards(index("model.safetensors").as_bytes()).unwrap(), ["model.safetensors"]);
    for bad in ["../x.safetensors", "/x.safetensors", "x.bin", "", "C:x.safetensors"] {
        assert!(index_shards(index(bad).as_bytes()).is_err(), "{bad}");
    }
    assert!(index_shards(b"{}").is_err());
    assert!(index_shards(br#"{"weight_map": {}}"#).is_err());
}
