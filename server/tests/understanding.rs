//! `mesh-llm models show`, `import` and `convert`, as people use them.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use conformance::shared::golden;
use serde_json::{Value, json};

/// A home of its own for a process.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn run(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-llm"));
        command.args(args).args(["--color", "never"]).env("HF_HUB_OFFLINE", "1");
        command.env("HOME", self.0.path()).env("MESH_LLM_CACHE", self.0.path().join("cache"));
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "MESH_LLM_LOG"] {
            command.env_remove(name);
        }
        command.output().unwrap()
    }

    /// What a command that succeeds says.
    fn said(&self, args: &[&str]) -> String {
        let output = self.run(args);
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.said(args)).unwrap()
    }

    /// What a command that fails says, with its exit code.
    fn refused(&self, args: &[&str]) -> (String, i32) {
        let output = self.run(args);
        assert!(!output.status.success(), "{args:?}");
        (String::from_utf8(output.stderr).unwrap(), output.status.code().unwrap())
    }

    fn at(&self, name: &str) -> String {
        self.0.path().join(name).to_string_lossy().into_owned()
    }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_model_is_shown_with_sources_memory_and_who_would_serve_it() {
    let home = Home::new();
    let Some(directory) = golden("qwen3_moe-q4") else { return };
    let said = home.said(&["models", "show", text(&directory), "--ctx", "1000"]);
    for part in [
        "`num_experts_per_tok` in config.json",
        "parameters_active",
        "its chat template (`chat_template` in tokenizer_config.json)",
        "experts    affine 4-bit group 32",
        "1000 tokens",
        "mlx would serve it",
        "llama-server refuses it",
    ] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let whole = home.json(&["models", "show", text(&directory), "--ctx", "1000", "--json", "--mlx"]);
    assert_eq!(whole["elected"], "mlx");
    let memory = &whole["memory"];
    assert_eq!(
        (memory.as_array().unwrap().len(), &memory[0]["backend"]),
        (1, &json!("mlx")),
        "llama-server reads none"
    );
    let need = &memory[0]["need"];
    // Keys and values of 3 layers, of 2 heads of 32 values, with room for 1024 tokens: f32 on a CPU, or else half of that.
    let values = 3 * 2 * 2 * 32 * 1024;
    let cache = need["cache_bytes"].as_u64().unwrap();
    assert!(cache == 4 * values || cache == 2 * values, "{need}");
    assert!(need["device_bytes"].as_u64() > need["weights_bytes"].as_u64(), "{need}");
    let able =
        |name: &str| whole["abilities"].as_array().unwrap().iter().find(|ability| ability["name"] == name).unwrap();
    assert_eq!((&able("chat")["there"], &able("vision")["there"]), (&json!(true), &json!(false)));
    assert!(whole["stored"]["value"].as_array().unwrap().iter().any(|row| row["part"] == "experts"));

    let Some(file) = golden("llama/model.gguf") else { return };
    let whole = home.json(&["models", "show", text(&file), "--json", "--ctx", "100"]);
    let kv = whole["kept"]["value"]["token_values"].as_u64().unwrap();
    assert_eq!(whole["memory"][0]["backend"], "llama-server");
    let need = &whole["memory"][0]["need"];
    assert!(need.is_null() || need["cache_bytes"] == 100 * kv * 2, "{need}");
}

#[test]
fn a_gguf_is_imported_and_what_came_of_it_is_said() {
    let Some(file) = golden("llama/model.gguf") else { return };
    let home = Home::new();
    let out = home.at("made/llama");
    let said = home.said(&["models", "import", text(&file), &out]);
    assert!(said.contains("attention  F32   F32") && said.contains("none, the same bits"), "{said}");
    assert!(said.contains(&format!("mesh-llm --model {out} --mlx")), "{said}");
    let (said, code) = home.refused(&["models", "import", text(&file), &out]);
    assert!(said.contains("exists already") && said.contains("hint:") && code == 3, "{said}");
    let whole = home.json(&["models", "import", text(&file), &home.at("again"), "--exact", "--json"]);
    assert!(whole["parts"].as_array().unwrap().iter().all(|part| part["changed"] == 0), "{whole}");
    assert_eq!(whole["architecture"], "llama");
    let shown = home.json(&["models", "show", &out, "--json", "--mlx"]);
    assert_eq!(shown["elected"], "mlx");
}

#[test]
fn a_checkpoint_is_converted_and_the_error_is_said() {
    let Some(directory) = golden("qwen3_moe") else { return };
    let home = Home::new();
    let out = home.at("made/q6");
    let args = ["models", "convert", text(&directory), &out, "--bits", "6", "--group-size", "32"];
    let said = home.said(&args);
    for part in ["experts    affine 6-bit group 32", "left as it is: decides which experts are asked", "converted"] {
        assert!(said.contains(part), "{part}: {said}");
    }
    let config: Value = serde_json::from_slice(&fs::read(Path::new(&out).join("config.json")).unwrap()).unwrap();
    assert_eq!(config["quantization"], json!({ "group_size": 32, "bits": 6, "mode": "affine" }));
    let (said, code) = home.refused(&["models", "convert", &out, &home.at("twice")]);
    assert!(said.contains("quantized already: affine 6-bit group 32 (`quantization` in config.json)"), "{said}");
    assert!(said.contains("hint:") && code == 3, "{said}");
    let (said, code) = home.refused(&["models", "convert", text(&directory), &home.at("x"), "--mode", "gptq"]);
    assert!(said.contains("there is no mode `gptq`") && code == 2, "{said}");
    let shown = home.json(&["models", "show", &out, "--json", "--mlx"]);
    assert_eq!(shown["elected"], "mlx");
}
