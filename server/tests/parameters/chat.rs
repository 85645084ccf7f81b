//! `/v1/chat/completions`.

use serde_json::{Value, json};

use crate::{
    Plan, sampling,
    server::{PROMPT, Surface, read},
};

pub fn plan() -> Plan {
    let mut probes = sampling::probes();
    probes.extend([
        ("messages", messages as fn(&Surface)),
        ("max_completion_tokens", |surface| sampling::limit(surface, "max_completion_tokens")),
        ("tools", tools),
        ("tool_choice", tool_choice),
        ("parallel_tool_calls", parallel_tool_calls),
        ("chat_template_kwargs", chat_template_kwargs),
        ("reasoning_effort", |surface| switch(surface, &|on| json!({ "reasoning_effort": level(on) }))),
        ("enable_thinking", |surface| switch(surface, &|on| json!({ "enable_thinking": on }))),
        ("thinking_budget", |surface| {
            budget(surface, json!({ "enable_thinking": true, "thinking_budget": 4 }));
        }),
        ("reasoning", reasoning),
        ("logprobs", logprobs),
        ("top_logprobs", top_logprobs),
        ("safety_identifier", |surface| surface.changes_nothing(&json!({ "safety_identifier": "somebody" }))),
        ("prompt_cache_key", |surface| surface.changes_nothing(&json!({ "prompt_cache_key": "this" }))),
    ]);
    Plan {
        path: "/v1/chat/completions",
        base: json!({ "messages": [{ "role": "user", "content": PROMPT }], "temperature": 0, "max_tokens": 24,
            "ignore_eos": true }),
        probes,
        refused: vec![
            ("service_tier", json!("flex")),
            ("store", json!(true)),
            ("metadata", json!({ "a": "b" })),
            ("functions", json!([{ "name": "f" }])),
            ("function_call", json!("auto")),
            ("modalities", json!(["text", "audio"])),
            ("audio", json!({ "voice": "alloy", "format": "wav" })),
            ("prediction", json!({ "type": "content", "content": "a" })),
            ("web_search_options", json!({})),
            ("verbosity", json!("low")),
            ("prompt_cache_retention", json!("24h")),
        ],
        refused_by_llama_server: vec![("min_tokens", json!(6)), ("thinking_budget", json!(4))],
    }
}

fn messages(surface: &Surface) {
    let other = json!({ "messages": [{ "role": "user", "content": "1 + 1 = " }] });
    assert_ne!(surface.text(&other), surface.text(&json!({})));
    surface.refuses("messages", &json!({ "messages": null }));
}

/// Two functions, with one call each.
fn functions() -> Value {
    let function = |name: &str| {
        let parameters = json!({ "type": "object", "properties": { "a": { "enum": [1] } }, "required": ["a"],
            "additionalProperties": false });
        json!({ "type": "function", "function": { "name": name, "parameters": parameters } })
    };
    json!([function("one"), function("two")])
}

fn tools(surface: &Surface) {
    let with = surface.answer(&json!({ "tools": functions() }));
    assert!(read(&with) > read(&surface.answer(&json!({}))) + 20);
}

fn forced(more: Value) -> Value {
    let mut ask = json!({ "tools": functions(), "tool_choice": "required", "max_tokens": 900, "ignore_eos": false,
        "parallel_tool_calls": false });
    ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    ask
}

fn tool_choice(surface: &Surface) {
    let called = |more: Value| {
        let answer = surface.answer(&forced(more));
        let choice = &answer["choices"][0];
        assert_eq!(choice["finish_reason"], "tool_calls", "{answer}");
        let calls = choice["message"]["tool_calls"].as_array().unwrap();
        assert_eq!(calls[0]["function"]["arguments"], "{\"a\":1}");
        calls[0]["function"]["name"].as_str().unwrap().to_owned()
    };
    assert!(["one", "two"].contains(&called(json!({})).as_str()));
    for name in ["one", "two"] {
        assert_eq!(called(json!({ "tool_choice": { "type": "function", "function": { "name": name } } })), name);
    }
    let none = surface.answer(&json!({ "tools": functions(), "tool_choice": "none" }));
    assert_eq!(read(&none), read(&surface.answer(&json!({}))), "it is shown no tools");
    surface.refuses("tool_choice", &json!({ "tool_choice": "required" }));
}

