//! What answers have to be: formats, grammars, and calls that are forced.

use mesh_core::{FinishReason, Follower, Grammar, Prompt};
use serde_json::{Value, json};

use crate::fake::{Form, Server, Step};

const STOP: Step = Step::Finish(FinishReason::Stop);

fn function(name: &str, parameters: Value) -> Value {
    json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
}

fn tools() -> Value {
    let city = json!({ "type": "object", "properties": { "city": { "type": "string" } }, "required": ["city"] });
    json!([function("weather", city), function("now", json!({ "type": "object", "additionalProperties": false }))])
}

/// The bytes that may come next; 0 stands for the end.
fn next(follower: &mut dyn Follower) -> Vec<u8> {
    let mut mask = [0u32; 8];
    follower.allowed(&mut mask).unwrap();
    (0..=255u8).filter(|byte| mask[usize::from(*byte) / 32] >> (byte % 32) & 1 == 1).collect()
}

/// Whether an engine of byte tokens may write `text`, and end there.
fn admits(server: &Server, text: &str) -> bool {
    let rules = server.last_job().constraint.unwrap().rules.unwrap();
    let follower = &mut *rules.follow();
    for byte in text.bytes() {
        if !next(follower).contains(&byte) {
            return false;
        }
        follower.take(byte.into()).unwrap();
    }
    next(follower).contains(&0)
}

#[tokio::test]
async fn formats_reach_engines_that_take_text_as_grammars() {
    let server = Server::start(Form::Able, vec![Step::Text("{}"), STOP]).await;
    let schema = json!({ "type": "object", "title": "T" });
    let named = json!({ "name": "n", "schema": schema, "strict": true });
    for (more, grammar) in [
        (json!({ "response_format": { "type": "json_object" } }), Grammar::JsonObject),
        (
            json!({ "response_format": { "type": "json_schema", "json_schema": named } }),
            Grammar::JsonSchema(std::sync::Arc::new(schema.clone())),
        ),
        (json!({ "response_format": { "type": "regex", "pattern": "a+" } }), Grammar::Regex("a+".into())),
        (json!({ "structured_outputs": { "grammar": "start: \"a\"" } }), Grammar::Lark("start: \"a\"".into())),
    ] {
        for (status, answer) in [server.chat(more.clone()).await, server.complete(more.clone()).await] {
            assert_eq!(status, 200, "{answer}");
            let constraint = server.last_job().constraint.unwrap();
            assert_eq!(constraint.grammar, grammar);
            assert!(constraint.rules.is_none());
        }
    }
    server.chat(json!({ "response_format": { "type": "text" } })).await;
    assert_eq!(server.last_job().constraint, None);
}

#[tokio::test]
async fn engines_that_take_tokens_get_rules_for_them() {
    let server = Server::start(Form::AbleTokens, vec![Step::Bytes(b"{}"), STOP]).await;
    let schema = json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"],
        "additionalProperties": false });
    let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } });
    server.complete(json!({ "response_format": format })).await;
    assert!(admits(&server, "{\"a\": 12}"));
    assert!(!admits(&server, "{\"a\": 1"), "it is not over");
    assert!(!admits(&server, "{\"b\""));
    server.complete(json!({ "structured_outputs": { "choice": ["a.b", "c"] } })).await;
    assert!(admits(&server, "a.b") && admits(&server, "c") && !admits(&server, "axb"));
    // In a chat the reasoning comes first, where the prompt or the model opens it.
    server.chat(json!({ "response_format": format, "chat_template_kwargs": { "begin": "<think>" } })).await;
    assert_eq!(server.last_prompt(), Prompt::Tokens("<user>Hi<assistant><think>".bytes().map(u32::from).collect()));
    assert!(admits(&server, "It is 12. {</think>\n\n{\"a\":12}"));
    assert!(!admits(&server, "{\"a\": 12}"), "that is reasoning");
    server.chat(json!({ "response_format": format })).await;
    assert!(admits(&server, "{\"a\": 12}"));
}

