//! Several answers, and how likely they are.

use mesh_core::FinishReason;
use serde_json::{Value, json};

use crate::fake::{Form, Server, Step, events};

const STOP: Step = Step::Finish(FinishReason::Stop);

/// What each choice of a streamed chat adds up to: content and tokens.
fn folded(events: &[String]) -> Vec<(String, Vec<Value>)> {
    let mut choices: Vec<(String, Vec<Value>)> = Vec::new();
    for event in events.iter().filter(|event| *event != "[DONE]") {
        let chunk: Value = serde_json::from_str(event).unwrap();
        for choice in chunk["choices"].as_array().unwrap() {
            let index = choice["index"].as_u64().unwrap() as usize;
            choices.resize(choices.len().max(index + 1), Default::default());
            let (content, tokens) = &mut choices[index];
            content.push_str(choice["delta"]["content"].as_str().unwrap_or_default());
            tokens.extend(choice["logprobs"]["content"].as_array().into_iter().flatten().cloned());
        }
    }
    choices
}

fn whole(answer: &Value) -> Vec<(String, Vec<Value>)> {
    let choices = answer["choices"].as_array().unwrap().iter();
    choices
        .map(|choice| {
            let content = choice["message"]["content"].as_str().unwrap_or_default().to_owned();
            (content, choice["logprobs"]["content"].as_array().into_iter().flatten().cloned().collect())
        })
        .collect()
}

fn spelled(tokens: &[Value]) -> String {
    tokens.iter().map(|token| token["token"].as_str().unwrap()).collect::<Vec<_>>().join("|")
}

#[tokio::test]
async fn tokens_are_reported_with_exact_bytes_and_streamed_alike() {
    for (form, script) in [
        (Form::Able, vec![Step::Text("Pa"), Step::Text("ris"), Step::Text("."), STOP]),
        (Form::AbleTokens, vec![Step::Bytes("né 🦀".as_bytes()), STOP]),
    ] {
        let server = Server::start(form, script).await;
        let more = json!({ "logprobs": true, "top_logprobs": 2 });
        let (status, answer) = server.chat(more.clone()).await;
        assert_eq!(status, 200, "{answer}");
        let blocking = whole(&answer);
        assert_eq!(folded(&server.chat_events(more).await), blocking);
        let (content, tokens) = &blocking[0];
        let bytes: Vec<u8> = tokens
            .iter()
            .flat_map(|token| token["bytes"].as_array().unwrap())
            .map(|byte| byte.as_u64().unwrap() as u8)
            .collect();
        assert_eq!(bytes, content.as_bytes());
        assert!(tokens.iter().all(|token| token["top_logprobs"].as_array().unwrap().len() == 2));
    }
    let server = Server::start(Form::Able, vec![Step::Likely("a", -0.25), STOP]).await;
    let (_, answer) = server.chat(json!({ "logprobs": true })).await;
    let token = json!({ "token": "a", "logprob": -0.25, "bytes": [97], "top_logprobs": [] });
    assert_eq!(answer["choices"][0]["logprobs"], json!({ "content": [token], "refusal": null }));
    let (_, answer) = server.chat(json!({})).await;
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
}

#[tokio::test]
async fn tokens_come_with_the_text_that_settles_them() {
    // What may begin a stop string is held back, and its tokens with it.
    let script =
        vec![Step::Text("one"), Step::Text(" t"), Step::Text("wine"), Step::Text(" tw"), Step::Text("o"), Step::Hang];
    let server = Server::start(Form::Able, script).await;
    let more = json!({ "logprobs": true, "stop": " two" });
    let (_, answer) = server.chat(more.clone()).await;
    let (content, tokens) = &whole(&answer)[0];
    assert_eq!((content.as_str(), spelled(tokens).as_str()), ("one twine", "one| t|wine"));
    let events = server.chat_events(more).await;
    assert_eq!(folded(&events), whole(&answer));
    let chunks: Vec<(String, usize)> = events
        .iter()
        .filter_map(|event| serde_json::from_str::<Value>(event).ok())
        .map(|chunk| chunk["choices"][0].clone())
        .filter(|choice| choice["delta"]["content"].as_str().is_some_and(|text| !text.is_empty()))
        .map(|choice| {
            let tokens = choice["logprobs"]["content"].as_array().unwrap().len();
            (choice["delta"]["content"].as_str().unwrap().to_owned(), tokens)
        })
        .collect();
    assert_eq!(chunks, [("one".to_owned(), 1), (" twine".to_owned(), 2)]);
    // A token of which a part was let through is part of the answer.
    let server = Server::start(Form::Able, vec![Step::Text("a b"), Step::Text("c"), STOP]).await;
    let (_, answer) = server.chat(json!({ "logprobs": true, "stop": " b" })).await;
    assert_eq!(spelled(&whole(&answer)[0].1), "a b");
}

