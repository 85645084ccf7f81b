//! What holds for every dialect, as a function over `&dyn Dialect`.

use mesh_text::{Answer, Delta, Dialect, ParserContext, assemble};
use proptest::{prelude::*, test_runner::TestRunner};

/// Every context a parser can be made for.
pub const CONTEXTS: [ParserContext; 4] = [
    ParserContext { prompt_opens_reasoning: false, tools: false },
    ParserContext { prompt_opens_reasoning: false, tools: true },
    ParserContext { prompt_opens_reasoning: true, tools: false },
    ParserContext { prompt_opens_reasoning: true, tools: true },
];

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
        for context in CONTEXTS {
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
            whole.tool_calls.iter().for_each(|call| all.push_str(&call.arguments));
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
    assert_eq!(dialects.ids(), ["hermes", "llama3_json", "plain", "think"]);
    let unknown = dialects.get("harmony").map(|_| ()).unwrap_err();
    assert_eq!(unknown.to_string(), "no dialect is called `harmony`; there are: hermes, llama3_json, plain, think");
}
