//! What is around the routes, over real connections: who may ask, TLS, bounds, the end, counts and the log.

mod access;
mod bounds;
mod drain;
#[allow(dead_code)] // Most of it is for the tests of the routes.
#[path = "../server/fake.rs"]
mod fake;
mod log;
mod numbers;
mod tls;

use std::{sync::Arc, time::Duration};

use fake::{Fake, Form, Server, Step};
use mesh_core::FinishReason;
use mesh_dialects as _;
use mesh_llm::{
    guard::{Hosts, Keys, Origins, Policy},
    listen::Options,
    slots::{Keeping, Slots},
};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};

const STOP: Step = Step::Finish(FinishReason::Stop);
const KEY: &str = "0123456789abcdef";

/// A server with a scripted model, set up in its own way.
async fn start(script: Vec<Step>, options: Options) -> Server {
    let fake = Fake::new(Form::Text, script);
    let slots = slots(&fake);
    Server::serve_with(fake, slots, options).await
}

fn slots(fake: &Arc<Fake>) -> Slots {
    Slots::spawn(vec![fake.starter("fake", Form::Text).into()], Keeping::default())
}

/// A policy with a key, and pages of one other server.
fn guarded() -> Policy {
    Policy {
        keys: Keys::list(&format!("ci:{KEY}"), "LIST").unwrap(),
        hosts: Hosts::parse(&["box.lan".into()]).unwrap(),
        origins: Origins::parse(&["https://app.example".into()]).unwrap(),
        ..Policy::default()
    }
}

fn policy(policy: Policy) -> Options {
    Options { policy, ..Options::default() }
}

async fn connect(server: &Server) -> TcpStream {
    TcpStream::connect(server.url.split_once("//").unwrap().1).await.unwrap()
}

/// All that comes until the server closes the connection.
async fn rest(stream: &mut TcpStream) -> String {
    let mut answer = Vec::new();
    let read = tokio::time::timeout(Duration::from_secs(20), stream.read_to_end(&mut answer)).await;
    assert!(read.is_ok(), "the connection stays open after {}", String::from_utf8_lossy(&answer));
    String::from_utf8_lossy(&answer).into_owned()
}

async fn raw(server: &Server, text: &str) -> String {
    let mut stream = connect(server).await;
    stream.write_all(text.as_bytes()).await.unwrap();
    rest(&mut stream).await
}
