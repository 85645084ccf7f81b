//! Other machines as a backend: they serve what is ready there, and it takes nothing of this machine.

use std::{
    fmt,
    sync::{Arc, Mutex, PoisonError, Weak},
};

use async_trait::async_trait;
use mesh_core::{
    BackendInfo, Device, DeviceKind, EngineHandle, Host, InferenceBackend, LoadError, LoadPlan, ModelFamily,
    ModelProfile, Offer, OptIn, ProgressSink, Reason, Refusal, Verdict,
    node::{Elsewhere, ModelOffer, NodeOffer},
    register_backend,
};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{home::Home, mesh::Mesh};

/// What it is.
pub static INFO: BackendInfo = BackendInfo {
    id: "mesh",
    title: "other machines, which have the model ready",
    // What is stored here does not matter.
    formats: &[],
    opt_in: Some(OptIn { flag: "--backend mesh", notice: "requests go to other machines of the mesh" }),
};

/// Below every engine of this machine: requests for a model that is not loaded here go to others without an election.
const SCORE: u32 = 1;

/// The registered backend.
pub static BACKEND: Others = Others;

register_backend!(&BACKEND);

/// The node of this process. There is one at most; in tests, the last counts.
static RUNNING: Mutex<Weak<Mesh>> = Mutex::new(Weak::new());

/// Notes that this process takes part by that node.
pub fn runs(mesh: Weak<Mesh>) {
    *RUNNING.lock().unwrap_or_else(PoisonError::into_inner) = mesh;
}

/// Other machines of the mesh as a backend.
#[derive(Clone, Copy, Debug)]
pub struct Others;

/// What a process that takes part in no mesh is told of one, as this backend's settings.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Told {
    /// The mesh's name.
    pub mesh: String,
    /// Its offers.
    pub offers: Vec<NodeOffer>,
}

#[async_trait]
impl InferenceBackend for Others {
    fn info(&self) -> &'static BackendInfo {
        &INFO
    }

    fn host(&self, settings: &Value) -> Host {
        host(match running() {
            Some(mesh) => Ok(Told {
                mesh: mesh.name().to_owned(),
                offers: mesh.models().into_iter().flat_map(|model| model.nodes).collect(),
            }),
            None => told(settings),
        })
    }

    fn judge(&self, profile: &ModelProfile, _: Option<&dyn ModelFamily>, host: &Host) -> Verdict {
        let device = match &host.device {
            Ok(device) => device.clone(),
            Err(why) => return Verdict::Refuse(Refusal::because(Reason::new(why))),
        };
        let same: Vec<&NodeOffer> = host.others.iter().filter(|other| is(profile, &other.offer)).collect();
        let Some(common) = common(same.iter().map(|other| &other.offer)) else {
            let none = Reason::new(format!("no other machine has `{}` ready", profile.name));
            return Verdict::Refuse(Refusal::because(none).hint("mesh-llm mesh status shows what they have"));
        };
        Verdict::Serve(Offer {
            capabilities: common.capabilities,
            device,
            memory_bytes: Some(0),
            score: SCORE,
            reasons: same.into_iter().map(reason).collect(),
        })
    }

    async fn load(&self, plan: LoadPlan, _: ProgressSink) -> Result<EngineHandle, LoadError> {
        let name = &plan.profile.name;
        let failed = |source: Gone| LoadError::Other { what: format!("serving {name}"), source: Box::new(source) };
        let mesh = running().ok_or_else(|| failed(Gone(nowhere())))?;
        let offered =
            mesh.models().into_iter().find(|model| model.nodes.iter().any(|one| is(&plan.profile, &one.offer)));
        let engine = offered.and_then(|model| mesh.engine(&model.name));
        let (handle, _) = engine.ok_or_else(|| failed(Gone("no other machine has it ready any more".into())))?;
        Ok(handle)
    }
}

fn running() -> Option<Arc<Mesh>> {
    RUNNING.lock().unwrap_or_else(PoisonError::into_inner).upgrade()
}

/// What this process knows of a mesh that it takes no part in, or why it knows nothing.
fn told(settings: &Value) -> Result<Told, String> {
    match settings {
        Value::Null => Err(nowhere()),
        settings => Told::deserialize(settings).map_err(|error| format!("settings of {}: {error}", INFO.id)),
    }
}

fn host(told: Result<Told, String>) -> Host {
    match told {
        Ok(Told { mesh, offers }) => Host { others: offers, ..Host::new(Ok(device(&mesh)), Vec::new()) },
        Err(why) => Host::new(Err(why), Vec::new()),
    }
}

/// Why other machines do not serve it after all.
#[derive(Debug)]
struct Gone(String);

