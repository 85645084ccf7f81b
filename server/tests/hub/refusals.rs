//! What people read when a model cannot be had: what was wrong, and the next command.

use std::fs;

use crate::home::{ANSWERS, Home, golden};

const SOUND: &[(&str, &[u8])] = &[("config.json", b"{}"), ("model.safetensors", b"weights"), ("tokenizer.json", b"{}")];

#[test]
fn refusals_name_the_next_command() {
    let home = Home::new();
    let hub = &home.hub;
    hub.put("org/plain", SOUND);
    hub.put("org/gated", SOUND);
    hub.gate("org/gated");
    hub.put("org/both", &[SOUND[0], SOUND[1], SOUND[2], ("m-Q4_K_M.gguf", b"GGUF"), ("m-Q8_0.gguf", b"GGUF1")]);
    hub.put("org/models", &[("one-Q4_0.gguf", b"GGUF"), ("two-Q4_0.gguf", b"GGUF")]);
    hub.put("org/bare", &[SOUND[1], SOUND[2]]);
    hub.put("org/pickled", &[SOUND[0], ("pytorch_model.bin", b"pickle"), SOUND[2]]);
    let lines = [
        // Ambiguity.
        "mesh-llm --model org/both",
        "mesh-llm --model org/models",
        // A flag for what is not there.
        "mesh-llm --model org/plain --gguf",
        "mesh-llm models download org/models --mlx",
        // A file that is missing, and weights that are not read.
        "mesh-llm --model org/bare --mlx",
        "mesh-llm models download org/pickled",
        // Who may not, and what there is not.
        "mesh-llm models download org/gated",
        "mesh-llm models download org/none",
        "mesh-llm models download org/plain@v2",
        "mesh-llm models download org/plain/model.safetensor",
        "mesh-llm --model org/models:Q4_1",
        // Nearly right.
        "mesh-llm --model Qwen3-4B-MXL",
        "mesh-llm models download nothing-like-it",
        // Without the network.
        "mesh-llm models download org/plain --offline",
        "mesh-llm --model Qwen3-4B-MLX --mlx --offline",
        // What is not in the cache.
        "mesh-llm models remove org/plain",
        "mesh-llm models remove ~/.config",
        "mesh-llm models verify org/plain",
        "mesh-llm models search nothing-like-it",
    ];
    let said: Vec<String> = lines.iter().map(|line| home.refusal(line)).collect();
    insta::assert_snapshot!(said.join("\n"));
    let files = |name: &str| home.cached(name).join("blobs").exists();
    assert!(!["org/both", "org/bare", "org/pickled", "org/none"].iter().any(|name| files(name)), "nothing was fetched");
    assert!(home.path(".config/mesh-llm/config.toml").is_file());
}

#[test]
fn a_token_opens_what_is_gated_and_goes_nowhere_else() {
    let home = Home::new();
    home.hub.put("org/gated", SOUND);
    home.hub.gate("org/gated");
    let output =
        home.command("mesh-llm models download org/gated").env("HF_TOKEN", conformance::hub::TOKEN).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let requests = home.hub.requests();
    assert!(requests.iter().any(|request| request.token));
    let large: Vec<_> = requests.iter().filter(|request| request.large).collect();
    assert!(!large.is_empty() && large.iter().all(|request| !request.token), "the other host learns no token");
    let shown = [output.stdout, output.stderr].concat();
    assert!(!String::from_utf8_lossy(&shown).contains(conformance::hub::TOKEN));

    // As the hub's own tools keep it.
    let home = Home::new();
    home.hub.put("org/gated", SOUND);
    home.hub.gate("org/gated");
    fs::create_dir_all(home.path("hf")).unwrap();
    fs::write(home.path("hf/token"), format!("{}\n", conformance::hub::TOKEN)).unwrap();
    home.done("mesh-llm models download org/gated");
}

#[test]
fn an_architecture_that_nobody_knows_is_named() {
    let Some(checkpoint) = golden("qwen3-q4") else { return };
    let home = Home::new();
    let copy = home.path("copy");
    fs::create_dir_all(&copy).unwrap();
    for entry in fs::read_dir(&checkpoint).unwrap().flatten() {
        fs::write(copy.join(entry.file_name()), fs::read(entry.path()).unwrap()).unwrap();
    }
    let config = fs::read_to_string(copy.join("config.json")).unwrap();
    fs::write(copy.join("config.json"), config.replace("qwen3", "abacus").replace("Qwen3", "Abacus")).unwrap();
    home.hub.put_directory("org/abacus", &copy, ANSWERS);
    insta::assert_snapshot!(home.refusal("mesh-llm --model org/abacus --mlx"));
}

#[test]
fn without_a_hub_what_is_there_is_said() {
    let home = Home::new();
    let closed = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let output = home
        .command("mesh-llm models download org/plain")
        .env("HF_ENDPOINT", format!("http://{closed}"))
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&output.stderr).replace(&closed.to_string(), "ENDPOINT");
    assert_eq!(output.status.code(), Some(3));
    insta::assert_snapshot!(stderr);
}
