//! The program with a tiny model on one of the backends, and how it is asked.

use std::{collections::BTreeSet, fs, os::unix::fs::symlink, path::Path};

use conformance::shared::golden;
use reqwest::Client;
use serde_json::{Map, Value, json};
use tokio::runtime::Runtime;

use crate::program::Program;

/// What the model is asked to continue.
pub const PROMPT: &str = "the cat sat on the mat";

/// The model.
const GOLDEN: &str = "qwen3";

/// A template that reads a switch for reasoning and a variable of its own, and shows tools. The name `hello` is nobody
/// else's.
const TEMPLATE: &str = "{%- if tools %}{{ (tools | tojson) }}{%- endif %}{%- for m in messages %}{{ m['role'] + ': ' + \
                        (m['content'] or '') + '\\n' }}{%- endfor %}{{ hello or '' }}{%- if enable_thinking %}{{ \
                        '<think>' }}{%- endif %}";

/// Who computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backend {
    Mlx,
    LlamaServer,
}

/// The program, serving.
pub struct Server {
    pub backend: Backend,
    program: Program,
    client: Client,
    runtime: Runtime,
    model: String,
    document: Value,
    _files: tempfile::TempDir,
}

impl Server {
    /// On MLX, or a reason to skip.
    pub fn mlx() -> Option<Self> {
        let golden = golden(GOLDEN)?;
        let files = tempfile::tempdir().unwrap();
        for name in ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"] {
            symlink(golden.join(name), files.path().join(name)).unwrap();
        }
        let config = fs::read_to_string(golden.join("tokenizer_config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["chat_template"] = TEMPLATE.into();
        fs::write(files.path().join("tokenizer_config.json"), config.to_string()).unwrap();
        let weights = files.path().join("model.safetensors");
        let config = "[backends.mlx]\ndevice = \"cpu\"\n";
        Some(Self::start(Backend::Mlx, &["--mlx-file", &weights.to_string_lossy()], config, files))
    }

    /// On llama-server, or a reason to skip.
    pub fn llama_server() -> Option<Self> {
        let golden = golden(GOLDEN)?;
        let files = tempfile::tempdir().unwrap();
        let gguf = files.path().join("model.gguf");
        fs::write(&gguf, with_template(&golden)).unwrap();
        Some(Self::on_gguf(&gguf, files))
    }

    /// On llama-server, with the model's own template, which has no switch for reasoning; or a reason to skip.
    pub fn without_a_switch() -> Option<Self> {
        Some(Self::on_gguf(&golden(GOLDEN)?.join("model.gguf"), tempfile::tempdir().unwrap()))
    }

    fn on_gguf(gguf: &Path, files: tempfile::TempDir) -> Self {
        let config = "[backends.llama-server]\ninstall_dir = {DIR}\nargs = [\"--threads\", \"1\"]\n";
        Self::start(Backend::LlamaServer, &["--gguf-file", &gguf.to_string_lossy()], config, files)
    }

    fn start(backend: Backend, args: &[&str], config: &str, files: tempfile::TempDir) -> Self {
        let program = Program::start(&[args, &["--ctx", "2048"]].concat(), config);
        let runtime = Runtime::new().unwrap();
        let client = Client::builder().no_proxy().build().unwrap();
        let get = |path: &str| -> Value {
            let answer = async { client.get(format!("{}{path}", program.url)).send().await.unwrap().json().await };
            runtime.block_on(answer).unwrap()
        };
        let model = get("/v1/models")["data"][0]["id"].as_str().unwrap().to_owned();
        let document = get("/openapi.json");
        Self { backend, program, client, runtime, model, document, _files: files }
    }

    /// The parameters that the program says it knows there.
    pub fn documented(&self, path: &str) -> BTreeSet<String> {
        let schema =
            &self.document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]["$ref"];
        let schema = self.document.pointer(schema.as_str().unwrap().trim_start_matches('#')).unwrap();
        schema["properties"].as_object().unwrap().keys().cloned().collect()
    }
}

/// A surface of the program.
pub struct Surface<'a> {
    pub server: &'a Server,
    pub path: &'static str,
    /// What each request has that does not say otherwise.
    pub base: Value,
}

