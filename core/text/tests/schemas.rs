//! Whatever is drawn from the tokens that a schema allows, the answer is JSON that the schema validates.

use std::{path::Path, sync::Arc};

use conformance::schemas::{self, Draws};
use mesh_core::{Follower, Grammar, Rules};
use mesh_text::{
    ConstraintError, ReasoningForm, Tokenizer, Vocabulary,
    constraint::{
        reasoning::{Reasoning, reasoned},
        watched::watched,
    },
};
use serde_json::{Value, json};

/// Tokens drawn blindly; after them, those that bring an end nearer go first.
const WILD_TOKENS: usize = 40;
/// Tokens after which an answer has failed to end.
const TOKENS_MAX: usize = 4000;
const END: u32 = 2;

/// The tokenizer of the goldens: byte-level, 512 entries, and markers.
fn tokenizer() -> Option<Tokenizer> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/.tokenizer/tokenizer.json");
    if !path.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", path.display());
        eprintln!("skipped: {} is not there", path.display());
        return None;
    }
    Some(Tokenizer::from_file(&path).unwrap())
}

fn allowed(follower: &mut dyn Follower, ids: u32) -> Vec<u32> {
    let mut mask = vec![u32::MAX; ids.div_ceil(32) as usize + 3];
    follower.allowed(&mut mask).unwrap();
    (0..mask.len() as u32 * 32).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect()
}

/// An answer drawn from what `rules` allow.
fn walk(tokenizer: &Tokenizer, rules: &dyn Rules, seed: u64) -> String {
    let (mut draws, mut follower, mut answer) = (Draws(seed), rules.follow(), Vec::new());
    for step in 0..TOKENS_MAX {
        let mut ids = allowed(&mut *follower, tokenizer.ids());
        assert!(!ids.is_empty(), "nothing may come after {:?}", String::from_utf8_lossy(&answer));
        assert!(ids.iter().all(|id| *id < tokenizer.ids()), "a token that there is not");
        if step >= WILD_TOKENS {
            let ends = |id: &u32| match tokenizer.token_bytes(*id).as_deref() {
                _ if *id == END => true,
                Some(bytes) => bytes.iter().all(|byte| b"\"]}".contains(byte)),
                None => false,
            };
            let ending: Vec<u32> = ids.iter().copied().filter(ends).collect();
            if !ending.is_empty() && draws.below(4) > 0 {
                ids = ending;
            }
        }
        let id = ids[draws.below(ids.len())];
        if id == END {
            return String::from_utf8(answer).unwrap();
        }
        answer.extend(tokenizer.token_bytes(id).unwrap());
        follower.take(id).unwrap();
    }
    panic!("no end after {:?}", String::from_utf8_lossy(&answer));
}

#[test]
fn every_answer_to_400_schemas_validates() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Vocabulary::new(&tokenizer, &[], &[END]).unwrap();
    let schemas = [schemas::all(200), schemas::bounded(200)].concat();
    for (index, schema) in schemas.into_iter().enumerate() {
        let rules = vocabulary.rules(&Grammar::JsonSchema(Arc::new(schema.clone())));
        let rules = rules.unwrap_or_else(|error| panic!("{schema}: {error}"));
        let text = walk(&tokenizer, &*rules, index as u64);
        schemas::check(&schema, &text).unwrap();
    }
}

#[test]
fn objects_expressions_and_grammars_are_kept_to() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Vocabulary::new(&tokenizer, &[], &[END]).unwrap();
    for seed in 0..8 {
        let text = walk(&tokenizer, &*vocabulary.rules(&Grammar::JsonObject).unwrap(), seed);
        assert!(serde_json::from_str::<Value>(&text).unwrap().is_object(), "{text}");
        let text = walk(&tokenizer, &*vocabulary.rules(&Grammar::Regex("(yes|no){1,3}!?".into())).unwrap(), seed);
        let rest = text.strip_suffix('!').unwrap_or(&text).replace("yes", "").replace("no", "");
        assert!(rest.is_empty() && !text.is_empty(), "{text}");
        let sum = "start: number (\"+\" number)*\nnumber: /[1-9][0-9]?/";
        let text = walk(&tokenizer, &*vocabulary.rules(&Grammar::Lark(sum.into())).unwrap(), seed);
        assert!(text.split('+').all(|part| part.parse::<u32>().is_ok_and(|n| (1..100).contains(&n))), "{text}");
    }
}

