//! The binary as people use it: what it prints, what it exits with, and that it serves.

use std::{
    io::{BufRead, BufReader},
    process::{Command, Output, Stdio},
};

use conformance::shared::golden;
use serde_json::{Value, json};

/// A home of its own for a process, so that nobody's configuration or models play a part.
struct Home(tempfile::TempDir);

impl Home {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_mesh-llm"));
        command.args(args).env("HOME", self.0.path()).env("MESH_LLM_CACHE", self.0.path().join("cache"));
        for name in ["XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_CACHE_HOME", "HF_HOME", "HF_HUB_CACHE", "MESH_LLM_LOG"] {
            command.env_remove(name);
        }
        command
    }

    fn run(&self, args: &[&str]) -> Output {
        self.command(args).stdin(Stdio::null()).output().unwrap()
    }

    /// What a command that fails says, with its exit code.
    fn refusal(&self, args: &[&str]) -> String {
        let output = self.run(args);
        let stderr = String::from_utf8_lossy(&output.stderr).replace(&*self.0.path().to_string_lossy(), "HOME");
        format!("$ mesh-llm {}\n{stderr}exit code {:?}\n", args.join(" "), output.status.code().unwrap())
    }
}

#[test]
fn mistakes_are_answered_with_a_way_out() {
    let home = Home::new();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    std::fs::create_dir_all(home.0.path().join("empty")).unwrap();
    let refusals = [
        home.refusal(&["--model", "Qwen3-4", "--offline", "--port", "0"]),
        home.refusal(&["--model", "./no/such/model", "--port", "0"]),
        home.refusal(&["--backend", "abacus", "--port", "0"]),
        home.refusal(&["--mlx", "--gguf"]),
        home.refusal(&["--port", &port]).replace(&port, "PORT"),
        home.refusal(&["--config", "no/such/config.toml"]),
        home.refusal(&["backends", "install", "abacus"]),
        home.refusal(&["backends", "install", "mlx"]),
        home.refusal(&["explain", "Qwen3-4", "--offline"]),
        home.refusal(&["chat", "--url", &format!("http://127.0.0.1:{port}/"), "--model", "x", "--mlx"])
            .replace(&port, "PORT"),
    ];
    insta::assert_snapshot!(refusals.join("\n"));
}

#[test]
fn an_unknown_section_of_the_configuration_is_named() {
    let home = Home::new();
    let path = home.0.path().join("config.toml");
    std::fs::write(&path, "[backends.abacus]\nbeads = 10\n").unwrap();
    let path = path.to_string_lossy().into_owned();
    insta::assert_snapshot!(home.refusal(&["--config", &path]).replace(&path, "config.toml"));
}

