//! Reasoning in `[THINK]…[/THINK]`, then content and calls: Mistral. Three forms, by age:
//! `[TOOL_CALLS][{"name": …, "arguments": …}, …]`, `[TOOL_CALLS]NAME[CALL_ID]ID[ARGS]{…}` and `[TOOL_CALLS]NAME[ARGS]{…}`.

use mesh_text::{CallIds, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect};

use crate::{
    call,
    calls::{Block, Call, End, Form, Parser, Quotes},
    reasoning::Reasoning,
    typed::is_name,
};

const OPEN: &str = "[TOOL_CALLS]";
const ARGUMENTS: &str = "[ARGS]";
const CALL_ID: &str = "[CALL_ID]";
const THINK: [&str; 2] = ["[THINK]", "[/THINK]"];

/// The dialect `mistral`.
pub struct Mistral;

register_dialect!(&Mistral);

static FORM: Form = Form { open: &[OPEN], end: End::Bracket(Quotes::Json), after: &[], bare: None, read };

impl Dialect for Mistral {
    fn id(&self) -> &'static str {
        "mistral"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = Reasoning::new(THINK[0], THINK[1], context.prompt_opens_reasoning);
        let reasoning = if context.tools.is_empty() { reasoning } else { reasoning.until(FORM.open) };
        Parser::boxed(reasoning, &FORM, &context.tools)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        Some(ReasoningForm { open: THINK[0], close: THINK[1], content: "" })
    }

    fn call_ids(&self) -> CallIds {
        CallIds::NineAlphanumerics
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        let shown =
            [(ARGUMENTS, Evidence::Calls as fn(_) -> _), (OPEN, Evidence::Calls), (THINK[0], Evidence::Reasoning)];
        shown.into_iter().find(|(text, _)| template.contains(text)).map(|(text, evidence)| evidence(text))
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[THINK[0], THINK[1], OPEN, ARGUMENTS, CALL_ID]
    }
}

fn read(block: &Block<'_>) -> Option<Vec<Call>> {
    let Some((name, arguments)) = block.text.split_once(ARGUMENTS) else { return call::read_list(block.text) };
    let name = name.split_once(CALL_ID).map_or(name, |(name, _)| name).trim();
    Some(vec![(Some(name).filter(|name| is_name(name))?.to_owned(), call::read_arguments(arguments)?)])
}

#[cfg(test)]
mod tests {
    use super::Mistral;
    use crate::contract;

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "[THINK]",
            "[/THINK]",
            "[TOOL_CALLS]",
            "[TOOL_CALLS][{\"name\": \"f\", \"arguments\": {\"a\": \"é]\"}}]",
            "[TOOL_CALLS]g[ARGS]{\"a\": \"}\"}",
            "[ARGS]",
            "[TOOL",
            "{",
            "}",
            "[",
            "]",
            "\"",
            "\n",
        ];
        contract::check(&Mistral, &fragments);
    }
}
