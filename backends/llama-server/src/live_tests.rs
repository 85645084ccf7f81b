//! The whole backend over a real llama-server: the one that is found, or one installed into the workspace's target folder.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, OnceLock},
    time::{Duration, Instant},
};

use futures::StreamExt;
use mesh_core::{
    Constraint, Dry, Engine, EngineError, EngineHandle, EngineState, Event, FinishReason, Grammar, Host,
    InferenceBackend, Job, LoadError, LoadPlan, ModelProfile, ProgressSink, Prompt, Sampling, SubmitError, Usage,
    Verdict, Xtc,
};
use safetensors::SafeTensors;
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::{
    BACKEND, InstallOptions,
    client::Client,
    find::{self, Places},
    fixture, install,
    launch::{self, Shape},
    settings::Settings,
    wire::Completion,
};

/// Nothing here should take this long.
pub(crate) const SOON: Duration = Duration::from_secs(60);
const SHAPE: Shape = Shape { context_tokens: 256, slots: 1, slots_chosen: false, cache_mib: 0 };
const GOLDEN: [&str; 4] = ["llama", "llama_untied", "qwen2", "qwen3"];

fn workspace() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).unwrap().to_owned()
}

/// Says that a test is skipped, which on CI nothing may be.
fn skipped(test: &str, why: &str) {
    assert!(std::env::var_os("CI").is_none(), "{test} cannot run: {why}");
    println!("skipped: {test}: {why}");
}

/// llama-server, installed on first use if there is none.
fn binary() -> Result<PathBuf, String> {
    static BINARY: OnceLock<Result<PathBuf, String>> = OnceLock::new();
    BINARY
        .get_or_init(|| {
            let dir = workspace().join("target").join("llama-server");
            let places = Places::here(None, install::candidates(&dir));
            if let Some(found) = find::find(&places, &find::is_executable).map_err(|error| error.to_string())? {
                return Ok(found.path);
            }
            println!("installing llama-server into {}; this may take minutes", dir.display());
            let thread = std::thread::spawn(move || {
                let runtime = tokio::runtime::Runtime::new().map_err(|error| error.to_string())?;
                let installed = runtime.block_on(install(&InstallOptions::new(dir), &ProgressSink::silent()));
                installed.map(|installed| installed.binary).map_err(|error| error.to_string())
            });
            thread.join().unwrap_or_else(|_| Err("the installation panicked".into()))
        })
        .clone()
}

/// Both the binary and the shared files, or a line that says what is missing.
pub(crate) fn ready(test: &str) -> Option<(PathBuf, PathBuf)> {
    let golden = workspace().parent().unwrap().join("shared").join("golden");
    if !golden.is_dir() {
        skipped(test, "../shared/golden is not there");
        return None;
    }
    match binary() {
        Ok(binary) => Some((binary, golden)),
        Err(why) => {
            skipped(test, &why);
            None
        }
    }
}

/// One thread: the default, as many as cores, makes them wait for each other while other tests run.
pub(crate) fn section(binary: &Path) -> Value {
    json!({"path": binary, "install": false, "args": ["--threads", "1"], "start_timeout_s": 120})
}

pub(crate) fn plan(profile: ModelProfile, settings: Value, context_tokens: Option<u32>) -> LoadPlan {
    let host = BACKEND.host(&settings);
    let Verdict::Serve(offer) = BACKEND.judge(&profile, None, &host) else { panic!("refused") };
    LoadPlan { profile: Arc::new(profile), family: None, offer, context_tokens, memory_bytes: None, settings }
}

async fn load(binary: &Path, gguf: PathBuf) -> EngineHandle {
    let plan = plan(fixture::profile("golden", gguf, "any"), section(binary), Some(256));
    BACKEND.load(plan, ProgressSink::silent()).await.unwrap()
}

/// The prompt of a golden directory and its greedy continuation.
pub(crate) fn golden(dir: &Path) -> (Vec<u32>, Vec<u32>) {
    let bytes = fs::read(dir.join("reference.safetensors")).unwrap();
    let tensors = SafeTensors::deserialize(&bytes).unwrap();
    let ids = |name: &str| {
        let data = tensors.tensor(name).unwrap().data();
        data.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect()
    };
    (ids("input_ids"), ids("greedy"))
}

pub(crate) fn job(tokens: Vec<u32>, sampling: Sampling, tokens_max: u32) -> Job {
    Job { sampling, tokens_max: Some(tokens_max), ignore_eos: true, ..Job::new("test", Prompt::Tokens(tokens)) }
}