#[tokio::test]
async fn tokens_of_reasoning_and_calls_are_reported_in_order() {
    let script = vec![
        Step::Text("<think>"),
        Step::Text("hm"),
        Step::Text("</think>"),
        Step::Text("<tool_call>"),
        Step::Text("{\"name\": \"f\"}"),
        Step::Text("</tool_call>"),
        Step::Text("\n"),
        STOP,
    ];
    let server = Server::start(Form::Able, script).await;
    let more = json!({ "logprobs": true, "tools": [{ "type": "function", "function": { "name": "f" } }] });
    let (_, answer) = server.chat(more.clone()).await;
    let (_, tokens) = &whole(&answer)[0];
    assert_eq!(spelled(tokens), "<think>|hm|</think>|<tool_call>|{\"name\": \"f\"}|</tool_call>|\n");
    assert_eq!(&folded(&server.chat_events(more).await)[0].1, tokens);
}

#[tokio::test]
async fn text_completions_report_tokens_in_their_own_form() {
    let server = Server::start(Form::Able, vec![Step::Likely("né", -1.0), Step::Likely(" x", -2.0), STOP]).await;
    let (_, answer) = server.complete(json!({ "logprobs": 1 })).await;
    let expected = json!({
        "tokens": ["né", " x"], "token_logprobs": [-1.0, -2.0], "text_offset": [0, 2],
        "top_logprobs": [{ "0": -0.0, "né": -1.0 }, { "0": -0.0, " x": -2.0 }],
    });
    assert_eq!(answer["choices"][0]["logprobs"], expected);
    let body = json!({ "model": "fake", "prompt": "x", "logprobs": 1, "stream": true });
    let text = server.send("/v1/completions", body.to_string()).await.text().await.unwrap();
    let mut streamed = json!({ "tokens": [], "token_logprobs": [], "text_offset": [], "top_logprobs": [] });
    for event in events(&text).iter().filter(|event| *event != "[DONE]") {
        let chunk: Value = serde_json::from_str(event).unwrap();
        for (key, list) in streamed.as_object_mut().unwrap() {
            let more = chunk["choices"][0]["logprobs"][key].as_array().into_iter().flatten().cloned();
            list.as_array_mut().unwrap().extend(more);
        }
    }
    assert_eq!(streamed, expected);
    let server = Server::start(Form::AbleTokens, vec![Step::Bytes(&[0xc3, 0xa9]), STOP]).await;
    let (_, answer) = server.complete(json!({ "logprobs": 0 })).await;
    assert_eq!(answer["choices"][0]["logprobs"]["tokens"], json!(["bytes:\\xc3", "bytes:\\xa9"]));
}

