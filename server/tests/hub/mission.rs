//! The command lines of the documentation, as they stand, with tiny checkpoints under the published names.

use std::{collections::BTreeMap, fs, path::Path};

use serde_json::{Value, json};

use crate::home::{ANSWERS, Home, golden};

/// The repository whose name stands in several of them.
const QWEN: &str = "mlx-community/Qwen2.5-0.5B-Instruct-4bit";
/// A repository of safetensors and GGUF.
const SOME: &str = "some-org/some-repo";

/// A checkpoint's index, as published beside a single file, too.
fn index(weights: &Path) -> Vec<u8> {
    let bytes = fs::read(weights).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: BTreeMap<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
    let tensors = header.keys().filter(|name| *name != "__metadata__");
    let map: BTreeMap<_, _> = tensors.map(|name| (name.clone(), "model.safetensors")).collect();
    json!({ "metadata": {}, "weight_map": map }).to_string().into_bytes()
}

/// A home whose hub has all that is named.
fn home() -> Option<Home> {
    let home = Home::new();
    for (repo, name) in [
        ("mlx-community/Qwen3-4B-4bit", "qwen3-q4"),
        ("mlx-community/gemma-2-2b-it-4bit", "gemma2"),
        ("mlx-community/GLM-4-9B-0414-4bit", "glm4"),
        ("mlx-community/LFM2-350M-4bit", "lfm2-q4"),
    ] {
        home.hub.put_directory(repo, &golden(name)?, ANSWERS);
    }
    let qwen = golden("qwen2")?;
    let mut files: Vec<(String, Vec<u8>)> = Vec::new();
    for entry in fs::read_dir(&qwen).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !ANSWERS.contains(&name.as_str()) {
            files.push((name, fs::read(entry.path()).unwrap()));
        }
    }
    files.push(("model.safetensors.index.json".into(), index(&qwen.join("model.safetensors"))));
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (name.as_str(), &content[..])).collect();
    home.hub.put(QWEN, &files);
    let without: Vec<_> = ANSWERS.iter().copied().filter(|name| *name != "model.gguf").collect();
    home.hub.put_directory(SOME, &golden("llama")?, &without);
    Some(home)
}

fn served(home: &Home, line: &str, backend: &str, format: &str) {
    let server = home.serve(line);
    let elected = server.line("backend").to_owned();
    assert!(elected.contains(&format!("{backend} on ")), "{line}: {elected}");
    assert!(server.line("found").contains(format), "{line}: {:?}", server.said);
    let answer = server.chat();
    assert!(answer["usage"]["completion_tokens"].as_u64().is_some_and(|tokens| tokens > 0), "{line}: {answer}");
}

#[test]
fn catalog_names_are_fetched_and_served_by_mlx() {
    let Some(home) = home() else { return };
    for (line, repo) in [
        ("mesh-llm --model Qwen3-4B-MLX --mlx", "mlx-community/Qwen3-4B-4bit"),
        ("mesh-llm --model Gemma-2-2B-it-MLX --mlx", "mlx-community/gemma-2-2b-it-4bit"),
        ("mesh-llm --model GLM-4-9B-0414-MLX --mlx", "mlx-community/GLM-4-9B-0414-4bit"),
        ("mesh-llm --model LFM2-350M-MLX --mlx", "mlx-community/LFM2-350M-4bit"),
    ] {
        served(&home, line, "mlx", "safetensors");
        let files = fs::read_dir(home.cached(repo).join("snapshots")).unwrap().flatten().next().unwrap();
        for file in
            ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
        {
            assert!(files.path().join(file).is_file(), "{line}: {file}");
        }
    }
}

#[test]
fn what_was_downloaded_is_served_without_the_hub() {
    let Some(home) = home() else { return };
    for line in [
        "mesh-llm models download Qwen3-4B-MLX",
        "mesh-llm models download LFM2-350M-MLX",
        "mesh-llm models download mlx-community/Qwen2.5-0.5B-Instruct-4bit",
    ] {
        assert!(home.done(line).contains("ready"), "{line}");
    }
    let requests = home.hub.requests().len();
    served(&home, "mesh-llm --model Qwen3-4B-MLX --mlx --offline", "mlx", "safetensors");
    served(&home, &format!("mesh-llm --model {QWEN} --mlx --offline"), "mlx", "safetensors");
    let index = format!("mesh-llm --model {QWEN}/model.safetensors.index.json --mlx --offline");
    served(&home, &index, "mlx", "safetensors");
    assert_eq!(home.hub.requests().len(), requests);
}

#[test]
fn repositories_and_files_in_them_are_served() {
    let Some(home) = home() else { return };
    let index = "mesh-llm --model mlx-community/Qwen2.5-0.5B-Instruct-4bit/model.safetensors.index.json --mlx";
    served(&home, index, "mlx", "safetensors");
    served(&home, "mesh-llm --model mlx-community/Qwen2.5-0.5B-Instruct-4bit --mlx", "mlx", "safetensors");
    served(&home, "mesh-llm --model some-org/some-repo --mlx", "mlx", "safetensors");
    served(&home, "mesh-llm --model some-org/some-repo --gguf", "llama-server", "GGUF");
}

#[test]
fn files_on_disk_are_served() {
    let Some(home) = home() else { return };
    let (models, llama, qwen) = (home.path("models"), golden("llama").unwrap(), golden("qwen2").unwrap());
    fs::create_dir_all(models.join("qwen-mlx")).unwrap();
    fs::copy(llama.join("model.gguf"), models.join("custom.gguf")).unwrap();
    for file in
        ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    {
        fs::copy(qwen.join(file), models.join("qwen-mlx").join(file)).unwrap();
    }
    served(&home, "mesh-llm --gguf-file ~/models/custom.gguf", "llama-server", "GGUF");
    served(&home, "mesh-llm --mlx-file ~/models/qwen-mlx/model.safetensors", "mlx", "safetensors");
    assert!(home.hub.requests().is_empty(), "what is on disk is nobody's business");
}
