//! Landmarks over published templates: what the next turn has in common with a prompt ends at one of them.

use std::{fs, path::PathBuf};

use mesh_text::{Template, TemplateInput, Tokenizer};
use serde_json::{Map, Value, json};

use super::*;

fn shared() -> Option<PathBuf> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared");
    if root.join("templates").is_dir() {
        return Some(root);
    }
    assert!(std::env::var_os("CI").is_none(), "{}: not there", root.display());
    println!("skipped: landmarks ({} is not there)", root.display());
    None
}

/// One template with one conversation's tools and variables.
struct Voice<'a> {
    name: String,
    template: &'a Template,
    corpus: &'a Value,
    case: &'a Value,
    tokenizer: &'a Tokenizer,
}

impl Voice<'_> {
    fn render(&self, messages: Vec<Value>, add_generation_prompt: bool) -> Option<String> {
        let kwargs: Map<String, Value> = self.case["kwargs"].as_object().unwrap().clone();
        let input = TemplateInput {
            messages: &Value::Array(messages),
            tools: self.case.get("tools").filter(|tools| !tools.is_null()),
            add_generation_prompt,
            bos_token: self.corpus["bos_token"].as_str(),
            eos_token: self.corpus["eos_token"].as_str(),
            kwargs: &kwargs,
            now: self.corpus["now"].as_str().unwrap().parse().unwrap(),
        };
        self.template.render(&input).ok()
    }

    fn tools(&self) -> bool {
        !self.case["tools"].is_null()
    }

    fn prompt(&self, messages: &[Value]) -> Option<(String, Vec<u32>, Vec<usize>)> {
        self.tokens(self.render(messages.to_vec(), true)?)
    }

    fn prompt_without_opening(&self, messages: &[Value]) -> Option<(String, Vec<u32>, Vec<usize>)> {
        self.tokens(self.render(messages.to_vec(), false)?)
    }

    fn tokens(&self, text: String) -> Option<(String, Vec<u32>, Vec<usize>)> {
        let (ids, ends) = self.tokenizer.encode_with_ends(&text, false).unwrap();
        assert_eq!(ids, self.tokenizer.encode(&text, false).unwrap());
        Some((text, ids, ends))
    }

    fn landmarks(&self, messages: &[Value]) -> Option<(Landmarks, Vec<u32>)> {
        let (text, ids, ends) = self.prompt(messages)?;
        let landmarks = find(messages, self.tools(), &text, &ends, |messages| self.render(messages, false));
        assert!(landmarks.message_ends.is_sorted_by(|one, next| one < next), "{}: {landmarks:?}", self.name);
        assert!(landmarks.message_ends.iter().all(|end| (1..ids.len() as u32).contains(end)), "{}", self.name);
        Some((landmarks, ids))
    }
}

