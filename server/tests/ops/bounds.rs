//! Bounds that can be set, and connections that nobody uses.

use std::time::Duration;

use mesh_llm::listen::Options;
use serde_json::json;
use tokio::io::AsyncWriteExt;

use crate::{
    STOP, connect,
    fake::{Step, chat},
    rest, start,
};

#[tokio::test]
async fn the_bound_on_bodies_is_the_one_that_was_set() {
    let server = start(vec![STOP], Options { body_bytes_max: 2048, ..Options::default() }).await;
    let long = server.send("/v1/chat/completions", " ".repeat(2049)).await;
    assert_eq!(long.status().as_u16(), 413);
    assert!(long.text().await.unwrap().contains("larger than 2048 bytes"));
    assert_eq!(server.chat(json!({})).await.0, 200);
}

#[tokio::test]
async fn connections_that_nobody_uses_are_closed() {
    let options = Options { idle: Duration::from_millis(200), ..Options::default() };
    let script = vec![Step::Text("slow"), Step::Wait, STOP];
    let server = start(script, options).await;
    // Neither one that never asked for anything, nor one that had its answer, nor one that is half a request.
    let mut silent = connect(&server).await;
    assert_eq!(rest(&mut silent).await, "");
    let mut answered = connect(&server).await;
    answered.write_all(b"GET /livez HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    assert!(rest(&mut answered).await.contains("200 OK"));
    let mut half = connect(&server).await;
    half.write_all(b"GET /livez HTTP/1.1\r\nhost:").await.unwrap();
    rest(&mut half).await;
    // A request that takes its time is not one of them.
    let body = chat(json!({ "stream": true })).to_string();
    let answer = server.send("/v1/chat/completions", body).await;
    tokio::time::sleep(Duration::from_millis(3000)).await;
    server.fake.steps.add_permits(1);
    assert!(answer.text().await.unwrap().contains("[DONE]"));
}
