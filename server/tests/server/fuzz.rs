//! Ten thousand malformed bodies, from valid ones by a seeded generator: each is refused or answered, and nothing breaks.

use std::time::Duration;

use futures::{StreamExt, stream};
use mesh_core::FinishReason;
use serde_json::{Map, Value, json};

use crate::fake::{Form, Server, Step};

const BODIES: u64 = 10_000;

/// The same numbers each time (splitmix64).
struct Dice(u64);

impl Dice {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }

    fn below(&mut self, bound: usize) -> usize {
        (self.next() % bound.max(1) as u64) as usize
    }

    fn pick<'a, T>(&mut self, of: &'a [T]) -> &'a T {
        &of[self.below(of.len())]
    }
}

/// A valid body for every path that takes one.
fn valid() -> Vec<(&'static str, Value)> {
    let messages = json!([
        { "role": "system", "content": "Be kind." },
        { "role": "user", "content": [{ "type": "text", "text": "Hi" }] },
        { "role": "assistant", "content": null, "reasoning_content": "hm", "tool_calls": [
            { "id": "c", "type": "function", "function": { "name": "f", "arguments": "{\"x\": 1}" } }] },
        { "role": "tool", "tool_call_id": "c", "content": "no" },
    ]);
    let tools = json!([{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }]);
    vec![
        (
            "/v1/chat/completions",
            json!({ "model": "fake", "messages": messages, "tools": tools, "tool_choice": "auto", "temperature": 0.5,
                "top_p": 0.9, "seed": 7, "max_tokens": 5, "stop": ["END"], "stream": true,
                "stream_options": { "include_usage": true }, "n": 1, "logit_bias": {}, "user": "u",
                "response_format": { "type": "text" } }),
        ),
        (
            "/v1/completions",
            json!({ "model": "fake", "prompt": "once", "max_tokens": 5, "temperature": 1, "stop": "END",
                "stream": false, "echo": false, "best_of": 1, "logprobs": null }),
        ),
        (
            "/v1/messages",
            json!({ "model": "fake", "max_tokens": 9, "system": [{ "type": "text", "text": "Be kind." }],
                "messages": [{ "role": "user", "content": "Hi" },
                    { "role": "assistant", "content": [{ "type": "thinking", "thinking": "x", "signature": "y" },
                        { "type": "tool_use", "id": "t", "name": "f", "input": { "x": 1 } }] },
                    { "role": "user", "content": [{ "type": "tool_result", "tool_use_id": "t", "content": "no" }] }],
                "tools": [{ "name": "f", "input_schema": { "type": "object" } }], "tool_choice": { "type": "auto" },
                "thinking": { "type": "disabled" }, "stop_sequences": ["END"], "metadata": { "user_id": "u" },
                "stream": true }),
        ),
        ("/v1/messages/count_tokens", json!({ "model": "fake", "messages": [{ "role": "user", "content": "Hi" }] })),
        (
            "/v1/responses",
            json!({ "model": "fake", "instructions": "Be kind.", "stream": true, "store": true,
                "input": [{ "role": "user", "content": [{ "type": "input_text", "text": "Hi" }] },
                    { "type": "reasoning", "summary": [], "content": [{ "type": "reasoning_text", "text": "x" }] },
                    { "type": "function_call", "call_id": "c", "name": "f", "arguments": "{}" },
                    { "type": "function_call_output", "call_id": "c", "output": "no" }],
                "tools": [{ "type": "function", "name": "f", "parameters": {} }], "tool_choice": "auto",
                "reasoning": { "summary": "auto" }, "text": { "format": { "type": "text" } }, "metadata": { "k": "v" },
                "max_output_tokens": 9, "include": ["reasoning.encrypted_content"], "truncation": "disabled" }),
        ),
        ("/v1/responses/{response_id}/cancel", json!({})),
        ("/v1/requests/{id}/cancel", json!({})),
        (
            "/v1/embeddings",
            json!({ "model": "fake", "input": ["a", [1, 2]], "encoding_format": "base64", "pooling": "last" }),
        ),
        ("/tokenize", json!({ "content": "né", "add_special": true, "with_pieces": true })),
        ("/detokenize", json!({ "model": "fake", "tokens": [97, 98] })),
        (
            "/apply-template",
            json!({ "messages": messages, "tools": tools, "chat_template_kwargs": { "enable_thinking": true } }),
        ),
    ]
}

/// Some place within a value.
fn place<'a>(value: &'a mut Value, dice: &mut Dice) -> &'a mut Value {
    let within = match value {
        Value::Array(values) => values.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if within == 0 || dice.below(4) == 0 {
        return value;
    }
    let at = dice.below(within);
    let inner = match value {
        Value::Array(values) => values.get_mut(at),
        Value::Object(fields) => fields.values_mut().nth(at),
        _ => None,
    };
    place(inner.expect("it was counted"), dice)
}

