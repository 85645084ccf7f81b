//! What text and chat completions have in common.

use serde_json::{Value, json};

use crate::{
    Probe,
    server::{Surface, read, said, written},
};

/// `#`, and a bias that nothing comes up against but what is to be shown.
const SIGN: &str = "11";
/// The token that ends answers.
const END: &str = "2";

pub fn probes() -> Vec<(&'static str, Probe)> {
    vec![
        ("model", model),
        ("stream", stream),
        ("stream_options", stream_options),
        ("max_tokens", |surface| limit(surface, "max_tokens")),
        ("temperature", |surface| assert_ne!(surface.text(&hot(json!({}))), surface.text(&json!({})))),
        ("top_p", |surface| greedy_again(surface, json!({ "top_p": 1e-6 }))),
        ("top_k", |surface| greedy_again(surface, json!({ "top_k": 1 }))),
        ("min_p", |surface| greedy_again(surface, json!({ "min_p": 1 }))),
        ("seed", seed),
        ("stop", stop),
        ("n", n),
        ("presence_penalty", |surface| penalised(surface, "presence_penalty", 2.0)),
        ("frequency_penalty", |surface| penalised(surface, "frequency_penalty", 2.0)),
        ("repetition_penalty", |surface| penalised(surface, "repetition_penalty", 5.0)),
        ("repeat_penalty", repeat_penalty),
        ("typical_p", typical_p),
        ("xtc_probability", xtc_probability),
        ("xtc_threshold", xtc_threshold),
        ("dry_multiplier", dry_multiplier),
        ("dry_base", dry_base),
        ("dry_allowed_length", |surface| {
            repeats_in_spite(surface, json!({ "dry_allowed_length": 2 }), json!({ "dry_allowed_length": 30 }));
        }),
        ("dry_penalty_last_n", |surface| {
            repeats_in_spite(surface, json!({ "dry_penalty_last_n": -1 }), json!({ "dry_penalty_last_n": 1 }));
            repeats_in_spite(surface, json!({ "dry_penalty_last_n": 64 }), json!({ "dry_penalty_last_n": 0 }));
        }),
        ("dry_sequence_breakers", |surface| {
            let breakers = |breaker: &str| json!({ "dry_sequence_breakers": [breaker] });
            repeats_in_spite(surface, breakers("?"), breakers("#"));
        }),
        ("min_tokens", min_tokens),
        ("response_format", response_format),
        ("structured_outputs", structured_outputs),
        ("logit_bias", |surface| assert!(repeats(&surface.text(&biased(json!({})))))),
        ("ignore_eos", ignore_eos),
        ("user", |surface| surface.changes_nothing(&json!({ "user": "somebody" }))),
    ]
}

fn with(mut one: Value, more: Value) -> Value {
    let Value::Object(more) = more else { panic!("{more}") };
    one.as_object_mut().unwrap().extend(more);
    one
}

/// Drawn, and so that all kinds of tokens come.
fn hot(more: Value) -> Value {
    with(json!({ "temperature": 2, "seed": 7 }), more)
}

/// Has one token repeat.
fn biased(more: Value) -> Value {
    with(json!({ "logit_bias": { SIGN: 100 } }), more)
}

/// The same, though others have a probability that is more than nothing.
fn likely(more: Value) -> Value {
    with(json!({ "logit_bias": { SIGN: 60 } }), more)
}

fn repeats(text: &str) -> bool {
    text.len() == 24 && text.bytes().all(|byte| byte == b'#')
}

fn model(surface: &Surface) {
    surface.answer(&json!({}));
    surface.refuses("model", &json!({ "model": null }));
    let (status, answer) = surface.ask(&json!({ "model": "nobody" }));
    assert_eq!((status, answer["error"]["param"].as_str()), (404, Some("model")), "{answer}");
}

pub fn stream(surface: &Surface) {
    let mut streamed = String::new();
    surface.events(&json!({ "stream": true })).iter().for_each(|event| said(event, &mut streamed));
    assert_eq!(streamed, surface.text(&json!({ "stream": false })));
}

