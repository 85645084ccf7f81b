//! Parameters on their way to the engine, and their ranges.

use mesh_core::{Dry, FinishReason, Sampling, Xtc};
use mesh_llm::defaults::{Manner, ReasoningField};
use serde_json::{Value, json};

use crate::fake::{Form, Server, Step};

const STOP: Step = Step::Finish(FinishReason::Stop);

#[tokio::test]
async fn every_parameter_reaches_the_engine() {
    let server = Server::start(Form::Able, vec![STOP]).await;
    let dry = || Dry {
        multiplier: 0.8,
        base: 1.75,
        allowed_length: 2,
        last_n: None,
        sequence_breakers: ["\n", ":", "\"", "*"].map(str::to_owned).to_vec(),
        breaker_ids: Vec::new(),
    };
    let none = Sampling::default;
    for (more, expected) in [
        (json!({ "temperature": 0.5 }), Sampling { temperature: Some(0.5), ..none() }),
        (json!({ "top_p": 0.5 }), Sampling { top_p: Some(0.5), ..none() }),
        (json!({ "top_k": 5 }), Sampling { top_k: Some(5), ..none() }),
        (json!({ "min_p": 0.5 }), Sampling { min_p: Some(0.5), ..none() }),
        (json!({ "typical_p": 0.5 }), Sampling { typical_p: Some(0.5), ..none() }),
        (json!({ "seed": 7 }), Sampling { seed: Some(7), ..none() }),
        (json!({ "xtc_probability": 0.5 }), Sampling { xtc: Some(Xtc { probability: 0.5, threshold: 0.1 }), ..none() }),
        (
            json!({ "xtc_probability": 1, "xtc_threshold": 0.3 }),
            Sampling { xtc: Some(Xtc { probability: 1.0, threshold: 0.3 }), ..none() },
        ),
        (json!({ "xtc_probability": 0, "xtc_threshold": 0.3 }), none()),
        (json!({ "dry_multiplier": 0.8 }), Sampling { dry: Some(dry()), ..none() }),
        (json!({ "dry_multiplier": 0.8, "dry_penalty_last_n": -1 }), Sampling { dry: Some(dry()), ..none() }),
        (json!({ "dry_multiplier": 0.8, "dry_penalty_last_n": 0 }), none()),
        (json!({ "dry_multiplier": 0, "dry_base": 2 }), none()),
        (
            json!({ "dry_multiplier": 0.8, "dry_base": 2, "dry_allowed_length": 4, "dry_penalty_last_n": 64,
                "dry_sequence_breakers": ["x"] }),
            Sampling {
                dry: Some(Dry {
                    base: 2.0,
                    allowed_length: 4,
                    last_n: Some(64),
                    sequence_breakers: vec!["x".into()],
                    ..dry()
                }),
                ..none()
            },
        ),
        (json!({ "repetition_penalty": 1.5 }), Sampling { repetition_penalty: Some(1.5), ..none() }),
        (json!({ "repeat_penalty": 1.5 }), Sampling { repetition_penalty: Some(1.5), ..none() }),
        (
            json!({ "repeat_penalty": 1.5, "repetition_penalty": 1.5 }),
            Sampling { repetition_penalty: Some(1.5), ..none() },
        ),
        (json!({ "presence_penalty": 1 }), Sampling { presence_penalty: Some(1.0), ..none() }),
        (json!({ "frequency_penalty": 1 }), Sampling { frequency_penalty: Some(1.0), ..none() }),
        (json!({ "logit_bias": { "3": 1 } }), Sampling { logit_bias: [(3, 1.0)].into(), ..none() }),
    ] {
        assert_eq!(server.chat(more.clone()).await.0, 200, "{more}");
        assert_eq!(server.last_job().sampling, expected, "{more}");
        assert_eq!(server.complete(more.clone()).await.0, 200, "{more}");
        assert_eq!(server.last_job().sampling, expected, "{more}");
    }
    server.chat(json!({ "min_tokens": 3, "ignore_eos": true, "max_tokens": 9 })).await;
    let job = server.last_job();
    assert_eq!((job.tokens_min, job.ignore_eos, job.tokens_max), (Some(3), true, Some(9)));
}

