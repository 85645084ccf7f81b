//! Messages on channels, between special tokens: gpt-oss.
//!
//! ```text
//! <|channel|>analysis<|message|>REASONING<|end|>
//! <|start|>assistant<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{…}<|call|>
//! <|start|>assistant<|channel|>final<|message|>CONTENT<|return|>
//! ```
//!
//! The prompt holds the first `<|start|>assistant`. The recipient stands before or after the channel, with words for the
//! kind of its text after it. What `analysis` holds is reasoning; `final`, and `commentary` to nobody, are content. Of
//! several messages of one kind, each begins a line. The token that ends the answer may be missing.

use std::mem;

use mesh_text::{
    Delta, Dialect, DialectParser, Evidence, ParserContext, ReasoningForm, register_dialect,
    scan::{find_first, settled_len},
};

use crate::{call, calls::inside_json, reasoning::push, typed::is_name};

const START: &str = "<|start|>";
const CHANNEL: &str = "<|channel|>";
const MESSAGE: &str = "<|message|>";
const CONSTRAIN: &str = "<|constrain|>";
const END: &str = "<|end|>";
const RETURN: &str = "<|return|>";
const CALL: &str = "<|call|>";

/// What ends the text of a message. Models forget `<|end|>` before they begin anew.
const ENDS: &[&str] = &[END, RETURN, CALL, START, CHANNEL];

/// What ends a message.
const ENDED: &[&str] = &[END, RETURN, CALL];

/// Longest header of a message, in bytes.
const HEADER_BYTES_MAX: usize = 1024;

/// Kinds of text that a header names.
const TEXTS: &[&str] = &["json", "code", "text"];

/// The dialect `harmony`.
pub struct Harmony;

register_dialect!(&Harmony);

impl Dialect for Harmony {
    fn id(&self) -> &'static str {
        "harmony"
    }

    fn tools(&self) -> bool {
        true
    }

    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser> {
        let state = if context.prompt_opens_reasoning { State::Text(Kind::Reasoning) } else { State::Header };
        Box::new(Parser { tools: !context.tools.is_empty(), state, ..Parser::default() })
    }

    fn reasoning(&self) -> Option<ReasoningForm> {
        // Where nothing was reasoned, the header that the prompt began is begun again.
        let content = "<|start|>assistant<|channel|>final<|message|>";
        Some(ReasoningForm { open: "<|channel|>analysis<|message|>", close: END, content })
    }

    fn evidence(&self, template: &str) -> Option<Evidence> {
        ["<|channel|>analysis", "<|channel|>commentary"]
            .into_iter()
            .find(|text| template.contains(text))
            .map(Evidence::Calls)
    }

    fn markers(&self, _context: &ParserContext) -> &'static [&'static str] {
        &[START, CHANNEL, MESSAGE, CONSTRAIN, END, RETURN, CALL]
    }
}

#[derive(Default)]
struct Parser {
    tools: bool,
    /// Text not settled: a header and the text of a call, as they were written; of other text what may be a marker.
    held: String,
    state: State,
    /// Calls read so far.
    count: u32,
    /// The last kind of text that was given out; a line break comes before the next message of the same.
    last: Option<Kind>,
    /// Nothing of the message was given out yet.
    fresh: bool,
}

#[derive(Clone, Copy, Default)]
enum State {
    /// At the beginning of a message, or of its header.
    #[default]
    Header,
    Text(Kind),
    /// In the text of a call, which begins here in the held text, and whose end was looked for up to there.
    Call {
        text: usize,
        searched: usize,
    },
    /// After a message.
    Between,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Kind {
    Reasoning,
    Content,
}

/// What a header says.
struct Header<'a> {
    kind: Kind,
    recipient: Option<&'a str>,
}

impl<'a> Header<'a> {
    /// Reads what stands before `<|message|>`: a channel, a recipient and the kind of the text. Anything else is none.
    fn read(text: &'a str) -> Option<Self> {
        let text = text.strip_prefix(START).unwrap_or(text).trim_start();
        let text = text.strip_prefix("assistant").unwrap_or(text);
        let (before, after) = text.split_once(CHANNEL).unwrap_or((text, ""));
        let after = after.trim_start();
        let end = after.find(|c: char| c.is_whitespace() || c == '<').unwrap_or(after.len());
        let (channel, after) = after.split_at(end);
        let kind = match channel {
            "analysis" => Kind::Reasoning,
            "commentary" | "final" | "" => Kind::Content,
            _ => return None,
        };
        let mut recipient = None;
        for word in [before, after].into_iter().flat_map(|part| part.split(CONSTRAIN)).flat_map(str::split_whitespace) {
            match word.strip_prefix("to=") {
                Some(name) if is_name(name) && recipient.is_none() => recipient = Some(name),
                None if TEXTS.contains(&word) => {}
                _ => return None,
            }
        }
        Some(Self { kind, recipient })
    }
}

