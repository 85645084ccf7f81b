//! The mlx backend keeps the engine contract, and generates what the goldens say.

use std::{path::Path, sync::Arc, time::Duration};

use conformance::{engine, shared::shared};
use futures::StreamExt;
use mesh_backend_mlx as _;
use mesh_core::{
    DeviceKind, EngineError, EngineHandle, EngineState, Fact, InferenceBackend, LoadError, LoadPlan, ModelProfile,
    ProgressSink, Prompt, Quantization, Sampling, Source, SubmitError, Verdict, WeightFormat, registry,
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
    LoadPlan { profile: Arc::new(profile), family, offer, context_tokens: Some(128), settings }
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

#[tokio::test]
async fn generates_what_the_goldens_say() {
    // What is known of a prompt that leaves it half-way; states of recurrences and convolutions do not go back.
    let goldens = [
        ("llama", 13),
        ("qwen2", 13),
        ("qwen3", 13),
        ("llama-q4", 13),
        ("mistral_window", 13),
        ("gemma3_text", 13),
        ("gemma4_e", 13),
        ("gpt_oss", 13),
        ("deepseek_v3", 13),
        ("qwen3_next", 0),
        ("kimi_linear", 0),
        ("lfm2", 0),
    ];
    for (name, known) in goldens {
        let Some(root) = shared("generates_what_the_goldens_say", &format!("golden/{name}")) else { return };
        let (prompt, greedy) = reference(&root);
        for chunk in [2048, 5, 1] {
            let mut settings = cpu();
            settings["prefill_chunk_tokens"] = json!(chunk);
            let engine = load(&root, settings).await;
            let fresh =
                engine::run(&*engine, engine::job(Prompt::Tokens(prompt.clone()), 16)).await.expect("an answer");
            assert_eq!(fresh.tokens, greedy, "{name} in chunks of {chunk}");
            assert_eq!((fresh.usage.prompt_tokens, fresh.usage.cached_tokens), (24, 0));
            // A prompt that leaves the known one half-way: what was computed beyond must not show.
            let mut other = prompt.clone();
            other.truncate(13);
            other.extend([7, 8, 9]);
            engine::run(&*engine, engine::job(Prompt::Tokens(other), 4)).await.expect("an answer");
            let again =
                engine::run(&*engine, engine::job(Prompt::Tokens(prompt.clone()), 16)).await.expect("an answer");
            assert_eq!(again.tokens, greedy, "{name} from a known prefix");
            assert_eq!(again.usage.cached_tokens, known, "{name}");
            // A conversation that goes on is known whole, whatever the cache.
            let held = [&prompt[..], &greedy[..15]].concat();
            let next = [&held[..], &[7, 8, 9]].concat();
            let more = engine::run(&*engine, engine::job(Prompt::Tokens(next), 2)).await.expect("an answer");
            assert_eq!(more.usage.cached_tokens as usize, held.len(), "{name}");
            engine.drain(Duration::from_secs(5)).await;
        }
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
        let job = mesh_core::Job { sampling: sampling.clone(), ..engine::job(Prompt::Tokens(prompt.clone()), 16) };
        assert_eq!(engine::run(&*engine, job).await.expect("an answer").tokens, greedy, "{sampling:?}");
    }
    let job = mesh_core::Job { sampling: hot, ..engine::job(Prompt::Tokens(prompt), 16) };
    assert_ne!(engine::run(&*engine, job).await.expect("an answer").tokens, greedy);
}

#[tokio::test]
async fn end_of_text_ends() {
    let Some(root) = shared("end_of_text_ends", "golden/llama") else { return };
    let (prompt, greedy) = reference(&root);
    let mut profile = profile(&root);
    profile.eos_token_ids[0].value = greedy[5];
    let engine = backend().load(plan(profile, cpu()), ProgressSink::silent()).await.expect("loaded");
    let job = mesh_core::Job { ignore_eos: false, ..engine::job(Prompt::Tokens(prompt), 16) };
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
