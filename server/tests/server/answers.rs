//! What comes back: streamed and blocking answers agree, whatever the engine's pieces look like.

use mesh_core::{FinishReason, Prompt};
use serde_json::{Value, json};

use crate::fake::{Form, Server, Step, events, steady};

const STOP: Step = Step::Finish(FinishReason::Stop);

/// What a streamed chat adds up to: content, reasoning, tool calls, finish reason.
fn folded(events: &[String]) -> (String, String, Vec<Value>, String) {
    let (mut content, mut reasoning, mut calls, mut finish) = (String::new(), String::new(), vec![], String::new());
    assert_eq!(events.last().unwrap(), "[DONE]");
    for event in &events[..events.len() - 1] {
        let chunk: Value = serde_json::from_str(event).unwrap();
        let Some(choice) = chunk["choices"].get(0) else { continue };
        content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
        reasoning.push_str(choice["delta"]["reasoning_content"].as_str().unwrap_or_default());
        for call in choice["delta"]["tool_calls"].as_array().into_iter().flatten() {
            calls.push(call["function"].clone());
        }
        finish = choice["finish_reason"].as_str().map(str::to_owned).unwrap_or(finish);
    }
    (content, reasoning, calls, finish)
}

async fn both(form: Form, script: Vec<Step>, more: Value) -> (String, String, Vec<Value>, String) {
    let server = Server::start(form, script).await;
    let (status, whole) = server.chat(more.clone()).await;
    assert_eq!(status, 200, "{whole}");
    let choice = &whole["choices"][0];
    let message = &choice["message"];
    let text = |key: &str| message[key].as_str().unwrap_or_default().to_owned();
    let calls = message["tool_calls"].as_array().into_iter().flatten().map(|call| call["function"].clone()).collect();
    let blocking =
        (text("content"), text("reasoning_content"), calls, choice["finish_reason"].as_str().unwrap().into());
    assert_eq!(blocking, folded(&server.chat_events(more).await), "streamed differs from blocking");
    blocking
}

#[tokio::test]
async fn a_blocking_chat_answer() {
    let server = Server::start(Form::Text, vec![Step::Text("Pa"), Step::Text("ris."), STOP]).await;
    let (status, answer) = server.chat(json!({ "temperature": 0 })).await;
    assert_eq!(status, 200);
    insta::assert_json_snapshot!(steady(answer));
    let job = server.fake.jobs.lock().unwrap()[0].clone();
    assert_eq!(job.prompt, Prompt::Text { text: "<user>Hi<assistant>".into(), add_special: false });
    assert_eq!((job.sampling.temperature, job.sampling.top_p), (Some(0.0), None));
}

#[tokio::test]
async fn a_streamed_chat_answer() {
    let server = Server::start(Form::Text, vec![Step::Prefill(7), Step::Text("Pa"), Step::Text("ris."), STOP]).await;
    let body = crate::fake::chat(json!({ "stream": true, "stream_options": { "include_usage": true } }));
    let response = server.send("/v1/chat/completions", body.to_string()).await;
    assert_eq!(response.headers()["content-type"], "text/event-stream");
    let text = response.text().await.unwrap();
    let first: Value = serde_json::from_str(&events(&text)[0]).unwrap();
    let text = text.replace(first["id"].as_str().unwrap(), "ID").replace(&first["created"].to_string(), "0");
    insta::assert_snapshot!(text);
}

