//! Where a dialect says how calls are written, it reads what is written so.

use std::path::Path;

use mesh_core::Grammar;
use mesh_dialects as _;
use mesh_text::{CallSchema, ParserContext, Tokenizer, Tools, Vocabulary, assemble, dialects};
use serde_json::{Value, json};

const END: u32 = 2;
const TOKENS_MAX: usize = 4000;

#[test]
fn calls_that_are_drawn_from_a_dialects_grammar_are_read_by_it() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/golden/.tokenizer/tokenizer.json");
    if !path.exists() {
        assert!(std::env::var_os("CI").is_none(), "{} is missing", path.display());
        eprintln!("skipped: {} is not there", path.display());
        return;
    }
    let tokenizer = Tokenizer::from_file(&path).unwrap();
    let parameters = json!({
        "type": "object",
        "properties": { "city": { "$ref": "#/$defs/city" }, "days": { "type": "integer", "minimum": 1, "maximum": 9 } },
        "required": ["city", "days"],
        "additionalProperties": false,
        "$defs": { "city": { "enum": ["Paris", "a </tool_call> b", "\"é\""] } },
    });
    let calls = [
        CallSchema { name: "weather".into(), parameters },
        CallSchema { name: "now".into(), parameters: json!({ "type": "object", "additionalProperties": false }) },
    ];
    let offered = calls.iter().map(|call| json!({ "name": call.name, "parameters": call.parameters }));
    let offered = Tools::of(&offered.collect::<Vec<_>>());
    let mut forms = 0;
    for dialect in dialects().unwrap().iter() {
        let context = ParserContext { prompt_opens_reasoning: false, tools: offered.clone() };
        let vocabulary = Vocabulary::new(&tokenizer, dialect.markers(&context), &[END]).unwrap();
        for many in [false, true] {
            let Some(lark) = dialect.call_grammar(&calls, many) else { continue };
            forms += 1;
            let rules = vocabulary.rules(&Grammar::Lark(lark.as_str().into()));
            let rules = rules.unwrap_or_else(|error| panic!("{}: {error}: {lark}", dialect.id()));
            let mut state = 7u64;
            let mut most = 0;
            for _ in 0..20 {
                let (mut follower, mut text) = (rules.follow(), Vec::new());
                let ended = (0..TOKENS_MAX).any(|_| {
                    let mut mask = vec![0u32; tokenizer.ids().div_ceil(32) as usize];
                    follower.allowed(&mut mask).unwrap();
                    let ids: Vec<u32> =
                        (0..tokenizer.ids()).filter(|id| mask[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
                    state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                    let id = ids[(state >> 33) as usize % ids.len()];
                    if id == END {
                        return true;
                    }
                    text.extend(tokenizer.token_bytes(id).unwrap());
                    follower.take(id).unwrap();
                    false
                });
                let text = String::from_utf8(text).unwrap();
                assert!(ended, "{text}");
                let mut parser = dialect.parser(&context);
                let mut deltas = parser.push(&text);
                deltas.extend(parser.finish());
                let answer = assemble(deltas);
                assert_eq!(answer.content, "", "{}: {text}", dialect.id());
                assert!((1..=if many { 16 } else { 1 }).contains(&answer.tool_calls.len()), "{text}");
                most = most.max(answer.tool_calls.len());
                for call in answer.tool_calls {
                    let arguments: Value = serde_json::from_str(&call.arguments).unwrap();
                    match call.name.as_str() {
                        "weather" => assert!((1..=9).contains(&arguments["days"].as_i64().unwrap()), "{text}"),
                        "now" => assert_eq!(arguments, json!({})),
                        other => panic!("{other} is none of the functions"),
                    }
                }
            }
            assert!(!many || most > 1, "never several calls");
        }
    }
    assert!(forms >= 4, "two dialects have such a form");
}
