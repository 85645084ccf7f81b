//! A model that is ready: its engine, and everything needed to talk with it.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::{
        Arc, Mutex, OnceLock, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::SystemTime,
};

use mesh_core::{
    EngineHandle, Fact, Hint, ModelFamily, ModelProfile, OutputForm, PromptForm, RegistryError, Sampling, Source,
    TemplateError, Thinking, UnknownName, WeightFormat, node::ModelOffer,
};
use mesh_text::{
    ConstraintError, Dialect, StreamDecoder, Template, Tokenizer, TokenizerError, Vocabulary, choice, dialects,
    tokenizer::DecoderOptions,
};
use tokio::sync::{OnceCell, Semaphore};

use crate::{
    defaults::{self, Manner},
    lease::{Usage, Use},
    metrics::Tally,
};

/// The name under which templates for conversations with tools are published.
const TOOL_TEMPLATE: &str = "tool_use";

/// The dialect of models whose own is not known.
const PLAIN: &str = "plain";

/// Prompts that are rendered and tokenized at the same time, over all requests to one model.
const PREPARING_MAX: usize = 4;

/// A model that requests can be sent to.
pub struct ServedModel {
    /// What is known about it.
    pub profile: Arc<ModelProfile>,
    /// Its engine.
    pub handle: EngineHandle,
    /// How its reasoning is switched.
    pub thinking: Thinking,
    /// What its answers are written in.
    pub dialect: &'static dyn Dialect,
    /// Whether its template shows it the tools that a request offers. Calls can be forced without.
    pub shows_tools: bool,
    /// Present where the engine takes or gives tokens.
    pub tokenizer: Option<Tokenizer>,
    /// Seconds since 1970 at which it became ready.
    pub since: u64,
    /// The model's tokenizer where the engine does without, for those who ask what its tokens are.
    spare_tokenizer: OnceCell<Tokenizer>,
    /// How it is presented to clients.
    pub manner: Manner,
    defaults: Sampling,
    /// By the special tokens that are part of the text.
    vocabularies: Mutex<BTreeMap<Vec<&'static str>, Arc<Vocabulary>>>,
    pub(crate) preparing: Semaphore,
    answered: AtomicBool,
    pub(crate) usage: Usage,
    /// Its name and its counts, where it has a slot.
    tally: OnceLock<(String, Arc<Tally>)>,
    default_template: Result<Template, TemplateError>,
    tool_template: Option<Result<Template, TemplateError>>,
}

/// The parts of a model that talk, made before its weights are loaded: what fails here fails early.
pub struct Voice {
    thinking: Thinking,
    shows_tools: bool,
    dialect: &'static dyn Dialect,
    default_template: Result<Template, TemplateError>,
    tool_template: Option<Result<Template, TemplateError>>,
}

