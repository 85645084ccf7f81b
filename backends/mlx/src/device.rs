//! The device thread: the one owner of a model's arrays, from the first to the last.

use std::{
    any::Any,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{
        Arc, Mutex, MutexGuard, TryLockError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use mesh_core::{
    Capabilities, Device, DeviceKind, EngineHandle, EngineState, LoadError, LoadPlan, ProgressSink, Stage,
};
use mesh_graph::{Cache, CausalModel, Placement, Rows, Weights, ffi, graph_families, memory, needs_points};
use mlx_rs::{Array, error::Exception, transforms};
use serde_json::Value;
use tokio::sync::{mpsc, oneshot};

use crate::{
    backend::INFO,
    engine::{Admission, MlxEngine, Shared, Work},
    host,
    identity::Identity,
    judge::{self, Residency},
    memory::{FreeMemory, Question, Sizes, plan},
    prefix::DiskSettings,
    remember::Remembered,
    runner::{Parts, Runner},
    schedule::Limits,
    settings::Settings,
    threads,
    watchdog::{self, Doing},
};

/// Arrays evaluated between two reports of progress while loading.
const ARRAYS_PER_REPORT: usize = 16;

/// MLX's GPU backends do not bear several threads at once: whoever submits holds this.
static GATE: Mutex<()> = Mutex::new(());

/// How long a load waits for another model's step to end.
const GATE_PATIENCE: Duration = Duration::from_secs(60);

/// The same with an end: a device that hangs holds the gate for good.
fn gate_in_time(abandoned: &AtomicBool) -> Result<MutexGuard<'static, ()>, LoadError> {
    let since = Instant::now();
    loop {
        match GATE.try_lock() {
            Ok(guard) => return Ok(guard),
            Err(TryLockError::Poisoned(poisoned)) => return Ok(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) if abandoned.load(Ordering::Relaxed) => return Err(nobody_waits()),
            Err(TryLockError::WouldBlock) if since.elapsed() > GATE_PATIENCE => {
                let what =
                    "waiting for the device, which another model's step holds; restart mesh-llm if that goes on".into();
                return Err(LoadError::TimedOut { what, after: since.elapsed() });
            }
            Err(TryLockError::WouldBlock) => thread::sleep(Duration::from_millis(5)),
        }
    }
}

fn nobody_waits() -> LoadError {
    other("loading the model", "nobody waits for it any more")
}

/// How often a gate that is held by another thread is tried.
const GATE_POLL: Duration = Duration::from_micros(200);

/// Waits for the device to be free of other threads.
///
/// # Panics
///
/// A step that was given up holds the device: this engine fails as that one did, rather than wait for good.
pub fn gate() -> MutexGuard<'static, ()> {
    loop {
        match GATE.try_lock() {
            Ok(guard) => return guard,
            Err(TryLockError::Poisoned(poisoned)) => return poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => {
                assert!(!watchdog::hangs(), "another model's step holds the device and does not end");
                thread::sleep(GATE_POLL);
            }
        }
    }
}

/// Starts the device thread, and waits until the model is ready.
pub async fn load(plan: LoadPlan, progress: ProgressSink) -> Result<EngineHandle, LoadError> {
    let settings = Settings::read(&plan.settings).map_err(|what| LoadError::Settings { backend: INFO.id, what })?;
    let context = context(&plan)?;
    let residency = judge::residency(&plan.profile, &plan.offer.device);
    let mut device = plan.offer.device.clone();
    if let Some(share) = plan.memory_bytes {
        device.memory_bytes = Some(device.memory_bytes.map_or(share, |bytes| bytes.min(share)));
    }
    fits(&plan, &device, &settings, &residency)?;

    let eos = plan.profile.eos_token_ids.iter().map(|fact| fact.value).collect();
    let (name, config) = (plan.profile.name.clone(), plan.profile.config.clone());
    let identity = Identity {
        weights: plan.profile.weights.clone(),
        circumstances: format!("{} {} {config}", device.kind, residency.dequantize),
    };
    let build = move |abandoned: &AtomicBool| build(&plan, &residency, &progress, abandoned);
    start(Start { name, device, settings, context, config, eos, identity, build: Box::new(build) }).await
}

