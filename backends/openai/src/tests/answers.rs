//! What goes out, and what is made of what comes back.

use std::{collections::VecDeque, sync::Arc, time::Duration};

use futures::{FutureExt, stream};
use mesh_core::{
    Delta, EngineError, FinishReason, Grammar, Sampling, Usage,
    answer::{Finish, Finished, Part},
    ask::{Ask, Chat, Effort, Subject, ToolChoice},
    chat::{FunctionCall, Message, ToolCall},
    node::{Rejection, RejectionKind},
};
use serde_json::{Value, json};

use super::{
    ask, chat, content, engine, message, parts, share,
    stand_in::{Answer, StandIn, Step, bare, delta, events, finish, hello, sse, steps, usage, vllm},
    whole,
};
use crate::{
    client::Events,
    error::Trouble,
    reading::{Progress, Reading},
    request::How,
};

/// An answer with everything that one may hold.
fn rich() -> Vec<Value> {
    let call = |index: u32, function: Value| json!({ "tool_calls": [{ "index": index, "function": function }] });
    vec![
        delta(json!({ "role": "assistant", "content": "" })),
        delta(json!({ "reasoning_content": "Hm ☃." })),
        delta(json!({ "content": "Zwölf 🦀" })),
        delta(
            json!({ "tool_calls": [{ "index": 0, "id": "a", "type": "function", "function": { "name": "f", "arguments": "" } }] }),
        ),
        delta(call(0, json!({ "arguments": "{\"x\"" }))),
        delta(call(1, json!({ "name": "g", "arguments": "{" }))),
        delta(call(0, json!({ "arguments": ": \"ü\"}" }))),
        delta(call(1, json!({ "arguments": "}" }))),
        finish("tool_calls"),
        json!({ "choices": [], "usage": {
            "prompt_tokens": 9, "completion_tokens": 7, "prompt_tokens_details": { "cached_tokens": 4 },
            "completion_tokens_details": { "reasoning_tokens": 3 },
        } }),
    ]
}

fn rich_parts() -> Vec<Part> {
    let call = |index, name: &str, arguments: &str| {
        Part::Delta(Delta::ToolCall { index, name: name.into(), arguments: arguments.into() })
    };
    vec![
        Part::Delta(Delta::Reasoning("Hm ☃.".into())),
        Part::Delta(content("Zwölf 🦀")),
        call(0, "f", "{\"x\": \"ü\"}"),
        call(1, "g", "{}"),
        Part::Finished(Finished {
            finish: Finish::ToolCalls,
            usage: Usage { prompt_tokens: 9, cached_tokens: 4, completion_tokens: 7 },
            timings: None,
            stopped_by: None,
            reasoning_tokens: 3,
            malformed_calls: 0,
            tokens: Vec::new(),
            logprob_mean: None,
        }),
    ]
}

/// What is read from bytes that come in these pieces.
fn read(pieces: Vec<Vec<u8>>, how: How) -> Result<Vec<Part>, Trouble> {
    let bytes = stream::iter(pieces.into_iter().map(Ok));
    let mut events = Events::of(bytes, Duration::from_secs(3600));
    let mut ready = VecDeque::new();
    let mut reading = Reading::new(how, &mut ready);
    let work = async {
        while let Some(data) = events.next().await? {
            if reading.event(&data, &mut ready)? == Progress::Over {
                break;
            }
        }
        ready.push_back(Part::Finished(reading.finished()?));
        Ok::<_, Trouble>(())
    };
    // Nothing here waits but for a clock that is never reached.
    let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
    runtime.block_on(async { work.now_or_never().expect("no waiting") })?;
    Ok(ready.into())
}

#[test]
fn events_are_the_same_wherever_they_are_cut() {
    let plain = sse(&rich());
    let text = String::from_utf8(plain.clone()).unwrap();
    let with_comments = format!(": waiting\n\n{}", text.replace("data: ", ": going on\ndata:")).into_bytes();
    let with_mark = format!("\u{feff}{text}").into_bytes();
    for whole in [plain, text.replace('\n', "\r\n").into_bytes(), with_comments, with_mark] {
        assert_eq!(read(vec![whole.clone()], How::default()).unwrap(), rich_parts());
        for cut in 0..=whole.len() {
            let pieces = vec![whole[..cut].to_vec(), whole[cut..].to_vec()];
            assert_eq!(read(pieces, How::default()).as_ref(), Ok(&rich_parts()), "cut at {cut}");
        }
        let single = whole.iter().map(|byte| vec![*byte]).collect();
        assert_eq!(read(single, How::default()).unwrap(), rich_parts());
    }
}

