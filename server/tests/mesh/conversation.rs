//! A conversation on real engines: it stays on the machine that has read its beginning, and outlives that machine.

use std::time::Instant;

use conformance::shared::golden;
use serde_json::{Value, json};

use crate::machine::{Machine, wait_for};

/// What passed so far, and the machines that may have answered.
struct Talk<'a> {
    client: &'a Machine,
    messages: Vec<Value>,
}

impl Talk<'_> {
    /// One turn: tokens of the prompt, and how many of them need not be read again.
    fn turn(&mut self, text: String) -> (u64, u64) {
        self.messages.push(json!({ "role": "user", "content": text }));
        let body = json!({ "model": "common", "messages": self.messages, "max_tokens": 8, "temperature": 0 });
        let (status, answer) = self.client.post("/v1/chat/completions", &body);
        assert_eq!(status, 200, "{answer}");
        self.messages.push(answer["choices"][0]["message"].clone());
        let usage = &answer["usage"];
        let cached = usage["prompt_tokens_details"]["cached_tokens"].as_u64().unwrap_or(0);
        (usage["prompt_tokens"].as_u64().unwrap(), cached)
    }
}

/// Answers that each of two machines gave to the client, by name.
fn served(client: &Machine) -> Vec<(String, u64)> {
    let (_, mesh) = client.get("/v1/mesh");
    let nodes = mesh["sources"][0]["status"]["nodes"].as_array().unwrap();
    let served = nodes.iter().map(|node| (node["name"].as_str().unwrap().to_owned(), node["sent"].as_u64().unwrap()));
    served.collect()
}

#[test]
fn a_conversation_stays_with_its_prefix_and_moves_when_that_machine_dies() {
    let Some(llama) = golden("llama") else { return };
    let common = [("common", llama)];
    let mut machines = [Machine::new("one", &common), Machine::new("two", &common)];
    let mut client = Machine::new("client", &[]);
    machines[0].done(&["mesh", "create"]);
    machines[0].start(None);
    let tickets = [machines[0].ticket(), machines[0].ticket()];
    machines[1].start(Some(&tickets[0]));
    client.start(Some(&tickets[1]));
    let nodes = || client.get("/v1/models/common").1["nodes"].as_array().map_or(0, Vec::len);
    wait_for("both machines have it", || nodes() == 2);

    let system = "Answer with care, and say what you know. ".repeat(4);
    let mut talk = Talk { client: &client, messages: vec![json!({ "role": "system", "content": system })] };
    let mut turns = Vec::new();
    for turn in 0..10 {
        turns.push(talk.turn(format!("This is turn {turn} of ten: go on, please")));
    }
    println!("tokens of the prompt, and those read before: {turns:?}");
    assert_eq!(turns[0].1, 0, "{turns:?}");
    for two in turns.windows(2) {
        // All of the turn before but for what the template writes differently at its end.
        assert!(two[1].1 > two[0].1 && two[1].1 >= two[0].0 - two[0].0 / 4, "{turns:?}");
    }
    let asked: Vec<_> = served(&client).into_iter().filter(|(_, sent)| *sent > 0).collect();
    assert!(matches!(&asked[..], [(_, 10)]), "one machine, ten times: {asked:?}");
    let holder = usize::from(asked[0].0 == "two");

    machines[holder].kill();
    let killed = Instant::now();
    let (prompt, cached) = talk.turn("That machine is gone: go on, please".to_owned());
    println!("the turn after its machine died: after {:?}, {prompt} tokens, {cached} read before", killed.elapsed());
    assert_eq!(cached, 0, "the other machine has not seen it");
    let (_, cached) = talk.turn("And stay there".to_owned());
    assert!(cached >= prompt - prompt / 4, "{cached} of {prompt}");
}

#[test]
fn a_long_prompt_does_not_look_like_silence() {
    let Some(llama) = golden("llama") else { return };
    let mut server = Machine::new("server", &[("alpha", llama)]);
    let mut client = Machine::new("client", &[]);
    server.done(&["mesh", "create"]);
    server.start(None);
    let ticket = server.ticket();
    client.start(Some(&ticket));
    wait_for("the model", || client.models() == ["alpha"]);
    // Several at once, so that all processors read for a while.
    let piece = "a long prompt ";
    let (_, counted) = server.post("/tokenize", &json!({ "model": "alpha", "content": piece.repeat(10) }));
    let prompt = piece.repeat(17_000 / counted["tokens"].as_array().unwrap().len());
    let row = |client: &Machine| client.get("/v1/mesh").1["sources"][0]["status"]["nodes"][0].clone();
    std::thread::scope(|scope| {
        let began = Instant::now();
        let asked: Vec<_> = (0..2)
            .map(|at| {
                let (prompt, client) = (format!("{at} {prompt}"), &client);
                scope.spawn(move || {
                    let body = json!({ "model": "alpha", "prompt": prompt, "max_tokens": 1 });
                    client.post("/v1/completions", &body)
                })
            })
            .collect();
        let mut silent = 0f64;
        while asked.iter().any(|asked| !asked.is_finished()) {
            let node = row(&client);
            assert_eq!(node["routable"], true, "{node}");
            silent = silent.max(node["age_s"].as_f64().unwrap());
        }
        println!("prompts were read for {:?}, and the longest silence was {silent:.3} s", began.elapsed());
        for asked in asked {
            let (status, answer) = asked.join().unwrap();
            assert_eq!(status, 200, "{answer}");
            assert!(answer["usage"]["prompt_tokens"].as_u64() > Some(1500), "{answer}");
        }
    });
}