#[tokio::test]
async fn what_cannot_be_enforced_is_refused_with_its_keyword() {
    for form in [Form::Able, Form::AbleTokens] {
        let server = Server::start(form, vec![STOP]).await;
        let schema = json!({ "type": "object", "properties": { "a": { "not": {} } } });
        let format = json!({ "type": "json_schema", "json_schema": { "name": "n", "schema": schema } });
        let forced = json!({ "tools": [function("f", schema)], "tool_choice": "required" });
        for (more, param, word) in [
            (json!({ "response_format": format }), "response_format", "`properties.a.not`"),
            (forced, "tools", "`f.parameters.properties.a.not`"),
        ] {
            let (status, answer) = server.chat(more).await;
            assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(word), "{answer}");
        }
        assert!(server.fake.jobs.lock().unwrap().is_empty());
    }
    let server = Server::start(Form::AbleTokens, vec![STOP]).await;
    for outputs in [json!({ "regex": "(" }), json!({ "grammar": "start: x" })] {
        let (status, answer) = server.chat(json!({ "structured_outputs": outputs })).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("structured_outputs")), "{answer}");
    }
    for (more, param) in [
        (json!({ "tool_choice": "required" }), "tool_choice"),
        (json!({ "tools": tools(), "tool_choice": "sometimes" }), "tool_choice"),
        (
            json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "g" } } }),
            "tool_choice.function.name",
        ),
        (json!({ "tools": tools(), "response_format": { "type": "json_object" } }), "response_format"),
    ] {
        let (status, answer) = server.chat(more.clone()).await;
        assert_eq!((status, answer["error"]["param"].as_str()), (400, Some(param)), "{more}: {answer}");
    }
}

async fn called(server: &Server, more: Value) -> (Vec<(String, Value)>, String) {
    let (status, answer) = server.chat(more.clone()).await;
    assert_eq!(status, 200, "{answer}");
    let choice = &answer["choices"][0];
    let call = |call: &Value| {
        let arguments = serde_json::from_str(call["function"]["arguments"].as_str().unwrap()).unwrap();
        (call["function"]["name"].as_str().unwrap().to_owned(), arguments)
    };
    let calls: Vec<_> = choice["message"]["tool_calls"].as_array().into_iter().flatten().map(call).collect();
    let events = server.chat_events(more).await;
    let chunks: Vec<Value> = events.iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
    let streamed = chunks.iter().flat_map(|chunk| chunk["choices"][0]["delta"]["tool_calls"].as_array()).flatten();
    assert_eq!(streamed.map(call).collect::<Vec<_>>(), calls);
    (calls, choice["finish_reason"].as_str().unwrap().into())
}

#[tokio::test]
async fn forced_calls_are_plain_json_for_engines_that_take_text() {
    let script = vec![Step::Text("[{\"name\": \"weather\", \"argu"), Step::Text("ments\": {\"city\": \"x\"}}]"), STOP];
    let server = Server::start(Form::Able, script).await;
    let (calls, finish) = called(&server, json!({ "tools": tools(), "tool_choice": "required" })).await;
    assert_eq!((calls, finish.as_str()), (vec![("weather".into(), json!({ "city": "x" }))], "tool_calls"));
    let Grammar::JsonSchema(schema) = server.last_job().constraint.unwrap().grammar else { panic!() };
    assert_eq!((&schema["type"], &schema["minItems"]), (&json!("array"), &json!(1)));
    assert_eq!(schema["items"]["anyOf"][1]["properties"]["name"], json!({ "const": "now" }));
    let one = vec![Step::Text("{\"name\": \"now\", \"arguments\": {}}"), STOP];
    *server.fake.script.lock().unwrap() = one;
    let named = json!({ "type": "function", "function": { "name": "now", "strict": true } });
    let more = json!({ "tools": tools(), "tool_choice": named });
    let (calls, finish) = called(&server, more).await;
    assert_eq!((calls, finish.as_str()), (vec![("now".into(), json!({}))], "tool_calls"));
    let Grammar::JsonSchema(schema) = server.last_job().constraint.unwrap().grammar else { panic!() };
    assert_eq!(schema["properties"]["name"], json!({ "const": "now" }));
    // One that was cut off is no call.
    *server.fake.script.lock().unwrap() = vec![Step::Text("{\"name\": \"n"), Step::Finish(FinishReason::Length)];
    let (_, answer) = server.chat(json!({ "tools": tools(), "tool_choice": "required" })).await;
    let choice = &answer["choices"][0];
    assert_eq!((&choice["message"]["content"], &choice["finish_reason"]), (&json!("{\"name\": \"n"), &json!("length")));
    assert_eq!(choice["message"]["warnings"][0]["code"], "malformed_tool_call");
}