#[test]
fn a_mark_further_on_is_no_mark() {
    let marks = ["\u{feff}", "\u{feff}\n", "\n\u{feff}\n", "\u{feff}\u{feff}data: {}\n\n", "\r\u{feff}"];
    for text in marks {
        assert_eq!(read(vec![text.into()], How::default()), Err(Trouble::CutOff), "{text:?}");
    }
}

#[test]
fn an_answer_that_ends_early_is_never_taken_for_whole() {
    let whole = sse(&rich());
    let said_why = String::from_utf8(whole.clone()).unwrap().find("\"finish_reason\":\"tool_calls\"").unwrap();
    for cut in 0..whole.len() {
        match read(vec![whole[..cut].to_vec()], How::default()) {
            Ok(parts) => assert!(cut > said_why, "cut at {cut}: {parts:?}"),
            // Half a character is no text.
            Err(trouble) => assert!(matches!(trouble, Trouble::CutOff | Trouble::Malformed(_)), "{cut}: {trouble}"),
        }
    }
}

#[tokio::test]
async fn pieces_of_the_connection_make_no_difference() {
    let bytes = sse(&rich());
    let pieces: Vec<_> = bytes
        .chunks(7)
        .flat_map(|piece| [Step::Send(piece.to_vec()), Step::Wait(Duration::from_micros(100))])
        .collect();
    let server = StandIn::new(bare(move |_| steps(pieces.clone()))).await;
    let shared = share(&server).await;
    assert_eq!(parts(&engine(&shared, "m").await, ask("hi")).await, (rich_parts(), None));
}

#[test]
fn one_call_is_enough_where_one_is_wanted() {
    let one = How { single_call: true, ..How::default() };
    let parts = read(vec![sse(&rich())], one).unwrap();
    assert_eq!(parts[..3], rich_parts()[..3]);
    let [Part::Finished(finished)] = &parts[3..] else { panic!("{parts:?}") };
    assert_eq!(finished.finish, Finish::ToolCalls);
}

#[test]
fn calls_are_read_however_servers_write_them() {
    let call = |calls: Value| delta(json!({ "tool_calls": calls }));
    let read = |events: &[Value]| {
        let mut all = events.to_vec();
        all.extend([finish("stop"), usage(1, 1)]);
        read(vec![sse(&all)], How::default()).unwrap()
    };
    let named = |parts: &[Part]| -> Vec<(String, String)> {
        let call = |part: &Part| match part {
            Part::Delta(Delta::ToolCall { name, arguments, .. }) => Some((name.clone(), arguments.clone())),
            _ => None,
        };
        parts.iter().filter_map(call).collect()
    };
    // Whole, without numbers, as objects.
    let parts = read(&[call(json!([
        { "id": "a", "function": { "name": "f", "arguments": { "x": 1 } } },
        { "id": "b", "function": { "name": "g", "arguments": null } },
    ]))]);
    assert_eq!(named(&parts), [("f".into(), "{\"x\":1}".into()), ("g".into(), "{}".into())]);
    let Some(Part::Finished(finished)) = parts.last() else { panic!("{parts:?}") };
    assert_eq!(finished.finish, Finish::ToolCalls);
    // All numbered 0.
    let one = |id: &str, name: &str| {
        call(
            json!([{ "index": 0, "id": id, "function": { "name": name, "arguments": format!("{{\"of\":\"{id}\"}}") } }]),
        )
    };
    let parts = read(&[one("a", "f"), one("b", "f")]);
    assert_eq!(named(&parts), [("f".into(), "{\"of\":\"a\"}".into()), ("f".into(), "{\"of\":\"b\"}".into())]);
    // The name with every piece.
    let piece = |text: &str| call(json!([{ "index": 0, "function": { "name": "f", "arguments": text } }]));
    assert_eq!(named(&read(&[piece("{\"x\":"), piece("2}")])), [("f".into(), "{\"x\":2}".into())]);
    // What is no object is content.
    let parts = read(&[call(json!([{ "index": 0, "function": { "name": "f", "arguments": "{\"x\"" } }]))]);
    assert_eq!(parts[0], Part::Delta(Delta::Malformed { text: "f{\"x\"".into() }));
    let Some(Part::Finished(finished)) = parts.last() else { panic!("{parts:?}") };
    assert_eq!((finished.finish, finished.malformed_calls), (Finish::Engine(FinishReason::Stop), 1));
}

