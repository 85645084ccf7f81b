//! Models come and go with the server that lists them.

use std::time::Duration;

use futures::StreamExt;
use mesh_core::{
    EngineState, Hint,
    node::{Elsewhere, Load, RejectionKind},
};
use serde_json::json;
use tokio::time::timeout;

use super::{
    SOON, ask, content, engine, names, options, share,
    stand_in::{Answer, StandIn, Step, bare, delta, hello, list, llama_server, sse, steps},
    until, whole,
};
use crate::{Own, ShareOptions, Shared};

#[tokio::test]
async fn what_is_listed_is_offered_and_nothing_else() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    assert_eq!(names(&shared), ["m"]);
    let offer = &shared.models()[0].nodes[0];
    assert_eq!((offer.node.as_str(), offer.offer.name.as_str(), offer.offer.backend.as_str()), ("box", "m", "openai"));
    assert!(shared.engine("m").is_some() && shared.engine("m@box").is_some());
    assert!(shared.engine("n").is_none() && shared.engine("m@other").is_none() && shared.engine("@box").is_none());
    assert_eq!(offer.offer.load, Load::default());
    let (deltas, _) = whole(&engine(&shared, "m").await, ask("hi")).await;
    assert_eq!(deltas, [content("hello")]);
    assert!(shared.models()[0].nodes[0].offer.load.prefill_per_s > Some(0.0));
}

#[tokio::test]
async fn the_list_is_followed() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let (mut changes, before) = (shared.changes(), engine(&shared, "m").await);
    let (first, state) = (*changes.borrow_and_update(), before.state());
    server.set(|request| match request.path() {
        "/v1/models" => list(&[json!({ "id": "n" }), json!({ "id": "o" }), json!({ "id": "o" })]),
        _ => super::stand_in::not_found(),
    });
    until(&shared, "followed", |shared| names(shared) == ["n", "o"]).await;
    timeout(SOON, changes.wait_for(|changes| *changes > first)).await.unwrap().unwrap();
    assert!(shared.engine("m").is_none());
    assert_eq!(*state.borrow(), EngineState::Stopped);
    let rejection = before.answer(ask("hi")).await.err().unwrap();
    assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::Unavailable, "engine_gone"));
    assert_eq!(shared.status()["models_left_out"], 1, "one is listed twice");
}

#[tokio::test]
async fn looks_that_find_nothing_new_change_nothing() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let (mut changes, engine) = (shared.changes(), engine(&shared, "m").await);
    changes.mark_unchanged();
    let looks = server.count("/v1/models");
    until(&shared, "looked again", |_| server.count("/v1/models") > looks + 3).await;
    assert!(!changes.has_changed().unwrap());
    assert_eq!(engine.state_now(), EngineState::Ready);
}

#[tokio::test]
async fn a_server_that_goes_is_not_offered_and_one_that_comes_back_is() {
    let mut server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let old = engine(&shared, "m").await;
    server.down().await;
    until(&shared, "gone", |shared| shared.models().is_empty()).await;
    assert!(shared.engine("m").is_none());
    let status = shared.status();
    assert_eq!((status["healthy"].as_bool(), status["models"].as_array().unwrap().len()), (Some(false), 0));
    assert!(status["failures"].as_u64() > Some(0));
    assert_eq!(old.state_now(), EngineState::Stopped);
    server.up().await;
    let (deltas, _) = whole(&engine(&shared, "m").await, ask("hi")).await;
    assert_eq!(deltas, [content("hello")]);
    assert_eq!(shared.status()["healthy"], true);
}

#[tokio::test]
async fn one_that_is_not_there_yet_is_waited_for() {
    let mut server = StandIn::new(bare(|_| hello())).await;
    server.down().await;
    let shared = share(&server).await;
    assert!(shared.models().is_empty());
    server.up().await;
    until(&shared, "there", |shared| names(shared) == ["m"]).await;
}

#[tokio::test]
async fn a_server_does_not_share_itself_whatever_it_is_called() {
    let itself = |instance: &'static str, models: fn() -> Answer| {
        move |request: &super::stand_in::Request| match request.path() {
            "/v1/models" => models(),
            "/version" => Answer::Json(200, json!({ "name": "mesh-llm", "instance": instance })),
            _ => hello(),
        }
    };
    let one = || list(&[json!({ "id": "m", "owned_by": "mesh-llm", "status": "ready" })]);
    let elsewhere = || list(&[json!({ "id": "m", "owned_by": "mesh-llm", "status": "ready", "backend": "share" })]);
    let server = StandIn::new(itself("me", one)).await;
    let own = Own { address: "127.0.0.1:1".parse().unwrap(), instance: "me".into() };
    // At another address than it listens on, as a proxy has it.
    let shared = Shared::start(ShareOptions { own: Some(own.clone()), ..options(&server) }).await.unwrap();
    let refused = |shared: &Shared| shared.status()["last_failure"].as_str().is_some_and(|why| why.contains("itself"));
    assert!(refused(&shared) && shared.models().is_empty(), "{}", shared.status());
    server.set(itself("another", one));
    until(&shared, "offered", |shared| names(shared) == ["m"]).await;
    // One that has nothing of its own.
    server.set(itself("me", elsewhere));
    until(&shared, "known", |shared| shared.status()["healthy"] == false && refused(shared)).await;
    // At its own address nothing is asked.
    let own = Own { address: ([127, 0, 0, 1], server.port()).into(), ..own };
    let error = Shared::start(ShareOptions { own: Some(own), ..options(&server) }).await.err().unwrap();
    assert!(error.to_string().contains("cannot share itself") && error.hint().is_some(), "{error}");
}

