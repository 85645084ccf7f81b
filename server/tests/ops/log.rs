//! The line that the log has of a request.

use std::sync::{Arc, Mutex};

use mesh_llm::{listen::Options, otel};
use serde_json::{Value, json};
use tracing::subscriber::DefaultGuard;

use crate::{
    KEY, STOP,
    fake::{Step, chat},
    guarded, policy, start,
};

/// The log of this test's thread, on which its server runs too.
struct Log(Arc<Mutex<Vec<u8>>>, #[allow(dead_code)] DefaultGuard);

struct To(Arc<Mutex<Vec<u8>>>);

impl std::io::Write for To {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl Log {
    fn start() -> Self {
        let lines = Arc::new(Mutex::new(Vec::new()));
        let to = lines.clone();
        let log = tracing_subscriber::fmt()
            .with_writer(move || To(to.clone()))
            .with_max_level(tracing::Level::INFO)
            .fmt_fields(otel::Json::fields())
            .event_format(otel::Json)
            .finish();
        Self(lines, tracing::subscriber::set_default(log))
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }

    /// The lines of requests that are over, once there are so many.
    async fn finished(&self, count: usize) -> Vec<Value> {
        for _ in 0..400 {
            let lines =
                self.text().lines().map(|line| serde_json::from_str::<Value>(line).unwrap()).collect::<Vec<_>>();
            let finished: Vec<_> = lines.into_iter().filter(|line| line["Body"] == "request finished").collect();
            if finished.len() >= count {
                assert_eq!(finished.len(), count, "{}", self.text());
                return finished;
            }
            tokio::time::sleep(std::time::Duration::from_millis(5)).await;
        }
        panic!("no {count} lines: {}", self.text());
    }
}

const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";

#[tokio::test]
async fn a_request_is_one_line_with_its_counts_and_none_of_its_words() {
    let log = Log::start();
    let server = start(vec![Step::Prefill(7), Step::Text("an ans"), Step::Text("wer"), STOP], policy(guarded())).await;
    let request = server.client.post(format!("{}/v1/chat/completions", server.url));
    let body = chat(json!({ "stream": true, "messages": [{ "role": "user", "content": "a secret" }] }));
    let traceparent = format!("00-{TRACE}-b7ad6b7169203331-01");
    let request = request.bearer_auth(KEY).header("traceparent", traceparent).header("x-request-id", "mine");
    request.json(&body).send().await.unwrap().text().await.unwrap();
    server.client.get(format!("{}/livez", server.url)).send().await.unwrap();
    let line = log.finished(1).await.remove(0);
    assert_eq!((&line["TraceId"], &line["SpanId"]), (&json!(TRACE), &json!("b7ad6b7169203331")));
    assert_eq!((&line["SeverityText"], &line["Resource"]["service.name"]), (&json!("INFO"), &json!("mesh-llm")));
    let mut attributes = line["Attributes"].clone();
    for time in ["http.server.request.duration", "gen_ai.response.time_to_first_chunk"] {
        let time = attributes.as_object_mut().unwrap().remove(time).unwrap();
        assert!((0.0..60.0).contains(&time.as_f64().unwrap()), "{time}");
    }
    assert_eq!(
        attributes,
        json!({
            "request.id": "mine", "http.request.method": "POST", "url.path": "/v1/chat/completions",
            "http.route": "/v1/chat/completions", "http.response.status_code": 200, "network.protocol.version": "1.1",
            "client.address": "127.0.0.1", "enduser.id": "ci", "gen_ai.request.model": "org/fake-model",
            "gen_ai.usage.input_tokens": 7, "gen_ai.usage.cache_read.input_tokens": 3,
            "gen_ai.usage.output_tokens": 3, "gen_ai.response.finish_reasons": "stop",
        })
    );
    let text = log.text();
    assert!(!text.contains("secret") && !text.contains("an ans") && !text.contains(KEY), "{text}");
}

#[tokio::test]
async fn words_are_shown_where_that_is_asked_for() {
    let log = Log::start();
    let script = vec![Step::Text("an ans"), Step::Text("wer"), STOP];
    let server = start(script, Options { log_prompts: true, ..Options::default() }).await;
    server.chat(json!({ "messages": [{ "role": "user", "content": "a secret" }] })).await;
    let line = log.finished(1).await.remove(0);
    assert_eq!(line["Attributes"]["gen_ai.output.messages"], "an answer");
    let asked: Value = serde_json::from_str(line["Attributes"]["gen_ai.input.messages"].as_str().unwrap()).unwrap();
    assert_eq!(asked["messages"][0]["content"], "a secret");
}

#[tokio::test]
async fn refusals_and_departures_say_why() {
    let log = Log::start();
    let server = start(vec![Step::Text("a"), Step::Hang], policy(guarded())).await;
    let url = format!("{}/v1/chat/completions", server.url);
    server.client.post(&url).bearer_auth("nobody's").json(&chat(json!({}))).send().await.unwrap();
    server.client.post(&url).bearer_auth(KEY).json(&chat(json!({ "top_k": 5 }))).send().await.unwrap();
    for stream in [true, false] {
        let request = server.client.post(&url).bearer_auth(KEY).json(&chat(json!({ "stream": stream }))).send();
        tokio::time::timeout(std::time::Duration::from_millis(500), request).await.ok();
    }
    let lines = log.finished(4).await;
    let said = |number: usize| {
        let attributes = &lines[number]["Attributes"];
        ["http.response.status_code", "error.type", "error.param", "gen_ai.response.finish_reasons"]
            .map(|name| attributes[name].to_string().replace('"', ""))
            .join(" ")
    };
    assert_eq!(said(0), "401 invalid_api_key null null");
    assert_eq!(said(1), "400 unsupported_parameter top_k null");
    assert_eq!(said(2), "200 client_left null cancelled");
    assert_eq!(said(3), "null client_left null cancelled");
    assert!(!log.text().contains("nobody's"));
}
