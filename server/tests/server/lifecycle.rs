//! Loading, failing, coming back, ending.

use std::{sync::atomic::Ordering::SeqCst, time::Duration};

use futures::StreamExt;
use mesh_core::FinishReason;
use mesh_llm::{
    pipeline::{self, Ask, InLine, Subject},
    slots::{Keeping, SlotState, Slots},
};
use serde_json::json;

use crate::fake::{Fake, Form, Server, Step, chat, eventually};

const STOP: Step = Step::Finish(FinishReason::Stop);

#[tokio::test]
async fn nothing_but_generation_waits_for_a_load() {
    let server = Server::start_with(Form::Text, vec![Step::Text("hi"), STOP], |fake| {
        fake.hold_loads.store(true, SeqCst);
    })
    .await;
    let (one, two) = (server.chat(json!({})), server.chat(json!({ "stop": "x" })));
    let watching = async {
        eventually("a load began", || server.fake.loads.load(SeqCst) == 1).await;
        assert_eq!(server.get("/livez").await, (200, json!({ "status": "ok" })));
        let (status, health) = server.get("/health").await;
        assert_eq!((status, &health["models"][0]["status"]), (200, &json!("loading")));
        assert_eq!(server.get("/readyz").await.0, 503);
        assert_eq!(server.get("/version").await.1["version"], env!("CARGO_PKG_VERSION"));
        let (_, models) = server.get("/v1/models").await;
        assert_eq!(models["data"][0]["status"], "loading");
        assert_eq!(models["data"][0]["id"], "org/fake-model", "its own name is known once it is found");
        server.fake.go_on.notify_one();
    };
    let ((first, _), (second, _), ()) = futures::join!(one, two, watching);
    assert_eq!((first, second), (200, 200));
    assert_eq!(server.fake.loads.load(SeqCst), 1, "requests that wait join one load");
    assert_eq!(server.get("/readyz").await.0, 200);
    let (_, models) = server.get("/v1/models").await;
    let model = &models["data"][0];
    assert_eq!((&model["id"], &model["context_length"]), (&json!("org/fake-model"), &json!(4096)));
    for path in ["/v1/models/org/fake-model", "/v1/models/org%2Ffake-model", "/v1/models/fake"] {
        assert_eq!(server.get(path).await.1["id"], "org/fake-model", "{path}");
    }
    assert_eq!(server.chat(json!({ "model": "org/fake-model" })).await.0, 200);
}

#[tokio::test]
async fn a_busy_engine_says_when_to_come_back() {
    let server = Server::start_with(Form::Text, vec![STOP], |fake| fake.busy.store(true, SeqCst)).await;
    let response = server.send("/v1/chat/completions", chat(json!({})).to_string()).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "2"));
    let answer: serde_json::Value = response.json().await.unwrap();
    insta::assert_json_snapshot!(answer);
}

#[tokio::test]
async fn an_engine_that_fails_ends_its_streams_and_is_started_again() {
    let server = Server::start(Form::Text, vec![Step::Text("half an ans"), Step::Fail]).await;
    let body = chat(json!({ "stream": true })).to_string();
    let text = server.send("/v1/chat/completions", body).await.text().await.unwrap();
    let tail: Vec<_> = text.split("\n\n").filter(|event| !event.is_empty()).collect();
    insta::assert_snapshot!(tail.last().unwrap());
    assert!(!text.contains("[DONE]"), "a broken answer must not look complete");

    *server.fake.script.lock().unwrap() = vec![Step::Text("whole"), STOP];
    let (status, answer) = server.chat(json!({})).await;
    assert_eq!((status, answer["choices"][0]["message"]["content"].as_str()), (200, Some("whole")));
    assert_eq!(server.fake.loads.load(SeqCst), 2);
}

#[tokio::test]
async fn requests_in_line_go_to_the_next_engine() {
    for stream in [true, false] {
        let server = Server::start(Form::Text, vec![Step::Queued(1), Step::FailInLine]).await;
        let body = chat(json!({ "stream": stream })).to_string();
        let (answers, ()) = futures::join!(
            futures::future::join_all(
                (0..3).map(|_| async { server.send("/v1/chat/completions", body.clone()).await.text().await.unwrap() })
            ),
            async {
                eventually("all are in line", || server.fake.jobs.lock().unwrap().len() == 3).await;
                *server.fake.script.lock().unwrap() = vec![Step::Text("whole"), STOP];
                server.fake.steps.add_permits(3);
            }
        );
        assert!(answers.iter().all(|text| text.contains("whole") && !text.contains("error")), "{answers:?}");
        assert_eq!(answers.iter().filter(|text| text.contains("[DONE]")).count(), if stream { 3 } else { 0 });
        assert_eq!((server.fake.loads.load(SeqCst), server.fake.jobs.lock().unwrap().len()), (2, 6));
        eventually("no place is lost", || {
            matches!(server.slots.get("fake").unwrap().state(), SlotState::Ready(model) if model.usage().requests == 0)
        })
        .await;
    }
}

