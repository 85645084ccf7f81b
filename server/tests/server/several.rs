//! Several models, and memory for some of them.

use std::{
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use futures::{StreamExt, future};
use mesh_core::FinishReason;
use mesh_llm::{
    lease::Lease,
    pipeline::{self, AnswerStream, Ask, Subject},
    slots::{Keeping, ROOM_WAIT_MAX, SlotError, SlotPlan, SlotState, Slots},
};
use serde_json::{Value, json};

use crate::fake::{Fake, Form, Server, Step, chat, eventually};

const STOP: Step = Step::Finish(FinishReason::Stop);

/// A model of a test.
struct Model {
    fake: Arc<Fake>,
    plan: SlotPlan,
}

/// A model that needs so many bytes.
fn model(name: &str, bytes: u64, script: Vec<Step>) -> Model {
    let fake = Fake::new(Form::Text, script);
    fake.memory_bytes.store(bytes, SeqCst);
    let plan = SlotPlan { at_start: name == "a", ..fake.starter(name, Form::Text).into() };
    Model { fake, plan }
}

fn quick(name: &str, bytes: u64) -> Model {
    model(name, bytes, vec![Step::Text("hi"), STOP])
}

fn pinned(model: Model) -> Model {
    Model { plan: SlotPlan { pinned: true, ..model.plan }, ..model }
}

fn slots<const N: usize>(memory_bytes: u64, models: [Model; N]) -> (Slots, [Arc<Fake>; N]) {
    kept(Keeping { memory_bytes: Some(memory_bytes), idle_ttl: None }, models)
}

fn kept<const N: usize>(keeping: Keeping, models: [Model; N]) -> (Slots, [Arc<Fake>; N]) {
    let fakes = models.each_ref().map(|model| model.fake.clone());
    (Slots::spawn(models.into_iter().map(|model| model.plan).collect(), keeping), fakes)
}

async fn server<const N: usize>(memory_bytes: u64, models: [Model; N]) -> (Server, [Arc<Fake>; N]) {
    let (slots, fakes) = slots(memory_bytes, models);
    (Server::serve(fakes[0].clone(), slots).await, fakes)
}

async fn ask(server: &Server, model: &str) -> u16 {
    server.chat(json!({ "model": model })).await.0
}

async fn lease(slots: &Slots, name: &str) -> Result<Lease, SlotError> {
    slots.get(name).unwrap().model(None).await
}

async fn open(slots: &Slots, name: &str) -> AnswerStream {
    let ask = Ask::new("test", Subject::Text("Hi".into()));
    pipeline::open(lease(slots, name).await.unwrap(), ask).await.unwrap()
}

fn word(slots: &Slots, name: &str) -> &'static str {
    slots.get(name).unwrap().state().word()
}

fn reserved(slots: &Slots) -> u64 {
    slots.memory().iter().map(|pool| pool.reserved_bytes).sum()
}

/// Lets every task do what it can, where time stands still.
async fn settle() {
    for _ in 0..100 {
        tokio::task::yield_now().await;
    }
    tokio::time::sleep(Duration::from_millis(1)).await;
}

#[tokio::test]
async fn models_take_turns_where_there_is_room_for_one() {
    let (server, [a, b]) = server(100, [quick("a", 60), quick("b", 60)]).await;
    assert_eq!(server.get("/readyz").await.0, 503, "the first is to be loaded at the start");
    for turn in 1..4 {
        assert_eq!(ask(&server, "a").await, 200);
        assert_eq!((word(&server.slots, "a"), word(&server.slots, "b")), ("ready", "cold"));
        assert_eq!(ask(&server, "b").await, 200);
        assert_eq!((word(&server.slots, "a"), word(&server.slots, "b")), ("cold", "ready"));
        assert_eq!((a.loads.load(SeqCst), a.drains.load(SeqCst)), (turn, turn));
        assert_eq!(reserved(&server.slots), 60);
    }
    assert_eq!(b.drains.load(SeqCst), 2);
    assert_eq!(server.get("/readyz").await.0, 200, "what made room will be back when it is asked for");
}

