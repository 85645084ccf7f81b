//! A server that answers as it is told, byte for byte, and notes what it is asked and when it is left.

use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

use serde_json::{Value, json};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::watch,
    task::JoinSet,
};

/// What it was asked.
#[derive(Clone, Debug)]
pub struct Request {
    pub line: String,
    pub head: String,
    pub body: Value,
}

impl Request {
    /// `POST /v1/chat/completions` without the method.
    pub fn path(&self) -> &str {
        self.line.split(' ').nth(1).unwrap()
    }

    pub fn model(&self) -> &str {
        self.body["model"].as_str().unwrap_or_default()
    }
}

/// What it answers.
#[derive(Clone, Debug)]
pub enum Answer {
    Json(u16, Value),
    /// With further lines of the head.
    Raw(u16, &'static str, Vec<Step>),
}

/// What it does once the head is sent.
#[derive(Clone, Debug)]
pub enum Step {
    Send(Vec<u8>),
    Wait(Duration),
    /// Sends this until nobody takes it any more.
    Forever(Vec<u8>, Duration),
    /// Waits until the client leaves.
    Stay,
}

pub type Handler = Arc<dyn Fn(&Request) -> Answer + Send + Sync>;

pub struct StandIn {
    port: u16,
    handler: Arc<Mutex<Handler>>,
    asked: Arc<Mutex<Vec<Request>>>,
    /// Clients that left before the answer was over.
    left: watch::Sender<u32>,
    serving: Option<tokio::task::JoinHandle<()>>,
}

impl StandIn {
    pub async fn new(handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) -> Self {
        let handler: Handler = Arc::new(handler);
        let mut server = Self {
            port: 0,
            handler: Arc::new(Mutex::new(handler)),
            asked: Arc::default(),
            left: watch::channel(0).0,
            serving: None,
        };
        server.up().await;
        server
    }

    pub fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// Answers in another way from now on.
    pub fn set(&self, handler: impl Fn(&Request) -> Answer + Send + Sync + 'static) {
        *self.handler.lock().unwrap() = Arc::new(handler);
    }

    /// Begins to listen, where it did before.
    pub async fn up(&mut self) {
        let listener = TcpListener::bind(("127.0.0.1", self.port)).await.unwrap();
        self.port = listener.local_addr().unwrap().port();
        let (handler, asked, left) = (self.handler.clone(), self.asked.clone(), self.left.clone());
        self.serving = Some(tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                connections.spawn(serve(stream, handler.clone(), asked.clone(), left.clone()));
                while connections.try_join_next().is_some() {}
            }
        }));
    }

    /// Is gone, with all connections.
    pub async fn down(&mut self) {
        if let Some(serving) = self.serving.take() {
            serving.abort();
            let _ = serving.await;
        }
    }

    /// The last request that was for `path`.
    pub fn last(&self, path: &str) -> Request {
        let asked = self.asked.lock().unwrap();
        asked.iter().rev().find(|request| request.path() == path).cloned().expect("such a request")
    }

    pub fn count(&self, path: &str) -> usize {
        self.asked.lock().unwrap().iter().filter(|request| request.path() == path).count()
    }

    pub fn left(&self) -> watch::Receiver<u32> {
        self.left.subscribe()
    }
}

impl Drop for StandIn {
    fn drop(&mut self) {
        if let Some(serving) = &self.serving {
            serving.abort();
        }
    }
}

