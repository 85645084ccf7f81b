//! The mlx backend keeps the engine contract, and generates what the goldens say.

mod sampling;
mod vectors;

use std::{path::Path, sync::Arc, time::Duration};

use conformance::{engine, shared::shared};
use futures::StreamExt;
use mesh_backend_mlx as _;
use mesh_core::{
    DeviceKind, EngineError, EngineHandle, EngineState, Fact, InferenceBackend, Job, Landmarks, LoadError, LoadPlan,
    ModelProfile, ProgressSink, Prompt, Quantization, Sampling, Source, SubmitError, Verdict, WeightFormat, registry,
};
use mesh_families as _;
use mesh_graph::{Placement, Rows, Weights, ffi, graph_families};
use mesh_models::{Artifact, probe};
use mlx_rs::{Array, Dtype};
use serde_json::{Value, json};

fn backend() -> &'static dyn InferenceBackend {
    registry::backends().expect("unique").get("mlx").expect("linked")
}

fn profile(root: &Path) -> ModelProfile {
    let artifact = Artifact {
        name: "golden".into(),
        root: root.to_owned(),
        weights: vec![root.join("model.safetensors")],
        format: WeightFormat::Safetensors,
    };
    probe(&artifact).expect("the golden is probed")
}

fn plan(profile: ModelProfile, settings: Value) -> LoadPlan {
    let host = backend().host(&settings);
    let family = registry::family_of(registry::families().expect("unique"), &profile);
    let Verdict::Serve(offer) = backend().judge(&profile, family, &host) else { panic!("mlx serves the golden") };
    LoadPlan { profile: Arc::new(profile), family, offer, context_tokens: Some(128), memory_bytes: None, settings }
}

async fn load(root: &Path, settings: Value) -> EngineHandle {
    backend().load(plan(profile(root), settings), ProgressSink::silent()).await.expect("loaded")
}

/// `input_ids` and `greedy` of a golden.
fn reference(root: &Path) -> (Vec<u32>, Vec<u32>) {
    let mut tensors = Array::load_safetensors(root.join("reference.safetensors")).expect("a reference");
    let mut ids = |name: &str| {
        let ids = tensors.remove(name).expect("a tensor").as_dtype(Dtype::Uint32).expect("integers");
        ids.eval().expect("evaluated");
        ids.to_vec_exact::<u32>().expect("integers")
    };
    (ids("input_ids"), ids("greedy"))
}

const CPU: &str = r#"{"device": "cpu"}"#;

fn cpu() -> Value {
    serde_json::from_str(CPU).expect("JSON")
}

#[tokio::test]
async fn keeps_the_contract() {
    let Some(root) = shared("keeps_the_contract", "golden/qwen3") else { return };
    let engine = load(&root, cpu()).await;
    let prompt = Prompt::Tokens(reference(&root).0);
    engine::repeats(&*engine, prompt.clone()).await;
    engine::seeds(&*engine, prompt.clone()).await;
    engine::bounds(&*engine, prompt.clone()).await;
    engine::cancels(&*engine, prompt.clone()).await;
    let text = engine.submit(engine::job(Prompt::Text { text: "a".into(), add_special: true }, 1)).await.err();
    assert!(matches!(text, Some(SubmitError::WrongForm { .. })), "{text:?}");
    let nothing = engine::run(&*engine, engine::job(prompt.clone(), 0)).await.expect("an answer");
    assert_eq!((nothing.tokens.len(), nothing.reason), (0, mesh_core::FinishReason::Length));
    let foreign = engine.submit(engine::job(Prompt::Tokens(vec![100_000]), 1)).await.err();
    assert_eq!(foreign, Some(SubmitError::UnknownToken { id: 100_000, vocab_size: 512 }));

    engine.drain(Duration::from_secs(5)).await;
    assert_eq!(engine.state_now(), EngineState::Stopped);
    let late = engine.submit(engine::job(prompt, 1)).await.err();
    assert!(matches!(late, Some(SubmitError::Gone { .. })), "{late:?}");
}

/// A golden of each kind of cache, and how much of a prompt is known that leaves a known one half-way, without a landmark
/// there: nothing where windows and states do not go back.
const KINDS: [(&str, u32); 12] = [
    ("llama", 13),
    ("qwen2", 13),
    ("qwen3", 13),
    ("llama-q4", 13),
    ("deepseek_v3", 13),
    ("mistral_window", 0),
    ("gemma3_text", 0),
    ("gemma4_e", 0),
    ("gpt_oss", 0),
    ("qwen3_next", 0),
    ("kimi_linear", 0),
    ("lfm2", 0),
];

