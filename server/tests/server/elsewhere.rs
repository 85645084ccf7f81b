//! What other machines serve, as clients of this one see it; and what this one does for others.

use std::sync::{Arc, atomic::Ordering::SeqCst};

use futures::StreamExt;
use mesh_core::{
    FinishReason, Prompt,
    answer::{Delta, Part},
    ask::{Ask, Chat, Subject},
    chat::Message,
    node::{Elsewhere, Local, PartStream, RejectionKind},
};
use mesh_llm::{
    defaults::Manner,
    slots::{Keeping, RemoteModels, SlotPlan, Slots},
};
use serde_json::{Value, json};

use crate::{
    fake::{Fake, Form, Server, Step, chat, eventually},
    fake_mesh::{FakeMesh, Peer},
};

const STOP: Step = Step::Finish(FinishReason::Stop);
const BIG: &str = "org/big-model";

fn says(text: &'static str) -> Vec<Step> {
    vec![Step::Prefill(7), Step::Text(text), STOP]
}

/// A server with a model of its own beside those of others. Nothing of it is loaded yet.
async fn beside(mesh: &Arc<FakeMesh>, own: &str) -> Server {
    let fake = Fake::new(Form::Text, says("from here"));
    let plan = SlotPlan { at_start: false, ..fake.starter(own, Form::Text).into() };
    let plan = SlotPlan { own_name: Some(format!("org/{own}-model")), ..plan };
    let remote = RemoteModels::new(vec![mesh.clone() as Arc<dyn Elsewhere>], Manner::default());
    let slots = Slots::spawn_beside(vec![plan], Keeping::default(), remote);
    Server::serve(fake, slots).await
}

async fn ask(server: &Server, model: &str) -> (u16, Value) {
    server.chat(json!({ "model": model })).await
}

