//! Vocabularies of scored pieces (SentencePiece), as BPE.
//!
//! llama.cpp joins the two neighbours that make the piece of the highest score until no two make any. BPE does the same
//! with a ranked list of merges, so every way to make a piece out of two becomes a merge, ranked by the piece's score.

use std::cmp::Reverse;

use serde_json::{Value, json};

use super::tokenizer::{BYTE, Encoding, NORMAL, Vocabulary, refuse};
use crate::{error::ImportError, gguf::Gguf};

/// Longest piece, in bytes, as each is cut everywhere; the longest published ones have about 100.
const PIECE_BYTES_MAX: usize = 1024;
/// What stands for a space.
const SPACE: &str = "▁";

pub(super) fn encoding<D: AsRef<[u8]>>(gguf: &Gguf<D>, vocabulary: &Vocabulary<'_>) -> Result<Encoding, ImportError> {
    let bytes = vocabulary.used().filter(|(.., kind)| *kind == BYTE).count();
    if bytes != 256 {
        return Err(refuse(format!("it has {bytes} of the 256 tokens that stand for single bytes")));
    }
    if let Some((id, text, _)) = vocabulary.used().find(|(_, text, _)| text.len() > PIECE_BYTES_MAX) {
        return Err(refuse(format!("token {id} has {} bytes, up to {PIECE_BYTES_MAX} are imported", text.len())));
    }
    let scores: Vec<f32> =
        gguf.array("tokenizer.ggml.scores").map(|scores| scores.floats().collect()).unwrap_or_default();
    if scores.len() != vocabulary.texts.len() || scores.iter().any(|score| score.is_nan()) {
        return Err(refuse(format!("it has {} tokens and {} scores", vocabulary.texts.len(), scores.len())));
    }
    let unknown = gguf.unsigned("tokenizer.ggml.unknown_token_id").unwrap_or(0);
    let unknown = usize::try_from(unknown).ok().and_then(|id| vocabulary.texts.get(id));
    let prefixed = gguf.bool("tokenizer.ggml.add_space_prefix").unwrap_or(true);
    let replace = |from: &str, to: &str| json!({ "type": "Replace", "pattern": { "String": from }, "content": to });
    let mut normalizers = vec![replace(" ", SPACE)];
    let mut decoders = vec![replace(SPACE, " "), json!({ "type": "ByteFallback" }), json!({ "type": "Fuse" })];
    if prefixed {
        normalizers.insert(0, json!({ "type": "Prepend", "prepend": SPACE }));
        decoders.push(json!({ "type": "Strip", "content": " ", "start": 1, "stop": 0 }));
    }
    Ok(Encoding {
        normalizer: json!({ "type": "Sequence", "normalizers": normalizers }),
        pre_tokenizer: Value::Null,
        decoder: json!({ "type": "Sequence", "decoders": decoders }),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": unknown,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": true,
            "byte_fallback": true,
            "ignore_merges": false,
            "merges": merges(vocabulary, &scores),
            "vocab": vocabulary.table(),
        }),
        adds_bos: true,
    })
}

/// Every way to make a piece out of two, the highest score first; among equals the order of the vocabulary. Tokens that
/// are not plain pieces are never made: special ones are found in the text before this, and the bytes' are a fallback.
fn merges(vocabulary: &Vocabulary<'_>, scores: &[f32]) -> Value {
    let plain = |text: &str| vocabulary.ids.get(text).copied().filter(|id| vocabulary.kinds[*id] == NORMAL);
    let mut merges = Vec::new();
    for (id, text, _) in vocabulary.used().filter(|(.., kind)| *kind == NORMAL) {
        for (at, _) in text.char_indices().skip(1) {
            let (left, right) = text.split_at(at);
            if let (Some(left_id), Some(right_id)) = (plain(left), plain(right)) {
                merges.push((Reverse(Score(scores[id])), id, left_id, right_id, left, right));
            }
        }
    }
    merges.sort_unstable_by_key(|(score, id, left, right, ..)| (*score, *id, *left, *right));
    Value::Array(merges.into_iter().map(|(.., left, right)| json!([left, right])).collect())
}

/// A number in its total order.
#[derive(Clone, Copy, PartialEq)]
struct Score(f32);

impl Eq for Score {}

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        // −0 and 0 are one score.
        (self.0 + 0.0).total_cmp(&(other.0 + 0.0))
    }
}

impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{import::tokenizer, testing::GgufWriter};

    const PIECES: &[(&str, f32)] = &[
        ("a", -20.0),
        ("b", -21.0),
        ("c", -22.0),
        ("▁", -23.0),
        ("bc", -1.0),
        ("ab", -2.0),
        ("abc", -3.0),
        ("▁a", -4.0),
        ("ca", -5.0),
        ("▁ab", -6.0),
        ("cab", -7.0),
        ("bb", -8.0),
        ("ä", -24.0),
    ];
    /// Tokens before the pieces: three special ones and the bytes.
    const BEFORE: u32 = 3 + 256 + 1;

    fn writer() -> GgufWriter {
        let bytes: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        let mut tokens = vec!["<unk>", "<s>", "</s>"];
        tokens.extend(bytes.iter().map(String::as_str));
        tokens.push("  ");
        let mut scores = vec![0.0; tokens.len()];
        let kinds = [vec![2, 3, 3], vec![6; 256], vec![4], vec![1; PIECES.len()]].concat();
        tokens.extend(PIECES.iter().map(|(text, _)| *text));
        scores.extend(PIECES.iter().map(|(_, score)| *score));
        GgufWriter::new("gemma3")
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", &tokens)
            .numbers("tokenizer.ggml.token_type", &kinds)
            .floats("tokenizer.ggml.scores", &scores)
            .number("tokenizer.ggml.bos_token_id", 1)
            .number("tokenizer.ggml.eos_token_id", 2)
    }

    fn tokenizer(writer: &GgufWriter) -> tokenizers::Tokenizer {
        let gguf = Gguf::parse(writer.finish()).unwrap();
        tokenizers::Tokenizer::from_bytes(tokenizer::read(&gguf).unwrap().tokenizer.to_string()).unwrap()
    }

    fn encode(tokenizer: &tokenizers::Tokenizer, text: &str) -> Vec<u32> {
        tokenizer.encode(text, true).unwrap().get_ids().to_vec()
    }

    /// Joins the two neighbours of the highest score, the leftmost among equals, until no two can be joined.
    fn joined(text: &str) -> Vec<u32> {
        let piece = |text: &str| PIECES.iter().position(|(piece, _)| *piece == text);
        let mut parts: Vec<String> = text.replace(' ', "▁").chars().map(String::from).collect();
        loop {
            let pairs =
                (1..parts.len()).filter_map(|at| Some((at, piece(&format!("{}{}", parts[at - 1], parts[at]))?)));
            let best = pairs.reduce(|best, next| if PIECES[next.1].1 > PIECES[best.1].1 { next } else { best });
            let Some((at, _)) = best else { break };
            let right = parts.remove(at);
            parts[at - 1].push_str(&right);
        }
        parts.iter().map(|part| BEFORE + piece(part).unwrap() as u32).collect()
    }

    proptest! {
        #[test]
        fn pieces_are_joined_by_their_scores(text in "[abcä]{0,12}( [abc]{1,6}){0,6}") {
            let tokenizer = tokenizer(&writer().bool("tokenizer.ggml.add_space_prefix", false));
            prop_assert_eq!(encode(&tokenizer, &text), [vec![1], joined(&text)].concat());
            prop_assert_eq!(tokenizer.decode(&joined(&text), false).unwrap(), text);
        }
    }

    #[test]
    fn what_is_no_piece_is_spelled_in_bytes_and_tokens_are_found_first() {
        let plain = writer().bool("tokenizer.ggml.add_space_prefix", false);
        let tokenizer = tokenizer(&plain);
        let byte = |byte: u8| 3 + u32::from(byte);
        assert_eq!(encode(&tokenizer, "é"), [1, byte(0xc3), byte(0xa9)]);
        assert_eq!(tokenizer.decode(&[byte(0xc3), byte(0xa9), BEFORE], false).unwrap(), "éa");
        assert_eq!(encode(&tokenizer, "ab</s>  c"), [&[1], &joined("ab")[..], &[2, BEFORE - 1], &joined("c")].concat());
        assert_eq!(encode(&tokenizer, "<0x41>")[1], byte(b'<'), "the name of a byte is text");
    }

    #[test]
    fn the_header_says_what_is_put_around_a_text() {
        // A space comes before a text, and a begin-of-text token, unless the header says otherwise.
        let tokenizer = tokenizer(&writer());
        assert_eq!(encode(&tokenizer, "ab"), [&[1], &joined(" ab")[..]].concat());
        assert_eq!(tokenizer.decode(&joined(" ab"), false).unwrap(), "ab");
        let around = |bos: bool, eos: bool| {
            let writer = writer().bool("tokenizer.ggml.add_bos_token", bos).bool("tokenizer.ggml.add_eos_token", eos);
            let ids = encode(&self::tokenizer(&writer), "a");
            (ids.first() == Some(&1), ids.last() == Some(&2))
        };
        for expected in [(false, false), (true, false), (false, true), (true, true)] {
            assert_eq!(around(expected.0, expected.1), expected);
        }
    }

    #[test]
    fn a_vocabulary_without_scores_or_bytes_is_refused() {
        let refusal = |without: &str| {
            let mut writer = writer();
            writer.entries.retain(|(key, _)| key != without);
            let gguf = Gguf::parse(writer.finish()).unwrap();
            tokenizer::read(&gguf).err().unwrap().to_string()
        };
        assert!(refusal("tokenizer.ggml.scores").contains("273 tokens and 0 scores"));
        assert!(refusal("tokenizer.ggml.token_type").contains("0 of the 256 tokens"));
        assert!(tokenizer::read(&Gguf::parse(writer().finish()).unwrap()).is_ok());
    }

    #[test]
    fn endless_pieces_are_refused() {
        let endless = "a".repeat(2000);
        let mut tokens: Vec<String> = (0..256).map(|byte| format!("<0x{byte:02X}>")).collect();
        tokens.push(endless);
        let texts: Vec<&str> = tokens.iter().map(String::as_str).collect();
        let writer = GgufWriter::new("gemma3")
            .text("tokenizer.ggml.model", "llama")
            .texts("tokenizer.ggml.tokens", &texts)
            .numbers("tokenizer.ggml.token_type", &[vec![6; 256], vec![1]].concat())
            .floats("tokenizer.ggml.scores", &[0.0; 257]);
        let error = tokenizer::read(&Gguf::parse(writer.finish()).unwrap()).err().unwrap();
        assert!(error.to_string().contains("token 256 has 2000 bytes"), "{error}");
    }
}
