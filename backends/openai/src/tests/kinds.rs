//! What kind a server is, what is known of its models, and what is found out by asking.

use std::sync::Arc;

use mesh_core::{
    Grammar, Knob, Sampling,
    ask::{Ask, Chat, Effort, Subject, ToolChoice},
    node::{Elsewhere, ModelOffer, Reasoning},
};
use serde_json::{Value, json};

use super::{
    ask, chat, engine, names, parts, share,
    stand_in::{Answer, StandIn, bare, events, hello, list, llama_server, mesh_llm, not_found, ollama, sse, vllm},
    until, whole,
};
use crate::Shared;

fn offer(shared: &Shared, name: &str) -> ModelOffer {
    let model = shared.models().into_iter().find(|model| model.name == name).expect("an offer");
    model.nodes[0].offer.clone()
}

fn kind(shared: &Arc<Shared>) -> Value {
    shared.status()["kind"].clone()
}

fn knobs(offer: &ModelOffer) -> Vec<Knob> {
    offer.capabilities.knobs.iter().copied().collect()
}

#[tokio::test]
async fn vllm_is_known_and_asked_about_its_version() {
    let server = StandIn::new(vllm(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!((kind(&shared), shared.status()["version"].clone()), (json!("vllm"), json!("0.11.2")));
    let found = offer(&shared, "org/model");
    assert_eq!(found.capabilities.context_tokens_max, 16384);
    assert!(found.capabilities.knobs.contains(&Knob::Regex), "it refused an impossible `structured_outputs`");
    assert!(!found.capabilities.knobs.contains(&Knob::Dry) && !found.capabilities.knobs.contains(&Knob::Lark));
    assert!(found.chat && found.tools && !found.capabilities.embeddings);
    assert_eq!(server.last("/v1/chat/completions").body["max_tokens"], 1);
    // An older one passes it over.
    let older = StandIn::new(|request| match request.path() {
        "/v1/chat/completions" if request.model() != "org/model" => not_found(),
        "/v1/chat/completions" => hello(),
        _ => vllm(|_| hello())(request),
    })
    .await;
    let shared = share(&older).await;
    assert!(!offer(&shared, "org/model").capabilities.knobs.contains(&Knob::Regex));
    let regex = Ask { grammar: Some(Grammar::Regex("a".into())), ..ask("hi") };
    let rejection = engine(&shared, "org/model").await.answer(regex).await.err().unwrap();
    assert_eq!(rejection.param.as_deref(), Some("response_format"));
}

#[tokio::test]
async fn ollama_tells_of_each_model() {
    let server = StandIn::new(ollama(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!((kind(&shared), shared.status()["version"].clone()), (json!("ollama"), json!("0.12.6")));
    let (talks, embeds) = (offer(&shared, "qwen3:0.6b"), offer(&shared, "nomic-embed-text:latest"));
    assert_eq!(talks.capabilities.context_tokens_max, 8192, "what is set, not what it was made for");
    assert_eq!((talks.chat, talks.tools, talks.reasoning), (true, true, Reasoning::Effort));
    assert_eq!(talks.quantization.as_deref(), Some("Q4_K_M"));
    assert_eq!(
        (embeds.chat, embeds.capabilities.embeddings, embeds.capabilities.context_tokens_max),
        (false, true, 2048)
    );
    assert!(!knobs(&talks).contains(&Knob::Logprobs), "nothing was refused");
    let engine = engine(&shared, "qwen3:0.6b").await;
    let with = |effort| Ask::new("job", Subject::Chat(Chat { effort: Some(effort), ..chat("hi") }));
    whole(&engine, with(Effort::Switch(false))).await;
    assert_eq!(server.last("/v1/chat/completions").body["reasoning_effort"], "none");
    whole(&engine, with(Effort::Level("low".into()))).await;
    assert_eq!(server.last("/v1/chat/completions").body["reasoning_effort"], "low");
    let tools = vec![json!({ "type": "function", "function": { "name": "f" } })];
    let forced = Chat { tools: tools.clone(), tool_choice: ToolChoice::Required, ..chat("hi") };
    let rejection = engine.answer(Ask::new("job", Subject::Chat(forced))).await.err().unwrap();
    assert_eq!(rejection.param.as_deref(), Some("tool_choice"));
    let (embedder, _) = shared.engine("nomic-embed-text:latest").unwrap();
    assert_eq!(embedder.answer(ask("hi")).await.err().unwrap().code, "no_chat_template");
}

#[tokio::test]
async fn what_ollama_has_loaded_says_its_context() {
    let server = StandIn::new(|request| match request.path() {
        "/api/ps" => Answer::Json(200, json!({ "models": [{ "name": "qwen3:0.6b", "context_length": 32768 }] })),
        _ => ollama(|_| hello())(request),
    })
    .await;
    let shared = share(&server).await;
    assert_eq!(offer(&shared, "qwen3:0.6b").capabilities.context_tokens_max, 32768);
}

#[tokio::test]
async fn llama_server_says_what_a_slot_has() {
    let server = StandIn::new(llama_server(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!((kind(&shared), shared.status()["version"].clone()), (json!("llama-server"), json!("b7000-abc")));
    let found = offer(&shared, "model.gguf");
    let can = &found.capabilities;
    assert_eq!((can.context_tokens_max, can.requests_parallel_max, can.requests_queued_max), (2048, 4, 252));
    assert_eq!((found.parameters, found.reasoning, can.embeddings), (Some(1000), Reasoning::Switch, false));
    let engine = engine(&shared, "model.gguf").await;
    let sampling = Sampling { repetition_penalty: Some(1.5), ..Sampling::default() };
    let effort = Some(Effort::Level("none".into()));
    whole(
        &engine,
        Ask { sampling, logprobs: Some(0), ..Ask::new("job", Subject::Chat(Chat { effort, ..chat("hi") })) },
    )
    .await;
    let body = server.last("/v1/chat/completions").body;
    assert_eq!((&body["repeat_penalty"], &body["repeat_last_n"]), (&json!(1.5), &json!(-1)));
    assert_eq!(body["chat_template_kwargs"], json!({ "enable_thinking": false }));
    assert_eq!(body["top_logprobs"], 1);
    assert!(body.get("repetition_penalty").is_none());
}

#[tokio::test]
async fn lm_studio_lists_what_is_loaded() {
    let models = json!({ "data": [
        { "id": "loaded", "type": "llm", "state": "loaded", "max_context_length": 131072, "loaded_context_length": 9000 },
        { "id": "cold", "type": "llm", "state": "not-loaded", "max_context_length": 131072 },
        { "id": "embeds", "type": "embeddings", "state": "not-loaded", "max_context_length": 512 },
    ] });
    let server = StandIn::new(move |request| match request.path() {
        "/v1/models" => {
            list(&["loaded", "cold", "embeds"].map(|id| json!({ "id": id, "owned_by": "organization_owner" })))
        }
        "/api/v0/models" => Answer::Json(200, models.clone()),
        // It answers to any path.
        "/v1/chat/completions" => hello(),
        _ => Answer::Json(200, json!({ "error": "Unexpected endpoint or method." })),
    })
    .await;
    let shared = share(&server).await;
    assert_eq!(kind(&shared), "lm-studio");
    let context = |name| offer(&shared, name).capabilities.context_tokens_max;
    assert_eq!((context("loaded"), context("cold"), context("embeds")), (9000, 4096, 512));
    assert!(!offer(&shared, "embeds").chat && offer(&shared, "embeds").capabilities.embeddings);
    let object = Ask { grammar: Some(Grammar::JsonObject), ..ask("hi") };
    let _ = engine(&shared, "loaded").await.answer(object).await.unwrap();
    let format = &server.last("/v1/chat/completions").body["response_format"];
    assert_eq!(format.pointer("/json_schema/schema"), Some(&json!({ "type": "object" })));
}

#[tokio::test]
async fn another_mesh_llm_says_it_itself() {
    let server = StandIn::new(mesh_llm(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!((kind(&shared), names(&shared)), (json!("mesh-llm"), vec!["cold".to_owned(), "smol".to_owned()]));
    let found = offer(&shared, "smol");
    assert_eq!(knobs(&found), [Knob::Temperature, Knob::TopK, Knob::Seed, Knob::JsonSchema, Knob::Regex]);
    assert_eq!((found.capabilities.context_tokens_max, found.reasoning), (8192, Reasoning::Switch));
    assert!(found.chat && found.tools && found.capabilities.embeddings);
    // What is not known yet it refuses by itself.
    let cold = offer(&shared, "cold");
    assert!(
        cold.tools && cold.capabilities.knobs.contains(&Knob::Dry) && cold.capabilities.knobs.contains(&Knob::Lark)
    );
    let engine = engine(&shared, "smol").await;
    let effort = Some(Effort::Switch(true));
    let thinking = Chat { effort, thinking_tokens_max: Some(9), ..chat("hi") };
    whole(&engine, Ask { grammar: Some(Grammar::Regex("a".into())), ..Ask::new("job", Subject::Chat(thinking)) }).await;
    let body = server.last("/v1/chat/completions").body;
    assert_eq!((&body["enable_thinking"], &body["thinking_budget"]), (&json!(true), &json!(9)));
    assert_eq!(body["response_format"], json!({ "type": "regex", "pattern": "a" }));
}

#[tokio::test]
async fn others_get_the_least_and_what_they_show() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let found = offer(&shared, "m");
    assert_eq!((kind(&shared), knobs(&found)), (json!("other"), vec![Knob::Temperature, Knob::TopP]));
    assert_eq!((found.capabilities.context_tokens_max, found.tools), (4096, false));
    assert_eq!(shared.status()["models"][0]["context_told"], false);
    // One that checks fields before names.
    let refuses = |field: &'static str, with: Value| {
        StandIn::new(move |request| match request.path() {
            "/v1/chat/completions" if request.body[field].is_string() => Answer::Json(422, with.clone()),
            _ => bare(|_| hello())(request),
        })
    };
    let server = refuses("top_k", json!({ "detail": [{ "loc": ["body", "top_k"], "msg": "no integer" }] })).await;
    assert!(knobs(&offer(&*share(&server).await, "m")).contains(&Knob::TopK));
    let server = refuses("tools", json!({ "error": "no list" })).await;
    assert!(offer(&*share(&server).await, "m").tools);
    let served = server.count("/v1/chat/completions");
    assert!((1..=16).contains(&served), "{served} questions");
}

#[tokio::test]
async fn what_a_server_says_of_everything_is_no_evidence() {
    // It refuses whatever it is asked, in the same words.
    let server = StandIn::new(|request| match request.path() {
        "/v1/chat/completions" => Answer::Json(400, json!({ "error": "bad request" })),
        _ => bare(|_| hello())(request),
    })
    .await;
    assert_eq!(knobs(&offer(&*share(&server).await, "m")), [Knob::Temperature, Knob::TopP]);
    // It takes whatever it is asked, for whatever model.
    let server = StandIn::new(|request| match request.path() {
        "/v1/chat/completions" => Answer::Json(200, json!({ "choices": [] })),
        _ => bare(|_| hello())(request),
    })
    .await;
    assert_eq!(knobs(&offer(&*share(&server).await, "m")), [Knob::Temperature, Knob::TopP]);
}

#[tokio::test]
async fn another_server_in_the_same_place_is_looked_at_anew() {
    let mut server = StandIn::new(vllm(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!(kind(&shared), "vllm");
    server.down().await;
    until(&shared, "gone", |shared| shared.models().is_empty()).await;
    server.set(ollama(|_| hello()));
    server.up().await;
    until(&shared, "there", |shared| shared.models().len() == 2).await;
    assert_eq!(kind(&shared), "ollama");
    // Without a moment between them.
    server.set(mesh_llm(|_| hello()));
    until(&shared, "another", |shared| names(shared) == ["cold", "smol"] && shared.status()["kind"] == "mesh-llm")
        .await;
}

#[tokio::test]
async fn places_in_the_servers_files_are_no_names() {
    let path = "/home/me/models/Qwen3-0.6B-Q8_0.gguf";
    let server = StandIn::new(move |request| match request.path() {
        "/v1/models" => {
            list(&[path, "C:\\models\\phi", "/", "org/model"].map(|id| json!({ "id": id, "owned_by": "vllm" })))
        }
        "/v1/chat/completions" if request.model() == path => {
            Answer::Json(404, json!({ "message": format!("The model `{path}` is gone") }))
        }
        "/v1/completions" => events(sse(&[json!({ "error": { "message": format!("{path} broke") } })])),
        _ => not_found(),
    })
    .await;
    let shared = share(&server).await;
    assert_eq!(names(&shared), ["Qwen3-0.6B-Q8_0", "org/model", "phi"]);
    assert!(!shared.status().to_string().contains("home"), "{}", shared.status());
    let rejection = engine(&shared, "Qwen3-0.6B-Q8_0").await.answer(ask("hi")).await.err().unwrap();
    assert_eq!(rejection.message, "The model `Qwen3-0.6B-Q8_0` is gone");
    let text = Ask::new("job", Subject::Text("hi".into()));
    let (_, error) = parts(&engine(&shared, "Qwen3-0.6B-Q8_0").await, text).await;
    assert!(error.unwrap().to_string().ends_with("broke off: Qwen3-0.6B-Q8_0 broke"));
}
