//! Tokens, templates, embeddings, the list of models, and cancelling.

use std::sync::atomic::Ordering;

use mesh_core::{FinishReason, Pooling, Prompt};
use mesh_llm::slots::{Keeping, SlotPlan, Slots};
use serde_json::{Value, json};

use crate::fake::{Fake, Form, Server, Step, chat, events, eventually, steady};

const STOP: Step = Step::Finish(FinishReason::Stop);

/// Status, code and field of a refusal.
fn refusal((status, answer): (u16, Value)) -> (u16, String, String) {
    let word = |key: &str| answer["error"][key].as_str().unwrap_or("-").to_owned();
    assert!(!word("message").is_empty(), "{answer}");
    (status, word("code"), word("param"))
}

fn refused(status: u16, code: &str, param: &str) -> (u16, String, String) {
    (status, code.into(), param.into())
}

#[tokio::test]
async fn texts_and_conversations_become_tokens_and_texts_again() {
    let server = Server::start(Form::Tokens, vec![]).await;
    let ids = |text: &str| -> Value { text.bytes().collect::<Vec<u8>>().into() };
    let (status, answer) = server.post("/tokenize", &json!({ "content": "né" })).await;
    assert_eq!((status, &answer), (200, &json!({ "tokens": ids("né"), "count": 3, "max_model_len": 4096 })));
    let body = json!({ "model": "fake", "prompt": "né", "with_pieces": true, "return_token_strs": true });
    let (_, answer) = server.post("/tokenize", &body).await;
    let tokens = json!([{ "id": 110, "piece": "n" }, { "id": 195, "piece": [195] }, { "id": 169, "piece": [169] }]);
    assert_eq!(answer["tokens"], tokens);
    assert_eq!(answer["token_strs"], json!(["n", "\u{fffd}", "\u{fffd}"]));
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    let (_, answer) = server.post("/tokenize", &json!({ "messages": messages })).await;
    assert_eq!(answer["tokens"], ids("<user>Hi<assistant>"));
    let (status, answer) = server.post("/detokenize", &json!({ "tokens": ids("né 漢") })).await;
    assert_eq!((status, answer), (200, json!({ "content": "né 漢", "prompt": "né 漢" })));
    assert!(server.fake.jobs.lock().unwrap().is_empty(), "nothing is generated");

    // An engine with a tokenizer of its own says what it makes of a text; completions get a begin token.
    let server = Server::start(Form::Text, vec![]).await;
    let (_, answer) = server.post("/tokenize", &json!({ "prompt": "a", "with_pieces": true })).await;
    assert_eq!(answer["tokens"], json!([{ "id": 256, "piece": "" }, { "id": 97, "piece": "a" }]));
    let (_, answer) = server.post("/tokenize", &json!({ "prompt": "a", "add_special": false })).await;
    assert_eq!(answer["tokens"], json!([97]));
    let (_, answer) = server.post("/detokenize", &json!({ "tokens": [97, 98] })).await;
    assert_eq!(answer["content"], "ab");
    // One that does not share it.
    let server = Server::start(Form::Stranger, vec![]).await;
    for (path, body) in [("/tokenize", json!({ "content": "a" })), ("/detokenize", json!({ "tokens": [1] }))] {
        assert_eq!(refusal(server.post(path, &body).await), refused(400, "unsupported", "model"));
    }
}

#[tokio::test]
async fn templates_are_applied_and_nothing_is_generated() {
    let server = Server::start(Form::Text, vec![]).await;
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let body = json!({ "messages": messages, "tools": tools, "chat_template_kwargs": { "enable_thinking": true } });
    let (status, answer) = server.post("/apply-template", &body).await;
    assert_eq!((status, answer), (200, json!({ "prompt": "<user>Hi[1 tools][thinking=True]<assistant>" })));
    assert!(server.fake.jobs.lock().unwrap().is_empty());
}

