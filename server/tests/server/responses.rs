//! `/v1/responses`: events, what is kept, what is refused.

use std::{collections::BTreeSet, sync::atomic::Ordering};

use mesh_core::{FinishReason, Prompt};
use serde_json::{Value, json};

use crate::fake::{Form, Server, Step, events, eventually};

const STOP: Step = Step::Finish(FinishReason::Stop);

const TEXT: &str =
    "<think>né 漢</think>Sí.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"🦀\"}}\n</tool_call>";

pub fn asking(more: Value) -> Value {
    let mut body = json!({ "model": "fake", "input": "Hi" });
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    body
}

async fn stream(server: &Server, more: Value) -> Vec<Value> {
    let mut body = asking(more);
    body["stream"] = true.into();
    let text = server.send("/v1/responses", body.to_string()).await.text().await.unwrap();
    let events: Vec<Value> = events(&text).iter().map(|event| serde_json::from_str(event).unwrap()).collect();
    for (number, event) in events.iter().enumerate() {
        assert_eq!(event["sequence_number"], number, "{event}");
        let name = format!("event: {}\n", event["type"].as_str().unwrap());
        assert!(text.contains(&name), "{name}");
    }
    events
}

/// What a client makes of the events: the output that they add up to, and the last event's response.
fn folded(events: &[Value]) -> (Value, Value) {
    let mut output: Vec<Value> = Vec::new();
    let add = |place: &mut Value, more: &Value| {
        *place = format!("{}{}", place.as_str().unwrap(), more.as_str().unwrap()).into();
    };
    for event in events {
        let kind = event["type"].as_str().unwrap().trim_start_matches("response.");
        let index = event["output_index"].as_u64().unwrap_or_default() as usize;
        match kind {
            "output_item.added" => {
                assert_eq!(output.len(), index);
                output.push(event["item"].clone());
            }
            "content_part.added" => output[index]["content"].as_array_mut().unwrap().push(event["part"].clone()),
            "reasoning_summary_part.added" => {
                output[index]["summary"].as_array_mut().unwrap().push(event["part"].clone());
            }
            "output_text.delta" | "reasoning_text.delta" => {
                assert_eq!(event["item_id"], output[index]["id"]);
                add(&mut output[index]["content"][0]["text"], &event["delta"]);
            }
            "reasoning_summary_text.delta" => add(&mut output[index]["summary"][0]["text"], &event["delta"]),
            "function_call_arguments.delta" => add(&mut output[index]["arguments"], &event["delta"]),
            "output_text.done" | "reasoning_text.done" => {
                assert_eq!(output[index]["content"][0]["text"], event["text"])
            }
            "reasoning_summary_text.done" => assert_eq!(output[index]["summary"][0]["text"], event["text"]),
            "function_call_arguments.done" => assert_eq!(output[index]["arguments"], event["arguments"]),
            "content_part.done" => assert_eq!(output[index]["content"][0], event["part"]),
            "reasoning_summary_part.done" => assert_eq!(output[index]["summary"][0], event["part"]),
            "output_item.done" => {
                let mut whole = event["item"].clone();
                whole["status"] = "in_progress".into();
                if output[index].get("encrypted_content").is_none() {
                    whole.as_object_mut().unwrap().remove("encrypted_content");
                }
                assert_eq!(output[index], whole, "the item is what its deltas add up to");
                output[index] = event["item"].clone();
            }
            "created" | "in_progress" | "completed" | "incomplete" => {}
            other => panic!("{other}"),
        }
    }
    (output.into(), events.last().unwrap()["response"].clone())
}

fn steady(response: &Value) -> Value {
    let id = response["id"].as_str().unwrap().trim_start_matches("resp_");
    let mut response: Value = serde_json::from_str(&response.to_string().replace(id, "ID")).unwrap();
    response["created_at"] = 0.into();
    response
}