#[tokio::test]
async fn ends_are_told_apart() {
    let end = |reason: &str, stop: Value| json!({ "choices": [{ "index": 0, "delta": { "content": "a" }, "finish_reason": reason, "stop_reason": stop }] });
    for (last, finish, stopped_by) in [
        (end("stop", Value::Null), Finish::Engine(FinishReason::Stop), None),
        (end("length", Value::Null), Finish::Engine(FinishReason::Length), None),
        (end("content_filter", Value::Null), Finish::Engine(FinishReason::Stop), None),
        (end("stop", json!("END")), Finish::StopString, Some("END".to_owned())),
        (end("stop", json!(151645)), Finish::Engine(FinishReason::Stop), None),
    ] {
        let server = StandIn::new(bare(move |_| events(sse(std::slice::from_ref(&last))))).await;
        let shared = share(&server).await;
        let (deltas, finished) = whole(&engine(&shared, "m").await, ask("hi")).await;
        assert_eq!((deltas, finished.finish, finished.stopped_by), (vec![content("a")], finish, stopped_by));
        // No usage was told.
        assert_eq!(finished.usage, Usage { completion_tokens: 1, ..Usage::default() });
    }
}

#[tokio::test]
async fn answers_that_break_off_say_so() {
    let some = delta(json!({ "content": "a" }));
    let error = json!({ "error": { "message": "out of memory at http://127.0.0.1" } });
    for (events, what) in [
        (vec![some.clone()], "before the answer was complete"),
        (vec![some.clone(), error], "out of memory"),
        (vec![some.clone(), finish("abort")], "abort"),
        (vec![some.clone(), json!({ "choices": 5 })], "not understood"),
        (vec![some, json!({ "choices": [{ "delta": { "content": [1] } }] })], "not understood"),
    ] {
        let bytes = sse(&events);
        let server = StandIn::new(bare(move |_| super::stand_in::events(bytes.clone()))).await;
        let shared = share(&server).await;
        let (parts, error) = parts(&engine(&shared, "m").await, ask("hi")).await;
        assert_eq!(parts, [Part::Delta(content("a"))]);
        let Some(EngineError::Failed { what: said }) = error else { panic!("{error:?}") };
        assert!(said.contains("the shared server broke off") && said.contains(what), "{said}");
        assert!(!said.contains("127.0.0.1") || !said.contains(&server.port().to_string()), "{said}");
    }
}

#[tokio::test]
async fn a_connection_that_breaks_is_an_answer_that_breaks_off() {
    let head = "content-type: text/event-stream\r\ncontent-length: 5000\r\n";
    let text = format!("data: {}\n\n", delta(json!({ "content": "a" })));
    let server = StandIn::new(bare(move |_| Answer::Raw(200, head, vec![Step::Send(text.clone().into_bytes())]))).await;
    let shared = share(&server).await;
    let (parts, error) = parts(&engine(&shared, "m").await, ask("hi")).await;
    assert_eq!(parts, [Part::Delta(content("a"))]);
    assert!(matches!(error, Some(EngineError::Failed { what }) if what.contains("broke off")));
}