pub(crate) async fn answer(engine: &EngineHandle, job: Job) -> (String, FinishReason, Usage) {
    let stream = engine.submit(job).await.unwrap();
    let events: Vec<_> = timeout(SOON, stream.collect()).await.expect("the stream did not end");
    let (mut text, mut counted) = (String::new(), 0);
    for event in &events {
        match event.as_ref().unwrap() {
            Event::Text { text: piece, tokens, .. } => {
                text.push_str(piece);
                counted += tokens;
            }
            Event::Finished { reason, usage, .. } => {
                assert!(counted <= usage.completion_tokens, "{events:?}");
                return (text, *reason, *usage);
            }
            _ => {}
        }
    }
    panic!("no end: {events:?}")
}

#[cfg(target_os = "linux")]
fn alive(pid: u32) -> bool {
    // A zombie has ended; it only waits to be noticed.
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(") ").next().unwrap_or_default().starts_with('Z'))
}

fn signal(pid: u32, signal: i32) {
    // SAFETY: a plain system call on a child of this test.
    assert_eq!(unsafe { libc::kill(pid.cast_signed(), signal) }, 0);
}

#[tokio::test]
async fn greedy_tokens_equal_the_golden_ones() {
    let Some((binary, shared)) = ready("greedy_tokens_equal_the_golden_ones") else { return };
    for name in GOLDEN {
        let dir = shared.join(name);
        let (prompt, greedy) = golden(&dir);
        let settings = Settings::parse(&section(&binary)).unwrap();
        let launched = launch::launch(&binary, &dir.join("model.gguf"), name, SHAPE, &settings).await.unwrap();
        assert_eq!(launched.vocab_size, Some(512), "{name}");
        let client: &Client = &launched.client;
        let body = Completion::new(&job(prompt.clone(), Sampling::greedy(), 16), prompt, launched.context_tokens);
        // Asked for whole: a stream says nothing of tokens that end in half a character.
        let mut whole = serde_json::to_value(&body).unwrap();
        whole["stream"] = false.into();
        whole["return_tokens"] = true.into();
        whole["response_fields"] = json!([]);
        let whole = client.raw("/completion", &whole).await.unwrap();
        assert_eq!(whole["tokens"], json!(greedy), "{name}");
        let mut pieces = client.complete(&body).await.unwrap();
        let (mut text, mut last) = (String::new(), None);
        while last.is_none() {
            let piece = pieces.next().await.unwrap();
            text.push_str(&piece.content);
            last = (piece.stop == Some(true)).then(|| piece.finish(24));
        }
        assert_eq!(whole["content"], text, "{name}: streamed differs from whole");
        let (reason, usage, _) = last.unwrap();
        assert_eq!((reason, usage.completion_tokens), (FinishReason::Length, 16), "{name}");
    }
}

#[tokio::test]
async fn the_likeliest_tokens_step_by_step_are_the_greedy_ones() {
    let Some((binary, golden_dir)) = ready("the_likeliest_tokens_step_by_step_are_the_greedy_ones") else { return };
    let dir = golden_dir.join("llama");
    let (mut tokens, greedy) = golden(&dir);
    let plan = plan(fixture::profile("golden", dir.join("model.gguf"), "any"), section(&binary), Some(256));
    let engine = BACKEND.load_engine(&plan, ProgressSink::silent()).await.unwrap();
    for expected in greedy {
        let likeliest = engine.likeliest(&tokens, 4).await.unwrap();
        assert_eq!((likeliest.len(), likeliest[0].id), (4, expected));
        assert!(likeliest.is_sorted_by(|one, next| one.logprob >= next.logprob && one.logprob <= 0.0));
        tokens.push(expected);
    }
    assert!(matches!(engine.likeliest(&vec![0; 500], 1).await, Err(EngineError::Failed { .. })), "beyond the context");
    assert!(engine.tokenize("a b", false).await.unwrap().len() > 1);
    engine.drain(SOON).await;
    assert!(engine.likeliest(&[1], 1).await.is_err());
}