#[tokio::test]
async fn several_answers_have_jobs_and_seeds_of_their_own() {
    let server = Server::start(Form::Able, vec![]).await;
    let scripts = || {
        let mut scripts = server.fake.scripts.lock().unwrap();
        for text in ["one", "two", "three"] {
            scripts.push_back(vec![Step::Text("<think>x</think>"), Step::Text(text), STOP]);
        }
    };
    let more = json!({ "n": 3, "seed": 40, "logprobs": true });
    scripts();
    let (status, answer) = server.chat(more.clone()).await;
    assert_eq!(status, 200, "{answer}");
    let blocking = whole(&answer);
    assert_eq!(blocking.iter().map(|(content, _)| content.as_str()).collect::<Vec<_>>(), ["one", "two", "three"]);
    let seeds: Vec<_> = server.fake.jobs.lock().unwrap().iter().map(|job| job.sampling.seed.unwrap()).collect();
    assert_eq!(seeds, [40, 41, 42]);
    // The prompt counts once, answers count all.
    let usage = &answer["usage"];
    assert_eq!((&usage["prompt_tokens"], &usage["completion_tokens"]), (&json!(7), &json!(9)));
    assert_eq!(usage["completion_tokens_details"]["reasoning_tokens"], 3);
    scripts();
    let mut streaming = more;
    streaming["stream_options"] = json!({ "include_usage": true });
    let events = server.chat_events(streaming).await;
    assert_eq!(folded(&events), blocking);
    assert_eq!(events.iter().filter(|event| *event == "[DONE]").count(), 1);
    let last: Value = serde_json::from_str(&events[events.len() - 2]).unwrap();
    assert_eq!(&last["usage"], usage);
}

#[tokio::test]
async fn several_answers_are_admitted_together_or_not_at_all() {
    let server = Server::start(Form::Able, vec![Step::Text("x"), Step::Hang]).await;
    server.fake.jobs_max.store(2, std::sync::atomic::Ordering::SeqCst);
    let (status, answer) = server.chat(json!({ "n": 3 })).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (503, Some("busy")));
    assert_eq!(server.fake.dropped.load(std::sync::atomic::Ordering::SeqCst), 2, "those admitted are cancelled");
}

#[tokio::test]
async fn one_that_fails_ends_all() {
    let server = Server::start(Form::Able, vec![]).await;
    server.fake.scripts.lock().unwrap().extend([vec![Step::Text("a"), Step::Hang], vec![Step::Text("b"), Step::Fail]]);
    let events = server.chat_events(json!({ "n": 2 })).await;
    assert!(events.last().unwrap().contains("engine_failed"), "{events:?}");
}

#[tokio::test]
async fn the_likeliest_of_several_is_given() {
    let server = Server::start(Form::Able, vec![]).await;
    let likely = |text, logprob| vec![Step::Likely(text, logprob), Step::Likely("!", logprob), STOP];
    server.fake.scripts.lock().unwrap().extend([likely("worst", -9.0), likely("best", -0.1), likely("good", -0.2)]);
    let (status, answer) = server.complete(json!({ "n": 2, "best_of": 3 })).await;
    assert_eq!(status, 200, "{answer}");
    let texts = |answer: &Value| -> Vec<String> {
        let choices = answer["choices"].as_array().unwrap().iter();
        choices.map(|choice| choice["text"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(texts(&answer), ["best!", "good!"]);
    assert_eq!(answer["choices"][0]["logprobs"], Value::Null);
    assert_eq!(answer["usage"]["completion_tokens"], 9, "those left out were written as well");
    let server = Server::start(Form::Text, vec![STOP]).await;
    let (status, answer) = server.complete(json!({ "best_of": 2 })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("best_of")));
}

#[tokio::test]
async fn several_prompts_have_answers_each_and_may_be_put_in_front() {
    let server = Server::start(Form::Able, vec![Step::Text("!"), STOP]).await;
    let (status, answer) = server.complete(json!({ "prompt": ["a", "bé"], "n": 2, "echo": true })).await;
    assert_eq!(status, 200, "{answer}");
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<_> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["a!", "a!", "bé!", "bé!"]);
    assert_eq!((&choices[3]["index"], &answer["usage"]["prompt_tokens"]), (&json!(3), &json!(14)));
    let (status, answer) = server.complete(json!({ "prompt": [1, 2], "echo": true })).await;
    assert_eq!((status, answer["error"]["param"].as_str()), (400, Some("echo")));
    let server = Server::start(Form::Tokens, vec![Step::Bytes(b"!"), STOP]).await;
    let (_, answer) = server.complete(json!({ "prompt": [[104, 105], [106]], "echo": true })).await;
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<_> = choices.iter().map(|choice| choice["text"].as_str().unwrap()).collect();
    assert_eq!(texts, ["hi!", "j!"]);
}
