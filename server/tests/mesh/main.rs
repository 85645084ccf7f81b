//! Machines that serve for one another, as processes: they join, die, come back, and are told apart from strangers.

mod conversation;
mod machine;
#[cfg(target_os = "linux")]
mod spaces;

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::atomic::{AtomicU32, Ordering},
    time::Instant,
};

use conformance::shared::golden;
use machine::{LEASE, LEASE_OVER, Machine, wait_for, within_lease};
use serde_json::json;

/// Three machines' models: one of its own each, and one that the last two both have.
fn models() -> Option<[Vec<(&'static str, PathBuf)>; 3]> {
    let (llama, qwen2, qwen3) = (golden("llama")?, golden("qwen2")?, golden("qwen3")?);
    Some([
        vec![("alpha", llama.clone())],
        vec![("beta", qwen2), ("common", llama.clone())],
        vec![("gamma", qwen3), ("common", llama)],
    ])
}

/// The three of them, joined by tickets that say where the first can be reached.
fn three() -> Option<[Machine; 3]> {
    let [one, two, three] = models()?;
    let mut machines = [Machine::new("one", &one), Machine::new("two", &two), Machine::new("three", &three)];
    machines[0].done(&["mesh", "create", "--name", "home"]);
    machines[0].start(None);
    for at in 1..3 {
        let ticket = machines[0].ticket();
        machines[at].start(Some(&ticket));
    }
    for machine in &machines {
        wait_for("all models", || machine.models().len() == 4);
    }
    Some(machines)
}

const ALL: [&str; 4] = ["alpha", "beta", "common", "gamma"];

#[test]
fn what_no_engine_here_can_load_is_served_by_others_where_that_is_allowed() {
    let Some(llama) = golden("llama") else { return };
    let mut has = Machine::new("has", &[("alpha", llama.clone())]);
    has.done(&["mesh", "create", "--name", "home"]);
    has.start(None);
    let root = tempfile::tempdir().unwrap();
    let copy = root.path().join("llama");
    std::fs::create_dir(&copy).unwrap();
    std::fs::copy(llama.join("model.safetensors"), copy.join("model.safetensors")).unwrap();
    std::fs::write(copy.join("config.json"), r#"{ "model_type": "unheard_of" }"#).unwrap();
    let own = format!("[[models]]\nmodel = {llama:?}\nname = \"own\"\nbackend = \"mlx\"\n");
    let table = |name: &str, backend: &str| {
        format!("[[models]]\nmodel = {copy:?}\nname = \"{name}\"\nbackend = \"{backend}\"\n")
    };
    let tables = [own, table("odd", "auto"), table("never", "mlx")].concat();
    let mut auto = Machine::with("auto", "serve", &format!("memory = \"2GiB\"\n{tables}"));
    auto.start(Some(&has.ticket()));
    wait_for("its model", || auto.models().contains(&"alpha".to_owned()));
    let answer = has.complete("alpha", "Once upon a time").unwrap();
    assert_eq!(auto.complete("odd", "Once upon a time").as_ref(), Ok(&answer));
    let (_, shown) = auto.get("/v1/models/odd");
    assert_eq!(shown["backend"], "mesh", "{shown}");
    assert!(auto.complete("never", "x").is_err());
    // What is served by others is not passed on as its own.
    wait_for("its own", || has.models().contains(&"own".to_owned()));
    assert!(!has.models().iter().any(|model| model == "odd"), "{:?}", has.models());
    assert_eq!(has.complete("odd", "x").unwrap_err().0, 404);
    has.kill();
    let gone = auto.complete("odd", "x").unwrap_err();
    assert!(matches!(gone.0, 503 | 404) && !gone.1.is_empty(), "{gone:?}");
}

#[test]
fn a_model_that_others_are_to_serve_is_not_loaded() {
    let Some(llama) = golden("llama") else { return };
    let mut has = Machine::new("has", &[("alpha", llama)]);
    has.done(&["mesh", "create", "--name", "home"]);
    has.start(None);
    let asks = |more: &str| Machine::with("asks", "serve", &format!("[[models]]\nmodel = \"org/alpha\"\n{more}"));
    let mut member = asks("backend = \"mesh\"\n");
    // Nobody could serve it, or it would be called as nobody calls it.
    let (served, said) = member.run(&["serve", "--port", "0", "--model", "org/alpha", "--backend", "mesh"]);
    assert!(
        !served && said.contains("other machines are to serve `org/alpha`, and this one takes part in no mesh"),
        "{said}"
    );
    member.start(Some(&has.ticket()));
    wait_for("its model", || member.models() == ["alpha"]);
    assert!(member.complete("alpha", "Once upon a time").is_ok());
    member.kill();
    let named = asks("backend = \"mesh\"\nname = \"mine\"\n");
    let config = named.config();
    let (served, said) = member.run(&["serve", "--port", "0", "--mesh-port", "0", "--no-mdns", "--config", &config]);
    assert!(!served && said.contains("its name, context and memory are theirs to set"), "{said}");
}

#[test]
fn three_machines_are_one_endpoint() {
    let Some(mut machines) = three() else { return };
    let mut alone = BTreeMap::new();
    for (model, at) in [("alpha", 0), ("beta", 1), ("common", 1), ("gamma", 2)] {
        alone.insert(model, machines[at].complete(model, "Once upon a time").unwrap());
    }
    for machine in &machines {
        let mut listed = machine.models();
        listed.sort();
        assert_eq!(listed, ALL, "each once");
        for model in ALL {
            assert_eq!(machine.complete(model, "Once upon a time").as_ref(), Ok(&alone[model]), "{model}");
        }
    }
    // One of several, by name.
    let (_, list) = machines[0].get("/v1/models/common");
    let mut nodes: Vec<_> =
        list["nodes"].as_array().unwrap().iter().map(|node| node["name"].as_str().unwrap()).collect();
    nodes.sort_unstable();
    assert_eq!(nodes, ["three", "two"]);
    assert_eq!(machines[0].complete("common@two", "Once upon a time").as_ref(), Ok(&alone["common"]));
    assert_eq!(machines[0].complete("common@one", "x").unwrap_err(), (404, "model_not_found".into()));
    // What clients are refused is refused in the same words, whichever machine they ask.
    let asked = json!({ "model": "gamma", "prompt": "x ".repeat(40_000), "max_tokens": 1 });
    let (here, there) = (machines[2].post("/v1/completions", &asked), machines[0].post("/v1/completions", &asked));
    assert_eq!((here.0, &here.1["error"]["code"]), (400, &json!("context_length_exceeded")));
    assert_eq!(here, there);
    let asked = json!({ "model": "gamma", "content": "Once upon" });
    assert_eq!(machines[2].post("/tokenize", &asked), machines[0].post("/tokenize", &asked));
    // Nobody's address is shown.
    for (status, shown) in [machines[0].get("/v1/models"), machines[0].get("/v1/mesh")] {
        assert_eq!(status, 200);
        assert!(!shown.to_string().contains("127.0.0.1"), "{shown}");
    }
    let url = machines[0].url.clone();
    let table = machines[0].done(&["mesh", "status", "--url", &url]);
    assert!(table.contains("two") && table.contains("beta, common"), "{table}");

    // Why requests go where they go.
    let why = machines[0].done(&["explain", "gamma", "--offline", "--url", &url]);
    assert!(why.contains("to another machine") && why.contains("ready at a peer") && why.contains("three ("), "{why}");
    // The mesh has a vote on a model that is here, too, and is not elected unasked.
    let root = tempfile::tempdir().unwrap();
    let copy = root.path().join("qwen3");
    std::fs::create_dir(&copy).unwrap();
    for name in ["config.json", "model.safetensors"] {
        std::fs::copy(golden("qwen3").unwrap().join(name), copy.join(name)).unwrap();
    }
    let model = copy.display().to_string();
    let explain = |more: &[&str]| {
        let said = machines[0].done(&[&["explain", &model, "--json", "--offline", "--url", &url], more].concat());
        serde_json::from_str::<serde_json::Value>(&said).unwrap()
    };
    let votes = explain(&[]);
    let vote = votes["ballots"].as_array().unwrap().iter().find(|ballot| ballot["backend"] == "mesh").unwrap();
    let reason = vote["verdict"]["serve"]["reasons"][0]["text"].as_str().unwrap_or_default();
    assert!(reason.starts_with("three has it ready by mlx, "), "{vote}");
    assert_ne!(votes["elected"], "mesh");
    assert_eq!(explain(&["--backend", "mesh"])["elected"], "mesh");
    let (_, way) = machines[1].get("/v1/mesh/routes/common");
    assert!(way["elsewhere"] == false && way["why"] == "ready here" && way["machines"][0].as_str().is_some(), "{way}");

    // One dies and says nothing: the next requests for what it alone has are refused within the lease, and what others have too
    // is answered.
    machines[2].kill();
    let killed = Instant::now();
    std::thread::scope(|scope| {
        let common = scope.spawn(|| machines[0].complete("common", "Once upon a time"));
        scope.spawn(|| {
            let noticed = || machines[..2].iter().all(|machine| machine.models().len() == 3);
            within_lease("its loss is noticed by all", killed, noticed);
        });
        let (status, code) = machines[0].complete("gamma", "x").unwrap_err();
        println!("the next request for its model: {status} {code} after {:?}", killed.elapsed());
        assert!(status == 503 && !code.is_empty() && killed.elapsed() < LEASE, "{status} {code}");
        assert_eq!(common.join().unwrap().as_ref(), Ok(&alone["common"]));
        println!("the next request for what others have, too: answered after {:?}", killed.elapsed());
        assert!(killed.elapsed() < LEASE);
    });
    while killed.elapsed() < LEASE_OVER {
        let asked = Instant::now();
        let refused = machines[0].complete("gamma", "x").unwrap_err();
        // Once its lease is over, nobody has ever heard of it.
        assert!(matches!(refused.0, 503 | 404) && !refused.1.is_empty(), "{refused:?}");
        assert_eq!(machines[0].complete("common", "Once upon a time").as_ref(), Ok(&alone["common"]));
        assert!(asked.elapsed() < LEASE, "it hangs");
    }
    assert_eq!(machines[0].complete("gamma", "x").unwrap_err(), (404, "model_not_found".into()));
    // It comes back, a member still, and is used again.
    machines[2].start(None);
    wait_for("it is ready", || machines[2].complete("gamma", "Once upon a time").as_ref() == Ok(&alone["gamma"]));
    within_lease("it is used again", Instant::now(), || {
        machines[..2].iter().all(|other| other.complete("gamma", "Once upon a time").as_ref() == Ok(&alone["gamma"]))
    });

    // Revoked, it hears nothing any more, and nobody hears of it.
    machines[0].done(&["mesh", "revoke", "three", "--url", &url]);
    wait_for("it is revoked", || machines[0].models().len() == 3 && machines[2].models().len() == 2);
    machines[2].kill();
    machines[2].start(None);
    std::thread::sleep(LEASE_OVER);
    assert_eq!((machines[0].models().len(), machines[2].models().len()), (3, 2));
    let (left, said) = machines[1].run(&["mesh", "leave"]);
    assert!(left && said.contains("left the mesh `home`"), "{said}");
    wait_for("it has left", || machines[0].models() == ["alpha"]);
}

#[test]
fn a_machine_without_models_serves_those_of_others() {
    let Some(llama) = golden("llama") else { return };
    let mut server = Machine::new("server", &[("alpha", llama)]);
    let mut client = Machine::new("client", &[]);
    let refused = client.run(&["client", "--port", "0"]);
    assert!(!refused.0 && refused.1.contains("in no mesh") && refused.1.contains("--join"), "{}", refused.1);
    server.done(&["mesh", "create"]);
    server.start(None);
    let ticket = server.ticket();
    client.start(Some(&ticket));
    wait_for("the model", || client.models() == ["alpha"]);
    assert_eq!(client.complete("alpha", "x"), server.complete("alpha", "x"));
    let body = json!({ "model": "alpha", "prompt": "x", "max_tokens": 4, "stream": true });
    assert_eq!(client.post("/v1/completions", &body).0, 200);
    // The ticket was for one machine.
    let stranger = Machine::new("stranger", &[]);
    let args: Vec<&str> = stranger.args.iter().map(String::as_str).collect();
    let refused = stranger.run(&[&["client", "--port", "0", "--join", &ticket], &args[..]].concat());
    assert!(!refused.0 && refused.1.contains("for one node"), "{}", refused.1);
    let refused = stranger.run(&["client", "--join", "mesh-nonsense"]);
    assert!(!refused.0 && refused.1.contains("no ticket of `mesh-llm mesh invite`"), "{}", refused.1);
}

#[test]
fn no_answer_is_wrong_while_machines_die_and_come_back() {
    const REQUESTS: u32 = 1000;
    const CLIENTS: u32 = 4;
    let Some(mut machines) = three() else { return };
    let prompt = |at: u32| format!("Request {} of many", at % 10);
    let expected: BTreeMap<(&str, String), String> = ALL
        .into_iter()
        .flat_map(|model| (0..10).map(move |at| (model, at)))
        .map(|(model, at)| ((model, prompt(at)), machines[0].complete(model, &prompt(at)).unwrap()))
        .collect();
    let (next, whole, refused) = (AtomicU32::new(0), AtomicU32::new(0), AtomicU32::new(0));
    let [first, others @ ..] = &mut machines;
    std::thread::scope(|scope| {
        let (next, whole, refused, expected, first) = (&next, &whole, &refused, &expected, &*first);
        let clients: Vec<_> = (0..CLIENTS)
            .map(|_| {
                scope.spawn(move || {
                    loop {
                        let at = next.fetch_add(1, Ordering::Relaxed);
                        if at >= REQUESTS {
                            return;
                        }
                        let (model, prompt) = (ALL[(at % 4) as usize], prompt(at));
                        match first.complete(model, &prompt) {
                            Ok(text) => {
                                assert_eq!(text, expected[&(model, prompt)], "{model}");
                                whole.fetch_add(1, Ordering::Relaxed);
                            }
                            // Gone, or gone underway; never without a word.
                            Err((404 | 500 | 503, code)) if !code.is_empty() => {
                                refused.fetch_add(1, Ordering::Relaxed);
                            }
                            Err(other) => panic!("{model}: {other:?}"),
                        }
                    }
                })
            })
            .collect();
        let mut victim = 0;
        while clients.iter().any(|client| !client.is_finished()) {
            let at = next.load(Ordering::Relaxed);
            others[victim].kill();
            while next.load(Ordering::Relaxed) < at + 60 && clients.iter().any(|client| !client.is_finished()) {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            others[victim].start(None);
            victim = 1 - victim;
            while next.load(Ordering::Relaxed) < at + 120 && clients.iter().any(|client| !client.is_finished()) {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
        }
    });
    let (whole, refused) = (whole.into_inner(), refused.into_inner());
    println!("{whole} whole, {refused} refused");
    assert_eq!(whole + refused, REQUESTS);
    assert!(whole > REQUESTS / 2, "{whole} whole, {refused} refused");
    // Every place is free again.
    wait_for("all are idle", || {
        let (_, list) = machines[0].get("/v1/models");
        let nodes = list["data"]
            .as_array()
            .unwrap()
            .iter()
            .flat_map(|model| model["nodes"].as_array().cloned().unwrap_or_default());
        let nodes: Vec<_> = nodes.collect();
        nodes.len() == 4 && nodes.iter().all(|node| node["running"] == 0 && node["waiting"] == 0)
    });
    for model in ALL {
        assert_eq!(machines[0].complete(model, &prompt(0)).as_ref(), Ok(&expected[&(model, prompt(0))]));
    }
}
