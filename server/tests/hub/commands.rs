//! `mesh-llm models`: found, listed, checked, removed.

use std::fs;

use serde_json::{Value, json};

use crate::home::Home;

const SOUND: &[(&str, &[u8])] =
    &[("config.json", b"{}"), ("model.safetensors", b"weights"), ("tokenizer.json", b"{ }")];

#[test]
fn models_are_searched_for_in_the_catalog_and_on_the_hub() {
    let home = Home::new();
    home.hub.put("org/Qwen3-0.6B-GGUF", SOUND);
    let found = home.json("mesh-llm models search qwen3 0.6b --json");
    let names: Vec<&str> =
        found["catalog"].as_array().unwrap().iter().map(|one| one["model"].as_str().unwrap()).collect();
    assert_eq!(names, ["Qwen3-0.6B-MLX", "Qwen3-0.6B-GGUF", "JOSIE-IT1-Qwen3-0.6B-MLX"]);
    let facts = &found["catalog"][1]["entry"];
    assert_eq!((&facts["licence"], &facts["capabilities"][2]), (&json!("apache-2.0"), &json!("reasoning")));
    assert_eq!(found["hub"], json!([{ "model": "org/Qwen3-0.6B-GGUF", "downloads": 7, "tags": ["text-generation"] }]));
    insta::assert_snapshot!(home.done("mesh-llm models search qwen3 0.6b"));
    // Without the network the catalog is enough.
    let offline = home.json("mesh-llm models search qwen3 --json --offline");
    assert!(offline["hub"].as_array().unwrap().is_empty() && offline["catalog"].as_array().unwrap().len() > 1);
}

#[test]
fn the_users_own_entries_are_models_like_others() {
    let home = Home::new();
    home.hub.put("org/own", SOUND);
    let config = home.path(".config/mesh-llm/config.toml");
    let text = fs::read_to_string(&config).unwrap();
    let entry = "[[catalog]]\nname = \"Mine\"\nabout = \"my own\"\nrepo = \"org/own\"\nformat = \"safetensors\"\n";
    fs::write(&config, format!("{text}{entry}")).unwrap();
    home.done("mesh-llm models download Mine");
    let listed = home.json("mesh-llm models list --json");
    let mine = listed["models"].as_array().unwrap().iter().find(|model| model["model"] == "Mine").unwrap().clone();
    assert_eq!((&mine["from"], &mine["weight_bytes"]), (&json!("config"), &json!(7)));
    assert!(home.refusal("mesh-llm models download Mien").contains("did you mean Mine?"));
    home.done("mesh-llm models remove Mine");
    assert!(!home.cached("org/own").exists());
}

#[test]
fn what_is_kept_is_checked_removed_and_pruned() {
    let home = Home::new();
    home.hub.put("org/one", SOUND);
    home.hub.put("org/quants", &[("m-Q4_0.gguf", b"GGUF4"), ("m-Q8_0.gguf", b"GGUF88")]);
    for line in ["mesh-llm models download org/one", "mesh-llm models download org/quants:Q4_0"] {
        home.done(line);
    }
    home.done("mesh-llm models download org/quants:Q8_0");
    let verified = home.json("mesh-llm models verify --json --offline");
    let verdicts = |verified: &Value| -> Vec<(String, String)> {
        let text = |one: &Value, key: &str| one[key].as_str().unwrap().to_owned();
        let files = verified["files"].as_array().unwrap().iter();
        files.map(|one| (text(one, "file"), text(one, "verdict"))).collect()
    };
    let all = verdicts(&verified);
    assert_eq!(all.len(), 5, "{all:?}");
    assert!(all.iter().all(|(_, verdict)| verdict == "sound"), "{all:?}");
    insta::assert_snapshot!(home.done("mesh-llm models verify org/quants"));

    // A disk that lies, found and mended by the commands that are named.
    let blobs = home.cached("org/one").join("blobs");
    fs::write(blobs.join(conformance::hub::sha256(b"weights")), b"weighty").unwrap();
    let output = home.run("mesh-llm models verify org/one --json");
    assert_eq!(output.status.code(), Some(3));
    let damaged = verdicts(&serde_json::from_slice(&output.stdout).unwrap());
    assert!(damaged.contains(&("model.safetensors".to_owned(), "damaged".to_owned())), "{damaged:?}");
    insta::assert_snapshot!(home.refusal("mesh-llm models verify org/one"));
    let freed = home.json("mesh-llm models remove org/one --json");
    assert_eq!(freed["removed"], json!(["org/one"]));
    home.done("mesh-llm models download org/one");
    home.done("mesh-llm models verify org/one");

    // One quantization goes, the other stays.
    let freed = home.json("mesh-llm models remove org/quants:Q8_0 --json");
    assert_eq!(freed["freed_bytes"], 6, "{freed}");
    assert_eq!(home.json("mesh-llm models verify org/quants --json")["files"].as_array().unwrap().len(), 1);

    // A commit that no branch names any more.
    home.hub.put("org/one", &[SOUND[0], ("model.safetensors", b"newer weights"), SOUND[2]]);
    let main = home.cached("org/one").join("refs/main");
    fs::remove_file(main).unwrap();
    home.done("mesh-llm models download org/one");
    fs::write(home.cached("org/one").join(format!("blobs/{}.incomplete", "1".repeat(64))), b"abc").unwrap();
    let freed = home.json("mesh-llm models prune --json");
    assert_eq!(freed["freed_bytes"], 7 + 3, "{freed}");
    assert!(home.done("mesh-llm models prune").contains("freed 0 B"));
    home.done("mesh-llm models verify org/one --offline");
    let said = home.done("mesh-llm models remove org/one");
    assert!(said.contains("removed org/one") && said.contains("freed "), "{said}");
}

#[test]
fn of_several_quantizations_the_one_that_fits_is_chosen_and_said() {
    let home = Home::new();
    home.hub.put("org/quants", &[("m-Q4_0.gguf", b"GGUF4"), ("m-Q8_0.gguf", b"GGUF88")]);
    let output = home.run("mesh-llm models download org/quants");
    assert!(output.status.success());
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(said.contains("m-Q8_0.gguf is the largest quantization that fits"), "{said}");
    assert!(said.contains("mesh-llm --model org/quants:Q4_0"), "{said}");
    assert_eq!(home.hub.fetched("m-Q4_0.gguf"), [] as [usize; 0]);
    // Its header first, which tells what a context takes.
    assert_eq!(home.hub.fetched("m-Q8_0.gguf"), [0, 0]);
}