fn content(answer: &Value) -> &str {
    answer["choices"][0]["message"]["content"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

fn message(answer: &Value) -> &str {
    answer["error"]["message"].as_str().unwrap_or_else(|| panic!("{answer}"))
}

#[tokio::test]
async fn a_request_goes_where_the_model_is_ready() {
    let (one, two) = (Peer::ready("big", says("from one")).await, Peer::ready("big", says("from two")).await);
    let mesh = FakeMesh::new(&[("one", &one), ("two", &two)]);
    let server = beside(&mesh, "own").await;
    let (status, answer) = server.chat(json!({ "model": BIG, "temperature": 0.25, "max_tokens": 9 })).await;
    assert_eq!((status, content(&answer), &answer["model"]), (200, "from one", &json!(BIG)));
    assert_eq!(answer["usage"]["prompt_tokens"], 7, "counted where it was computed");
    let job = one.fake.jobs.lock().unwrap()[0].clone();
    assert_eq!((job.sampling.temperature, job.tokens_max), (Some(0.25), Some(9)));
    let Prompt::Text { text, .. } = job.prompt else { panic!("a prompt of text") };
    assert_eq!(text, "<user>Hi<assistant>", "the template there writes it");

    let (status, answer) = ask(&server, "org/big-model@two").await;
    assert_eq!((status, content(&answer)), (200, "from two"));
    let events = server.chat_events(json!({ "model": "org/big-model@two" })).await;
    assert!(events.iter().any(|event| event.contains("from two")) && events.last().unwrap() == "[DONE]", "{events:?}");
    assert_eq!((one.jobs(), two.jobs()), (1, 2));
    assert_eq!(server.fake.loads.load(SeqCst), 0, "nothing is loaded for it here");

    for nowhere in ["org/big-model@three", "org/other-model", "org/other-model@one"] {
        let (status, answer) = ask(&server, nowhere).await;
        assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")), "{nowhere}");
        assert!(message(&answer).contains(BIG), "what there is instead: {answer}");
    }
}

#[tokio::test]
async fn a_model_that_is_here_too_is_asked_there_as_long_as_it_is_not_loaded() {
    let one = Peer::ready("big", says("from one")).await;
    let mesh = FakeMesh::new(&[("one", &one)]);
    let server = beside(&mesh, "big").await;
    assert_eq!(content(&ask(&server, BIG).await.1), "from one");
    // By another name of the model here.
    assert_eq!(content(&ask(&server, "big").await.1), "from one");
    server.slots.get("big").unwrap().model(None).await.unwrap();
    assert_eq!(content(&ask(&server, BIG).await.1), "from here");
    // Who names a machine means it.
    assert_eq!(content(&ask(&server, "org/big-model@one").await.1), "from one");
    assert_eq!((one.jobs(), server.fake.jobs.lock().unwrap().len()), (3, 1));
}

#[tokio::test]
async fn another_machine_is_asked_as_long_as_nothing_of_the_answer_came() {
    let broken = Peer::ready("big", vec![Step::Queued(1), Step::Prefill(7), Step::Fail]).await;
    let (busy, well) = (Peer::ready("big", says("busy")).await, Peer::ready("big", says("well")).await);
    busy.fake.busy.store(true, SeqCst);
    let mesh = FakeMesh::new(&[("a", &broken), ("b", &busy), ("c", &well)]);
    let server = beside(&mesh, "own").await;
    let (status, answer) = ask(&server, BIG).await;
    assert_eq!((status, content(&answer)), (200, "well"));
    assert_eq!((broken.jobs(), busy.jobs(), well.jobs()), (1, 0, 1));

    // None takes it: the last one's words, and when to try again.
    let busy = FakeMesh::new(&[("b", &busy)]);
    let server = beside(&busy, "own").await;
    let response = server.send("/v1/chat/completions", chat(json!({ "model": BIG })).to_string()).await;
    assert_eq!((response.status().as_u16(), response.headers()["retry-after"].to_str().unwrap()), (503, "2"));
    assert_eq!(response.json::<Value>().await.unwrap()["error"]["code"], "busy");
}

#[tokio::test]
async fn what_the_request_itself_is_refused_for_is_asked_nowhere_else() {
    let (one, two) = (Peer::ready("big", says("one")).await, Peer::ready("big", says("two")).await);
    let mesh = FakeMesh::new(&[("one", &one), ("two", &two)]);
    let server = beside(&mesh, "own").await;
    let messages = json!([{ "role": "user", "content": "a very long text" }]);
    let (status, answer) = server.chat(json!({ "model": BIG, "messages": messages })).await;
    assert_eq!((status, &answer["error"]["code"]), (400, &json!("context_length_exceeded")));
    let (status, answer) = server.chat(json!({ "model": BIG, "logit_bias": { "5": 1 } })).await;
    assert_eq!((status, &answer["error"]["param"]), (400, &json!("logit_bias")), "{answer}");
    let sent = mesh.status()["nodes"].as_array().unwrap().iter().map(|node| node["sent"].clone()).collect::<Vec<_>>();
    assert_eq!((one.jobs(), two.jobs(), sent), (0, 0, vec![json!(2), json!(0)]));
}

#[tokio::test]
async fn an_answer_that_breaks_off_ends_with_an_error_that_names_the_machine() {
    let (one, two) =
        (Peer::ready("big", vec![Step::Text("half"), Step::Fail]).await, Peer::ready("big", says("two")).await);
    let mesh = FakeMesh::new(&[("one", &one), ("two", &two)]);
    let server = beside(&mesh, "own").await;
    let events = server.chat_events(json!({ "model": BIG })).await;
    assert!(events.iter().any(|event| event.contains("half")), "{events:?}");
    let end: Vec<Value> = events.iter().filter_map(|event| serde_json::from_str(event).ok()).collect();
    assert!(message(end.last().unwrap()).contains("node one did not finish the answer"), "{events:?}");
    assert_eq!(two.jobs(), 0, "nothing is computed twice");

    let one = Peer::ready("big", vec![Step::Text("half"), Step::Fail]).await;
    let server = beside(&FakeMesh::new(&[("one", &one)]), "own").await;
    let (status, answer) = ask(&server, BIG).await;
    assert_eq!((status, &answer["error"]["code"]), (500, &json!("engine_failed")));
    assert!(message(&answer).contains("node one did not finish the answer"), "{answer}");
}

#[tokio::test]
async fn a_client_that_leaves_stops_its_answer_there() {
    let one = Peer::ready("big", vec![Step::Text("a"), Step::Hang]).await;
    let server = beside(&FakeMesh::new(&[("one", &one)]), "own").await;
    let body = chat(json!({ "model": BIG, "stream": true })).to_string();
    let response = server.send("/v1/chat/completions", body).await;
    let mut bytes = response.bytes_stream();
    bytes.next().await.unwrap().unwrap();
    assert_eq!(one.fake.dropped.load(SeqCst), 0);
    drop(bytes);
    eventually("the engine there is left", || one.fake.dropped.load(SeqCst) == 1).await;
    let usage = one.slots.get(BIG).unwrap().state();
    let mesh_llm::slots::SlotState::Ready(model) = usage else { panic!("{usage:?}") };
    eventually("its place is free", || model.usage().requests == 0).await;
}

fn request() -> Ask {
    let message = Message { role: "user".into(), content: Some("Hi".into()), ..Message::default() };
    Ask::new("test", Subject::Chat(Chat { messages: vec![message], ..Chat::default() }))
}

async fn text(mut parts: PartStream) -> String {
    let mut text = String::new();
    while let Some(part) = parts.next().await {
        if let Part::Delta(Delta::Content(piece)) = part.unwrap() {
            text += &piece;
        }
    }
    text
}

#[tokio::test]
async fn what_came_from_elsewhere_is_passed_on_to_nobody() {
    let far = Peer::ready("far", says("far")).await;
    let beyond: Arc<dyn Elsewhere> = FakeMesh::new(&[("far", &far)]);
    let fake = Fake::new(Form::Text, says("near"));
    let plan = fake.starter("near", Form::Text).into();
    let near = Peer::with(fake, vec![plan], vec![beyond]).await;
    let offers: Vec<String> = near.hosting.offers().into_iter().map(|offer| offer.name).collect();
    assert_eq!(offers, ["org/near-model"], "what others have is theirs to offer");
    for name in ["org/far-model", "org/far-model@far"] {
        let rejection = near.hosting.answer(name, request()).await.err().unwrap();
        assert_eq!((rejection.kind, rejection.code.as_str()), (RejectionKind::NotFound, "model_not_found"));
    }
    let parts = near.hosting.answer("org/near-model", request()).await.unwrap();
    assert_eq!((text(parts).await.as_str(), far.jobs()), ("near", 0));
    // Its own clients it serves with all there is.
    let server = Server::serve(near.fake.clone(), near.slots.clone()).await;
    assert_eq!(content(&ask(&server, "org/far-model").await.1), "far");
}

#[tokio::test]
async fn what_a_sharing_server_sends_is_answered_here_or_not_at_all() {
    let far = Peer::ready("far", says("far")).await;
    let mesh = FakeMesh::new(&[("far", &far)]);
    let server = beside(&mesh, "far").await;
    let sent = async |model: &str, via: &str| {
        let url = format!("{}/v1/chat/completions", server.url);
        let request = server.client.post(url).header("via", via).json(&chat(json!({ "model": model })));
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json::<Value>().await.unwrap())
    };
    assert_eq!(content(&sent("far", "1.1 proxy").await.1), "far", "not loaded here");
    assert_eq!(sent("org/far-model@far", "1.1 mesh-llm").await.0, 404);
    assert_eq!(content(&sent("far", "1.1 mesh-llm").await.1), "from here");
    assert_eq!(far.jobs(), 1);
}

#[tokio::test]
async fn each_model_is_listed_once_with_the_machines_that_have_it() {
    let (one, two) = (Peer::ready("big", says("one")).await, Peer::ready("big", says("two")).await);
    let three = Peer::ready("own", says("three")).await;
    let mesh = FakeMesh::new(&[("one", &one), ("two", &two), ("three", &three)]);
    let server = beside(&mesh, "own").await;
    let listed = async || {
        let (_, list) = server.get("/v1/models").await;
        let short = |model: &Value| {
            let nodes = model["nodes"].as_array().cloned().unwrap_or_default();
            let nodes: Vec<_> = nodes.iter().map(|node| node["name"].as_str().unwrap().to_owned()).collect();
            (model["id"].as_str().unwrap().to_owned(), model["status"].as_str().unwrap().to_owned(), nodes.join(" "))
        };
        list["data"].as_array().unwrap().iter().map(short).collect::<Vec<_>>()
    };
    let row = |id: &str, status: &str, nodes: &str| (id.to_owned(), status.to_owned(), nodes.to_owned());
    assert_eq!(listed().await, [row("org/own-model", "cold", "three"), row(BIG, "ready", "one two")]);

    let (status, found) = server.get("/v1/models/org/big-model").await;
    assert_eq!((status, &found["id"], &found["backend"]), (200, &json!(BIG), &json!("mesh")));
    assert_eq!((&found["context_length"], &found["family"]), (&json!(4096), &json!("fake")));
    assert_eq!((&found["capabilities"]["chat"], &found["capabilities"]["tools"]), (&json!(true), &json!(true)));
    let parameters = found["capabilities"]["parameters"].as_array().unwrap();
    assert!(parameters.contains(&json!("temperature")) && !parameters.contains(&json!("logprobs")), "{found}");
    let node =
        json!({ "name": "one", "backend": "fake", "context_length": 4096, "running": 0, "waiting": 0, "parallel": 2 });
    assert_eq!(found["nodes"][0], node);
    let (_, one_of_them) = server.get("/v1/models/org%2Fbig-model@two").await;
    assert_eq!((&one_of_them["nodes"][0]["name"], one_of_them["nodes"].as_array().unwrap().len()), (&json!("two"), 1));
    assert_eq!(server.get("/v1/models/org/big-model@nobody").await.0, 404);

    mesh.lose("one");
    mesh.lose("three");
    assert_eq!(listed().await, [row("org/own-model", "cold", ""), row(BIG, "ready", "two")]);
    mesh.forget("two");
    assert_eq!(listed().await, [row("org/own-model", "cold", "")]);
    assert_eq!(ask(&server, BIG).await.0, 404);
}

#[tokio::test]
async fn where_requests_go_and_who_is_there_is_told() {
    let one = Peer::ready("big", says("one")).await;
    let mesh = FakeMesh::new(&[("one", &one)]);
    let server = beside(&mesh, "big").await;
    let way = |elsewhere: bool, why: &str, machines: &[&str]| {
        (200, json!({ "elsewhere": elsewhere, "why": why, "machines": machines }))
    };
    let path = "/v1/mesh/routes/org/big-model";
    assert_eq!(server.get(path).await, way(true, "ready there", &["one"]));
    assert_eq!(server.get("/v1/mesh/routes/org%2Fbig-model@one").await, way(true, "ready there", &["one"]));
    server.slots.get("big").unwrap().model(None).await.unwrap();
    assert_eq!(server.get(path).await, way(false, "ready here", &["one"]));
    let (status, answer) = server.get("/v1/mesh/routes/none").await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("model_not_found")));

    let (status, told) = server.get("/v1/mesh").await;
    let source = &told["sources"][0];
    assert_eq!((status, &source["kind"], &source["status"]), (200, &json!("mesh"), &mesh.status()));
    let offers: Vec<_> =
        source["offers"].as_array().unwrap().iter().map(|one| (&one["node"], &one["offer"]["name"])).collect();
    assert_eq!(offers, [(&json!("one"), &json!(BIG))]);
    assert_eq!(told["sources"][0]["status"]["nodes"][0]["offers"], json!([{ "name": BIG }]));
    mesh.forget("one");
    assert_eq!(server.get(path).await, way(false, "ready here", &[]));
    let alone = Server::start(Form::Text, vec![]).await;
    assert_eq!(alone.get("/v1/mesh").await, (200, json!({ "sources": [] })));
    let cold = "not loaded here, and nobody else has it ready";
    assert_eq!(alone.get("/v1/mesh/routes/fake").await, way(false, cold, &[]));
}

