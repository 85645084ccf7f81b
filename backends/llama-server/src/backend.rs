//! The backend itself.

use std::{path::PathBuf, sync::Arc};

use async_trait::async_trait;
use mesh_core::{
    BackendInfo, Device, DeviceKind, EngineHandle, Host, InferenceBackend, LoadError, LoadPlan, ModelFamily,
    ModelProfile, Need, ProgressSink, Reason, Stage, Verdict, WeightFormat,
};
use serde_json::Value;

use crate::{
    engine::LlamaEngine,
    find::{self, Found, Places},
    install::{self, InstallOptions},
    judge,
    launch::{self, Launched, Shape},
    memory,
    settings::Settings,
    share::Share,
};

/// What it is.
pub const INFO: BackendInfo = BackendInfo {
    id: "llama-server",
    title: "llama.cpp's server, as a process of its own",
    formats: &[WeightFormat::Gguf],
    opt_in: None,
};

/// The registered backend.
pub static BACKEND: LlamaServer = LlamaServer;

/// The command that installs llama-server.
const INSTALL_COMMAND: &str = "mesh-llm backends install llama-server";

/// llama.cpp's `llama-server` as a backend. Stateless.
#[derive(Clone, Copy, Debug, Default)]
pub struct LlamaServer;

#[async_trait]
impl InferenceBackend for LlamaServer {
    fn info(&self) -> &'static BackendInfo {
        &INFO
    }

    fn host(&self, settings: &Value) -> Host {
        let settings = match Settings::parse(settings) {
            Ok(settings) => settings,
            Err(error) => return Host::new(Err(settings_error(error).to_string()), Vec::new()),
        };
        let device =
            || Device { kind: DeviceKind::External, name: INFO.id.to_owned(), memory_bytes: memory::available_bytes() };
        match located(&settings) {
            Ok(Some(found)) => {
                let note = format!("llama-server: {} ({})", found.path.display(), found.origin);
                Host::new(Ok(device()), vec![note])
            }
            Ok(None) if settings.install => match install::outlook() {
                Ok(outlook) => {
                    let note = format!("llama-server is not installed; it would be when first needed: {outlook}");
                    Host::new(Ok(device()), vec![note])
                }
                Err(error) => Host::new(Err(error.to_string()), Vec::new()),
            },
            Ok(None) => Host::new(Err(format!("{}: run {INSTALL_COMMAND}", not_allowed())), Vec::new()),
            Err(error) => Host::new(Err(error.to_string()), Vec::new()),
        }
    }

    fn judge(&self, profile: &ModelProfile, _: Option<&dyn ModelFamily>, host: &Host) -> Verdict {
        judge::judge(profile, host)
    }

    fn need(&self, profile: &ModelProfile, host: &Host, context_tokens: u32) -> Option<Need> {
        judge::need(profile, host, context_tokens)
    }

    async fn load(&self, plan: LoadPlan, progress: ProgressSink) -> Result<EngineHandle, LoadError> {
        let engine = self.load_engine(&plan, progress).await?;
        Ok(EngineHandle::new(&INFO, plan.offer.device.clone(), Arc::new(engine)))
    }
}

