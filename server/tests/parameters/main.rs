//! The parameters of each surface, as the program's own document lists them, on each backend: either one changes what
//! comes back as it should, or it is refused by name. A parameter that is documented and not listed here fails, and so
//! does one that is listed and not documented.
#![cfg(target_os = "linux")]

mod chat;
mod completion;
mod others;
// Processes are killed in the test that it was written for.
#[allow(dead_code)]
#[path = "../robust/program.rs"]
mod program;
mod sampling;
mod server;

use std::{
    collections::{BTreeMap, BTreeSet},
    panic::{AssertUnwindSafe, catch_unwind},
};

use serde_json::{Value, json};
use server::{Backend, Server, Surface};

/// What shows that a parameter is honoured.
type Probe = fn(&Surface);

/// A surface, what shows that its parameters are honoured, and what is refused instead.
struct Plan {
    path: &'static str,
    /// A request that is answered with text that repeats.
    base: Value,
    probes: Vec<(&'static str, Probe)>,
    /// Refused by both backends, with a value that would mean something.
    refused: Vec<(&'static str, Value)>,
    /// Refused by llama-server alone.
    refused_by_llama_server: Vec<(&'static str, Value)>,
}

/// Goes through all parameters of a surface.
fn matrix(server: &Server, plan: &Plan, failed: &mut Vec<String>) {
    let surface = Surface { server, path: plan.path, base: plan.base.clone() };
    let mut refused: BTreeMap<_, _> = plan.refused.iter().cloned().collect();
    if server.backend == Backend::LlamaServer {
        refused.extend(plan.refused_by_llama_server.iter().cloned());
    }
    let probes: BTreeMap<_, _> = plan.probes.iter().copied().collect();
    assert_eq!(probes.len(), plan.probes.len(), "a parameter of {} is probed twice", plan.path);
    let documented = server.documented(plan.path);
    let listed: BTreeSet<_> = probes.keys().chain(refused.keys()).map(|name| (*name).to_owned()).collect();
    let unlisted: Vec<_> = documented.difference(&listed).collect();
    assert!(unlisted.is_empty(), "{}: documented, and not listed here: {unlisted:?}", plan.path);
    // What is always refused need not be documented.
    let honoured = |name: &&String| probes.contains_key(name.as_str());
    let undocumented: Vec<_> = listed.difference(&documented).filter(honoured).collect();
    assert!(undocumented.is_empty(), "{}: honoured, and not documented: {undocumented:?}", plan.path);
    for name in &listed {
        let one = || match refused.get(name.as_str()) {
            Some(value) => surface.refuses(name, &json!({ name: value })),
            None => probes[name.as_str()](&surface),
        };
        if catch_unwind(AssertUnwindSafe(one)).is_err() {
            failed.push(format!("{} {}", plan.path, name));
        }
    }
}

fn all_plans() -> Vec<Plan> {
    vec![completion::plan(), chat::plan(), others::messages(), others::responses()]
}

#[test]
fn every_parameter_is_honoured_or_refused_by_name_on_mlx() {
    let Some(server) = Server::mlx() else { return };
    let mut failed = Vec::new();
    for plan in all_plans().into_iter().chain([others::embeddings()]) {
        matrix(&server, &plan, &mut failed);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}

#[test]
fn every_parameter_is_honoured_or_refused_by_name_on_llama_server() {
    let Some(server) = Server::llama_server() else { return };
    let mut failed = Vec::new();
    for plan in all_plans() {
        matrix(&server, &plan, &mut failed);
    }
    assert!(failed.is_empty(), "{failed:#?}");
    let embeddings = others::embeddings();
    Surface { server: &server, path: embeddings.path, base: embeddings.base }.refuses("model", &json!({}));
}

#[test]
fn switches_that_a_template_does_not_read_are_refused_by_name() {
    let Some(server) = Server::without_a_switch() else {
        return;
    };
    let plan = chat::plan();
    let surface = Surface { server: &server, path: plan.path, base: plan.base };
    surface.refuses("enable_thinking", &json!({ "enable_thinking": true }));
    surface.refuses("reasoning_effort", &json!({ "reasoning_effort": "high" }));
    let plan = others::messages();
    let surface = Surface { server: &server, path: plan.path, base: plan.base };
    surface.refuses("thinking", &json!({ "thinking": { "type": "disabled" } }));
    let plan = others::responses();
    let surface = Surface { server: &server, path: plan.path, base: plan.base };
    surface.refuses("reasoning", &json!({ "reasoning": { "effort": "high" } }));
}
