use std::{env, path::Path};

use mesh_core::error::Hint;
use serde_json::json;

use super::{Tokenizer, TokenizerError};

fn file(decoder: serde_json::Value) -> String {
    json!({
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "a"},
        "added_tokens": [{"id": 3, "content": "<|end|>", "special": true, "single_word": false, "lstrip": false,
            "rstrip": false, "normalized": false}],
        "normalizer": null, "pre_tokenizer": null,
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<|end|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {"<|end|>": {"id": "<|end|>", "ids": [3], "tokens": ["<|end|>"]}}},
        "decoder": decoder,
        "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "c": 2}, "merges": []},
    })
    .to_string()
}

#[test]
fn prompts_are_encoded_whole_and_specials_recognised() {
    let tokenizer = Tokenizer::from_bytes(file(json!({"type": "Fuse"})).as_bytes()).unwrap();
    assert_eq!(tokenizer.encode("abc<|end|>a", false).unwrap(), [0, 1, 2, 3, 0], "neither cut nor filled");
    assert_eq!(tokenizer.encode("ab", true).unwrap(), [3, 0, 1]);
    assert_eq!(tokenizer.encode("", false).unwrap(), [0u32; 0]);
    assert_eq!(tokenizer.vocab_size(), 4);
    assert_eq!(tokenizer.token_to_id("<|end|>"), Some(3));
    assert_eq!(tokenizer.token_to_id("x"), None);
    assert_eq!(tokenizer.id_to_token(1).as_deref(), Some("b"));
    assert!(tokenizer.is_special("<|end|>") && !tokenizer.is_special("a"));
}

#[test]
fn bad_files_are_errors() {
    let good = file(json!({"type": "Fuse"}));
    let truncated = (0..good.len()).step_by(7).map(|end| &good[..end]);
    let odd = ["", "[]", "{}", "null", "{\"version\": \"1.0\", \"model\": 7}", "\u{0}"];
    for bytes in truncated.chain(odd) {
        let error = Tokenizer::from_bytes(bytes.as_bytes()).unwrap_err();
        assert!(matches!(error, TokenizerError::Malformed { .. }), "{bytes}: {error}");
        assert!(error.hint().is_some());
    }
    let missing = env::temp_dir().join("mesh-text-no-such-tokenizer.json");
    let error = Tokenizer::from_file(Path::new(&missing)).unwrap_err();
    assert!(error.to_string().contains("mesh-text-no-such-tokenizer.json"), "{error}");
}

#[test]
fn decoders_that_cannot_be_streamed_are_named() {
    let cases = [
        (json!({"type": "WordPiece", "prefix": "##", "cleanup": true}), "WordPiece"),
        (json!({"type": "CTC", "pad_token": "a", "word_delimiter_token": "b", "cleanup": true}), "CTC"),
        (json!({"type": "Replace", "pattern": {"Regex": "a+"}, "content": "b"}), "Replace"),
        (
            json!({"type": "Sequence", "decoders": [
                {"type": "Fuse"}, {"type": "Replace", "pattern": {"String": "ab"}, "content": "b"}]}),
            "Replace after",
        ),
        (json!({"type": "Strip", "content": " ", "start": 1_000_000, "stop": 0}), "Strip"),
    ];
    for (decoder, name) in cases {
        let error = Tokenizer::from_bytes(file(decoder).as_bytes()).unwrap_err();
        assert!(matches!(&error, TokenizerError::Decoder { what } if what.contains(name)), "{error}");
    }
}