/// Calls `check` for each template with each conversation that ends with somebody waiting for an answer.
fn for_each_voice(mut check: impl FnMut(&Voice<'_>, &[Value])) {
    let Some(root) = shared() else { return };
    let tokenizer = Tokenizer::from_file(&root.join("golden/.tokenizer/tokenizer.json")).unwrap();
    let mut paths: Vec<_> = fs::read_dir(root.join("templates")).unwrap().map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    for path in paths.iter().filter(|path| path.extension().is_some_and(|extension| extension == "jinja")) {
        let template = Template::compile(&fs::read_to_string(path).unwrap()).unwrap();
        let corpus: Value = serde_json::from_str(&fs::read_to_string(path.with_extension("json")).unwrap()).unwrap();
        for case in corpus["cases"].as_array().unwrap() {
            let messages = case["messages"].as_array().unwrap();
            if messages.last().unwrap()["role"] != "assistant" {
                let file = path.file_stem().unwrap().to_string_lossy();
                let name = format!("{file}, {}", case["name"].as_str().unwrap());
                check(&Voice { name, template: &template, corpus: &corpus, case, tokenizer: &tokenizer }, messages);
            }
        }
    }
}

fn common(one: &[u32], two: &[u32]) -> u32 {
    one.iter().zip(two).take_while(|(one, two)| one == two).count() as u32
}

/// What may follow a conversation: an answer with reasoning and another question, or a call of a tool and its result.
fn follow_ups(messages: &[Value], tools: bool) -> Vec<Vec<Value>> {
    let after = |more: &[Value]| [messages, more].concat();
    let answer = json!({ "role": "assistant", "content": "It is so.", "reasoning_content": "Let me see." });
    let mut all = vec![after(&[answer, json!({ "role": "user", "content": "And then?" })])];
    if tools {
        let function = json!({ "name": "get_weather", "arguments": { "city": "Paris" } });
        let call = json!({ "role": "assistant", "content": "", "reasoning_content": "Weather.",
            "tool_calls": [{ "id": "abcdefghi", "type": "function", "function": function }] });
        all.push(after(&[call, json!({ "role": "tool", "tool_call_id": "abcdefghi", "content": "sunny" })]));
    }
    all
}

#[test]
fn the_next_turn_parts_at_a_landmark() {
    let (mut checked, mut missed) = (0, Vec::new());
    for_each_voice(|voice, messages| {
        let Some((landmarks, ids)) = voice.landmarks(messages) else { return };
        // A landmark may lie before the best place by no more than what opens an answer.
        let (_, without, _) = voice.prompt_without_opening(messages).unwrap();
        let opening = ids.len() as u32 - common(&ids, &without);
        for later in follow_ups(messages, voice.tools()) {
            let Some((_, later_ids, _)) = voice.prompt(&later) else { continue };
            let best = common(&ids, &later_ids);
            let usable = landmarks.message_ends.iter().copied().filter(|end| *end <= best).max().unwrap_or(0);
            checked += 1;
            if usable + opening.max(1) < best {
                let role = &later.last().unwrap()["role"];
                missed.push(format!("{} ({role}): best {best} of {}, {landmarks:?}", voice.name, ids.len()));
            }
        }
    });
    println!("{checked} turns, {} missed", missed.len());
    assert!(checked == 0 || checked > 700, "only {checked} turns were rendered");
    assert!(missed.is_empty(), "{} of {checked}:\n{}", missed.len(), missed.join("\n"));
}

#[test]
fn conversations_with_the_same_preamble_part_where_it_ends() {
    let (mut checked, mut missed) = (0, Vec::new());
    for_each_voice(|voice, messages| {
        let Some((landmarks, ids)) = voice.landmarks(messages) else { return };
        let preamble: Vec<_> = messages.iter().take_while(|message| message["role"] == "system").cloned().collect();
        let asking = |text: &str| [&preamble[..], &[json!({ "role": "user", "content": text })]].concat();
        let Some((_, other, _)) = voice.prompt(&asking("\u{1} something else")) else { return };
        let (shared, found) = (common(&ids, &other), landmarks.preamble_end.unwrap_or(0));
        checked += 1;
        if found != shared {
            missed.push(format!("{}: {shared} tokens are shared, {found} found", voice.name));
        }
    });
    println!("{checked} preambles, {} missed", missed.len());
    assert!(checked == 0 || checked > 600, "only {checked} prompts were rendered");
    assert!(missed.is_empty(), "{} of {checked}:\n{}", missed.len(), missed.join("\n"));
}

#[test]
fn a_landmark_within_a_token_goes_to_its_start() {
    let messages = [json!({ "role": "user", "content": "abc" })];
    let render = |messages: Vec<Value>| {
        let texts = messages.iter().map(|message| message["content"].as_str().unwrap().to_owned() + ";");
        Some(texts.collect::<String>())
    };
    // "abc" | ";>" | "!": the message ends within the second token.
    let landmarks = find(&messages, false, "abc;>!", &[3, 5, 6], render);
    assert_eq!(landmarks, Landmarks { message_ends: vec![1], preamble_end: None });
}

#[test]
fn a_template_that_refuses_has_no_landmarks_and_does_no_harm() {
    let messages = [json!({ "role": "user", "content": "abc" }), json!({ "role": "assistant", "content": null })];
    assert_eq!(find(&messages, true, "abc", &[1, 2, 3], |_| None), Landmarks::default());
    assert_eq!(find(&[], true, "", &[], |_| Some(String::new())), Landmarks::default());
}

#[test]
fn looking_takes_six_renderings_at_most() {
    let messages: Vec<_> = ["system", "user", "assistant", "tool", "tool", "tool", "tool"]
        .map(|role| json!({ "role": role, "content": "x" }))
        .into();
    let count = std::cell::Cell::new(0);
    find(&messages, true, "x", &[1], |_| {
        count.set(count.get() + 1);
        None
    });
    assert_eq!(count.get(), 6);
}