/// Byte for byte: waiting and reading show as comments, which parsers of event streams do not take for events, and which
/// blocking answers know nothing of.
#[tokio::test]
async fn waiting_and_reading_show_as_comments() {
    use eventsource_stream::Eventsource;
    use futures::StreamExt;

    let script = vec![
        Step::Queued(3),
        Step::Queued(1),
        Step::Queued(1),
        Step::Reading(0, 16_000),
        Step::Reading(2048, 16_000),
        Step::Reading(16_000, 16_000),
        Step::Text("Paris."),
        STOP,
    ];
    let server = Server::start(Form::Text, script).await;
    let body = crate::fake::chat(json!({ "stream": true })).to_string();
    let bytes = server.send("/v1/chat/completions", body.clone()).await.bytes().await.unwrap();
    let text = String::from_utf8(bytes.to_vec()).unwrap();
    let (role, rest) = text.split_once("\n\n").unwrap();
    assert!(role.starts_with("data: {"), "{text}");
    let comments = ": queued, 3 ahead\n\n: queued, 1 ahead\n\n: reading the prompt, 0 of 16000 tokens\n\n";
    assert!(rest.starts_with(&format!("{comments}data: {{")), "{text}");

    let stream = server.send("/v1/chat/completions", body).await.bytes_stream().eventsource();
    let parsed: Vec<_> = stream.map(|event| event.unwrap().data).collect().await;
    assert_eq!(parsed.len(), 4, "role, text, end, [DONE]: {parsed:?}");
    assert_eq!(folded(&parsed).0, "Paris.");
    let (status, whole) = server.chat(json!({})).await;
    assert_eq!((status, &whole["choices"][0]["message"]["content"]), (200, &json!("Paris.")));
}

#[tokio::test]
async fn a_text_completion_gets_a_begin_token_and_no_template() {
    let server = Server::start(Form::Text, vec![Step::Text("<think>"), Step::Text(" four"), STOP]).await;
    let body = json!({ "model": "fake", "prompt": "two and two is", "max_tokens": 5 });
    let (status, answer) = server.post("/v1/completions", &body).await;
    assert_eq!(status, 200);
    insta::assert_json_snapshot!(steady(answer));
    assert_eq!(server.last_prompt(), Prompt::Text { text: "two and two is".into(), add_special: true });
    let tokens = json!({ "model": "fake", "prompt": [1, 2, 3], "stream": true });
    let response = server.send("/v1/completions", tokens.to_string()).await.text().await.unwrap();
    let texts: Vec<_> = events(&response);
    assert_eq!(texts.last().unwrap(), "[DONE]");
    assert_eq!(server.last_prompt(), Prompt::Tokens(vec![1, 2, 3]));
}

#[tokio::test]
async fn reasoning_and_tool_calls_are_told_apart() {
    let script = vec![
        Step::Text("<thi"),
        Step::Text("nk>Hm"),
        Step::Text("m</think>Let me see.<tool"),
        Step::Text("_call>{\"name\": \"weather\", \"argum"),
        Step::Text("ents\": {\"city\": \"Paris\"}}</tool_call>"),
        STOP,
    ];
    let tools = json!({ "tools": [{ "type": "function", "function": { "name": "weather", "parameters": {} } }] });
    let (content, reasoning, calls, finish) = both(Form::Text, script, tools).await;
    assert_eq!((content.trim(), reasoning.trim(), finish.as_str()), ("Let me see.", "Hmm", "tool_calls"));
    assert_eq!(calls.len(), 1);
    assert_eq!(calls[0]["name"], "weather");
    let arguments: Value = serde_json::from_str(calls[0]["arguments"].as_str().unwrap()).unwrap();
    assert_eq!(arguments, json!({ "city": "Paris" }));
}

#[tokio::test]
async fn a_malformed_call_is_content() {
    let script = vec![Step::Text("<tool_call>{\"name\": "), Step::Text("oops</tool_call>"), STOP];
    let tools = json!({ "tools": [{ "type": "function", "function": { "name": "weather" } }] });
    let (content, _, calls, finish) = both(Form::Text, script, tools).await;
    assert!(content.contains("oops"), "{content}");
    assert_eq!((calls.len(), finish.as_str()), (0, "stop"));
}

#[tokio::test]
async fn stop_strings_hold_across_cuts_and_are_not_part_of_the_answer() {
    for script in [
        vec![Step::Text("one, two, three"), STOP],
        vec![Step::Text("one, t"), Step::Text("wo"), Step::Text(", three"), STOP],
        vec![
            Step::Text("one"),
            Step::Text(","),
            Step::Text(" "),
            Step::Text("t"),
            Step::Text("w"),
            Step::Text("o"),
            STOP,
        ],
    ] {
        let (content, _, _, finish) = both(Form::Text, script, json!({ "stop": ["two", "four"] })).await;
        assert_eq!((content.as_str(), finish.as_str()), ("one, ", "stop"));
    }
    let half = vec![Step::Text("one, tw"), Step::Finish(FinishReason::Length)];
    let (content, _, _, finish) = both(Form::Text, half, json!({ "stop": "two" })).await;
    assert_eq!((content.as_str(), finish.as_str()), ("one, tw", "length"));
}

