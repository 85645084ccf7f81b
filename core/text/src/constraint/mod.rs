//! Grammars in terms of a tokenizer, over the `llguidance` crate: which tokens may come next.
//!
//! - [`schema`]: which JSON schemas can be enforced.
//! - [`reasoning`]: answers that reason first, for as long as they may.
//! - [`watched`]: answers that are free but for their calls.

pub mod reasoning;
pub mod schema;
pub mod watched;

use std::{
    fmt,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, Mutex, PoisonError},
};

use llguidance::{
    Matcher, ParserFactory,
    api::{ParserLimits, TopLevelGrammar},
    toktrie::{TokEnv, TokRxInfo, TokTrie, TokenizerEnv},
};
use mesh_core::{Follower, Grammar, Rules};
use serde_json::{Value, json};

use crate::{dialect::CallSchema, tokenizer::Tokenizer};
use schema::SchemaError;

/// Longest grammar or regular expression, in bytes.
pub const GRAMMAR_BYTES_MAX: usize = 256 << 10;
/// Most calls of an answer that has to be calls.
pub const CALLS_MAX: usize = 16;
/// Longest token that a constraint may use, in bytes.
const TOKEN_BYTES_MAX: usize = 1024;
/// Most states of one grammar's lexer. Each takes up to 2 kB.
const LEXER_STATES_MAX: usize = 50_000;

/// White space between the tokens of JSON: a space, or a new line and its indent. No more, since a model that has lost its way
/// writes spaces without end.
const WHITESPACE: &str = r"\x20|\x0A{1,2}[\x20\x09]{0,20}";

/// Why an answer cannot be held to a grammar.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ConstraintError {
    /// The schema says something that cannot be enforced.
    #[error(transparent)]
    Schema(#[from] SchemaError),
    /// The grammar is not one, or is too large.
    #[error("it cannot be enforced: {what}")]
    Grammar {
        /// Why.
        what: String,
    },
    /// The model has no token that says that an answer is over.
    #[error("the model names no end-of-text token, so that an answer could not end where the grammar does")]
    NoEnd,
    /// The tokenizer does not fit.
    #[error("the model's tokenizer cannot be used for it: {what}")]
    Tokenizer {
        /// Why.
        what: String,
    },
}

/// A tokenizer's tokens, arranged for grammars. Made once for a model; takes a moment.
pub struct Vocabulary {
    tokenizer: Tokenizer,
    factory: ParserFactory,
    env: TokEnv,
}

impl fmt::Debug for Vocabulary {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vocabulary").field("tokens", &self.trie().vocab_size()).finish()
    }
}

struct Env(TokTrie);

impl TokenizerEnv for Env {
    fn tok_trie(&self) -> &TokTrie {
        &self.0
    }

    fn tokenize_bytes(&self, bytes: &[u8]) -> Vec<u32> {
        self.0.greedy_tokenize(bytes)
    }

    // The model says how it spells what the grammar leaves no choice about.
    fn tokenize_is_canonical(&self) -> bool {
        false
    }
}

impl Vocabulary {
    /// The tokens of `tokenizer`. Special ones are never part of an answer, except for those in `keep`, which are part of
    /// what the decoder lets through. `eos` are the tokens that end an answer.
    ///
    /// # Errors
    ///
    /// There is no such token.
    pub fn new(tokenizer: &Tokenizer, keep: &[&str], eos: &[u32]) -> Result<Self, ConstraintError> {
        let ids = tokenizer.ids();
        let eos: Vec<u32> = eos.iter().copied().filter(|id| *id < ids).collect();
        let Some(&first) = eos.first() else { return Err(ConstraintError::NoEnd) };
        let word = |id: u32| {
            let Some(token) = tokenizer.decoded_token(id) else { return Vec::new() };
            let bytes = tokenizer.token_bytes(id).unwrap_or_default();
            let special = eos.contains(&id) || (tokenizer.is_special(&token) && !keep.contains(&token.as_str()));
            match special {
                true => [&[TokTrie::SPECIAL_TOKEN_MARKER], token.as_bytes()].concat(),
                false if bytes.len() > TOKEN_BYTES_MAX => Vec::new(),
                false => bytes,
            }
        };
        let made = catch_unwind(AssertUnwindSafe(|| {
            let words: Vec<Vec<u8>> = (0..ids).map(word).collect();
            let trie = TokTrie::from(&TokRxInfo::new(ids, first), &words).with_eos_tokens(&eos);
            let env: TokEnv = Arc::new(Env(trie));
            let mut factory = ParserFactory::new_simple(&env)?;
            factory.quiet();
            *factory.limits_mut() = ParserLimits {
                max_lexer_states: LEXER_STATES_MAX,
                // They would hold what was generated so far.
                verbose_errors: false,
                ..ParserLimits::default()
            };
            Ok::<_, llguidance_error::Error>((env, factory))
        }));
        match made {
            Ok(Ok((env, factory))) => Ok(Self { tokenizer: tokenizer.clone(), factory, env }),
            Ok(Err(error)) => Err(ConstraintError::Tokenizer { what: error.to_string() }),
            Err(_) => Err(ConstraintError::Tokenizer { what: "its tokens cannot be arranged".into() }),
        }
    }