fn stream_options(surface: &Surface) {
    let usage = |options: Value| {
        let events = surface.events(&json!({ "stream": true, "stream_options": options }));
        let usages = events.into_iter().filter(|event| event["usage"].is_object());
        usages.map(|event| (read(&event), written(&event))).collect::<Vec<_>>()
    };
    let whole = surface.answer(&json!({}));
    assert_eq!(usage(json!({ "include_usage": true })), [(read(&whole), written(&whole))]);
    assert_eq!(usage(json!({ "include_usage": false })), []);
    surface.refuses("stream_options", &json!({ "stream_options": { "include_usage": true } }));
}

pub fn limit(surface: &Surface, name: &str) {
    for most in [1, 5] {
        let answer = surface.answer(&json!({ "max_tokens": null, name: most }));
        assert_eq!(written(&answer), most, "{answer}");
        assert_eq!(answer["choices"][0]["finish_reason"], "length");
    }
}

fn greedy_again(surface: &Surface, more: Value) {
    let greedy = surface.text(&json!({}));
    assert_ne!(surface.text(&hot(json!({}))), greedy);
    assert_eq!(surface.text(&hot(more)), greedy);
}

fn seed(surface: &Surface) {
    let drawn = |seed: u32| surface.text(&json!({ "temperature": 2, "seed": seed }));
    assert_eq!(drawn(1), drawn(1));
    assert_ne!(drawn(1), drawn(2));
}

fn stop(surface: &Surface) {
    for stops in [json!("###"), json!(["?", "##"])] {
        let answer = surface.answer(&biased(json!({ "stop": stops })));
        let mut text = String::new();
        said(&answer, &mut text);
        assert_eq!((text.as_str(), answer["choices"][0]["finish_reason"].as_str()), ("", Some("stop")), "{answer}");
        assert!(written(&answer) < 24, "{answer}");
    }
    assert!(repeats(&surface.text(&biased(json!({ "stop": "?" })))));
}

fn n(surface: &Surface) {
    let answer = surface.answer(&hot(json!({ "n": 3 })));
    let choices = answer["choices"].as_array().unwrap();
    let texts: Vec<_> = choices
        .iter()
        .map(|choice| {
            let mut text = String::new();
            said(choice, &mut text);
            text
        })
        .collect();
    assert_eq!((texts.len(), written(&answer)), (3, 3 * 24));
    assert_eq!(texts[0], surface.text(&hot(json!({}))), "the first is the one that would be alone");
    assert!(texts[0] != texts[1] && texts[1] != texts[2] && texts[2] != texts[0], "{texts:?}");
}

fn penalised(surface: &Surface, name: &str, penalty: f32) {
    let long = surface.text(&json!({ "max_tokens": 48 }));
    assert_ne!(surface.text(&json!({ "max_tokens": 48, name: penalty })), long);
    let neutral = if name.contains("repe") { 1 } else { 0 };
    assert_eq!(surface.text(&json!({ "max_tokens": 48, name: neutral })), long);
}

fn repeat_penalty(surface: &Surface) {
    penalised(surface, "repeat_penalty", 5.0);
    let text = |name: &str| surface.text(&json!({ "max_tokens": 48, name: 5 }));
    assert_eq!(text("repeat_penalty"), text("repetition_penalty"));
}

/// One token is the most typical, whatever is drawn.
fn typical_p(surface: &Surface) {
    let drawn = |seed: u32, typical_p: f32| surface.text(&hot(json!({ "seed": seed, "typical_p": typical_p })));
    assert_eq!(drawn(1, 1e-6), drawn(2, 1e-6));
    assert_ne!(drawn(1, 1.0), drawn(2, 1.0));
    assert_ne!(drawn(1, 1e-6), drawn(1, 1.0));
    let greedy = surface.text(&json!({ "typical_p": 1e-6 }));
    assert_eq!(greedy, drawn(1, 1e-6));
}

fn xtc_probability(surface: &Surface) {
    let drawn = |more: Value| surface.text(&hot(more));
    assert_eq!(drawn(json!({ "xtc_probability": 0, "xtc_threshold": 0 })), drawn(json!({})));
    for likeliest in [json!({}), hot(json!({}))] {
        let spared = |probability: u32| json!({ "xtc_probability": probability, "xtc_threshold": 0 });
        let repeated = |probability| {
            let more = with(likely(spared(probability)), likeliest.clone());
            // The end, which is to be ignored, is not what is left.
            assert_eq!(written(&surface.answer(&more)), 24, "{more}");
            repeats(&surface.text(&more))
        };
        assert_eq!([0, 1].map(repeated), [true, false], "{likeliest}");
    }
}

