//! How a model can be talked with, as far as its headers and its family tell.

use mesh_core::{ModelFamily, ModelProfile, Thinking};
use mesh_text::{Template, choice, dialects};
use serde::Serialize;

use crate::served::{VoiceError, mention_tools, templates};

/// An ability, and how it is known.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Ability {
    /// `chat`, `tools`, `reasoning` or `vision`.
    pub name: &'static str,
    /// Whether it is there.
    pub there: bool,
    /// What shows it.
    pub why: String,
}

/// What a model can do in conversations.
///
/// # Errors
/// Dialects that exclude each other, or one that is not linked.
pub fn abilities(profile: &ModelProfile, family: Option<&dyn ModelFamily>) -> Result<Vec<Ability>, VoiceError> {
    let conventions = family.map(ModelFamily::conventions);
    let fallback = conventions.and_then(|conventions| conventions.fallback_template);
    let sources = templates(profile, fallback);
    let chosen = choice::choose(dialects()?, conventions.map(|conventions| conventions.dialect), &sources)?;
    let thinking = conventions.map_or(Thinking::Fixed, |conventions| conventions.thinking);
    let thinking = choice::thinking(thinking, &sources);
    let origin = match (&profile.chat_template, sources.last()) {
        (Some(own), _) => format!("its chat template ({})", own.source),
        (None, Some(_)) => "its family's chat template".into(),
        (None, None) => "there is no chat template".into(),
    };
    let (chat, why) = match sources.last().map(|source| Template::compile(source)) {
        Some(Ok(_)) => (true, origin.clone()),
        Some(Err(error)) => (false, format!("{origin}: {error}")),
        None => (false, origin.clone()),
    };
    let tools = match (chosen.dialect.tools(), mention_tools(&sources)) {
        (true, true) => (true, format!("dialect {}: {}", chosen.dialect.id(), chosen.why)),
        (true, false) => (false, format!("{origin} does not mention tools")),
        (false, _) => (false, format!("dialect {} has no calls", chosen.dialect.id())),
    };
    let form = chosen.dialect.reasoning();
    let shown = form.filter(|form| sources.iter().any(|source| source.contains(form.open)));
    let reasoning = match (thinking, shown) {
        (Thinking::Variable(name) | Thinking::Effort(name), _) => (true, format!("the template reads `{name}`")),
        (Thinking::Fixed, Some(form)) => (true, format!("the template writes `{}`", form.open.trim())),
        (Thinking::Fixed, None) => (false, "the template shows none".into()),
    };
    let vision = match &profile.vision {
        Some(fact) => (fact.value, format!("{}; only text is served", fact.source)),
        None => (false, "no part of it sees".into()),
    };
    let ability = |name, (there, why)| Ability { name, there, why };
    Ok(vec![
        ability("chat", (chat, why)),
        ability("tools", tools),
        ability("reasoning", reasoning),
        ability("vision", vision),
    ])
}