    /// What keeps to `grammar`.
    ///
    /// # Errors
    ///
    /// It says something that cannot be enforced, is no grammar, or is too large.
    pub fn rules(&self, grammar: &Grammar) -> Result<Arc<dyn Rules>, ConstraintError> {
        let top = match grammar {
            Grammar::JsonObject => TopLevelGrammar::from_json_schema(spaced(json!({ "type": "object" }))),
            Grammar::JsonSchema(value) => TopLevelGrammar::from_json_schema(spaced(schema::enforceable(value)?)),
            Grammar::Regex(pattern) => TopLevelGrammar::from_regex(bounded(pattern)?),
            Grammar::Lark(text) => TopLevelGrammar::from_lark(bounded(text)?.to_owned()),
        };
        let made = catch_unwind(AssertUnwindSafe(|| Matcher::new(self.factory.create_parser(top))));
        let matcher = made.map_err(|_| grammar_error("the grammar is broken"))?;
        if let Some(what) = matcher.get_error() {
            return Err(grammar_error(what.trim()));
        }
        Ok(Arc::new(Compiled(Mutex::new(matcher))))
    }

    fn trie(&self) -> &TokTrie {
        self.env.tok_trie()
    }
}

fn set(mask: &mut [u32], id: u32) {
    if let Some(word) = mask.get_mut(id as usize / 32) {
        *word |= 1 << (id % 32);
    }
}

fn clear(mask: &mut [u32], id: u32) {
    if let Some(word) = mask.get_mut(id as usize / 32) {
        *word &= !(1 << (id % 32));
    }
}

/// Whether `marker` is in `bytes`.
fn has(bytes: &[u8], marker: &[u8]) -> bool {
    bytes.windows(marker.len().max(1)).any(|window| window == marker)
}

/// What is missing of `marker` where `tail` ends with a beginning of it; there may be several.
fn begun<'m>(tail: &[u8], marker: &'m [u8]) -> Vec<&'m [u8]> {
    (1..marker.len()).filter(|length| tail.ends_with(&marker[..*length])).map(|length| &marker[length..]).collect()
}

/// The error type of the crate's functions, which it does not name.
mod llguidance_error {
    pub type Error = Box<dyn std::error::Error + Send + Sync>;
}

fn grammar_error(what: &str) -> ConstraintError {
    const CHARS_MAX: usize = 300;
    ConstraintError::Grammar { what: what.chars().take(CHARS_MAX).collect() }
}

fn bounded(text: &str) -> Result<&str, ConstraintError> {
    if text.len() > GRAMMAR_BYTES_MAX {
        return Err(grammar_error(&format!("it has more than {GRAMMAR_BYTES_MAX} bytes")));
    }
    Ok(text)
}

/// The schema with what white space is allowed.
fn spaced(schema: Value) -> Value {
    let mut schema = match schema {
        Value::Object(schema) => schema,
        Value::Bool(false) => return Value::Bool(false),
        _ => serde_json::Map::new(),
    };
    schema.insert("x-guidance".into(), json!({ "whitespace_pattern": WHITESPACE }));
    Value::Object(schema)
}

/// The text of a `%json` of a Lark grammar: a schema that was checked, and what white space is allowed.
///
/// # Errors
///
/// It cannot be enforced.
pub fn lark_json(schema: &Value) -> Result<String, SchemaError> {
    Ok(format!("%json {}", spaced(schema::enforceable(schema)?)))
}

/// A Lark grammar of calls: `before` and `after` stand around each, `between` between two of them. A call is an object of a
/// name and of arguments, under the key `arguments`. With `many`, there may be several, but no more than
/// [`CALLS_MAX`]. `None` if a schema of theirs cannot be enforced, which who has them finds out beforehand.
pub fn lark_calls(calls: &[CallSchema], arguments: &str, around: [&str; 3], many: bool) -> Option<String> {
    let [before, between, after] = around.map(|text| Value::from(text).to_string());
    let rest = if many { format!(" ({between} call){{0,{}}}", CALLS_MAX - 1) } else { String::new() };
    let names: Vec<String> = (0..calls.len()).map(|index| format!("call_{index}")).collect();
    let part = |text: &str| if text == "\"\"" { String::new() } else { format!("{text} ") };
    let mut lark = format!("start: call{rest}\n");
    lark.push_str(&format!("call: {}({}) {}\n", part(&before), names.join(" | "), part(&after)));
    for (name, call) in names.iter().zip(calls) {
        let object = json!({
            "type": "object",
            "properties": {
                "name": { "const": call.name },
                arguments: schema::moved(&call.parameters, &format!("#/properties/{arguments}")),
            },
            "required": ["name", arguments],
            "additionalProperties": false,
        });
        lark.push_str(&format!("{name}: {}\n", lark_json(&object).ok()?));
    }
    Some(lark)
}

/// A grammar before its first token.
struct Compiled(Mutex<Matcher>);

impl fmt::Debug for Compiled {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Compiled")
    }
}

impl Rules for Compiled {
    fn follow(&self) -> Box<dyn Follower> {
        Box::new(Follow(self.0.lock().unwrap_or_else(PoisonError::into_inner).deep_clone()))
    }
}

struct Follow(Matcher);

impl Follower for Follow {
    fn allowed(&mut self, allowed: &mut [u32]) -> Result<(), String> {
        let mask = self.0.compute_mask_or_eos().map_err(|error| error.to_string())?;
        let mask = mask.as_slice();
        let common = mask.len().min(allowed.len());
        allowed[..common].copy_from_slice(&mask[..common]);
        allowed[common..].fill(0);
        Ok(())
    }

    fn take(&mut self, id: u32) -> Result<(), String> {
        self.0.consume_token(id).map_err(|error| error.to_string())
    }
}
