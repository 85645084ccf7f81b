//! The server as others see it: models that come and go with it.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use mesh_core::{
    BackendInfo, Capabilities, Device, DeviceKind, EngineHandle, OutputForm, PromptForm,
    node::{Elsewhere, ModelOffer, NodeOffer, Reasoning, RemoteModel},
};
use serde_json::{Value, json};
use tokio::{
    sync::{Notify, Semaphore, watch},
    task::AbortHandle,
    time::{sleep, timeout},
};

use crate::{
    client::Upstream,
    engine::{Link, SharedModel},
    error::{self, Trouble},
    kind::{Kind, Thinking},
    look::{CONTEXT_UNTOLD, Facts, Found, Looker},
    options::{self, ShareError, ShareOptions},
};

/// Who serves what another server has.
pub static INFO: BackendInfo = BackendInfo {
    id: "openai",
    title: "models of another server, over its OpenAI-compatible API",
    formats: &[],
    opt_in: None,
};

/// Waits after the first look that failed; each further one doubles it.
const BACKOFF_MIN: Duration = Duration::from_millis(250);
/// Looks that fit into the longest one. A first look asks some twenty questions.
const LOOKS_WHOLE: u32 = 12;
/// Questions that the start waits for.
const LOOKS_START: u32 = 2;

/// A server whose models are offered. Dropping it ends the offers.
pub struct Shared {
    inner: Arc<Inner>,
    looking: AbortHandle,
}

struct Inner {
    name: String,
    link: Arc<Link>,
    requests_max: u32,
    state: Mutex<State>,
    changes: watch::Sender<u64>,
    /// Looks taken.
    looks: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    healthy: bool,
    /// Seconds since 1970 at which that began.
    since: u64,
    kind: Option<Kind>,
    version: Option<String>,
    models: BTreeMap<String, Listed>,
    left_out: usize,
    failures: u64,
    last_failure: Option<String>,
}

struct Listed {
    model: Arc<SharedModel>,
    facts: Facts,
}

impl Shared {
    /// Begins to share a server, and waits a moment for the first look at it. It need not be there yet. Has to be called inside
    /// a tokio runtime.
    pub async fn start(options: ShareOptions) -> Result<Arc<Self>, ShareError> {
        let name = options::name(&options.name)?;
        let address = options::address(&options.url)?;
        if let Some(own) = &options.own
            && own.is_at(&address).await
        {
            return Err(ShareError::Itself { url: options::shown(&options.url) });
        }
        let requests_max = options.requests_max.max(1);
        let link = Arc::new(Link {
            upstream: Upstream::new(&options)?,
            look: Notify::new(),
            places: Arc::new(Semaphore::new((requests_max as usize).min(Semaphore::MAX_PERMITS))),
            heard: Mutex::new(None),
        });
        let state = Mutex::new(State { since: now(), ..State::default() });
        let inner = Arc::new(Inner {
            name,
            link,
            requests_max,
            state,
            changes: watch::channel(0).0,
            looks: watch::channel(0).0,
        });
        let mut looks = inner.looks.subscribe();
        let first = options.look_max * LOOKS_START;
        let looking = tokio::spawn(keep_looking(inner.clone(), options)).abort_handle();
        let shared = Arc::new(Self { inner, looking });
        // Whatever it finds later is found later.
        let _ = timeout(first, looks.wait_for(|looks| *looks > 0)).await;
        Ok(shared)
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.looking.abort();
        self.inner.lock().models.values().for_each(|listed| listed.model.gone());
    }
}

async fn keep_looking(inner: Arc<Inner>, options: ShareOptions) {
    let mut looker = Looker::new(options.look_max, options.own.map(|own| own.instance));
    let mut backoff = BACKOFF_MIN.min(options.backoff_max);
    loop {
        let begun = Instant::now();
        let within = options.look_max * LOOKS_WHOLE;
        let look = timeout(within, looker.look(&inner.link.upstream)).await;
        let healthy = match look.unwrap_or(Err(Trouble::Silent(within))) {
            Ok(found) => {
                inner.found(found);
                true
            }
            // Too busy to answer questions, and not gone: it goes on answering requests.
            Err(Trouble::Silent(_)) if inner.heard_since(begun) => true,
            Err(trouble) => {
                looker.forget();
                inner.lost(&trouble);
                false
            }
        };
        inner.looks.send_modify(|looks| *looks += 1);
        let wait = if healthy { options.interval } else { backoff };
        backoff = if healthy { BACKOFF_MIN } else { backoff * 2 }.min(options.backoff_max);
        tokio::select! {
            () = sleep(wait) => {}
            // What made somebody wonder may do so many times a second.
            () = async { inner.link.look.notified().await; sleep(BACKOFF_MIN.min(wait)).await } => {}
        }
    }
}

