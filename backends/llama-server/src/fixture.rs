//! Profiles for tests, made by hand.

use std::path::PathBuf;

use mesh_core::{Fact, ModelProfile, Source, WeightFormat};

/// A GGUF of which nothing is known but its architecture and the size of its file, 0 where there is none.
pub fn profile(name: &str, gguf: PathBuf, architecture: &str) -> ModelProfile {
    let source = Source::file("model.gguf");
    ModelProfile {
        name: name.to_owned(),
        root: gguf.parent().map(PathBuf::from).unwrap_or_default(),
        format: Fact::new(WeightFormat::Gguf, source.clone()),
        weight_bytes: Fact::new(gguf.metadata().map_or(0, |metadata| metadata.len()), source.clone()),
        weights: vec![gguf],
        model_type: None,
        architectures: None,
        gguf_architecture: Some(Fact::new(architecture.to_owned(), source)),
        quantization: None,
        context_tokens_max: None,
        parameters: None,
        layers: None,
        kv_heads: None,
        head_dim: None,
        vocab_size: None,
        eos_token_ids: Vec::new(),
        bos_token: None,
        eos_token: None,
        tokenizer: None,
        chat_template: None,
        vision: None,
        tensor_names: None,
        config: serde_json::Value::Null,
        generation_config: serde_json::Value::Null,
    }
}
