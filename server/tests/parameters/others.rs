//! `/v1/messages`, `/v1/responses` and `/v1/embeddings`.

use serde_json::{Value, json};

use crate::{
    Plan, sampling,
    server::{PROMPT, Surface, read, said, written},
};

const USER: &str = "user";

pub fn messages() -> Plan {
    let probes: Vec<(_, fn(&Surface))> = vec![
        ("model", |surface| surface.refuses("model", &json!({ "model": null }))),
        ("messages", |surface| {
            changes(surface, json!({ "messages": [{ "role": USER, "content": "1 + 1 = " }] }));
            surface.refuses("messages", &json!({ "messages": null }));
        }),
        ("system", |surface| reads_more(surface, json!({ "system": "You are a cat." }))),
        ("tools", |surface| reads_more(surface, json!({ "tools": [tool()] }))),
        ("tool_choice", |surface| {
            // A model of random numbers that may go on calling does.
            let any = json!({ "type": "any", "disable_parallel_tool_use": true });
            for choice in [any, json!({ "type": "tool", "name": "one" })] {
                let answer = surface.answer(&json!({ "tools": [tool()], "tool_choice": choice, "max_tokens": 900 }));
                assert_eq!(answer["stop_reason"], "tool_use", "{answer}");
                assert!(answer["content"].as_array().unwrap().iter().any(|block| block["name"] == "one"), "{answer}");
            }
            surface.refuses("tool_choice", &json!({ "tool_choice": { "type": "any" } }));
        }),
        ("thinking", thinking),
        ("output_config", |surface| {
            let format = json!({ "type": "json_schema", "schema": { "enum": ["yes", "no"] } });
            let text = surface.text(&json!({ "output_config": { "format": format } }));
            assert!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
            thinks(surface, json!({ "output_config": { "effort": "high" } }));
        }),
        ("cache_control", |surface| surface.changes_nothing(&json!({ "cache_control": { "type": "ephemeral" } }))),
        ("max_tokens", |surface| {
            for most in [1, 5] {
                let answer = surface.answer(&json!({ "max_tokens": most }));
                assert_eq!((written(&answer), answer["stop_reason"].as_str()), (most, Some("max_tokens")));
            }
            surface.refuses("max_tokens", &json!({ "max_tokens": null }));
        }),
        ("stop_sequences", |surface| {
            let text = surface.text(&json!({}));
            let stop: String = text.chars().skip(2).take(2).collect();
            let answer = surface.answer(&json!({ "stop_sequences": [stop] }));
            assert_eq!(answer["stop_reason"], "stop_sequence", "{answer}");
            assert_eq!(answer["stop_sequence"], stop, "{answer}");
            let mut before = String::new();
            said(&answer, &mut before);
            assert!(text.starts_with(&before) && !before.contains(&stop) && before.len() < text.len());
        }),
        ("stream", sampling::stream),
        ("temperature", |surface| {
            surface.changes_nothing(&json!({}));
            changes(surface, json!({ "temperature": 2 }));
        }),
        ("top_p", |surface| surface.changes_nothing(&json!({ "temperature": 2, "top_p": 1e-6 }))),
        ("top_k", |surface| surface.changes_nothing(&json!({ "temperature": 2, "top_k": 1 }))),
        ("metadata", |surface| surface.changes_nothing(&json!({ "metadata": { "user_id": "somebody" } }))),
        ("service_tier", |surface| {
            surface.changes_nothing(&json!({ "service_tier": "standard_only" }));
            surface.refuses("service_tier", &json!({ "service_tier": "priority" }));
        }),
    ];
    Plan {
        path: "/v1/messages",
        base: json!({ "messages": [{ "role": USER, "content": PROMPT }], "temperature": 0, "max_tokens": 24 }),
        probes,
        refused: vec![
            ("container", json!("c")),
            ("inference_geo", json!("us")),
            ("context_management", json!({ "edits": [] })),
            ("mcp_servers", json!([{ "type": "url", "url": "https://localhost", "name": "s" }])),
        ],
        refused_by_llama_server: vec![],
    }
}

fn tool() -> Value {
    let schema = json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "required": ["a"],
        "additionalProperties": false });
    json!({ "name": "one", "input_schema": schema })
}