#[tokio::test]
async fn a_stop_string_cancels_the_engine_and_counts_its_tokens() {
    let server =
        Server::start(Form::Text, vec![Step::Prefill(7), Step::Text("a"), Step::Text("END"), Step::Hang]).await;
    let (status, answer) = server.chat(json!({ "stop": "END" })).await;
    assert_eq!((status, answer["choices"][0]["message"]["content"].as_str()), (200, Some("a")));
    assert_eq!(answer["usage"]["completion_tokens"], 2);
    assert_eq!(answer["usage"]["prompt_tokens"], 7);
    assert_eq!(server.fake.dropped.load(std::sync::atomic::Ordering::SeqCst), 1);
}

#[tokio::test]
async fn characters_split_over_tokens_come_out_whole() {
    let text = "né 漢字 🦀!";
    let script = vec![Step::Bytes("né 漢字 🦀!".as_bytes()), STOP];
    let server = Server::start(Form::Tokens, script.clone()).await;
    let events = server.chat_events(json!({})).await;
    assert!(!events.iter().any(|event| event.contains('\u{fffd}')), "{events:?}");
    assert_eq!(server.last_prompt(), Prompt::Tokens("<user>Hi<assistant>".bytes().map(u32::from).collect()));
    let (content, _, _, _) = both(Form::Tokens, script, json!({})).await;
    assert_eq!(content, text);
    let cut = vec![Step::Bytes(&"🦀".as_bytes()[..3]), STOP];
    let (content, _, _, _) = both(Form::Tokens, cut, json!({})).await;
    assert_eq!(content, "\u{fffd}");
}

#[tokio::test]
async fn long_prompts_come_with_landmarks() {
    let server = Server::start(Form::Tokens, vec![STOP]).await;
    let landmarks = async |system: &str| {
        let messages = json!([{ "role": "system", "content": system }, { "role": "user", "content": "Hi" }]);
        assert_eq!(server.chat(json!({ "messages": messages })).await.0, 200);
        server.fake.jobs.lock().unwrap().last().unwrap().landmarks.clone()
    };
    let long = "é".repeat(600);
    let preamble = format!("<system>{long}<user>").len() as u32;
    let whole = preamble + "Hi<assistant>".len() as u32;
    let found = landmarks(&long).await;
    assert_eq!((found.preamble_end, found.message_ends.last()), (Some(preamble), Some(&(whole - 1))));
    assert_eq!(landmarks("short").await, mesh_core::Landmarks::default(), "not worth it");
}

#[tokio::test]
async fn thinking_is_switched_in_the_template() {
    let server = Server::start(Form::Text, vec![STOP]).await;
    for (more, said) in [
        (json!({ "enable_thinking": false }), "[thinking=False]"),
        (json!({ "reasoning_effort": "none" }), "[thinking=False]"),
        (json!({ "reasoning_effort": "high" }), "[thinking=True]"),
        (json!({ "chat_template_kwargs": { "enable_thinking": true } }), "[thinking=True]"),
    ] {
        assert_eq!(server.chat(more.clone()).await.0, 200, "{more}");
        let Prompt::Text { text, .. } = server.last_prompt() else { panic!() };
        assert!(text.contains(said), "{more}: {text}");
    }
}

#[tokio::test]
async fn tools_that_must_not_be_called_are_not_shown() {
    let server = Server::start(Form::Text, vec![Step::Text("<tool_call>x</tool_call>"), STOP]).await;
    let tools = json!([{ "type": "function", "function": { "name": "weather" } }]);
    server.chat(json!({ "tools": tools })).await;
    assert_eq!(server.last_prompt(), Prompt::Text { text: "<user>Hi[1 tools]<assistant>".into(), add_special: false });
    let (_, answer) = server.chat(json!({ "tools": tools, "tool_choice": "none" })).await;
    assert_eq!(server.last_prompt(), Prompt::Text { text: "<user>Hi<assistant>".into(), add_special: false });
    assert_eq!(answer["choices"][0]["message"]["content"], "<tool_call>x</tool_call>");
}