#[tokio::test]
async fn generates_what_the_goldens_say() {
    for (name, half) in KINDS {
        let Some(root) = shared("generates_what_the_goldens_say", &format!("golden/{name}")) else { return };
        let (prompt, greedy) = reference(&root);
        for chunk in [2048, 5, 1] {
            let mut settings = cpu();
            settings["prefill_chunk_tokens"] = json!(chunk);
            let engine = load(&root, settings).await;
            let answer = async |tokens: &[u32], count, landmarks: &[u32]| {
                let landmarks = Landmarks { message_ends: landmarks.to_vec(), preamble_end: None };
                let job = Job { landmarks, ..engine::job(Prompt::Tokens(tokens.to_vec()), count) };
                engine::run(&*engine, job).await.expect("an answer")
            };
            let fresh = answer(&prompt, 16, &[]).await;
            assert_eq!(fresh.tokens, greedy, "{name} in chunks of {chunk}");
            assert_eq!((fresh.usage.prompt_tokens, fresh.usage.cached_tokens), (24, 0));
            // A prompt that leaves the known one half-way: what was computed beyond must not show.
            let other = [&prompt[..13], &[7, 8, 9]].concat();
            let left = answer(&other, 4, &[]).await;
            assert_eq!(left.usage.cached_tokens, half, "{name} in chunks of {chunk}");
            // Both are known now, each whole.
            let again = answer(&prompt, 16, &[]).await;
            assert_eq!(again.tokens, greedy, "{name} from a known prefix");
            assert_eq!(again.usage.cached_tokens, 23, "{name}");
            assert_eq!(answer(&other, 4, &[]).await, known(&left, 15));
            // A conversation that goes on is known whole, whatever the cache.
            let held = [&prompt[..], &greedy[..15]].concat();
            let next = [&held[..], &[7, 8, 9]].concat();
            let more = answer(&next, 2, &[]).await;
            assert_eq!(more.usage.cached_tokens as usize, held.len(), "{name}");
            // With a landmark, a prompt may leave there, whatever the cache.
            let marked = [&[3, 1, 4, 1, 5, 9, 2, 6][..], &prompt].concat();
            answer(&marked, 4, &[6, 11]).await;
            let leaves = [&marked[..11], &[7, 8]].concat();
            let (marked_again, left) = (answer(&marked, 4, &[]).await, answer(&leaves, 4, &[]).await);
            assert_eq!((marked_again.usage.cached_tokens, left.usage.cached_tokens), (31, 11), "{name}");
            engine.drain(Duration::from_secs(5)).await;
        }
    }
}

/// The same answer, with so many tokens known.
fn known(answer: &engine::Answer, cached_tokens: u32) -> engine::Answer {
    engine::Answer { usage: mesh_core::Usage { cached_tokens, ..answer.usage }, ..answer.clone() }
}

/// For every kind of cache: a crowd gets what each of it gets alone, and a queue is a queue.
#[tokio::test]
async fn everybody_gets_in_company_what_they_get_alone() {
    for (name, _) in KINDS {
        let Some(root) = shared("everybody_gets_in_company", &format!("golden/{name}")) else { return };
        let (prompt, _) = reference(&root);
        let settings =
            json!({ "device": "cpu", "prefill_chunk_tokens": 8, "parallel_requests_max": 5, "queue_requests_max": 64 });
        let engine = load(&root, settings).await;
        let prompts = [&prompt[..], &prompt[..1], &prompt[3..9], &prompt[5..], &prompt[..20], &prompt[7..8]]
            .map(|tokens| Prompt::Tokens(tokens.to_vec()));
        engine::company(&*engine, &prompts).await;
        engine.drain(Duration::from_secs(5)).await;
    }
}

#[tokio::test]
async fn a_queue_is_bounded_and_says_where_one_stands() {
    let Some(root) = shared("a_queue_is_bounded", "golden/llama") else { return };
    let settings = json!({ "device": "cpu", "parallel_requests_max": 2, "queue_requests_max": 3 });
    let mut plan = plan(profile(&root), settings);
    // Long enough that nobody finishes in between.
    plan.context_tokens = Some(4000);
    let engine = backend().load(plan, ProgressSink::silent()).await.expect("loaded");
    engine::queues(&*engine, Prompt::Tokens(reference(&root).0)).await;
}

