use std::{env, path::PathBuf};

use proptest::prelude::*;
use serde_json::{Value, json};

use super::level_byte;
use crate::{DecoderOptions, Tokenizer};

/// A tokenizer of these tokens and this decoder; every token that looks like `<|…|>` is special.
fn tokenizer(tokens: &[&str], decoder: Value) -> Tokenizer {
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| ((*token).to_owned(), json!(id))).collect();
    let special = tokens.iter().enumerate().filter(|(_, token)| token.starts_with("<|"));
    let added: Vec<Value> = special
        .map(|(id, token)| {
            json!({"id": id, "content": token, "special": true, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false})
        })
        .collect();
    let file = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": null, "post_processor": null, "decoder": decoder,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    });
    Tokenizer::from_bytes(file.to_string().as_bytes()).expect("a tokenizer")
}

/// The decoder of Llama 2, Mistral and Phi 3.
fn byte_fallback() -> Tokenizer {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]});
    let bytes: Vec<String> = (0..=255u8).map(|byte| format!("<0x{byte:02X}>")).collect();
    let mut tokens: Vec<&str> = bytes.iter().map(String::as_str).collect();
    tokens.extend(["▁Hello", "▁", "▁▁", "wörld", "é", "<|end|>", "<0xG0>"]);
    tokenizer(&tokens, decoder)
}

fn metaspace(scheme: &str) -> Tokenizer {
    let decoder = json!({"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": true});
    tokenizer(&["▁Hello", "▁", "wörld", "a▁b", "<|end|>"], decoder)
}

fn golden() -> Option<Tokenizer> {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/llama/tokenizer.json");
    if !path.exists() {
        assert!(env::var_os("CI").is_none(), "{}: not there", path.display());
        println!("skipped: the golden tokenizer ({} is not there)", path.display());
        return None;
    }
    Some(Tokenizer::from_file(&path).expect("a tokenizer"))
}

fn ids(tokenizer: &Tokenizer, tokens: &[&str]) -> Vec<u32> {
    tokens.iter().map(|token| tokenizer.token_to_id(token).expect(token)).collect()
}

fn stream(tokenizer: &Tokenizer, ids: &[u32], options: DecoderOptions) -> Vec<String> {
    let mut decoder = tokenizer.decoder_with(options);
    let mut pieces: Vec<String> = ids.iter().map(|id| decoder.push(*id)).collect();
    pieces.push(decoder.finish());
    pieces
}

fn reference(tokenizer: &Tokenizer, ids: &[u32]) -> String {
    tokenizer.inner_for_tests().decode(ids, true).expect("decodes")
}

#[test]
fn the_byte_level_alphabet_is_complete() {
    let mut bytes: Vec<u8> = (0..=0x143).filter_map(char::from_u32).filter_map(level_byte).collect();
    assert_eq!(bytes.len(), 256);
    bytes.sort_unstable();
    assert_eq!(bytes, (0..=255).collect::<Vec<u8>>());
    assert_eq!(level_byte('Ġ'), Some(b' '));
    assert_eq!(level_byte('Ċ'), Some(b'\n'));
    assert_eq!(level_byte('ń'), None);
}

#[test]
fn byte_level_text_round_trips() {
    let Some(tokenizer) = golden() else { return };
    for text in ["Hello, world!", " a  b\n\n\tc ", "naïve café 😀🏽‍👩‍👧 日本語", "\u{0}\u{7f}\u{a0}"]
    {
        let ids = tokenizer.encode(text, false).unwrap();
        assert_eq!(tokenizer.decode(&ids), text);
        assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()).concat(), text);
    }
}

#[test]
fn an_emoji_comes_out_with_its_last_byte() {
    let Some(tokenizer) = golden() else { return };
    let ids = tokenizer.encode("a😀b", false).unwrap();
    assert_eq!(ids.len(), 6, "the golden vocabulary spells emojis in bytes");
    assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()), ["a", "", "", "", "😀", "b", ""]);
    let cut = stream(&tokenizer, &ids[..3], DecoderOptions::default());
    assert_eq!(cut, ["a", "", "", "\u{fffd}"]);

    let tokenizer = byte_fallback();
    let ids = ids_of_bytes(&tokenizer, "😀é".as_bytes());
    assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()), ["", "", "", "😀", "", "é", ""]);
    let cut = stream(&tokenizer, &ids[..3], DecoderOptions::default());
    assert_eq!(cut.concat(), "\u{fffd}\u{fffd}\u{fffd}", "each byte by itself, as decoding all at once has it");
    assert_eq!(cut.concat(), reference(&tokenizer, &ids[..3]));
}

fn ids_of_bytes(tokenizer: &Tokenizer, bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|byte| tokenizer.token_to_id(&format!("<0x{byte:02X}>")).unwrap()).collect()
}

#[test]
fn leading_spaces_are_dropped_once_and_only_at_the_beginning() {
    for tokenizer in [byte_fallback(), metaspace("always")] {
        let ids = ids(&tokenizer, &["▁Hello", "▁", "wörld"]);
        assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()), ["Hello", " ", "wörld", ""]);
        let continues = DecoderOptions { continues: true, ..DecoderOptions::default() };
        assert_eq!(stream(&tokenizer, &ids, continues).concat(), " Hello wörld");
    }
    let never = metaspace("never");
    assert_eq!(never.decode(&ids(&never, &["▁Hello", "a▁b"])), " Helloa b");
}