#[tokio::test]
async fn a_request_goes_out_as_it_came() {
    let server = StandIn::new(vllm(|_| hello())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "org/model").await;
    whole(&engine, ask("hi")).await;
    // With nothing set, nothing is said.
    let plain = json!({
        "model": "org/model", "messages": [{ "role": "user", "content": "hi" }],
        "stream": true, "stream_options": { "include_usage": true },
    });
    assert_eq!(server.last("/v1/chat/completions").body, plain);
    let call = ToolCall {
        id: "c1".into(),
        kind: "function".into(),
        function: FunctionCall { name: "f".into(), arguments: json!({ "x": 1 }) },
    };
    let messages = vec![
        message("user", "hi"),
        Message { role: "assistant".into(), tool_calls: vec![call], ..Message::default() },
        Message { tool_call_id: Some("c1".into()), ..message("tool", "2") },
    ];
    let tool = json!({ "type": "function", "function": { "name": "f", "parameters": {} } });
    let full = Ask {
        sampling: Sampling {
            temperature: Some(0.7),
            top_p: Some(0.9),
            top_k: Some(5),
            min_p: Some(0.05),
            seed: Some(u64::MAX),
            repetition_penalty: Some(1.1),
            presence_penalty: Some(0.3),
            frequency_penalty: Some(-0.3),
            logit_bias: [(7, -100.0)].into(),
            ..Sampling::default()
        },
        tokens_max: Some(9),
        tokens_min: Some(2),
        ignore_eos: true,
        logprobs: Some(3),
        stop: vec!["END".into()],
        grammar: Some(Grammar::Regex("a+".into())),
        ..Ask::new(
            "job",
            Subject::Chat(Chat {
                messages,
                tools: vec![tool.clone()],
                tool_choice: ToolChoice::Named("f".into()),
                kwargs: [("enable_thinking".to_owned(), json!(false))].into_iter().collect(),
                ..Chat::default()
            }),
        )
    };
    whole(&engine, full).await;
    let body = server.last("/v1/chat/completions").body;
    for (key, value) in [
        ("temperature", json!(0.7)),
        ("top_p", json!(0.9)),
        ("top_k", json!(5)),
        ("min_p", json!(0.05)),
        ("seed", json!(u64::MAX)),
        ("repetition_penalty", json!(1.1)),
        ("presence_penalty", json!(0.3)),
        ("frequency_penalty", json!(-0.3)),
        ("logit_bias", json!({ "7": -100.0 })),
        ("max_tokens", json!(9)),
        ("min_tokens", json!(2)),
        ("ignore_eos", json!(true)),
        ("logprobs", json!(true)),
        ("top_logprobs", json!(3)),
        ("stop", json!(["END"])),
        ("structured_outputs", json!({ "regex": "a+" })),
        ("tools", json!([tool])),
        ("tool_choice", json!({ "type": "function", "function": { "name": "f" } })),
        ("chat_template_kwargs", json!({ "enable_thinking": false })),
    ] {
        assert_eq!(body[key], value, "{key}");
    }
    assert_eq!(body["messages"][1]["tool_calls"][0]["function"]["arguments"], "{\"x\":1}");
    assert_eq!(body["messages"][1]["content"], Value::Null);
    assert_eq!(body["messages"][2], json!({ "role": "tool", "content": "2", "tool_call_id": "c1" }));
    assert_eq!(body.as_object().unwrap().len(), 4 + 19, "{body}");
}

#[tokio::test]
async fn texts_and_tokens_are_continued() {
    let text =
        |text: &str, finish: Value| json!({ "choices": [{ "index": 0, "text": text, "finish_reason": finish }] });
    let bytes = sse(&[text(" b", Value::Null), text("c", json!("length")), usage(2, 2)]);
    let server = StandIn::new(vllm(move |_| events(bytes.clone()))).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "org/model").await;
    let echo = Ask { echo: true, ..Ask::new("job", Subject::Text("a".into())) };
    let (deltas, finished) = whole(&engine, echo).await;
    assert_eq!(deltas, [content("a"), content(" b"), content("c")]);
    assert_eq!(finished.finish, Finish::Engine(FinishReason::Length));
    assert_eq!(server.last("/v1/completions").body["prompt"], "a");
    assert_eq!(server.last("/v1/completions").body["echo"], Value::Null);
    whole(&engine, Ask::new("job", Subject::Tokens(vec![1, 2]))).await;
    assert_eq!(server.last("/v1/completions").body["prompt"], json!([1, 2]));
}

