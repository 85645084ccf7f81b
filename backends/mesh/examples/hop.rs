//! What a hop to another machine costs: the same made-up engine is asked directly and through a connection on loopback.
//!
//! `cargo run --release -p mesh-backend-mesh --example hop`

use std::{
    net::SocketAddr,
    sync::Arc,
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use mesh_backend_mesh::{Home, Mesh, Options, Policy};
use mesh_core::{
    Capabilities, Delta, FinishReason, OutputForm, PromptForm, Usage,
    answer::{Finish, Finished, Part},
    ask::{Ask, Subject},
    node::{Elsewhere, Local, ModelOffer, PartStream, Question, Rejection, Reply},
};
use tokio::sync::watch;

const TOKENS: usize = 512;
const RUNS: usize = 200;

/// Writes a token every so often.
struct Paced {
    each: Duration,
    changes: watch::Sender<u64>,
}

#[async_trait]
impl Local for Paced {
    fn offers(&self) -> Vec<ModelOffer> {
        let capabilities = Capabilities {
            requests_parallel_max: 8,
            requests_queued_max: 8,
            prefix_reuse: true,
            ..Capabilities::new(PromptForm::Tokens, OutputForm::Tokens, 8192)
        };
        vec![ModelOffer { chat: true, ..ModelOffer::new("paced", "paced", capabilities) }]
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn answer(&self, _: &str, ask: Ask) -> Result<PartStream, Rejection> {
        let (each, tokens) = (self.each, ask.tokens_max.unwrap_or(1) as usize);
        let began = Instant::now();
        let parts = stream::iter(0..=tokens).then(move |at| async move {
            if !each.is_zero() && at > 0 {
                tokio::time::sleep_until((began + each * at as u32).into()).await;
            }
            Ok(if at < tokens {
                Part::Delta(Delta::Content(" token".into()))
            } else {
                Part::Finished(Finished {
                    finish: Finish::Engine(FinishReason::Length),
                    usage: Usage::default(),
                    timings: None,
                    stopped_by: None,
                    reasoning_tokens: 0,
                    malformed_calls: 0,
                    tokens: Vec::new(),
                    logprob_mean: None,
                })
            })
        });
        Ok(parts.boxed())
    }

    async fn reply(&self, _: &str, _: Question) -> Result<Reply, Rejection> {
        Err(Rejection::failed("not here"))
    }
}

/// The time to the first token and to the last.
async fn timed(parts: impl Future<Output = PartStream>, began: Instant) -> (Duration, Duration) {
    let mut parts = parts.await;
    let mut first = None;
    while let Some(part) = parts.next().await {
        part.expect("it is whole");
        first.get_or_insert_with(|| began.elapsed());
    }
    (first.unwrap_or_default(), began.elapsed())
}

fn median(mut all: Vec<Duration>) -> Duration {
    all.sort();
    all[all.len() / 2]
}

#[tokio::main]
async fn main() {
    let root = tempfile::tempdir().expect("a directory");
    let options = |name: &str| Options {
        home: Home::at(root.path().join(name)),
        name: name.into(),
        listen: SocketAddr::from(([127, 0, 0, 1], 0)),
        mdns: false,
        relays: Vec::new(),
        policy: Policy::default(),
    };
    options("server").home.create("bench").expect("a mesh");
    let server = Mesh::start(options("server"), None).await.expect("a node");
    let ticket = options("server").home.invite(server.address(), Duration::from_secs(600), true).expect("a ticket");
    let client = Mesh::start(options("client"), Some(&ticket)).await.expect("a node");
    let free = Arc::new(Paced { each: Duration::ZERO, changes: watch::Sender::new(0) });
    server.serve(free.clone());
    let engine = loop {
        match client.engine("paced") {
            Some((engine, _)) => break engine,
            None => tokio::time::sleep(Duration::from_millis(50)).await,
        }
    };
    let ask = |tokens: usize| {
        let prompt = "A prompt of some words, as they are. ".repeat(50);
        Ask { tokens_max: Some(tokens as u32), ..Ask::new("bench", Subject::Text(prompt)) }
    };
    let (mut direct, mut hop) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let began = Instant::now();
        direct.push(timed(async { free.answer("paced", ask(1)).await.expect("admitted") }, began).await.0);
        let began = Instant::now();
        hop.push(timed(async { engine.answer(ask(1)).await.expect("admitted") }, began).await.0);
    }
    let (direct, hop) = (median(direct), median(hop));
    println!("first token, median of {RUNS}: {direct:?} directly, {hop:?} through a hop: {:?} more", hop - direct);
    let began = Instant::now();
    let (_, all) = timed(async { engine.answer(ask(100_000)).await.expect("admitted") }, began).await;
    println!("as fast as it goes: {:.0} tokens/s, {:.1} µs a token", 1e5 / all.as_secs_f64(), all.as_secs_f64() * 10.0);
    for each in [Duration::from_millis(4), Duration::from_millis(1)] {
        let paced = Arc::new(Paced { each, changes: watch::Sender::new(0) });
        let (mut direct, mut hop) = (Vec::new(), Vec::new());
        // Its own pair of nodes: what a node serves is set once.
        let pair = (format!("server-{each:?}"), format!("client-{each:?}"));
        options(&pair.0).home.create("bench").expect("a mesh");
        let server = Mesh::start(options(&pair.0), None).await.expect("a node");
        let ticket = options(&pair.0).home.invite(server.address(), Duration::from_secs(600), true).expect("a ticket");
        let client = Mesh::start(options(&pair.1), Some(&ticket)).await.expect("a node");
        server.serve(paced.clone());
        let engine = loop {
            match client.engine("paced") {
                Some((engine, _)) => break engine,
                None => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        };
        for _ in 0..5 {
            let began = Instant::now();
            direct.push(timed(async { paced.answer("paced", ask(TOKENS)).await.expect("admitted") }, began).await.1);
            let began = Instant::now();
            hop.push(timed(async { engine.answer(ask(TOKENS)).await.expect("admitted") }, began).await.1);
        }
        let (direct, hop) = (median(direct).as_secs_f64(), median(hop).as_secs_f64());
        println!(
            "{TOKENS} tokens, one every {each:?}: {:.1} tokens/s directly, {:.1} through a hop: {:+.2} %",
            TOKENS as f64 / direct,
            TOKENS as f64 / hop,
            (direct / hop - 1.0) * 100.0
        );
        client.leave().await;
        server.leave().await;
    }
}
