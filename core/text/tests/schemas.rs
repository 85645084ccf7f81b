//! Whatever is drawn from the tokens that a schema allows, the answer is JSON that the schema validates.

use std::{path::Path, sync::Arc};

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

/// Numbers that look drawn and are the same each time.
struct Draws(u64);

impl Draws {
    fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
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

/// Schemas of which each keyword that can be enforced is a part.
fn by_hand() -> Vec<Value> {
    let mut schemas = vec![
        json!({}),
        json!(true),
        json!({ "type": ["integer", "null", "string"] }),
        json!({ "enum": ["a", 1, null, { "b": [true] }, 2.5, "é\"\\\n"] }),
        json!({ "const": { "a": [1, "x", {}], "b": -3 } }),
        json!({ "const": "</think><tool_call>" }),
        json!({ "type": "string", "minLength": 3, "maxLength": 5 }),
        json!({ "type": "string", "maxLength": 0 }),
        json!({ "type": "string", "pattern": "^[a-c]{2,4}-\\d+$" }),
        json!({ "type": "string", "pattern": "b+" }),
        json!({ "type": "string", "pattern": "^(foo|bär)+$" }),
        json!({ "type": "string", "pattern": "^[0-9]{3}$", "minLength": 3 }),
        json!({ "type": "integer", "minimum": -5, "maximum": 17 }),
        json!({ "type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100, "multipleOf": 7 }),
        json!({ "type": "number", "minimum": 0.5, "exclusiveMaximum": 2 }),
        json!({ "type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10 }),
        json!({ "type": "number", "maximum": -1 }),
        json!({ "type": "array", "items": { "type": "integer" }, "minItems": 2, "maxItems": 4 }),
        json!({ "type": "array", "prefixItems": [{ "type": "boolean" }, { "const": 1 }], "items": false, "minItems": 2 }),
        json!({ "type": "array", "prefixItems": [{ "type": "null" }], "items": { "type": "boolean" }, "maxItems": 3 }),
        json!({ "type": "array", "maxItems": 0 }),
        json!({ "type": "object", "additionalProperties": false }),
        json!({ "type": "object", "additionalProperties": { "type": "boolean" }, "minProperties": 1, "maxProperties": 3 }),
        json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a", "b"] }),
        json!({ "type": "object", "properties": { "a": { "type": "null" }, "b": { "type": "boolean" } },
            "additionalProperties": false }),
        json!({ "type": "object", "patternProperties": { "^x_": { "type": "integer" } }, "additionalProperties": false }),
        json!({ "anyOf": [{ "type": "boolean" }, { "type": "string", "maxLength": 2 }] }),
        json!({ "oneOf": [{ "type": "integer" }, { "type": "array", "items": { "type": "null" } }] }),
        json!({ "oneOf": [
            { "type": "object", "properties": { "kind": { "const": "a" }, "n": { "type": "integer" } },
              "required": ["kind", "n"], "additionalProperties": false },
            { "type": "object", "properties": { "kind": { "const": "b" }, "s": { "enum": ["x", "y"] } },
              "required": ["kind", "s"], "additionalProperties": false }] }),
        json!({ "allOf": [{ "type": "integer", "minimum": 3 }, { "maximum": 9 }] }),
        json!({ "allOf": [
            { "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"] },
            { "type": "object", "properties": { "b": { "type": "boolean" } }, "required": ["b"] }] }),
        json!({ "$ref": "#/$defs/pair",
            "$defs": { "pair": { "type": "array", "items": { "$ref": "#/$defs/digit" }, "minItems": 2, "maxItems": 2 },
                "digit": { "type": "integer", "minimum": 0, "maximum": 9 } } }),
        json!({ "type": "object", "properties": { "value": { "type": "integer" }, "next": {
            "anyOf": [{ "type": "null" }, { "$ref": "#" }] } }, "required": ["value", "next"],
            "additionalProperties": false }),
        json!({ "definitions": { "s": { "type": "string", "maxLength": 4 } }, "type": "object",
            "properties": { "x": { "$ref": "#/definitions/s" } }, "required": ["x"], "additionalProperties": false }),
        json!({ "type": "object", "title": "Person", "description": "d", "$comment": "c", "properties": {
            "name": { "type": "string", "title": "Name", "examples": ["A"] },
            "age": { "type": ["integer", "null"], "minimum": 0, "default": null } },
            "required": ["name", "age"], "additionalProperties": false }),
    ];
    schemas.push(json!({ "format": "date", "pattern": "^2", "allOf": [{ "maxLength": 12 }] }));
    for format in ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"] {
        schemas.push(json!({ "type": "string", "format": format }));
    }
    schemas
}

const PATTERNS: [&str; 4] = ["^[A-Z]{2,5}$", "^\\w+@\\w+$", "^[^x]{0,9}x$", "^(a|bc)*$"];

/// A schema put together by chance.
fn by_chance(draws: &mut Draws, depth: usize) -> Value {
    let kinds = if depth == 0 { 7 } else { 12 };
    let low = draws.below(50) as i64 - 25;
    match draws.below(kinds) {
        0 => json!({ "type": "boolean" }),
        1 => json!({ "type": "integer", "minimum": low, "maximum": low + draws.below(300) as i64 }),
        2 => json!({ "type": "number", "minimum": low, "exclusiveMaximum": low + 1 + draws.below(9) as i64 }),
        3 => json!({ "type": "string", "minLength": draws.below(3), "maxLength": 3 + draws.below(9) }),
        4 => json!({ "enum": (0..1 + draws.below(4)).map(|n| format!("v{n}")).collect::<Vec<_>>() }),
        5 => json!({ "type": "string", "pattern": PATTERNS[draws.below(4)] }),
        6 => json!({ "const": json!([null, 7, "k", [1, 2]])[draws.below(4)] }),
        7 | 8 => {
            let names: Vec<String> = (0..1 + draws.below(4)).map(|n| format!("p{n}")).collect();
            let mut schema = json!({ "type": "object", "properties": {}, "additionalProperties": false });
            for name in &names {
                schema["properties"][name] = by_chance(draws, depth - 1);
            }
            let required: Vec<_> = names.into_iter().filter(|_| draws.below(3) > 0).collect();
            schema["required"] = required.into();
            if draws.below(3) == 0 {
                schema["additionalProperties"] = by_chance(draws, 0);
            }
            schema
        }
        9 => json!({ "type": "array", "items": by_chance(draws, depth - 1), "minItems": draws.below(2),
            "maxItems": 1 + draws.below(4) }),
        10 => json!({ "type": "array", "prefixItems": [by_chance(draws, 0), by_chance(draws, depth - 1)],
            "items": by_chance(draws, 0), "minItems": draws.below(3), "maxItems": 4 }),
        _ => json!({ "anyOf": [by_chance(draws, depth - 1), by_chance(draws, depth - 1)] }),
    }
}

#[test]
fn every_answer_to_200_schemas_validates() {
    let Some(tokenizer) = tokenizer() else { return };
    let vocabulary = Vocabulary::new(&tokenizer, &[], &[END]).unwrap();
    let mut draws = Draws(5);
    let mut schemas = by_hand();
    while schemas.len() < 200 {
        schemas.push(by_chance(&mut draws, 3));
    }
    for (index, schema) in schemas.into_iter().enumerate() {
        let validator = jsonschema::options().should_validate_formats(true).build(&schema).unwrap();
        let rules = vocabulary.rules(&Grammar::JsonSchema(Arc::new(schema.clone())));
        let rules = rules.unwrap_or_else(|error| panic!("{schema}: {error}"));
        for seed in 0..2 {
            let text = walk(&tokenizer, &*rules, index as u64 * 10 + seed);
            let value: Value = match serde_json::from_str(&text) {
                Ok(value) => value,
                // JSON has no bound for numbers; what reads it here has.
                Err(error) if error.to_string().starts_with("number out of range") => continue,
                Err(error) => panic!("{schema}: {error}: {text}"),
            };
            assert!(validator.is_valid(&value), "{schema} does not validate {text}");
        }
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