#[tokio::test]
async fn forced_calls_are_the_dialects_own_for_engines_that_take_tokens() {
    let text = "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"x\"}}\n</tool_call>";
    let server = Server::start(Form::AbleTokens, vec![Step::Bytes(text.as_bytes()), STOP]).await;
    let more = json!({ "tools": tools(), "tool_choice": "required" });
    let (calls, finish) = called(&server, more.clone()).await;
    assert_eq!((calls, finish.as_str()), (vec![("weather".into(), json!({ "city": "x" }))], "tool_calls"));
    assert!(admits(&server, text) && admits(&server, &format!("{text}\n{text}")));
    assert!(!admits(&server, "The weather"));
    let mut single = more;
    single["parallel_tool_calls"] = false.into();
    called(&server, single).await;
    assert!(admits(&server, text) && !admits(&server, &format!("{text}\n{text}")));
    called(
        &server,
        json!({ "tools": tools(), "tool_choice": { "type": "function", "function": { "name": "weather" } } }),
    )
    .await;
    assert!(
        admits(&server, text) && !admits(&server, "<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>")
    );
}

#[tokio::test]
async fn an_answer_without_parallel_calls_ends_with_its_first() {
    let call = "<tool_call>{\"name\": \"now\"}</tool_call>";
    let script = vec![Step::Text("One. "), Step::Text(call), Step::Text(call), Step::Hang];
    let server = Server::start(Form::Text, script).await;
    let (calls, finish) = called(&server, json!({ "tools": tools(), "parallel_tool_calls": false })).await;
    assert_eq!((calls.len(), finish.as_str()), (1, "tool_calls"));
    assert_eq!(server.fake.dropped.load(std::sync::atomic::Ordering::SeqCst), 2);
}

#[tokio::test]
async fn a_thinking_budget_ends_the_reasoning() {
    let server = Server::start(Form::AbleTokens, vec![Step::Bytes(b"x"), STOP]).await;
    for more in [json!({ "thinking_budget": 12 }), json!({ "reasoning": { "max_tokens": 12 } })] {
        let mut more = more;
        more["chat_template_kwargs"] = json!({ "begin": "<think>" });
        assert_eq!(server.chat(more).await.0, 200);
        assert!(admits(&server, "abcdefghijkl</think>and whatever"));
        assert!(admits(&server, "ab</think>and whatever"));
        assert!(!admits(&server, "abcdefghijklm"));
    }
    let (status, answer) = server.chat(json!({ "thinking_budget": 4, "reasoning": { "max_tokens": 5 } })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("reasoning.max_tokens")));
    let server = Server::start(Form::Able, vec![STOP]).await;
    let (status, answer) = server.chat(json!({ "thinking_budget": 4 })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("thinking_budget")), "{answer}");
}

#[tokio::test]
async fn strict_functions_are_called_as_they_are_or_not_at_all() {
    let parameters = json!({ "type": "object", "properties": { "n": { "type": "integer" } }, "required": ["n"],
        "additionalProperties": false });
    let mut strict = function("strict", parameters);
    strict["function"]["strict"] = true.into();
    let more = json!({ "tools": [strict, function("lax", json!({ "not": {} }))] });
    let server = Server::start(Form::Able, vec![STOP]).await;
    let (status, answer) = server.chat(more.clone()).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("tools")), "{answer}");
    // Tokens that are bytes hold no marker that could be watched.
    let server = Server::start(Form::AbleTokens, vec![STOP]).await;
    let (status, answer) = server.chat(more).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("tools")), "{answer}");
}