#[tokio::test]
async fn tokens_that_break_repetitions_are_found_for_engines_that_take_tokens() {
    let server = Server::start(Form::AbleTokens, vec![STOP]).await;
    server.chat(json!({ "dry_multiplier": 1 })).await;
    let mut expected: Vec<u32> = "\n:\"*".bytes().map(u32::from).collect();
    expected.sort_unstable();
    assert_eq!(server.last_job().sampling.dry.unwrap().breaker_ids, expected);
}

#[tokio::test]
async fn values_out_of_range_are_refused_by_name() {
    let server = Server::start(Form::Able, vec![STOP]).await;
    for (more, param) in [
        (json!({ "typical_p": 0 }), "typical_p"),
        (json!({ "typical_p": 1.1 }), "typical_p"),
        (json!({ "xtc_probability": 2 }), "xtc_probability"),
        (json!({ "xtc_threshold": 0.2 }), "xtc_threshold"),
        (json!({ "xtc_probability": 0.2, "xtc_threshold": 0.6 }), "xtc_threshold"),
        (json!({ "dry_multiplier": -1 }), "dry_multiplier"),
        (json!({ "dry_base": 2 }), "dry_base"),
        (json!({ "dry_multiplier": 1, "dry_base": 0.5 }), "dry_base"),
        (json!({ "dry_allowed_length": 2 }), "dry_allowed_length"),
        (json!({ "dry_multiplier": 1, "dry_penalty_last_n": -2 }), "dry_penalty_last_n"),
        (json!({ "dry_multiplier": 1, "dry_sequence_breakers": [""] }), "dry_sequence_breakers[0]"),
        (json!({ "dry_multiplier": 1, "dry_sequence_breakers": vec!["x"; 17] }), "dry_sequence_breakers"),
        (json!({ "repeat_penalty": 0 }), "repeat_penalty"),
        (json!({ "repeat_penalty": 1.1, "repetition_penalty": 1.2 }), "repeat_penalty"),
        (json!({ "n": 0 }), "n"),
        (json!({ "n": 9 }), "n"),
        (json!({ "min_tokens": -1 }), "min_tokens"),
    ] {
        for (status, answer) in [server.chat(more.clone()).await, server.complete(more.clone()).await] {
            assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more}: {answer}");
        }
    }
    for (more, param) in [
        (json!({ "logprobs": 21 }), "logprobs"),
        (json!({ "echo": true, "logprobs": 0 }), "echo"),
        (json!({ "best_of": 9 }), "best_of"),
        (json!({ "best_of": 1, "n": 2 }), "best_of"),
        (json!({ "best_of": 2, "stream": true }), "best_of"),
        (json!({ "prompt": vec!["x"; 17] }), "prompt"),
        (json!({ "prompt": ["x", 1] }), "prompt"),
        (json!({ "prompt": [1, [2]] }), "prompt"),
    ] {
        let (status, answer) = server.complete(more.clone()).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more}: {answer}");
    }
}

#[tokio::test]
async fn knobs_that_the_engine_lacks_are_refused_by_name() {
    let server = Server::start(Form::Text, vec![STOP]).await;
    for (more, param) in [
        (json!({ "typical_p": 0.5 }), "typical_p"),
        (json!({ "xtc_probability": 0.5 }), "xtc_probability"),
        (json!({ "dry_multiplier": 0.5 }), "dry_multiplier"),
        (json!({ "min_tokens": 3 }), "min_tokens"),
        (json!({ "response_format": { "type": "json_object" } }), "response_format"),
        (json!({ "structured_outputs": { "regex": "a" } }), "structured_outputs"),
        (
            json!({ "tools": [{ "type": "function", "function": { "name": "f" } }], "tool_choice": "required" }),
            "tool_choice",
        ),
        (json!({ "thinking_budget": 3 }), "thinking_budget"),
        (json!({ "reasoning": { "max_tokens": 3 } }), "reasoning.max_tokens"),
    ] {
        let (status, answer) = server.chat(more.clone()).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more}: {answer}");
    }
    assert!(server.fake.jobs.lock().unwrap().is_empty());
    let neutral = json!({ "typical_p": 1, "xtc_probability": 0, "dry_multiplier": 0, "min_tokens": 0 });
    assert_eq!(server.chat(neutral).await.0, 200);
}