#[tokio::test]
async fn probabilities_are_read_in_both_forms() {
    let likely =
        |token: &str, bytes: Value, logprob: f32| json!({ "token": token, "bytes": bytes, "logprob": logprob });
    let mut one = likely("ü", json!([195]), -0.5);
    one["top_logprobs"] = json!([likely("ü", json!([195]), -0.5), likely("b", Value::Null, -1.0)]);
    let mut two = likely("?", json!([188]), -1.5);
    two["top_logprobs"] = json!([]);
    let mut three = likely("z", Value::Null, -1.0);
    three["top_logprobs"] = Value::Null;
    let mut event = delta(json!({ "content": "üz" }));
    event["choices"][0]["logprobs"] = json!({ "content": [one, two, three] });
    let chat_bytes = sse(&[event, finish("stop"), usage(1, 3)]);
    let text = json!({ "choices": [{ "index": 0, "text": "ab", "finish_reason": "stop", "logprobs": {
        "tokens": ["a", "b"], "token_logprobs": [-0.25, null], "top_logprobs": [{ "x": -2.0, "a": -0.25 }, null], "text_offset": [0, 1],
    } }] });
    let text_bytes = sse(&[text]);
    let server = StandIn::new(vllm(move |request| match request.path() {
        "/v1/completions" => events(text_bytes.clone()),
        _ => events(chat_bytes.clone()),
    }))
    .await;
    let shared = share(&server).await;
    let engine = engine(&shared, "org/model").await;
    let (got, _) = parts(&engine, Ask { logprobs: Some(1), ..ask("hi") }).await;
    let [Part::Tokens(tokens), Part::Delta(_), Part::Finished(finished)] = &got[..] else { panic!("{got:?}") };
    let seen: Vec<_> =
        tokens.iter().map(|token| (token.chosen.bytes.clone(), token.top.len(), token.offset_chars)).collect();
    assert_eq!(seen, [(vec![195], 1, 0), (vec![188], 0, 0), (b"z".to_vec(), 0, 1)]);
    assert_eq!(finished.logprob_mean, Some(-1.0));
    let of_text = Ask { logprobs: Some(2), ..Ask::new("job", Subject::Text("t".into())) };
    let (got, _) = parts(&engine, of_text).await;
    let Part::Tokens(tokens) = &got[0] else { panic!("{got:?}") };
    assert_eq!(tokens[0].top.iter().map(|likely| likely.text()).collect::<Vec<_>>(), ["a", "x"]);
    assert_eq!((tokens[0].chosen.logprob, tokens[1].chosen.logprob, tokens[1].offset_chars), (-0.25, f32::MIN, 1));
    // Ranked answers are only told the mean.
    let ranked = Ask { ranked: true, ..Ask::new("job", Subject::Text("t".into())) };
    let (got, _) = parts(&engine, ranked).await;
    assert!(matches!(&got[..], [Part::Delta(_), Part::Finished(Finished { logprob_mean: Some(_), .. })]), "{got:?}");
}

async fn turned_down(answer: Answer) -> Rejection {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    server.set(bare(move |_| answer.clone()));
    engine.answer(ask("hi")).await.err().expect("a rejection")
}

#[tokio::test]
async fn refusals_are_passed_on_in_their_words() {
    let body = |message: &str, code: Value| json!({ "error": { "message": message, "param": "top_p", "code": code } });
    for (status, value, kind, code, message) in [
        (400, body("top_p is off", json!("bad_value")), RejectionKind::Invalid, "bad_value", "top_p is off"),
        (400, body("top_p is off", json!(400)), RejectionKind::Invalid, "invalid_request", "top_p is off"),
        (422, json!({ "detail": "no field" }), RejectionKind::Invalid, "invalid_request", "no field"),
        (400, json!({ "object": "error", "message": "flat" }), RejectionKind::Invalid, "invalid_request", "flat"),
        (400, json!({ "error": "a text" }), RejectionKind::Invalid, "invalid_request", "a text"),
        (404, body("no such model", Value::Null), RejectionKind::NotFound, "not_found", "no such model"),
        (429, body("slow down", Value::Null), RejectionKind::Unavailable, "share_busy", "slow down"),
        (503, body("secret place", Value::Null), RejectionKind::Unavailable, "share_unavailable", "cannot serve"),
        (500, body("secret place", Value::Null), RejectionKind::Failed, "share_failed", "failed (500)"),
        (401, body("bad key", Value::Null), RejectionKind::Failed, "share_failed", "key"),
        (302, Value::Null, RejectionKind::Failed, "share_failed", "failed (302)"),
    ] {
        let rejection = turned_down(Answer::Json(status, value)).await;
        assert_eq!((rejection.kind, rejection.code.as_str()), (kind, code), "{status}: {rejection:?}");
        assert!(rejection.message.contains(message) && !rejection.message.contains("secret"), "{rejection:?}");
        let again = matches!(kind, RejectionKind::Unavailable | RejectionKind::Failed);
        assert_eq!(rejection.retry_after.is_some(), again, "{status}: {rejection:?}");
    }
    let rejection = turned_down(Answer::Json(400, body("x", json!("bad_value")))).await;
    assert_eq!(rejection.param.as_deref(), Some("top_p"));
    let long = json!({ "error": { "message": "too long", "type": "exceed_context_size_error", "code": 400 } });
    assert_eq!(turned_down(Answer::Json(400, long)).await.code, "context_length_exceeded");
    let wait = Answer::Raw(429, "retry-after: 17\r\n", vec![]);
    assert_eq!(turned_down(wait).await.retry_after, Some(Duration::from_secs(17)));
}

