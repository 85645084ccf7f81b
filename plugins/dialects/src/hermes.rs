//! Reasoning in `<think>…</think>`, then content and `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes,
//! Qwen 2.5, Qwen 3, Granite 4. Some put a list of calls between markers of their own: `<tool_calls>` (Apriel),
//! `<TOOLCALL>` (Nemotron Nano 2).

use mesh_text::{
    CallSchema, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, constraint::lark_calls,
    register_dialect,
};

use crate::{
    call,
    calls::{End, Form, Parser, inside_json},
    think,
};

/// The dialect `hermes`.
pub struct Hermes;

register_dialect!(&Hermes);

static FORM: Form = Form {
    open: &["<tool_call>", "<tool_calls>", "<TOOLCALL>"],
    end: End::Marker(&["</tool_call>", "</tool_calls>", "</TOOLCALL>"], inside_json),
    after: &[],
    bare: None,
    read: |block| call::read_list(block.text),
};

impl Dialect for Hermes {
    fn id(&self) -> &'static str {
        "hermes"
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

    fn call_grammar(&self, calls: &[CallSchema], many: bool) -> Option<String> {
        lark_calls(calls, "arguments", ["<tool_call>\n", "\n", "\n</tool_call>"], many)
    }

    fn call_trigger(&self) -> Option<&'static str> {
        Some(FORM.open[0])
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        // Other dialects have the same markers, and no JSON between them.
        let json =
            template.contains("\"arguments") && !["<function=", "<arg_key"].iter().any(|tag| template.contains(tag));
        let shown = FORM.open.iter().find(|marker| json && template.contains(**marker));
        shown.map(|marker| Evidence::Calls(marker)).or_else(|| think::Think.evidence(template))
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[
            think::OPEN,
            think::CLOSE,
            "<tool_call>",
            "</tool_call>",
            "<tool_calls>",
            "</tool_calls>",
            "<TOOLCALL>",
            "</TOOLCALL>",
        ]
    }
}

#[cfg(test)]
mod tests {
    use mesh_text::{Answer, AnsweredCall, Delta, Dialect, Evidence, ParserContext};

    use super::Hermes;
    use crate::contract;

    fn answer(reasoning: &str, content: &str, calls: &[(&str, &str)]) -> Answer {
        let call =
            |(name, arguments): &(&str, &str)| AnsweredCall { name: (*name).into(), arguments: (*arguments).into() };
        Answer { reasoning: reasoning.into(), content: content.into(), tool_calls: calls.iter().map(call).collect() }
    }

    #[test]
    fn calls_are_read() {
        let text = "<think>\nI need it.\n</think>\n\nOne moment.\n<tool_call>\n{\"name\": \"f\", \"arguments\": \
                    {\"a\": \"x\"}}\n</tool_call>\n<tool_call>{\"name\": \"g\"}</tool_call>\n";
        let expected = answer("I need it.", "One moment.", &[("f", r#"{"a":"x"}"#), ("g", "{}")]);
        assert_eq!(contract::answer(&Hermes, &contract::tools(), text), expected);
    }

    #[test]
    fn a_marker_inside_an_argument_is_part_of_it() {
        let text = r#"<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\"<tool_call>"}}</tool_call>done"#;
        let expected = answer("", "done", &[("f", r#"{"a":"</tool_call>\"<tool_call>"}"#)]);
        assert_eq!(contract::answer(&Hermes, &contract::tools(), text), expected);
    }

    #[test]
    fn a_last_call_needs_no_closing_marker() {
        for end in ["", "\n", "\n</tool_ca"] {
            let text = format!(r#"<tool_call>{{"name": "f"}}{end}"#);
            assert_eq!(contract::answer(&Hermes, &contract::tools(), &text), answer("", "", &[("f", "{}")]), "{text}");
        }
    }

    #[test]
    fn what_does_not_parse_is_content() {
        let good = "<tool_call>{\"name\": \"g\"}</tool_call>";
        for bad in ["{\"name\": \"f\"", "{\"name\": \"f, \"arguments\": {}}", "hello", "", "\n{\"arguments\": {}}\n"] {
            let text = format!("a\n\n<tool_call>{bad}</tool_call>\nb\n{good}c");
            let expected = answer("", &format!("a\n\n<tool_call>{bad}</tool_call>\nbc"), &[("g", "{}")]);
            assert_eq!(contract::answer(&Hermes, &contract::tools(), &text), expected, "{text}");
        }
        let cut = "a\n<tool_call>\n{\"name\": \"f\", \"argum";
        assert_eq!(contract::answer(&Hermes, &contract::tools(), cut), answer("", cut, &[]));
        let deltas = contract::deltas(&Hermes, &contract::tools(), [cut]);
        assert!(matches!(deltas.last(), Some(Delta::Malformed { .. })), "{deltas:?}");
    }

    #[test]
    fn without_tools_calls_are_text() {
        let text = "<think>x</think><tool_call>{\"name\": \"f\"}</tool_call>\n";
        let expected = answer("x", "<tool_call>{\"name\": \"f\"}</tool_call>\n", &[]);
        assert_eq!(contract::answer(&Hermes, &ParserContext::default(), text), expected);
    }

    #[test]
    fn content_streams_while_it_is_written() {
        let mut parser = Hermes.parser(&contract::tools());
        assert_eq!(parser.push("Hello"), [Delta::Content("Hello".into())]);
        assert_eq!(parser.push(" there\n<tool"), [Delta::Content(" there".into())]);
        assert_eq!(parser.push("box>"), [Delta::Content("\n<toolbox>".into())]);
        assert_eq!(parser.finish(), []);
    }

    #[test]
    fn lists_of_calls_are_read() {
        for (open, close) in [("<tool_calls>", "</tool_calls>"), ("<TOOLCALL>", "</TOOLCALL>")] {
            let text =
                format!(r#"Now.{open}[{{"name": "f"}}, {{"name": "g", "arguments": {{"a": "{close}"}}}}]{close}"#);
            let expected = answer("", "Now.", &[("f", "{}"), ("g", &format!(r#"{{"a":"{close}"}}"#))]);
            assert_eq!(contract::answer(&Hermes, &contract::tools(), &text), expected);
        }
    }

    #[test]
    fn its_evidence_is_json_between_its_markers() {
        assert_eq!(
            Hermes.evidence("<tool_call>\n{\"name\": \"f\", \"arguments\": {}}"),
            Some(Evidence::Calls("<tool_call>"))
        );
        assert_eq!(Hermes.evidence("<tool_call>\n<function=f> \"arguments\""), None);
        assert_eq!(Hermes.evidence("</think>"), Some(Evidence::Reasoning("</think>")));
    }

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<think>",
            "</think>",
            "<tool_call>",
            "</tool_call>",
            "{\"name\": \"f\", \"arguments\": {\"a\": \"é\"}}",
            "<tool_call>{\"name\": \"g\"}</tool_call>",
            "<tool",
            "</tool_c",
            "\"",
            "\\",
            "{",
            "\n",
            " ",
        ];
        contract::check(&Hermes, &fragments);
    }
}
