//! Reasoning in `<|channel>thought … <channel|>`, then content and `<|tool_call>call:NAME{KEY:VALUE,…}<tool_call|>`: Gemma 4.
//! Values look like JSON, but strings stand between `<|"|>` and escape nothing, and keys stand bare.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};
use serde_json::{Map, Value};

use crate::{
    calls::{Block, Call, End, Form, Parser},
    reasoning::Reasoning,
    typed::{Arguments, is_name},
};

const CALL: [&str; 2] = ["<|tool_call>", "<tool_call|>"];
const THOUGHT: &str = "<|channel>thought";
const CHANNEL: [&str; 2] = ["<|channel>", "<channel|>"];
const QUOTE: &str = "<|\"|>";

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 64;

/// The dialect `gemma4`.
pub struct Gemma4;

register_dialect!(&Gemma4);

static FORM: Form = Form { open: &[CALL[0]], end: End::Marker(&[CALL[1]], inside), after: &[], bare: None, read };

impl Dialect for Gemma4 {
    fn id(&self) -> &'static str {
        "gemma4"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = Reasoning::new(THOUGHT, CHANNEL[1], context.prompt_opens_reasoning);
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(FORM.open) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        Some(ReasoningForm { open: THOUGHT, close: CHANNEL[1], content: "" })
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        let shown = [(CALL[0], Evidence::Calls as fn(_) -> _), (CHANNEL[0], Evidence::Reasoning)];
        shown.into_iter().find(|(text, _)| template.contains(text)).map(|(text, evidence)| evidence(text))
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[CHANNEL[0], CHANNEL[1], CALL[0], CALL[1], QUOTE]
    }
}

/// Whether text stops inside of a string.
fn inside(text: &str) -> bool {
    text.matches(QUOTE).count() % 2 == 1
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let text = block.text.trim().strip_prefix("call:")?;
    let (name, rest) = text.split_at(text.find('{')?);
    let mut reader = Reader(rest);
    let Value::Object(map) = reader.value(0)? else { return None };
    let mut arguments = Arguments::default();
    map.into_iter().for_each(|(key, value)| _ = arguments.add(&key, value));
    let name = name.trim();
    (is_name(name) && reader.0.trim_start().is_empty()).then(|| vec![(name.to_owned(), arguments.text())])
}

struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    fn take(&mut self, text: &str) -> bool {
        let rest = self.0.trim_start().strip_prefix(text);
        self.0 = rest.unwrap_or(self.0);
        rest.is_some()
    }

    fn string(&mut self) -> Option<&'a str> {
        let (string, rest) = self.0.trim_start().strip_prefix(QUOTE)?.split_once(QUOTE)?;
        self.0 = rest;
        Some(string)
    }

    /// What is written without quotes, up to one of these characters.
    fn bare(&mut self, ends: &[char]) -> &'a str {
        let (word, rest) = self.0.split_at(self.0.find(ends).unwrap_or(self.0.len()));
        self.0 = rest;
        word.trim()
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        if let Some(string) = self.string() {
            return Some(Value::String(string.to_owned()));
        }
        if self.take("{") {
            let mut map = Map::new();
            while !self.take("}") {
                let key = match self.string() {
                    Some(key) => key,
                    None => self.bare(&[':', ',', '{', '}', '[', ']', '<']),
                };
                if !self.take(":") {
                    return None;
                }
                // A key that comes twice would lose a value.
                if map.insert(key.to_owned(), self.value(depth + 1)?).is_some() || key.is_empty() {
                    return None;
                }
                if !self.take(",") && !self.0.trim_start().starts_with('}') {
                    return None;
                }
            }
            return Some(Value::Object(map));
        }
        if self.take("[") {
            let mut items = Vec::new();
            while !self.take("]") {
                items.push(self.value(depth + 1)?);
                if !self.take(",") && !self.0.trim_start().starts_with(']') {
                    return None;
                }
            }
            return Some(Value::Array(items));
        }
        match self.bare(&[',', '{', '}', '[', ']', '<']) {
            "None" => Some(Value::Null),
            "True" => Some(Value::Bool(true)),
            "False" => Some(Value::Bool(false)),
            word => serde_json::from_str(word).ok(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::Gemma4;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<|channel>thought\n",
            "<channel|>",
            "<|tool_call>",
            "<tool_call|>",
            "<|tool_call>call:f{a:<|\"|>é<|\"|>,n:1}<tool_call|>",
            "call:g{",
            "a:",
            "<|\"|>",
            "{",
            "}",
            "<|tool",
            "\n",
        ];
        contract::check(&Gemma4, &fragments);
    }
}
