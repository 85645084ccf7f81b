//! What is refused, and in which words.

use serde_json::{Value, json};

use crate::fake::{Form, Server, chat};

/// Refusals as a table of request and answer.
async fn table(server: &Server, path: &str, bodies: Vec<String>) -> String {
    let mut rows = Vec::new();
    for body in bodies {
        let response = server.send(path, body.clone()).await;
        let status = response.status().as_u16();
        let answer: Value = response.json().await.unwrap();
        let error = &answer["error"];
        let word = |key: &str| error[key].as_str().unwrap_or("-").to_owned();
        rows.push(format!(
            "{body}\n  {status} {} {} param={}\n  {}",
            word("type"),
            word("code"),
            word("param"),
            word("message")
        ));
    }
    rows.join("\n")
}

#[tokio::test]
async fn chat_requests() {
    let server = Server::start(Form::Text, vec![]).await;
    let with = |more: Value| chat(more).to_string();
    let image =
        json!([{ "type": "text", "text": "what is this?" }, { "type": "image_url", "image_url": { "url": "x" } }]);
    let tool = json!([{ "type": "function", "function": { "name": "f" } }]);
    let bodies = vec![
        "{\"model\": ".into(),
        "[]".into(),
        "{}".into(),
        json!({ "model": "fake" }).to_string(),
        with(json!({ "model": "nobody" })),
        with(json!({ "messages": [] })),
        with(json!({ "messages": "hi" })),
        with(json!({ "messages": [{ "content": "hi" }] })),
        with(json!({ "messages": [{ "role": "wizard", "content": "hi" }] })),
        with(json!({ "messages": [{ "role": "user" }] })),
        with(json!({ "messages": [{ "role": "user", "content": 3 }] })),
        with(json!({ "messages": [{ "role": "user", "content": "hi", "mood": "good" }] })),
        with(json!({ "messages": [{ "role": "user", "content": image }] })),
        with(json!({ "messages": [{ "role": "tool", "content": "x" }] })),
        with(json!({ "messages": [{ "role": "assistant", "tool_calls": [
            { "id": "1", "function": { "name": "f", "arguments": "[" } }] }] })),
        with(json!({ "messages": [{ "role": "user", "content": "very long" }] })),
        with(json!({ "temprature": 1 })),
        with(json!({ "temperature": "hot" })),
        with(json!({ "temperature": 3 })),
        with(json!({ "top_p": 0 })),
        with(json!({ "top_k": -1 })),
        with(json!({ "top_k": 40 })),
        with(json!({ "min_p": 2 })),
        with(json!({ "seed": 1.5 })),
        with(json!({ "max_tokens": 0 })),
        with(json!({ "max_tokens": 5, "max_completion_tokens": 6 })),
        with(json!({ "stop": ["a", "b", "c", "d", "e"] })),
        with(json!({ "stop": [""] })),
        with(json!({ "stop": [1] })),
        with(json!({ "n": 9 })),
        with(json!({ "presence_penalty": 1 })),
        with(json!({ "logit_bias": { "x": 1 } })),
        with(json!({ "logit_bias": { "1": 101 } })),
        with(json!({ "logit_bias": { "1": 1 } })),
        with(json!({ "ignore_eos": true })),
        with(json!({ "logprobs": true })),
        with(json!({ "top_logprobs": 2 })),
        with(json!({ "stream": "yes" })),
        with(json!({ "stream_options": { "include_usage": true } })),
        with(json!({ "stream": true, "stream_options": { "obfuscate": true } })),
        with(json!({ "response_format": { "type": "json_object" } })),
        with(json!({ "response_format": { "type": "xml" } })),
        with(json!({ "tools": [{ "type": "retrieval" }] })),
        with(json!({ "tools": tool, "tool_choice": "required" })),
        with(json!({ "tools": tool, "tool_choice": { "type": "function", "function": { "name": "g" } } })),
        with(json!({ "tools": [{ "type": "function", "function": { "name": "f", "strict": true } }] })),
        with(json!({ "reasoning_effort": "extreme" })),
        with(json!({ "reasoning_effort": "low", "enable_thinking": true })),
        with(json!({ "chat_template_kwargs": [] })),
        with(json!({ "functions": [] })),
        with(json!({ "audio": {} })),
        with(json!({ "store": true })),
    ];
    insta::assert_snapshot!(table(&server, "/v1/chat/completions", bodies).await);
    assert!(server.fake.jobs.lock().unwrap().is_empty(), "a refused request reached the engine");
}

#[tokio::test]
async fn text_requests() {
    let server = Server::start(Form::Text, vec![]).await;
    let with = |more: Value| {
        let mut body = json!({ "model": "fake", "prompt": "x" });
        body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        body.to_string()
    };
    let bodies = vec![
        json!({ "model": "fake" }).to_string(),
        with(json!({ "prompt": ["a", 1] })),
        with(json!({ "prompt": vec!["a"; 17] })),
        with(json!({ "prompt": [-1] })),
        with(json!({ "prompt": {} })),
        with(json!({ "echo": true, "logprobs": 1 })),
        with(json!({ "suffix": "y" })),
        with(json!({ "best_of": 2 })),
        with(json!({ "logprobs": 2 })),
        with(json!({ "messages": [] })),
    ];
    insta::assert_snapshot!(table(&server, "/v1/completions", bodies).await);
}

#[tokio::test]
async fn a_model_without_a_family_has_neither_tools_nor_a_switch() {
    let server = Server::start(Form::Stranger, vec![]).await;
    let tools = json!([{ "type": "function", "function": { "name": "f" } }]);
    let bodies = vec![
        chat(json!({ "tools": tools })).to_string(),
        chat(json!({ "enable_thinking": true })).to_string(),
        chat(json!({ "reasoning_effort": "low" })).to_string(),
    ];
    insta::assert_snapshot!(table(&server, "/v1/chat/completions", bodies).await);
}

#[tokio::test]
async fn token_ids_are_checked_before_they_are_submitted() {
    let server = Server::start(Form::Tokens, vec![]).await;
    let bodies = vec![
        json!({ "model": "fake", "prompt": [] }).to_string(),
        json!({ "model": "fake", "prompt": [256] }).to_string(),
        json!({ "model": "fake", "prompt": vec![1; 4096] }).to_string(),
    ];
    let table = table(&server, "/v1/completions", bodies).await.replace(&"1,".repeat(4095), "…");
    insta::assert_snapshot!(table);
}

#[tokio::test]
async fn paths_and_methods() {
    let server = Server::start(Form::Text, vec![]).await;
    let mut rows = Vec::new();
    for (method, path) in [
        ("GET", "/nothing"),
        ("GET", "/v1/nothing"),
        ("GET", "/v1/chat/completions"),
        ("DELETE", "/v1/models"),
        ("POST", "/health"),
        ("GET", "/v1/models/nobody"),
    ] {
        let method_name = reqwest::Method::from_bytes(method.as_bytes()).unwrap();
        let response = server.client.request(method_name, format!("{}{path}", server.url)).send().await.unwrap();
        let status = response.status().as_u16();
        rows.push(format!("{method} {path}: {status} {}", response.text().await.unwrap()));
    }
    insta::assert_snapshot!(rows.join("\n"));
}
