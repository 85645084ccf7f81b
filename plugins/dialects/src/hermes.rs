//! Reasoning in `<think>…</think>`, then content and `<tool_call>{"name": …, "arguments": …}</tool_call>`: Hermes,
//! Qwen 2.5 and Qwen 3.
//!
//! Newlines that touch a call are dropped. A call that does not parse comes back as text, markers and newlines
//! included. Without tools in the request, calls are text.

use std::mem;

use mesh_text::{
    CallSchema, Delta, Dialect, DialectParser, ParserContext, ReasoningForm, constraint::lark_calls, register_dialect,
    scan::settled_len,
};

use crate::{
    call,
    reasoning::{Reasoning, push},
    think,
};

const OPEN: &str = "<tool_call>";
const CLOSE: &str = "</tool_call>";

/// The dialect `hermes`.
pub struct Hermes;

register_dialect!(&Hermes);

impl Dialect for Hermes {
    fn id(&self) -> &'static str {
        "hermes"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let reasoning = Reasoning::new(think::OPEN, think::CLOSE, context.prompt_opens_reasoning);
        Box::new(Parser { reasoning, calls: context.tools.then(Calls::default) })
    }

    fn opens_reasoning(&self, prompt: &str) -> bool {
        think::Think.opens_reasoning(prompt)
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        think::Think.reasoning()
    }

    fn call_grammar(&self, calls: &[CallSchema], many: bool) -> Option<String> {
        lark_calls(calls, "arguments", ["<tool_call>\n", "\n", "\n</tool_call>"], many)
    }

    fn call_trigger(&self) -> Option<&'static str> {
        Some(OPEN)
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[think::OPEN, think::CLOSE, OPEN, CLOSE]
    }
}

struct Parser {
    reasoning: Reasoning,
    calls: Option<Calls>,
}

impl Parser {
    fn read_calls(&mut self, deltas: Vec<Delta>) -> Vec<Delta> {
        let Some(calls) = &mut self.calls else { return deltas };
        let mut read = Vec::new();
        for delta in deltas {
            match delta {
                Delta::Content(text) => calls.push(&text, &mut read),
                other => read.push(other),
            }
        }
        read
    }
}

impl DialectParser for Parser {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        let deltas = self.reasoning.push(text);
        self.read_calls(deltas)
    }

    fn finish(&mut self) -> Vec<Delta> {
        let deltas = self.reasoning.finish();
        let mut deltas = self.read_calls(deltas);
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut deltas);
        }
        deltas
    }
}

/// Reads calls out of content.
#[derive(Default)]
struct Calls {
    /// Text not settled. In a call it begins with the newlines before the call's opening marker.
    held: String,
    state: State,
    /// Calls read so far.
    count: u32,
}

#[derive(Clone, Copy, Default)]
enum State {
    #[default]
    Text,
    /// After a call, before anything but newlines.
    Called,
    Call {
        /// Where in the held text the JSON begins.
        json: usize,
        /// Up to where no usable closing marker was found.
        searched: usize,
    },
}

