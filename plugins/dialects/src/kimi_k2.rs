//! Reasoning in `<think>…</think>`, then content and a section of calls, between special tokens: Kimi K2 and Kimi Linear.
//!
//! `<|tool_calls_section_begin|><|tool_call_begin|>functions.NAME:INDEX<|tool_call_argument_begin|>{…}<|tool_call_end|>
//! <|tool_calls_section_end|>`

use mesh_text::{CallIds, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::{
    call,
    calls::{Block, Call, End, Form, Parser, inside_json},
    think,
    typed::is_name,
};

const SECTION: [&str; 2] = ["<|tool_calls_section_begin|>", "<|tool_calls_section_end|>"];
const CALL: [&str; 2] = ["<|tool_call_begin|>", "<|tool_call_end|>"];
const ARGUMENTS: &str = "<|tool_call_argument_begin|>";

/// The dialect `kimi_k2`.
pub struct KimiK2;

register_dialect!(&KimiK2);

static FORM: Form = Form {
    open: &[SECTION[0], CALL[0]],
    end: End::Marker(&[CALL[1], SECTION[1]], inside),
    after: &[SECTION[1]],
    bare: None,
    read,
};

impl Dialect for KimiK2 {
    fn id(&self) -> &'static str {
        "kimi_k2"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = think::reasoning(context);
        // It goes over to calls without closing its reasoning at times.
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(FORM.open) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        think::Think.reasoning()
    }

    fn call_ids(&self) -> CallIds {
        CallIds::FunctionAndNumber
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        if template.contains(ARGUMENTS) { Some(Evidence::Calls(ARGUMENTS)) } else { think::Think.evidence(template) }
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, SECTION[0], SECTION[1], CALL[0], CALL[1], ARGUMENTS]
    }
}

fn inside(text: &str) -> bool {
    text.split_once(ARGUMENTS).is_some_and(|(_, json)| inside_json(json))
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let text = block.text.trim_start();
    let (id, arguments) = text.strip_prefix(CALL[0]).unwrap_or(text).split_once(ARGUMENTS)?;
    let name = id.trim();
    let name = name
        .rsplit_once(':')
        .filter(|(_, index)| index.bytes().all(|b| b.is_ascii_digit()))
        .map_or(name, |(name, _)| name);
    let name = name.strip_prefix("functions.").unwrap_or(name);
    Some(vec![(Some(name).filter(|name| is_name(name))?.to_owned(), call::read_arguments(arguments)?)])
}

#[cfg(test)]
mod tests {
    use super::KimiK2;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<|tool_calls_section_begin|>",
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_end|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>{\"a\": \"é\"}<|tool_call_end|>",
            "functions.g:1",
            "{\"a\": 1}",
            "<|tool_call",
            "\"",
            "\n",
            " ",
        ];
        contract::check(&KimiK2, &fragments);
    }
}