/// What begins another call is made likely: `<tool_call>`, and `,` where calls are plain JSON.
fn parallel_tool_calls(surface: &Surface) {
    let calls = |parallel: bool| {
        let bias = if surface.on_mlx() { json!({ "5": 100 }) } else { json!({ "20": 100 }) };
        let answer = surface.answer(&forced(json!({ "parallel_tool_calls": parallel, "logit_bias": bias })));
        // A list of calls that was cut short is content.
        answer["choices"][0]["message"].to_string().matches("arguments").count()
    };
    assert_eq!(calls(false), 1);
    assert!(calls(true) > 1);
}

fn chat_template_kwargs(surface: &Surface) {
    let prompt_tokens = |kwargs: Value| read(&surface.answer(&json!({ "chat_template_kwargs": kwargs })));
    let without = prompt_tokens(json!({}));
    assert!(prompt_tokens(json!({ "hello": "a variable of the template's own" })) > without + 5);
    assert_eq!(prompt_tokens(json!({ "enable_thinking": true })), without + 1);
    assert_eq!(prompt_tokens(json!({ "not_read_by_the_template": true })), without);
}

fn level(on: bool) -> &'static str {
    if on { "high" } else { "none" }
}

/// The template opens a block of reasoning, which is one token, and all that follows is read as such.
fn switch(surface: &Surface, ask: &dyn Fn(bool) -> Value) {
    let message = |on| {
        let answer = surface.answer(&ask(on));
        (read(&answer), answer["choices"][0]["message"].clone())
    };
    let ((more, on), (less, off)) = (message(true), message(false));
    assert_eq!(more, less + 1);
    assert!(on["reasoning_content"].as_str().is_some_and(|text| !text.is_empty()), "{on}");
    assert!(off["content"].as_str().is_some_and(|text| !text.is_empty()), "{off}");
}

fn budget(surface: &Surface, ask: Value) {
    let reasoning = |ask: &Value| {
        let answer = surface.answer(ask);
        answer["usage"]["completion_tokens_details"]["reasoning_tokens"].as_u64().unwrap()
    };
    let unlimited = reasoning(&json!({ "enable_thinking": true }));
    let limited = reasoning(&ask);
    // The marker that ends it is among them.
    assert!(limited <= 5 && unlimited > 5, "{limited} and {unlimited} tokens");
}

fn reasoning(surface: &Surface) {
    switch(surface, &|on| json!({ "reasoning": { "effort": level(on) } }));
    let ask = json!({ "reasoning": { "effort": "high", "max_tokens": 4 } });
    match surface.on_mlx() {
        true => budget(surface, ask),
        false => surface.refuses("reasoning", &ask),
    }
}

fn logprobs(surface: &Surface) {
    assert_eq!(surface.answer(&json!({ "logprobs": false }))["choices"][0]["logprobs"], Value::Null);
    let answer = surface.answer(&json!({ "logprobs": true }));
    let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
    assert!(!tokens.is_empty() && tokens.iter().all(|token| token["logprob"].as_f64().is_some_and(|one| one <= 0.0)));
    assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().is_empty()), "{answer}");
}

fn top_logprobs(surface: &Surface) {
    for top in [1, 3] {
        let answer = surface.answer(&json!({ "logprobs": true, "top_logprobs": top }));
        let tokens = answer["choices"][0]["logprobs"]["content"].as_array().unwrap();
        assert!(!tokens.is_empty());
        assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == top), "{answer}");
    }
    surface.refuses("top_logprobs", &json!({ "top_logprobs": 3 }));
}
