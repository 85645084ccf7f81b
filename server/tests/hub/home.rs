//! A user with an empty home and a hub of their own.

use std::{
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
};

pub use conformance::shared::golden;

use conformance::hub::Hub;
use serde_json::{Value, json};

pub struct Home {
    root: tempfile::TempDir,
    pub hub: Hub,
}

/// What a golden has besides a published checkpoint's files.
pub const ANSWERS: &[&str] = &["reference.safetensors", "tolerance", "note.json", "model.gguf"];

impl Home {
    pub fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let config = root.path().join(".config/mesh-llm");
        fs::create_dir_all(&config).unwrap();
        // Any free port and a short context, so that command lines run as they stand; and the llama-server that other tests
        // have installed.
        let target = Path::new(env!("CARGO_BIN_EXE_mesh-llm")).parent().unwrap().parent().unwrap();
        let folder = target.join("llama-server");
        let text = format!("port = 0\nctx = 256\n[backends.llama-server]\ninstall_dir = {folder:?}\n");
        fs::write(config.join("config.toml"), text).unwrap();
        Self { root, hub: Hub::start() }
    }

    pub fn path(&self, below: &str) -> PathBuf {
        self.root.path().join(below)
    }

    /// The files of the hub's cache, below it.
    pub fn cached(&self, repo: &str) -> PathBuf {
        self.path("hf/hub").join(format!("models--{}", repo.replace('/', "--")))
    }

    /// A command line as a shell would have it: words, and `~`.
    pub fn command(&self, line: &str) -> Command {
        let home = format!("{}/", self.root.path().display());
        let mut words = line.split_whitespace().map(|word| match word.strip_prefix("~/") {
            Some(rest) => format!("{home}{rest}"),
            None => word.to_owned(),
        });
        assert_eq!(words.next().as_deref(), Some("mesh-llm"));
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-llm"));
        command
            .args(words)
            .env("HOME", self.root.path())
            .env("MESH_LLM_CACHE", self.path("cache"))
            .env("HF_HOME", self.path("hf"))
            .env("HF_ENDPOINT", &self.hub.endpoint)
            .env("NO_COLOR", "1")
            .stdin(Stdio::null());
        for name in [
            "XDG_CONFIG_HOME",
            "XDG_DATA_HOME",
            "XDG_CACHE_HOME",
            "HF_HUB_CACHE",
            "HUGGINGFACE_HUB_CACHE",
            "HF_TOKEN",
            "HF_TOKEN_PATH",
            "HF_HUB_OFFLINE",
            "MESH_LLM_LOG",
            "http_proxy",
            "HTTP_PROXY",
            "all_proxy",
            "ALL_PROXY",
        ] {
            command.env_remove(name);
        }
        command
    }

    pub fn run(&self, line: &str) -> Output {
        self.command(line).output().unwrap()
    }

    /// What a command that succeeds prints.
    pub fn done(&self, line: &str) -> String {
        let output = self.run(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{line}: {stderr}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// The same, read as JSON.
    pub fn json(&self, line: &str) -> Value {
        let text = self.done(line);
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{line}: {error}: {text}"))
    }

    /// What a command that fails says, from its error on, with its exit code.
    pub fn refusal(&self, line: &str) -> String {
        let output = self.run(line);
        let stderr = String::from_utf8_lossy(&output.stderr);
        let from = stderr.find("error: ").unwrap_or_else(|| panic!("{line} succeeds: {stderr}"));
        let said = stderr[from..].replace(&*self.root.path().to_string_lossy(), "HOME");
        let said = said.replace(&self.hub.endpoint, "ENDPOINT");
        format!("$ {line}\n{said}exit code {:?}\n", output.status.code().unwrap())
    }

    /// Serves by a command line, until it listens.
    pub fn serve(&self, line: &str) -> Server {
        let mut process = self.command(line).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let errors = BufReader::new(process.stderr.take().unwrap()).lines().map_while(Result::ok);
        let mut server = Server { process, url: String::new(), said: Vec::new(), errors: None };
        server.errors = Some(std::thread::spawn(move || errors.collect()));
        for said in lines.by_ref() {
            if let Some(url) = said.strip_prefix("listening on ") {
                server.url = url.to_owned();
                break;
            }
            server.said.push(said);
        }
        if server.url.is_empty() {
            let _ = server.process.wait();
            panic!("{line} never listened: {:#?}\n{:#?}", server.said, server.errors.take().map(|read| read.join()));
        }
        // Whatever else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        server
    }
}

/// Ends when the test does, however that is.
pub struct Server {
    process: Child,
    pub url: String,
    /// What it printed before it listened.
    pub said: Vec<String>,
    errors: Option<std::thread::JoinHandle<Vec<String>>>,
}

impl Server {
    /// The line that begins with a word.
    pub fn line(&self, word: &str) -> &str {
        let line = self.said.iter().find(|line| line.split_whitespace().next() == Some(word));
        line.unwrap_or_else(|| panic!("no `{word}`: {:#?}", self.said))
    }

    /// Has one chat with whatever is served.
    pub fn chat(&self) -> Value {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(async {
            let client = reqwest::Client::builder().no_proxy().build().unwrap();
            let models: Value =
                client.get(format!("{}/v1/models", self.url)).send().await.unwrap().json().await.unwrap();
            let body = json!({
                "model": models["data"][0]["id"], "max_tokens": 4, "temperature": 0,
                "messages": [{ "role": "user", "content": "Hi" }],
            });
            let request = client.post(format!("{}/v1/chat/completions", self.url)).json(&body);
            let response = request.send().await.unwrap();
            let (status, text) = (response.status().as_u16(), response.text().await.unwrap());
            assert_eq!(status, 200, "{text}");
            serde_json::from_str(&text).unwrap()
        })
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