fn changes(surface: &Surface, more: Value) {
    assert_ne!(surface.text(&more), surface.text(&json!({})), "{more}");
}

fn reads_more(surface: &Surface, more: Value) {
    assert!(read(&surface.answer(&more)) > read(&surface.answer(&json!({}))) + 5, "{more}");
}

/// The template opens a block of reasoning, which is one token.
fn thinks(surface: &Surface, more: Value) {
    assert_eq!(read(&surface.answer(&more)), read(&surface.answer(&json!({}))) + 1, "{more}");
}

fn thinking(surface: &Surface) {
    surface.changes_nothing(&json!({ "thinking": { "type": "disabled" } }));
    surface.changes_nothing(&json!({ "thinking": { "type": "adaptive" } }));
    let ask = json!({ "thinking": { "type": "enabled", "budget_tokens": 4 } });
    if !surface.on_mlx() {
        return surface.refuses("thinking", &ask);
    }
    thinks(surface, ask.clone());
    let reasoning = |ask: &Value| {
        let answer = surface.answer(ask);
        answer["content"][0]["thinking"].as_str().unwrap().to_owned()
    };
    let all = reasoning(&json!({ "thinking": { "type": "enabled", "budget_tokens": 23 } }));
    let some = reasoning(&ask);
    assert!(some.len() < all.len() && all.starts_with(&some), "{some} and {all}");
}

pub fn responses() -> Plan {
    let probes: Vec<(_, fn(&Surface))> = vec![
        ("model", |surface| surface.refuses("model", &json!({ "model": null }))),
        ("input", |surface| {
            changes(surface, json!({ "input": "1 + 1 = " }));
            surface.changes_nothing(&json!({ "input": [{ "role": USER, "content": PROMPT }] }));
            surface.refuses("input", &json!({ "input": null }));
        }),
        ("instructions", |surface| reads_more(surface, json!({ "instructions": "You are a cat." }))),
        ("previous_response_id", |surface| {
            let before = surface.answer(&json!({}));
            reads_more(surface, json!({ "previous_response_id": before["id"] }));
        }),
        ("store", |surface| {
            let kept = surface.answer(&json!({ "store": false }));
            let (status, answer) = surface.ask(&json!({ "previous_response_id": kept["id"] }));
            assert_eq!(status, 404, "{answer}");
        }),
        ("stream", |surface| {
            let events = surface.events(&json!({ "stream": true }));
            let mut streamed = String::new();
            let deltas = events.iter().filter(|event| event["type"] == "response.output_text.delta");
            deltas.for_each(|event| streamed.push_str(event["delta"].as_str().unwrap()));
            assert_eq!(streamed, surface.text(&json!({})));
        }),
        ("stream_options", |surface| {
            surface.refuses("stream_options", &json!({ "stream_options": { "include_obfuscation": false } }));
            let options = |on: bool| json!({ "stream": true, "stream_options": { "include_obfuscation": on } });
            surface.refuses("stream_options", &options(true));
            assert!(!surface.events(&options(false)).is_empty());
        }),
        ("max_output_tokens", |surface| {
            for most in [1, 5] {
                let answer = surface.answer(&json!({ "max_output_tokens": most }));
                assert_eq!((written(&answer), answer["status"].as_str()), (most, Some("incomplete")));
            }
        }),
        ("temperature", |surface| {
            surface.changes_nothing(&json!({}));
            changes(surface, json!({ "temperature": 2 }));
        }),
        ("top_p", |surface| surface.changes_nothing(&json!({ "temperature": 2, "top_p": 1e-6 }))),
        ("tools", |surface| reads_more(surface, json!({ "tools": [function()] }))),
        ("tool_choice", |surface| {
            for choice in [json!("required"), json!({ "type": "function", "name": "one" })] {
                assert_eq!(calls(surface, json!({ "tool_choice": choice, "parallel_tool_calls": false })), 1);
            }
            surface.refuses("tool_choice", &json!({ "tool_choice": "required" }));
        }),
        ("parallel_tool_calls", |surface| {
            assert_eq!(calls(surface, json!({ "tool_choice": "required", "parallel_tool_calls": false })), 1);
            assert_eq!(surface.answer(&json!({ "parallel_tool_calls": true }))["parallel_tool_calls"], true);
        }),
        ("reasoning", |surface| {
            thinks(surface, json!({ "reasoning": { "effort": "high" } }));
            surface.changes_nothing(&json!({ "reasoning": { "effort": "none" } }));
        }),
        ("text", |surface| {
            let format = json!({ "type": "json_schema", "name": "n", "schema": { "enum": ["yes", "no"] } });
            let text = surface.text(&json!({ "text": { "format": format } }));
            assert!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
            surface.refuses("text", &json!({ "text": { "verbosity": "low" } }));
        }),
        ("metadata", |surface| {
            assert_eq!(surface.answer(&json!({ "metadata": { "a": "b" } }))["metadata"], json!({ "a": "b" }));
        }),
        ("include", |surface| {
            let sealed = surface
                .answer(&json!({ "include": ["reasoning.encrypted_content"], "reasoning": { "effort": "high" } }));
            assert!(sealed["output"][0]["encrypted_content"].is_string(), "{sealed}");
            let plain = surface.answer(&json!({ "reasoning": { "effort": "high" } }));
            assert!(plain["output"][0]["encrypted_content"].is_null(), "{plain}");
            surface.refuses("include", &json!({ "include": ["file_search_call.results"] }));
        }),
        ("user", |surface| surface.changes_nothing(&json!({ "user": "somebody" }))),
        ("safety_identifier", |surface| surface.changes_nothing(&json!({ "safety_identifier": "somebody" }))),
        ("prompt_cache_key", |surface| surface.changes_nothing(&json!({ "prompt_cache_key": "this" }))),
        ("service_tier", |surface| {
            surface.changes_nothing(&json!({ "service_tier": "default" }));
            surface.refuses("service_tier", &json!({ "service_tier": "flex" }));
        }),
    ];
    Plan {
        path: "/v1/responses",
        base: json!({ "input": PROMPT, "temperature": 0, "max_output_tokens": 24 }),
        probes,
        refused: vec![
            ("truncation", json!("auto")),
            ("prompt_cache_retention", json!("24h")),
            ("background", json!(true)),
            ("conversation", json!("conv_1")),
            ("prompt", json!({ "id": "p" })),
            ("max_tool_calls", json!(1)),
            ("top_logprobs", json!(3)),
            ("context_management", json!([{ "type": "compaction" }])),
        ],
        refused_by_llama_server: vec![],
    }
}