#[tokio::test]
async fn answers_are_repeatable_and_knobs_matter() {
    let Some((binary, shared)) = ready("answers_are_repeatable_and_knobs_matter") else { return };
    let engine = load(&binary, shared.join("qwen2/model.gguf")).await;
    let (prompt, _) = golden(&shared.join("qwen2"));
    let ask = async |sampling, most| answer(&engine, job(prompt.clone(), sampling, most)).await;

    let (text, reason, usage) = ask(Sampling::greedy(), 12).await;
    assert_eq!(text, "ameameameameameameameameameameame tim");
    assert_eq!(reason, FinishReason::Length);
    assert_eq!((usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens), (24, 0, 12));
    let (again, _, usage) = ask(Sampling::greedy(), 12).await;
    assert_eq!(again, text, "greedy answers repeat");
    assert!(usage.cached_tokens >= 20, "the prompt was computed again: {usage:?}");

    let seeded = |seed| Sampling { seed: Some(seed), temperature: Some(2.0), ..Sampling::default() };
    let one = ask(seeded(1), 24).await.0;
    assert_eq!(one, ask(seeded(1), 24).await.0, "equal seeds, equal answers");
    assert_ne!(one, ask(seeded(2), 24).await.0, "other seed, other answer");
    assert_eq!(ask(Sampling { top_k: Some(1), ..seeded(1) }, 12).await.0, text, "top_k 1 is greedy");
    assert_eq!(ask(Sampling { top_p: Some(1e-6), ..seeded(1) }, 12).await.0, text, "tiny top_p is greedy");
    assert_eq!(ask(Sampling { min_p: Some(1.0), ..seeded(1) }, 12).await.0, text, "min_p 1 is greedy");

    let greedy = Sampling::greedy;
    for penalised in [
        Sampling { repetition_penalty: Some(10.0), ..greedy() },
        Sampling { presence_penalty: Some(2.0), ..greedy() },
        Sampling { frequency_penalty: Some(2.0), ..greedy() },
        Sampling { logit_bias: [(389, -100.0)].into(), ..greedy() },
    ] {
        assert_ne!(ask(penalised.clone(), 12).await.0, text, "{penalised:?}");
    }
}

#[tokio::test]
async fn the_end_of_text_token_ends_and_special_tokens_are_not_text() {
    let Some((binary, shared)) = ready("the_end_of_text_token_ends_and_special_tokens_are_not_text") else { return };
    let engine = load(&binary, shared.join("qwen3/model.gguf")).await;
    let end = Sampling { logit_bias: [(2, 100.0)].into(), ..Sampling::greedy() };
    let ended = answer(&engine, Job { ignore_eos: false, ..job(vec![9, 10], end.clone(), 9) }).await;
    assert_eq!((ended.0.as_str(), ended.1, ended.2.completion_tokens), ("", FinishReason::Stop, 1));
    let went_on = answer(&engine, job(vec![9, 10], end, 9)).await;
    assert_eq!((went_on.1, went_on.2.completion_tokens), (FinishReason::Length, 9));
    let start = Sampling { logit_bias: [(1, 100.0)].into(), ..Sampling::greedy() };
    let start = job(vec![9, 10], start, 3);
    assert_eq!(answer(&engine, start.clone()).await.0, "", "<|im_start|> is not rendered");
    let shown = Job { shown: vec!["<|im_start|>".into(), "no such token".into()], ..start };
    assert_eq!(answer(&engine, shown).await.0, "<|im_start|>".repeat(3), "unless it is asked for");
}

#[tokio::test]
async fn probabilities_are_those_of_the_tokens_that_come() {
    let Some((binary, shared)) = ready("probabilities_are_those_of_the_tokens_that_come") else { return };
    let engine = load(&binary, shared.join("llama/model.gguf")).await;
    let asked = Job { logprobs: Some(3), ..job(vec![9, 10], Sampling::greedy(), 12) };
    let events: Vec<_> = engine.submit(asked).await.unwrap().collect().await;
    let mut reported = 0;
    for event in events {
        let Event::Text { text, tokens, logprobs } = event.unwrap() else { continue };
        assert!(logprobs.len() <= tokens as usize);
        for one in logprobs {
            reported += 1;
            assert_eq!(one.top.len(), 3);
            assert_eq!(one.top[0].id, one.chosen.id, "a greedy choice is the likeliest");
            assert!(one.top.is_sorted_by(|a, b| a.logprob >= b.logprob) && one.chosen.logprob <= 0.0);
            // What is no text by itself is replaced in the text.
            if let Ok(own) = str::from_utf8(one.chosen.bytes.as_deref().unwrap()) {
                assert!(text.ends_with(own), "{own:?} of {text:?}");
            }
        }
    }
    assert!(reported > 0, "nothing was reported");
}