impl Parser {
    /// Goes on by one state; false waits for more text.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Header => self.header(deltas),
            State::Text(kind) => match find_first(&self.held, ENDS) {
                Some((at, marker)) => {
                    let rest = self.held.split_off(at);
                    let text = mem::replace(&mut self.held, rest);
                    self.give(kind, &text, deltas);
                    self.end(marker);
                    true
                }
                None => {
                    let rest = self.held.split_off(settled_len(&self.held, ENDS));
                    let text = mem::replace(&mut self.held, rest);
                    self.give(kind, &text, deltas);
                    false
                }
            },
            State::Call { text, searched } => match find_first(&self.held[searched..], ENDS) {
                // The marker may be part of an argument.
                Some((at, _)) if inside_json(&self.held[text..searched + at]) => {
                    self.state = State::Call { text, searched: searched + at + 1 };
                    true
                }
                Some((at, marker)) => {
                    self.call(text, searched + at, deltas);
                    self.end(marker);
                    true
                }
                None => {
                    let searched = settled_len(&self.held, ENDS).max(searched);
                    self.state = State::Call { text, searched };
                    false
                }
            },
            State::Between => {
                self.held.drain(..self.held.len() - self.held.trim_start_matches('\n').len());
                if self.held.is_empty() || (START.starts_with(&self.held) && self.held != START) {
                    return false;
                }
                self.state = State::Header;
                true
            }
        }
    }

    /// Takes a header, if it is whole. What is none is content.
    fn header(&mut self, deltas: &mut Vec<Delta>) -> bool {
        // The end of a message that was not begun.
        if let Some(marker) = ENDED.iter().find(|marker| self.held.starts_with(**marker)) {
            self.end(marker);
            return true;
        }
        let begins = self.held.strip_prefix(START).unwrap_or(&self.held).trim_start();
        let begins = begins.strip_prefix("assistant").unwrap_or(begins).trim_start();
        let known = ["to=", CHANNEL, MESSAGE, CONSTRAIN];
        let possible = known.iter().any(|start| begins.starts_with(start) || start.starts_with(begins))
            || ENDS.iter().any(|marker| marker.len() > self.held.len() && marker.starts_with(&self.held))
            || "assistant".starts_with(begins);
        let end = self.held.find(MESSAGE);
        let len = end.unwrap_or(self.held.len().saturating_sub(MESSAGE.len()));
        // No message ends within a header.
        let broken = find_first(&self.held[..end.unwrap_or(self.held.len())], ENDED).is_some();
        let header = end.map(|end| Header::read(&self.held[..end]));
        if !possible || broken || len > HEADER_BYTES_MAX || matches!(header, Some(None)) {
            self.state = State::Text(Kind::Content);
            self.fresh = true;
            // A marker that nothing came before would end the text at once, and be lost.
            let marker = ENDS.iter().find_map(|marker| self.held.starts_with(marker).then_some(marker.len()));
            if let Some(len) = marker {
                let rest = self.held.split_off(len);
                let text = mem::replace(&mut self.held, rest);
                self.give(Kind::Content, &text, deltas);
            }
            return true;
        }
        let (Some(end), Some(Some(Header { kind, recipient }))) = (end, header) else { return false };
        self.fresh = true;
        if recipient.is_some() {
            let text = end + MESSAGE.len();
            self.state = State::Call { text, searched: text };
        } else {
            self.state = State::Text(kind);
            self.held.drain(..end + MESSAGE.len());
        }
        true
    }

    /// Gives out a piece of a message.
    fn give(&mut self, kind: Kind, text: &str, deltas: &mut Vec<Delta>) {
        if text.is_empty() {
            return;
        }
        let delta = if kind == Kind::Reasoning { Delta::Reasoning } else { Delta::Content };
        let again = mem::take(&mut self.fresh) && self.last == Some(kind);
        push(deltas, delta, &if again { format!("\n{text}") } else { text.to_owned() });
        self.last = Some(kind);
    }

    /// Leaves a message behind, and the marker that ends it.
    fn end(&mut self, marker: &str) {
        if marker == START || marker == CHANNEL {
            self.state = State::Header;
        } else {
            self.held.drain(..marker.len());
            self.state = State::Between;
        }
    }

    /// Settles the message to a tool whose text is there.
    fn call(&mut self, text: usize, end: usize, deltas: &mut Vec<Delta>) {
        let rest = self.held.split_off(end);
        let whole = mem::replace(&mut self.held, rest);
        let recipient = Header::read(&whole[..text - MESSAGE.len()]).and_then(|header| header.recipient);
        let name = recipient.map(|recipient| recipient.strip_prefix("functions.").unwrap_or(recipient));
        match (name, call::read_arguments(&whole[text..])) {
            (Some(name), Some(arguments)) if self.tools => {
                deltas.push(Delta::ToolCall { index: self.count, name: name.to_owned(), arguments });
                self.count += 1;
            }
            _ if self.tools => {
                self.last = Some(Kind::Content);
                deltas.push(Delta::Malformed { text: whole });
            }
            _ => self.give(Kind::Content, &whole, deltas),
        }
    }
}

