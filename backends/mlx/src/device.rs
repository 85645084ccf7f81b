//! The device thread: the one owner of a model's arrays, from the first to the last.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_core::{
    Capabilities, Device, DeviceKind, EngineError, EngineHandle, EngineState, Event, LoadError, LoadPlan, ProgressSink,
    Stage,
};
use mesh_graph::{CausalModel, Placement, Weights, ffi, graph_families, memory};
use mlx_rs::{Array, transforms};
use tokio::sync::{mpsc, oneshot, watch};

use crate::{
    backend::INFO,
    engine::{MlxEngine, Shared, Work},
    generate::{Listener, Request, Session},
    host,
    judge::{self, Residency},
    sampler::Sampler,
    settings::Settings,
};

/// How long a job may wait for a reader that does not read, before it is given up.
const READER_PATIENCE: Duration = Duration::from_secs(30);

/// Arrays evaluated between two reports of progress while loading.
const ARRAYS_PER_REPORT: usize = 16;

/// MLX's GPU backends do not bear several threads at once: whoever submits holds this.
static GATE: Mutex<()> = Mutex::new(());

/// Waits for the device to be free of other threads.
pub fn gate() -> MutexGuard<'static, ()> {
    GATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts the device thread, and waits until the model is ready.
pub async fn load(plan: LoadPlan, progress: ProgressSink) -> Result<EngineHandle, LoadError> {
    let settings = Settings::read(&plan.settings).map_err(|what| LoadError::Settings { backend: INFO.id, what })?;
    let mut capabilities = judge::capabilities(context(&plan)?);
    capabilities.requests_queued_max = settings.queue_requests_max;
    let residency = judge::residency(&plan.profile, &plan.offer.device);
    fits(&plan, &residency)?;

    let eos = plan.profile.eos_token_ids.iter().map(|fact| fact.value).collect();
    let (name, device) = (plan.profile.name.clone(), plan.offer.device.clone());
    let build = move |abandoned: &AtomicBool| build(&plan, &residency, &progress, abandoned);
    start(Start {
        name,
        device,
        capabilities,
        chunk_tokens: settings.prefill_chunk_tokens,
        eos,
        build: Box::new(build),
    })
    .await
}

/// Makes a model, or gives up once the flag is set.
pub type Build = dyn FnOnce(&AtomicBool) -> Result<Box<dyn CausalModel>, LoadError> + Send;

/// What a device thread starts with.
pub struct Start {
    /// Names the thread.
    pub name: String,
    /// What it computes on.
    pub device: Device,
    /// What it promises.
    pub capabilities: Capabilities,
    /// Prompt tokens computed at a time.
    pub chunk_tokens: u32,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Makes the model, on the thread.
    pub build: Box<Build>,
}

/// Starts a device thread, and waits until its model is ready.
pub async fn start(start: Start) -> Result<EngineHandle, LoadError> {
    let (state, _) = watch::channel(EngineState::Starting);
    let shared = Arc::new(Shared { state, cancelled: AtomicBool::new(false), admitted: AtomicU32::new(0) });
    let capabilities = start.capabilities.clone();
    let places = (capabilities.requests_parallel_max + capabilities.requests_queued_max) as usize;
    let (jobs, inbox) = mpsc::channel(places.max(1));
    let (ready, built) = oneshot::channel();
    let abandoned = Arc::new(AtomicBool::new(false));
    let _guard = AbandonOnDrop(abandoned.clone());
    let device = start.device.clone();
    let thread_shared = shared.clone();
    thread::Builder::new()
        .name(format!("mlx {}", start.name))
        .spawn(move || run(start, &thread_shared, inbox, ready, &abandoned))
        .map_err(|error| LoadError::Other { what: "starting the device thread".into(), source: error.into() })?;
    let vocab_size = built.await.unwrap_or_else(|_| Err(other("loading the model", "the device thread panicked")))?;
    let engine = MlxEngine { capabilities, vocab_size, shared, jobs: Mutex::new(Some(jobs)) };
    Ok(EngineHandle::new(&INFO, device, Arc::new(engine)))
}

struct AbandonOnDrop(Arc<AtomicBool>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// The context to serve, in tokens: what the user asked for, within what the model was made for.
fn context(plan: &LoadPlan) -> Result<u32, LoadError> {
    let own = plan.profile.context_tokens_max.as_ref().map(|fact| fact.value);
    match (plan.context_tokens, own) {
        (Some(asked), Some(own)) if asked > own => Err(LoadError::Settings {
            backend: INFO.id,
            what: format!("a context of {asked} tokens was asked for, and the model was made for {own}"),
        }),
        (asked, own) => Ok(asked.or(own).unwrap_or(judge::CONTEXT_TOKENS_DEFAULT).max(1)),
    }
}

fn fits(plan: &LoadPlan, residency: &Residency) -> Result<(), LoadError> {
    match plan.offer.device.memory_bytes {
        Some(available) if residency.bytes > available => Err(LoadError::Memory {
            model: plan.profile.name.clone(),
            needed_bytes: residency.bytes,
            available_bytes: available,
        }),
        _ => Ok(()),
    }
}

fn run(
    start: Start,
    shared: &Arc<Shared>,
    inbox: mpsc::Receiver<Work>,
    ready: oneshot::Sender<Result<u32, LoadError>>,
    abandoned: &AtomicBool,
) {
    let body = AssertUnwindSafe(|| {
        ffi::use_device(start.device.kind);
        let model = match (start.build)(abandoned) {
            Ok(model) => model,
            Err(error) => {
                shared.state.send_replace(EngineState::Failed(error.to_string().into()));
                let _ = ready.send(Err(error));
                return;
            }
        };
        let vocab_size = model.vocab_size();
        let session = Session::new(model, start.chunk_tokens);
        shared.state.send_replace(EngineState::Ready);
        if ready.send(Ok(vocab_size)).is_ok() {
            serve(session, inbox, shared, &start.eos, vocab_size);
        }
        memory::clear_cache();
        shared.state.send_replace(EngineState::Stopped);
    });
    if let Err(panic) = catch_unwind(body) {
        let what = format!("the device thread panicked: {}", panic_text(&*panic));
        tracing::error!("{what}");
        shared.state.send_replace(EngineState::Failed(what.into()));
    }
}

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?")
}