#[tokio::test]
async fn models_that_fit_stay_and_the_least_recently_used_goes() {
    let (server, [a, b, c]) = server(100, [quick("a", 40), quick("b", 40), quick("c", 40)]).await;
    for name in ["a", "b", "a", "c"] {
        assert_eq!(ask(&server, name).await, 200);
    }
    assert_eq!([&a, &b, &c].map(|fake| fake.loads.load(SeqCst)), [1, 1, 1]);
    assert_eq!(["a", "b", "c"].map(|name| word(&server.slots, name)), ["ready", "cold", "ready"]);
}

#[tokio::test]
async fn states_and_bytes_are_shown_without_waiting() {
    let (server, [_, b]) = server(100, [pinned(quick("a", 30)), quick("b", 60)]).await;
    b.hold_loads.store(true, SeqCst);
    assert_eq!(ask(&server, "a").await, 200);
    let watching = async {
        eventually("b loads", || b.loads.load(SeqCst) == 1).await;
        let (_, mut health) = server.get("/health").await;
        health["models"][0]["unused_s"] = 0.into();
        insta::assert_json_snapshot!(health);
        let (_, models) = server.get("/v1/models").await;
        let shown = |at: usize| {
            let model = &models["data"][at];
            json!([model["id"], model["status"], model["pinned"], model["reserved_bytes"]])
        };
        assert_eq!(shown(0), json!(["org/a-model", "ready", true, 30]));
        assert_eq!(shown(1), json!(["org/b-model", "loading", false, 60]));
        assert_eq!(server.get("/readyz").await.0, 200, "nobody asked for b to be loaded at the start");
        b.go_on.notify_one();
    };
    let (status, ()) = futures::join!(ask(&server, "b"), watching);
    assert_eq!(status, 200);
}

#[tokio::test]
async fn requests_for_a_model_that_made_room_join_one_load() {
    let (server, [a, _]) = server(100, [quick("a", 60), quick("b", 60)]).await;
    assert_eq!(ask(&server, "a").await, 200);
    assert_eq!(ask(&server, "b").await, 200);
    let statuses = future::join_all((0..20).map(|_| ask(&server, "a"))).await;
    assert_eq!(statuses, [200; 20]);
    assert_eq!(a.loads.load(SeqCst), 2);
}

#[tokio::test]
async fn a_pinned_model_stays_and_what_never_fits_is_told_why() {
    let models = [pinned(quick("a", 60 << 20)), quick("b", 60 << 20), quick("c", 30 << 20)];
    let (server, [a, b, _]) = server(100 << 20, models).await;
    assert_eq!(ask(&server, "a").await, 200);
    let (status, answer) = server.chat(json!({ "model": "b" })).await;
    assert_eq!(status, 503);
    insta::assert_json_snapshot!(answer);
    assert_eq!(ask(&server, "c").await, 200);
    assert_eq!((word(&server.slots, "a"), a.drains.load(SeqCst), b.loads.load(SeqCst)), ("ready", 0, 0));
}

#[tokio::test]
async fn a_busy_model_answers_before_it_makes_room() {
    let script = vec![Step::Text("half "), Step::Wait, Step::Text("and half"), STOP];
    let (server, [a, b]) = server(100, [model("a", 60, script), quick("b", 60)]).await;
    let body = chat(json!({ "model": "a", "stream": true })).to_string();
    let mut running = server.send("/v1/chat/completions", body).await.bytes_stream();
    let first = running.next().await.unwrap().unwrap();
    let rest = async {
        eventually("a takes no more requests", || word(&server.slots, "a") == "unloading").await;
        assert_eq!((a.drains.load(SeqCst), b.loads.load(SeqCst)), (0, 0));
        let late = ask(&server, "a");
        let release = async {
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!(a.jobs.lock().unwrap().len(), 1, "a request that comes now waits for the next load");
            a.steps.add_permits(2);
        };
        let text = async {
            let rest: Vec<_> = running.map(|bytes| bytes.unwrap()).collect().await;
            String::from_utf8(rest.concat()).unwrap()
        };
        futures::join!(text, late, release)
    };
    let (other, (text, late, ())) = futures::join!(ask(&server, "b"), rest);
    assert!(String::from_utf8_lossy(&first).contains("half ") || text.contains("half "));
    assert!(text.contains("and half") && text.contains("[DONE]"), "{text}");
    assert_eq!((other, late), (200, 200));
    assert_eq!((a.loads.load(SeqCst), b.loads.load(SeqCst)), (2, 1));
    assert_eq!(a.dropped.load(SeqCst) + b.dropped.load(SeqCst), 0, "nobody's answer was cut short");
}