#[tokio::test]
async fn what_tokens_and_templates_refuse() {
    let server = Server::start(Form::Tokens, vec![]).await;
    let messages = json!([{ "role": "user", "content": "Hi" }]);
    for (path, body, code, param) in [
        ("/tokenize", json!({}), "missing_required_parameter", "content"),
        ("/tokenize", json!({ "content": "a", "prompt": "b" }), "invalid_value", "prompt"),
        ("/tokenize", json!({ "content": "a", "messages": messages }), "invalid_value", "messages"),
        ("/tokenize", json!({ "content": "a", "tools": [] }), "invalid_value", "tools"),
        ("/tokenize", json!({ "content": "a", "parse_special": false }), "unsupported_parameter", "parse_special"),
        (
            "/tokenize",
            json!({ "content": "a", "add_special": true, "add_special_tokens": false }),
            "invalid_value",
            "add_special_tokens",
        ),
        ("/tokenize", json!({ "content": "a", "pieces": 1 }), "unknown_parameter", "pieces"),
        ("/detokenize", json!({}), "missing_required_parameter", "tokens"),
        ("/detokenize", json!({ "tokens": [-1] }), "invalid_value", "tokens[0]"),
        ("/detokenize", json!({ "tokens": [256] }), "invalid_value", "tokens"),
        ("/apply-template", json!({}), "missing_required_parameter", "messages"),
        ("/apply-template", json!({ "messages": [{ "role": "x" }] }), "invalid_value", "messages[0].role"),
    ] {
        assert_eq!(refusal(server.post(path, &body).await), refused(400, code, param), "{path} {body}");
    }
    // With several models, which one has to be said.
    let fake = Fake::new(Form::Text, vec![]);
    let plans: Vec<SlotPlan> =
        ["a", "b"].map(|name| SlotPlan { at_start: false, ..fake.starter(name, Form::Text).into() }).into();
    let server = Server::serve(fake, Slots::spawn(plans, Keeping::default())).await;
    let answer = server.post("/tokenize", &json!({ "content": "a" })).await;
    assert_eq!(refusal(answer), refused(400, "missing_required_parameter", "model"));
    assert_eq!(server.post("/tokenize", &json!({ "model": "b", "content": "a" })).await.0, 200);
}

