//! Two models of a size that shows, and memory for one of them: what is unloaded is really given back.
#![cfg(target_os = "linux")]

use std::{
    fs,
    io::{BufRead, BufReader},
    path::Path,
    process::{Child, Command, Stdio},
};

use conformance::shared::golden;
use safetensors::{Dtype, View};
use serde_json::{Value, json};

const HIDDEN: usize = 1024;
const INTERMEDIATE: usize = 4096;
const HEADS: usize = 16;
const KV_HEADS: usize = 4;
const HEAD_DIM: usize = HIDDEN / HEADS;
const LAYERS: usize = 1;

/// Swaps before anything is compared: allocators, thread pools and caches find their size.
const WARM_UP: usize = 10;
const SWAPS: usize = 100;

/// Weights that cost no memory here: a block of floats, over and over.
struct Floats<'a> {
    shape: Vec<usize>,
    block: &'a [u8],
}

impl View for Floats<'_> {
    fn dtype(&self) -> Dtype {
        Dtype::F32
    }

    fn shape(&self) -> &[usize] {
        &self.shape
    }

    fn data(&self) -> std::borrow::Cow<'_, [u8]> {
        self.block.iter().copied().cycle().take(self.data_len()).collect()
    }

    fn data_len(&self) -> usize {
        self.shape.iter().product::<usize>() * size_of::<f32>()
    }
}

/// A llama with weights of its own, in a directory of that name. Returns the bytes of its weights.
fn checkpoint(golden: &Path, dir: &Path, seed: u32) -> u64 {
    fs::create_dir(dir).unwrap();
    for file in ["tokenizer.json", "tokenizer_config.json", "generation_config.json"] {
        fs::copy(golden.join(file), dir.join(file)).unwrap();
    }
    let mut config: Value = serde_json::from_slice(&fs::read(golden.join("config.json")).unwrap()).unwrap();
    for (key, value) in [
        ("hidden_size", HIDDEN),
        ("intermediate_size", INTERMEDIATE),
        ("num_attention_heads", HEADS),
        ("num_key_value_heads", KV_HEADS),
        ("head_dim", HEAD_DIM),
        ("num_hidden_layers", LAYERS),
    ] {
        config[key] = value.into();
    }
    fs::write(dir.join("config.json"), config.to_string()).unwrap();

    // Knuth's linear congruential generator. A prime length, so that no two rows are alike.
    let mut state = seed;
    let block: Vec<u8> = (0..65_521)
        .flat_map(|_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            ((state >> 8) as f32 / (1 << 24) as f32 - 0.5).to_le_bytes()
        })
        .collect();
    let vocab = config["vocab_size"].as_u64().unwrap() as usize;
    let mut shapes =
        vec![("model.embed_tokens.weight".to_owned(), vec![vocab, HIDDEN]), ("model.norm.weight".into(), vec![HIDDEN])];
    for layer in 0..LAYERS {
        for (name, shape) in [
            ("input_layernorm", vec![HIDDEN]),
            ("post_attention_layernorm", vec![HIDDEN]),
            ("mlp.gate_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.up_proj", vec![INTERMEDIATE, HIDDEN]),
            ("mlp.down_proj", vec![HIDDEN, INTERMEDIATE]),
            ("self_attn.q_proj", vec![HIDDEN, HIDDEN]),
            ("self_attn.k_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.v_proj", vec![KV_HEADS * HEAD_DIM, HIDDEN]),
            ("self_attn.o_proj", vec![HIDDEN, HIDDEN]),
        ] {
            shapes.push((format!("model.layers.{layer}.{name}.weight"), shape));
        }
    }
    let tensors = shapes.into_iter().map(|(name, shape)| (name, Floats { shape, block: &block }));
    safetensors::serialize_to_file(tensors, None, &dir.join("model.safetensors")).unwrap();
    fs::metadata(dir.join("model.safetensors")).unwrap().len()
}

/// Ends the server when the test does, however that is.
struct Server {
    process: Child,
    url: String,
    client: reqwest::Client,
}

