//! Anthropic's messages: what is asked, what is answered, what is refused.

use mesh_core::{FinishReason, Prompt};
use serde_json::{Map, Value, json};

use crate::fake::{Form, Server, Step, events};

const STOP: Step = Step::Finish(FinishReason::Stop);

pub fn message(more: Value) -> Value {
    let mut body = json!({ "model": "fake", "max_tokens": 64, "messages": [{ "role": "user", "content": "Hi" }] });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

/// What a client makes of the events, as its libraries do.
fn folded(text: &str) -> Value {
    let mut message = Value::Null;
    let mut json_text = String::new();
    for (name, data) in named(text) {
        let event: Value = serde_json::from_str(&data).unwrap();
        assert_eq!(event["type"], name.as_str(), "the name says the type");
        let index = event["index"].as_u64().unwrap_or_default() as usize;
        let push = |block: &mut Value, key: &str, more: &Value| {
            block[key] = format!("{}{}", block[key].as_str().unwrap(), more.as_str().unwrap()).into();
        };
        match name.as_str() {
            "message_start" => message = event["message"].clone(),
            "content_block_start" => {
                let content = message["content"].as_array_mut().unwrap();
                assert_eq!(content.len(), index);
                content.push(event["content_block"].clone());
                json_text.clear();
            }
            "content_block_delta" => {
                let (block, delta) = (&mut message["content"][index], &event["delta"]);
                match delta["type"].as_str().unwrap() {
                    "text_delta" => push(block, "text", &delta["text"]),
                    "thinking_delta" => push(block, "thinking", &delta["thinking"]),
                    "signature_delta" => block["signature"] = delta["signature"].clone(),
                    "input_json_delta" => json_text.push_str(delta["partial_json"].as_str().unwrap()),
                    other => panic!("{other}"),
                }
            }
            "content_block_stop" => {
                if message["content"][index]["type"] == "tool_use" {
                    message["content"][index]["input"] = serde_json::from_str(&json_text).unwrap();
                }
            }
            "message_delta" => {
                message["stop_reason"] = event["delta"]["stop_reason"].clone();
                message["stop_sequence"] = event["delta"]["stop_sequence"].clone();
                message["usage"] = event["usage"].clone();
            }
            "ping" | "message_stop" => {}
            other => panic!("{other}: {data}"),
        }
    }
    assert!(text.trim_end().ends_with("{\"type\":\"message_stop\"}"), "{text}");
    message
}

fn named(text: &str) -> Vec<(String, String)> {
    let field = |event: &str, name: &str| event.lines().find_map(|line| line.strip_prefix(name).map(str::to_owned));
    text.split("\n\n").filter_map(|event| Some((field(event, "event: ")?, field(event, "data: ")?))).collect()
}

/// Ids are the answer's own.
fn steady(mut message: Value) -> Value {
    let id = message["id"].as_str().unwrap().to_owned();
    assert!(id.starts_with("msg_"));
    let short = id.trim_start_matches("msg_").to_owned();
    for block in message["content"].as_array_mut().unwrap() {
        if let Some(id) = block["id"].as_str() {
            block["id"] = id.replace(&short, "ID").into();
        }
        if block["type"] == "thinking" {
            assert!(!block["signature"].as_str().unwrap().is_empty());
            block["signature"] = "SIGNATURE".into();
        }
    }
    message["id"] = "ID".into();
    message
}

const TEXT: &str =
    "<think>né 漢</think>Sí.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"🦀\"}}\n</tool_call>";

/// However an engine cuts an answer, its events add up to the whole message.
#[tokio::test]
async fn streamed_and_whole_messages_agree_at_every_cut() {
    let server = Server::start(Form::Text, vec![]).await;
    let tools = json!([{ "name": "f", "input_schema": { "type": "object" } }]);
    let mut seen = std::collections::BTreeSet::new();
    for at in (0..=TEXT.len()).filter(|at| TEXT.is_char_boundary(*at)) {
        let pieces = [&TEXT[..at], &TEXT[at..]];
        let mut script: Vec<_> = pieces.into_iter().filter(|piece| !piece.is_empty()).map(Step::Text).collect();
        // The counts of tokens depend on the cut; two pieces are two tokens.
        script.push(if script.len() == 1 { Step::Text("") } else { Step::Prefill(7) });
        script.push(STOP);
        *server.fake.script.lock().unwrap() = script;
        let (status, whole) = server.post("/v1/messages", &message(json!({ "tools": tools }))).await;
        assert_eq!(status, 200, "{whole}");
        let body = message(json!({ "tools": tools, "stream": true }));
        let text = server.send("/v1/messages", body.to_string()).await.text().await.unwrap();
        let whole = steady(whole);
        assert_eq!(steady(folded(&text)), whole);
        seen.insert(whole.to_string());
    }
    assert_eq!(seen.len(), 1, "{seen:#?}");
    let only: Value = serde_json::from_str(seen.first().unwrap()).unwrap();
    insta::assert_json_snapshot!(only);
}

#[tokio::test]
async fn the_events_of_a_message() {
    let script = vec![Step::Prefill(7), Step::Text("<think>Hm</think>"), Step::Text("one, "), Step::Text("two"), STOP];
    let server = Server::start(Form::Text, script).await;
    let body = message(json!({ "stream": true, "stop_sequences": ["two"] }));
    let text = server.send("/v1/messages", body.to_string()).await.text().await.unwrap();
    let first: Value = serde_json::from_str(&events(&text)[0]).unwrap();
    let id = first["message"]["id"].as_str().unwrap();
    use base64::{Engine, prelude::BASE64_STANDARD};
    let text = text.replace(&BASE64_STANDARD.encode(format!("{id}/0")), "SIGNATURE").replace(id, "ID");
    insta::assert_snapshot!(text);
}

#[tokio::test]
async fn what_is_said_reaches_the_template_and_knobs_the_engine() {
    let server = Server::start(Form::Text, vec![STOP]).await;
    let cache = json!({ "type": "ephemeral" });
    let body = json!({
        "model": "fake", "max_tokens": 9, "temperature": 0.5, "top_p": 0.9, "thinking": { "type": "disabled" },
        "metadata": { "user_id": "u" }, "service_tier": "auto",
        "system": [{ "type": "text", "text": "Be " }, { "type": "text", "text": "kind.", "cache_control": cache }],
        "tools": [{ "type": "custom", "name": "f", "description": "d", "input_schema": { "type": "object" } }],
        "tool_choice": { "type": "auto" },
        "messages": [
            { "role": "user", "content": "Hi" },
            { "role": "assistant", "content": [
                { "type": "thinking", "thinking": "hm", "signature": "abc" }, { "type": "text", "text": "Yes" },
                { "type": "tool_use", "id": "t1", "name": "f", "input": {}, "caller": { "type": "direct" },
                  "toolset_name": null },
            ] },
            { "role": "user", "content": [
                { "type": "tool_result", "tool_use_id": "t1", "content": [{ "type": "text", "text": "no" }], "is_error": true },
                { "type": "text", "text": "So?" },
            ] },
        ],
    });
    let (status, answer) = server.post("/v1/messages", &body).await;
    assert_eq!(status, 200, "{answer}");
    let text = "<system>Be kind.<user>Hi<assistant>Yes<tool>Error: no<user>So?[1 tools][thinking=False]<assistant>";
    assert_eq!(server.last_prompt(), Prompt::Text { text: text.into(), add_special: false });
    let job = server.fake.jobs.lock().unwrap()[0].clone();
    assert_eq!((job.sampling.temperature, job.sampling.top_p, job.tokens_max), (Some(0.5), Some(0.9), Some(9)));
    // What is counted is that prompt.
    let mut count = body;
    for key in ["max_tokens", "temperature", "top_p", "metadata", "service_tier"] {
        count.as_object_mut().unwrap().remove(key);
    }
    let (status, answer) = server.post("/v1/messages/count_tokens", &count).await;
    assert_eq!((status, answer), (200, json!({ "input_tokens": text.len() })));
    assert_eq!(server.fake.jobs.lock().unwrap().len(), 1, "counting generates nothing");
    // Tools that must not be called are not shown.
    let body = message(json!({ "tools": count["tools"], "tool_choice": { "type": "none" } }));
    assert_eq!(server.post("/v1/messages", &body).await.0, 200);
    assert_eq!(server.last_prompt(), Prompt::Text { text: "<user>Hi<assistant>".into(), add_special: false });
}

#[tokio::test]
async fn refusals_are_in_anthropics_form() {
    let server = Server::start(Form::Text, vec![]).await;
    let said = |content: Value| json!({ "messages": [{ "role": "user", "content": content }] });
    let tools = json!([{ "name": "f", "input_schema": {} }]);
    let mut rows = Vec::new();
    for more in [
        json!({ "max_tokens": null }),
        json!({ "max_tokens": 0 }),
        json!({ "messages": [] }),
        json!({ "messages": [{ "role": "wizard", "content": "x" }] }),
        json!({ "messages": [{ "role": "user", "content": "x" }, { "role": "assistant", "content": "The" }] }),
        said(json!(3)),
        said(json!([3])),
        said(json!([{ "text": "x" }])),
        said(json!([{ "type": "text" }])),
        said(json!([{ "type": "text", "text": "x", "mood": 1 }])),
        said(json!([{ "type": "image", "source": {} }])),
        said(json!([{ "type": "tool_result", "tool_use_id": "x", "content": [{ "type": "image" }] }])),
        json!({ "system": [{ "type": "image" }] }),
        json!({ "stop_sequences": [""] }),
        json!({ "temperature": 3 }),
        json!({ "top_k": 40 }),
        json!({ "tools": [{ "type": "web_search_20250305", "name": "web_search" }] }),
        json!({ "tools": [{ "name": "f" }] }),
        json!({ "tools": tools, "tool_choice": { "type": "tool", "name": "g" } }),
        json!({ "tools": tools, "tool_choice": { "type": "sometimes" } }),
        json!({ "thinking": { "type": "enabled" } }),
        json!({ "thinking": { "type": "enabled", "budget_tokens": 64 } }),
        json!({ "thinking": { "type": "disabled" }, "output_config": { "effort": "low" } }),
        json!({ "output_config": { "format": { "type": "json_object" } } }),
        json!({ "container": "x" }),
        json!({ "n": 1 }),
        json!({ "model": "nobody" }),
    ] {
        let (status, answer) = server.post("/v1/messages", &message(more.clone())).await;
        assert_eq!(answer["type"], "error");
        assert!(answer["request_id"].as_str().unwrap().starts_with("req_"));
        rows.push(format!("{more}\n  {status} {}: {}", answer["error"]["type"], answer["error"]["message"]));
    }
    insta::assert_snapshot!(rows.join("\n"));
    assert!(server.fake.jobs.lock().unwrap().is_empty(), "a refused request reached the engine");
    // A model that has no switch, by the field's name here.
    let server = Server::start(Form::Stranger, vec![]).await;
    let (status, answer) = server.post("/v1/messages", &message(json!({ "thinking": { "type": "disabled" } }))).await;
    let text = answer["error"]["message"].as_str().unwrap();
    assert!(status == 400 && text.contains("`thinking`") && !text.contains("enable_thinking"), "{text}");
}

#[tokio::test]
async fn an_engine_that_fails_ends_a_stream_with_an_error() {
    let server = Server::start(Form::Text, vec![Step::Text("a"), Step::Fail]).await;
    let text = server.send("/v1/messages", message(json!({ "stream": true })).to_string()).await.text().await.unwrap();
    let (name, data) = named(&text).pop().unwrap();
    let data: Map<String, Value> = serde_json::from_str(&data).unwrap();
    assert_eq!((name.as_str(), &data["type"], &data["error"]["type"]), ("error", &json!("error"), &json!("api_error")));
    assert!(!text.contains("message_stop"));
}
