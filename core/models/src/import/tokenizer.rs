//! tokenizer.json and tokenizer_config.json from the vocabulary of a GGUF: byte-level BPE, and scored pieces.

use std::collections::HashMap;

use serde_json::{Map, Value, json};

use super::pieces;
use crate::{error::ImportError, gguf::Gguf};

/// The two files.
pub(super) struct Tokenizer {
    pub tokenizer: Value,
    pub config: Value,
}

/// How a pre-tokenizer cuts text, by `tokenizer.ggml.pre`.
struct Cut {
    names: &'static [&'static str],
    /// What comes before the byte-level step; `None` leaves the cutting to that.
    split: Option<Split>,
    /// Whether text is composed (NFC) first.
    nfc: bool,
    /// Whether a word that is a token needs no merges.
    ignore_merges: bool,
    /// Whether a begin-of-text token comes first, unless the header says otherwise.
    adds_bos: bool,
}

enum Split {
    Digits,
    Pattern(&'static str),
}

const CUTS: &[Cut] = &[
    Cut { names: &["gpt-2", "gpt2", "default"], split: None, nfc: false, ignore_merges: false, adds_bos: false },
    Cut { names: &["smollm"], split: Some(Split::Digits), nfc: false, ignore_merges: false, adds_bos: false },
    Cut {
        names: &["qwen2", "deepseek-r1-qwen"],
        split: Some(Split::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )),
        nfc: true,
        ignore_merges: false,
        adds_bos: false,
    },
    Cut {
        names: &["llama-bpe", "llama3", "llama-v3"],
        split: Some(Split::Pattern(
            r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        )),
        nfc: false,
        ignore_merges: true,
        adds_bos: true,
    },
];

pub(super) const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
pub(super) const BYTE: u64 = 6;

/// The parts of tokenizer.json that kinds of tokenizers differ in.
pub(super) struct Encoding {
    pub normalizer: Value,
    pub pre_tokenizer: Value,
    pub decoder: Value,
    pub model: Value,
    /// Whether a begin-of-text token comes first, unless the header says otherwise.
    pub adds_bos: bool,
}

pub(super) fn read<D: AsRef<[u8]>>(gguf: &Gguf<D>) -> Result<Tokenizer, ImportError> {
    let vocabulary;
    let encoding = match gguf.text("tokenizer.ggml.model").unwrap_or("none") {
        "gpt2" => {
            let cut = cut(gguf)?;
            vocabulary = Vocabulary::read(gguf)?;
            byte_level_bpe(gguf, &vocabulary, cut)?
        }
        "llama" => {
            vocabulary = Vocabulary::read(gguf)?;
            pieces::encoding(gguf, &vocabulary)?
        }
        model => {
            return Err(refuse(format!(
                "its model is `{model}`; byte-level BPE (`gpt2`) and scored pieces (`llama`) can be imported"
            )));
        }
    };
    let special = |name: &str| {
        let id = gguf.unsigned(&format!("tokenizer.ggml.{name}_token_id"))?;
        Some((id, *vocabulary.texts.get(usize::try_from(id).ok()?)?))
    };
    let added = |name: &str, default: bool| {
        gguf.bool(&format!("tokenizer.ggml.add_{name}_token")).unwrap_or(default).then(|| special(name)).flatten()
    };
    let (bos, eos) = (added("bos", encoding.adds_bos), added("eos", false));
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": vocabulary.added(),
        "normalizer": encoding.normalizer,
        "pre_tokenizer": encoding.pre_tokenizer,
        "post_processor": post_processor(bos, eos),
        "decoder": encoding.decoder,
        "model": encoding.model,
    });
    let mut config = Map::new();
    config.insert("tokenizer_class".into(), "PreTrainedTokenizerFast".into());
    for (field, name) in
        [("bos_token", "bos"), ("eos_token", "eos"), ("pad_token", "padding"), ("unk_token", "unknown")]
    {
        config.insert(field.into(), special(name).map_or(Value::Null, |(_, text)| text.into()));
    }
    config.insert("add_bos_token".into(), bos.is_some().into());
    config.insert("add_eos_token".into(), eos.is_some().into());
    config.insert("clean_up_tokenization_spaces".into(), false.into());
    if let Some(template) = gguf.text("tokenizer.chat_template") {
        config.insert("chat_template".into(), template.into());
    }
    Ok(Tokenizer { tokenizer, config: Value::Object(config) })
}

pub(super) fn refuse(what: String) -> ImportError {
    ImportError::Tokenizer { what }
}

/// The tokens, by id and text, that are put around every text.
fn post_processor(bos: Option<(u64, &str)>, eos: Option<(u64, &str)>) -> Value {
    if bos.is_none() && eos.is_none() {
        return Value::Null;
    }
    let token =
        |added: Option<(u64, &str)>| added.map(|(_, text)| json!({ "SpecialToken": { "id": text, "type_id": 0 } }));
    let around = |texts: &[Value]| token(bos).into_iter().chain(texts.iter().cloned()).chain(token(eos)).collect();
    let (one, other) =
        (json!({ "Sequence": { "id": "A", "type_id": 0 } }), json!({ "Sequence": { "id": "B", "type_id": 1 } }));
    let (single, pair): (Vec<_>, Vec<_>) = (around(std::slice::from_ref(&one)), around(&[one, other]));
    let special = [bos, eos].into_iter().flatten();
    let special = special.map(|(id, text)| (text.to_owned(), json!({ "id": text, "ids": [id], "tokens": [text] })));
    json!({
        "type": "TemplateProcessing",
        "single": single,
        "pair": pair,
        "special_tokens": special.collect::<Map<_, _>>(),
    })
}