/// Two tokens are never both as likely as one half, so that none is spared.
fn xtc_threshold(surface: &Surface) {
    let spared = |threshold: f32| likely(json!({ "xtc_probability": 1, "xtc_threshold": threshold }));
    assert_eq!([0.0, 0.5].map(|threshold| repeats(&surface.text(&hot(spared(threshold))))), [false, true]);
    surface.refuses("xtc_threshold", &json!({ "xtc_threshold": 0.5 }));
}

fn dry_multiplier(surface: &Surface) {
    let repeated = |multiplier: u32| repeats(&surface.text(&biased(json!({ "dry_multiplier": multiplier }))));
    assert_eq!([0, 1, 100].map(repeated), [true, false, false]);
}

fn dry_base(surface: &Surface) {
    let repeated = |base: u32| repeats(&surface.text(&biased(json!({ "dry_multiplier": 5, "dry_base": base }))));
    assert_eq!([1, 4].map(repeated), [true, false]);
    surface.refuses("dry_base", &json!({ "dry_base": 2 }));
}

/// DRY breaks the repetition with the one, and not with the other.
fn repeats_in_spite(surface: &Surface, one: Value, other: Value) {
    let repeated = |more: &Value| {
        surface.refuses(more.as_object().unwrap().keys().next().unwrap(), more);
        repeats(&surface.text(&biased(with(json!({ "dry_multiplier": 100 }), more.clone()))))
    };
    assert!(!repeated(&one), "{one}");
    assert!(repeated(&other), "{other}");
}

fn ignore_eos(surface: &Surface) {
    let answer = |ignored: bool| surface.answer(&json!({ "logit_bias": { END: 100 }, "ignore_eos": ignored }));
    let (ended, ignored) = (answer(false), answer(true));
    assert_eq!((written(&ended), ended["choices"][0]["finish_reason"].as_str()), (1, Some("stop")), "{ended}");
    assert_eq!((written(&ignored), ignored["choices"][0]["finish_reason"].as_str()), (24, Some("length")));
}

fn min_tokens(surface: &Surface) {
    let least = |least: u32| {
        let more = json!({ "logit_bias": { END: 100 }, "ignore_eos": false, "min_tokens": least });
        written(&surface.answer(&more))
    };
    let (without, with) = (least(0), least(6));
    assert_eq!(without, 1);
    assert!((6..=7).contains(&with), "{with} tokens");
}

/// One of two words, which the model would not write by itself.
fn words() -> Value {
    json!({ "enum": ["yes", "no"] })
}

fn response_format(surface: &Surface) {
    let format = |schema: Value| {
        json!({ "ignore_eos": false,
            "response_format": { "type": "json_schema", "json_schema": { "name": "word", "schema": schema } } })
    };
    let text = surface.text(&format(words()));
    assert!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
    surface.changes_nothing(&json!({ "response_format": { "type": "text" } }));
    assert!(surface.text(&json!({ "response_format": { "type": "json_object" } })).starts_with('{'));
    surface.refuses("response_format", &format(json!({ "$ref": "#/nowhere" })));
    let regex = json!({ "ignore_eos": false, "response_format": { "type": "regex", "pattern": "yes|no" } });
    match surface.on_mlx() {
        true => assert!(["yes", "no"].contains(&surface.text(&regex).as_str())),
        false => surface.refuses("response_format", &regex),
    }
}

fn structured_outputs(surface: &Surface) {
    let outputs = |outputs: Value| json!({ "ignore_eos": false, "structured_outputs": outputs });
    let text = surface.text(&outputs(json!({ "json": words() })));
    assert!(["\"yes\"", "\"no\""].contains(&text.as_str()), "{text}");
    surface.refuses("structured_outputs", &outputs(json!({ "json": { "$ref": "#/nowhere" } })));
    let choice = outputs(json!({ "choice": ["yes", "no"] }));
    match surface.on_mlx() {
        true => assert!(["yes", "no"].contains(&surface.text(&choice).as_str())),
        false => surface.refuses("structured_outputs", &choice),
    }
}
