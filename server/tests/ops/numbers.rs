//! What Prometheus reads.

use std::{collections::BTreeMap, sync::atomic::Ordering::SeqCst};

use futures::StreamExt;
use mesh_llm::{guard::Policy, listen::Options};
use serde_json::json;

use crate::{
    KEY, STOP,
    fake::{Server, Step, chat, eventually},
    guarded, policy, start,
};

/// The samples by name and labels.
async fn scrape(server: &Server) -> BTreeMap<String, f64> {
    let response = server.client.get(format!("{}/metrics", server.url)).send().await.unwrap();
    assert!(response.headers()["content-type"].to_str().unwrap().starts_with("application/openmetrics-text"));
    let text = response.text().await.unwrap();
    assert!(text.ends_with("# EOF\n"), "{text}");
    let samples = text.lines().filter(|line| !line.starts_with('#'));
    let split = |line: &str| {
        let (name, value) = line.rsplit_once(' ').unwrap_or_else(|| panic!("{line}"));
        (name.to_owned(), value.parse().unwrap_or_else(|_| panic!("{line}")))
    };
    let mut all = BTreeMap::new();
    for (name, value) in samples.map(split) {
        assert!(all.insert(name.clone(), value).is_none(), "{name} is there twice");
    }
    all
}

const OF: &str = "{model=\"org/fake-model\"}";

#[tokio::test]
async fn answers_are_counted_whatever_asked_for_them() {
    let script = vec![Step::Queued(1), Step::Prefill(7), Step::Text("a"), Step::Text("b"), Step::Text("c"), STOP];
    let server = start(script, Options::default()).await;
    assert_eq!(server.chat(json!({})).await.0, 200);
    server.chat_events(json!({})).await;
    let (status, _) = server.post("/v1/completions", &json!({ "model": "fake", "prompt": "x" })).await;
    assert_eq!(status, 200);
    let seen = scrape(&server).await;
    let of = |name: &str| *seen.get(&format!("mesh_llm_{name}{OF}")).unwrap_or_else(|| panic!("no {name}: {seen:#?}"));
    assert_eq!(of("prompt_tokens_total"), 21.0);
    assert_eq!(of("cached_prompt_tokens_total"), 9.0);
    assert_eq!(of("completion_tokens_total"), 12.0);
    assert_eq!(of("prefix_cache_hits_total"), 3.0);
    assert_eq!(of("time_to_first_token_seconds_count"), 3.0);
    assert_eq!(of("inter_token_latency_seconds_count"), 6.0);
    assert_eq!(of("e2e_request_latency_seconds_count"), 3.0);
    assert_eq!((of("requests_running"), of("requests_waiting")), (0.0, 0.0));
    let at = |name: &str| *seen.get(name).unwrap_or_else(|| panic!("no {name}: {seen:#?}"));
    assert_eq!(at("mesh_llm_answers_total{model=\"org/fake-model\",reason=\"stop\"}"), 3.0);
    assert_eq!(at("mesh_llm_model_state{model=\"org/fake-model\",state=\"ready\"}"), 1.0);
    assert_eq!(at("mesh_llm_model_state{model=\"org/fake-model\",state=\"cold\"}"), 0.0);
    let reserved = server.slots.iter().next().unwrap().reserved_bytes();
    assert!(reserved > 0);
    assert_eq!(at("mesh_llm_model_reserved_bytes{model=\"org/fake-model\"}"), reserved as f64);
    assert_eq!(at(&format!("mesh_llm_build_info{{version=\"{}\"}}", env!("CARGO_PKG_VERSION"))), 1.0);
    let exchange = |path: &str| {
        format!(
            "mesh_llm_http_requests_total{{method=\"POST\",path=\"{path}\",status=\"200\",model=\"org/fake-model\"}}"
        )
    };
    assert_eq!(at(&exchange("/v1/chat/completions")), 2.0);
    assert_eq!(at(&exchange("/v1/completions")), 1.0);
    assert!(at("mesh_llm_connections") >= 1.0);
    assert_eq!(at("mesh_llm_http_requests_active"), 1.0, "the scrape itself");
    #[cfg(target_os = "linux")]
    assert!(at("process_resident_memory_bytes") > 1e6);
}