impl Server {
    fn start(home: &Path, models: &[&Path], more: &[&str]) -> Self {
        let config = home.join("config.toml");
        fs::write(&config, "offline = true\nctx = 256\n[backends.mlx]\ndevice = \"cpu\"\n").unwrap();
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-llm"));
        command.args(["--mlx", "--port", "0", "--config"]).arg(&config).args(more);
        for model in models {
            command.arg("--model").arg(model);
        }
        let mut process = command
            .env("HOME", home)
            .env("MESH_LLM_CACHE", home.join("cache"))
            // Its threads wait for each other by turning around, which takes for ever where others compute too.
            .env("OPENBLAS_NUM_THREADS", "1")
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(process.stdout.take().unwrap()).lines().map_while(Result::ok);
        let url = lines.find_map(|line| line.strip_prefix("listening on ").map(str::to_owned));
        let url = url.expect("it never listened");
        // Whatever else it says must not block it.
        std::thread::spawn(move || lines.for_each(drop));
        Self { process, url, client: reqwest::Client::builder().no_proxy().build().unwrap() }
    }

    async fn answer(&self, model: &str) -> String {
        let body = json!({ "model": model, "prompt": "hello", "temperature": 0, "max_tokens": 3, "ignore_eos": true });
        let response = self.client.post(format!("{}/v1/completions", self.url)).json(&body).send().await.unwrap();
        let (status, answer) = (response.status(), response.json::<Value>().await.unwrap());
        assert_eq!(status.as_u16(), 200, "{answer}");
        answer["choices"][0]["text"].as_str().unwrap().to_owned()
    }

    async fn statuses(&self) -> Vec<String> {
        let response = self.client.get(format!("{}/health", self.url)).send().await.unwrap();
        let health: Value = response.json().await.unwrap();
        let models = health["models"].as_array().unwrap();
        models.iter().map(|model| model["status"].as_str().unwrap().to_owned()).collect()
    }

    fn resident_bytes(&self) -> u64 {
        let status = fs::read_to_string(format!("/proc/{}/status", self.process.id())).unwrap();
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
        line.trim().strip_suffix("kB").unwrap().trim().parse::<u64>().unwrap() << 10
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

fn median(values: &[u64]) -> u64 {
    let mut values = values.to_vec();
    values.sort_unstable();
    values[values.len() / 2]
}

#[tokio::test]
async fn models_are_swapped_without_growth() {
    let Some(golden) = golden("llama") else { return };
    let home = tempfile::tempdir().unwrap();
    let (a, b) = (home.path().join("a"), home.path().join("b"));
    let bytes = checkpoint(&golden, &a, 1);
    assert_eq!(checkpoint(&golden, &b, 2), bytes);

    let alone = Server::start(home.path(), &[&a], &[]);
    let first = alone.answer("a").await;
    alone.answer("a").await;
    let alone_bytes = alone.resident_bytes();
    drop(alone);

    // MLX counts with what 16-bit weights would come to in f32, twice as many bytes, and with what a pass takes: so this is
    // room for one.
    let budget = (4 * bytes).to_string();
    let server = Server::start(home.path(), &[&a, &b], &["--memory", &budget]);
    let second = server.answer("b").await;
    assert_ne!(first, second, "the models cannot be told apart");
    let mut resident = Vec::new();
    for swap in 0..WARM_UP + SWAPS {
        let (model, answer, statuses) = match swap % 2 {
            0 => ("a", &first, ["ready", "cold"]),
            _ => ("b", &second, ["cold", "ready"]),
        };
        assert_eq!(server.answer(model).await, *answer, "swap {swap}");
        assert_eq!(server.statuses().await, statuses, "swap {swap}");
        resident.push(server.resident_bytes());
    }
    let measured = &resident[WARM_UP..];
    let (early, late) = (median(&measured[..SWAPS / 3]), median(&measured[SWAPS - SWAPS / 3..]));
    let most = *measured.iter().max().unwrap();
    let mib = |bytes: u64| bytes >> 20;
    println!("resident: alone {}, early {}, late {}, most {} MiB", mib(alone_bytes), mib(early), mib(late), mib(most));
    assert!(late <= early + bytes / 16, "resident memory grew from {} to {} MiB", mib(early), mib(late));
    assert!(most < alone_bytes + bytes / 2, "{} MiB is more than one model takes, {} MiB", mib(most), mib(alone_bytes));
}