#[tokio::test]
async fn values_that_change_nothing_are_accepted_of_any_engine() {
    let server = Server::start(Form::Text, vec![STOP]).await;
    let more = json!({
        "presence_penalty": 0, "frequency_penalty": 0, "top_k": 0, "min_p": 0, "repetition_penalty": 1, "n": 1,
        "logit_bias": {}, "logprobs": false, "response_format": { "type": "text" }, "user": "u", "stop": null,
        "parallel_tool_calls": true, "tools": [], "ignore_eos": false, "store": false,
    });
    let (status, answer) = server.chat(more).await;
    assert_eq!(status, 200, "{answer}");
    assert!(server.fake.jobs.lock().unwrap()[0].knobs().is_empty());
}

#[tokio::test]
async fn parts_of_text_and_earlier_calls_reach_the_template() {
    let server = Server::start(Form::Text, vec![STOP]).await;
    let messages = json!([
        { "role": "user", "content": [{ "type": "text", "text": "a", "cache_control": { "type": "ephemeral" } },
            { "type": "text", "text": "b" }] },
        { "role": "assistant", "content": null, "refusal": null, "tool_calls": [
            { "id": "1", "type": "function", "function": { "name": "f", "arguments": "{}" } }] },
        { "role": "tool", "tool_call_id": "1", "content": "c" },
    ]);
    let (status, answer) = server.chat(json!({ "messages": messages })).await;
    assert_eq!(status, 200, "{answer}");
    let Prompt::Text { text, .. } = server.last_prompt() else { panic!() };
    // Its content is null, which this template would write as "None".
    assert_eq!(text, "<user>ab<assistant><tool>c<assistant>");
}

/// However an engine cuts an answer, its deltas add up to the same.
#[tokio::test]
async fn answers_do_not_depend_on_cuts() {
    use mesh_core::chat::Message;
    use mesh_llm::pipeline::{self, Ask, Chat, Subject};

    const TEXT: &str = "<think>né 漢</think>Sí.\n<tool_call>\n{\"name\": \"f\", \"arguments\": {\"x\": \"🦀\"}}\n</tool_call>\
                        after END rest";
    let server = Server::start(Form::Text, vec![]).await;
    let slot = server.slots.get("fake").unwrap();
    let chat = Chat {
        messages: vec![Message { role: "user".into(), content: Some("Hi".into()), ..Message::default() }],
        tools: vec![json!({ "type": "function", "function": { "name": "f" } })],
        ..Chat::default()
    };
    let ask = Ask { stop: vec!["END".into(), "ENDS".into()], ..Ask::new("cut", Subject::Chat(chat)) };
    let places: Vec<usize> = (0..=TEXT.len()).filter(|at| TEXT.is_char_boundary(*at)).collect();
    let mut seen = std::collections::HashSet::new();
    for (n, &one) in places.iter().enumerate() {
        for &two in &places[n..] {
            let pieces = [&TEXT[..one], &TEXT[one..two], &TEXT[two..]];
            let mut script: Vec<_> =
                pieces.iter().filter(|piece| !piece.is_empty()).map(|piece| Step::Text(piece)).collect();
            script.push(STOP);
            *server.fake.script.lock().unwrap() = script;
            let (answer, finished) =
                pipeline::collect(pipeline::open(slot.model(None).await.unwrap(), ask.clone()).await.unwrap())
                    .await
                    .unwrap();
            seen.insert(format!("{answer:?} {:?}", finished.finish));
        }
    }
    assert_eq!(seen.len(), 1, "{seen:#?}");
    let only = seen.into_iter().next().unwrap();
    assert!(only.contains("né 漢") && only.contains("🦀") && only.contains("after "), "{only}");
    assert!(!only.contains("END") && only.ends_with("ToolCalls"), "{only}");
}