/// A model that cannot be talked with.
#[derive(Debug, thiserror::Error)]
pub enum VoiceError {
    /// Two linked dialects exclude each other.
    #[error(transparent)]
    Registry(#[from] RegistryError),
    /// The family's dialect is not linked.
    #[error(transparent)]
    Dialect(#[from] UnknownName),
    /// The engine works on tokens, and the model has no tokenizer.
    #[error("{model} has no tokenizer.json, without which text cannot be turned into tokens")]
    NoTokenizer {
        /// The model.
        model: String,
    },
    /// The tokenizer cannot be read.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
}

impl Hint for VoiceError {
    fn hint(&self) -> Option<String> {
        match self {
            Self::NoTokenizer { .. } => {
                Some("download tokenizer.json from where the model was published, into the same directory".into())
            }
            Self::Tokenizer(error) => error.hint(),
            Self::Registry(_) | Self::Dialect(_) => None,
        }
    }
}

/// The templates that a model is talked with.
pub(crate) fn templates<'a>(profile: &'a ModelProfile, fallback: Option<&'a str>) -> Vec<&'a str> {
    match &profile.chat_template {
        Some(own) => {
            let tool_use = own.value.named.get(TOOL_TEMPLATE).map(String::as_str);
            tool_use.into_iter().chain([own.value.default.as_str()]).collect()
        }
        None => fallback.into_iter().collect(),
    }
}

/// Whether a template tells the model of the tools that a request offers.
pub(crate) fn mention_tools(templates: &[&str]) -> bool {
    templates.iter().any(|source| source.contains("tools"))
}

impl Voice {
    /// Finds the dialect and compiles the templates. A template that does not compile fails chat requests, not the
    /// model: text completions need none.
    pub fn of(profile: &ModelProfile, family: Option<&'static dyn ModelFamily>) -> Result<Self, VoiceError> {
        let conventions = family.map(ModelFamily::conventions);
        let own = profile.chat_template.as_ref();
        let fallback = conventions.and_then(|conventions| conventions.fallback_template);
        let sources = templates(profile, fallback);
        let choice = choice::choose(dialects()?, conventions.map(|conventions| conventions.dialect), &sources)?;
        tracing::info!(model = %profile.name, dialect = choice.dialect.id(), why = %choice.why, "reading its answers");
        let thinking = conventions.map_or(Thinking::Fixed, |conventions| conventions.thinking);
        let thinking = choice::thinking(thinking, &sources);
        let default_template = match (own, fallback) {
            (Some(own), _) => {
                tracing::info!(model = %profile.name, source = %own.source, "using the model's chat template");
                Template::compile(&own.value.default)
            }
            (None, Some(fallback)) => {
                tracing::warn!(
                    model = %profile.name,
                    family = family.map(|family| family.id()),
                    "the model comes without a chat template; using its family's fallback"
                );
                Template::compile(fallback)
            }
            (None, None) => {
                tracing::warn!(model = %profile.name, "the model has no chat template; only /v1/completions will work");
                Err(TemplateError::None)
            }
        };
        if let Err(error) = &default_template
            && *error != TemplateError::None
        {
            tracing::warn!(model = %profile.name, %error, "only /v1/completions will work");
        }
        let tool_template =
            own.and_then(|own| own.value.named.get(TOOL_TEMPLATE)).map(|source| Template::compile(source));
        let shows_tools = mention_tools(&sources);
        Ok(Self { thinking, shows_tools, dialect: choice.dialect, default_template, tool_template })
    }
}

impl ServedModel {
    /// Puts a loaded engine and its voice together; reads the tokenizer where the engine works on tokens.
    pub fn new(
        profile: Arc<ModelProfile>,
        voice: Voice,
        handle: EngineHandle,
        manner: Manner,
    ) -> Result<Self, VoiceError> {
        let capabilities = handle.capabilities();
        let on_tokens = capabilities.prompt == PromptForm::Tokens || capabilities.output == OutputForm::Tokens;
        let tokenizer = match (&profile.tokenizer, on_tokens) {
            (Some(path), true) => Some(Tokenizer::from_file(&path.value)?),
            (None, true) => return Err(VoiceError::NoTokenizer { model: profile.name.clone() }),
            (_, false) => None,
        };
        let defaults = match manner.generation_config {
            true => defaults::sampling(&profile, capabilities),
            false => Sampling::default(),
        };
        let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_secs());
        Ok(Self {
            profile,
            handle,
            thinking: voice.thinking,
            dialect: voice.dialect,
            tokenizer,
            since,
            spare_tokenizer: OnceCell::new(),
            manner,
            defaults,
            vocabularies: Mutex::default(),
            preparing: Semaphore::new(PREPARING_MAX),
            answered: AtomicBool::new(false),
            usage: Usage::new(),
            tally: OnceLock::new(),
            shows_tools: voice.shows_tools,
            default_template: voice.default_template,
            tool_template: voice.tool_template,
        })
    }

    /// A model that others serve, with an engine that takes conversations.
    pub(crate) fn elsewhere(offer: &ModelOffer, handle: EngineHandle, manner: Manner) -> Result<Self, VoiceError> {
        let dialects = dialects()?;
        // Those that this program does not know have ids of calls as anybody has them.
        let named = offer.dialect.as_deref().and_then(|id| dialects.get(id).ok());
        let voice = Voice {
            thinking: Thinking::Fixed,
            shows_tools: offer.tools,
            dialect: match named {
                Some(dialect) => dialect,
                None => dialects.get(PLAIN)?,
            },
            default_template: Err(TemplateError::None),
            tool_template: None,
        };
        let source = Source::file("another machine's offer");
        let format = Fact::new(offer.format.unwrap_or(WeightFormat::Safetensors), source);
        let bytes = offer.weight_bytes.unwrap_or(0);
        let profile = ModelProfile::of_files(offer.name.clone(), PathBuf::new(), Vec::new(), format, bytes);
        Self::new(Arc::new(profile), voice, handle, Manner { generation_config: false, ..manner })
    }

    /// Whether its engine takes conversations whole, and everything else that is made of them here for others.
    pub(crate) fn takes_conversations(&self) -> bool {
        self.handle.capabilities().prompt == PromptForm::Chat
    }

    /// The tokenizer that came with the model, if one did: read when it is first asked for, where the engine does without.
    pub(crate) async fn own_tokenizer(&self) -> Result<Option<Tokenizer>, TokenizerError> {
        if let Some(tokenizer) = &self.tokenizer {
            return Ok(Some(tokenizer.clone()));
        }
        let Some(path) = self.profile.tokenizer.as_ref().map(|fact| fact.value.clone()) else { return Ok(None) };
        let read = || async move {
            tokio::task::spawn_blocking(move || Tokenizer::from_file(&path))
                .await
                .unwrap_or(Err(TokenizerError::Malformed { what: "reading it failed".into() }))
        };
        self.spare_tokenizer.get_or_try_init(read).await.cloned().map(Some)
    }

    /// Notes that a request was answered whole.
    pub(crate) fn note_answer(&self) {
        self.answered.store(true, Ordering::Relaxed);
    }

    /// Whether any request was answered whole.
    pub(crate) fn has_answered(&self) -> bool {
        self.answered.load(Ordering::Relaxed)
    }

    /// Counts it under `name` from now on.
    pub(crate) fn count(&self, name: String, tally: Arc<Tally>) {
        self.tally.set((name, tally)).ok();
    }

    /// The name it is served under, and its counts, where it has a slot.
    pub(crate) fn tally(&self) -> Option<&(String, Arc<Tally>)> {
        self.tally.get()
    }

    /// Who uses it.
    pub fn usage(&self) -> Use {
        self.usage.now()
    }

    /// The sampling of requests that do not say: what the model's `generation_config.json` asks for.
    pub fn defaults(&self) -> &Sampling {
        &self.defaults
    }

    /// Its tokens, arranged for grammars, where the engine takes tokens. Special tokens named in `keep` are part of the text.
    /// Takes a moment at first.
    pub(crate) fn vocabulary(&self, keep: &[&'static str]) -> Result<Arc<Vocabulary>, ConstraintError> {
        let no_tokenizer = || ConstraintError::Tokenizer { what: "there is none".into() };
        let tokenizer = self.tokenizer.as_ref().ok_or_else(no_tokenizer)?;
        // Who comes second waits rather than doing the same.
        let mut made = self.vocabularies.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(vocabulary) = made.get(keep) {
            return Ok(vocabulary.clone());
        }
        let eos: Vec<u32> = self.profile.eos_token_ids.iter().map(|fact| fact.value).collect();
        let vocabulary = Arc::new(Vocabulary::new(tokenizer, keep, &eos)?);
        made.insert(keep.to_vec(), vocabulary.clone());
        Ok(vocabulary)
    }

    /// The template for a conversation with or without tools.
    pub(crate) fn template(&self, tools: bool) -> Result<&Template, TemplateError> {
        let template = self.tool_template.as_ref().filter(|_| tools).unwrap_or(&self.default_template);
        template.as_ref().map_err(Clone::clone)
    }

    /// What turns the engine's tokens into text, where it gives tokens. Special tokens named in `keep` stay in.
    pub(crate) fn decoder(&self, keep: &[&str], continues: bool) -> Option<StreamDecoder> {
        if self.handle.capabilities().output != OutputForm::Tokens {
            return None;
        }
        let keep = keep.iter().map(|token| (*token).to_owned()).collect();
        let options = DecoderOptions { keep, continues, ..DecoderOptions::default() };
        self.tokenizer.as_ref().map(|tokenizer| tokenizer.decoder_with(options))
    }
}

impl std::fmt::Debug for ServedModel {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("ServedModel").field("name", &self.profile.name).field("handle", &self.handle).finish()
    }
}
