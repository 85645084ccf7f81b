//! Ctrl-C while something is being downloaded, and what is left of it.

use std::{fs, os::unix::process::ExitStatusExt, process::Stdio, time::Duration};

use conformance::hub::{Trouble, sha256};
use serde_json::json;

use crate::home::Home;

const WEIGHTS: &[u8] = &[7; 300_000];
/// Where the hub stops until it is told to go on.
const HALF: usize = 100_000;

/// A hub that stops in the middle of the weights.
fn home() -> Home {
    let home = Home::new();
    let files: [(&str, &[u8]); 3] = [("config.json", b"{}"), ("model.safetensors", WEIGHTS), ("tokenizer.json", b"{}")];
    home.hub.put("org/big", &files);
    home.hub.trouble("org/big/model.safetensors", Trouble::Pause(HALF));
    home
}

/// Starts a command, and interrupts it as a terminal does once half of the weights are on disk.
fn interrupted(home: &Home, line: &str) -> std::process::ExitStatus {
    let mut process = home.command(line).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
    home.hub.wait_for_pauses(1);
    let partial = home.cached("org/big").join(format!("blobs/{}.incomplete", sha256(WEIGHTS)));
    while fs::metadata(&partial).map_or(0, |metadata| metadata.len()) < HALF as u64 {
        assert!(process.try_wait().unwrap().is_none(), "it ended by itself");
        std::thread::sleep(Duration::from_millis(5));
    }
    let id = libc::pid_t::try_from(process.id()).unwrap();
    // SAFETY: sends a signal to a child that was not waited for yet, so that the id is still its own.
    assert_eq!(unsafe { libc::kill(id, libc::SIGINT) }, 0);
    process.wait().unwrap()
}

fn goes_on(home: &Home) {
    let listed = home.json("mesh-llm models list --json");
    assert!(listed["models"].as_array().unwrap().iter().all(|model| model["model"] != "org/big"), "{listed}");
    let offline = home.refusal("mesh-llm models download org/big --offline");
    assert!(offline.contains("org/big is not on disk"), "{offline}");
    home.done("mesh-llm models download org/big");
    assert_eq!(home.hub.fetched("model.safetensors"), [0, HALF], "it goes on where it was");
    let blob = home.cached("org/big").join("blobs").join(sha256(WEIGHTS));
    assert_eq!(fs::read(blob).unwrap(), WEIGHTS);
    let listed = home.json("mesh-llm models list --json");
    let big = listed["models"].as_array().unwrap().iter().find(|model| model["model"] == "org/big").unwrap().clone();
    assert_eq!((&big["weight_bytes"], &big["from"]), (&json!(WEIGHTS.len()), &json!("hub")));
    home.hub.release();
}

#[test]
fn a_download_that_was_interrupted_goes_on() {
    let home = home();
    let status = interrupted(&home, "mesh-llm models download org/big");
    assert_eq!(status.signal(), Some(libc::SIGINT), "{status}");
    goes_on(&home);
}

#[test]
fn so_does_one_of_a_server() {
    let home = home();
    let status = interrupted(&home, "mesh-llm --model org/big --mlx");
    assert_eq!(status.code(), Some(0), "a server that is told to stop stops in order");
    goes_on(&home);
}