/// A conversation of ten turns is computed once, whatever the cache; with files, so it is after a restart; and other
/// weights know nothing of it.
#[tokio::test]
async fn a_conversation_is_computed_once() {
    for name in ["llama", "gemma3_text", "lfm2", "qwen3_next"] {
        let Some(root) = shared("a_conversation_is_computed_once", &format!("golden/{name}")) else { return };
        let folder = tempfile::tempdir().expect("a folder");
        let settings = json!({
            "device": "cpu", "prefill_chunk_tokens": 64, "prefix_files_bytes_max": 1 << 30, "prefix_files_dir": folder.path(),
        });
        let load = async |profile: ModelProfile| {
            let plan = LoadPlan { context_tokens: Some(1000), ..plan(profile, settings.clone()) };
            backend().load(plan, ProgressSink::silent()).await.expect("loaded")
        };
        let (ids, _) = reference(&root);
        let ask = async |engine: &EngineHandle, prompt: &[u32]| {
            let landmarks = Landmarks { message_ends: vec![prompt.len() as u32 - 3], preamble_end: Some(5) };
            let job = Job { landmarks, ..engine::job(Prompt::Tokens(prompt.to_vec()), 12) };
            engine::run(&**engine, job).await.expect("an answer")
        };
        let engine = load(profile(&root)).await;
        let (mut history, mut answers) = (ids[..5].to_vec(), Vec::new());
        for turn in 0..10_u32 {
            // What the template writes before an answer is not what it writes of an answer that is history: the next
            // prompt leaves this one at its landmark.
            let message: Vec<u32> = ids.iter().map(|id| (id + turn) % 512).chain([1, 2, 3]).collect();
            let prompt = [&history[..], &message].concat();
            let answer = ask(&engine, &prompt).await;
            let shared = if turn == 0 { 0 } else { history.len() - 12 };
            assert!(answer.usage.cached_tokens as usize >= shared, "{name}, turn {turn}: {:?}", answer.usage);
            history = [&prompt[..prompt.len() - 3], &answer.tokens].concat();
            answers.push((prompt, answer.tokens));
        }
        engine.drain(Duration::from_secs(20)).await;
        let again = load(profile(&root)).await;
        for (prompt, tokens) in answers.iter().rev() {
            let answer = ask(&again, prompt).await;
            assert_eq!(&answer.tokens, tokens, "{name}");
            assert_eq!(answer.usage.cached_tokens as usize, prompt.len() - 1, "{name}, from a file");
        }
        again.drain(Duration::from_secs(20)).await;
        let mut other = profile(&root);
        other.config["rms_norm_eps"] = json!(1e-3);
        let other = load(other).await;
        assert_eq!(ask(&other, &answers[9].0).await.usage.cached_tokens, 0, "{name}: another model");
        other.drain(Duration::from_secs(20)).await;
    }
}

/// What a sequence of so many tokens takes.
fn footprint_bytes(profile: &ModelProfile, tokens: u64) -> u64 {
    ffi::use_device(DeviceKind::Cpu);
    let mut weights = Weights::open(&profile.weights, &profile.config, Placement::cpu(false)).expect("weights");
    let family = registry::family_of(registry::families().expect("unique"), profile).expect("a family").id();
    let model = graph_families().expect("unique").get(family).expect("linked");
    let model = model.graph(&profile.config, &mut weights).expect("a graph");
    let mut cache = model.new_cache();
    let token = Array::from_slice(&[1_u32], &[1, 1]);
    model.forward(&token, &mut cache, Rows::Last).expect("logits").eval().expect("logits");
    cache.footprint().bytes(tokens)
}

/// Sequences that outgrow the memory make room for each other, and nobody's answer shows it.
#[tokio::test]
async fn short_memory_delays_and_changes_nothing() {
    for name in ["llama", "gemma3_text", "qwen3_next"] {
        let Some(root) = shared("short_memory_delays", &format!("golden/{name}")) else { return };
        let (prompt, _) = reference(&root);
        let prompt: Vec<u32> = prompt.iter().copied().cycle().take(210).collect();
        let job = |index: usize| {
            let sampling = Sampling {
                temperature: Some(1.0),
                seed: Some(index as u64),
                frequency_penalty: Some(0.3),
                repetition_penalty: Some(1.1),
                ..Sampling::default()
            };
            Job { sampling, ..engine::job(Prompt::Tokens(prompt[index..].to_vec()), 330) }
        };
        let load = async |settings: Value| {
            let plan = LoadPlan { context_tokens: Some(600), ..plan(profile(&root), settings) };
            backend().load(plan, ProgressSink::silent()).await.expect("loaded")
        };
        let roomy = load(cpu()).await;
        let mut alone = Vec::new();
        for index in 0..3 {
            alone.push(engine::run(&*roomy, job(index)).await.expect("an answer").tokens);
        }
        roomy.drain(Duration::from_secs(5)).await;
        // Room for three until they outgrow 512 tokens, then for two.
        let mut settings = cpu();
        settings["sequences_bytes_max"] = json!(3 * footprint_bytes(&profile(&root), 511));
        let tight = load(settings).await;
        let crowd = futures::future::join_all((0..3).map(|index| engine::run(&*tight, job(index)))).await;
        for (index, (answer, alone)) in crowd.into_iter().zip(alone).enumerate() {
            assert_eq!(answer.expect("an answer").tokens, alone, "{name}: job {index}");
        }
        tight.drain(Duration::from_secs(5)).await;
    }
}

