//! Bounds on what clients may do.

use std::time::Duration;

use mesh_core::FinishReason;
use serde_json::json;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

use crate::fake::{Form, Server, Step, chat};

async fn raw(server: &Server, text: &[u8]) -> String {
    let mut stream = TcpStream::connect(server.url.trim_start_matches("http://")).await.unwrap();
    // The server may answer and close before everything is written.
    stream.write_all(text).await.ok();
    let mut answer = Vec::new();
    tokio::time::timeout(Duration::from_secs(10), stream.read_to_end(&mut answer)).await.ok();
    String::from_utf8_lossy(&answer).into_owned()
}

#[tokio::test]
async fn a_body_of_100_mib_is_refused_and_the_server_lives() {
    let server = Server::start(Form::Text, vec![Step::Finish(FinishReason::Stop)]).await;
    let body = " ".repeat(100 << 20);
    let announced = server.send("/v1/chat/completions", body.clone()).await;
    assert_eq!(announced.status().as_u16(), 413);
    insta::assert_snapshot!(announced.text().await.unwrap());
    let chunks = futures::stream::iter(
        body.into_bytes().chunks(1 << 20).map(|chunk| Ok::<_, std::io::Error>(chunk.to_vec())).collect::<Vec<_>>(),
    );
    let request = server.client.post(format!("{}/v1/chat/completions", server.url));
    let unannounced = request.body(reqwest::Body::wrap_stream(chunks)).send().await.unwrap();
    assert_eq!(unannounced.status().as_u16(), 413);
    assert_eq!(server.chat(json!({})).await.0, 200);
}

#[tokio::test]
async fn a_client_that_asks_first_is_told_before_it_sends() {
    let server = Server::start(Form::Text, vec![]).await;
    let head = "POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: 104857600\r\nexpect: 100-continue\r\n\
                connection: close\r\n\r\n";
    let answer = raw(&server, head.as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 413 "), "{answer}");
}

#[tokio::test]
async fn headers_are_bounded() {
    let server = Server::start(Form::Text, vec![]).await;
    let many: String = (0..200).map(|n| format!("x-{n}: y\r\n")).collect();
    let answer = raw(&server, format!("GET /livez HTTP/1.1\r\nhost: localhost\r\n{many}\r\n").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 431 "), "{answer}");
    let long = "y".repeat(1 << 20);
    let answer =
        raw(&server, format!("GET /livez HTTP/1.1\r\nhost: localhost\r\nx-long: {long}\r\n\r\n").as_bytes()).await;
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 431 "), "{answer}");
    assert_eq!(server.get("/livez").await.0, 200);
}

#[tokio::test]
async fn every_answer_has_a_request_id() {
    let server = Server::start(Form::Text, vec![]).await;
    let url = format!("{}/livez", server.url);
    let own = server.client.get(&url).send().await.unwrap();
    assert!(own.headers()["x-request-id"].to_str().unwrap().starts_with("req_"));
    let given = server.client.get(&url).header("x-request-id", "mine-1").send().await.unwrap();
    assert_eq!(given.headers()["x-request-id"], "mine-1");
    let silly = server.client.get(&url).header("x-request-id", "x".repeat(500)).send().await.unwrap();
    assert!(silly.headers()["x-request-id"].to_str().unwrap().starts_with("req_"));
}

#[tokio::test]
async fn deep_nesting_is_an_error() {
    let server = Server::start(Form::Text, vec![]).await;
    let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
    let mut body = chat(json!({ "tools": ["DEEP"] })).to_string();
    body = body.replace("\"DEEP\"", &deep);
    let response = server.send("/v1/chat/completions", body).await;
    assert_eq!(response.status().as_u16(), 400);
}