#[test]
fn special_tokens_are_left_out_unless_kept() {
    let tokenizer = byte_fallback();
    let ids = ids(&tokenizer, &["<|end|>", "▁Hello", "<|end|>"]);
    assert_eq!(tokenizer.decode(&ids), "Hello");
    let keep = DecoderOptions { keep: vec!["<|end|>".into()], ..DecoderOptions::default() };
    assert_eq!(stream(&tokenizer, &ids, keep).concat(), "<|end|> Hello<|end|>");
    let all = DecoderOptions { keep_all: true, ..DecoderOptions::default() };
    assert_eq!(stream(&tokenizer, &ids, all).concat(), "<|end|> Hello<|end|>");
}

#[test]
fn trailing_characters_wait_until_it_is_known_whether_they_are_last() {
    let decoder = json!({"type": "Sequence", "decoders": [
        {"type": "Fuse"}, {"type": "Strip", "content": "_", "start": 0, "stop": 1},
    ]});
    let tokenizer = tokenizer(&["a", "_", "__b", "b__"], decoder);
    let ids = ids(&tokenizer, &["a", "_", "__b", "b__"]);
    assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()), ["a", "", "___b", "b_", ""]);
    assert_eq!(tokenizer.decode(&ids), reference(&tokenizer, &ids));
}

#[test]
fn tokenizers_without_a_decoder_separate_by_spaces() {
    let tokenizer = tokenizer(&["a", "b", "<|end|>"], Value::Null);
    let ids = ids(&tokenizer, &["a", "<|end|>", "b"]);
    assert_eq!(tokenizer.decode(&ids), "a b");
    assert_eq!(tokenizer.decode(&ids), reference(&tokenizer, &ids));
}

#[test]
fn unknown_ids_stand_for_nothing() {
    let tokenizer = byte_fallback();
    assert_eq!(tokenizer.decode(&[u32::MAX, 1 << 20]), "");
}

#[test]
fn a_decoder_can_be_used_again() {
    let tokenizer = byte_fallback();
    let hello = ids(&tokenizer, &["▁Hello"])[0];
    let mut decoder = tokenizer.decoder();
    for _ in 0..2 {
        assert_eq!((decoder.push(hello), decoder.finish()), ("Hello".into(), String::new()));
    }
}

#[test]
fn time_is_linear() {
    let tokenizer = byte_fallback();
    let ids: Vec<u32> = ids_of_bytes(&tokenizer, "é".as_bytes()).repeat(100_000);
    // Decoding everything again for each token would take hours.
    assert_eq!(stream(&tokenizer, &ids, DecoderOptions::default()).concat().len(), 200_000);
}

/// Whether the crate's garbling of runs of bytes, which streaming does not repeat, would show.
fn runs_are_whole_or_broken_throughout(ids: &[u32]) -> bool {
    // The special token is left out, so that the bytes around it are one run.
    let seen = ids.iter().filter(|id| **id != 261);
    let bytes: Vec<Option<u8>> = seen.map(|id| u8::try_from(*id).ok()).collect();
    bytes.split(Option::is_none).all(|run| {
        let run: Vec<u8> = run.iter().flatten().copied().collect();
        std::str::from_utf8(&run).is_ok() || String::from_utf8_lossy(&run).chars().all(|c| c == '\u{fffd}')
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn streaming_random_byte_level_tokens_equals_decoding_them_at_once(ids in prop::collection::vec(0u32..520, 0..40)) {
        thread_local!(static TOKENIZER: Option<Tokenizer> = golden());
        TOKENIZER.with(|tokenizer| {
            let Some(tokenizer) = tokenizer else { return Ok(()) };
            let whole = reference(tokenizer, &ids);
            prop_assert_eq!(stream(tokenizer, &ids, DecoderOptions::default()).concat(), whole);
            Ok(())
        })?;
    }

    #[test]
    fn streaming_bytes_equals_decoding_them_at_once(
        texts in prop::collection::vec("[aé日😀 ]{0,3}", 0..6),
        words in prop::collection::vec(256u32..261, 6),
        cut in 0usize..4,
    ) {
        thread_local!(static TOKENIZER: Tokenizer = byte_fallback());
        TOKENIZER.with(|tokenizer| {
            let mut all = Vec::new();
            for (text, word) in texts.iter().zip(words) {
                all.extend(ids_of_bytes(tokenizer, text.as_bytes()));
                all.push(word);
            }
            // An incomplete character by itself at the end.
            all.extend(&ids_of_bytes(tokenizer, "😀".as_bytes())[..cut]);
            prop_assert_eq!(stream(tokenizer, &all, DecoderOptions::default()).concat(), reference(tokenizer, &all));
            Ok(())
        })?;
    }

    #[test]
    fn streaming_random_bytes_equals_decoding_them_at_once(ids in prop::collection::vec(0u32..263, 0..12)) {
        thread_local!(static TOKENIZER: Tokenizer = byte_fallback());
        TOKENIZER.with(|tokenizer| {
            let streamed = stream(tokenizer, &ids, DecoderOptions::default()).concat();
            prop_assert_eq!(&streamed, &tokenizer.decode(&ids));
            if runs_are_whole_or_broken_throughout(&ids) {
                prop_assert_eq!(streamed, reference(tokenizer, &ids));
            }
            Ok(())
        })?;
    }
}
