//! `/v1/completions`.

use serde_json::{Value, json};

use crate::{
    Plan, sampling,
    server::{PROMPT, Surface, read, written},
};

pub fn plan() -> Plan {
    let mut probes = sampling::probes();
    probes.extend([("prompt", prompt as fn(&Surface)), ("logprobs", logprobs), ("echo", echo), ("best_of", best_of)]);
    Plan {
        path: "/v1/completions",
        base: json!({ "prompt": PROMPT, "temperature": 0, "max_tokens": 24, "ignore_eos": true }),
        probes,
        refused: vec![("suffix", json!("the end"))],
        refused_by_llama_server: vec![("min_tokens", json!(6))],
    }
}

fn prompt(surface: &Surface) {
    assert_ne!(surface.text(&json!({ "prompt": "1 + 1 = " })), surface.text(&json!({})));
    assert_eq!(read(&surface.answer(&json!({ "prompt": [40, 50, 60] }))), 3);
    let both = surface.answer(&json!({ "prompt": ["1 + 1 = ", PROMPT] }));
    assert_eq!(both["choices"].as_array().unwrap().len(), 2);
    assert_eq!(both["choices"][1]["text"], surface.text(&json!({})));
    surface.refuses("prompt", &json!({ "prompt": null }));
}

fn logprobs(surface: &Surface) {
    assert_eq!(surface.answer(&json!({}))["choices"][0]["logprobs"], Value::Null);
    let answer = surface.answer(&json!({ "logprobs": 3 }));
    let logprobs = &answer["choices"][0]["logprobs"];
    let top = logprobs["top_logprobs"].as_array().unwrap();
    // With the chosen one, where that is not among them.
    assert!(!top.is_empty() && top.iter().all(|top| (1..=4).contains(&top.as_object().unwrap().len())), "{logprobs}");
    assert!(top.iter().any(|top| top.as_object().unwrap().len() == 3), "{logprobs}");
    assert_eq!(logprobs["token_logprobs"].as_array().unwrap().len(), top.len());
}

fn echo(surface: &Surface) {
    assert_eq!(surface.text(&json!({ "echo": true })), format!("{PROMPT}{}", surface.text(&json!({}))));
}

/// So many are written, and one of them is given.
fn best_of(surface: &Surface) {
    let hot = |more: Value| {
        let mut ask = json!({ "temperature": 2, "seed": 7 });
        ask.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        surface.answer(&ask)
    };
    let (best, all) = (hot(json!({ "best_of": 3 })), hot(json!({ "n": 3, "logprobs": 0 })));
    assert_eq!((best["choices"].as_array().unwrap().len(), written(&best)), (1, 3 * 24));
    let likelihood = |choice: &Value| {
        let each: Vec<f64> =
            choice["logprobs"]["token_logprobs"].as_array().unwrap().iter().filter_map(Value::as_f64).collect();
        each.iter().sum::<f64>() / each.len() as f64
    };
    let mut all = all["choices"].as_array().unwrap().clone();
    all.sort_by(|one, other| likelihood(one).total_cmp(&likelihood(other)));
    assert_eq!(best["choices"][0]["text"], all[2]["text"]);
    assert_ne!(all[0]["text"], all[2]["text"]);
}
