//! A backend whose engine plays a script, and a server in front of it.

#[path = "fake_model.rs"]
mod model;

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering},
    },
    time::Duration,
};

use self::model::{BYTES_TOKENIZER, FakeFamily, FixedLocate, profile};
use async_trait::async_trait;
use futures::{StreamExt, stream};
use mesh_core::*;
use mesh_llm::{
    listen::{self, Options},
    slots::{Keeping, Slots, Starter},
    voting::Electorate,
};
use serde_json::{Value, json};
use tokio::{
    net::TcpListener,
    sync::{Notify, Semaphore, oneshot, watch},
    task::JoinHandle,
};

/// What the engine does with a job, step by step.
#[derive(Clone, Debug)]
pub enum Step {
    /// Reports a piece of text of one token.
    Text(&'static str),
    /// The same, so likely.
    Likely(&'static str, f32),
    /// Reports the bytes as tokens, one each.
    Bytes(&'static [u8]),
    /// Reports that the prompt is read.
    Prefill(u32),
    /// Reports that so many of so many tokens are read.
    Reading(u32, u32),
    /// Reports that so many are ahead.
    Queued(u32),
    /// Waits a moment.
    Pause,
    /// Waits until the test lets it go on.
    Wait,
    /// Waits for ever.
    Hang,
    /// Ends with this reason.
    Finish(FinishReason),
    /// Breaks.
    Fail,
    /// Waits until the test lets it go on, and breaks before the job's turn came.
    FailInLine,
}

/// What a test sets and sees.
pub struct Fake {
    /// What every job gets.
    pub script: Mutex<Vec<Step>>,
    /// What the next jobs get instead, one each.
    pub scripts: Mutex<VecDeque<Vec<Step>>>,
    /// Refuse jobs as busy from this one on.
    pub jobs_max: AtomicU32,
    /// The jobs so far.
    pub jobs: Mutex<Vec<Job>>,
    /// Refuse jobs as busy.
    pub busy: AtomicBool,
    /// Fail this many loads.
    pub failing_loads: AtomicU32,
    /// Loads so far.
    pub loads: AtomicU32,
    /// Loads wait until told to go on, if true.
    pub hold_loads: AtomicBool,
    /// Tells them.
    pub go_on: Notify,
    /// Event streams that were dropped before their end.
    pub dropped: AtomicU32,
    /// Events that were taken.
    pub taken: AtomicU32,
    /// Bytes it says that it needs; 0 says nothing.
    pub memory_bytes: AtomicU64,
    /// Bytes its device says that it has; 0 says nothing.
    pub device_bytes: AtomicU64,
    /// Steps that wait take one each.
    pub steps: Semaphore,
    /// Drains so far.
    pub drains: AtomicU32,
    /// How it is presented.
    pub manner: Mutex<mesh_llm::defaults::Manner>,
    /// What its model's generation_config.json says.
    pub generation_config: Mutex<Value>,
    /// The context it was judged with, and the share of memory it was loaded with, each time.
    pub terms: Mutex<Vec<(u32, Option<u64>)>>,
    /// What was to be embedded so far.
    pub embeds: Mutex<Vec<Embed>>,
    state: watch::Sender<EngineState>,
    capabilities: Capabilities,
    /// Tells what it makes of a text: a token for each byte.
    shares_tokens: bool,
}

/// All of them.
const KNOBS: [Knob; 18] = [
    Knob::Temperature,
    Knob::TopP,
    Knob::TopK,
    Knob::MinP,
    Knob::TypicalP,
    Knob::Xtc,
    Knob::Dry,
    Knob::Seed,
    Knob::RepetitionPenalty,
    Knob::PresencePenalty,
    Knob::FrequencyPenalty,
    Knob::LogitBias,
    Knob::IgnoreEos,
    Knob::MinTokens,
    Knob::Logprobs,
    Knob::JsonSchema,
    Knob::Regex,
    Knob::Lark,
];

static INFO: BackendInfo =
    BackendInfo { id: "fake", title: "plays a script", formats: &[WeightFormat::Safetensors], opt_in: None };

fn some(bytes: &AtomicU64) -> Option<u64> {
    Some(bytes.load(Ordering::SeqCst)).filter(|bytes| *bytes > 0)
}

struct FakeBackend(Arc<Fake>);

#[async_trait]
impl InferenceBackend for FakeBackend {
    fn info(&self) -> &'static BackendInfo {
        &INFO
    }

    fn host(&self, _: &Value) -> Host {
        let memory_bytes = some(&self.0.device_bytes);
        Host::new(Ok(Device { kind: DeviceKind::Cpu, name: "a test".into(), memory_bytes }), vec![])
    }

    fn judge(&self, profile: &ModelProfile, _: Option<&dyn ModelFamily>, host: &Host) -> Verdict {
        let context_tokens_max = profile.context_tokens_max.as_ref().map_or(4096, |fact| fact.value);
        Verdict::Serve(Offer {
            capabilities: Capabilities { context_tokens_max, ..self.0.capabilities.clone() },
            device: host.device.clone().unwrap(),
            memory_bytes: some(&self.0.memory_bytes),
            score: 1,
            reasons: vec![Reason::new("it is a test")],
        })
    }

    async fn load(&self, plan: LoadPlan, _: ProgressSink) -> Result<EngineHandle, LoadError> {
        let fake = &self.0;
        fake.loads.fetch_add(1, Ordering::SeqCst);
        let terms = (plan.offer.capabilities.context_tokens_max, plan.memory_bytes);
        fake.terms.lock().unwrap().push(terms);
        if fake.hold_loads.load(Ordering::SeqCst) {
            fake.go_on.notified().await;
        }
        if fake.failing_loads.load(Ordering::SeqCst) > 0 {
            fake.failing_loads.fetch_sub(1, Ordering::SeqCst);
            return Err(LoadError::Exited { what: "exit status 1; last lines: out of luck".into() });
        }
        fake.state.send_replace(EngineState::Ready);
        Ok(EngineHandle::new(&INFO, plan.offer.device, Arc::new(FakeEngine(fake.clone()))))
    }
}

struct FakeEngine(Arc<Fake>);

/// A piece of text of one token; its alternatives are `0`, `1` and so on.
fn said(text: &str, logprob: f32, logprobs: Option<u32>) -> Event {
    let candidate = |text: &str, logprob| Candidate { id: 0, bytes: Some(text.as_bytes().to_vec()), logprob };
    let top = |count: u32| (0..count).map(|n| candidate(&n.to_string(), -(n as f32))).collect();
    let logprobs = logprobs.map(|count| TokenLogprob { chosen: candidate(text, logprob), top: top(count) });
    Event::Text { text: text.into(), tokens: 1, logprobs: logprobs.into_iter().collect() }
}

/// Counts a stream that is dropped before its end.
struct Witness {
    fake: Arc<Fake>,
    over: bool,
}

impl Drop for Witness {
    fn drop(&mut self) {
        if !self.over {
            self.fake.dropped.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[async_trait]
impl Engine for FakeEngine {
    fn capabilities(&self) -> &Capabilities {
        &self.0.capabilities
    }

    fn state(&self) -> watch::Receiver<EngineState> {
        self.0.state.subscribe()
    }

    async fn submit(&self, job: Job) -> Result<EventStream, SubmitError> {
        let fake = self.0.clone();
        match &*fake.state.borrow() {
            EngineState::Failed(why) => return Err(SubmitError::Gone { why: why.clone() }),
            EngineState::Ready => {}
            other => return Err(SubmitError::Gone { why: format!("it is {other:?}").into() }),
        }
        let jobs = fake.jobs.lock().unwrap().len() as u32;
        if fake.busy.load(Ordering::SeqCst) || jobs >= fake.jobs_max.load(Ordering::SeqCst) {
            return Err(SubmitError::Busy { running: 3, retry_after: Duration::from_millis(1500) });
        }
        if let Some(&knob) = self.0.capabilities.lacking(&job).first() {
            return Err(SubmitError::Unsupported { knob });
        }
        if let Prompt::Text { text, .. } = &job.prompt
            && text.contains("very long")
        {
            return Err(SubmitError::TooLong { prompt: 5000, max: 4096 });
        }
        let logprobs = job.logprobs;
        fake.jobs.lock().unwrap().push(job);
        let mut steps = Vec::new();
        let own = fake.scripts.lock().unwrap().pop_front();
        for step in own.unwrap_or_else(|| fake.script.lock().unwrap().clone()) {
            match step {
                Step::Bytes(bytes) => steps.extend((0..bytes.len()).map(|at| Step::Bytes(&bytes[at..=at]))),
                step => steps.push(step),
            }
        }
        let state = (steps.into_iter(), Witness { fake, over: false }, 0u32);
        let events = stream::unfold(state, move |(mut steps, mut witness, tokens)| async move {
            let step = steps.next()?;
            witness.fake.taken.fetch_add(1, Ordering::SeqCst);
            let event = match step {
                Step::Pause => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                    Ok(Event::Prefill { done: 0, total: 7, cached: 0 })
                }
                Step::Wait => {
                    witness.fake.steps.acquire().await.unwrap().forget();
                    Ok(Event::Prefill { done: 0, total: 7, cached: 0 })
                }
                Step::Hang => std::future::pending().await,
                Step::Reading(done, total) => Ok(Event::Prefill { done, total, cached: 0 }),
                Step::Queued(ahead) => Ok(Event::Queued { ahead }),
                Step::Prefill(total) => Ok(Event::Prefill { done: total, total, cached: 0 }),
                Step::Text(text) => Ok(said(text, -0.5, logprobs)),
                Step::Likely(text, logprob) => Ok(said(text, logprob, logprobs)),
                Step::Bytes(bytes) => {
                    let id = bytes[0].into();
                    let candidate = |id: u32| Candidate { id, bytes: None, logprob: -(id as f32) };
                    let top = |count| (0..count).map(|n| candidate(u32::from(b'a') + n)).collect();
                    let logprob =
                        logprobs.map(|count| Box::new(TokenLogprob { chosen: candidate(id), top: top(count) }));
                    Ok(Event::Token { id, logprob })
                }
                Step::Finish(reason) => Ok(Event::Finished {
                    reason,
                    usage: Usage { prompt_tokens: 7, cached_tokens: 3, completion_tokens: tokens + 1 },
                    timings: Timings::default(),
                }),
                Step::FailInLine => {
                    witness.fake.steps.acquire().await.unwrap().forget();
                    let what: Arc<str> = "signal 9; last lines: ouch".into();
                    witness.fake.state.send_replace(EngineState::Failed(what.clone()));
                    Err(EngineError::NotBegun { what })
                }
                Step::Fail => {
                    let what: Arc<str> = "signal 9; last lines: ouch".into();
                    witness.fake.state.send_replace(EngineState::Failed(what.clone()));
                    Err(EngineError::Failed { what })
                }
            };
            witness.over |= matches!(event, Ok(Event::Finished { .. }) | Err(_));
            let tokens = tokens + u32::from(matches!(event, Ok(Event::Text { .. } | Event::Token { .. })));
            Some((event, (steps, witness, tokens)))
        });
        Ok(events.boxed())
    }

    async fn embed(&self, embed: Embed) -> Result<Embedded, EmbedError> {
        let mut embedded = Embedded::default();
        for input in &embed.inputs {
            let Prompt::Tokens(ids) = input else { return Err(EmbedError::Unsupported) };
            embedded.prompt_tokens += ids.len() as u32;
            // Of length 1, and different for different texts.
            let angle = match embed.pooling {
                Pooling::Mean => ids.iter().sum::<u32>() as f32 / ids.len() as f32,
                Pooling::Last => *ids.last().unwrap() as f32,
            };
            embedded.vectors.push(vec![angle.cos(), angle.sin()]);
        }
        self.0.embeds.lock().unwrap().push(embed);
        Ok(embedded)
    }

    async fn tokenize(&self, text: &str, add_special: bool) -> Result<Option<Vec<u32>>, EngineError> {
        let begin = add_special.then_some(256);
        Ok(self.0.shares_tokens.then(|| begin.into_iter().chain(text.bytes().map(u32::from)).collect()))
    }

    async fn detokenize(&self, ids: &[u32]) -> Result<Option<String>, EngineError> {
        let bytes: Vec<u8> = ids.iter().filter_map(|id| u8::try_from(*id).ok()).collect();
        Ok(self.0.shares_tokens.then(|| String::from_utf8_lossy(&bytes).into_owned()))
    }

    async fn drain(&self, _: Duration) {
        self.0.drains.fetch_add(1, Ordering::SeqCst);
        self.0.state.send_replace(EngineState::Stopped);
    }
}

/// A server with a scripted model, on a port of its own.
pub struct Server {
    pub fake: Arc<Fake>,
    pub url: String,
    pub client: reqwest::Client,
    pub slots: Slots,
    stop: Option<oneshot::Sender<()>>,
    task: JoinHandle<()>,
}

/// How the scripted model works.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// Text in, text out.
    Text,
    /// Tokens in, tokens out; a token is a byte.
    Tokens,
    /// Text in, text out, and no family.
    Stranger,
    /// Text in, text out, and every knob there is.
    Able,
    /// Tokens in, tokens out, and every knob there is.
    AbleTokens,
}

impl Fake {
    pub fn new(form: Form, script: Vec<Step>) -> Arc<Self> {
        let (prompt, output) = match form {
            Form::Tokens | Form::AbleTokens => (PromptForm::Tokens, OutputForm::Tokens),
            Form::Text | Form::Stranger | Form::Able => (PromptForm::Text, OutputForm::Text),
        };
        let knobs = match form {
            Form::Able | Form::AbleTokens => BTreeSet::from(KNOBS),
            _ => BTreeSet::from([Knob::Temperature, Knob::TopP, Knob::Seed]),
        };
        Arc::new(Self {
            script: Mutex::new(script),
            scripts: Mutex::default(),
            jobs_max: AtomicU32::new(u32::MAX),
            jobs: Mutex::default(),
            busy: AtomicBool::default(),
            failing_loads: AtomicU32::default(),
            loads: AtomicU32::default(),
            hold_loads: AtomicBool::default(),
            go_on: Notify::new(),
            dropped: AtomicU32::default(),
            taken: AtomicU32::default(),
            memory_bytes: AtomicU64::default(),
            device_bytes: AtomicU64::default(),
            steps: Semaphore::new(0),
            drains: AtomicU32::default(),
            manner: Mutex::default(),
            generation_config: Mutex::default(),
            terms: Mutex::default(),
            embeds: Mutex::default(),
            shares_tokens: form == Form::Text,
            state: watch::channel(EngineState::Starting).0,
            capabilities: Capabilities {
                prompt,
                output,
                knobs,
                context_tokens_max: 4096,
                requests_parallel_max: 2,
                requests_queued_max: 1,
                prefix_reuse: true,
                embeddings: form == Form::Tokens,
                vision: false,
            },
        })
    }

    /// The start of a model called `org/NAME-model`.
    pub fn starter(self: &Arc<Self>, name: &str, form: Form) -> Starter {
        let backend: &'static dyn InferenceBackend = Box::leak(Box::new(FakeBackend(self.clone())));
        let tokenizer = matches!(form, Form::Tokens | Form::AbleTokens).then(|| BYTES_TOKENIZER.path().to_owned());
        let mut profile = profile(format!("org/{name}-model"), tokenizer, form != Form::Stranger);
        profile.generation_config = self.generation_config.lock().unwrap().clone();
        Starter {
            reference: name.into(),
            locate: Arc::new(FixedLocate(profile, self.clone())),
            electorate: Arc::new(Electorate::of(vec![backend], vec![&FakeFamily], BTreeMap::new())),
            forced: None,
            opt_in: false,
            context_tokens: None,
            manner: *self.manner.lock().unwrap(),
            progress: ProgressSink::silent(),
            observer: Arc::new(|_| {}),
        }
    }
}

impl Server {
    pub async fn start(form: Form, script: Vec<Step>) -> Self {
        Self::start_with(form, script, |_| {}).await
    }

    pub async fn start_with(form: Form, script: Vec<Step>, set: impl FnOnce(&Fake)) -> Self {
        let fake = Fake::new(form, script);
        set(&fake);
        let slots = Slots::spawn(vec![fake.starter("fake", form).into()], Keeping::default());
        Self::serve(fake, slots).await
    }

    /// A server for these slots, on a port of its own.
    pub async fn serve(fake: Arc<Fake>, slots: Slots) -> Self {
        Self::serve_with(fake, slots, Options::default()).await
    }

    /// The same for a server that deals with its clients in another way.
    pub async fn serve_with(fake: Arc<Fake>, slots: Slots, options: Options) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let scheme = if options.tls.is_some() { "https" } else { "http" };
        let url = format!("{scheme}://{}", listener.local_addr().unwrap());
        let (stop, stopped) = oneshot::channel::<()>();
        let served = slots.clone();
        let task = tokio::spawn(async move {
            let shutdown = async {
                stopped.await.ok();
            };
            listen::serve_with(listener, served, options, shutdown, Duration::from_secs(2)).await;
        });
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Self { fake, url, client, slots, stop: Some(stop), task }
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = self.client.get(format!("{}{path}", self.url)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn send(&self, path: &str, body: String) -> reqwest::Response {
        let request = self.client.post(format!("{}{path}", self.url)).header("content-type", "application/json");
        request.body(body).send().await.unwrap()
    }

    pub async fn post(&self, path: &str, body: &Value) -> (u16, Value) {
        let response = self.send(path, body.to_string()).await;
        (response.status().as_u16(), response.json().await.unwrap())
    }

    pub async fn chat(&self, more: Value) -> (u16, Value) {
        self.post("/v1/chat/completions", &chat(more)).await
    }

    /// The data of every event of a streamed chat, in order.
    pub async fn chat_events(&self, more: Value) -> Vec<String> {
        let mut body = chat(more);
        body["stream"] = true.into();
        let response = self.send("/v1/chat/completions", body.to_string()).await;
        assert_eq!(response.status(), 200, "{:?}", response.text().await);
        events(&response.text().await.unwrap())
    }

    pub fn stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            stop.send(()).ok();
        }
    }

    pub async fn stopped(self) {
        self.task.await.unwrap();
    }

    pub fn last_job(&self) -> Job {
        self.fake.jobs.lock().unwrap().last().unwrap().clone()
    }

    pub async fn complete(&self, more: Value) -> (u16, Value) {
        let mut body = json!({ "model": "fake", "prompt": "x" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        self.post("/v1/completions", &body).await
    }

    pub fn last_prompt(&self) -> Prompt {
        self.fake.jobs.lock().unwrap().last().unwrap().prompt.clone()
    }
}

/// A chat request with further fields.
pub fn chat(more: Value) -> Value {
    let mut body = json!({ "model": "fake", "messages": [{ "role": "user", "content": "Hi" }] });
    for (key, value) in more.as_object().unwrap() {
        body[key] = value.clone();
    }
    body
}

/// The data of each event of a stream, comments left out.
pub fn events(text: &str) -> Vec<String> {
    text.split("\n\n")
        .filter_map(|event| event.lines().find_map(|line| line.strip_prefix("data: ")))
        .map(String::from)
        .collect()
}

/// Waits until something holds, for a second at most.
pub async fn eventually(what: &str, holds: impl Fn() -> bool) {
    for _ in 0..200 {
        if holds() {
            return;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    panic!("it never came about that {what}");
}

/// Makes an answer comparable: ids and times differ from run to run.
pub fn steady(mut value: Value) -> Value {
    for (key, steady) in [("id", json!("ID")), ("created", json!(0))] {
        if value.get(key).is_some() {
            value[key] = steady;
        }
    }
    value
}
