//! Who a model is and how it talks. How it computes is `mesh_graph::GraphFamily`, implemented in the same file.

use crate::profile::{ModelProfile, WeightFormat};

/// The names a family answers to. Unique over all families in the binary.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claims {
    /// `model_type`s of config.json.
    pub model_types: &'static [&'static str],
    /// `architectures` of config.json, for configs that lack a `model_type`.
    pub architectures: &'static [&'static str],
    /// `general.architecture`s of GGUF files.
    pub gguf_architectures: &'static [&'static str],
}

/// Tensor names that tell a family by its weights alone. Confirms, never guesses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fingerprint {
    /// Endings of names that have to be there.
    pub required: &'static [&'static str],
    /// Endings of names that must not.
    pub forbidden: &'static [&'static str],
}

/// How a family's templates switch reasoning on and off.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Thinking {
    /// It does not reason aloud, or cannot be told not to.
    Fixed,
    /// By a boolean template variable of this name, such as `enable_thinking`.
    Variable(&'static str),
    /// By a template variable that names an effort, such as `reasoning_effort`.
    Effort(&'static str),
}

/// What a family's prompts and answers look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conventions {
    /// Used, and said so in the log, where the model comes without a chat template.
    pub fallback_template: Option<&'static str>,
    /// How reasoning is switched.
    pub thinking: Thinking,
    /// Id of the dialect its answers are written in.
    pub dialect: &'static str,
}

/// One model family. Stateless; registered with `mesh_graph::register_family!`.
pub trait ModelFamily: Send + Sync {
    /// Unique lower-case id, such as `qwen3`.
    fn id(&self) -> &'static str;

    /// The name people know it by, such as `Qwen 3`.
    fn title(&self) -> &'static str;

    /// The names it answers to.
    fn claims(&self) -> Claims;

    /// What tells it by weights alone, if anything does.
    fn fingerprint(&self) -> Option<Fingerprint> {
        None
    }

    /// A closer look at a config that carries a claimed name: `Err` says which setting cannot be computed, as in
    /// "`rope_type` `foo`". A family never computes something else instead.
    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        let _ = profile;
        Ok(())
    }

    /// How it talks.
    fn conventions(&self) -> Conventions;
}

/// Whether `family` claims the model by name (of config.json, or of a GGUF header), or failing any name by the
/// fingerprint of its weights.
pub fn claims(family: &dyn ModelFamily, profile: &ModelProfile) -> bool {
    let claims = family.claims();
    if profile.format.value == WeightFormat::Gguf {
        return profile
            .gguf_architecture
            .as_ref()
            .is_some_and(|name| claims.gguf_architectures.contains(&name.value.as_str()));
    }
    if let Some(model_type) = &profile.model_type {
        return claims.model_types.contains(&model_type.value.as_str());
    }
    if let Some(names) = &profile.architectures {
        return names.value.iter().any(|name| claims.architectures.contains(&name.as_str()));
    }
    let (Some(names), Some(print)) = (&profile.tensor_names, family.fingerprint()) else { return false };
    let has = |ending: &&str| names.value.iter().any(|name| name.ends_with(ending));
    print.required.iter().all(&has) && !print.forbidden.iter().any(has)
}
