//! Nodes of one process over real connections: they join, hear of one another, serve for one another, and leave.

mod loss;

use std::{
    collections::BTreeSet,
    net::SocketAddr,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use async_trait::async_trait;
use futures::{StreamExt, stream};
use mesh_backend_mesh::{Home, Mesh, MeshError, Options, Policy, Ticket};
use mesh_core::{
    Capabilities, Delta, EngineError, FinishReason, Knob, OutputForm, PromptForm, Usage,
    answer::{Finish, Finished, Part},
    ask::{Ask, Chat, Subject},
    chat::Message,
    node::{Elsewhere, Load, Local, ModelOffer, PartStream, Question, Rejection, RejectionKind, Reply},
};
use tokio::{sync::watch, time::timeout};

const SOON: Duration = Duration::from_secs(10);

/// A server that answers with its own name, word by word, as slowly as it is told.
struct Fake {
    name: &'static str,
    models: Mutex<BTreeSet<String>>,
    changes: watch::Sender<u64>,
    running: Arc<AtomicUsize>,
    answered: AtomicUsize,
    pause: Duration,
    /// Ends an answer after so many words.
    breaks_after: Option<usize>,
}

impl Fake {
    fn new(name: &'static str, models: &[&str]) -> Self {
        Self {
            name,
            models: Mutex::new(models.iter().map(|model| (*model).to_owned()).collect()),
            changes: watch::Sender::new(0),
            running: Arc::default(),
            answered: AtomicUsize::new(0),
            pause: Duration::ZERO,
            breaks_after: None,
        }
    }

    fn set(&self, models: &[&str]) {
        *self.models.lock().unwrap() = models.iter().map(|model| (*model).to_owned()).collect();
        self.changes.send_modify(|count| *count += 1);
    }
}

struct Place(Arc<AtomicUsize>);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl Local for Fake {
    fn offers(&self) -> Vec<ModelOffer> {
        let capabilities = Capabilities {
            knobs: [Knob::Temperature].into(),
            requests_parallel_max: 4,
            requests_queued_max: 16,
            prefix_reuse: true,
            ..Capabilities::new(PromptForm::Tokens, OutputForm::Tokens, 4096)
        };
        let load = Load { running: self.running.load(Ordering::SeqCst) as u32, ..Load::default() };
        let offer =
            |name: &String| ModelOffer { chat: true, load, ..ModelOffer::new(name, "fake", capabilities.clone()) };
        self.models.lock().unwrap().iter().map(offer).collect()
    }

    fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    async fn answer(&self, model: &str, ask: Ask) -> Result<PartStream, Rejection> {
        if !self.models.lock().unwrap().contains(model) {
            return Err(Rejection::new(RejectionKind::NotFound, "model_not_found", "not here"));
        }
        if ask.logprobs.is_some() {
            let refused = Rejection::new(RejectionKind::Invalid, "unsupported_parameter", "no logprobs here");
            return Err(Rejection { param: Some("logprobs".into()), ..refused });
        }
        self.running.fetch_add(1, Ordering::SeqCst);
        self.answered.fetch_add(1, Ordering::SeqCst);
        let place = Place(self.running.clone());
        let (name, pause, breaks) = (self.name, self.pause, self.breaks_after);
        let words = ask.tokens_max.unwrap_or(3) as usize;
        let parts = stream::unfold((0, place), move |(at, place)| async move {
            tokio::time::sleep(pause).await;
            let part = match at {
                _ if breaks == Some(at) => Err(EngineError::Failed { what: "it broke".into() }),
                at if at < words => Ok(Part::Delta(Delta::Content(format!("{name}{at} ")))),
                at if at == words => Ok(Part::Finished(Finished {
                    finish: Finish::Engine(FinishReason::Stop),
                    usage: Usage { prompt_tokens: 1, cached_tokens: 0, completion_tokens: words as u32 },
                    timings: None,
                    stopped_by: None,
                    reasoning_tokens: 0,
                    malformed_calls: 0,
                    tokens: Vec::new(),
                    logprob_mean: Some(f32::NEG_INFINITY),
                })),
                _ => return None,
            };
            let next = if part.is_err() { usize::MAX } else { at + 1 };
            Some((part, (next, place)))
        });
        Ok(parts.boxed())
    }

    async fn reply(&self, _: &str, question: Question) -> Result<Reply, Rejection> {
        match question {
            Question::Detokenize { ids } => Ok(Reply::Text(format!("{}{ids:?}", self.name))),
            _ => Err(Rejection::new(RejectionKind::Invalid, "unsupported", "not here")),
        }
    }
}

/// A node with a home of its own.
struct Machine {
    root: tempfile::TempDir,
    name: &'static str,
}

impl Machine {
    fn new(name: &'static str) -> Self {
        Self { root: tempfile::tempdir().unwrap(), name }
    }

    fn home(&self) -> Home {
        Home::at(self.root.path().join("mesh"))
    }

    fn options(&self) -> Options {
        Options {
            home: self.home(),
            name: self.name.into(),
            listen: SocketAddr::from(([127, 0, 0, 1], 0)),
            mdns: false,
            relays: Vec::new(),
            policy: Policy::default(),
        }
    }

    async fn start(&self, ticket: Option<&Ticket>, fake: Option<&Arc<Fake>>) -> Arc<Mesh> {
        let mesh = Mesh::start(self.options(), ticket).await.unwrap();
        if let Some(fake) = fake {
            mesh.serve(fake.clone());
        }
        mesh
    }

    fn ticket(&self, mesh: &Mesh, once: bool) -> Ticket {
        self.home().invite(mesh.address(), Duration::from_secs(600), once).unwrap()
    }
}

fn ask(text: &str) -> Ask {
    let message = Message { role: "user".into(), content: Some(text.into()), ..Message::default() };
    Ask::new("test", Subject::Chat(Chat { messages: vec![message], ..Chat::default() }))
}

async fn eventually(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + SOON;
    while !done() {
        assert!(Instant::now() < deadline, "not within {SOON:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn names(mesh: &Mesh) -> Vec<String> {
    mesh.models().into_iter().map(|model| model.name).collect()
}

/// Whether there is a connection to each node that is known.
fn connected(mesh: &Mesh) -> bool {
    mesh.status()["nodes"].as_array().unwrap().iter().all(|node| node["connected"] == true)
}

async fn answer(mesh: &Mesh, model: &str, ask: Ask) -> Result<(String, Finished), String> {
    let (engine, _) = mesh.engine(model).ok_or("nobody offers it")?;
    let mut parts = engine.answer(ask).await.map_err(|rejection| rejection.message)?;
    let mut text = String::new();
    while let Some(part) = parts.next().await {
        match part.map_err(|error| error.to_string())? {
            Part::Delta(Delta::Content(piece)) => text += &piece,
            Part::Finished(finished) => return Ok((text, finished)),
            _ => {}
        }
    }
    Err("it ended before it was whole".into())
}

#[tokio::test(flavor = "multi_thread")]
async fn two_machines_serve_for_one_another() {
    let (one, two) = (Machine::new("one"), Machine::new("two"));
    one.home().create("home").unwrap();
    let (a, b) = (Arc::new(Fake::new("a", &["alpha"])), Arc::new(Fake::new("b", &["beta"])));
    let first = one.start(None, Some(&a)).await;
    let second = two.start(Some(&one.ticket(&first, true)), Some(&b)).await;
    assert_eq!(second.name(), "home");
    eventually("each hears of the other's model", || names(&first) == ["beta"] && names(&second) == ["alpha"]).await;
    let (text, finished) = answer(&second, "alpha", ask("x")).await.unwrap();
    assert_eq!((text.as_str(), finished.usage.completion_tokens), ("a0 a1 a2 ", 3));
    assert_eq!(finished.logprob_mean, Some(f32::NEG_INFINITY), "numbers come as they are");
    assert_eq!(answer(&first, "beta@two", ask("x")).await.unwrap().0, "b0 b1 b2 ");
    assert!(first.engine("beta@one").is_none() && first.engine("gamma").is_none());
    let (engine, offer) = first.engine("beta").unwrap();
    assert_eq!((offer.node.as_str(), engine.capabilities().prompt), ("two", PromptForm::Chat));
    assert_eq!(engine.reply(Question::Detokenize { ids: vec![7] }).await, Ok(Reply::Text("b[7]".into())));
    let refused = engine.answer(Ask { logprobs: Some(1), ..ask("x") }).await.err().unwrap();
    assert_eq!((refused.code.as_str(), refused.param.as_deref()), ("unsupported_parameter", Some("logprobs")));
    // What was turned down does not count as answered.
    answer(&first, "beta", ask("x")).await.unwrap();
    eventually("counted", || second.status()["nodes"][0]["served"] == 3).await;
    assert_eq!(first.status()["nodes"][0]["sent"], 4);
    let status = first.status().to_string();
    assert!(status.contains("two") && !status.contains("127.0.0.1"), "{status}");

    // What is not ready any more is gone at once, and what becomes ready is there.
    b.set(&[]);
    eventually("withdrawn", || names(&first).is_empty()).await;
    b.set(&["beta", "delta"]);
    eventually("offered again", || names(&first) == ["beta", "delta"]).await;
    second.leave().await;
    eventually("gone", || names(&first).is_empty()).await;
    // It is a member still, without a ticket.
    let again = two.start(None, Some(&b)).await;
    eventually("back", || names(&first) == ["beta", "delta"] && names(&again) == ["alpha"]).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_leaves_stops_the_answer_on_the_other_machine() {
    let (one, two) = (Machine::new("one"), Machine::new("two"));
    one.home().create("home").unwrap();
    let slow = Arc::new(Fake { pause: Duration::from_millis(20), ..Fake::new("a", &["alpha"]) });
    let first = one.start(None, Some(&slow)).await;
    let second = two.start(Some(&one.ticket(&first, true)), None).await;
    eventually("heard", || names(&second) == ["alpha"]).await;
    let (engine, _) = second.engine("alpha").unwrap();
    let mut parts = engine.answer(Ask { tokens_max: Some(100_000), ..ask("x") }).await.unwrap();
    parts.next().await.unwrap().unwrap();
    assert_eq!(slow.running.load(Ordering::SeqCst), 1);
    drop(parts);
    eventually("stopped", || slow.running.load(Ordering::SeqCst) == 0).await;
    // And before it has said anything.
    let silent = Arc::new(Fake { pause: Duration::from_secs(600), ..Fake::new("c", &["gamma"]) });
    let third = Machine::new("three");
    let _third = third.start(Some(&one.ticket(&first, true)), Some(&silent)).await;
    eventually("heard", || names(&second).contains(&"gamma".to_owned()) && connected(&second)).await;
    let (engine, _) = second.engine("gamma").unwrap();
    let mut parts = engine.answer(ask("x")).await.unwrap();
    assert!(timeout(Duration::from_millis(100), parts.next()).await.is_err());
    assert_eq!(silent.running.load(Ordering::SeqCst), 1);
    drop(parts);
    eventually("stopped", || silent.running.load(Ordering::SeqCst) == 0).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn another_machine_is_asked_before_the_first_token_and_none_after() {
    let machines = [Machine::new("one"), Machine::new("two"), Machine::new("three")];
    machines[0].home().create("home").unwrap();
    let client = machines[0].start(None, None).await;
    let broken = Arc::new(Fake { breaks_after: Some(0), ..Fake::new("a", &["m"]) });
    let late = Arc::new(Fake { breaks_after: Some(2), ..Fake::new("c", &["late"]) });
    let sound = Arc::new(Fake::new("b", &["m"]));
    late.set(&["late"]);
    let _two = machines[1].start(Some(&machines[0].ticket(&client, true)), Some(&broken)).await;
    let _three = machines[2].start(Some(&machines[0].ticket(&client, true)), Some(&sound)).await;
    let four = Machine::new("four");
    let _four = four.start(Some(&machines[0].ticket(&client, true)), Some(&late)).await;
    let heard = || client.models().iter().map(|model| model.nodes.len()).sum::<usize>() == 3;
    eventually("heard", || heard() && connected(&client)).await;
    for at in 0..8 {
        let (text, _) = answer(&client, "m", ask(&format!("question {at}"))).await.unwrap();
        assert_eq!(text, "b0 b1 b2 ", "the other one breaks before it says anything");
    }
    let error = answer(&client, "late", ask("x")).await.unwrap_err();
    assert!(error.contains("node four") && error.contains("it broke"), "{error}");
    let error = answer(&client, "m@two", ask("x")).await.unwrap_err();
    assert!(error.contains("node two"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn who_has_no_good_ticket_is_not_let_in_and_hears_nothing() {
    let (one, two, three) = (Machine::new("one"), Machine::new("two"), Machine::new("three"));
    one.home().create("home").unwrap();
    let fake = Arc::new(Fake::new("a", &["alpha"]));
    let first = one.start(None, Some(&fake)).await;
    let good = one.ticket(&first, true);
    let wrong = Ticket { secret: [9; 16], ..good.clone() };
    assert!(matches!(Mesh::start(two.options(), Some(&wrong)).await, Err(MeshError::Denied(_))));
    let old = Ticket { expires_s: 1, ..good.clone() };
    assert!(matches!(Mesh::start(two.options(), Some(&old)).await, Err(MeshError::Expired)));
    let second = two.start(Some(&good), None).await;
    assert!(matches!(Mesh::start(three.options(), Some(&good)).await, Err(MeshError::Denied(_))), "it was for one");
    eventually("heard", || names(&second) == ["alpha"]).await;
    // Another mesh at the same place: its members do not know this one's secret.
    three.home().create("other").unwrap();
    three.home().remember_peers(&[first.address()]).unwrap();
    let stranger = three.start(None, None).await;
    // Revoked: it is let go at once, and does not come back.
    let id = two.home().node_key().unwrap().public();
    one.home().revoke(id).unwrap();
    eventually("let go", || names(&second).is_empty()).await;
    second.leave().await;
    let second = two.start(None, None).await;
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert!(names(&second).is_empty() && names(&stranger).is_empty());
    assert!(first.status()["nodes"].as_array().unwrap().is_empty(), "{}", first.status());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_conversation_stays_where_its_beginning_is_known() {
    let machines = [Machine::new("one"), Machine::new("two"), Machine::new("three")];
    machines[0].home().create("home").unwrap();
    let client = machines[0].start(None, None).await;
    let fakes = [Arc::new(Fake::new("a", &["m"])), Arc::new(Fake::new("b", &["m"]))];
    let one = machines[1].start(Some(&machines[0].ticket(&client, true)), Some(&fakes[0])).await;
    let two = machines[2].start(Some(&machines[0].ticket(&client, true)), Some(&fakes[1])).await;
    eventually("heard", || client.models().iter().map(|model| model.nodes.len()).sum::<usize>() == 2).await;
    let message =
        |role: &str, text: &str| Message { role: role.into(), content: Some(text.into()), ..Message::default() };
    let mut messages = vec![message("system", &"Answer with care. ".repeat(200))];
    let mut servers = Vec::new();
    for turn in 0..10 {
        messages.push(message("user", &format!("turn {turn}")));
        let subject = Subject::Chat(Chat { messages: messages.clone(), ..Chat::default() });
        let (text, _) = answer(&client, "m", Ask::new("t", subject)).await.unwrap();
        servers.push(text.chars().next().unwrap());
        messages.push(message("assistant", &text));
    }
    assert_eq!(servers.iter().collect::<BTreeSet<_>>().len(), 1, "{servers:?}");
    // It moves when that node is gone.
    let (gone, other) = if servers[0] == 'a' { (one, 'b') } else { (two, 'a') };
    gone.leave().await;
    let subject = Subject::Chat(Chat { messages, ..Chat::default() });
    let (text, _) = answer(&client, "m", Ask::new("t", subject)).await.unwrap();
    assert!(text.starts_with(other), "{text}");
}