#[tokio::test]
async fn a_request_that_had_its_turn_is_not_handed_on() {
    let script = vec![Step::Queued(1), Step::Prefill(7), Step::FailInLine];
    let server = Server::start_with(Form::Text, script, |fake| fake.steps.add_permits(1)).await;
    let (status, answer) = server.chat(json!({})).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (500, Some("engine_failed")));
    assert_eq!(server.fake.jobs.lock().unwrap().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_request_that_no_engine_takes_is_told_why() {
    let fake = Fake::new(Form::Text, vec![Step::FailInLine]);
    // The first engine breaks, and none is loaded after it.
    fake.steps.add_permits(1);
    let slots = Slots::spawn(vec![fake.starter("fake", Form::Text).into()], Keeping::default());
    let model = slots.get("fake").unwrap().model(None).await.unwrap();
    fake.failing_loads.store(u32::MAX, SeqCst);
    let ask = Ask::new("test", Subject::Text("Hi".into()));
    let parts = pipeline::open(model, ask.clone()).await.unwrap().in_line(InLine::new(slots, "fake", ask));
    let error = pipeline::collect(parts).await.unwrap_err().to_string();
    assert!(error.contains("no other took the request in its place: fake failed"), "{error}");
}

#[tokio::test]
async fn crashes_among_answers_are_not_failures_in_a_row() {
    let server = Server::start(Form::Text, vec![]).await;
    for crash in 1..=10 {
        *server.fake.script.lock().unwrap() = vec![Step::Text("whole"), STOP];
        assert_eq!(server.chat(json!({})).await.0, 200, "after {} crashes", crash - 1);
        *server.fake.script.lock().unwrap() = vec![Step::Fail];
        assert_eq!(server.chat(json!({})).await.0, 500);
        assert_eq!(server.fake.loads.load(SeqCst), crash);
    }
    // One that crashes before it answered anything does fail in a row.
    assert_eq!(server.chat(json!({})).await.0, 500);
    let (_, answer) = server.chat(json!({})).await;
    assert_eq!(answer["error"]["code"], "model_failed", "{answer}");
}

#[tokio::test]
async fn a_blocking_answer_that_breaks_off_is_an_error() {
    let server = Server::start(Form::Text, vec![Step::Text("half"), Step::Fail]).await;
    let (status, answer) = server.chat(json!({})).await;
    assert_eq!((status, answer["error"]["code"].as_str()), (500, Some("engine_failed")));
}

#[tokio::test]
async fn loads_that_fail_are_tried_again_less_and_less_often() {
    let server = Server::start_with(Form::Text, vec![STOP], |fake| fake.failing_loads.store(2, SeqCst)).await;
    assert_eq!(server.chat(json!({})).await.0, 503); // fails, and may be tried again at once
    assert_eq!(server.chat(json!({})).await.0, 503); // fails again
    let response = server.send("/v1/chat/completions", chat(json!({})).to_string()).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "1"));
    let answer: serde_json::Value = response.json().await.unwrap();
    insta::assert_json_snapshot!(answer);
    assert_eq!(server.fake.loads.load(SeqCst), 2, "nothing is loaded before its time");
    let (_, health) = server.get("/health").await;
    assert_eq!((&health["models"][0]["status"], &health["models"][0]["failures"]), (&json!("failed"), &json!(2)));
    tokio::time::sleep(Duration::from_millis(1100)).await;
    assert_eq!(server.chat(json!({})).await.0, 200);
}

#[tokio::test]
async fn a_client_that_leaves_cancels_within_one_event() {
    for stream in [true, false] {
        let mut script = vec![Step::Text("a"); 3];
        script.extend(std::iter::repeat_n(Step::Pause, 1000));
        let server = Server::start(Form::Text, script).await;
        let body = chat(json!({ "stream": stream })).to_string();
        let request = server.send("/v1/chat/completions", body);
        if stream {
            let mut bytes = request.await.bytes_stream();
            assert!(bytes.next().await.unwrap().is_ok());
            drop(bytes);
        } else {
            tokio::select! {
                _ = request => panic!("the script has no end"),
                () = eventually("the engine works", || server.fake.taken.load(SeqCst) > 3) => {}
            }
        }
        let before = server.fake.taken.load(SeqCst);
        eventually("the engine's stream is dropped", || server.fake.dropped.load(SeqCst) == 1).await;
        let after = server.fake.taken.load(SeqCst);
        assert!(after <= before + 5, "{} events were taken after the client left", after - before);
    }
}

#[tokio::test]
async fn a_drain_lets_answers_finish_and_refuses_new_ones() {
    let mut script = vec![Step::Text("still ")];
    script.extend(std::iter::repeat_n(Step::Pause, 10));
    script.extend([Step::Text("here"), STOP]);
    let mut server = Server::start(Form::Text, script).await;
    let body = chat(json!({ "stream": true })).to_string();
    let running = server.send("/v1/chat/completions", body).await;
    server.stop();
    let url = server.url.clone();
    let text = running.text().await.unwrap();
    assert!(text.contains("here") && text.contains("[DONE]"), "{text}");
    let slots = server.slots.clone();
    tokio::time::timeout(Duration::from_secs(5), server.stopped()).await.unwrap();
    assert!(reqwest::Client::new().get(format!("{url}/livez")).send().await.is_err(), "it still listens");
    let refused = slots.get("fake").unwrap().model(None).await.unwrap_err();
    assert_eq!(refused.to_string(), "the server is shutting down");
}
