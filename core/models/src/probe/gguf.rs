//! The profile of a GGUF, which carries everything in its header.

use mesh_core::{ChatTemplate, Fact, Kept, ModelProfile, Part, ProbeError, Quantization, Source};

use super::{add_eos, blank, census::Census, kept::LAYERS_MAX, malformed, relative, template};
use crate::{gguf::Gguf, store::Artifact};

pub(super) fn profile(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    let mut profile = blank(artifact)?;
    let mut census = Census::default();
    let mut first = None;
    for path in &artifact.weights {
        let file = Gguf::open(path)?;
        for tensor in file.tensors.iter().filter(|tensor| tensor.name != "rope_freqs.weight") {
            let (kind, elements) = (tensor.kind.to_string(), tensor.elements());
            census.add(Part::of(&tensor.name), kind, 1, elements, tensor.bytes.unwrap_or_default());
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
    profile.parameters = Some(Fact::new(census.parameters(), Source::key(&file, "shapes of tensors")));
    let (chosen, all) = (header.number(&of("expert_used_count")), header.number(&of("expert_count")));
    if let (Some(chosen), Some(all)) = (chosen, all) {
        let active = census.active(chosen.value, all.value);
        profile.parameters_active = active.map(|active| Fact::new(active, chosen.source));
    }
    // By what most values are stored as: `general.file_type` names a recipe, and is often wrong.
    profile.quantization = census.prevailing().filter(|kind| !FLOATS.contains(kind)).map(|kind| {
        let quantization = Quantization { mode: kind.to_owned(), bits: None, group_size: None };
        Fact::new(quantization, Source::key(&file, "tensor types"))
    });
    profile.stored = Some(Fact::new(census.stored(), Source::key(&file, "tensor types")));
    profile.kept = header.kept(&architecture.value).map(|kept| Fact::new(kept, header.source(&of("block_count"))));
    profile.bos_token = header.token("tokenizer.ggml.bos_token_id").map(|(_, text)| text);
    profile.eos_token = header.token("tokenizer.ggml.eos_token_id").map(|(_, text)| text);
    for key in ["eos_token_id", "eot_token_id", "eom_token_id"] {
        let key = format!("tokenizer.ggml.{key}");
        if let Some((id, text)) = header.token(&key) {
            add_eos(&mut profile, id, text.source);
        }
    }
    profile.chat_template = header.template().map_err(|what| malformed(&artifact.weights[0], what))?;
    profile.gguf_architecture = Some(architecture);
    Ok(profile)
}

/// Names of the types that are not quantized.
const FLOATS: [&str; 4] = ["F32", "F16", "BF16", "F64"];
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

    /// What is kept of a sequence: keys and values of the layers that have any, of some only a window.
    fn kept(&self, architecture: &str) -> Option<Kept> {
        let key = |name: &str| format!("{architecture}.{name}");
        let number = |name: &str| self.gguf.unsigned(&key(name)).filter(|number| *number <= u32::MAX.into());
        let list =
            |name: &str| Some(self.gguf.array(&key(name))?.unsigned().take(LAYERS_MAX as usize).collect::<Vec<_>>());
        let layers = number("block_count").filter(|layers| *layers <= LAYERS_MAX)?;
        let heads = number("attention.head_count").or_else(|| list("attention.head_count")?.into_iter().max())?;
        let share = || number("embedding_length")?.checked_div(heads);
        let keys = number("attention.key_length").or_else(share)?;
        let values = number("attention.value_length").unwrap_or(keys);
        let kv_heads = list("attention.head_count_kv");
        let kv_heads_all = number("attention.head_count_kv").unwrap_or(heads);
        let window = number("attention.sliding_window").filter(|window| *window > 0);
        let slides = list("attention.sliding_window_pattern");
        let period = number("attention.sliding_window_pattern").or(match architecture {
            "gemma2" | "gpt-oss" => Some(2),
            "cohere2" => Some(4),
            "gemma3n" => Some(5),
            "gemma3" => Some(6),
            _ => None,
        });
        let every = |layer: u64, period: u64| (layer + 1).is_multiple_of(period.max(1));
        let recurrent = number("full_attention_interval");
        let shared = number("attention.shared_kv_layers").unwrap_or(0).min(layers);
        let state = number("ssm.inner_size").zip(number("ssm.state_size")).map_or(0, |(inner, state)| {
            let inputs = number("ssm.conv_kernel").unwrap_or(1).saturating_sub(1);
            inner.saturating_mul(state.saturating_add(inputs))
        });
        let mut kept = Kept::default();
        for layer in 0..layers - shared {
            let heads = kv_heads.as_ref().map_or(Some(kv_heads_all), |list| list.get(layer as usize).copied())?;
            if heads == 0 || recurrent.is_some_and(|period| !every(layer, period)) {
                kept.state_values = kept.state_values.saturating_add(state);
                continue;
            }
            let slides = match (&slides, period) {
                (Some(list), _) => list.get(layer as usize).is_some_and(|slides| *slides != 0),
                (None, Some(period)) => !every(layer, period),
                (None, None) => false,
            };
            let of_swa = |name: &str, other: u64| number(name).filter(|_| slides).unwrap_or(other);
            let width = of_swa("attention.key_length_swa", keys) + of_swa("attention.value_length_swa", values);
            let window = window.filter(|_| slides).and_then(|window| u32::try_from(window).ok());
            kept.add(window, heads.checked_mul(width)?);
        }
        Some(kept)
    }

    /// A token that the header names by its id.
    fn token(&self, key: &str) -> Option<(u32, Fact<String>)> {
        let id = u32::try_from(self.gguf.unsigned(key)?).ok()?;
        let text = self.gguf.array(TOKENS)?.texts().nth(id as usize)?;
        Some((id, Fact::new(String::from_utf8_lossy(text).into_owned(), self.source(key))))
    }

    fn template(&self) -> Result<Option<Fact<ChatTemplate>>, String> {
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
        let (most, bytes) =
            (template::TEMPLATE_BYTES_MAX, pairs.iter().map(|(_, text)| text.len() as u64).sum::<u64>());
        if bytes > most {
            return Err(format!("its chat templates have {bytes} bytes; at most {most} are read"));
        }
        let source = self.source(TEMPLATE);
        Ok(template::from_named(&pairs).map(|template| Fact::new(template, source)))
    }
}
