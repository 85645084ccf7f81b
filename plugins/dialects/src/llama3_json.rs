//! A message that is nothing but `{"name": …, "parameters": …}`, with or without `<|python_tag|>` before it: Llama 3.1
//! and later. Several calls are separated by `;` or white space.
//!
//! A message is held back while it can still be calls: from its first `{` on, unless its first key is none that a call
//! begins with. What turns out not to be calls comes back as it was written.

use std::mem;

use mesh_text::{
    CallSchema, Delta, Dialect, DialectParser, Evidence, ParserContext, constraint::lark_calls, register_dialect,
};

use crate::{call, plain::Passthrough, reasoning::push};

const TAG: &str = "<|python_tag|>";

/// Keys that the object of a call may begin with.
const KEYS: &[&str] = &["name", "parameters", "arguments", "type", "function"];

/// The dialect `llama3_json`.
pub struct Llama3Json;

register_dialect!(&Llama3Json);

impl Dialect for Llama3Json {
    fn id(&self) -> &'static str {
        "llama3_json"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        if !context.tools.is_empty() { Box::new(Parser::default()) } else { Box::new(Passthrough) }
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        const FORMS: [&str; 2] = ["{\"name\": function name, \"parameters\"", TAG];
        FORMS.into_iter().find(|form| template.contains(form)).map(Evidence::Calls)
    }

    fn call_grammar(&self, calls: &[CallSchema], many: bool) -> Option<String> {
        lark_calls(calls, "parameters", ["", "; ", ""], many)
    }

    fn markers(&self, context: &ParserContext) -> &'static [&'static str] {
        if !context.tools.is_empty() { &[TAG] } else { &[] }
    }
}

#[derive(Default)]
struct Parser {
    held: String,
    state: State,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
enum State {
    /// It may be either.
    #[default]
    Open,
    /// It begins as a call does.
    Call,
    /// It is text.
    Text,
}

impl DialectParser for Parser {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        if self.state == State::Open {
            self.state = judge(&self.held);
        }
        let mut deltas = Vec::new();
        if self.state == State::Text {
            push(&mut deltas, Delta::Content, &mem::take(&mut self.held));
        }
        deltas
    }

    fn finish(&mut self) -> Vec<Delta> {
        let held = mem::take(&mut self.held);
        let state = mem::take(&mut self.state);
        let text = held.trim();
        match call::read_all(text.strip_prefix(TAG).unwrap_or(text)) {
            Some(calls) if state != State::Text => {
                (0..).zip(calls).map(|(index, (name, arguments))| Delta::ToolCall { index, name, arguments }).collect()
            }
            _ if held.is_empty() => Vec::new(),
            _ if state == State::Call => vec![Delta::Malformed { text: held }],
            _ => vec![Delta::Content(held)],
        }
    }
}

/// What a message that begins like this can be.
fn judge(begin: &str) -> State {
    let begin = begin.trim_start();
    if begin.len() < TAG.len() && TAG.starts_with(begin) {
        return State::Open;
    }
    let object = begin.strip_prefix(TAG).unwrap_or(begin).trim_start();
    let Some(object) = object.strip_prefix('{') else {
        return if object.is_empty() { State::Open } else { State::Text };
    };
    let Some(key) = object.trim_start().strip_prefix('"') else {
        return if object.trim_start().is_empty() { State::Open } else { State::Text };
    };
    match key.split_once('"') {
        Some((key, _)) if KEYS.contains(&key) => State::Call,
        None if KEYS.iter().any(|known| known.starts_with(key)) => State::Open,
        _ => State::Text,
    }
}

#[cfg(test)]
mod tests {
    use mesh_text::{AnsweredCall, Delta, Dialect, ParserContext};

    use super::Llama3Json;
    use crate::contract;

    #[test]
    fn calls_are_read() {
        for text in [
            "{\"name\": \"f\", \"parameters\": {\"a\": 1}}",
            "\n <|python_tag|>{\"name\": \"f\", \"parameters\": {\"a\": 1}}\n",
            "{\"type\": \"function\", \"name\": \"f\", \"parameters\": {\"a\": 1}}",
        ] {
            let answer = contract::answer(&Llama3Json, &contract::tools(), text);
            let call = AnsweredCall { name: "f".into(), arguments: "{\"a\":1}".into() };
            assert_eq!((answer.content.as_str(), answer.tool_calls), ("", vec![call]), "{text}");
        }
        let two = contract::answer(&Llama3Json, &contract::tools(), "{\"name\": \"f\"}; {\"name\": \"g\"}");
        assert_eq!(two.tool_calls.len(), 2);
    }

    #[test]
    fn everything_else_is_content() {
        for text in [
            "Paris.",
            " \n",
            "{\"city\": \"Paris\"}",
            "{\"name\": 1}",
            "{\"name\": \"f\"",
            "{\"name\": \"f\"} is the call",
            "call {\"name\": \"f\"}",
            "<|python_tag|>print(1)",
            "<|python_tag|>{\"name\": \"f\", ",
            "<|python",
            "{ ",
        ] {
            let answer = contract::answer(&Llama3Json, &contract::tools(), text);
            assert_eq!((answer.content.as_str(), answer.tool_calls.len()), (text, 0));
        }
        let text = "{\"name\": \"f\"}";
        assert_eq!(contract::answer(&Llama3Json, &ParserContext::default(), text).content, text);
    }

    #[test]
    fn other_json_streams_from_its_first_key_on() {
        let mut parser = Llama3Json.parser(&contract::tools());
        assert_eq!(parser.push("{\"ci"), [Delta::Content("{\"ci".into())]);
        assert_eq!(parser.push("ty\""), [Delta::Content("ty\"".into())]);
    }

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<|python_tag|>",
            "<|py",
            "{\"name\": \"f\", \"parameters\": {\"a\": \"é\"}}",
            "{\"name\": \"g\"}",
            ";",
            "{",
            "\"na",
            "\"name\"",
            "}",
            "\n",
            " ",
        ];
        contract::check(&Llama3Json, &fragments);
    }
}
