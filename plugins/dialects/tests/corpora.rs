//! Every dialect reads the answers in `corpora/<dialect>.json` as they say, whole and cut anywhere; and texts that nobody
//! would write are survived.

use std::{fs, path::PathBuf};

use mesh_text::{Answer, AnsweredCall, Delta, Dialect, ParserContext, Tools, assemble, dialects};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::Value;

/// Fewest cases a dialect has.
const CASES_MIN: usize = 20;

fn read(name: &str) -> Value {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/corpora").join(format!("{name}.json"));
    let text = fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    serde_json::from_str(&text).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn expected(case: &Value) -> Answer {
    let text = |value: &Value| value.as_str().expect("a text").to_owned();
    let expected = &case["expected"];
    let call = |call: &Value| AnsweredCall { name: text(&call["name"]), arguments: text(&call["arguments"]) };
    Answer {
        content: text(&expected["content"]),
        reasoning: text(&expected["reasoning"]),
        tool_calls: expected["tool_calls"].as_array().expect("a list").iter().map(call).collect(),
    }
}

fn context(corpus: &Value, case: &Value) -> ParserContext {
    let tools = corpus["tools"].as_array().expect("tools").as_slice();
    let tools = if case["tools"].as_bool().expect("a truth value") { tools } else { &[] };
    let prompt_opens_reasoning = case["prompt_opens_reasoning"].as_bool().expect("a truth value");
    ParserContext { prompt_opens_reasoning, tools: Tools::of(tools) }
}

fn deltas<'a>(dialect: &dyn Dialect, context: &ParserContext, pieces: impl IntoIterator<Item = &'a str>) -> Vec<Delta> {
    let mut parser = dialect.parser(context);
    let mut deltas: Vec<Delta> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish());
    deltas
}

#[test]
fn answers_are_read_as_the_corpora_say_however_they_are_cut() {
    assert_eq!(dialects().unwrap().len(), mesh_dialects::linked());
    let mut failures = Vec::new();
    for dialect in dialects().unwrap().iter() {
        let corpus = read(dialect.id());
        let cases = corpus["cases"].as_array().expect("cases");
        assert!(cases.len() >= CASES_MIN, "{}: {} cases", dialect.id(), cases.len());
        for case in cases {
            let (context, expected) = (context(&corpus, case), expected(case));
            let text = case["text"].as_str().expect("a text");
            let whole = assemble(deltas(dialect, &context, [text]));
            if whole != expected {
                failures.push(format!("{}, {}: {text:?}\n  {expected:?}\n  {whole:?}", dialect.id(), case["name"]));
                continue;
            }
            for (cut, _) in text.char_indices() {
                let cut_once = assemble(deltas(dialect, &context, [&text[..cut], &text[cut..]]));
                assert_eq!(cut_once, expected, "{}, {}: cut at {cut}", dialect.id(), case["name"]);
            }
            let characters = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
            let by_character = assemble(deltas(dialect, &context, characters));
            assert_eq!(by_character, expected, "{}, {}: character by character", dialect.id(), case["name"]);
        }
    }
    assert!(failures.is_empty(), "{}", failures.join("\n"));
}

#[test]
fn a_call_that_does_not_parse_is_told_from_content() {
    for dialect in dialects().unwrap().iter().filter(|dialect| dialect.tools()) {
        let corpus = read(dialect.id());
        let cases = corpus["cases"].as_array().expect("cases");
        let case = cases.iter().find(|case| case["name"] == "cut off in a call");
        let case = case.unwrap_or_else(|| panic!("{}: no call that is cut off", dialect.id()));
        let deltas = deltas(dialect, &context(&corpus, case), [case["text"].as_str().expect("a text")]);
        assert!(matches!(deltas.last(), Some(Delta::Malformed { .. })), "{}: {deltas:?}", dialect.id());
    }
}

/// Words between markers of any dialect, and pieces of JSON, Python and tags.
#[test]
fn texts_that_nobody_writes_are_survived() {
    let corpora: Vec<(&dyn Dialect, Value)> =
        dialects().unwrap().iter().map(|dialect| (dialect, read(dialect.id()))).collect();
    let offered = Tools::of(corpora[0].1["tools"].as_array().expect("tools"));
    let common = [
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "\"",
        "'",
        "\\",
        ":",
        ",",
        "=",
        "\n",
        " ",
        "f",
        "\"name\": \"f\"",
        "\"arguments\": ",
        "{\"name\": \"f\"}",
        "{\"a\": \"é\"}",
        "<function=f>",
        "<parameter=a>",
        "</parameter>",
        "</function>",
        "</invoke>",
        "<invoke name=\"f\">",
        "<parameter name=\"a\">",
        "call:f",
        "[f(",
        "a=",
        "functions.f:0",
        " to=functions.f",
        "analysis",
        "assistant",
        "final",
        "<",
        "👩‍🚀",
    ];
    for (dialect, _) in &corpora {
        for tools in [Tools::default(), offered.clone()] {
            for prompt_opens_reasoning in [false, true] {
                let context = ParserContext { prompt_opens_reasoning, tools: tools.clone() };
                survives(*dialect, &context, &[dialect.markers(&context), &common].concat());
            }
        }
    }
}

fn survives(dialect: &dyn Dialect, context: &ParserContext, fragments: &[&str]) {
    let piece = 0..fragments.len() * 5 / 4;
    let input = (prop::collection::vec(piece, 0..24), prop::collection::vec(any::<prop::sample::Index>(), 0..8));
    let mut runner = TestRunner::new(ProptestConfig { cases: 300, failure_persistence: None, ..Default::default() });
    let result = runner.run(&input, |(pieces, cuts)| {
        let word = |index: usize| format!("w{index}q");
        let text: String = pieces
            .iter()
            .enumerate()
            .map(|(index, piece)| fragments.get(*piece).map_or_else(|| word(index), |fragment| (*fragment).to_owned()))
            .collect();
        let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let whole = assemble(deltas(dialect, context, [text.as_str()]));
        let cut = assemble(deltas(dialect, context, cuts.windows(2).map(|pair| &text[pair[0]..pair[1]])));
        prop_assert_eq!(&cut, &whole, "{:?}", text);
        let calls = whole.tool_calls.iter().map(|call| format!(" {} {}", call.name, call.arguments));
        let all = [whole.reasoning.as_str(), " ", whole.content.as_str()].concat() + &calls.collect::<String>();
        for index in (0..pieces.len()).filter(|index| pieces[*index] >= fragments.len()) {
            prop_assert_eq!(all.matches(&word(index)).count(), 1, "{:?} {}", text, word(index));
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{} (tools: {}): {failure}", dialect.id(), !context.tools.is_empty()));
}