#[tokio::test(start_paused = true)]
async fn room_that_does_not_come_is_given_up_and_the_busy_one_stays() {
    let (slots, [a, b]) = slots(100, [model("a", 60, vec![Step::Text("x"), Step::Hang]), quick("b", 60)]);
    let answer = open(&slots, "a").await;
    let began = tokio::time::Instant::now();
    let (outcome, late) = futures::join!(lease(&slots, "b"), async {
        eventually("a takes no more requests", || word(&slots, "a") == "unloading").await;
        lease(&slots, "a").await
    });
    let error = outcome.unwrap_err();
    insta::assert_snapshot!(error);
    assert_eq!(began.elapsed().as_secs(), ROOM_WAIT_MAX.as_secs());
    assert!(late.is_ok(), "who came for a meanwhile gets it, as it was");
    assert_eq!((word(&slots, "a"), word(&slots, "b")), ("ready", "cold"));
    assert_eq!((a.loads.load(SeqCst), a.drains.load(SeqCst), b.loads.load(SeqCst)), (1, 0, 0));
    let error = mesh_llm::error::ApiError::from(error);
    assert_eq!((error.status().as_u16(), error.body().error.code.as_deref()), (503, Some("no_room")));
    // Nothing is left of the attempt: the next one begins anew, and succeeds once a is done.
    drop((answer, late));
    assert!(lease(&slots, "b").await.is_ok());
    assert_eq!((word(&slots, "a"), a.drains.load(SeqCst)), ("cold", 1));
}

#[tokio::test]
async fn a_load_that_fails_takes_nobody_down() {
    let (server, [a, b]) = server(100, [quick("a", 40), quick("b", 40)]).await;
    b.failing_loads.store(1, SeqCst);
    assert_eq!(ask(&server, "a").await, 200);
    assert_eq!(ask(&server, "b").await, 503);
    assert_eq!((word(&server.slots, "a"), word(&server.slots, "b"), reserved(&server.slots)), ("ready", "failed", 40));
    assert_eq!(server.get("/readyz").await.0, 200);
    assert_eq!((ask(&server, "a").await, ask(&server, "b").await), (200, 200));
    assert_eq!((a.loads.load(SeqCst), b.loads.load(SeqCst)), (1, 2));
}

#[tokio::test]
async fn a_failure_gives_its_room_back() {
    let (server, [a, b]) = server(100, [quick("a", 60), quick("b", 60)]).await;
    b.failing_loads.store(1, SeqCst);
    assert_eq!((ask(&server, "a").await, ask(&server, "b").await), (200, 503));
    assert_eq!((word(&server.slots, "a"), reserved(&server.slots)), ("cold", 0));
    assert_eq!(ask(&server, "a").await, 200);
    // An engine that breaks, the same.
    *a.script.lock().unwrap() = vec![Step::Text("half"), Step::Fail];
    assert_eq!(ask(&server, "a").await, 500);
    eventually("its room is free", || reserved(&server.slots) == 0).await;
    assert_eq!(server.get("/readyz").await.0, 503, "a broken model is not one that made room");
    assert_eq!(ask(&server, "b").await, 200);
}

#[tokio::test]
async fn two_loads_at_once_do_not_count_on_the_same_bytes() {
    let (server, [a, b, c]) = server(130, [quick("a", 60), quick("b", 60), quick("c", 60)]).await;
    let fakes = [a, b, c];
    fakes.iter().for_each(|fake| fake.hold_loads.store(true, SeqCst));
    let loads = || fakes.iter().map(|fake| fake.loads.load(SeqCst)).sum::<u32>();
    let watching = async {
        eventually("two load", || loads() == 2).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        assert_eq!((loads(), reserved(&server.slots)), (2, 120), "the third has to wait for one of them");
        fakes.iter().for_each(|fake| fake.go_on.notify_one());
    };
    let (one, two, three, ()) = futures::join!(ask(&server, "a"), ask(&server, "b"), ask(&server, "c"), watching);
    assert_eq!((one, two, three), (200, 200, 200));
    assert_eq!((loads(), reserved(&server.slots)), (3, 120));
}