fn function() -> Value {
    let tool = tool();
    json!({ "type": "function", "name": tool["name"], "parameters": tool["input_schema"] })
}

fn calls(surface: &Surface, more: Value) -> usize {
    let mut ask = json!({ "tools": [function()], "max_output_tokens": 900 });
    ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    let answer = surface.answer(&ask);
    answer["output"].as_array().unwrap().iter().filter(|item| item["type"] == "function_call").count()
}

pub fn embeddings() -> Plan {
    let probes: Vec<(_, fn(&Surface))> = vec![
        ("model", |surface| surface.refuses("model", &json!({ "model": null }))),
        ("input", |surface| {
            assert_ne!(vector(surface, json!({ "input": "1 + 1 = " })), vector(surface, json!({})));
            let both = surface.answer(&json!({ "input": ["1 + 1 = ", PROMPT] }));
            assert_eq!(both["data"].as_array().unwrap().len(), 2);
            surface.refuses("input", &json!({ "input": null }));
        }),
        ("encoding_format", |surface| {
            assert!(vector(surface, json!({ "encoding_format": "float" })).is_array());
            assert!(vector(surface, json!({ "encoding_format": "base64" })).is_string());
        }),
        ("pooling", |surface| {
            let pooled = |pooling: &str| vector(surface, json!({ "pooling": pooling }));
            assert_eq!(pooled("mean"), vector(surface, json!({})));
            assert_ne!(pooled("last"), pooled("mean"));
        }),
        ("user", |surface| assert_eq!(vector(surface, json!({ "user": "somebody" })), vector(surface, json!({})))),
    ];
    Plan {
        path: "/v1/embeddings",
        base: json!({ "input": PROMPT }),
        probes,
        refused: vec![("dimensions", json!(16))],
        refused_by_llama_server: vec![],
    }
}

fn vector(surface: &Surface, more: Value) -> Value {
    surface.answer(&more)["data"][0]["embedding"].clone()
}