async fn serve(
    mut stream: TcpStream,
    handler: Arc<Mutex<Handler>>,
    asked: Arc<Mutex<Vec<Request>>>,
    left: watch::Sender<u32>,
) {
    let Some(request) = read(&mut stream).await else { return };
    asked.lock().unwrap().push(request.clone());
    let answer = handler.lock().unwrap().clone()(&request);
    let (status, head, steps) = match answer {
        Answer::Json(status, value) => {
            (status, "content-type: application/json\r\n", vec![Step::Send(value.to_string().into_bytes())])
        }
        Answer::Raw(status, head, steps) => (status, head, steps),
    };
    let _ = stream.set_nodelay(true);
    let head = format!("HTTP/1.1 {status} Whatever\r\nconnection: close\r\n{head}\r\n");
    if stream.write_all(head.as_bytes()).await.is_err() {
        return;
    }
    for step in steps {
        let gone = match step {
            Step::Send(bytes) => stream.write_all(&bytes).await.is_err(),
            Step::Wait(time) => {
                tokio::time::sleep(time).await;
                false
            }
            Step::Forever(bytes, pause) => loop {
                if stream.write_all(&bytes).await.is_err() {
                    break true;
                }
                tokio::time::sleep(pause).await;
            },
            Step::Stay => stream.read(&mut [0; 64]).await.is_ok_and(|read| read == 0),
        };
        if gone {
            left.send_modify(|left| *left += 1);
            return;
        }
    }
    let _ = stream.shutdown().await;
}

async fn read(stream: &mut TcpStream) -> Option<Request> {
    let (mut bytes, mut chunk) = (Vec::new(), [0; 4096]);
    let end = loop {
        if let Some(end) = bytes.windows(4).position(|four| four == b"\r\n\r\n") {
            break end + 4;
        }
        let count = stream.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(&chunk[..count]);
    };
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
    let length = head.lines().find_map(|line| line.strip_prefix("content-length:")?.trim().parse::<usize>().ok());
    while bytes.len() < end + length.unwrap_or(0) {
        let count = stream.read(&mut chunk).await.ok().filter(|count| *count > 0)?;
        bytes.extend_from_slice(&chunk[..count]);
    }
    let line = String::from_utf8_lossy(&bytes).lines().next()?.to_owned();
    let body = serde_json::from_slice(&bytes[end..]).unwrap_or(Value::Null);
    Some(Request { line, head, body })
}

/// Events with these data, and the end.
pub fn sse(events: &[Value]) -> Vec<u8> {
    let mut text = String::new();
    for event in events {
        text.push_str(&format!("data: {event}\n\n"));
    }
    text.push_str("data: [DONE]\n\n");
    text.into_bytes()
}

pub fn events(bytes: Vec<u8>) -> Answer {
    steps(vec![Step::Send(bytes)])
}

pub fn steps(steps: Vec<Step>) -> Answer {
    Answer::Raw(200, "content-type: text/event-stream\r\n", steps)
}

pub fn delta(delta: Value) -> Value {
    json!({ "choices": [{ "index": 0, "delta": delta, "finish_reason": null }] })
}

pub fn finish(reason: &str) -> Value {
    json!({ "choices": [{ "index": 0, "delta": {}, "finish_reason": reason }] })
}

pub fn usage(prompt: u32, completion: u32) -> Value {
    json!({ "choices": [], "usage": { "prompt_tokens": prompt, "completion_tokens": completion } })
}

/// An answer of one word.
pub fn hello() -> Answer {
    events(sse(&[delta(json!({ "role": "assistant", "content": "hello" })), finish("stop"), usage(3, 1)]))
}

pub fn not_found() -> Answer {
    Answer::Json(404, json!({ "error": { "message": "not found", "code": "not_found" } }))
}

pub fn list(models: &[Value]) -> Answer {
    Answer::Json(200, json!({ "object": "list", "data": models }))
}

/// Has `/v1/models` with the model `m`, and answers requests for it.
pub fn bare(answer: impl Fn(&Request) -> Answer) -> impl Fn(&Request) -> Answer {
    move |request| match request.path() {
        "/v1/models" => list(&[json!({ "id": "m", "owned_by": "somebody" })]),
        "/v1/chat/completions" | "/v1/completions" if request.model() == "m" => answer(request),
        _ => not_found(),
    }
}

/// Refuses values of these fields that are texts, as servers do that read them.
fn typed(request: &Request, fields: &[&str]) -> Option<Answer> {
    let wrong = fields.iter().find(|field| request.body[**field].is_string())?;
    let what = format!("1 validation error: {wrong}: Input should be valid");
    Some(Answer::Json(400, json!({ "error": { "message": what, "param": wrong, "code": 400 } })))
}