#[tokio::test]
async fn samplers_and_schemas_arrive() {
    let Some((binary, shared)) = ready("samplers_and_schemas_arrive") else { return };
    let engine = load(&binary, shared.join("llama/model.gguf")).await;
    let text = async |sampling: Sampling| answer(&engine, job(vec![9, 10], sampling, 24)).await.0;
    let hot = Sampling { temperature: Some(3.0), seed: Some(5), ..Sampling::default() };
    let (greedy, drawn) = (text(Sampling::greedy()).await, text(hot.clone()).await);
    assert_ne!(greedy, drawn);
    assert_eq!(text(Sampling { typical_p: Some(1e-6), top_k: Some(1), ..hot.clone() }).await, greedy);
    assert_ne!(text(Sampling { typical_p: Some(0.05), ..hot.clone() }).await, drawn, "typical_p");
    let xtc = Some(Xtc { probability: 1.0, threshold: 0.0 });
    assert_ne!(text(Sampling { xtc, ..hot.clone() }).await, drawn, "xtc");
    let dry = Dry {
        multiplier: 50.0,
        base: 2.0,
        allowed_length: 1,
        last_n: None,
        sequence_breakers: vec![],
        breaker_ids: vec![],
    };
    let repeating = vec![9, 10, 11, 9, 10, 11, 9, 10];
    let after = async |sampling| answer(&engine, job(repeating.clone(), sampling, 1)).await.0;
    let pushed = Sampling { logit_bias: [(11, 20.0)].into(), ..Sampling::greedy() };
    let repeats = after(pushed.clone()).await;
    assert_ne!(after(Sampling { dry: Some(dry), ..pushed }).await, repeats, "dry");

    let schema = json!({ "type": "object", "properties": { "ok": { "type": "boolean" } }, "required": ["ok"],
        "additionalProperties": false });
    for (grammar, seed) in [(Grammar::JsonSchema(Arc::new(schema)), 1), (Grammar::JsonObject, 2)] {
        let constraint = Some(Constraint { grammar: grammar.clone(), rules: None });
        let asked = Job {
            constraint,
            ignore_eos: false,
            ..job(vec![9, 10], Sampling { seed: Some(seed), ..hot.clone() }, 200)
        };
        let (text, reason, _) = answer(&engine, asked).await;
        match serde_json::from_str::<Value>(&text) {
            Ok(value) => {
                assert!(value.is_object() && (grammar == Grammar::JsonObject || value["ok"].is_boolean()), "{text}")
            }
            Err(_) => assert_eq!((reason, text.starts_with('{')), (FinishReason::Length, true), "{text}"),
        }
    }
    let refused = Grammar::JsonSchema(Arc::new(json!({ "not": {} })));
    let refused = Job { constraint: Some(Constraint { grammar: refused, rules: None }), ..job(vec![9], hot, 1) };
    let Some(SubmitError::Grammar { what }) = engine.submit(refused).await.err() else { panic!("it was admitted") };
    assert!(what.contains("`not`"), "{what}");
}

#[tokio::test]
async fn text_is_tokenized_once_and_lengths_are_exact() {
    let Some((binary, shared)) = ready("text_is_tokenized_once_and_lengths_are_exact") else { return };
    let engine = load(&binary, shared.join("qwen3/model.gguf")).await;
    let text = |text: &str| Job {
        prompt: Prompt::Text { text: text.into(), add_special: false },
        ..job(vec![], Sampling::greedy(), 1)
    };
    let (.., usage) = answer(&engine, text("<|im_start|><|im_end|>")).await;
    assert_eq!(usage.prompt_tokens, 2, "special tokens are recognised and nothing is added");
    let ids = Engine::tokenize(&*engine, "<|im_start|>a b", false).await.unwrap().unwrap();
    assert_eq!(Engine::detokenize(&*engine, &ids).await.unwrap().as_deref(), Some("<|im_start|>a b"));
    let refusal = |result: Result<_, SubmitError>| result.err().expect("it was admitted");
    assert_eq!(refusal(engine.submit(text("")).await), SubmitError::Empty);
    let long = "<|im_start|>".repeat(256);
    assert_eq!(refusal(engine.submit(text(&long)).await), SubmitError::TooLong { prompt: 256, max: 256 });
    let (_, reason, usage) = answer(&engine, Job { tokens_max: None, ..text(&long[12..]) }).await;
    assert_eq!((reason, usage.prompt_tokens, usage.completion_tokens), (FinishReason::Length, 255, 1));
}