/// Phi 3 encodes sequences beyond its original length differently from the first token on: a generation that crosses it
/// goes on as if it had known.
#[tokio::test]
async fn a_sequence_that_outgrows_its_rotation_is_computed_anew() {
    let Some(root) = shared("a_sequence_that_outgrows_its_rotation", "golden/phi3_longrope") else { return };
    let mut profile = profile(&root);
    // As the original length gives it; only the limit is to change.
    let stretch = 131_072.0_f64 / 4096.0;
    profile.config["rope_scaling"]["attention_factor"] = json!((1.0 + stretch.ln() / 4096.0_f64.ln()).sqrt());
    profile.config["original_max_position_embeddings"] = json!(30);
    let (prompt, short) = reference(&root);
    let expected = {
        ffi::use_device(DeviceKind::Cpu);
        let placement = Placement::cpu(false);
        let mut weights = Weights::open(&profile.weights, &profile.config, placement).expect("weights");
        let family = graph_families().expect("unique").get("phi3").expect("linked");
        let model = family.graph(&profile.config, &mut weights).expect("a graph");
        let mut tokens = prompt.clone();
        for _ in 0..16 {
            // Every step from the first token.
            let row = Array::from_slice(&tokens, &[1, tokens.len() as i32]);
            let logits = model.forward(&row, &mut model.new_cache(), Rows::Last).expect("logits");
            let next = mlx_rs::ops::indexing::argmax_axis(&logits, -1, false).expect("a token");
            tokens.push(next.try_item_exact::<u32>().expect("a token"));
        }
        tokens.split_off(prompt.len())
    };
    assert_ne!(expected, short, "the limit shows");
    assert_eq!(expected[..6], short[..6], "and not before it is reached");
    let engine = backend().load(plan(profile, cpu()), ProgressSink::silent()).await.expect("loaded");
    for _ in 0..2 {
        let answer = engine::run(&*engine, engine::job(Prompt::Tokens(prompt.clone()), 16)).await.expect("an answer");
        assert_eq!(answer.tokens, expected);
    }
    let long = [&prompt[..], &expected[..10]].concat();
    let answer = engine::run(&*engine, engine::job(Prompt::Tokens(long), 6)).await.expect("an answer");
    assert_eq!(answer.tokens, expected[10..], "from a prompt beyond the limit");
}

#[tokio::test]
async fn sampling_narrows_to_the_likeliest() {
    let Some(root) = shared("sampling_narrows_to_the_likeliest", "golden/llama") else { return };
    let (prompt, greedy) = reference(&root);
    let engine = load(&root, cpu()).await;
    let hot = Sampling { temperature: Some(5.0), seed: Some(3), ..Sampling::default() };
    let narrow = [
        Sampling { top_k: Some(1), ..hot.clone() },
        Sampling { top_p: Some(1e-6), ..hot.clone() },
        Sampling { min_p: Some(1.0), ..hot.clone() },
        Sampling { top_k: Some(5), top_p: Some(1e-6), ..hot.clone() },
        Sampling { temperature: Some(1e-3), ..hot.clone() },
    ];
    for sampling in narrow {
        let job = Job { sampling: sampling.clone(), ..engine::job(Prompt::Tokens(prompt.clone()), 16) };
        assert_eq!(engine::run(&*engine, job).await.expect("an answer").tokens, greedy, "{sampling:?}");
    }
    let job = Job { sampling: hot, ..engine::job(Prompt::Tokens(prompt), 16) };
    assert_ne!(engine::run(&*engine, job).await.expect("an answer").tokens, greedy);
}

#[tokio::test]
async fn end_of_text_ends() {
    let Some(root) = shared("end_of_text_ends", "golden/llama") else { return };
    let (prompt, greedy) = reference(&root);
    let mut profile = profile(&root);
    profile.eos_token_ids[0].value = greedy[5];
    let engine = backend().load(plan(profile, cpu()), ProgressSink::silent()).await.expect("loaded");
    let job = Job { ignore_eos: false, ..engine::job(Prompt::Tokens(prompt), 16) };
    let answer = engine::run(&*engine, job).await.expect("an answer");
    let first = greedy.iter().position(|id| *id == greedy[5]).expect("it is there");
    assert_eq!(answer.tokens, greedy[..first]);
    assert_eq!(answer.reason, mesh_core::FinishReason::Stop);
}

