//! Reasoning in `<think>…</think>`, then content and calls in tags that look like XML and escape nothing: MiniMax M2.
//!
//! ```text
//! <minimax:tool_call>
//! <invoke name="NAME">
//! <parameter name="KEY">VALUE</parameter>
//! </invoke>
//! </minimax:tool_call>
//! ```
//!
//! Values are strings as they are, and JSON else; the tool's schema tells.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::{
    calls::{Block, Call, End, Form, Parser},
    think,
    typed::{Arguments, argument, is_name},
};

const SECTION: [&str; 2] = ["<minimax:tool_call>", "</minimax:tool_call>"];
const INVOKE: &str = "<invoke name=";
const PARAMETER: &str = "<parameter name=";
const PARAMETER_END: &str = "</parameter>";

/// The dialect `minimax_m2`.
pub struct MiniMaxM2;

register_dialect!(&MiniMaxM2);

static FORM: Form = Form {
    open: &[SECTION[0], INVOKE],
    end: End::Marker(&["</invoke>", SECTION[1]], inside),
    after: &[SECTION[1]],
    bare: None,
    read,
};

impl Dialect for MiniMaxM2 {
    fn id(&self) -> &'static str {
        "minimax_m2"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = think::reasoning(context);
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(&[SECTION[0]]) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        think::Think.reasoning()
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        let shown = template.contains("minimax:tool_call") && template.contains(INVOKE);
        if shown { Some(Evidence::Calls("minimax:tool_call")) } else { think::Think.evidence(template) }
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, SECTION[0], SECTION[1]]
    }
}

/// Whether text stops inside of a value.
fn inside(text: &str) -> bool {
    text.rfind(PARAMETER).is_some_and(|at| !text[at..].contains(PARAMETER_END))
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    if !block.closed {
        return None;
    }
    let rest = block.text.trim_start();
    let (name, mut rest) = rest.strip_prefix(INVOKE).unwrap_or(rest).split_once('>')?;
    let name = unquoted(name);
    let mut arguments = Arguments::default();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            break;
        }
        let (key, value) = rest.strip_prefix(PARAMETER)?.split_once('>')?;
        let (value, after) = value.split_once(PARAMETER_END)?;
        let key = unquoted(key);
        if !arguments.add(key, argument(block.tools, name, key, value)) {
            return None;
        }
        rest = after;
    }
    is_name(name).then(|| vec![(name.to_owned(), arguments.text())])
}

fn unquoted(name: &str) -> &str {
    name.trim().trim_matches(['"', '\''])
}

#[cfg(test)]
mod tests {
    use super::MiniMaxM2;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<minimax:tool_call>",
            "</minimax:tool_call>",
            "<invoke name=\"f\">\n<parameter name=\"a\">é</parameter>\n</invoke>",
            "<invoke name=\"g\">",
            "</invoke>",
            "<parameter name=\"a\">",
            "</parameter>",
            "<minimax:",
            "\n",
            " ",
        ];
        contract::check(&MiniMaxM2, &fragments);
    }
}
