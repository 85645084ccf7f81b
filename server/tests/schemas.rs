//! Schemas are kept to by what is served: the program on each backend, drawn hot, several requests at once.
#![cfg(target_os = "linux")]

// What kills and measures is for the test that it was written for.
#[allow(dead_code)]
#[path = "robust/program.rs"]
mod program;

use conformance::{schemas, shared::shared};
use futures::{StreamExt, stream};
use program::Program;
use reqwest::Client;
use serde_json::{Value, json};

const SCHEMAS: usize = 200;
const AT_ONCE: usize = 8;
/// Every answer ends before.
const TOKENS_MAX: u32 = 1800;

/// What came of a schema.
enum Outcome {
    Kept,
    /// Refused by name.
    Refused(String),
    /// Wrong for want of UTF-8.
    Broken(String),
    Failed(String),
}

async fn ask(client: &Client, program: &Program, model: &Value, seed: usize, schema: &Value) -> Outcome {
    let body = json!({
        "model": model,
        "messages": [{ "role": "user", "content": "the cat sat on the mat" }],
        "temperature": 1.5, "seed": seed, "max_tokens": TOKENS_MAX,
        "response_format": { "type": "json_schema", "json_schema": { "name": "it", "strict": true, "schema": schema } },
    });
    let response = client.post(format!("{}/v1/chat/completions", program.url)).json(&body).send().await.unwrap();
    let status = response.status().as_u16();
    let answer: Value = response.json().await.unwrap();
    let choice = &answer["choices"][0];
    match (status, choice["finish_reason"].as_str()) {
        (200, Some("stop")) => {
            let text = choice["message"]["content"].as_str().unwrap();
            match schemas::check(schema, text) {
                Ok(()) => Outcome::Kept,
                Err(what) if text.contains('\u{fffd}') => Outcome::Broken(what),
                Err(what) => Outcome::Failed(what),
            }
        }
        (400, None) if answer["error"]["param"] == "response_format" => Outcome::Refused(format!("{schema}: {answer}")),
        _ => Outcome::Failed(format!("{schema}: {status} {answer}")),
    }
}

/// What was not answered as it should be.
struct Rest {
    refused: Vec<String>,
    broken: Vec<String>,
}

/// Asks for an answer to each schema. None may be wrong for another reason than its bytes.
fn ask_all(args: &[&str], config: &str) -> Rest {
    let args = [args, &["--ctx", "2048", "--max-parallel", "8"]].concat();
    let program = Program::start(&args, config);
    let client = Client::builder().no_proxy().build().unwrap();
    let schemas = schemas::bounded(SCHEMAS);
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let outcomes: Vec<Outcome> = runtime.block_on(async {
        let models: Value =
            client.get(format!("{}/v1/models", program.url)).send().await.unwrap().json().await.unwrap();
        let model = &models["data"][0]["id"];
        let schemas = stream::iter(schemas.iter().enumerate());
        let asked = schemas.map(|(seed, schema)| ask(&client, &program, model, seed, schema));
        asked.buffer_unordered(AT_ONCE).collect().await
    });
    let (mut rest, mut failed) = (Rest { refused: Vec::new(), broken: Vec::new() }, Vec::new());
    for outcome in outcomes {
        match outcome {
            Outcome::Kept => {}
            Outcome::Refused(what) => rest.refused.push(what),
            Outcome::Broken(what) => rest.broken.push(what),
            Outcome::Failed(what) => failed.push(what),
        }
    }
    assert!(failed.is_empty(), "{} of {SCHEMAS}: {failed:#?}", failed.len());
    rest
}

#[test]
fn every_answer_on_mlx_validates() {
    let Some(weights) = shared("every_answer_on_mlx_validates", "golden/llama/model.safetensors") else { return };
    let rest = ask_all(&["--mlx-file", &weights.to_string_lossy()], "[backends.mlx]\ndevice = \"cpu\"\n");
    assert!(rest.refused.is_empty() && rest.broken.is_empty(), "{:#?} {:#?}", rest.refused, rest.broken);
}

/// What that backend cannot be trusted with is refused: seven of ten have to be answered. What the others ask for is above
/// all a bound for numbers that need not be whole. Its grammars take some bytes that are no UTF-8 for a character, which a model has to be as small as this one to write.
#[test]
fn every_answer_on_llama_server_validates() {
    let Some(gguf) = shared("every_answer_on_llama_server_validates", "golden/llama/model.gguf") else { return };
    let config = "[backends.llama-server]\ninstall_dir = {DIR}\nargs = [\"--threads\", \"1\"]\n";
    let Rest { refused, broken } = ask_all(&["--gguf-file", &gguf.to_string_lossy()], config);
    println!("refused: {refused:#?}\nbroken: {broken:#?}");
    assert!(refused.len() <= SCHEMAS * 3 / 10, "{} of {SCHEMAS} are refused", refused.len());
    assert!(broken.len() <= SCHEMAS / 50, "{} of {SCHEMAS} are no UTF-8", broken.len());
}
