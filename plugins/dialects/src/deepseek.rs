//! Reasoning in `<think>…</think>`, then content and a section of calls, between special tokens: DeepSeek V3, R1, V3.1.
//!
//! V3 and R1 write the kind of a call, its name and a fenced block:
//! `<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>NAME`, a line with three backticks and `json`, the arguments,
//! three backticks and `<｜tool▁call▁end｜><｜tool▁calls▁end｜>`. V3.1 writes `NAME<｜tool▁sep｜>{…}` between the same tokens.

use mesh_text::{Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::{
    call,
    calls::{Block, Call, End, Form, Parser, inside_json},
    think,
    typed::is_name,
};

const SECTION: [&str; 2] = ["<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"];
const CALL: [&str; 2] = ["<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"];
const SEPARATOR: &str = "<｜tool▁sep｜>";

/// The dialect `deepseek`.
pub struct DeepSeek;

register_dialect!(&DeepSeek);

static FORM: Form = Form {
    open: &[SECTION[0], CALL[0]],
    end: End::Marker(&[CALL[1], SECTION[1]], inside),
    after: &[SECTION[1]],
    bare: None,
    read,
};

impl Dialect for DeepSeek {
    fn id(&self) -> &'static str {
        "deepseek"
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
        if template.contains(SEPARATOR) { Some(Evidence::Calls(SEPARATOR)) } else { think::Think.evidence(template) }
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, SECTION[0], SECTION[1], CALL[0], CALL[1], SEPARATOR]
    }
}

fn inside(text: &str) -> bool {
    text.split_once(SEPARATOR).is_some_and(|(_, rest)| rest.find('{').is_some_and(|at| inside_json(&rest[at..])))
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let text = block.text.trim_start();
    let (first, rest) = text.strip_prefix(CALL[0]).unwrap_or(text).split_once(SEPARATOR)?;
    let (name, arguments) = match rest.trim_start().starts_with(['{', '`']) {
        true => (first, rest),
        false if first.trim() == "function" => rest.split_once('\n')?,
        false => return None,
    };
    let name = name.trim();
    Some(vec![(Some(name).filter(|name| is_name(name))?.to_owned(), call::read_arguments(unfenced(arguments))?)])
}

/// What is inside of a block between backticks, or the text where there is none.
fn unfenced(text: &str) -> &str {
    let text = text.trim();
    let Some(fenced) = text.strip_prefix("```") else { return text };
    let fenced = fenced.strip_prefix("json").unwrap_or(fenced);
    fenced.strip_suffix("```").unwrap_or(fenced)
}

#[cfg(test)]
mod tests {
    use super::DeepSeek;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<｜tool▁calls▁begin｜>",
            "<｜tool▁calls▁end｜>",
            "<｜tool▁call▁begin｜>",
            "<｜tool▁call▁end｜>",
            "<｜tool▁sep｜>",
            "<｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n{\"a\": \"é\"}\n```<｜tool▁call▁end｜>",
            "f<｜tool▁sep｜>{}",
            "```",
            "<｜tool▁call",
            "\"",
            "\n",
            " ",
        ];
        contract::check(&DeepSeek, &fragments);
    }
}
