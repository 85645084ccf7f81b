//! `mesh-llm verify` on GGUF files: both backends on the same weights, and a check that can fail.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use conformance::shared::golden;
use serde_json::Value;

/// A cache of its own, and llama-server where its own tests install it.
struct House {
    root: tempfile::TempDir,
    config: PathBuf,
}

impl House {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let target = Path::new(env!("CARGO_BIN_EXE_mesh-llm")).parent().unwrap().parent().unwrap();
        let (config, folder) = (root.path().join("config.toml"), target.join("llama-server"));
        // One thread: tests run beside each other.
        let section = format!("install_dir = {folder:?}\nargs = [\"--threads\", \"1\"]\n");
        fs::write(&config, format!("[backends.llama-server]\n{section}")).unwrap();
        Self { root, config }
    }

    fn verify(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-llm"));
        command.arg("verify").args(args).arg("--config").arg(&self.config).args(["--color", "never"]);
        command.env("MESH_LLM_CACHE", self.root.path().join("cache")).output().unwrap()
    }
}

/// The GGUF of a golden, or a reason to skip.
fn gguf(name: &str) -> Option<String> {
    let file = golden(&format!("{name}/model.gguf"))?;
    Some(file.to_string_lossy().into_owned())
}

#[test]
fn both_backends_choose_the_same_tokens_of_a_gguf() {
    let house = House::new();
    for name in ["llama", "llama_untied", "qwen2", "qwen3"] {
        let Some(file) = gguf(name) else { return };
        let output = house.verify(&[&file, "--device", "cpu", "--json"]);
        assert!(output.status.success(), "{name}: {}", String::from_utf8_lossy(&output.stderr));
        let whole: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&whole["passed"], &whole["device"]), (&true.into(), &"cpu".into()), "{whole}");
        let prompts = whole["prompts"].as_array().unwrap();
        assert_eq!(prompts.len(), 3);
        for prompt in prompts {
            // A close choice may fall either way, and nothing after it is compared.
            assert!(prompt["equal"] == 32 || prompt["difference"]["margin"].as_f64().unwrap() < 0.05, "{whole}");
        }
    }
}

/// Turns the signs of every other weight of the last norm of an imported model.
fn damage(imported: &Path) {
    let path = imported.join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let start = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let header: Value = serde_json::from_slice(&bytes[8..start]).unwrap();
    let norm = &header["model.norm.weight"];
    assert_eq!(norm["dtype"], "F32");
    let at = |index: usize| start + norm["data_offsets"][index].as_u64().unwrap() as usize;
    (at(0) + 3..at(1)).step_by(8).for_each(|sign| bytes[sign] ^= 0x80);
    fs::write(&path, bytes).unwrap();
}

#[test]
fn weights_that_differ_are_noticed() {
    let Some(file) = gguf("qwen3") else { return };
    let house = House::new();
    let whole = house.verify(&[&file, "--device", "cpu"]);
    let text = String::from_utf8(whole.stdout).unwrap();
    assert_eq!(
        (whole.status.code(), text.lines().filter(|line| line.ends_with(" ok")).count()),
        (Some(0), 3),
        "{text}"
    );
    let imports = fs::read_dir(house.root.path().join("cache/imports")).unwrap().map(|entry| entry.unwrap().path());
    let imported: Vec<_> = imports.filter(|path| path.join("config.json").is_file()).collect();
    let [imported] = &imported[..] else { panic!("{imported:?}") };
    damage(imported);
    let damaged = house.verify(&[&file, "--device", "cpu"]);
    let text = String::from_utf8(damaged.stdout).unwrap();
    assert_eq!(damaged.status.code(), Some(1), "{text}");
    assert!(text.contains(" of 32 tokens equal, then ") && text.contains("FAILED"), "{text}");
}

#[test]
fn what_cannot_be_compared_is_refused() {
    let house = House::new();
    let refused = |args: &[&str], code: i32, part: &str| {
        let output = house.verify(args);
        let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(part), "{stderr}");
    };
    refused(&["x.gguf", "--bf16", "--tolerance", "1"], 2, "--bf16 is about directories");
    refused(&["./x.gguf"], 3, "no such file");
    refused(&["Qwen3-0.6B-MLX"], 3, "has no GGUF weights, only safetensors");
    let cut = house.root.path().join("cut.gguf");
    fs::write(&cut, b"GGUF\x03\0\0\0").unwrap();
    refused(&[&cut.to_string_lossy()], 3, "cut.gguf");
}