/// However an engine cuts an answer, its events add up to the whole response.
#[tokio::test]
async fn streamed_and_whole_responses_agree_at_every_cut() {
    let server = Server::start(Form::Text, vec![]).await;
    let tools = json!([{ "type": "function", "name": "f", "parameters": { "type": "object" } }]);
    for summary in [None, Some("auto")] {
        let mut seen = BTreeSet::new();
        for at in (0..=TEXT.len()).filter(|at| TEXT.is_char_boundary(*at)) {
            let pieces = [&TEXT[..at], &TEXT[at..]];
            let mut script: Vec<_> = pieces.into_iter().filter(|piece| !piece.is_empty()).map(Step::Text).collect();
            script.push(if script.len() == 1 { Step::Text("") } else { Step::Prefill(7) });
            script.push(STOP);
            *server.fake.script.lock().unwrap() = script;
            let more = json!({ "tools": tools, "reasoning": { "summary": summary } });
            let (status, whole) = server.post("/v1/responses", &asking(more.clone())).await;
            assert_eq!(status, 200, "{whole}");
            let (output, last) = folded(&stream(&server, more).await);
            assert_eq!(output, last["output"]);
            let mut whole = steady(&whole);
            assert_eq!(steady(&last), whole);
            // How many tokens of the two were reasoning depends on where they were cut.
            whole["usage"]["output_tokens_details"] = Value::Null;
            seen.insert(whole.to_string());
        }
        assert_eq!(seen.len(), 1, "{seen:#?}");
        let only: Value = serde_json::from_str(seen.first().unwrap()).unwrap();
        insta::assert_json_snapshot!(only);
    }
}

#[tokio::test]
async fn the_events_of_a_response() {
    let server = Server::start(Form::Text, vec![Step::Text("<think>Hm</think>"), Step::Text("one"), STOP]).await;
    let types = async |more: Value| -> String {
        let events = stream(&server, more).await;
        events.iter().map(|event| event["type"].as_str().unwrap().to_owned()).collect::<Vec<_>>().join("\n")
    };
    insta::assert_snapshot!(types(json!({})).await);
    let summary = types(json!({ "reasoning": { "summary": "detailed" } })).await;
    assert!(summary.contains("reasoning_summary_text.delta") && !summary.contains("reasoning_text."), "{summary}");
    *server.fake.script.lock().unwrap() = vec![Step::Text("one"), Step::Finish(FinishReason::Length)];
    let last = stream(&server, json!({ "max_output_tokens": 1 })).await.pop().unwrap();
    assert_eq!(last["type"], "response.incomplete");
    assert_eq!(last["response"]["incomplete_details"], json!({ "reason": "max_output_tokens" }));
    assert_eq!(last["response"]["output"][0]["status"], "incomplete");
    *server.fake.script.lock().unwrap() = vec![Step::Text("one"), Step::Fail];
    let last = stream(&server, json!({})).await.pop().unwrap();
    assert_eq!(last["type"], "response.failed");
    assert_eq!(
        (&last["response"]["status"], &last["response"]["error"]["code"]),
        (&json!("failed"), &json!("engine_failed"))
    );
}

#[tokio::test]
async fn conversations_go_on_from_what_is_kept() {
    let server = Server::start(Form::Text, vec![Step::Text("<think>hm</think>Yes"), STOP]).await;
    let (_, first) = server.post("/v1/responses", &asking(json!({ "instructions": "Be kind." }))).await;
    let prompt = |text: &str| Prompt::Text { text: text.into(), add_special: false };
    assert_eq!(server.last_prompt(), prompt("<system>Be kind.<user>Hi<assistant>"));
    let id = first["id"].as_str().unwrap();
    let (status, kept) = server.get(&format!("/v1/responses/{id}")).await;
    assert_eq!((status, &kept), (200, &first));
    // Instructions are not carried on; what was said is.
    let more = json!({ "input": "So?", "previous_response_id": id, "metadata": { "k": "v" } });
    let second = folded(&stream(&server, more).await).1;
    assert_eq!(server.last_prompt(), prompt("<user>Hi<assistant>Yes<user>So?<assistant>"));
    assert_eq!((&second["previous_response_id"], &second["metadata"]), (&json!(id), &json!({ "k": "v" })));
    let (_, kept) = server.get(&format!("/v1/responses/{}", second["id"].as_str().unwrap())).await;
    assert_eq!(kept, second, "what was streamed is kept");
    // What is not kept cannot be gone on from.
    let (_, loose) = server.post("/v1/responses", &asking(json!({ "store": false }))).await;
    let loose = loose["id"].as_str().unwrap();
    let (status, deleted) = delete(&server, id).await;
    assert_eq!((status, deleted), (200, json!({ "id": id, "object": "response", "deleted": true })));
    for gone in [loose, id] {
        assert_eq!(server.get(&format!("/v1/responses/{gone}")).await.0, 404);
        assert_eq!(delete(&server, gone).await.0, 404);
        let (status, answer) = server.post("/v1/responses", &asking(json!({ "previous_response_id": gone }))).await;
        assert_eq!((status, &answer["error"]["param"]), (404, &json!("previous_response_id")));
    }
}