#[tokio::test]
async fn a_dropped_stream_frees_the_slot() {
    let Some((binary, shared)) = ready("a_dropped_stream_frees_the_slot") else { return };
    let profile = fixture::profile("golden", shared.join("llama/model.gguf"), "llama");
    let plan = plan(profile, section(&binary), Some(2048));
    let engine = BACKEND.load(plan, ProgressSink::silent()).await.unwrap();
    let long = || job(vec![9, 10], Sampling::greedy(), 1500);
    let start = Instant::now();
    answer(&engine, long()).await;
    let whole = start.elapsed();
    let start = Instant::now();
    for _ in 0..10 {
        let mut stream = engine.submit(long()).await.unwrap();
        timeout(SOON, stream.next()).await.unwrap().unwrap().unwrap();
        drop(stream);
    }
    answer(&engine, job(vec![9, 10], Sampling::greedy(), 1)).await;
    // There is one slot: had the ten gone on to their ends, this would have taken ten times as long as the one.
    assert!(start.elapsed() < 3 * whole, "ten dropped: {:?}, one whole: {whole:?}", start.elapsed());
}

#[tokio::test]
async fn a_crash_reaches_streams_and_the_state_with_its_reason() {
    let Some((binary, shared)) = ready("a_crash_reaches_streams_and_the_state_with_its_reason") else { return };
    let settings = Settings::parse(&section(&binary)).unwrap();
    let gguf = shared.join("llama/model.gguf");
    let launched = launch::launch(&binary, &gguf, "llama", SHAPE, &settings).await.unwrap();
    let pid = launched.process.pid;
    let capabilities = crate::judge::capabilities(256, 1, 0);
    let engine = crate::engine::LlamaEngine::new(launched.process, launched.client, capabilities, Some(512));
    let engine = EngineHandle::new(&crate::INFO, BACKEND.host(&Value::Null).device.unwrap(), Arc::new(engine));

    // Stopped, it cannot answer before it is killed.
    signal(pid, libc::SIGSTOP);
    let stream = engine.submit(job(vec![9], Sampling::greedy(), 250)).await.unwrap();
    signal(pid, libc::SIGKILL);
    let events: Vec<_> = timeout(SOON, stream.collect()).await.expect("the stream did not end");
    // On a busy machine it may be dead before it was sent the job.
    let Some(Err(EngineError::Failed { what } | EngineError::NotBegun { what })) = events.last() else {
        panic!("{events:?}")
    };
    assert!(what.contains("exited with signal 9 (SIGKILL); last lines: "), "{what}");
    assert!(what.contains("model"), "its last lines are quoted: {what}");
    let EngineState::Failed(why) = timeout(SOON, engine.ended()).await.unwrap() else { panic!("not failed") };
    assert_eq!(why, *what);
    let refusal = engine.submit(job(vec![9], Sampling::greedy(), 1)).await.err().unwrap();
    assert_eq!(refusal, SubmitError::Gone { why });
    timeout(SOON, engine.drain(SOON)).await.expect("draining what failed hangs");
}

#[tokio::test]
async fn broken_files_fail_the_load_in_llama_cpps_words() {
    let Some((binary, shared)) = ready("broken_files_fail_the_load_in_llama_cpps_words") else { return };
    let whole = fs::read(shared.join("llama/model.gguf")).unwrap();
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in [("truncated", &whole[..whole.len() / 2]), ("empty", b""), ("junk", b"not a GGUF at all")] {
        let path = dir.path().join(format!("{name}.gguf"));
        fs::write(&path, bytes).unwrap();
        let plan = plan(fixture::profile(name, path, "llama"), section(&binary), Some(256));
        let error = BACKEND.load(plan, ProgressSink::silent()).await.unwrap_err();
        let LoadError::Exited { what } = &error else { panic!("{name}: {error}") };
        assert!(what.starts_with("llama-server exited with exit status 1"), "{what}");
        assert!(what.contains(name) && what.contains("failed to load model"), "{what}");
    }
}

#[tokio::test]
async fn a_context_beyond_the_model_is_refused() {
    let Some((binary, shared)) = ready("a_context_beyond_the_model_is_refused") else { return };
    let mut profile = fixture::profile("m", shared.join("llama/model.gguf"), "llama");
    profile.context_tokens_max = Some(mesh_core::Fact::new(128, profile.format.source.clone()));
    let error = BACKEND.load(plan(profile, section(&binary), Some(129)), ProgressSink::silent()).await.unwrap_err();
    assert!(matches!(&error, LoadError::Settings { what, .. } if what.contains("1 to 128")), "{error}");
}

