//! Every published template in ../shared/templates renders byte for byte what transformers renders. `TEMPLATES_DIR` names
//! another folder of the same form, which has to be there.

use std::{collections::BTreeMap, env, fs, path::PathBuf};

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

#[derive(Clone, Deserialize)]
struct Case {
    name: String,
    messages: Value,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    add_generation_prompt: bool,
    expected: Option<String>,
    error: Option<String>,
}

impl Corpus {
    fn input<'a>(&'a self, case: &'a Case) -> TemplateInput<'a> {
        TemplateInput {
            messages: &case.messages,
            tools: case.tools.as_ref(),
            add_generation_prompt: case.add_generation_prompt,
            bos_token: self.bos_token.as_deref(),
            eos_token: self.eos_token.as_deref(),
            kwargs: &case.kwargs,
            now: self.now.parse().expect("an ISO date"),
        }
    }
}

/// Names a folder to be read instead of the shared one.
const FOLDER: &str = "TEMPLATES_DIR";

fn corpus() -> Option<Vec<(PathBuf, Corpus)>> {
    let workspace = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../..");
    let root = match env::var_os(FOLDER) {
        Some(folder) => {
            // Cargo runs tests in their crate's folder; a relative path counts from where the command was given.
            let root = workspace.join(folder);
            assert!(root.is_dir(), "{FOLDER}: {} is not there", root.display());
            root
        }
        None => workspace.join("../shared/templates"),
    };
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
            let corpus: Corpus =
                serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
            (path, corpus)
        })
        .collect();
    assert!(!all.is_empty(), "{}: no conversations", root.display());
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
        for case in &corpus.cases {
            total += 1;
            let got = template
                .as_ref()
                .map_err(TemplateError::clone)
                .and_then(|template| template.render(&corpus.input(case)));
            let failure = match (&case.expected, &case.error, got) {
                (Some(expected), _, Ok(got)) if *expected == got => None,
                (Some(expected), _, Ok(got)) => Some(difference(expected, &got)),
                (Some(_), _, Err(error)) => Some(error.to_string()),
                (None, Some(error), got) => {
                    let template = template.as_ref().expect("its other cases show that it compiles");
                    wrong_error(error, &got, corpus, case, template)
                }
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
    assert!(total > 0, "no conversations");
    if env::var_os(FOLDER).is_none() {
        assert!(table.len() >= 43 && total >= 43 * 19, "{} templates, {total} cases", table.len());
    }
}

/// Cases where transformers fails by a quirk of Python, and a sensible rendering is accepted. Each says why, and what
/// shows that the rendering is the sensible one.
enum Quirk {
    /// `for … in None`: nothing to iterate over. Has to equal the rendering of the conversation in which the `None` is
    /// an empty list of tools, or an empty text.
    IteratesNone,
    /// `tojson` of a lazy sequence (`map`, `selectattr`), which Python's json does not know. Has to hold every tool.
    SerializesGenerator,
}

/// How such an error ends.
const QUIRKS: &[(&str, Quirk)] = &[
    ("'NoneType' object is not iterable", Quirk::IteratesNone),
    ("Object of type generator is not JSON serializable", Quirk::SerializesGenerator),
];

/// What the template itself refuses has to arrive in its own words; what Python refuses, as a failure, or as one of the
/// [`QUIRKS`].
fn wrong_error(
    expected: &str,
    got: &Result<String, TemplateError>,
    corpus: &Corpus,
    case: &Case,
    template: &Template,
) -> Option<String> {
    if let Ok(text) = got {
        let quirk = QUIRKS.iter().find(|(error, _)| expected.ends_with(error));
        return match quirk {
            Some((_, Quirk::IteratesNone)) => {
                let plain = without_none(case);
                let plain = template.render(&corpus.input(&plain));
                (plain.as_ref() != Ok(text)).then(|| format!("rendered {text:?}, without None {plain:?}"))
            }
            Some((_, Quirk::SerializesGenerator)) => {
                let tools = case.tools.iter().flat_map(|tools| tools.as_array().expect("a list"));
                let mut names = tools.map(|tool| format!("\"name\": {}", tool["function"]["name"]));
                let missing = names.find(|name| !text.contains(name));
                missing.map(|name| format!("rendered {text:?} without {name}"))
            }
            None => Some(format!("should fail with {expected:?}, rendered {text:?}")),
        };
    }
    match (expected.strip_prefix("TemplateError: "), got) {
        (Some(words), Err(TemplateError::Refused { what })) if what == words => None,
        (None, Err(TemplateError::Failed { .. })) => None,
        _ => Some(format!("should fail with {expected:?}, failed with {got:?}")),
    }
}

fn without_none(case: &Case) -> Case {
    let mut case = case.clone();
    case.tools.get_or_insert_with(|| Value::Array(Vec::new()));
    for message in case.messages.as_array_mut().expect("a list") {
        if message["content"].is_null() {
            message["content"] = Value::String(String::new());
        }
    }
    case
}