fn mutated(body: &Value, dice: &mut Dice) -> Vec<u8> {
    let mut body = body.clone();
    for _ in 0..=dice.below(2) {
        let other = match dice.below(9) {
            0 => Value::Null,
            1 => true.into(),
            2 => (-1).into(),
            3 => json!(1e308),
            4 => u64::MAX.into(),
            5 => "\u{0}\u{fffd}🦀".into(),
            6 => json!([]),
            7 => json!({ "x": [1] }),
            _ => "END".into(),
        };
        let at = place(&mut body, dice);
        match dice.below(4) {
            0 => match at {
                Value::Object(fields) => {
                    let name = dice.pick(&["mood", "model ", "n", "type", "__proto__", "stream"]);
                    fields.insert((*name).to_owned(), other);
                }
                at => *at = other,
            },
            1 => *at = Value::Array(vec![at.take()]),
            2 => *at = Value::Object(Map::from_iter([("content".to_owned(), at.take())])),
            _ => *at = other,
        }
    }
    let mut text = body.to_string().into_bytes();
    match dice.below(8) {
        0 => text.truncate(dice.below(text.len())),
        1 => {
            let at = dice.below(text.len() + 1);
            text.insert(at, *dice.pick(&[0xff, 0xc3, 0x80, 0, b'"', b'{', b'\\', b',']));
        }
        2 => {
            let deep = 1 << dice.below(14);
            let nested = [b"[".repeat(deep), b"]".repeat(deep)].concat();
            text = replace_a_number(text, &nested, dice);
        }
        3 => {
            let number = dice.pick(&["1e999", "-1e999", "99999999999999999999999", "0.1e-999", "-0", "1.5"]);
            text = replace_a_number(text, number.as_bytes(), dice);
        }
        4 if text.starts_with(b"{\"") => {
            // The first field twice.
            let end = text.iter().position(|byte| *byte == b':').unwrap_or(1);
            let twice = [&text[..=end], b"null,", &text[1..]].concat();
            text = twice;
        }
        5 => {
            let (from, to) = (dice.below(text.len()), dice.below(text.len()));
            text.drain(from.min(to)..from.max(to));
        }
        _ => {}
    }
    text
}

/// Puts something in the place of a value that ends with a digit, or of the whole.
fn replace_a_number(text: Vec<u8>, with: &[u8], dice: &mut Dice) -> Vec<u8> {
    let digits: Vec<usize> = (0..text.len()).filter(|at| text[*at].is_ascii_digit()).collect();
    if digits.is_empty() {
        return with.to_vec();
    }
    let at = *dice.pick(&digits);
    [&text[..at], with, &text[at + 1..]].concat()
}

#[tokio::test(flavor = "multi_thread")]
async fn malformed_bodies_are_refused_and_nothing_breaks() {
    let script = vec![Step::Text("<think>x</think>"), Step::Text("y"), Step::Finish(FinishReason::Stop)];
    let tokens = vec![Step::Bytes(b"<think>x</think>y"), Step::Finish(FinishReason::Stop)];
    let servers = [Server::start(Form::Text, script).await, Server::start(Form::Tokens, tokens).await];
    let valid = valid();
    let (_, document) = servers[0].get("/openapi.json").await;
    let posts = document["paths"].as_object().unwrap().iter().filter(|(_, path)| path["post"].is_object());
    let mut posts: Vec<&str> = posts.map(|(path, _)| path.as_str()).collect();
    let mut covered: Vec<&str> = valid.iter().map(|(path, _)| *path).collect();
    posts.sort_unstable();
    covered.sort_unstable();
    assert_eq!(posts, covered, "a route has no body here");
    for server in &servers {
        for (path, body) in valid.iter().filter(|(path, _)| !path.contains('{')) {
            let embeds = server.url == servers[1].url;
            let response = server.send(path, body.to_string()).await;
            let (status, text) = (response.status(), response.text().await.unwrap());
            assert!(status == 200 || (*path == "/v1/embeddings" && !embeds), "{path}: {status} {text}");
        }
    }
    let outcomes = stream::iter(0..BODIES).map(|seed| {
        let mut dice = Dice(seed);
        let (path, body) = dice.pick(&valid);
        let body = mutated(body, &mut dice);
        let server = &servers[(seed % 2) as usize];
        async move {
            let request = server.client.post(format!("{}{path}", server.url)).body(body.clone());
            let answer = tokio::time::timeout(Duration::from_secs(60), async {
                let response = request.send().await.unwrap();
                (response.status().as_u16(), response.bytes().await.unwrap())
            });
            let said = String::from_utf8_lossy(&body).chars().take(2000).collect::<String>();
            let Ok((status, bytes)) = answer.await else { panic!("body {seed} to {path} hangs: {said}") };
            let text = String::from_utf8_lossy(&bytes);
            assert!(status == 200 || (400..500).contains(&status), "body {seed} to {path}: {status} {text}\n{said}");
            if status != 200 {
                let error: Value = serde_json::from_slice(&bytes).unwrap();
                let message = error["error"]["message"].as_str().unwrap_or_default();
                assert!(!message.is_empty() && text.len() < 4000, "body {seed} to {path}: {text}");
            }
            status
        }
    });
    let outcomes: Vec<u16> = outcomes.buffer_unordered(16).collect().await;
    let refused = outcomes.iter().filter(|status| **status != 200).count();
    assert!(refused > BODIES as usize / 2 && refused < BODIES as usize, "{refused} refused");
}