impl Surface<'_> {
    pub fn on_mlx(&self) -> bool {
        self.server.backend == Backend::Mlx
    }

    fn send(&self, more: &Value) -> (u16, String, String) {
        let mut body = json!({ "model": self.server.model });
        let fields: &mut Map<_, _> = body.as_object_mut().unwrap();
        for part in [&self.base, more] {
            fields.extend(part.as_object().unwrap().clone());
        }
        let request = self.server.client.post(format!("{}{}", self.server.program.url, self.path)).json(&body);
        self.server.runtime.block_on(async {
            let response = request.send().await.unwrap();
            let form = response.headers()["content-type"].to_str().unwrap().to_owned();
            (response.status().as_u16(), form, response.text().await.unwrap())
        })
    }

    /// Status and answer.
    pub fn ask(&self, more: &Value) -> (u16, Value) {
        let (status, form, text) = self.send(more);
        assert!(form.starts_with("application/json"), "{more}: {form}");
        (status, serde_json::from_str(&text).unwrap())
    }

    /// The answer to what is accepted.
    pub fn answer(&self, more: &Value) -> Value {
        let (status, answer) = self.ask(more);
        assert_eq!(status, 200, "{} {more}: {answer}", self.path);
        answer
    }

    /// What the model wrote.
    pub fn text(&self, more: &Value) -> String {
        let mut text = String::new();
        said(&self.answer(more), &mut text);
        text
    }

    /// What is sent to a client that asks for events.
    pub fn events(&self, more: &Value) -> Vec<Value> {
        let (status, form, text) = self.send(more);
        assert_eq!((status, form.starts_with("text/event-stream")), (200, true), "{} {more}: {form}", self.path);
        let data = text.lines().filter_map(|line| line.strip_prefix("data: "));
        data.filter(|data| *data != "[DONE]").map(|data| serde_json::from_str(data).unwrap()).collect()
    }

    /// Asserts that it is refused, and that the error names the parameter, or a part of it.
    pub fn refuses(&self, name: &str, more: &Value) {
        let (status, answer) = self.ask(more);
        assert_eq!(status, 400, "{} {more}: {answer}", self.path);
        let error = &answer["error"];
        // Anthropic's form has a message only.
        let named = match error.get("param") {
            Some(param) => param.as_str().is_some_and(|param| param.split(['.', '[']).next() == Some(name)),
            None => error["message"].as_str().unwrap().contains(name),
        };
        assert!(named, "{} {more} does not name `{name}`: {answer}", self.path);
    }

    /// Asserts that the answer is the one that comes without.
    pub fn changes_nothing(&self, more: &Value) {
        assert_eq!(self.text(more), self.text(&json!({})), "{} {more}", self.path);
    }
}

/// All that the model wrote, reasoning and content.
pub fn said(answer: &Value, text: &mut String) {
    match answer {
        Value::Object(fields) => {
            for (key, value) in fields {
                match (key.as_str(), value) {
                    ("text" | "content" | "reasoning_content" | "thinking", Value::String(part)) => text.push_str(part),
                    (_, value) => said(value, text),
                }
            }
        }
        Value::Array(values) => values.iter().for_each(|value| said(value, text)),
        _ => {}
    }
}

/// Tokens of the prompt.
pub fn read(answer: &Value) -> u64 {
    let usage = &answer["usage"];
    let all = usage["prompt_tokens"].as_u64().or_else(|| usage["input_tokens"].as_u64()).unwrap();
    // Anthropic counts apart what was remembered.
    all + usage["cache_read_input_tokens"].as_u64().unwrap_or(0)
}

/// Tokens of the answer.
pub fn written(answer: &Value) -> u64 {
    let usage = &answer["usage"];
    usage["completion_tokens"].as_u64().or_else(|| usage["output_tokens"].as_u64()).unwrap()
}

/// The golden's GGUF with [`TEMPLATE`]. Strings have their length before them, so this one is made as long as the one
/// whose place it takes.
fn with_template(golden: &Path) -> Vec<u8> {
    let config = fs::read_to_string(golden.join("tokenizer_config.json")).unwrap();
    let config: Value = serde_json::from_str(&config).unwrap();
    let old = config["chat_template"].as_str().unwrap();
    let new = format!("{TEMPLATE}{{#{:1$}#}}", "", old.len() - TEMPLATE.len() - 4);
    let mut bytes = fs::read(golden.join("model.gguf")).unwrap();
    let at = bytes.windows(old.len()).position(|window| window == old.as_bytes()).unwrap();
    bytes[at..at + old.len()].copy_from_slice(new.as_bytes());
    bytes
}