/// Builds the graph and reads the weights.
fn build(
    plan: &LoadPlan,
    residency: &Residency,
    progress: &ProgressSink,
    abandoned: &AtomicBool,
) -> Result<Box<dyn CausalModel>, LoadError> {
    let _gate = gate();
    let family = plan.family.map(|family| family.id()).unwrap_or_default();
    let family = graph_families()
        .map_err(|error| other("looking for the family", error))?
        .get(family)
        .map_err(|error| other("looking for the family", error))?;
    let device = plan.offer.device.kind;
    let placement = placement(device, residency.dequantize);
    let failed = |error: mesh_graph::GraphError| LoadError::Weights { what: error.to_string() };
    let mut weights = Weights::open(&plan.profile.weights, &plan.profile.config, placement).map_err(failed)?;
    let model = family.graph(&plan.profile.config, &mut weights).map_err(failed)?;
    let arrays = weights.finish().map_err(failed)?;
    let stage = Stage::Load { what: plan.profile.name.clone() };
    read(&arrays, abandoned, |done, total| progress.report(&stage, done, Some(total)))?;
    tracing::info!(
        model = plan.profile.name,
        device = %device,
        active_bytes = memory::active_bytes(),
        available_bytes = host::available_memory_bytes(),
        "model loaded: {}",
        residency.reason
    );
    Ok(model)
}

/// How weights are held on a device.
pub fn placement(device: DeviceKind, dequantize: bool) -> Placement {
    match device {
        DeviceKind::Cpu => Placement::cpu(dequantize),
        kind => Placement::gpu(kind),
    }
}

/// Reads weights that were opened lazily, telling `report` the bytes done and in all.
pub fn read(arrays: &[Array], abandoned: &AtomicBool, report: impl Fn(u64, u64)) -> Result<(), LoadError> {
    let total = arrays.iter().map(|array| array.nbytes() as u64).sum();
    let mut done = 0;
    for group in arrays.chunks(ARRAYS_PER_REPORT) {
        if abandoned.load(Ordering::Relaxed) {
            return Err(other("loading the model", "nobody waits for it any more"));
        }
        transforms::eval(group).map_err(|error| LoadError::Weights { what: error.what().to_owned() })?;
        done += group.iter().map(|array| array.nbytes() as u64).sum::<u64>();
        report(done, total);
    }
    Ok(())
}

fn other(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LoadError {
    LoadError::Other { what: what.into(), source: source.into() }
}

fn serve(mut session: Session, mut inbox: mpsc::Receiver<Work>, shared: &Shared, eos: &[u32], vocab_size: u32) {
    while let Some(work) = inbox.blocking_recv() {
        let Work { job, prompt, tokens_max, events, place } = work;
        let mut listener = Channel { events: &events, cancelled: &shared.cancelled };
        if !listener.listening() {
            if shared.cancelled.load(Ordering::Relaxed) {
                let _ = events.try_send(Err(EngineError::Stopped));
            }
            continue;
        }
        let request = Request {
            prompt: &prompt,
            tokens_max,
            eos: if job.ignore_eos { &[] } else { eos },
            sampler: Sampler::new(&job.sampling, vocab_size, rand::random()),
        };
        let outcome = session.generate(request, &mut listener);
        // The place is free before the last event is seen, so that a client may send its next request at once.
        drop(place);
        match outcome {
            Ok(Some(last)) => {
                listener.event(last);
            }
            Ok(None) if shared.cancelled.load(Ordering::Relaxed) => {
                let _ = events.try_send(Err(EngineError::Stopped));
            }
            Ok(None) => tracing::debug!(request = job.id, "the client left"),
            Err(error) => {
                tracing::error!(request = job.id, "generation failed: {}", error.what());
                session.forget();
                let _ = events.try_send(Err(EngineError::Failed { what: error.what().into() }));
            }
        }
    }
}

/// A job's events on their way out.
struct Channel<'a> {
    events: &'a mpsc::Sender<Result<Event, EngineError>>,
    cancelled: &'a AtomicBool,
}

impl Listener for Channel<'_> {
    fn event(&mut self, event: Event) -> bool {
        let mut event = Ok(event);
        let mut waiting_since = None;
        loop {
            match self.events.try_send(event) {
                Ok(()) => return self.listening(),
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
                Err(mpsc::error::TrySendError::Full(back)) => {
                    let since = *waiting_since.get_or_insert_with(Instant::now);
                    if since.elapsed() > READER_PATIENCE || !self.listening() {
                        tracing::warn!("a client does not read its answer: given up");
                        return false;
                    }
                    event = back;
                    thread::sleep(Duration::from_millis(1));
                }
            }
        }
    }

    fn listening(&self) -> bool {
        !self.events.is_closed() && !self.cancelled.load(Ordering::Relaxed)
    }
}