/// Makes a model, or gives up once the flag is set.
pub type Build = dyn FnOnce(&AtomicBool) -> Result<Built, LoadError> + Send;

/// A model that was made.
pub struct Built {
    /// The model.
    pub model: Box<dyn CausalModel>,
    /// What its weights take, in bytes.
    pub weights_bytes: u64,
}

/// Bytes of arrays.
pub fn bytes(arrays: &[Array]) -> u64 {
    arrays.iter().map(|array| array.nbytes() as u64).sum()
}

/// How long a sequence may become.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Context {
    /// In tokens.
    pub tokens: u32,
    /// Whether the user asked for it: then it is served or refused, never shortened.
    pub asked: bool,
}

/// What a device thread starts with.
pub struct Start {
    /// The model, for people.
    pub name: String,
    /// What it computes on.
    pub device: Device,
    /// Its settings.
    pub settings: Settings,
    /// How long sequences may become.
    pub context: Context,
    /// The model's config.json.
    pub config: Value,
    /// Tokens that end a generation.
    pub eos: Vec<u32>,
    /// Tells its files of prefixes from others'.
    pub identity: Identity,
    /// Makes the model, on the thread.
    pub build: Box<Build>,
}

/// What a device thread says once it is ready.
struct Ready {
    vocab_size: u32,
    capabilities: Capabilities,
    admission: Admission,
}

/// Starts a device thread, and waits until its model is ready.
pub async fn start(start: Start) -> Result<EngineHandle, LoadError> {
    let shared = Shared::starting();
    let places = start.settings.parallel(start.device.kind).saturating_add(start.settings.queue_requests_max) as usize;
    let (jobs, inbox) = mpsc::channel(places.max(1));
    let (ready, built) = oneshot::channel();
    let abandoned = Arc::new(AtomicBool::new(false));
    let _guard = AbandonOnDrop(abandoned.clone());
    let (device, step_max) = (start.device.clone(), Duration::from_secs(start.settings.step_s_max));
    let thread_shared = shared.clone();
    threads::spawn(move || run(start, &thread_shared, inbox, ready, &abandoned))
        .map_err(|error| LoadError::Other { what: "starting the device thread".into(), source: error.into() })?;
    tokio::spawn(watchdog::watch(shared.clone(), step_max));
    let mut state = shared.state.subscribe();
    let ready = tokio::select! {
        biased;
        built = built => built.unwrap_or_else(|_| Err(other("loading the model", "the device thread panicked"))),
        // A thread that hangs says nothing.
        over = state.wait_for(EngineState::is_over) => Err(match over.as_deref() {
            Ok(EngineState::Failed(what)) => other("loading the model", what.to_string()),
            _ => other("loading the model", "the device thread is gone"),
        }),
    }?;
    let Ready { vocab_size, capabilities, admission } = ready;
    let engine = MlxEngine { capabilities, admission, vocab_size, shared, jobs: Mutex::new(Some(jobs)) };
    Ok(EngineHandle::new(&INFO, device, Arc::new(engine)))
}