impl DialectParser for Parser {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        let mut deltas = Vec::new();
        while self.step(&mut deltas) {}
        deltas
    }

    fn finish(&mut self) -> Vec<Delta> {
        let mut deltas = Vec::new();
        while let State::Call { text, .. } = self.state {
            let whole = call::read_arguments(&self.held[text..]).is_some();
            match find_first(&self.held[text..], ENDS) {
                // A quote too many made every marker look like part of an argument.
                Some((at, marker)) if !whole => {
                    self.call(text, text + at, &mut deltas);
                    self.end(marker);
                }
                _ => {
                    let end = text + settled_len(&self.held[text..], ENDS);
                    self.call(text, end, &mut deltas);
                    self.held.clear();
                    self.state = State::Between;
                }
            }
            while self.step(&mut deltas) {}
        }
        let held = mem::take(&mut self.held);
        let kind = if let State::Text(kind) = self.state { kind } else { Kind::Content };
        self.give(kind, &held, &mut deltas);
        deltas
    }
}

#[cfg(test)]
mod tests {
    use mesh_text::{Delta, Dialect, ParserContext};

    use super::Harmony;
    use crate::contract;

    #[test]
    fn content_that_a_constraint_opens_is_content() {
        let form = Harmony.reasoning().unwrap();
        for reasoning in [format!("{}Hm.{}", form.open, form.close), String::new()] {
            let answer =
                contract::answer(&Harmony, &ParserContext::default(), &format!("{reasoning}{}{{}}", form.content));
            assert_eq!((answer.content.as_str(), answer.reasoning.is_empty()), ("{}", reasoning.is_empty()));
        }
    }

    #[test]
    fn reasoning_and_content_stream_while_they_are_written() {
        let mut parser = Harmony.parser(&ParserContext::default());
        assert_eq!(parser.push("<|channel|>analysis<|message|>Hm"), [Delta::Reasoning("Hm".into())]);
        assert_eq!(parser.push("m.<|end|><|start|>assistant<|channel|>"), [Delta::Reasoning("m.".into())]);
        assert_eq!(parser.push("final<|message|>Par"), [Delta::Content("Par".into())]);
        assert_eq!(parser.push("is <|re"), [Delta::Content("is ".into())]);
        assert_eq!(parser.push("turn|>"), []);
        assert_eq!(parser.finish(), []);
    }

    #[test]
    fn a_prompt_may_open_reasoning() {
        assert!(Harmony.opens_reasoning("<|start|>assistant<|channel|>analysis<|message|>"));
        assert!(!Harmony.opens_reasoning("<|start|>assistant"));
    }

    #[test]
    fn keeps_the_contract() {
        let fragments = [
            "<|start|>",
            "<|start|>assistant",
            "<|channel|>",
            "<|channel|>analysis<|message|>",
            "<|channel|>final<|message|>",
            "<|channel|>commentary to=functions.f <|constrain|>json<|message|>{\"a\": \"é\"}<|call|>",
            " to=functions.g<|channel|>commentary json<|message|>",
            "<|message|>",
            "<|constrain|>",
            "<|end|>",
            "<|return|>",
            "<|call|>",
            "{\"a\": 1}",
            "\"",
            "<|",
            "\n",
        ];
        contract::check(&Harmony, &fragments);
    }
}