#[tokio::test]
async fn texts_become_vectors() {
    let server = Server::start(Form::Tokens, vec![]).await;
    let ask = async |more: Value| {
        let mut body = json!({ "model": "fake" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.post("/v1/embeddings", &body).await
    };
    let (status, one) = ask(json!({ "input": "abc" })).await;
    assert_eq!(status, 200, "{one}");
    insta::assert_json_snapshot!(one);
    let (_, tokens) = ask(json!({ "input": [97, 98, 99] })).await;
    assert_eq!(tokens, one, "a list of numbers is the tokens of one text");
    let (_, several) = ask(json!({ "input": ["abc", [97, 98, 99], "x"], "encoding_format": "float" })).await;
    assert_eq!(several["data"].as_array().unwrap().len(), 3);
    assert_eq!(several["data"][1]["embedding"], one["data"][0]["embedding"]);
    assert_eq!((several["data"][2]["index"].as_u64(), &several["usage"]["total_tokens"]), (Some(2), &json!(7)));

    let (_, last) = ask(json!({ "input": "abc", "pooling": "last", "encoding_format": "base64" })).await;
    assert_eq!(server.fake.embeds.lock().unwrap().last().unwrap().pooling, Pooling::Last);
    let prompts = server.fake.embeds.lock().unwrap().last().unwrap().inputs.clone();
    assert_eq!(prompts, [Prompt::Tokens(vec![97, 98, 99])]);
    use base64::{Engine, prelude::BASE64_STANDARD};
    let bytes = BASE64_STANDARD.decode(last["data"][0]["embedding"].as_str().unwrap()).unwrap();
    let expected: Vec<u8> = [99f32.cos(), 99f32.sin()].into_iter().flat_map(f32::to_le_bytes).collect();
    assert_eq!(bytes, expected);

    for (more, code, param) in [
        (json!({}), "missing_required_parameter", "input"),
        (json!({ "input": "" }), "invalid_value", "input[0]"),
        (json!({ "input": [] }), "invalid_value", "input"),
        (json!({ "input": [[]] }), "invalid_value", "input[0]"),
        (json!({ "input": {} }), "invalid_type", "input"),
        (json!({ "input": ["a", 1] }), "invalid_type", "input[1]"),
        (json!({ "input": [1, "a"] }), "invalid_type", "input[0][1]"),
        (json!({ "input": [[1, -1]] }), "invalid_value", "input[0][1]"),
        (json!({ "input": [256] }), "invalid_value", "input"),
        (json!({ "input": vec!["a"; 2049] }), "invalid_value", "input"),
        (json!({ "input": "a", "dimensions": 2 }), "unsupported_parameter", "dimensions"),
        (json!({ "input": "a", "pooling": "max" }), "invalid_value", "pooling"),
        (json!({ "input": "a", "encoding_format": "int8" }), "invalid_value", "encoding_format"),
        (json!({ "input": "a", "truncate": true }), "unknown_parameter", "truncate"),
    ] {
        assert_eq!(refusal(ask(more.clone()).await), refused(400, code, param), "{more}");
    }
    let server = Server::start(Form::Text, vec![]).await;
    let answer = server.post("/v1/embeddings", &json!({ "model": "fake", "input": "a" })).await;
    assert_eq!(refusal(answer), refused(400, "unsupported", "model"));
}

#[tokio::test]
async fn models_say_what_they_can_and_stay_known_when_cold() {
    let fake = Fake::new(Form::Text, vec![STOP]);
    fake.memory_bytes.store(60, Ordering::SeqCst);
    fake.device_bytes.store(100, Ordering::SeqCst);
    let plan = |name| SlotPlan { at_start: name == "a", ..fake.starter(name, Form::Text).into() };
    let slots = Slots::spawn(vec![plan("a"), plan("b")], Keeping { memory_bytes: Some(100), idle_ttl: None });
    let server = Server::serve(fake.clone(), slots).await;
    let (_, before) = server.get("/v1/models").await;
    assert_eq!(before["data"][1]["status"], "cold");
    assert!(before["data"][1].get("context_length").is_none(), "nobody has looked yet");
    assert_eq!(server.chat(json!({ "model": "a" })).await.0, 200);
    assert_eq!(server.chat(json!({ "model": "b" })).await.0, 200);
    let (_, mut list) = server.get("/v1/models").await;
    for model in list["data"].as_array_mut().unwrap() {
        *model = steady(model.take());
    }
    assert_eq!((&list["data"][0]["status"], &list["data"][1]["status"]), (&json!("cold"), &json!("ready")));
    insta::assert_json_snapshot!(list);
    let (status, one) = server.get("/v1/models/org%2Fb-model").await;
    assert_eq!((status, steady(one)), (200, list["data"][1].clone()));
}

#[tokio::test]
async fn a_running_request_is_cancelled_by_any_of_its_names() {
    let server = Server::start(Form::Text, vec![Step::Text("one "), Step::Wait, Step::Text("two"), STOP]).await;
    let streamed = async |name: Option<&str>| {
        let mut request = server.client.post(format!("{}/v1/chat/completions", server.url));
        if let Some(name) = name {
            request = request.header("x-request-id", name);
        }
        let body = chat(json!({ "stream": true })).to_string();
        let mut response = request.body(body).send().await.unwrap();
        let mut text = String::new();
        while !text.contains("one") {
            text.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
        }
        (response, text)
    };
    for by_header in [false, true] {
        let (mut response, mut text) = streamed(by_header.then_some("mine")).await;
        let first: Value = serde_json::from_str(&events(&text)[0]).unwrap();
        let id = if by_header { "mine" } else { first["id"].as_str().unwrap() };
        let path = format!("/v1/requests/{id}/cancel");
        let (status, answer) = server.post(&path, &json!({})).await;
        assert_eq!((status, answer), (200, json!({ "id": id, "object": "request", "cancelled": true })));
        while let Some(chunk) = response.chunk().await.unwrap() {
            text.push_str(std::str::from_utf8(&chunk).unwrap());
        }
        let last: Value = serde_json::from_str(events(&text).last().unwrap()).unwrap();
        assert_eq!(last["error"]["code"], "cancelled", "{text}");
        assert_eq!(refusal(server.post(&path, &json!({})).await), refused(404, "request_not_found", "-"));
    }
    eventually("the engine was told", || server.fake.dropped.load(Ordering::SeqCst) == 2).await;

    // A blocking answer, and one whose model is not even loaded.
    for held in [false, true] {
        let server = if held {
            Server::start_with(Form::Text, vec![STOP], |fake| fake.hold_loads.store(true, Ordering::SeqCst)).await
        } else {
            Server::start(Form::Text, vec![Step::Hang]).await
        };
        let request = server.client.post(format!("{}/v1/chat/completions", server.url)).header("x-request-id", "mine");
        let answer = tokio::spawn(request.body(chat(json!({})).to_string()).send());
        let mut tries = 0;
        while server.post("/v1/requests/mine/cancel", &json!({})).await.0 == 404 {
            tries += 1;
            assert!(tries < 400, "it never ran");
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        let answer = answer.await.unwrap().unwrap();
        let status = answer.status().as_u16();
        assert_eq!(refusal((status, answer.json().await.unwrap())), refused(409, "cancelled", "-"));
    }
}