struct AbandonOnDrop(Arc<AtomicBool>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// What the user asked for, within what the model was made for.
fn context(plan: &LoadPlan) -> Result<Context, LoadError> {
    let own = plan.profile.context_tokens_max.as_ref().map(|fact| fact.value);
    match (plan.context_tokens, own) {
        (Some(asked), Some(own)) if asked > own => Err(LoadError::Settings {
            backend: INFO.id,
            what: format!("a context of {asked} tokens was asked for, and the model was made for {own}"),
        }),
        (asked, own) => {
            let tokens = asked.or(own).unwrap_or(judge::CONTEXT_TOKENS_DEFAULT).max(1);
            Ok(Context { tokens, asked: asked.is_some() })
        }
    }
}

/// Whether the weights alone would fit; what comes beside them is known once they are there.
fn fits(plan: &LoadPlan, device: &Device, settings: &Settings, residency: &Residency) -> Result<(), LoadError> {
    match device_bytes(device, settings) {
        Some(available) if residency.bytes > available => Err(LoadError::Memory {
            model: plan.profile.name.clone(),
            needed_bytes: residency.bytes,
            available_bytes: available,
        }),
        _ => Ok(()),
    }
}

/// Bytes of the device that may be used.
fn device_bytes(device: &Device, settings: &Settings) -> Option<u64> {
    let found = device.memory_bytes;
    settings.memory_bytes.map_or(found, |set| Some(found.map_or(set, |found| found.min(set))))
}

fn run(
    start: Start,
    shared: &Arc<Shared>,
    mut inbox: mpsc::Receiver<Work>,
    ready: oneshot::Sender<Result<Ready, LoadError>>,
    abandoned: &AtomicBool,
) {
    // Channels close when these two go: after the state says why.
    let mut runner = None;
    let body = AssertUnwindSafe(|| {
        ffi::use_device(start.device.kind);
        let (prepared, said) = match prepare(start, shared, abandoned) {
            Ok(prepared) => prepared,
            Err(error) => {
                let what = error.to_string();
                let _ = ready.send(Err(error));
                shared.state.send_replace(EngineState::Failed(what.into()));
                return;
            }
        };
        shared.state.send_replace(EngineState::Ready);
        if ready.send(Ok(said)).is_ok() {
            runner.insert(prepared).run(&mut inbox);
        }
    });
    if let Err(panic) = catch_unwind(body) {
        let what = format!("the device thread panicked: {}", panic_text(&*panic));
        tracing::error!("{what}");
        shared.state.send_replace(EngineState::Failed(what.into()));
    }
    drop(runner);
    memory::clear_cache();
    // One that failed or was given up stays so.
    shared.state.send_if_modified(|state| {
        let alive = !state.is_over();
        if alive {
            *state = EngineState::Stopped;
        }
        alive
    });
}

/// Builds the model, has it compute one token, and plans its memory with what that told.
fn prepare(start: Start, shared: &Arc<Shared>, abandoned: &AtomicBool) -> Result<(Runner, Ready), LoadError> {
    let Start { name, device, settings, context, config, eos, identity, build } = start;
    let device_bytes = device_bytes(&device, &settings);
    let Built { model, weights_bytes } = build(abandoned)?;
    let (blueprint, footprint) = {
        let _gate = gate_in_time(abandoned)?;
        let _doing = shared.doing(Doing::Load);
        let failed = |error: Exception| other("computing a first token", error.what().to_owned());
        let mut cache = model.new_cache();
        let first = model.forward(&Array::from_slice(&[0_u32], &[1, 1]), &mut cache, Rows::Last).map_err(failed)?;
        transforms::eval(cache.arrays().chain([&first])).map_err(failed)?;
        (cache.blueprint(), cache.footprint())
    };
    if device.kind == DeviceKind::Cuda && settings.warm_up {
        warm_up(&*model, settings.parallel(device.kind), shared, abandoned)?;
    }
    memory::clear_cache();
    let vocab_size = model.vocab_size();
    let sizes = Sizes::read(&config, vocab_size, device.kind);
    let parallel_max = settings.parallel(device.kind);
    let planned = plan(&Question {
        model: &name,
        device_bytes,
        weights_bytes,
        footprint: &footprint,
        sizes: &sizes,
        parallel_max,
        chunk_tokens: settings.prefill_chunk_tokens,
        context_tokens: context.tokens,
        asked: context.asked,
        sequences_bytes_max: settings.sequences_bytes_max,
    })?;
    tracing::info!(model = name, ?footprint, "{}", planned.reason);
    let remembered_bytes_max = settings.prefix_bytes_max.unwrap_or(planned.sequences_bytes / 2);
    let mut capabilities = judge::capabilities(planned.context_tokens, parallel_max);
    capabilities.requests_queued_max = settings.queue_requests_max;
    let needs_points = needs_points(&model.layout());
    let free_memory = FreeMemory { kind: device.kind, workspace_bytes: planned.workspace_bytes };
    let admission = Admission { footprint: footprint.clone(), memory_bytes: planned.sequences_bytes, free_memory };
    let runner = Runner::new(Parts {
        shared: shared.clone(),
        eos,
        limits: Limits {
            parallel_max,
            chunk_tokens: settings.prefill_chunk_tokens,
            chunk_tokens_in_company: settings.prefill_chunk_tokens.div_ceil(COMPANY_DIVISOR),
            memory_bytes: planned.sequences_bytes,
            remembered_bytes_max,
        },
        footprint,
        sizes,
        free_memory,
        remembered: Remembered::new(blueprint, needs_points, remembered_bytes_max, prefix_files(&settings, &identity)),
        model,
    });
    Ok((runner, Ready { vocab_size, capabilities, admission }))
}

/// The fewest rows of each kind of step that has kernels of its own on CUDA.
const KERNEL_ROWS: [u32; 3] = [2, 9, 17];

/// Has the device compute steps of every width, so that nobody's answer waits for a compiler, which takes seconds a kernel.
fn warm_up(
    model: &dyn CausalModel,
    parallel_max: u32,
    shared: &Shared,
    abandoned: &AtomicBool,
) -> Result<(), LoadError> {
    for rows in KERNEL_ROWS.into_iter().filter(|rows| *rows <= parallel_max) {
        if abandoned.load(Ordering::Relaxed) {
            return Err(nobody_waits());
        }
        let _gate = gate_in_time(abandoned)?;
        let _doing = shared.doing(Doing::Load);
        let since = Instant::now();
        let mut cache = Cache::padded(&model.layout(), &vec![0; rows as usize]);
        let tokens = Array::from_slice(&vec![0_u32; rows as usize], &[rows as i32, 1]);
        let step = model.forward(&tokens, &mut cache, Rows::Last);
        step.and_then(|logits| transforms::eval(cache.arrays().chain([&logits])))
            .map_err(|error| other("computing first tokens of several rows", error.what().to_owned()))?;
        tracing::info!(rows, ms = since.elapsed().as_millis() as u64, "kernels are ready");
    }
    Ok(())
}

/// Files of prefixes in the usual numbers: no folder of a desktop has more.
const PREFIX_FILES_MAX: usize = 16_384;

/// Where prefixes are kept, if they are.
fn prefix_files(settings: &Settings, identity: &Identity) -> Option<DiskSettings> {
    let bytes_max = settings.prefix_files_bytes_max;
    if bytes_max == 0 {
        return None;
    }
    let usual = || dirs::cache_dir().map(|dir| dir.join("mesh-llm").join("prefixes"));
    let Some(folder) = settings.prefix_files_dir.clone().or_else(usual) else {
        tracing::warn!("prefixes are not kept in files: there is no cache directory; `prefix_files_dir` names one");
        return None;
    };
    match identity.hash() {
        Ok(model) => Some(DiskSettings { folder, bytes_max, files_max: PREFIX_FILES_MAX, model }),
        Err(error) => {
            tracing::warn!("prefixes are not kept in files: the weights cannot be read: {error}");
            None
        }
    }
}

/// How much shorter chunks of prompts are while others wait for a token.
const COMPANY_DIVISOR: u32 = 4;

fn panic_text(panic: &(dyn Any + Send)) -> &str {
    panic.downcast_ref::<&str>().copied().or_else(|| panic.downcast_ref::<String>().map(String::as_str)).unwrap_or("?")
}

/// Builds the graph and reads the weights.
fn build(
    plan: &LoadPlan,
    residency: &Residency,
    progress: &ProgressSink,
    abandoned: &AtomicBool,
) -> Result<Built, LoadError> {
    let _gate = gate_in_time(abandoned)?;
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
    Ok(Built { model, weights_bytes: bytes(&arrays) })
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
    let total = bytes(arrays);
    let mut done = 0;
    for group in arrays.chunks(ARRAYS_PER_REPORT) {
        if abandoned.load(Ordering::Relaxed) {
            return Err(nobody_waits());
        }
        transforms::eval(group).map_err(|error| LoadError::Weights { what: error.what().to_owned() })?;
        done += bytes(group);
        report(done, total);
    }
    Ok(())
}

fn other(what: &str, source: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> LoadError {
    LoadError::Other { what: what.into(), source: source.into() }
}
