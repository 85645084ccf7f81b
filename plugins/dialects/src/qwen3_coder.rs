//! Reasoning in `<think>…</think>`, then content and calls in tags that look like XML and escape nothing: Qwen3-Coder,
//! Qwen 3.5, Nemotron 3.
//!
//! ```text
//! <tool_call>
//! <function=NAME>
//! <parameter=KEY>
//! VALUE
//! </parameter>
//! </function>
//! </tool_call>
//! ```
//!
//! Values are written bare; the tool's schema tells their types. Models leave the outer tags out at times.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::{
    calls::{Block, Call, End, Form, Parser},
    think,
    typed::{Arguments, argument, is_name},
};

const FUNCTION: &str = "<function=";
const PARAMETER: &str = "<parameter=";
const PARAMETER_END: &str = "</parameter>";

/// The dialect `qwen3_coder`.
pub struct Qwen3Coder;

register_dialect!(&Qwen3Coder);

static FORM: Form = Form {
    open: &["<tool_call>", FUNCTION],
    end: End::Marker(&["</function>", "</tool_call>"], inside),
    after: &["</tool_call>"],
    bare: None,
    read,
};

impl Dialect for Qwen3Coder {
    fn id(&self) -> &'static str {
        "qwen3_coder"
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
        let shown = template.contains(FUNCTION) && template.contains(PARAMETER);
        if shown { Some(Evidence::Calls(FUNCTION)) } else { think::Think.evidence(template) }
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, "<tool_call>", "</tool_call>"]
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
    let (name, mut rest) = rest.strip_prefix(FUNCTION).unwrap_or(rest).split_once('>')?;
    let name = name.trim();
    let mut arguments = Arguments::default();
    loop {
        rest = rest.trim_start();
        if rest.is_empty() {
            break;
        }
        let (key, value) = rest.strip_prefix(PARAMETER)?.split_once('>')?;
        // A value whose end was forgotten goes up to the next one.
        let end = value.find(PARAMETER_END).unwrap_or(value.len());
        let end = value.find(&format!("\n{PARAMETER}")).map_or(end, |next| next.min(end));
        let text = value[..end].strip_prefix('\n').unwrap_or(&value[..end]);
        let text = text.strip_suffix('\n').unwrap_or(text);
        if !arguments.add(key.trim(), argument(block.tools, name, key.trim(), text)) {
            return None;
        }
        rest = value[end..].strip_prefix(PARAMETER_END).unwrap_or(&value[end..]);
    }
    is_name(name).then(|| vec![(name.to_owned(), arguments.text())])
}

#[cfg(test)]
mod tests {
    use super::Qwen3Coder;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "<tool_call>\n<function=f>\n<parameter=a>\né\n</parameter>\n</function>\n</tool_call>",
            "<function=g>",
            "<parameter=a>",
            "</parameter>",
            "</function>",
            "</func",
            "<tool",
            "\n",
            " ",
        ];
        contract::check(&Qwen3Coder, &fragments);
    }
}