#[tokio::test]
async fn who_runs_and_who_waits_is_shown_and_who_leaves_is_counted() {
    let server = start(vec![Step::Queued(3), Step::Wait, Step::Text("a"), Step::Wait, STOP], Options::default()).await;
    let body = chat(json!({ "stream": true })).to_string();
    let mut answer = server.send("/v1/chat/completions", body).await.bytes_stream();
    let taken = |count| move |server: &Server| server.fake.taken.load(SeqCst) >= count;
    eventually("it waits", || taken(2)(&server)).await;
    let seen = scrape(&server).await;
    let of = |name: &str| seen[&format!("mesh_llm_{name}{OF}")];
    assert_eq!((of("requests_running"), of("requests_waiting")), (0.0, 1.0));
    server.fake.steps.add_permits(1);
    eventually("it runs", || taken(4)(&server)).await;
    let seen = scrape(&server).await;
    let of = |name: &str| seen[&format!("mesh_llm_{name}{OF}")];
    assert_eq!((of("requests_running"), of("requests_waiting")), (1.0, 0.0));
    assert!(answer.next().await.unwrap().is_ok());
    drop(answer);
    eventually("the engine's stream is dropped", || server.fake.dropped.load(SeqCst) == 1).await;
    let seen = scrape(&server).await;
    let of = |name: &str| seen[&format!("mesh_llm_{name}{OF}")];
    assert_eq!((of("requests_running"), of("requests_waiting"), of("completion_tokens_total")), (0.0, 0.0, 1.0));
    assert_eq!(seen["mesh_llm_answers_total{model=\"org/fake-model\",reason=\"cancelled\"}"], 1.0);
}

#[tokio::test]
async fn an_answer_that_goes_from_engine_to_engine_counts_once() {
    let server = start(vec![Step::Queued(1), Step::FailInLine], Options::default()).await;
    let (answer, ()) = futures::join!(server.chat(json!({})), async {
        eventually("it is in line", || server.fake.jobs.lock().unwrap().len() == 1).await;
        *server.fake.script.lock().unwrap() = vec![Step::Text("whole"), STOP];
        server.fake.steps.add_permits(1);
    });
    assert_eq!(answer.0, 200);
    let seen = scrape(&server).await;
    let ended: f64 =
        seen.iter().filter(|(name, _)| name.starts_with("mesh_llm_answers_total")).map(|(_, count)| count).sum();
    assert_eq!(ended, 1.0);
    let of = |name: &str| seen[&format!("mesh_llm_{name}{OF}")];
    assert_eq!((of("requests_running"), of("requests_waiting")), (0.0, 0.0));
}

#[tokio::test]
async fn labels_are_as_few_as_the_servers_own() {
    let server = start(vec![STOP], Options::default()).await;
    let before = scrape(&server).await.len();
    for number in 0..50 {
        let url = format!("{}/nothing/{number}", server.url);
        let method = reqwest::Method::from_bytes(format!("BREW{number}").as_bytes()).unwrap();
        server.client.request(method, url).send().await.unwrap();
        server.chat(json!({ "model": format!("nobody-{number}") })).await;
    }
    let after = scrape(&server).await;
    let other = "mesh_llm_http_requests_total{method=\"other\",path=\"other\",status=\"404\",model=\"\"}";
    assert_eq!(after[other], 50.0);
    assert_eq!(
        after["mesh_llm_http_requests_total{method=\"POST\",path=\"/v1/chat/completions\",status=\"404\",model=\"\"}"],
        50.0
    );
    // Three kinds of exchanges, this scrape's predecessor included, and the histograms of their paths.
    assert!(after.len() - before < 70, "{} more samples", after.len() - before);
}

#[tokio::test]
async fn numbers_are_for_those_with_a_key_unless_they_are_open() {
    let server = start(vec![], policy(guarded())).await;
    assert_eq!(server.get("/metrics").await.0, 401);
    let url = format!("{}/metrics", server.url);
    assert_eq!(server.client.get(&url).bearer_auth(KEY).send().await.unwrap().status().as_u16(), 200);
    assert_eq!(server.client.post(&url).bearer_auth(KEY).send().await.unwrap().status().as_u16(), 405);
    let open = start(vec![], policy(Policy { metrics_open: true, ..guarded() })).await;
    scrape(&open).await;
}
