//! Servers that mean harm, or are broken: all is bounded, nothing hangs, nothing panics.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    EngineError, EngineHandle,
    answer::Part,
    ask::Subject,
    node::{Elsewhere, Question, RejectionKind},
};
use proptest::prelude::*;
use serde_json::{Value, json};
use tokio::time::timeout;

use super::{
    SOON, ask, content, engine, names, options, parts, share,
    stand_in::{Answer, StandIn, Step, bare, delta, events, hello, list, not_found, sse, steps},
    until,
};
use crate::{ShareOptions, Shared, client::EVENT_BYTES_MAX, look::MODELS_MAX, reading::Reading, request::How};

/// Shares a server that becomes hostile once it is known.
async fn turned(
    idle_max: Duration,
    answer: impl Fn() -> Answer + Send + Sync + 'static,
) -> (StandIn, Arc<Shared>, EngineHandle) {
    let server = StandIn::new(bare(|_| hello())).await;
    let options = ShareOptions { idle_max, first_byte_max: idle_max, ..options(&server) };
    let shared = Shared::start(options).await.unwrap();
    let engine = engine(&shared, "m").await;
    server.set(bare(move |_| answer()));
    (server, shared, engine)
}

/// As long as an answer may be silent in tests of that.
const IDLE_MAX: Duration = Duration::from_millis(300);

async fn breaks_off(idle_max: Duration, answer: impl Fn() -> Answer + Send + Sync + 'static, why: &str) {
    let (server, _shared, engine) = turned(idle_max, answer).await;
    let mut left = server.left();
    let (_, error) = parts(&engine, ask("hi")).await;
    let Some(EngineError::Failed { what }) = error else { panic!("{error:?}") };
    assert!(what.contains(why), "{what}");
    let _ = timeout(SOON, left.wait_for(|left| *left > 0)).await.expect("the connection is closed");
}

#[tokio::test]
async fn a_line_without_end_is_not_read_to_it() {
    let filler = vec![b'a'; 64 << 10];
    let line = move || steps(vec![Step::Send(b"data: ".to_vec()), Step::Forever(filler.clone(), Duration::ZERO)]);
    breaks_off(SOON, line, "bytes").await;
    // Nor is an event of lines.
    let lines = move || steps(vec![Step::Forever(b"data: 1\n".repeat(8192), Duration::ZERO)]);
    breaks_off(SOON, lines, "bytes").await;
}

#[tokio::test]
async fn a_slow_drip_is_silence() {
    let drip = || steps(vec![Step::Forever(b"d".to_vec(), Duration::from_millis(10))]);
    breaks_off(IDLE_MAX, drip, "silent").await;
    // Comments are no answer.
    let comments = || steps(vec![Step::Forever(b": still here\n\n".to_vec(), Duration::from_millis(10))]);
    breaks_off(IDLE_MAX, comments, "silent").await;
}

#[tokio::test]
async fn one_that_never_answers_is_given_up() {
    let (_server, _shared, engine) = turned(IDLE_MAX, || Answer::Raw(100, "", vec![Step::Stay])).await;
    let rejection = timeout(SOON, engine.answer(ask("hi"))).await.unwrap().err().unwrap();
    assert_eq!(rejection.kind, RejectionKind::Unavailable);
}

#[tokio::test]
async fn an_end_that_drags_on_is_not_waited_for() {
    let answer = delta(json!({ "content": "a" }));
    let mut last = answer.clone();
    last["choices"][0]["finish_reason"] = json!("stop");
    let text = format!("data: {last}\n\n").into_bytes();
    let (_server, _shared, engine) =
        turned(Duration::from_secs(2), move || steps(vec![Step::Send(text.clone()), Step::Stay])).await;
    let (parts, error) = parts(&engine, ask("hi")).await;
    assert_eq!(error, None);
    assert!(matches!(&parts[..], [Part::Delta(_), Part::Finished(_)]), "{parts:?}");
}