impl Calls {
    fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.held.push_str(text);
        while self.step(deltas) {}
    }

    /// Goes on by one state; false waits for more text.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Text => match self.held.find(OPEN) {
                Some(at) => {
                    let text = self.held[..at].trim_end_matches('\n').len();
                    let rest = self.held.split_off(text);
                    push(deltas, Delta::Content, &mem::replace(&mut self.held, rest));
                    let json = at - text + OPEN.len();
                    self.state = State::Call { json, searched: json };
                    true
                }
                None => {
                    let settled = settled_len(&self.held, &[OPEN]);
                    let settled = self.held[..settled].trim_end_matches('\n').len();
                    let rest = self.held.split_off(settled);
                    push(deltas, Delta::Content, &mem::replace(&mut self.held, rest));
                    false
                }
            },
            State::Called => {
                let newlines = self.held.len() - self.held.trim_start_matches('\n').len();
                self.held.drain(..newlines);
                if self.held.is_empty() {
                    return false;
                }
                self.state = State::Text;
                true
            }
            State::Call { json, searched } => {
                let Some(found) = self.held[searched..].find(CLOSE) else {
                    let settled = settled_len(&self.held, &[CLOSE]);
                    self.state = State::Call { json, searched: settled.max(searched) };
                    return false;
                };
                let at = searched + found;
                // The marker may be part of an argument.
                if call::ends_inside_string(&self.held[json..at]) {
                    self.state = State::Call { json, searched: at + CLOSE.len() };
                } else {
                    self.close(json, at, deltas);
                }
                true
            }
        }
    }

    /// Settles the call whose closing marker is at `at`.
    fn close(&mut self, json: usize, at: usize, deltas: &mut Vec<Delta>) {
        let rest = self.held.split_off(at + CLOSE.len());
        let text = mem::replace(&mut self.held, rest);
        self.settle(&text[json..at], &text, deltas);
    }

    fn settle(&mut self, json: &str, text: &str, deltas: &mut Vec<Delta>) {
        self.state = match call::read(json) {
            Some((name, arguments)) => {
                deltas.push(Delta::ToolCall { index: self.count, name, arguments });
                self.count += 1;
                State::Called
            }
            None => {
                deltas.push(Delta::Malformed { text: text.to_owned() });
                State::Text
            }
        };
    }

    fn finish(&mut self, deltas: &mut Vec<Delta>) {
        // Each round settles one call or ends.
        while let State::Call { json, .. } = self.state {
            let unclosed = &self.held[json..];
            let unclosed = &unclosed[..settled_len(unclosed, &[CLOSE])];
            let whole = call::read(unclosed).is_some();
            match self.held[json..].find(CLOSE) {
                // A quote too many made every closing marker look like part of an argument.
                Some(at) if !whole => {
                    self.close(json, json + at, deltas);
                    while self.step(deltas) {}
                }
                // Models may leave the last closing marker out.
                _ => {
                    let unclosed = unclosed.to_owned();
                    let text = mem::take(&mut self.held);
                    self.settle(&unclosed, &text, deltas);
                }
            }
        }
        push(deltas, Delta::Content, &mem::take(&mut self.held));
    }
}

#[cfg(test)]
mod tests {
    use mesh_text::{Answer, AnsweredCall, Delta, Dialect, ParserContext};

    use super::Hermes;
    use crate::contract;

    const TOOLS: ParserContext = ParserContext { prompt_opens_reasoning: false, tools: true };

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
        assert_eq!(contract::answer(&Hermes, &TOOLS, text), expected);
    }

    #[test]
    fn a_marker_inside_an_argument_is_part_of_it() {
        let text = r#"<tool_call>{"name": "f", "arguments": {"a": "</tool_call>\"<tool_call>"}}</tool_call>done"#;
        let expected = answer("", "done", &[("f", r#"{"a":"</tool_call>\"<tool_call>"}"#)]);
        assert_eq!(contract::answer(&Hermes, &TOOLS, text), expected);
    }

    #[test]
    fn a_last_call_needs_no_closing_marker() {
        for end in ["", "\n", "\n</tool_ca"] {
            let text = format!(r#"<tool_call>{{"name": "f"}}{end}"#);
            assert_eq!(contract::answer(&Hermes, &TOOLS, &text), answer("", "", &[("f", "{}")]), "{text}");
        }
    }

    #[test]
    fn what_does_not_parse_is_content() {
        let good = "<tool_call>{\"name\": \"g\"}</tool_call>";
        for bad in ["{\"name\": \"f\"", "{\"name\": \"f, \"arguments\": {}}", "hello", "", "\n{\"arguments\": {}}\n"] {
            let text = format!("a\n\n<tool_call>{bad}</tool_call>\nb\n{good}c");
            let expected = answer("", &format!("a\n\n<tool_call>{bad}</tool_call>\nbc"), &[("g", "{}")]);
            assert_eq!(contract::answer(&Hermes, &TOOLS, &text), expected, "{text}");
        }
        let cut = "a\n<tool_call>\n{\"name\": \"f\", \"argum";
        assert_eq!(contract::answer(&Hermes, &TOOLS, cut), answer("", cut, &[]));
        let deltas = contract::deltas(&Hermes, &TOOLS, [cut]);
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
        let mut parser = Hermes.parser(&TOOLS);
        assert_eq!(parser.push("Hello"), [Delta::Content("Hello".into())]);
        assert_eq!(parser.push(" there\n<tool"), [Delta::Content(" there".into())]);
        assert_eq!(parser.push("box>"), [Delta::Content("\n<toolbox>".into())]);
        assert_eq!(parser.finish(), []);
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
