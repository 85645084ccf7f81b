//! The default model, on both backends, as a newcomer meets it: fetched, elected, asked. The one test with a real model.
#![cfg(unix)]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use serde_json::{Value, json};

/// Ends the server when the test does, however that is.
struct Server {
    process: Child,
    url: String,
}

impl Server {
    fn start(target: &Path, args: &[&str]) -> Self {
        // What llama-server's own tests installed is used here too, and the model is fetched once a checkout.
        let config = target.join("smoke.toml");
        let folder = target.join("llama-server");
        fs::write(&config, format!("[backends.llama-server]\ninstall_dir = {folder:?}\n")).unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_mesh-llm"))
            .args(["--port", "0", "--ctx", "512", "--config"])
            .arg(&config)
            .args(args)
            .env("MESH_LLM_CACHE", target.join("smoke-cache"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
        let url = url.unwrap_or_else(|| panic!("mesh-llm {args:?} never listened"));
        // Whatever else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, url }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

async fn ask(url: &str, stream: bool) -> String {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let body = json!({
        "model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 12, "stream": stream,
        "messages": [{ "role": "user", "content": "What is the capital of France?" }],
    });
    let response = client.post(format!("{url}/v1/chat/completions")).json(&body).send().await.unwrap();
    assert_eq!(response.status().as_u16(), 200);
    let text = response.text().await.unwrap();
    if !stream {
        let answer: Value = serde_json::from_str(&text).unwrap();
        return answer["choices"][0]["message"]["content"].as_str().unwrap().to_owned();
    }
    assert!(text.trim_end().ends_with("data: [DONE]"), "{text}");
    let chunks = text.lines().filter_map(|line| line.strip_prefix("data: {"));
    chunks
        .map(|chunk| serde_json::from_str::<Value>(&format!("{{{chunk}")).unwrap())
        .filter_map(|chunk| chunk["choices"][0]["delta"]["content"].as_str().map(str::to_owned))
        .collect()
}

/// Its template shows no tools: that is said where they are offered, streamed or not, and in the list of models.
async fn offered_tools_are_said_to_be_unseen(url: &str) {
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let mut body = json!({
        "model": "SmolLM2-135M-Instruct", "temperature": 0, "max_tokens": 2,
        "messages": [{ "role": "user", "content": "What is the capital of France?" }],
        "tools": [{ "type": "function", "function": { "name": "f", "parameters": { "type": "object" } } }],
    });
    let chat = format!("{url}/v1/chat/completions");
    let answer: Value = client.post(&chat).json(&body).send().await.unwrap().json().await.unwrap();
    assert_eq!(answer["choices"][0]["message"]["warnings"][0]["code"], "tools_not_shown", "{answer}");
    body["stream"] = true.into();
    let streamed = client.post(&chat).json(&body).send().await.unwrap().text().await.unwrap();
    assert_eq!(streamed.matches("tools_not_shown").count(), 1, "{streamed}");
    let models: Value = client.get(format!("{url}/v1/models")).send().await.unwrap().json().await.unwrap();
    assert_eq!(models["data"][0]["capabilities"]["tools"], false, "{models}");
}

#[test]
fn the_capital_of_france_is_paris_on_both_backends() {
    let target = Path::new(env!("CARGO_BIN_EXE_mesh-llm")).parent().unwrap().parent().unwrap();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    for args in [&["--mlx"][..], &[]] {
        let server = Server::start(target, args);
        let blocking = runtime.block_on(ask(&server.url, false));
        let streamed = runtime.block_on(ask(&server.url, true));
        assert_eq!(blocking, "The capital of France is Paris.", "{args:?}");
        assert_eq!(streamed, blocking, "{args:?}");
        runtime.block_on(offered_tools_are_said_to_be_unseen(&server.url));
    }
}