#[tokio::test]
async fn the_models_own_sampling_holds_where_a_request_does_not_say() {
    let config = json!({ "temperature": 0.6, "top_p": 0.95, "top_k": 20, "do_sample": true, "eos_token_id": 3 });
    let set = |fake: &crate::fake::Fake| *fake.generation_config.lock().unwrap() = config.clone();
    let server = Server::start_with(Form::Able, vec![STOP], set).await;
    server.chat(json!({ "top_p": 0.5 })).await;
    let expected = Sampling { temperature: Some(0.6), top_p: Some(0.5), top_k: Some(20), ..Sampling::default() };
    assert_eq!(server.last_job().sampling, expected);
    server.complete(json!({ "temperature": 0 })).await;
    assert_eq!(server.last_job().sampling.temperature, Some(0.0));
    let server = Server::start_with(Form::Able, vec![STOP], |fake| {
        set(fake);
        *fake.manner.lock().unwrap() = Manner { generation_config: false, ..Manner::default() };
    });
    let server = server.await;
    server.chat(json!({})).await;
    assert_eq!(server.last_job().sampling, Sampling::default());
}

#[tokio::test]
async fn reasoning_goes_where_it_is_wanted_and_comes_back_under_both_names() {
    let script = || vec![Step::Text("<think>"), Step::Text("Hmm"), Step::Text("</think>"), Step::Text("Yes"), STOP];
    for (field, content, alias) in [
        (ReasoningField::ReasoningContent, Some("Hmm"), None),
        (ReasoningField::Reasoning, None, Some("Hmm")),
        (ReasoningField::Both, Some("Hmm"), Some("Hmm")),
    ] {
        let set = |fake: &crate::fake::Fake| {
            *fake.manner.lock().unwrap() = Manner { reasoning_field: field, ..Manner::default() };
        };
        let server = Server::start_with(Form::Text, script(), set).await;
        let (_, answer) = server.chat(json!({})).await;
        let message = &answer["choices"][0]["message"];
        assert_eq!((message["reasoning_content"].as_str(), message["reasoning"].as_str()), (content, alias));
        let events = server.chat_events(json!({})).await;
        let chunks: Vec<Value> = events.iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
        let streamed = |key: &str| {
            let pieces = chunks.iter().filter_map(|chunk| chunk["choices"][0]["delta"][key].as_str());
            Some(pieces.collect::<String>()).filter(|text| !text.is_empty())
        };
        assert_eq!((streamed("reasoning_content").as_deref(), streamed("reasoning").as_deref()), (content, alias));
    }
    let server = Server::start(Form::Text, vec![STOP]).await;
    let history = |more: Value| {
        let mut message = json!({ "role": "assistant", "content": "a" });
        message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        json!({ "messages": [{ "role": "user", "content": "q" }, message, { "role": "user", "content": "r" }] })
    };
    for more in [
        json!({ "reasoning": "because" }),
        json!({ "reasoning_content": "because" }),
        json!({ "reasoning": "because", "reasoning_content": "because" }),
    ] {
        assert_eq!(server.chat(history(more.clone())).await.0, 200, "{more}");
    }
    let (status, answer) = server.chat(history(json!({ "reasoning": "a", "reasoning_content": "b" }))).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("messages[1].reasoning")));
}

#[tokio::test]
async fn usage_counts_reasoning_and_a_malformed_call_is_warned_of() {
    let script = vec![
        Step::Text("<think>"),
        Step::Text("Let "),
        Step::Text("me"),
        Step::Text("</think>"),
        Step::Text("Yes"),
        Step::Text("<tool_call>oops</tool_call>"),
        STOP,
    ];
    let server = Server::start(Form::Text, script).await;
    let tools = json!({ "tools": [{ "type": "function", "function": { "name": "f" } }] });
    let (_, answer) = server.chat(tools.clone()).await;
    // The marker before, and two words.
    assert_eq!(answer["usage"]["completion_tokens_details"]["reasoning_tokens"], 3);
    let warnings = &answer["choices"][0]["message"]["warnings"];
    assert_eq!(warnings[0]["code"], "malformed_tool_call");
    let events = server.chat_events(tools).await;
    let warned = events.iter().filter(|event| event.contains("\"warnings\""));
    let warned: Vec<Value> = warned.map(|event| serde_json::from_str(event).unwrap()).collect();
    assert_eq!(warned.len(), 1);
    assert_eq!(&warned[0]["choices"][0]["delta"]["warnings"], warnings);
    assert!(warned[0]["choices"][0]["delta"]["content"].as_str().unwrap().contains("oops"));
}