#[tokio::test]
async fn nobody_is_told_where_the_server_is() {
    let server = StandIn::new(bare(|_| hello())).await;
    let options = crate::ShareOptions { key: Some("sk-very-secret".into()), ..super::options(&server) };
    let shared = crate::Shared::start(options).await.unwrap();
    let engine = engine(&shared, "m").await;
    assert!(server.last("/v1/models").head.contains("authorization: bearer sk-very-secret"));
    let url = server.url();
    let words = format!("{url}/v1/chat/completions at {} with SK-VERY-SECRET", url.trim_start_matches("http://"));
    let refusal = json!({ "error": { "message": words, "param": words, "code": words } });
    server.set(bare(move |_| Answer::Json(400, refusal.clone())));
    let rejection = engine.answer(ask("hi")).await.err().unwrap();
    let port = server.port().to_string();
    for text in [rejection.message, rejection.code, rejection.param.unwrap(), shared_text(&shared)] {
        let plain = text.to_lowercase();
        assert!(!plain.contains("127.0.0.1") && !plain.contains(&port) && !plain.contains("secret"), "{text}");
    }
}

fn shared_text(shared: &Arc<crate::Shared>) -> String {
    use mesh_core::node::Elsewhere;
    format!("{} {:?}", shared.status(), shared.models())
}

#[tokio::test]
async fn what_is_not_honoured_is_refused_by_name() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    let sampled = |sampling: Sampling| Ask { sampling, ..ask("hi") };
    let chatting = |chat: Chat| Ask::new("job", Subject::Chat(chat));
    let tools = || vec![json!({ "type": "function", "function": { "name": "f" } })];
    let asked = [
        (sampled(Sampling { top_k: Some(5), ..Sampling::default() }), "top_k"),
        (sampled(Sampling { seed: Some(5), ..Sampling::default() }), "seed"),
        (sampled(Sampling { repetition_penalty: Some(1.1), ..Sampling::default() }), "repetition_penalty"),
        (sampled(Sampling { logit_bias: [(1, 1.0)].into(), ..Sampling::default() }), "logit_bias"),
        (Ask { logprobs: Some(0), ..ask("hi") }, "logprobs"),
        (Ask { ignore_eos: true, ..ask("hi") }, "ignore_eos"),
        (Ask { tokens_min: Some(1), ..ask("hi") }, "min_tokens"),
        (Ask { grammar: Some(Grammar::JsonObject), ..ask("hi") }, "response_format"),
        (Ask { grammar: Some(Grammar::Lark("start: \"a\"".into())), ..ask("hi") }, "response_format"),
        (Ask { ranked: true, ..ask("hi") }, "best_of"),
        (Ask { choices: 2, ..ask("hi") }, "n"),
        (chatting(Chat { tools: tools(), ..chat("hi") }), "tools"),
        (chatting(Chat { effort: Some(Effort::Switch(false)), ..chat("hi") }), "enable_thinking"),
        (chatting(Chat { effort: Some(Effort::Level("low".into())), ..chat("hi") }), "reasoning_effort"),
        (chatting(Chat { thinking_tokens_max: Some(5), ..chat("hi") }), "thinking_budget"),
        (
            chatting(Chat { kwargs: [("a".to_owned(), json!(1))].into_iter().collect(), ..chat("hi") }),
            "chat_template_kwargs",
        ),
        (Ask::new("job", Subject::Tokens(vec![1])), "prompt"),
        (Ask { echo: true, ..Ask::new("job", Subject::Tokens(vec![1])) }, "echo"),
    ];
    let before = server.count("/v1/chat/completions");
    for (ask, param) in asked {
        let rejection = engine.answer(ask).await.err().unwrap_or_else(|| panic!("{param} is accepted"));
        assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::Invalid, "unsupported_parameter"));
        assert_eq!(rejection.param.as_deref(), Some(param));
        assert!(rejection.message.contains(&format!("`{param}`")), "{rejection}");
    }
    assert_eq!(server.count("/v1/chat/completions"), before, "nothing was sent");
    // What changes nothing is left out.
    let neutral = Sampling { top_k: Some(0), min_p: Some(0.0), presence_penalty: Some(0.0), ..Sampling::default() };
    whole(&engine, Ask { tokens_min: Some(0), ..sampled(neutral) }).await;
    let body = server.last("/v1/chat/completions").body;
    assert!(body.get("top_k").is_none() && body.get("presence_penalty").is_none(), "{body}");
}
