//! Reasoning in `<mm:think>…</mm:think>`, then content and calls in tags, each behind a token that tells them from text:
//! MiniMax M3. With that token as `T`:
//!
//! ```text
//! T<tool_call>
//! T<invoke name="NAME">T<KEY>VALUE T</KEY>T<LIST>T<item>VALUE T</item>T</LIST>T</invoke>
//! T</tool_call>
//! ```
//!
//! Objects and arrays are written out as tags. An answer without reasoning may begin with the marker that closes it.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect, tools::Schema};
use serde_json::{Map, Value};

use crate::{
    calls::{Block, Call, End, Form, Parser, never},
    reasoning::Reasoning,
    typed::{self, Arguments, is_name},
};

const TOKEN: &str = "]<]minimax[>[";
const SECTION: [&str; 2] = ["]<]minimax[>[<tool_call>", "]<]minimax[>[</tool_call>"];
const INVOKE: [&str; 2] = ["]<]minimax[>[<invoke name=", "]<]minimax[>[</invoke>"];
const THINK: [&str; 2] = ["<mm:think>", "</mm:think>"];

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 64;

/// The dialect `minimax_m3`.
pub struct MiniMaxM3;

register_dialect!(&MiniMaxM3);

static FORM: Form = Form {
    open: &[SECTION[0], INVOKE[0]],
    end: End::Marker(&[INVOKE[1], SECTION[1]], never),
    after: &[SECTION[1]],
    bare: None,
    read,
};

impl Dialect for MiniMaxM3 {
    fn id(&self) -> &'static str {
        "minimax_m3"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = Reasoning::new(THINK[0], THINK[1], context.prompt_opens_reasoning).or_closed();
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(FORM.open) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        Some(ReasoningForm { open: THINK[0], close: THINK[1], content: "" })
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        let shown = [(TOKEN, Evidence::Calls as fn(_) -> _), (THINK[0], Evidence::Reasoning)];
        shown.into_iter().find(|(text, _)| template.contains(text)).map(|(text, evidence)| evidence(text))
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[THINK[0], THINK[1], TOKEN, "<tool_call>", "</tool_call>"]
    }
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    if !block.closed {
        return None;
    }
    let rest = block.text.trim_start();
    let (name, rest) = rest.strip_prefix(INVOKE[0]).unwrap_or(rest).split_once('>')?;
    let name = name.trim().trim_matches(['"', '\'']);
    let mut reader = Reader(rest);
    let arguments = reader.children(block.tools.schema(name), 0)?;
    let whole = reader.0.trim().is_empty() && is_name(name);
    let arguments = match arguments {
        Value::Object(arguments) => arguments,
        // No parameters at all.
        Value::String(text) if text.trim().is_empty() => Map::new(),
        _ => return None,
    };
    let mut read = Arguments::default();
    arguments.into_iter().for_each(|(key, value)| _ = read.add(&key, value));
    whole.then(|| vec![(name.to_owned(), read.text())])
}

struct Reader<'a>(&'a str);

impl<'a> Reader<'a> {
    /// Reads what is inside of an element: other elements, or text. Stops before the element's end.
    fn children(&mut self, schema: Option<Schema<'_>>, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        let (mut map, mut items) = (Map::new(), Vec::new());
        let (text, rest) = self.0.split_at(self.0.find(TOKEN).unwrap_or(self.0.len()));
        self.0 = rest;
        while let Some(name) = self.opens() {
            // Text beside elements has no place in a value.
            if !text.trim().is_empty() || !is_name(name) {
                return None;
            }
            let item = name == "item" && map.is_empty() && schema.is_none_or(|schema| schema.property(name).is_none());
            let inner = schema.and_then(|schema| if item { schema.items() } else { schema.property(name) });
            let value = self.children(inner, depth + 1)?;
            self.0 = self.0.strip_prefix(TOKEN)?.strip_prefix("</")?.strip_prefix(name)?.strip_prefix('>')?;
            match item {
                true => items.push(value),
                false if map.insert(name.to_owned(), value).is_none() => {}
                false => return None,
            }
            let trimmed = self.0.trim_start();
            if trimmed.starts_with(TOKEN) {
                self.0 = trimmed;
            }
        }
        match (map.is_empty(), items.is_empty()) {
            (true, true) if text.trim().is_empty() => Some(empty(schema, text)),
            (true, true) => Some(typed::value(schema, text)),
            (false, true) => Some(Value::Object(map)),
            (true, false) => Some(Value::Array(items)),
            (false, false) => None,
        }
    }

    /// Takes the tag that opens an element, if one comes next.
    fn opens(&mut self) -> Option<&'a str> {
        let tag = self.0.strip_prefix(TOKEN)?.strip_prefix('<').filter(|tag| !tag.starts_with('/'))?;
        let (name, rest) = tag.split_once('>')?;
        self.0 = rest;
        Some(name)
    }
}

/// What an element without anything inside stands for.
fn empty(schema: Option<Schema<'_>>, text: &str) -> Value {
    match schema.map(Schema::types).unwrap_or_default().first() {
        Some(&"array") => Value::Array(Vec::new()),
        Some(&"object") => Value::Object(Map::new()),
        _ => Value::String(text.to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::MiniMaxM3;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<mm:think>",
            "</mm:think>",
            "]<]minimax[>[<tool_call>",
            "]<]minimax[>[</tool_call>",
            "]<]minimax[>[<invoke name=\"f\">]<]minimax[>[<a>é]<]minimax[>[</a>]<]minimax[>[</invoke>",
            "]<]minimax[>[<invoke name=\"g\">",
            "]<]minimax[>[</invoke>",
            "]<]minimax[>[<list>",
            "]<]minimax[>[<item>",
            "]<]minimax[>[</item>",
            "]<]minimax[>[</list>",
            "]<]mini",
            "\n",
        ];
        contract::check(&MiniMaxM3, &fragments);
    }
}