#[tokio::test]
async fn a_large_model_is_not_overtaken_by_small_ones() {
    let busy = model("a", 60, vec![Step::Wait, STOP]);
    let (server, [a, b, c]) = server(100, [busy, quick("b", 80), quick("c", 30)]).await;
    let waiting = async {
        eventually("a takes no more requests", || word(&server.slots, "a") == "unloading").await;
        let late = async {
            eventually("c wants to load", || word(&server.slots, "c") == "loading").await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert_eq!((b.loads.load(SeqCst), c.loads.load(SeqCst)), (0, 0), "there is room for c, but b came first");
            a.steps.add_permits(1);
        };
        futures::join!(ask(&server, "c"), late).0
    };
    let first = async {
        let answer = ask(&server, "a");
        let large = async {
            eventually("a works", || a.taken.load(SeqCst) == 1).await;
            ask(&server, "b").await
        };
        futures::join!(answer, large)
    };
    let ((one, two), three) = futures::join!(first, waiting);
    assert_eq!((one, two, three), (200, 200, 200));
}

/// However requests for models that exclude each other fall together, each is answered.
#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn making_room_never_shows() {
    let script = || vec![Step::Text("a"), Step::Pause, Step::Text("b"), STOP];
    let models = [model("a", 60, script()), model("b", 60, script()), model("c", 30, script())];
    let (server, fakes) = server(100, models).await;
    let server = Arc::new(server);
    let over = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let watching = tokio::spawn({
        let (server, over) = (server.clone(), over.clone());
        async move {
            while !over.load(SeqCst) {
                assert!(reserved(&server.slots) <= 100, "overcommitted: {:?}", server.slots.memory());
                tokio::time::sleep(Duration::from_micros(200)).await;
            }
        }
    });
    let clients = (0..12usize).map(|client| {
        let server = server.clone();
        tokio::spawn(async move {
            for turn in 0..12usize {
                let name = ["a", "b", "c"][(client + turn * (1 + client % 2)) % 3];
                let stream = turn % 2 == 0;
                let body = chat(json!({ "model": name, "stream": stream })).to_string();
                let response = server.send("/v1/chat/completions", body).await;
                let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
                let busy = status == 503 && text.contains("\"busy\"");
                assert!(status == 200 || busy, "{name}: {status} {text}");
                assert!(!text.contains("event: error"), "{name}: {text}");
            }
        })
    });
    for client in future::join_all(clients).await {
        client.unwrap();
    }
    over.store(true, SeqCst);
    watching.await.unwrap();
    assert!(fakes.iter().map(|fake| fake.drains.load(SeqCst)).sum::<u32>() > 3, "nobody had to make room");
    assert!(fakes.iter().all(|fake| fake.dropped.load(SeqCst) == 0), "an answer was cut short");
}

const TTL: Duration = Duration::from_secs(600);

#[tokio::test(start_paused = true)]
async fn models_that_nobody_uses_are_unloaded_in_time() {
    let keeping = Keeping { memory_bytes: None, idle_ttl: Some(TTL) };
    let busy = model("c", 1, vec![Step::Text("x"), Step::Hang]);
    let (slots, [a, b, c]) = kept(keeping, [quick("a", 1), pinned(quick("b", 1)), busy]);
    drop((lease(&slots, "a").await.unwrap(), lease(&slots, "b").await.unwrap()));
    let answer = open(&slots, "c").await;
    settle().await;
    tokio::time::sleep(TTL - Duration::from_secs(1)).await;
    assert_eq!(["a", "b", "c"].map(|name| word(&slots, name)), ["ready", "ready", "ready"]);
    // Use puts the end off.
    drop(lease(&slots, "a").await.unwrap());
    tokio::time::sleep(TTL - Duration::from_secs(1)).await;
    assert_eq!((word(&slots, "a"), a.drains.load(SeqCst)), ("ready", 0));
    tokio::time::sleep(Duration::from_secs(2)).await;
    settle().await;
    assert_eq!(["a", "b", "c"].map(|name| word(&slots, name)), ["cold", "ready", "ready"]);
    assert!(slots.ready(), "an unloaded model does not make the server unready");
    assert!(lease(&slots, "a").await.is_ok());
    assert_eq!([a, b, c].map(|fake| fake.loads.load(SeqCst)), [2, 1, 1]);
    drop(answer);
    tokio::time::sleep(TTL + Duration::from_secs(1)).await;
    settle().await;
    assert_eq!(word(&slots, "c"), "cold");
}

