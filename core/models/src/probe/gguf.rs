//! The profile of a GGUF, which carries everything in its header.

use std::collections::BTreeMap;

use mesh_core::{ChatTemplate, Fact, ModelProfile, ProbeError, Quantization, Source};

use super::{add_eos, blank, malformed, relative, template};
use crate::{
    gguf::{Gguf, TensorType},
    store::Artifact,
};

pub(super) fn profile(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    let mut profile = blank(artifact)?;
    let mut elements: BTreeMap<TensorType, u64> = BTreeMap::new();
    let mut first = None;
    for path in &artifact.weights {
        let file = Gguf::open(path)?;
        for tensor in file.tensors.iter().filter(|tensor| tensor.name != "rope_freqs.weight") {
            let count = elements.entry(tensor.kind).or_default();
            *count = count.saturating_add(tensor.elements());
        }
        // The parts after the first hold tensors only.
        if first.is_none() {
            first = Some((file, relative(&artifact.root, path)));
        }
    }
    let Some((gguf, file)) = first else {
        return Err(ProbeError::MissingFile { root: artifact.root.clone(), file: "weights".into() });
    };
    let header = Header { gguf: &gguf, file: &file };
    let Some(architecture) = header.text("general.architecture") else {
        return Err(malformed(&artifact.weights[0], "it has no `general.architecture`"));
    };
    let of = |key: &str| format!("{}.{key}", architecture.value);
    profile.context_tokens_max = header.number(&of("context_length"));
    profile.layers = header.number(&of("block_count"));
    profile.kv_heads =
        header.number(&of("attention.head_count_kv")).or_else(|| header.number(&of("attention.head_count")));
    profile.head_dim = header.number(&of("attention.key_length")).or_else(|| {
        let width = header.number(&of("embedding_length"))?;
        let heads = header.number(&of("attention.head_count"))?.value;
        Some(Fact::new(width.value.checked_div(heads)?, width.source))
    });
    profile.vocab_size = header.number(&of("vocab_size")).or_else(|| {
        let tokens = gguf.array(TOKENS)?;
        Some(Fact::new(u32::try_from(tokens.len()).ok()?, header.source(TOKENS)))
    });
    let total = elements.values().fold(0u64, |sum, count| sum.saturating_add(*count));
    profile.parameters = Some(Fact::new(total, Source::file(&file)));
    // By what most values are stored as: `general.file_type` names a recipe, and is often wrong.
    profile.quantization =
        elements.iter().max_by_key(|(_, count)| **count).filter(|(kind, _)| !kind.is_float()).map(|(kind, _)| {
            let quantization = Quantization { mode: kind.to_string(), bits: None, group_size: None };
            Fact::new(quantization, Source::key(&file, "tensor types"))
        });
    profile.bos_token = header.token("tokenizer.ggml.bos_token_id").map(|(_, text)| text);
    profile.eos_token = header.token("tokenizer.ggml.eos_token_id").map(|(_, text)| text);
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        if let Some((id, text)) = header.token(&key) {
            add_eos(&mut profile, id, text.source);
        }
    }
    profile.chat_template = header.template();
    profile.gguf_architecture = Some(architecture);
    Ok(profile)
}

const TOKENS: &str = "tokenizer.ggml.tokens";
const TEMPLATE: &str = "tokenizer.chat_template";

struct Header<'a> {
    gguf: &'a Gguf<memmap2::Mmap>,
    file: &'a str,
}

impl Header<'_> {
    fn source(&self, key: &str) -> Source {
        Source::key(self.file, key)
    }

    fn text(&self, key: &str) -> Option<Fact<String>> {
        Some(Fact::new(self.gguf.text(key)?.to_owned(), self.source(key)))
    }

    /// A number; of a list with one for each layer the largest.
    fn number(&self, key: &str) -> Option<Fact<u32>> {
        let number = self.gguf.unsigned(key).or_else(|| self.gguf.array(key)?.unsigned().max())?;
        Some(Fact::new(u32::try_from(number).ok()?, self.source(key)))
    }

    /// A token that the header names by its id.
    fn token(&self, key: &str) -> Option<(u32, Fact<String>)> {
        let id = u32::try_from(self.gguf.unsigned(key)?).ok()?;
        let text = self.gguf.array(TOKENS)?.texts().nth(id as usize)?;
        Some((id, Fact::new(String::from_utf8_lossy(text).into_owned(), self.source(key))))
    }

    fn template(&self) -> Option<Fact<ChatTemplate>> {
        let prefix = format!("{TEMPLATE}.");
        let mut pairs: Vec<(&str, &str)> = Vec::new();
        if let Some(text) = self.gguf.text(TEMPLATE) {
            pairs.push(("default", text));
        }
        for key in self.gguf.keys().filter(|key| key.starts_with(&prefix)) {
            if let Some(text) = self.gguf.text(key) {
                pairs.push((&key[prefix.len()..], text));
            }
        }
        Some(Fact::new(template::from_named(&pairs)?, self.source(TEMPLATE)))
    }
}