impl LlamaServer {
    /// As [`InferenceBackend::load`], for callers that ask this engine more than every engine is asked.
    ///
    /// # Errors
    ///
    /// The same.
    pub async fn load_engine(&self, plan: &LoadPlan, progress: ProgressSink) -> Result<LlamaEngine, LoadError> {
        let settings = Settings::parse(&plan.settings).map_err(settings_error)?;
        let binary = binary(&settings, &progress).await?;
        let profile = &plan.profile;
        let Some(model) = profile.weights.first() else {
            return Err(LoadError::Weights { what: format!("{}: no GGUF file", profile.root.display()) });
        };
        let context_tokens = context(plan, &settings)?;
        let (slots, cache_mib) = (settings.parallel_requests_max, settings.prompt_cache_mib);
        let share = Share::choose(profile, plan.offer.device.memory_bytes, context_tokens, slots, cache_mib);
        log(&profile.name, &share.reasons);
        let shape =
            Shape { context_tokens, slots: share.slots, slots_chosen: slots.is_none(), cache_mib: share.cache_mib };

        let stage = Stage::Load { what: profile.name.clone() };
        let total = profile.weight_bytes.value;
        progress.report(&stage, 0, Some(total));
        let launched = launch::launch(&binary, model, &profile.name, shape, &settings).await?;
        progress.report(&stage, total, Some(total));

        let Launched { process, client, slots, vocab_size, .. } = launched;
        if launched.context_tokens < context_tokens {
            tracing::warn!(
                asked = context_tokens,
                given = launched.context_tokens,
                "llama-server gives {} a shorter context than it was asked for",
                profile.name
            );
        }
        // llama.cpp rounds a context up; what was asked for is what is promised.
        let context_tokens = context_tokens.min(launched.context_tokens);
        let capabilities = judge::capabilities(context_tokens, slots, settings.queue_requests_max);
        Ok(LlamaEngine::new(process, client, capabilities, vocab_size))
    }
}

fn install_dir(settings: &Settings) -> Option<PathBuf> {
    settings.install_dir.clone().or_else(install::default_install_dir)
}

fn located(settings: &Settings) -> Result<Option<Found>, find::NotExecutable> {
    let installed = install_dir(settings).map(|dir| install::candidates(&dir)).unwrap_or_default();
    find::find(&Places::here(settings.path.as_deref(), installed), &find::is_executable)
}

fn not_allowed() -> String {
    "llama-server is not installed, and the settings forbid installing it".to_owned()
}

fn not_installed(what: String) -> LoadError {
    LoadError::NotInstalled { what, command: INSTALL_COMMAND.to_owned() }
}

fn settings_error(error: impl ToString) -> LoadError {
    LoadError::Settings { backend: INFO.id, what: error.to_string() }
}

/// The binary to run, installed if need be and allowed.
async fn binary(settings: &Settings, progress: &ProgressSink) -> Result<PathBuf, LoadError> {
    if let Some(found) = located(settings).map_err(|error| not_installed(error.to_string()))? {
        tracing::info!(binary = %found.path.display(), "llama-server {}", found.origin);
        return Ok(found.path);
    }
    if !settings.install {
        return Err(not_installed(not_allowed()));
    }
    let no_directory = || not_installed(install::InstallError::NoDirectory.to_string());
    let options = InstallOptions::new(install_dir(settings).ok_or_else(no_directory)?);
    let installed = install::install(&options, progress).await.map_err(|error| not_installed(error.to_string()))?;
    Ok(installed.binary)
}

fn log(model: &str, reasons: &[Reason]) {
    let reasons: Vec<String> = reasons.iter().map(ToString::to_string).collect();
    tracing::info!(model, "{}", reasons.join("; "));
}

/// The context of one request, in tokens, and a line in the log on how it came about.
fn context(plan: &LoadPlan, settings: &Settings) -> Result<u32, LoadError> {
    let profile = &plan.profile;
    if let Some(asked) = plan.context_tokens {
        let own = profile.context_tokens_max.as_ref().map_or(u32::MAX, |own| own.value);
        if asked == 0 || asked > own {
            let what = format!("a context of {asked} tokens was asked for; {} has 1 to {own}", profile.name);
            return Err(settings_error(what));
        }
        tracing::info!(model = profile.name, "context: {asked} tokens, as asked for");
        return Ok(asked);
    }
    let offered = plan.offer.capabilities.context_tokens_max;
    // Slots that nobody asked for take nothing from the context.
    let slots = settings.parallel_requests_max.unwrap_or(1);
    // Less than was offered for is a bound of its own; what was offered for was chosen by what the device has.
    let squeezed = plan.memory_bytes.filter(|bytes| plan.offer.memory_bytes.is_some_and(|offered| *bytes < offered));
    let choice = judge::choose_context(profile, squeezed.or(plan.offer.device.memory_bytes), slots);
    log(&profile.name, &choice.reasons);
    // An offer is a promise from above as well: whoever made it may know more about memory than we do.
    Ok(choice.tokens.min(offered).max(1))
}