#[tokio::test]
async fn calls_without_end_are_not_collected() {
    let piece = |index: u32, text: &str| {
        let call = json!([{ "index": index, "function": { "name": "f", "arguments": text } }]);
        format!("data: {}\n\n", delta(json!({ "tool_calls": call }))).into_bytes()
    };
    let long = piece(0, &"a".repeat(100 << 10));
    breaks_off(SOON, move || steps(vec![Step::Forever(long.clone(), Duration::ZERO)]), "bytes").await;
    let many: Vec<u8> = (0..200).flat_map(|index| piece(index, "{}")).collect();
    breaks_off(SOON, move || steps(vec![Step::Send(many.clone()), Step::Stay]), "not understood").await;
}

#[tokio::test]
async fn a_large_body_is_not_read() {
    let megabyte = vec![b' '; 1 << 20];
    let body = move || {
        Answer::Raw(200, "content-length: 104857600\r\n", vec![Step::Forever(megabyte.clone(), Duration::ZERO)])
    };
    // As a list …
    let large = body.clone();
    let server = StandIn::new(move |_| large()).await;
    let shared = share(&server).await;
    until(&shared, "looked", |shared| shared.status()["failures"].as_u64() > Some(0)).await;
    assert!(shared.models().is_empty());
    assert!(shared.status()["last_failure"].as_str().unwrap().contains("bytes"), "{}", shared.status());
    // … as a refusal …
    let refusal = vec![b'x'; 1 << 20];
    let (_server, _shared, engine) =
        turned(SOON, move || Answer::Raw(400, "", vec![Step::Forever(refusal.clone(), Duration::ZERO)])).await;
    let rejection = engine.answer(ask("hi")).await.err().unwrap();
    assert!(rejection.kind == RejectionKind::Invalid && rejection.message.len() < 4096, "{rejection:?}");
    // … and as vectors.
    let embedder = StandIn::new(move |request| match (request.path(), &request.body["input"]) {
        ("/v1/models", _) => list(&[json!({ "id": "e" })]),
        ("/v1/embeddings", Value::String(_)) => Answer::Json(200, json!({ "data": [{ "embedding": [1.0] }] })),
        ("/v1/embeddings", _) => body(),
        _ => not_found(),
    })
    .await;
    let shared = share(&embedder).await;
    let inputs = vec![Subject::Text("a".into())];
    let question = Question::Embed { id: "e".into(), inputs, pooling: Default::default() };
    let rejection = super::engine(&shared, "e").await.reply(question).await.unwrap_err();
    assert!(rejection.message.contains("bytes"), "{rejection:?}");
}

#[tokio::test]
async fn a_list_without_end_is_cut() {
    let many: Vec<Value> = (0..3000).map(|number| json!({ "id": format!("m{number}") })).collect();
    let server = StandIn::new(move |request| match request.path() {
        "/v1/models" => list(&many),
        _ => not_found(),
    })
    .await;
    let shared = share(&server).await;
    until(&shared, "offered", |shared| !shared.models().is_empty()).await;
    assert_eq!(shared.models().len(), MODELS_MAX);
    assert_eq!(shared.status()["models_left_out"], 3000 - MODELS_MAX);
    let endless = br#"{"id":"m"},"#.repeat(1000);
    server.set(move |request| match request.path() {
        "/v1/models" => Answer::Raw(
            200,
            "",
            vec![Step::Send(b"{\"data\":[".to_vec()), Step::Forever(endless.clone(), Duration::ZERO)],
        ),
        _ => not_found(),
    });
    until(&shared, "given up", |shared| shared.models().is_empty()).await;
}

#[tokio::test]
async fn lists_of_other_things_offer_nothing() {
    let long = "a".repeat(300);
    for body in [
        json!(null),
        json!([]),
        json!("models"),
        json!({ "data": 5 }),
        json!({ "data": { "id": "m" } }),
        json!({ "data": [null, 5, "m", [], {}, { "id": 5 }, { "id": "" }, { "id": "a\nb" }, { "id": long }] }),
    ] {
        let (shown, server) = (body.to_string(), StandIn::new(move |_| Answer::Json(200, body.clone())).await);
        let shared = share(&server).await;
        assert_eq!(names(&shared), [""; 0], "{shown}");
    }
}