#[tokio::test]
async fn what_passes_between_machines_is_counted() {
    let broken = Peer::ready("big", vec![Step::Text("half"), Step::Fail]).await;
    let well = Peer::ready("big", says("well")).await;
    let mesh = FakeMesh::new(&[("one", &broken), ("two \"2\"", &well)]);
    let server = beside(&mesh, "own").await;
    let scrape = async || {
        let response = server.client.get(format!("{}/metrics", server.url)).send().await.unwrap();
        let text = response.text().await.unwrap();
        let lines = text.lines().filter_map(|line| line.strip_prefix("mesh_llm_mesh_"));
        lines.map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(ask(&server, BIG).await.0, 500);
    // The engine there is over, and its model not offered any more.
    eventually("it is noticed", || broken.hosting.offers().is_empty()).await;
    for _ in 0..3 {
        assert_eq!(ask(&server, BIG).await.0, 200);
    }
    mesh.count("one", |count| count.served = 5);
    mesh.count("two \"2\"", |count| count.failed_over = 2);
    mesh.lose("one");
    let two = r#"{node="two \"2\""}"#;
    let mut expected = vec![
        r#"node_up{node="one"} 0"#.to_owned(),
        format!("node_up{two} 1"),
        format!("round_trip_seconds{two} 0.0015"),
    ];
    for (name, one, other) in [
        ("requests_sent_total", 1, 3),
        ("requests_failed_total", 1, 0),
        ("requests_failed_over_total", 0, 2),
        ("requests_served_total", 5, 0),
    ] {
        expected.extend([format!("{name}{{node=\"one\"}} {one}"), format!("{name}{two} {other}")]);
    }
    assert_eq!(scrape().await, expected);
    // Under a name of its own: what is counted of a model here says how busy this machine is.
    let text = server.client.get(format!("{}/metrics", server.url)).send().await.unwrap().text().await.unwrap();
    let answers = r#"mesh_llm_answers_total{model="org/big-model@mesh",reason="stop"} 3"#;
    assert!(text.lines().any(|line| line == answers), "{text}");
    mesh.forget("one");
    mesh.forget("two \"2\"");
    assert_eq!(scrape().await, Vec::<String>::new());
}

#[tokio::test]
async fn nothing_that_is_offered_tells_of_directories() {
    let fake = Fake::new(Form::Text, says("here"));
    let plan = |reference: &str, name: Option<&str>| {
        let starter = mesh_llm::slots::Starter { reference: reference.into(), ..fake.starter("same", Form::Text) };
        SlotPlan { name: name.map(str::to_owned), ..starter.into() }
    };
    // All of them have the same own name, which goes to the first.
    let plans = vec![
        plan("/home/ann/models/first", None),
        plan("../ann/second", None),
        plan("~/ann/third.gguf", None),
        plan("org/fourth:Q4_K_M", Some("named")),
    ];
    let peer = Peer::with(fake.clone(), plans, Vec::new()).await;
    let told = |offer: mesh_core::node::ModelOffer| (offer.name, offer.reference.unwrap());
    let told: Vec<_> = peer.hosting.offers().into_iter().map(told).collect();
    let row = |name: &str, reference: &str| (name.to_owned(), reference.to_owned());
    let expected = [
        row("named", "org/fourth:Q4_K_M"),
        row("org/same-model", "first"),
        row("second", "second"),
        row("third.gguf", "third.gguf"),
    ];
    assert_eq!(told, expected);
    // What is offered is there.
    for (name, _) in expected {
        assert_eq!(text(peer.hosting.answer(&name, request()).await.unwrap()).await, "here", "{name}");
    }
    let offers = serde_json::to_string(&peer.hosting.offers()).unwrap();
    assert!(!offers.contains("ann") && !offers.contains("home"), "{offers}");
}