async fn delete(server: &Server, id: &str) -> (u16, Value) {
    let response = server.client.delete(format!("{}/v1/responses/{id}", server.url)).send().await.unwrap();
    (response.status().as_u16(), response.json().await.unwrap())
}

#[tokio::test]
async fn items_reach_the_template_and_are_shown_again() {
    let server = Server::start(Form::Text, vec![Step::Text("<think>hm</think>Yes"), STOP]).await;
    let (_, first) = server.post("/v1/responses", &asking(json!({ "include": ["reasoning.encrypted_content"] }))).await;
    let reasoning = first["output"][0].clone();
    assert_eq!(reasoning["content"][0]["text"], "hm");
    let mut sealed = reasoning.clone();
    sealed["content"] = json!([]);
    let input = json!([
        { "role": "developer", "content": "Be kind." },
        { "type": "message", "role": "user", "content": [{ "type": "input_text", "text": "a" }, { "type": "input_text", "text": "b" }] },
        sealed,
        first["output"][1],
        { "type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}" },
        { "type": "function_call_output", "call_id": "c1", "output": "no" },
    ]);
    let (status, answer) = server.post("/v1/responses", &asking(json!({ "input": input }))).await;
    assert_eq!(status, 200, "{answer}");
    let text = "<developer>Be kind.<user>ab<assistant>Yes<tool>no<assistant>";
    assert_eq!(server.last_prompt(), Prompt::Text { text: text.into(), add_special: false });
    let path = format!("/v1/responses/{}/input_items", answer["id"].as_str().unwrap());
    let (status, page) = server.get(&format!("{path}?order=asc&limit=2")).await;
    assert_eq!((status, page["data"].as_array().unwrap().len(), &page["has_more"]), (200, 2, &json!(true)));
    assert_eq!(page["data"][0]["content"], json!([{ "type": "input_text", "text": "Be kind." }]));
    let after = page["last_id"].as_str().unwrap();
    let (_, rest) = server.get(&format!("{path}?order=asc&after={after}")).await;
    assert_eq!((rest["data"].as_array().unwrap().len(), &rest["has_more"]), (4, &json!(false)));
    let (_, latest) = server.get(&format!("{path}?limit=1")).await;
    assert_eq!(latest["data"][0]["type"], "function_call_output");
    for query in ["limit=0", "limit=101", "order=up", "after=nobody", "page=2"] {
        assert_eq!(server.get(&format!("{path}?{query}")).await.0, 400, "{query}");
    }
}