#[test]
fn a_failure_is_json_where_the_log_is() {
    let home = Home::new();
    let output = home.run(&["--backend", "abacus", "--port", "0", "--log-format", "json"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    let last: Value = serde_json::from_str(stderr.lines().last().unwrap()).unwrap();
    assert_eq!(last["SeverityText"], "ERROR");
    assert_eq!(last["Attributes"]["exit"], 4);
    assert!(last["Body"].as_str().unwrap().contains("abacus"), "{last}");
}

#[test]
fn completions_know_the_flags() {
    let home = Home::new();
    for shell in ["bash", "zsh", "fish"] {
        let output = home.run(&["completions", shell]);
        assert!(output.status.success());
        let script = String::from_utf8(output.stdout).unwrap();
        assert!(script.contains("llama-server") && script.contains("explain"), "{shell}");
    }
}

#[test]
fn explain_gives_every_backends_reasons() {
    let Some(dir) = golden("qwen3-q4") else { return };
    let home = Home::new();
    let dir = dir.to_string_lossy();
    let output = home.run(&["explain", &dir, "--json"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let whole: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!((&whole["model"], &whole["family"]), (&json!("qwen3-q4"), &json!("qwen3")));
    let ballots = whole["ballots"].as_array().unwrap();
    let backends: Vec<_> = ballots.iter().map(|ballot| ballot["backend"].as_str().unwrap()).collect();
    assert_eq!(backends, ["llama-server", "mesh", "mlx"]);
    assert!(ballots[0]["verdict"]["refuse"]["reasons"][0]["text"].as_str().unwrap().contains("safetensors"));
    let nowhere = ballots[1]["verdict"]["refuse"]["reasons"][0]["text"].as_str().unwrap();
    assert!(nowhere.starts_with("this machine is in no mesh"), "{nowhere}");
    assert!(ballots[2]["verdict"]["serve"]["score"].is_u64());
    // Unasked, MLX is not elected, and the command that would work is given.
    assert!(whole["error"]["hint"].as_str().unwrap().ends_with("--mlx"), "{}", whole["error"]);
    let asked = home.run(&["explain", &dir, "--json", "--mlx"]);
    let whole: Value = serde_json::from_slice(&asked.stdout).unwrap();
    assert_eq!(whole["elected"], "mlx");
    let text = home.run(&["explain", &dir, "--color", "never"]);
    let text = String::from_utf8(text.stdout).unwrap();
    for part in ["model_type", "`model_type` in config.json", "llama-server refuses it", "mlx would serve it"] {
        assert!(text.contains(part), "{part}: {text}");
    }
    assert!(!text.contains('\u{1b}'), "colors though there shall be none");
}

#[test]
fn verify_shows_both_differences_and_fails_past_the_tolerance() {
    let Some(dir) = golden("qwen3") else { return };
    let home = Home::new();
    let dir = dir.to_string_lossy();
    let output = home.run(&["verify", &dir, "--device", "cpu", "--color", "never"]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    let rows: Vec<_> = text.lines().filter(|line| line.ends_with(" ok")).collect();
    assert_eq!(rows.len(), 4, "{text}");
    for row in rows {
        let numbers: Vec<f32> = row.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let [max, median] = numbers[..] else { panic!("two numbers are wanted: {row}") };
        assert!(0.0 < median && median <= max && max < 2e-4, "{row}");
    }
    let strict = home.run(&["verify", &dir, "--device", "cpu", "--color", "never", "--tolerance", "1e-9"]);
    assert_eq!(strict.status.code(), Some(1));
    assert!(String::from_utf8(strict.stdout).unwrap().contains("FAILED"));
}

/// Ends a process when the test does, however that is.
struct Ended(std::process::Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_model_that_fails_at_the_start_takes_no_other_with_it() {
    let Some(dir) = golden("qwen3") else { return };
    let home = Home::new();
    let config = home.0.path().join("config.toml");
    let table = format!("[[models]]\nmodel = {:?}\nname = \"good\"\nbackend = \"mlx\"\n", dir.to_string_lossy());
    std::fs::write(&config, table).unwrap();
    let mut server = home
        .command(&["--model", "./no/such/model", "--memory", "4GiB", "--port", "0", "--config"])
        .arg(&config)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let errors = BufReader::new(server.stderr.take().unwrap());
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines().map_while(Result::ok);
    let _ended = Ended(server);
    let failed = errors.lines().map_while(Result::ok).find(|line| line.contains("./no/such/model")).unwrap();
    assert!(failed.contains("no such file or directory"), "{failed}");
    let url = lines.by_ref().find_map(|line| line.strip_prefix("listening on ").map(str::to_owned)).unwrap();
    let said: Vec<String> = lines.by_ref().take(2).collect();
    assert_eq!(said.last().unwrap(), "loaded when asked for: good");

    let body = json!({ "model": "good", "prompt": "hi", "max_tokens": 2 });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let status = async |path: &str| client.get(format!("{url}{path}")).send().await.unwrap().status().as_u16();
        assert_eq!((status("/livez").await, status("/readyz").await), (200, 503));
        let answer = client.post(format!("{url}/v1/completions")).json(&body).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        assert_eq!(answer["model"], "good", "{answer}");
        let health = client.get(format!("{url}/health")).send().await.unwrap().json::<Value>().await.unwrap();
        let states: Vec<_> = health["models"].as_array().unwrap().iter().map(|model| &model["status"]).collect();
        assert_eq!(states, ["failed", "ready"]);
        let memory = &health["memory"][0];
        assert_eq!((&memory["pool"], &memory["budget_bytes"]), (&json!("ram"), &json!(4u64 << 30)), "{health}");
    });
}

#[cfg(unix)]
#[test]
fn a_model_is_served_until_a_signal_comes() {
    let Some(dir) = golden("qwen3") else { return };
    let home = Home::new();
    let mut server = home
        .command(&["--model", &dir.to_string_lossy(), "--mlx", "--port", "0"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut said = Vec::new();
    let mut lines = BufReader::new(server.stdout.take().unwrap()).lines().map_while(Result::ok);
    let url = lines
        .by_ref()
        .inspect(|line| said.push(line.clone()))
        .find_map(|line| line.strip_prefix("listening on ").map(str::to_owned))
        .unwrap_or_else(|| panic!("it never listened"));
    let order: Vec<_> = said.iter().filter_map(|line| line.split_whitespace().next()).collect();
    assert_eq!(order, ["model", "found", "backend", "notice", "load", "listening"], "{said:#?}");
    assert!(lines.next().unwrap().starts_with("try: curl "));

    let body = json!({ "model": "qwen3", "messages": [{ "role": "user", "content": "hi" }], "max_tokens": 4,
        "temperature": 0 });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer: Value = runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        assert_eq!(client.get(format!("{url}/readyz")).send().await.unwrap().status().as_u16(), 200);
        let request = client.post(format!("{url}/v1/chat/completions")).json(&body);
        request.send().await.unwrap().json().await.unwrap()
    });
    assert_eq!(answer["object"], "chat.completion", "{answer}");
    assert!(answer["usage"]["completion_tokens"].as_u64().unwrap() <= 4);

    let id = libc::pid_t::try_from(server.id()).unwrap();
    // SAFETY: sends a signal to a child that was not waited for yet, so that the id is still its own.
    assert_eq!(unsafe { libc::kill(id, libc::SIGTERM) }, 0);
    assert_eq!(server.wait().unwrap().code(), Some(0));
    let mut rest = String::new();
    lines.for_each(|line| rest.push_str(&line));
    assert!(rest.contains("stopping"), "{rest}");
}

#[test]
fn beyond_this_machine_a_key_is_asked_for_before_anything_is_loaded() {
    let home = Home::new();
    let refusal = home.refusal(&["--host", "0.0.0.0", "--port", "0", "--model", "./no/such/model"]);
    assert!(refusal.contains("no API key") && refusal.contains("--insecure"), "{refusal}");
    assert!(refusal.ends_with("exit code 2\n"), "{refusal}");
}

#[cfg(unix)]
#[test]
fn a_second_signal_ends_the_program_at_once() {
    let Some(dir) = golden("qwen3") else { return };
    let home = Home::new();
    let server = home
        .command(&["--model", &dir.to_string_lossy(), "--mlx", "--port", "0"])
        .env("MESH_LLM_API_KEYS", "0123456789abcdef")
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut server = Ended(server);
    let mut lines = BufReader::new(server.0.stdout.take().unwrap()).lines().map_while(Result::ok);
    let url = lines.by_ref().find_map(|line| line.strip_prefix("listening on ").map(str::to_owned)).unwrap();
    let id = libc::pid_t::try_from(server.0.id()).unwrap();
    // SAFETY: sends a signal to a child that was not waited for yet, so that the id is still its own.
    let signal = |signal| assert_eq!(unsafe { libc::kill(id, signal) }, 0);
    let body = json!({ "model": "qwen3", "prompt": "hi", "stream": true, "ignore_eos": true });
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let ask = || client.post(format!("{url}/v1/completions")).json(&body);
        assert_eq!(ask().send().await.unwrap().status().as_u16(), 401);
        // Nobody reads on, so that the answer is there for as long as the grace lasts.
        let answer = ask().header("x-api-key", "0123456789abcdef").send().await.unwrap();
        assert_eq!(answer.status().as_u16(), 200);
        signal(libc::SIGTERM);
        assert!(lines.by_ref().any(|line| line.starts_with("stopping")));
        // The one that listens for the second may not be there yet.
        while server.0.try_wait().unwrap().is_none() {
            signal(libc::SIGINT);
            tokio::time::sleep(std::time::Duration::from_millis(20)).await;
        }
        assert_eq!(server.0.wait().unwrap().code(), Some(130));
        drop(answer);
    });
}
