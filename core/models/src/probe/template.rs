//! The chat template, which models carry in one of several places.

use std::{collections::BTreeMap, path::Path};

use mesh_core::{ChatTemplate, Fact, ProbeError, Source};

use super::{malformed, read_capped, tokens::TokenizerConfig, typed};

/// Largest chat template, in bytes.
pub(super) const TEMPLATE_BYTES_MAX: u64 = 4 << 20;

/// The template of a directory: chat_template.jinja, then chat_template.json, then tokenizer_config.json. That is the
/// order in which transformers looks, too.
pub(super) fn find(root: &Path, tokenizer_config: TokenizerConfig) -> Result<Option<Fact<ChatTemplate>>, ProbeError> {
    const JINJA: &str = "chat_template.jinja";
    if let Some(text) = read_capped(&root.join(JINJA), TEMPLATE_BYTES_MAX)? {
        let text = String::from_utf8(text).map_err(|_| malformed(&root.join(JINJA), "not UTF-8"))?;
        let template = ChatTemplate { default: text, named: BTreeMap::new() };
        return Ok(Some(Fact::new(template, Source::file(JINJA))));
    }
    const JSON: &str = "chat_template.json";
    let file: TokenizerConfig = typed(root, JSON, TEMPLATE_BYTES_MAX)?;
    if let Some(template) = file.chat_template.0 {
        return Ok(Some(Fact::new(template, Source::key(JSON, "chat_template"))));
    }
    let template = tokenizer_config.chat_template.0;
    Ok(template.map(|template| Fact::new(template, Source::key("tokenizer_config.json", "chat_template"))))
}

/// Named templates, of which `default` (else the first) is the default.
pub(super) fn from_named(pairs: &[(&str, &str)]) -> Option<ChatTemplate> {
    let default = pairs.iter().find(|(name, _)| *name == "default").or(pairs.first())?;
    let named = pairs
        .iter()
        .filter(|(name, _)| *name != default.0)
        .map(|(name, text)| ((*name).to_owned(), (*text).to_owned()))
        .collect();
    Some(ChatTemplate { default: default.1.to_owned(), named })
}
