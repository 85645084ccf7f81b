//! Calls as a list of Python calls, `[f(a=1, b="x"), g()]`: LFM 2 between `<|tool_call_start|>` and `<|tool_call_end|>`,
//! Llama 4 as a whole answer, with or without `<|python_start|>` and `<|python_end|>`. Reasoning in `<think>…</think>`.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, Tools, register_dialect};

use crate::{
    calls::{Bare, Block, Call, End, Form, Parser, Quotes, ends_inside_string},
    python, think,
    typed::is_name,
};

/// The dialect `pythonic`.
pub struct Pythonic;

register_dialect!(&Pythonic);

static FORM: Form = Form {
    open: &["<|tool_call_start|>", "<|python_start|>"],
    end: End::Marker(&["<|tool_call_end|>", "<|python_end|>"], |text| ends_inside_string(text, Quotes::Python)),
    after: &[],
    bare: Some(Bare { begins, end: End::Bracket(Quotes::Python) }),
    read,
};

impl Dialect for Pythonic {
    fn id(&self) -> &'static str {
        "pythonic"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = think::reasoning(context);
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(FORM.open) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        think::Think.reasoning()
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        const FORMS: [&str; 2] = ["<|tool_call_start|>", "[func_name1(params_name1=params_value1"];
        let shown = FORMS.into_iter().find(|form| template.contains(form)).map(Evidence::Calls);
        shown.or_else(|| think::Think.evidence(template))
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, "<|tool_call_start|>", "<|tool_call_end|>", "<|python_start|>", "<|python_end|>"]
    }
}

/// Whether an answer begins with a call of a tool in a list. Other lists, such as `[1]`, are text.
fn begins(text: &str, tools: &Tools) -> Option<bool> {
    let text = text.trim_start();
    let Some(call) = text.strip_prefix('[') else { return if text.is_empty() { None } else { Some(false) } };
    match call.trim_start().split_once('(') {
        Some((name, _)) => Some(tools.offers(name.trim_end())),
        None if tools.names().any(|name| name.starts_with(call.trim())) => None,
        None => Some(false),
    }
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let text = block.text.trim();
    // Where markers say that these are calls, brackets are not needed, nor are known names.
    if text.starts_with('[') { python::calls(text, is_name) } else { python::calls(&format!("[{text}]"), is_name) }
}

#[cfg(test)]
mod tests {
    use super::Pythonic;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<|tool_call_start|>",
            "<|tool_call_end|>",
            "<|tool_call_start|>[f(a='é', n=1)]<|tool_call_end|>",
            "[f(a=']')]",
            "[g(",
            "[",
            "]",
            ")",
            "'",
            "\"",
            "<|tool",
            "\n",
            " ",
        ];
        contract::check(&Pythonic, &fragments);
    }
}