#[tokio::test]
async fn an_abandoned_load_and_a_drained_engine_leave_no_process() {
    let Some((binary, shared)) = ready("an_abandoned_load_and_a_drained_engine_leave_no_process") else { return };
    let marker = tempfile::tempdir().unwrap();
    let gguf = marker.path().join("model.gguf");
    fs::copy(shared.join("llama/model.gguf"), &gguf).unwrap();
    let children = || {
        let all = std::process::Command::new("ps").args(["-A", "-o", "args"]).output().unwrap();
        String::from_utf8_lossy(&all.stdout).matches(gguf.to_str().unwrap()).count()
    };
    let gone = async || {
        let start = Instant::now();
        while children() > 0 {
            assert!(start.elapsed() < Duration::from_secs(10), "a child is left");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let engine = load(&binary, gguf.clone()).await;
    assert_eq!(children(), 1);
    timeout(SOON, engine.drain(Duration::from_secs(1))).await.unwrap();
    assert_eq!((engine.state_now(), children()), (EngineState::Stopped, 0));
    {
        let load = load(&binary, gguf.clone());
        tokio::pin!(load);
        while children() == 0 {
            let _ = timeout(Duration::from_millis(5), &mut load).await;
        }
    }
    gone().await;
    drop(load(&binary, gguf.clone()).await);
    gone().await;
}

/// Runs in a process of its own for the test below: loads a model, says who it is, and waits to be killed.
#[cfg(target_os = "linux")]
#[test]
fn parent_to_be_killed() {
    let Some(gguf) = std::env::var_os("MESH_LLM_TEST_PARENT") else { return };
    let runtime = tokio::runtime::Runtime::new().unwrap();
    // Loaded by a task, so that it is a worker's thread that asks for the child.
    let engine = runtime.block_on(runtime.spawn(async move { load(&binary().unwrap(), gguf.into()).await })).unwrap();
    // Long enough for the runtime to have ended threads that idle.
    std::thread::sleep(Duration::from_millis(500));
    println!("state {:?}", engine.state_now());
    std::thread::sleep(SOON);
}

#[cfg(target_os = "linux")]
#[test]
fn no_orphan_is_left_by_sigkill() {
    use std::io::{BufRead, BufReader};
    let Some((_, shared)) = ready("no_orphan_is_left_by_sigkill") else { return };
    let mut parent = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "live_tests::parent_to_be_killed", "--nocapture", "--test-threads", "1"])
        .env("MESH_LLM_TEST_PARENT", shared.join("llama/model.gguf"))
        .stdout(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(parent.stdout.take().unwrap()).lines();
    let line = lines.find_map(|line| Some(line.ok()?.split_once("state ")?.1.to_owned()));
    assert_eq!(line.as_deref(), Some("Ready"), "the parent did not load its model");
    let children = std::process::Command::new("ps").args(["-A", "-o", "pid,ppid,comm"]).output().unwrap();
    let children = String::from_utf8_lossy(&children.stdout).into_owned();
    let child: u32 = children
        .lines()
        .filter_map(|line| Some(line.split_whitespace().collect::<Vec<_>>()).filter(|words| words.len() == 3))
        .find(|words| words[1] == parent.id().to_string() && words[2].starts_with("llama-server"))
        .map(|words| words[0].parse().unwrap())
        .expect("the parent has no llama-server");
    assert!(alive(child));
    parent.kill().unwrap();
    parent.wait().unwrap();
    let start = Instant::now();
    while alive(child) {
        assert!(start.elapsed() < Duration::from_secs(5), "llama-server outlived its parent");
        std::thread::sleep(Duration::from_millis(10));
    }
}

#[test]
fn the_host_says_what_was_found_or_would_be_done() {
    let Host { device, notes, .. } = BACKEND.host(&json!({"path": "/bin/sh"}));
    assert!(device.is_ok());
    assert_eq!(notes, ["llama-server: /bin/sh (named by --llama-server)"]);
    let wrong = BACKEND.host(&json!({"path": "/no/such/file"})).device.unwrap_err();
    assert!(wrong.contains("/no/such/file"), "{wrong}");
    let unknown = BACKEND.host(&json!({"paht": 1})).device.unwrap_err();
    assert!(unknown.contains("paht"), "{unknown}");
}

#[test]
fn it_is_registered() {
    let backends = mesh_core::registry::backends().unwrap();
    assert_eq!(backends.get("llama-server").unwrap().info().formats, [mesh_core::WeightFormat::Gguf]);
}
