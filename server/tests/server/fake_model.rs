//! The model that the scripted backend serves: its family, its profile, its tokenizer.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{Arc, LazyLock},
};

use async_trait::async_trait;
use mesh_core::*;
use mesh_llm::slots::{Locate, StartError};
use serde_json::{Value, json};

use super::{Fake, some};

/// A family that talks like Qwen.
pub struct FakeFamily;

impl ModelFamily for FakeFamily {
    fn id(&self) -> &'static str {
        "fake"
    }

    fn title(&self) -> &'static str {
        "Fake"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["fake"], architectures: &[], gguf_architectures: &[] }
    }

    fn conventions(&self) -> Conventions {
        Conventions {
            fallback_template: Some("{% for m in messages %}{{ m.content }}{% endfor %}"),
            thinking: Thinking::Variable("enable_thinking"),
            dialect: "hermes",
        }
    }
}

pub struct FixedLocate(pub ModelProfile, pub Arc<Fake>);

#[async_trait]
impl Locate for FixedLocate {
    async fn locate(&self, _: &ProgressSink) -> Result<ModelProfile, StartError> {
        let mut profile = self.0.clone();
        // All of what it needs is weights.
        profile.weight_bytes.value = some(&self.1.memory_bytes).unwrap_or(1);
        Ok(profile)
    }
}

pub const TEMPLATE: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}\
                        {% if tools %}[{{ tools | length }} tools]{% endif %}\
                        {% if enable_thinking is defined %}[thinking={{ enable_thinking }}]{% endif %}<assistant>\
                        {% if begin is defined %}{{ begin }}{% endif %}";

pub fn profile(name: String, tokenizer: Option<PathBuf>, family: bool) -> ModelProfile {
    let source = || Source::file("config.json");
    let format = Fact::new(WeightFormat::Safetensors, source());
    // A stranger's template would speak for it: this one reads no switch.
    let template = if family { TEMPLATE.to_owned() } else { TEMPLATE.replace("enable_thinking", "thought") };
    ModelProfile {
        context_tokens_max: Some(Fact::new(4096, source())),
        model_type: family.then(|| Fact::new("fake".into(), source())),
        eos_token_ids: tokenizer.iter().map(|_| Fact::new(0, source())).collect(),
        vocab_size: tokenizer.is_some().then(|| Fact::new(256, source())),
        tokenizer: tokenizer.map(|path| Fact::new(path, source())),
        chat_template: Some(Fact::new(
            ChatTemplate { default: template, named: BTreeMap::new() },
            Source::file("chat_template.jinja"),
        )),
        ..ModelProfile::of_files(name, "fake".into(), vec![], format, 1)
    }
}

/// A tokenizer whose token ids are bytes.
pub static BYTES_TOKENIZER: LazyLock<tempfile::NamedTempFile> = LazyLock::new(|| {
    // The byte-level alphabet: printable bytes stand for themselves, the others for code points from 256 on.
    let printable = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let mut others = 256..;
    let mut letter = |byte| if printable(byte) { byte } else { others.next().unwrap() };
    let vocab: serde_json::Map<String, Value> =
        (0..256).map(|byte| (char::from_u32(letter(byte)).unwrap().to_string(), byte.into())).collect();
    let level = json!({ "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": false });
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [], "normalizer": null,
        "pre_tokenizer": level, "post_processor": null, "decoder": level,
        "model": { "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "vocab": vocab, "merges": [] },
    });
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), tokenizer.to_string()).unwrap();
    file
});