#[tokio::test]
async fn without_a_bound_of_its_own_the_device_sets_one() {
    let (a, b) = (quick("a", 50), quick("b", 50));
    a.fake.device_bytes.store(100, SeqCst);
    // By then the other holds half of it, which is no reason to think less of the device.
    b.fake.device_bytes.store(50, SeqCst);
    let (slots, _) = kept(Keeping::default(), [a, b]);
    let server = Server::serve(Fake::new(Form::Text, vec![]), slots).await;
    assert_eq!(ask(&server, "a").await, 200);
    assert_eq!(
        server.get("/health").await.1["memory"],
        json!([{ "pool": "ram", "budget_bytes": 90, "reserved_bytes": 50 }])
    );
    assert_eq!(ask(&server, "b").await, 200);
    assert_eq!((word(&server.slots, "a"), word(&server.slots, "b")), ("cold", "ready"));
}

#[tokio::test]
async fn a_single_model_that_cannot_fit_is_refused_with_numbers() {
    let one = quick("a", 95);
    one.fake.device_bytes.store(100, SeqCst);
    let (slots, [a]) = kept(Keeping::default(), [one]);
    let error = lease(&slots, "a").await.unwrap_err();
    insta::assert_snapshot!(error);
    assert_eq!(a.loads.load(SeqCst), 0);
}

#[tokio::test]
async fn engines_keep_to_their_share_where_they_have_company() {
    let (slots, [a]) = slots(100, [quick("a", 60)]);
    drop(lease(&slots, "a").await.unwrap());
    assert_eq!(*a.terms.lock().unwrap(), [(4096, None)], "one that is alone may have all there is");
    let (a, mut b) = (quick("a", 30), quick("b", 30));
    // Of a model that says what it needs, or is given more, the rest is for its cache.
    b.plan.share_bytes = Some(50);
    // Backends count with the context that was asked for.
    b.plan.starter.context_tokens = Some(512);
    let (slots, [a, b]) = kept(Keeping { memory_bytes: Some(100), idle_ttl: None }, [a, b]);
    drop((lease(&slots, "a").await.unwrap(), lease(&slots, "b").await.unwrap()));
    assert_eq!(*a.terms.lock().unwrap(), [(4096, Some(30))]);
    assert_eq!(*b.terms.lock().unwrap(), [(512, Some(50))]);
    assert_eq!(reserved(&slots), 80);
}

#[tokio::test]
async fn models_are_found_by_every_name_they_have() {
    let (a, b, c) = (quick("a", 1), quick("b", 1), quick("c", 1));
    let renamed = Model { plan: SlotPlan { name: Some("small".into()), ..a.plan }, ..a };
    let on_disk = Model { plan: SlotPlan { own_name: Some("org/b-model".into()), ..b.plan }, ..b };
    let (server, _) = server(100, [renamed, on_disk, c]).await;
    let ids = |models: Value| models["data"].as_array().unwrap().iter().map(|model| model["id"].clone()).collect();
    let before: Vec<Value> = ids(server.get("/v1/models").await.1);
    assert_eq!(before, ["small", "org/b-model", "c"]);
    for name in ["small", "a", "org/a-model", "b", "org/b-model", "c", "org/c-model"] {
        let (status, answer) = server.chat(json!({ "model": name })).await;
        assert_eq!(status, 200, "{name}");
        let own = ["small", "org/b-model", "org/c-model"].map(Value::from);
        assert!(own.contains(&answer["model"]), "{name}: {answer}");
    }
    assert_eq!(server.get("/v1/models/nobody").await.0, 404);
}

#[tokio::test]
async fn the_end_comes_while_a_model_makes_room() {
    let script = vec![Step::Text("half "), Step::Wait, Step::Text("and half"), STOP];
    let (slots, [a, _]) = slots(100, [model("a", 60, script), quick("b", 60)]);
    let answer = open(&slots, "a").await;
    let (waiting, ()) = futures::join!(lease(&slots, "b"), async {
        eventually("a takes no more requests", || word(&slots, "a") == "unloading").await;
        slots.drain(Duration::from_secs(1)).await;
    });
    assert!(matches!(waiting, Err(SlotError::Stopped)), "{waiting:?}");
    assert_eq!(a.drains.load(SeqCst), 1);
    assert!(slots.iter().all(|slot| matches!(slot.state(), SlotState::Stopped)));
    drop(answer);
}