#[tokio::test]
async fn what_is_passed_on_says_so() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    whole(&engine(&shared, "m").await, ask("hi")).await;
    for path in ["/v1/models", "/v1/chat/completions"] {
        let head = server.last(path).head.to_lowercase();
        assert!(head.contains("via: 1.1 mesh-llm"), "{head}");
    }
}

#[tokio::test]
async fn a_request_that_finds_nobody_has_the_server_looked_at_at_once() {
    let mut server = StandIn::new(bare(|_| hello())).await;
    let slow = ShareOptions { interval: Duration::from_secs(3600), ..options(&server) };
    let shared = Shared::start(slow).await.unwrap();
    let engine = engine(&shared, "m").await;
    server.down().await;
    let rejection = engine.answer(ask("hi")).await.err().unwrap();
    assert_eq!(rejection.kind, RejectionKind::Unavailable);
    assert!(rejection.retry_after.is_some());
    until(&shared, "looked at", |shared| shared.models().is_empty()).await;
}

#[tokio::test]
async fn one_that_is_still_loading_is_not_offered() {
    let answers = |status: u16| {
        move |request: &super::stand_in::Request| match request.path() {
            "/health" => Answer::Json(status, json!({ "error": { "message": "Loading model" } })),
            _ => llama_server(|_| hello())(request),
        }
    };
    let server = StandIn::new(answers(503)).await;
    let shared = share(&server).await;
    until(&shared, "looked", |shared| shared.status()["failures"].as_u64() > Some(0)).await;
    assert!(shared.models().is_empty());
    server.set(answers(200));
    until(&shared, "ready", |shared| names(shared) == ["model.gguf"]).await;
    server.set(answers(500));
    until(&shared, "broken", |shared| shared.models().is_empty()).await;
    // A gateway may keep that to itself.
    server.set(answers(404));
    until(&shared, "ready", |shared| names(shared) == ["model.gguf"]).await;
}

#[tokio::test]
async fn who_drops_the_stream_closes_the_connection() {
    let endless = || steps(vec![Step::Send(sse(&[delta(json!({ "content": "a" }))])[..30].to_vec()), Step::Stay]);
    let server = StandIn::new(bare(move |_| endless())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    let mut left = server.left();
    let mut stream = engine.answer(ask("hi")).await.unwrap();
    assert!(futures::poll!(stream.next()).is_pending());
    assert_eq!(shared.models()[0].nodes[0].offer.load.running, 1);
    assert_eq!(*left.borrow(), 0);
    drop(stream);
    timeout(SOON, left.wait_for(|left| *left == 1)).await.unwrap().unwrap();
    assert_eq!(shared.models()[0].nodes[0].offer.load.running, 0);
}

#[tokio::test]
async fn who_drops_the_request_before_it_is_answered_closes_the_connection() {
    let server = StandIn::new(bare(|_| hello())).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    // No head is sent, for as long as this is.
    server.set(bare(|_| Answer::Raw(100, "", vec![Step::Stay])));
    let mut left = server.left();
    let asked = server.count("/v1/chat/completions");
    let mut answer = Box::pin(engine.answer(ask("hi")));
    until(&shared, "asked", |_| {
        assert!(futures::FutureExt::now_or_never(answer.as_mut()).is_none());
        server.count("/v1/chat/completions") > asked
    })
    .await;
    drop(answer);
    timeout(SOON, left.wait_for(|left| *left == 1)).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_drained_engine_cancels_what_is_left() {
    let server = StandIn::new(bare(|_| steps(vec![Step::Stay]))).await;
    let shared = share(&server).await;
    let engine = engine(&shared, "m").await;
    let mut left = server.left();
    let mut stream = engine.answer(ask("hi")).await.unwrap();
    let next = tokio::spawn(async move { stream.next().await });
    engine.drain(Duration::from_millis(1)).await;
    assert_eq!(next.await.unwrap(), Some(Err(mesh_core::EngineError::Stopped)));
    timeout(SOON, left.wait_for(|left| *left == 1)).await.unwrap().unwrap();
    assert!(engine.answer(ask("hi")).await.is_err());
}

#[tokio::test]
async fn it_is_sent_no_more_requests_than_it_may_be() {
    let server = StandIn::new(bare(|_| steps(vec![Step::Stay]))).await;
    let shared = Shared::start(ShareOptions { requests_max: 2, ..options(&server) }).await.unwrap();
    let engine = engine(&shared, "m").await;
    let _one = engine.answer(ask("hi")).await.unwrap();
    let two = engine.answer(ask("hi")).await.unwrap();
    let rejection = engine.answer(ask("hi")).await.err().unwrap();
    assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::Unavailable, "busy"));
    drop(two);
    assert!(engine.answer(ask("hi")).await.is_ok());
}
