//! The end.

use std::time::Duration;

use mesh_llm::listen::Options;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{
    STOP, connect,
    fake::{Step, chat, eventually},
    rest, start,
};

#[tokio::test]
async fn a_server_that_ends_is_not_ready_and_finishes_what_runs() {
    let mut server = start(vec![Step::Text("still "), Step::Wait, Step::Text("here"), STOP], Options::default()).await;
    assert_eq!(server.chat(json!({ "stop": "still" })).await.0, 200, "loads the model");
    // What has begun to ask is answered, as is what runs; a connection that asks nothing keeps nobody up.
    let mut asking = connect(&server).await;
    asking.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\n").await.unwrap();
    let mut ready = connect(&server).await;
    ready.write_all(b"GET /readyz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").await.unwrap();
    assert!(rest(&mut ready).await.contains("200 OK"));
    let _silent = connect(&server).await;
    let running = server.send("/v1/chat/completions", chat(json!({ "stream": true })).to_string()).await;

    server.stop();
    let url = server.url.clone();
    let slots = server.slots.clone();
    eventually("it drains", || slots.iter().all(|slot| slot.state().word() == "stopped")).await;
    asking.write_all(b"\r\n").await.unwrap();
    let answer = rest(&mut asking).await;
    assert!(answer.starts_with("HTTP/1.1 503 ") && answer.contains("draining"), "{answer}");
    assert!(server.client.get(format!("{url}/livez")).send().await.is_err(), "it still listens");
    server.fake.steps.add_permits(1);
    let text = running.text().await.unwrap();
    assert!(text.contains("here") && text.contains("[DONE]"), "{text}");
    tokio::time::timeout(Duration::from_secs(10), server.stopped()).await.unwrap();
}

#[tokio::test]
async fn the_grace_has_an_end() {
    let mut server = start(vec![Step::Text("never "), Step::Hang], Options::default()).await;
    let running = server.send("/v1/chat/completions", chat(json!({ "stream": true })).to_string()).await;
    server.stop();
    tokio::time::timeout(Duration::from_secs(10), server.stopped()).await.unwrap();
    drop(running);
}