pub fn vllm(answer: impl Fn(&Request) -> Answer) -> impl Fn(&Request) -> Answer {
    let fields = ["top_k", "min_p", "structured_outputs", "tools", "logprobs"];
    move |request| match request.path() {
        "/v1/models" => {
            list(&[json!({ "id": "org/model", "owned_by": "vllm", "max_model_len": 16384, "root": "org/model" })])
        }
        "/version" => Answer::Json(200, json!({ "version": "0.11.2" })),
        "/v1/chat/completions" | "/v1/completions" => match typed(request, &fields) {
            Some(refusal) => refusal,
            None if request.model() == "org/model" => answer(request),
            None => not_found(),
        },
        "/tokenize" | "/detokenize" => answer(request),
        _ => not_found(),
    }
}

pub fn ollama(answer: impl Fn(&Request) -> Answer) -> impl Fn(&Request) -> Answer {
    move |request| match request.path() {
        "/" => Answer::Raw(200, "content-type: text/plain\r\n", vec![Step::Send(b"Ollama is running".to_vec())]),
        "/api/version" => Answer::Json(200, json!({ "version": "0.12.6" })),
        "/v1/models" => list(&[
            json!({ "id": "qwen3:0.6b", "owned_by": "library" }),
            json!({ "id": "nomic-embed-text:latest", "owned_by": "library" }),
        ]),
        "/api/ps" => Answer::Json(200, json!({ "models": [] })),
        "/api/show" if request.model() == "qwen3:0.6b" => Answer::Json(
            200,
            json!({
                "parameters": "stop \"x\"\nnum_ctx                        8192",
                "details": { "quantization_level": "Q4_K_M" },
                "model_info": { "general.architecture": "qwen3", "qwen3.context_length": 40960 },
                "capabilities": ["completion", "tools", "thinking"],
            }),
        ),
        "/api/show" => Answer::Json(
            200,
            json!({
                "model_info": { "general.architecture": "nomic-bert", "nomic-bert.context_length": 2048 },
                "capabilities": ["embedding"],
            }),
        ),
        "/v1/chat/completions" | "/v1/completions" | "/v1/embeddings" => match typed(request, &["top_p"]) {
            Some(refusal) => refusal,
            None if request.model().starts_with("mesh-llm") => not_found(),
            None => answer(request),
        },
        _ => not_found(),
    }
}

pub fn llama_server(answer: impl Fn(&Request) -> Answer) -> impl Fn(&Request) -> Answer {
    move |request| match request.path() {
        "/v1/models" => {
            let meta = json!({ "n_ctx_train": 131072, "n_params": 1000, "size": 500 });
            list(&[json!({ "id": "model.gguf", "owned_by": "llamacpp", "meta": meta })])
        }
        "/health" => Answer::Json(200, json!({ "status": "ok" })),
        "/props" => Answer::Json(
            200,
            json!({
                "default_generation_settings": { "n_ctx": 2048 },
                "total_slots": 4,
                "chat_template": "{% if enable_thinking %}",
                "build_info": "b7000-abc",
            }),
        ),
        "/v1/embeddings" => Answer::Json(501, json!({ "error": { "message": "start it with --embeddings" } })),
        _ => answer(request),
    }
}

pub fn mesh_llm(answer: impl Fn(&Request) -> Answer) -> impl Fn(&Request) -> Answer {
    move |request| match request.path() {
        "/v1/models" => list(&[
            json!({
                "id": "smol", "owned_by": "mesh-llm", "status": "ready", "context_length": 8192,
                "capabilities": {
                    "chat": true, "tools": true, "reasoning": "switch", "embeddings": true,
                    "parameters": ["temperature", "top_k", "response_format", "seed"], "grammars": ["json_schema", "regex"],
                },
            }),
            json!({ "id": "cold", "owned_by": "mesh-llm", "status": "cold", "capabilities": { "chat": true } }),
            json!({ "id": "from-elsewhere", "owned_by": "mesh-llm", "status": "ready", "backend": "share" }),
            json!({ "id": "broken", "owned_by": "mesh-llm", "status": "failed", "capabilities": {} }),
        ]),
        "/version" => Answer::Json(200, json!({ "version": "0.1.0" })),
        _ => answer(request),
    }
}
