//! Reasoning in `<think>…</think>`, then content and calls with tags for keys and values: GLM 4.5 and later, and others
//! that took the form up.
//!
//! ```text
//! <tool_call>NAME
//! <arg_key>KEY</arg_key>
//! <arg_value>VALUE</arg_value>
//! </tool_call>
//! ```
//!
//! Line breaks between the tags come and go with the version. Values are strings as they are, and JSON else; the tool's
//! schema tells. GLM 4 (0414) has no markers at all: an answer that calls is the name of a tool on a line of its own,
//! then the arguments as JSON.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, Tools, register_dialect};

use crate::{
    call,
    calls::{Bare, Block, Call, End, Form, Parser, Quotes},
    think,
    typed::{Arguments, argument, is_name},
};

const KEY: [&str; 2] = ["<arg_key>", "</arg_key>"];
const VALUE: [&str; 2] = ["<arg_value>", "</arg_value>"];

/// The dialect `glm`.
pub struct Glm;

register_dialect!(&Glm);

static FORM: Form = Form {
    open: &["<tool_call>"],
    end: End::Marker(&["</tool_call>"], inside),
    after: &[],
    bare: Some(Bare { begins, end: End::Bracket(Quotes::Json) }),
    read,
};

impl Dialect for Glm {
    fn id(&self) -> &'static str {
        "glm"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        Parser::boxed(think::reasoning(context), &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        think::Think.reasoning()
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        if template.contains(KEY[0]) { Some(Evidence::Calls(KEY[0])) } else { think::Think.evidence(template) }
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, "<tool_call>", "</tool_call>", KEY[0], KEY[1], VALUE[0], VALUE[1]]
    }
}

/// Whether text stops inside of a value.
fn inside(text: &str) -> bool {
    text.rfind(VALUE[0]).is_some_and(|at| !text[at..].contains(VALUE[1]))
}

/// Whether an answer begins with the name of a tool on a line of its own, and an object after it.
fn begins(text: &str, tools: &Tools) -> Option<bool> {
    let text = text.trim_start();
    match text.split_once('\n') {
        Some((name, rest)) if tools.offers(name.trim_end()) => {
            rest.trim_start().chars().next().map(|first| first == '{')
        }
        Some(_) => Some(false),
        None if tools.names().any(|name| name.starts_with(text) || text.trim_end() == name) => None,
        None => Some(false),
    }
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let text = block.text.trim();
    if let Some((name, arguments)) = text.split_once('\n')
        && arguments.trim_start().starts_with('{')
    {
        return is_name(name.trim_end())
            .then_some(vec![(name.trim_end().to_owned(), call::read_arguments(arguments)?)]);
    }
    if !block.closed {
        return None;
    }
    let (name, mut rest) = text.split_at(text.find(KEY[0]).unwrap_or(text.len()));
    let name = name.trim();
    let mut arguments = Arguments::default();
    while !rest.is_empty() {
        let (key, value) = rest.strip_prefix(KEY[0])?.split_once(KEY[1])?;
        let (value, after) = value.trim_start().strip_prefix(VALUE[0])?.split_once(VALUE[1])?;
        if !arguments.add(key, argument(block.tools, name, key, value)) {
            return None;
        }
        rest = after.trim_start();
    }
    is_name(name).then(|| vec![(name.to_owned(), arguments.text())])
}

#[cfg(test)]
mod tests {
    use super::Glm;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>é</arg_value>\n</tool_call>",
            "<arg_key>",
            "</arg_key>",
            "<arg_value>",
            "</arg_value>",
            "f\n",
            "g\n{\"a\": \"}\"}",
            "{",
            "}",
            "\n",
            " ",
        ];
        contract::check(&Glm, &fragments);
    }
}