#[tokio::test]
async fn a_response_that_is_written_can_be_seen_and_cancelled() {
    let server = Server::start(Form::Text, vec![Step::Text("one"), Step::Hang]).await;
    for leaves in [false, true] {
        let mut response = server.send("/v1/responses", asking(json!({ "stream": true })).to_string()).await;
        let mut text = String::new();
        while !text.contains("output_text.delta") {
            text.push_str(std::str::from_utf8(&response.chunk().await.unwrap().unwrap()).unwrap());
        }
        let first: Value = serde_json::from_str(&events(&text)[0]).unwrap();
        let path = format!("/v1/responses/{}", first["response"]["id"].as_str().unwrap());
        assert_eq!(server.get(&path).await.1["status"], "in_progress");
        if leaves {
            drop(response);
        } else {
            let (status, answer) = server.post(&format!("{path}/cancel"), &json!({})).await;
            assert_eq!((status, &answer["status"]), (200, &json!("cancelled")));
            while let Some(chunk) = response.chunk().await.unwrap() {
                text.push_str(std::str::from_utf8(&chunk).unwrap());
            }
            let last: Value = serde_json::from_str(events(&text).last().unwrap()).unwrap();
            assert_eq!((&last["type"], &last["code"]), (&json!("error"), &json!("cancelled")));
        }
        let mut kept = Value::Null;
        for _ in 0..200 {
            kept = server.get(&path).await.1;
            if kept["status"] == "cancelled" {
                break;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        assert_eq!((&kept["status"], &kept["output"][0]["content"][0]["text"]), (&json!("cancelled"), &json!("one")));
        assert_eq!(server.post(&format!("{path}/cancel"), &json!({})).await.0, 400, "it is over");
    }
    eventually("the engine was told", || server.fake.dropped.load(Ordering::SeqCst) == 2).await;
    assert_eq!(server.post("/v1/responses/resp_x/cancel", &json!({})).await.0, 404);
}

#[tokio::test]
async fn what_responses_refuse() {
    let server = Server::start(Form::Text, vec![]).await;
    let tools = json!([{ "type": "function", "name": "f" }]);
    let mut rows = Vec::new();
    for more in [
        json!({ "input": null }),
        json!({ "input": 3 }),
        json!({ "input": [] }),
        json!({ "input": [3] }),
        json!({ "input": [{ "type": "item_reference", "id": "x" }] }),
        json!({ "input": [{ "role": "wizard", "content": "x" }] }),
        json!({ "input": [{ "role": "user" }] }),
        json!({ "input": [{ "role": "user", "content": [{ "type": "input_image" }] }] }),
        json!({ "input": [{ "role": "user", "content": "x", "mood": 1 }] }),
        json!({ "input": [{ "type": "function_call", "call_id": "c", "name": "f", "arguments": "[" }] }),
        json!({ "input": [{ "type": "reasoning", "encrypted_content": "x" }] }),
        json!({ "tools": [{ "type": "web_search" }] }),
        json!({ "tools": [{ "type": "function" }] }),
        json!({ "tools": [{ "type": "function", "name": "f", "code": 1 }] }),
        json!({ "tools": tools, "tool_choice": { "type": "function", "name": "g" } }),
        json!({ "tools": tools, "tool_choice": "sometimes" }),
        json!({ "tool_choice": "required" }),
        json!({ "text": { "format": { "type": "xml" } } }),
        json!({ "text": { "format": { "type": "json_schema", "name": "x" } } }),
        json!({ "text": { "format": { "type": "json_schema", "name": "x", "schema": {} } } }),
        json!({ "text": { "verbosity": "low" } }),
        json!({ "reasoning": { "effort": "extreme" } }),
        json!({ "reasoning": { "summary": "concise" } }),
        json!({ "include": ["message.output_text.logprobs"] }),
        json!({ "truncation": "auto" }),
        json!({ "background": true }),
        json!({ "conversation": "x" }),
        json!({ "max_output_tokens": 0 }),
        json!({ "metadata": { "k": "v".repeat(2000) } }),
        json!({ "stream_options": {} }),
        json!({ "temperature": 3 }),
        json!({ "n": 1 }),
        json!({ "model": "nobody" }),
    ] {
        let (status, answer) = server.post("/v1/responses", &asking(more.clone())).await;
        let error = &answer["error"];
        let more = more.to_string().replace(&"v".repeat(2000), "…");
        rows.push(format!("{more}\n  {status} {} param={}\n  {}", error["code"], error["param"], error["message"]));
    }
    insta::assert_snapshot!(rows.join("\n"));
    assert!(server.fake.jobs.lock().unwrap().is_empty(), "a refused request reached the engine");
}
