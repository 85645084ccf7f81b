//! Every published template in ../shared/templates renders byte for byte what transformers renders.

use std::{collections::BTreeMap, env, fs, path::PathBuf};

use chrono::NaiveDateTime;
use mesh_text::{Template, TemplateError, TemplateInput};
use serde::Deserialize;
use serde_json::{Map, Value};

#[derive(Deserialize)]
struct Corpus {
    template: String,
    bos_token: Option<String>,
    eos_token: Option<String>,
    now: String,
    cases: Vec<Case>,
}

#[derive(Deserialize)]
struct Case {
    name: String,
    messages: Value,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    expected: Option<String>,
    error: Option<String>,
}

fn corpus() -> Option<Vec<(PathBuf, Corpus)>> {
    let root = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../../shared/templates");
    let Ok(entries) = fs::read_dir(&root) else {
        assert!(env::var_os("CI").is_none(), "{}: not there", root.display());
        println!("skipped: templates ({} is not there)", root.display());
        return None;
    };
    let mut all: Vec<_> = entries
        .map(|entry| entry.expect("a directory entry").path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "json"))
        .map(|path| {
            let text = fs::read_to_string(&path).expect("readable");
            let corpus: Corpus = serde_json::from_str(&text).expect("a corpus file");
            (path, corpus)
        })
        .collect();
    all.sort_by(|a, b| a.0.cmp(&b.0));
    Some(all)
}

fn difference(expected: &str, got: &str) -> String {
    let at = expected.chars().zip(got.chars()).take_while(|(a, b)| a == b).count();
    let around = |text: &str| text.chars().skip(at.saturating_sub(30)).take(120).collect::<String>();
    format!("at {at}\n      expected {:?}\n      got      {:?}", around(expected), around(got))
}

#[test]
fn every_template_renders_as_in_transformers() {
    let Some(corpus) = corpus() else { return };
    let mut table = BTreeMap::new();
    let (mut total, mut good) = (0, 0);
    for (path, corpus) in &corpus {
        let source = fs::read_to_string(path.with_file_name(&corpus.template)).expect("a template");
        let failures: &mut Vec<String> = table.entry(corpus.template.clone()).or_default();
        let template = Template::compile(&source);
        let now: NaiveDateTime = corpus.now.parse().expect("an ISO date");
        for case in &corpus.cases {
            total += 1;
            let got = template.as_ref().map_err(TemplateError::clone).and_then(|template| {
                template.render(&TemplateInput {
                    messages: &case.messages,
                    tools: case.tools.as_ref(),
                    add_generation_prompt: case.add_generation_prompt,
                    bos_token: corpus.bos_token.as_deref(),
                    eos_token: corpus.eos_token.as_deref(),
                    kwargs: &case.kwargs,
                    now,
                })
            });
            let failure = match (&case.expected, &case.error, got) {
                (Some(expected), _, Ok(got)) if *expected == got => None,
                (Some(expected), _, Ok(got)) => Some(difference(expected, &got)),
                (Some(_), _, Err(error)) => Some(error.to_string()),
                (None, Some(error), Ok(got)) => Some(format!("should fail with {error:?}, rendered {got:?}")),
                (None, Some(error), Err(got)) => wrong_error(error, &got),
                (None, None, _) => Some("the corpus says nothing".into()),
            };
            match failure {
                Some(failure) => failures.push(format!("{}: {failure}", case.name)),
                None => good += 1,
            }
        }
    }
    for (template, failures) in table.iter().filter(|(_, failures)| !failures.is_empty()) {
        println!("{template}: {} fail", failures.len());
        failures.iter().for_each(|failure| println!("    {failure}"));
    }
    println!("{good} of {total} cases, {} templates", table.len());
    assert_eq!(good, total);
    assert!(table.len() >= 43 && total >= 43 * 19, "{} templates, {total} cases", table.len());
}

/// What the template itself refuses has to arrive in its own words; what Python refuses, as a failure.
fn wrong_error(expected: &str, got: &TemplateError) -> Option<String> {
    match (expected.strip_prefix("TemplateError: "), got) {
        (Some(words), TemplateError::Refused { what }) if what == words => None,
        (None, TemplateError::Failed { .. }) => None,
        _ => Some(format!("should fail with {expected:?}, failed with {got:?}")),
    }
}