impl fmt::Display for Gone {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Gone {}

/// Why this process reaches no other machine.
fn nowhere() -> String {
    match Home::usual().and_then(|home| home.membership()) {
        Ok(Some(member)) => {
            let mesh = member.mesh_name;
            format!("no server of this machine takes part in the mesh {mesh} now: mesh-llm serve, or mesh-llm client")
        }
        Ok(None) => "this machine is in no mesh: mesh-llm mesh create, or mesh-llm serve --join TICKET".into(),
        Err(error) => error.to_string(),
    }
}

/// Where engines of a mesh are.
pub fn device(mesh: &str) -> Device {
    Device { kind: DeviceKind::External, name: format!("machines of the mesh {mesh}"), memory_bytes: None }
}

/// Whether that is the model.
fn is(profile: &ModelProfile, offer: &ModelOffer) -> bool {
    let last = |reference: &String| reference.rsplit('/').next() == Some(profile.name.as_str());
    offer.name == profile.name || offer.reference.as_ref().is_some_and(last)
}

/// What may be asked of whichever of them is chosen; `None` if there are none.
pub fn common<'o>(offers: impl IntoIterator<Item = &'o ModelOffer>) -> Option<ModelOffer> {
    let mut offers = offers.into_iter();
    let first = offers.next()?.clone();
    Some(offers.fold(first, |mut common, other| {
        let (ours, theirs) = (&mut common.capabilities, &other.capabilities);
        ours.knobs.retain(|knob| theirs.knobs.contains(knob));
        ours.context_tokens_max = ours.context_tokens_max.max(theirs.context_tokens_max);
        ours.embeddings |= theirs.embeddings;
        common
    }))
}

fn reason(NodeOffer { node, offer }: &NodeOffer) -> Reason {
    let quantization = offer.quantization.as_ref().map(|quantization| format!(" in {quantization}"));
    Reason::new(format!(
        "{node} has it ready by {}{}, up to {} tokens; {} running, {} waiting",
        offer.backend,
        quantization.unwrap_or_default(),
        offer.capabilities.context_tokens_max,
        offer.load.running,
        offer.load.waiting
    ))
}

#[cfg(test)]
mod tests {
    use mesh_core::{Capabilities, Fact, Knob, OutputForm, PromptForm, Source, WeightFormat, node::Load};
    use serde_json::json;

    use super::*;

    fn offer(node: &str, name: &str, knobs: &[Knob], context_tokens: u32) -> NodeOffer {
        let capabilities = Capabilities {
            knobs: knobs.iter().copied().collect(),
            ..Capabilities::new(PromptForm::Tokens, OutputForm::Tokens, context_tokens)
        };
        let load = Load { running: 2, waiting: 1, ..Load::default() };
        NodeOffer { node: node.into(), offer: ModelOffer { load, ..ModelOffer::new(name, "mlx", capabilities) } }
    }

    fn judged(name: &str, offers: Vec<NodeOffer>) -> Verdict {
        let told = Told { mesh: "home".into(), offers };
        let host = host(super::told(&serde_json::to_value(told).unwrap()));
        assert_eq!(host.device.as_ref().map(|device| device.name.as_str()), Ok("machines of the mesh home"));
        BACKEND.judge(&profile(name), None, &host)
    }

    fn profile(name: &str) -> ModelProfile {
        let format = Fact::new(WeightFormat::Safetensors, Source::file("config.json"));
        ModelProfile::of_files(name.into(), "/models".into(), Vec::new(), format, 1 << 30)
    }

    #[test]
    fn who_has_the_model_ready_is_why_they_would_serve_it() {
        let offers = vec![
            offer("tower", "a", &[Knob::Temperature, Knob::Seed], 4096),
            offer("attic", "b", &[], 1 << 20),
            offer("shed", "a", &[Knob::Seed, Knob::TopP], 8192),
        ];
        let Verdict::Serve(served) = judged("a", offers.clone()) else { panic!("two have it") };
        assert_eq!(served.capabilities.knobs, [Knob::Seed].into(), "what both take");
        assert_eq!((served.capabilities.context_tokens_max, served.memory_bytes), (8192, Some(0)));
        let reasons: Vec<String> = served.reasons.iter().map(Reason::to_string).collect();
        let of = |node: &str, tokens: u32| {
            format!("{node} has it ready by mlx, up to {tokens} tokens; 2 running, 1 waiting")
        };
        assert_eq!(reasons, [of("tower", 4096), of("shed", 8192)]);
        let Verdict::Refuse(refusal) = judged("c", offers) else { panic!("nobody has it") };
        assert_eq!(refusal.to_string(), "no other machine has `c` ready");
        assert!(refusal.hint.is_some());
    }

    #[test]
    fn a_model_of_another_name_is_known_by_its_repository() {
        let mut other = offer("tower", "chat", &[], 4096);
        assert!(matches!(judged("Qwen3-8B", vec![other.clone()]), Verdict::Refuse(_)));
        other.offer.reference = Some("Qwen/Qwen3-8B".into());
        assert!(matches!(judged("Qwen3-8B", vec![other.clone()]), Verdict::Serve(_)));
        assert!(matches!(judged("8B", vec![other]), Verdict::Refuse(_)));
    }

    #[test]
    fn settings_that_it_has_not_are_refused() {
        let host = host(told(&json!({ "port": 1 })));
        assert!(host.device.unwrap_err().contains("unknown field `port`"));
    }
}