impl Inner {
    fn lock(&self) -> MutexGuard<'_, State> {
        // Nothing that holds the lock panics half-way.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn heard_since(&self, begun: Instant) -> bool {
        self.link.heard.lock().unwrap_or_else(PoisonError::into_inner).is_some_and(|heard| heard >= begun)
    }

    fn found(&self, found: Found) {
        let Found { kind, version, models, left_out } = found;
        let mut state = self.lock();
        if !state.healthy {
            tracing::info!(node = %self.name, %kind, models = models.len(), "the shared server answers");
            (state.healthy, state.since) = (true, now());
        }
        if left_out > state.left_out {
            tracing::warn!(node = %self.name, left_out, "models of the shared server are not offered");
        }
        (state.kind, state.version, state.left_out) = (Some(kind), version, left_out);
        let (mut before, mut changed) = (std::mem::take(&mut state.models), false);
        for facts in models {
            let name = facts.name.clone();
            let listed = match before.remove(&name) {
                Some(same) if same.facts == facts => same,
                other => {
                    changed = true;
                    let since = other.as_ref().map_or_else(now, |other| other.model.offer.since);
                    if let Some(other) = other {
                        other.model.gone();
                    }
                    let offer = offer(&facts, self.requests_max, since);
                    tracing::debug!(?offer, "a model of the shared server is offered");
                    let (id, manners) = (facts.id.clone(), facts.manners.clone());
                    let model = Arc::new(SharedModel::new(offer, id, manners, self.link.clone()));
                    Listed { model, facts }
                }
            };
            state.models.insert(name, listed);
        }
        changed |= !before.is_empty();
        drop(state);
        self.withdraw(before, changed);
    }

    fn lost(&self, trouble: &Trouble) {
        let veil = &self.link.upstream.veil;
        let mut state = self.lock();
        if state.healthy || state.failures == 0 {
            let trouble = veil.over(&trouble.to_string());
            tracing::warn!(node = %self.name, %trouble, "the shared server cannot be used; its models are not offered");
        }
        if state.healthy {
            (state.healthy, state.since) = (false, now());
        }
        state.failures += 1;
        state.last_failure = Some(error::rejection(trouble, veil).message);
        let models = std::mem::take(&mut state.models);
        drop(state);
        let changed = !models.is_empty();
        self.withdraw(models, changed);
    }

    fn withdraw(&self, models: BTreeMap<String, Listed>, changed: bool) {
        models.values().for_each(|listed| listed.model.gone());
        if changed {
            self.changes.send_modify(|changes| *changes += 1);
        }
    }

    fn node_offer(&self, model: &SharedModel) -> NodeOffer {
        NodeOffer { node: self.name.clone(), offer: model.offer_now() }
    }
}

fn now() -> u64 {
    SystemTime::UNIX_EPOCH.elapsed().map_or(0, |since| since.as_secs())
}

fn offer(facts: &Facts, requests_max: u32, since: u64) -> ModelOffer {
    let Facts { name, manners, .. } = facts;
    let requests_parallel_max = facts.parallel.unwrap_or(requests_max).min(requests_max);
    let reasoning = match manners.thinking {
        Thinking::None => Reasoning::None,
        Thinking::Variables { effort: true, .. } | Thinking::Effort => Reasoning::Effort,
        Thinking::Variables { effort: false, .. } => Reasoning::Switch,
        Thinking::Fields => match facts.reasoning.as_deref() {
            Some("switch") => Reasoning::Switch,
            Some("effort") => Reasoning::Effort,
            _ => Reasoning::None,
        },
    };
    let context_tokens_max = facts.context_tokens.unwrap_or(CONTEXT_UNTOLD);
    let capabilities = Capabilities {
        knobs: manners.knobs.clone(),
        requests_parallel_max,
        requests_queued_max: requests_max - requests_parallel_max,
        // Documented of these, unless they are started otherwise.
        prefix_reuse: matches!(manners.kind, Kind::LlamaServer | Kind::Ollama | Kind::MeshLlm),
        embeddings: manners.embeddings,
        ..Capabilities::new(PromptForm::Chat, OutputForm::Parts, context_tokens_max)
    };
    ModelOffer {
        reference: facts.reference.clone(),
        quantization: facts.quantization.clone(),
        parameters: facts.parameters,
        weight_bytes: facts.weight_bytes,
        chat: manners.chat,
        tools: manners.tools && manners.chat,
        reasoning,
        since,
        ..ModelOffer::new(name, INFO.id, capabilities)
    }
}

impl Elsewhere for Shared {
    fn kind(&self) -> &'static str {
        "share"
    }

    fn models(&self) -> Vec<RemoteModel> {
        let state = self.inner.lock();
        let remote = |(name, listed): (&String, &Listed)| RemoteModel {
            name: name.clone(),
            nodes: vec![self.inner.node_offer(&listed.model)],
        };
        state.models.iter().map(remote).collect()
    }

    fn engine(&self, name: &str) -> Option<(EngineHandle, NodeOffer)> {
        let state = self.inner.lock();
        let at_node = || {
            let (model, node) = name.rsplit_once('@')?;
            state.models.get(model).filter(|_| node == self.inner.name)
        };
        let listed = state.models.get(name).or_else(at_node)?;
        let device = Device { kind: DeviceKind::External, name: self.inner.name.clone(), memory_bytes: None };
        let offer = self.inner.node_offer(&listed.model);
        Some((EngineHandle::new(&INFO, device, listed.model.clone()), offer))
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.inner.changes.subscribe()
    }

    fn status(&self) -> Value {
        let state = self.inner.lock();
        let model = |(name, listed): (&String, &Listed)| {
            let offer = listed.model.offer_now();
            json!({
                "name": name,
                "context_length": offer.capabilities.context_tokens_max,
                // False where the server does not tell, and the usual is assumed.
                "context_told": listed.facts.context_tokens.is_some(),
                "chat": offer.chat,
                "tools": offer.tools,
                "embeddings": offer.capabilities.embeddings,
                "parameters": offer.capabilities.knobs,
                "running": offer.load.running,
            })
        };
        json!({
            "name": self.inner.name,
            "kind": state.kind,
            "version": state.version,
            "healthy": state.healthy,
            "since": state.since,
            "models": state.models.iter().map(model).collect::<Vec<_>>(),
            "models_left_out": state.left_out,
            "failures": state.failures,
            "last_failure": state.last_failure,
        })
    }
}
