//! What holds for every dialect, as a function over `&dyn Dialect`.

use mesh_text::{Answer, Delta, Dialect, ParserContext, Tools, assemble};
use proptest::{prelude::*, test_runner::TestRunner};
use serde_json::json;

/// A request that offers `f` and `g`, whose parameters are described, and `h`, of which nothing is known.
pub fn tools() -> ParserContext {
    let parameters = json!({
        "type": "object",
        "properties": {
            "a": {"type": "string"},
            "n": {"type": "integer"},
            "x": {"type": "number"},
            "yes": {"type": "boolean"},
            "list": {"type": "array", "items": {"type": "string"}},
            "deep": {"type": "object", "properties": {"n": {"type": "integer"}, "a": {"type": "string"}}},
            "maybe": {"type": ["string", "null"]},
            "any": {},
        },
    });
    let tool = |name: &str| json!({"type": "function", "function": {"name": name, "parameters": parameters}});
    let tools = Tools::of(&[tool("f"), tool("g"), json!({"type": "function", "function": {"name": "h"}})]);
    ParserContext { prompt_opens_reasoning: false, tools }
}

/// Every kind of context a parser can be made for.
pub fn contexts() -> [ParserContext; 4] {
    let opened = |context: ParserContext| ParserContext { prompt_opens_reasoning: true, ..context };
    [ParserContext::default(), tools(), opened(ParserContext::default()), opened(tools())]
}

/// The deltas of an answer that arrives in these pieces.
pub fn deltas<'a>(
    dialect: &dyn Dialect,
    context: &ParserContext,
    pieces: impl IntoIterator<Item = &'a str>,
) -> Vec<Delta> {
    let mut parser = dialect.parser(context);
    let mut deltas: Vec<Delta> = pieces.into_iter().flat_map(|piece| parser.push(piece)).collect();
    deltas.extend(parser.finish());
    deltas
}

/// The answer that `text` is, having checked that it is the same when cut everywhere, and anywhere once.
pub fn answer(dialect: &dyn Dialect, context: &ParserContext, text: &str) -> Answer {
    let whole = assemble(deltas(dialect, context, [text]));
    let cuts: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
    for &cut in &cuts {
        assert_eq!(assemble(deltas(dialect, context, [&text[..cut], &text[cut..]])), whole, "{text:?} cut at {cut}");
    }
    let characters = text.char_indices().map(|(at, c)| &text[at..at + c.len_utf8()]);
    assert_eq!(assemble(deltas(dialect, context, characters)), whole, "{text:?} cut everywhere");
    whole
}

/// Checks, on random texts made of the dialect's `fragments` and of words, that the answer does not depend on how the
/// text is cut, that no word is lost or doubled, that calls are JSON and counted, and that no delta is empty.
pub fn check(dialect: &dyn Dialect, fragments: &[&str]) {
    // Every third piece or so is a word that occurs nowhere else.
    let piece = 0..fragments.len() * 3 / 2;
    let input = (prop::collection::vec(piece, 0..14), prop::collection::vec(any::<prop::sample::Index>(), 0..6));
    let mut runner = TestRunner::new(ProptestConfig { cases: 1500, failure_persistence: None, ..Default::default() });
    let result = runner.run(&input, |(pieces, cuts)| {
        let mut words = Vec::new();
        let mut text = String::new();
        for (index, piece) in pieces.iter().enumerate() {
            match fragments.get(*piece) {
                Some(fragment) => text.push_str(fragment),
                None => {
                    words.push(format!("w{index}q"));
                    text.push_str(&words[words.len() - 1]);
                }
            }
        }
        let boundaries: Vec<usize> = text.char_indices().map(|(at, _)| at).chain([text.len()]).collect();
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| boundaries[cut.index(boundaries.len())]).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        for context in contexts() {
            let whole = assemble(deltas(dialect, &context, [text.as_str()]));
            let cut = deltas(dialect, &context, cuts.windows(2).map(|pair| &text[pair[0]..pair[1]]));
            let mut calls = 0;
            for delta in &cut {
                match delta {
                    Delta::Content(text) | Delta::Reasoning(text) | Delta::Malformed { text } => {
                        prop_assert!(!text.is_empty());
                    }
                    Delta::ToolCall { index, arguments, .. } => {
                        prop_assert_eq!(*index, calls);
                        prop_assert!(serde_json::from_str::<serde_json::Value>(arguments).unwrap().is_object());
                        calls += 1;
                    }
                }
            }
            prop_assert_eq!(&assemble(cut), &whole, "{:?} {:?}", context, text);
            let mut all = format!("{}{}", whole.reasoning, whole.content);
            whole
                .tool_calls
                .iter()
                .for_each(|call| all.extend([" ", call.name.as_str(), " ", call.arguments.as_str()]));
            for word in &words {
                prop_assert_eq!(all.matches(word.as_str()).count(), 1, "{:?} {:?} {}", context, text, word);
            }
        }
        Ok(())
    });
    result.unwrap_or_else(|failure| panic!("{}: {failure}", dialect.id()));
}

#[test]
fn every_dialect_is_registered() {
    let dialects = mesh_text::dialects().unwrap();
    assert_eq!(dialects.len(), crate::linked());
    let files = std::fs::read_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/src")).unwrap();
    let shared = ["call", "calls", "contract", "lib", "python", "reasoning", "typed"];
    let mut files: Vec<String> = files
        .map(|file| file.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned())
        .filter(|file| !shared.contains(&file.as_str()))
        .collect();
    files.sort_unstable();
    assert_eq!(dialects.ids(), files);
    let unknown = dialects.get("nobody's").map(|_| ()).unwrap_err();
    assert!(unknown.to_string().starts_with("no dialect is called `nobody's`; there are: deepseek, "), "{unknown}");
}