#[tokio::test]
async fn a_drain_without_grace_ends_what_runs() {
    let Some(root) = shared("a_drain_without_grace_ends_what_runs", "golden/llama") else { return };
    let engine = load(&root, cpu()).await;
    let mut events = engine.submit(engine::job(Prompt::Tokens(vec![1, 2, 3]), 120)).await.expect("admitted");
    let _ = events.next().await;
    engine.drain(Duration::ZERO).await;
    assert_eq!(engine.state_now(), EngineState::Stopped);
    let last = events.collect::<Vec<_>>().await.pop();
    // It may have been quick enough to finish.
    assert!(matches!(last, Some(Err(EngineError::Stopped) | Ok(mesh_core::Event::Finished { .. }))), "{last:?}");
}

#[tokio::test]
async fn bad_checkpoints_are_errors() {
    let Some(root) = shared("bad_checkpoints_are_errors", "golden/llama") else { return };
    let refused = async |change: fn(&mut ModelProfile)| {
        let mut plan = plan(profile(&root), cpu());
        let mut changed = (*plan.profile).clone();
        change(&mut changed);
        plan.profile = Arc::new(changed);
        match backend().load(plan, ProgressSink::silent()).await {
            Err(LoadError::Weights { what }) => what,
            other => panic!("{other:?}"),
        }
    };
    let missing = refused(|profile| profile.config["num_hidden_layers"] = json!(4)).await;
    assert!(missing.contains("`model.layers.3.mlp.gate_proj.weight` of shape [128, 64] is missing"), "{missing}");
    let left = refused(|profile| profile.config["num_hidden_layers"] = json!(2)).await;
    assert!(left.contains("does not use") && left.contains("`model.layers.2.mlp.down_proj.weight`"), "{left}");
    let shape = refused(|profile| profile.config["intermediate_size"] = json!(130)).await;
    assert!(shape.contains("has shape [128, 64], not [130, 64]"), "{shape}");
    let misspelt = LoadPlan { settings: json!({"devise": "cpu"}), ..plan(profile(&root), cpu()) };
    let unknown = backend().load(misspelt, ProgressSink::silent()).await.err();
    assert!(matches!(&unknown, Some(LoadError::Settings { what, .. }) if what.contains("devise")), "{unknown:?}");
}

#[test]
fn judges_without_a_device() {
    let Some(root) = shared("judges_without_a_device", "golden") else { return };
    let host = backend().host(&cpu());
    let judged = |profile: &ModelProfile| {
        let family = registry::family_of(registry::families().expect("unique"), profile);
        backend().judge(profile, family, &host)
    };
    let Verdict::Serve(offer) = judged(&profile(&root.join("llama"))) else { panic!("served") };
    assert!(offer.reasons.iter().any(|reason| reason.text.contains("slow")), "{:?}", offer.reasons);
    type Change = fn(&mut ModelProfile);
    let fp8 = |profile: &mut ModelProfile| {
        let fp8 = json!({ "quant_method": "fp8", "weight_block_size": [128, 128] });
        profile.quantization = Some(Fact::new(
            Quantization { mode: "fp8".into(), bits: None, group_size: None },
            Source::file("config.json"),
        ));
        profile.config["quantization_config"] = fp8;
    };
    let mut unpacked = profile(&root.join("llama"));
    fp8(&mut unpacked);
    let Verdict::Serve(offer) = judged(&unpacked) else { panic!("served") };
    assert!(
        offer.reasons.iter().any(|reason| reason.text.contains("8-bit floats are unpacked")),
        "{:?}",
        offer.reasons
    );
    let refusals: [(Change, &str); 4] = [
        (|profile| profile.model_type.as_mut().expect("a type").value = "foo".into(), "`model_type` `foo`"),
        (|profile| profile.config["rope_scaling"]["rope_type"] = json!("bar"), "`rope_type` `bar`"),
        (|profile| profile.config["quantization_config"] = json!({"quant_method": "gptq"}), "`gptq`"),
        (|profile| profile.tokenizer = None, "tokenizer.json"),
    ];
    for (change, word) in refusals {
        let mut profile = profile(&root.join("llama"));
        change(&mut profile);
        match judged(&profile) {
            Verdict::Refuse(refusal) => assert!(refusal.to_string().contains(word), "{refusal}"),
            Verdict::Serve(_) => panic!("{word} is refused"),
        }
    }
}