#[tokio::test]
async fn facts_of_the_wrong_type_are_none() {
    let odd = [json!(null), json!(-1), json!(0), json!(1.5), json!("many"), json!([]), json!({}), json!(u64::MAX)];
    for value in odd {
        let shown = value.to_string();
        let server = StandIn::new(move |request| match request.path() {
            "/v1/models" => list(&[json!({
                "id": "m", "owned_by": "mesh-llm", "context_length": value, "capabilities": value, "status": value,
                "parameters": value, "quantization": value,
            })]),
            _ => Answer::Json(200, value.clone()),
        })
        .await;
        let shared = share(&server).await;
        until(&shared, "offered", |shared| names(shared) == ["m"]).await;
        let status = &shared.status()["models"][0];
        assert_eq!(
            (status["context_told"].as_bool(), status["context_length"].as_u64()),
            (Some(false), Some(4096)),
            "{shown}"
        );
    }
}

#[tokio::test]
async fn one_that_changes_its_mind_at_every_look_is_followed() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let count = std::sync::atomic::AtomicU32::new(0);
    server.set(move |request| match request.path() {
        "/v1/models" => {
            let number = count.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            list(&[json!({ "id": format!("m{number}"), "owned_by": (["vllm", "mesh-llm", "llamacpp", "x"])[number as usize % 4] })])
        }
        _ => Answer::Json(200, json!({})),
    });
    let mut changes = shared.changes();
    let from = *changes.borrow();
    timeout(SOON, changes.wait_for(|now| *now > from + 8)).await.unwrap().unwrap();
    assert_eq!(shared.models().len(), 1);
}

#[tokio::test]
async fn many_events_at_once_are_no_large_one() {
    let mut bytes: Vec<u8> = Vec::new();
    let event = format!("data: {}\n\n", delta(json!({ "content": "a".repeat(1000) })));
    while bytes.len() < 3 * EVENT_BYTES_MAX {
        bytes.extend_from_slice(event.as_bytes());
    }
    bytes.extend(sse(&[super::stand_in::finish("stop")]));
    let (_server, _shared, engine) = turned(SOON, move || events(bytes.clone())).await;
    let (parts, error) = parts(&engine, ask("hi")).await;
    assert_eq!(error, None);
    assert_eq!(parts[0], Part::Delta(content(&"a".repeat(1000))));
    assert!(parts.len() > 2000);
}

fn json_value() -> impl Strategy<Value = Value> {
    let word = prop::sample::select(vec![
        "choices",
        "delta",
        "content",
        "tool_calls",
        "function",
        "arguments",
        "name",
        "index",
        "finish_reason",
        "usage",
        "logprobs",
        "token",
        "bytes",
        "top_logprobs",
        "error",
        "timings",
        "prompt_ms",
        "text",
        "stop",
        "tokens",
    ]);
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        any::<f64>().prop_map(Value::from),
        word.clone().prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 4, move |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::vec((word.clone(), inner), 0..6).prop_map(|pairs| Value::Object(
                pairs.into_iter().map(|(key, value)| (key.to_owned(), value)).collect()
            )),
        ]
    })
}

proptest! {
    #[test]
    fn whatever_an_event_holds_nothing_panics(events in prop::collection::vec(json_value(), 0..4), choice in json_value()) {
        let how = How { logprobs: Some(2), single_call: true, echo: None };
        let mut ready = Default::default();
        let mut reading = Reading::new(how, &mut ready);
        for event in events {
            let _ = reading.event(&event.to_string(), &mut ready);
        }
        let _ = reading.event(&json!({ "choices": [choice] }).to_string(), &mut ready);
        let _ = reading.finished();
    }

    #[test]
    fn whatever_text_an_event_is_nothing_panics(text: String) {
        let mut ready = Default::default();
        let _ = Reading::new(How::default(), &mut ready).event(&text, &mut ready);
    }
}