#[test]
fn what_cannot_be_enforced_is_refused() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Vocabulary::new(&tokenizer, &[], &[END]).unwrap();
    let schema = |schema: Value| vocabulary.rules(&Grammar::JsonSchema(Arc::new(schema))).unwrap_err().to_string();
    assert!(schema(json!({ "not": { "type": "null" } })).contains("`not`"));
    assert!(schema(json!({ "oneOf": [{ "minimum": 1 }, { "maximum": 2 }] })).contains("oneOf"));
    assert!(schema(json!({ "type": "string", "pattern": "(?=a)b" })).contains("look-around"));
    assert!(schema(json!({ "type": "strong" })).contains("strong"));
    assert!(schema(json!(false)).contains("false"));
    let lark = |text: &str| vocabulary.rules(&Grammar::Lark(text.into())).map(|_| ()).unwrap_err();
    assert!(matches!(lark("start: nothing"), ConstraintError::Grammar { .. }));
    assert!(lark(&format!("start: \"{}\"", "x".repeat(300_000))).to_string().contains("more than"));
    assert!(matches!(lark("begin: \"x\""), ConstraintError::Grammar { .. }));
    assert!(vocabulary.rules(&Grammar::Regex("(".into())).is_err());
    assert_eq!(Vocabulary::new(&tokenizer, &[], &[]).unwrap_err(), ConstraintError::NoEnd);
}

const THINK: ReasoningForm = ReasoningForm { open: "<think>", close: "</think>", content: "" };

/// The text of a walk whose first tokens are these.
fn walk_after(tokenizer: &Tokenizer, rules: &dyn Rules, begin: &str, seed: u64) -> Result<String, String> {
    let mut follower = rules.follow();
    for id in tokenizer.encode(begin, false).unwrap() {
        if !allowed(&mut *follower, tokenizer.ids()).contains(&id) {
            return Err(format!("{id} may not come"));
        }
        follower.take(id)?;
    }
    let (mut draws, mut answer) = (Draws(seed), begin.as_bytes().to_vec());
    for _ in 0..TOKENS_MAX {
        let ids = allowed(&mut *follower, tokenizer.ids());
        let id = ids[draws.below(ids.len())];
        if id == END {
            return Ok(String::from_utf8_lossy(&answer).into_owned());
        }
        answer.extend(tokenizer.token_bytes(id).unwrap_or_default());
        follower.take(id)?;
    }
    Err("no end".into())
}