/// How a pre-tokenizer named by the header cuts text.
fn cut<D: AsRef<[u8]>>(gguf: &Gguf<D>) -> Result<&'static Cut, ImportError> {
    let pre = gguf.text("tokenizer.ggml.pre").unwrap_or("default");
    CUTS.iter().find(|cut| cut.names.contains(&pre)).ok_or_else(|| {
        let known: Vec<_> = CUTS.iter().flat_map(|cut| cut.names).copied().collect();
        refuse(format!("its pre-tokenizer is `{pre}`; those that can be imported: {}", known.join(", ")))
    })
}

fn byte_level_bpe<D: AsRef<[u8]>>(
    gguf: &Gguf<D>,
    vocabulary: &Vocabulary<'_>,
    cut: &Cut,
) -> Result<Encoding, ImportError> {
    let byte_level = |use_regex: bool| json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": use_regex });
    let pre_tokenizer = match &cut.split {
        None => byte_level(true),
        Some(Split::Digits) => json!({
            "type": "Sequence",
            "pretokenizers": [{ "type": "Digits", "individual_digits": true }, byte_level(true)],
        }),
        Some(Split::Pattern(pattern)) => json!({
            "type": "Sequence",
            "pretokenizers": [
                { "type": "Split", "pattern": { "Regex": pattern }, "behavior": "Isolated", "invert": false },
                byte_level(false),
            ],
        }),
    };
    Ok(Encoding {
        normalizer: if cut.nfc { json!({ "type": "NFC" }) } else { Value::Null },
        pre_tokenizer,
        decoder: byte_level(true),
        model: json!({
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "ignore_merges": cut.ignore_merges,
            "merges": merges(gguf, vocabulary)?,
            "vocab": vocabulary.table(),
        }),
        adds_bos: cut.adds_bos,
    })
}

/// The tokens by id, with their kinds.
pub(super) struct Vocabulary<'a> {
    pub texts: Vec<&'a str>,
    pub kinds: Vec<u64>,
    pub ids: HashMap<&'a str, usize>,
}

impl<'a> Vocabulary<'a> {
    fn read<D: AsRef<[u8]>>(gguf: &'a Gguf<D>) -> Result<Self, ImportError> {
        let tokens = gguf.array("tokenizer.ggml.tokens").ok_or_else(|| refuse("it has no vocabulary".into()))?;
        let mut texts = Vec::new();
        for (id, text) in tokens.texts().enumerate() {
            texts.push(std::str::from_utf8(text).map_err(|_| refuse(format!("token {id} is not UTF-8")))?);
        }
        let mut kinds: Vec<u64> =
            gguf.array("tokenizer.ggml.token_type").map(|kinds| kinds.unsigned().collect()).unwrap_or_default();
        if !kinds.is_empty() && kinds.len() != texts.len() {
            return Err(refuse(format!("it has {} tokens and {} token types", texts.len(), kinds.len())));
        }
        kinds.resize(texts.len(), 1);
        let mut ids = HashMap::new();
        for (id, text) in texts.iter().enumerate().filter(|(id, _)| kinds[*id] != UNUSED) {
            if let Some(other) = ids.insert(*text, id) {
                return Err(refuse(format!("tokens {other} and {id} are the same")));
            }
        }
        Ok(Self { texts, kinds, ids })
    }

    /// Unused entries only fill the embedding up; nothing encodes to them.
    pub fn used(&self) -> impl Iterator<Item = (usize, &'a str, u64)> {
        let all = self.texts.iter().zip(&self.kinds).enumerate();
        all.filter(|(_, (_, kind))| **kind != UNUSED).map(|(id, (text, kind))| (id, *text, *kind))
    }

    pub fn table(&self) -> Value {
        Value::Object(self.used().map(|(id, text, _)| (text.to_owned(), id.into())).collect())
    }

    fn added(&self) -> Value {
        let added = self.used().filter(|(.., kind)| [UNKNOWN, CONTROL, USER_DEFINED].contains(kind));
        let entry = |(id, text, kind): (usize, &str, u64)| {
            json!({
                "id": id,
                "content": text,
                "single_word": false,
                "lstrip": false,
                "rstrip": false,
                "normalized": false,
                "special": kind != USER_DEFINED,
            })
        };
        Value::Array(added.map(entry).collect())
    }
}

/// The merges as pairs; each has to make a token out of tokens.
fn merges<D: AsRef<[u8]>>(gguf: &Gguf<D>, vocabulary: &Vocabulary<'_>) -> Result<Value, ImportError> {
    let Some(merges) = gguf.array("tokenizer.ggml.merges") else {
        return Err(refuse("it has no merges".into()));
    };
    let mut pairs = Vec::new();
    for (rank, merge) in merges.texts().enumerate() {
        let bad = || refuse(format!("merge {rank} does not make a token out of two"));
        let merge = std::str::from_utf8(merge).map_err(|_| bad())?;
        // Spaces are other characters in byte-level text, so there is one and it divides.
        let (left, right) = merge.split_once(' ').ok_or_else(bad)?;
        let known = |text: &str| vocabulary.ids.contains_key(text);
        if !known(left) || !known(right) || !known(&format!("{left}{right}")) {
            return Err(bad());
        }
        pairs.push(json!([left, right]));
    }
    Ok(Value::Array(pairs))
}