#[test]
fn the_grammar_begins_where_the_reasoning_ends() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Arc::new(Vocabulary::new(&tokenizer, &["<think>", "</think>"], &[END]).unwrap());
    let content = || Some(vocabulary.rules(&Grammar::Regex("[0-9]{2}".into())).unwrap());
    let rules =
        |opened, tokens_max| reasoned(&vocabulary, Reasoning { form: THINK, opened, tokens_max }, content()).unwrap();
    for seed in 0..30 {
        // Opened by the prompt: reasoning, the marker, newlines, content; nothing else.
        let text = walk_after(&tokenizer, &*rules(true, None), "so <", seed).unwrap();
        let (_, content) = text.split_once("</think>").unwrap();
        let content = content.trim_start_matches('\n');
        assert!(content.len() == 2 && content.parse::<u32>().is_ok(), "{text:?}");
        // Not opened: the answer may open it, or go to the point.
        assert_eq!(walk_after(&tokenizer, &*rules(false, None), "42", seed).unwrap(), "42");
        let text = walk_after(&tokenizer, &*rules(false, Some(6)), "<think>", seed).unwrap();
        let (reasoning, _) = text.split_once("</think>").unwrap();
        assert!(tokenizer.encode(reasoning, false).unwrap().len() <= 6 * 4 + 1, "{text:?}");
    }
    assert!(walk_after(&tokenizer, &*rules(false, None), "so", 0).is_err());
    assert!(walk_after(&tokenizer, &*rules(true, Some(2)), "abcdefgh", 0).is_err(), "beyond the budget");
    // A marker spelled in pieces ends it as well, and nothing but newlines may hang on to it.
    let follower = &mut *rules(true, None).follow();
    for piece in ["<", "/", "t", "h", "i", "n", "k"] {
        follower.take(tokenizer.encode(piece, false).unwrap()[0]).unwrap();
    }
    let next = allowed(follower, tokenizer.ids());
    let crossing = next
        .iter()
        .map(|id| tokenizer.token_bytes(*id).unwrap())
        .find(|bytes| bytes.strip_prefix(b">").is_some_and(|over| !over.iter().all(|byte| *byte == b'\n')));
    assert_eq!(crossing, None);
    follower.take(tokenizer.encode(">", false).unwrap()[0]).unwrap();
    let next = allowed(follower, tokenizer.ids());
    assert!(next.iter().all(|id| tokenizer.token_bytes(*id).unwrap().iter().all(|b| b"\n0123456789".contains(b))));
}

#[test]
fn a_budget_alone_ends_the_reasoning_and_asks_nothing_else() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Arc::new(Vocabulary::new(&tokenizer, &[], &[END]).unwrap());
    let close = tokenizer.encode("</think>", false).unwrap()[0];
    for (opened, begin) in [(true, ""), (false, "<think>")] {
        let rules = reasoned(&vocabulary, Reasoning { form: THINK, opened, tokens_max: Some(3) }, None).unwrap();
        let follower = &mut *rules.follow();
        for id in tokenizer.encode(begin, false).unwrap().into_iter().chain([300, 301, 302]) {
            assert!(allowed(follower, tokenizer.ids()).contains(&id));
            follower.take(id).unwrap();
        }
        assert_eq!(allowed(follower, tokenizer.ids()), [close]);
        follower.take(close).unwrap();
        assert!(allowed(follower, tokenizer.ids()).len() >= tokenizer.ids() as usize);
    }
    let rules = reasoned(&vocabulary, Reasoning { form: THINK, opened: false, tokens_max: Some(0) }, None).unwrap();
    let follower = &mut *rules.follow();
    for _ in 0..10 {
        assert!(allowed(follower, tokenizer.ids()).contains(&300));
        follower.take(300).unwrap();
    }
}

#[test]
fn calls_are_watched_and_everything_else_is_free() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Arc::new(Vocabulary::new(&tokenizer, &[], &[END]).unwrap());
    let call = vocabulary.rules(&Grammar::Lark("start: \"<tool_call>\" /[0-9]{2}/ \"</tool_call>\"".into())).unwrap();
    let rules = watched(&vocabulary, "<tool_call>", call.clone()).unwrap();
    let follower = &mut *rules.follow();
    let takes = |follower: &mut dyn Follower, text: &str| {
        tokenizer.encode(text, false).unwrap().into_iter().all(|id| {
            let may = allowed(follower, tokenizer.ids()).contains(&id);
            may && follower.take(id).is_ok()
        })
    };
    assert!(takes(follower, "so be it: <tool_call>42</tool_call> and <tool_call>43</tool_call>"));
    assert!(allowed(follower, tokenizer.ids()).contains(&END));
    assert!(takes(follower, "<tool_call>") && !takes(follower, "x"));
    assert!(!allowed(follower, tokenizer.ids()).contains(&END), "a call is under way");
    // Spelled in pieces, it would be read as a call and not be held to anything.
    let follower = &mut *rules.follow();
    for piece in ["<", "t", "o", "o", "l", "_", "c", "a", "l", "l"] {
        assert!(takes(follower, piece), "{piece}");
    }
    assert!(!takes(follower, ">"));
    assert!(takes(follower, "x"));
    assert!(watched(&vocabulary, "<no such token>", call).is_err());
}
