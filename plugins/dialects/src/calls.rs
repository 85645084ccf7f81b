//! Calls between markers, read out of content while it streams: what most dialects share.
//!
//! A dialect says with a [`Form`] how its calls begin, end and are read. Newlines that touch a call are dropped. A call
//! that does not parse comes back as text, markers and newlines included. Whether a call ends somewhere is decided
//! from the text before that place alone, so that it does not matter in which pieces the text came.

use std::mem;

use mesh_text::{
    Delta, DialectParser, Tools,
    scan::{find_first, settled_len},
};

use crate::reasoning::{Reasoning, push};

/// A name, and arguments as the text of a JSON object.
pub type Call = (String, String);

/// How calls are written.
#[derive(Clone, Copy, Debug)]
pub struct Form {
    /// Markers a call begins with, those of a section of calls among them.
    pub open: &'static [&'static str],
    /// How it ends.
    pub end: End,
    /// Markers that are dropped where they follow a call: what ends a section.
    pub after: &'static [&'static str],
    /// An answer that is nothing but calls without markers.
    pub bare: Option<Bare>,
    /// Reads a call, or several that share their markers.
    pub read: fn(&Block<'_>) -> Option<Vec<Call>>,
}

/// How a call ends.
#[derive(Clone, Copy, Debug)]
pub enum End {
    /// With one of these markers, unless the text of the call before it says that the marker is inside of an argument.
    Marker(&'static [&'static str], fn(&str) -> bool),
    /// Where the bracket is closed that opens it. A list begins the call; an object may have words before it.
    Bracket(Quotes),
}

/// What strings inside of brackets are quoted with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Quotes {
    /// `"`.
    Json,
    /// `"` or `'`.
    Python,
}

/// An answer without markers that may be calls.
#[derive(Clone, Copy, Debug)]
pub struct Bare {
    /// Whether text that begins so is calls; `None` while it may still be either.
    pub begins: fn(&str, &Tools) -> Option<bool>,
    /// How the calls end.
    pub end: End,
}

/// The text of a call.
#[derive(Clone, Copy, Debug)]
pub struct Block<'a> {
    /// What is between the first opening marker and the closing one.
    pub text: &'a str,
    /// The call came to its end. Otherwise the answer did, and a form that does not show whether it is whole is not.
    pub closed: bool,
    /// What the request offers.
    pub tools: &'a Tools,
}

/// Never inside of an argument.
pub fn never(_: &str) -> bool {
    false
}

/// A parser of reasoning, of calls in what is not reasoning, and of content in what is neither.
pub struct Parser {
    reasoning: Option<Reasoning>,
    calls: Option<Calls>,
}

impl Parser {
    /// Reads calls only if the request offers tools.
    pub fn boxed(
        reasoning: impl Into<Option<Reasoning>>,
        form: &'static Form,
        tools: &Tools,
    ) -> Box<dyn DialectParser> {
        let calls = (!tools.is_empty()).then(|| Calls::new(form, tools.clone()));
        Box::new(Self { reasoning: reasoning.into(), calls })
    }

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
        let deltas = match &mut self.reasoning {
            Some(reasoning) => reasoning.push(text),
            None if text.is_empty() => Vec::new(),
            None => vec![Delta::Content(text.to_owned())],
        };
        self.read_calls(deltas)
    }

    fn finish(&mut self) -> Vec<Delta> {
        let deltas = self.reasoning.as_mut().map(Reasoning::finish).unwrap_or_default();
        let mut deltas = self.read_calls(deltas);
        if let Some(calls) = &mut self.calls {
            calls.finish(&mut deltas);
        }
        deltas
    }
}

/// Reads calls out of content.
pub struct Calls {
    form: &'static Form,
    tools: Tools,
    /// Text not settled. In a call it begins with the newlines before the call's opening marker.
    held: String,
    state: State,
    /// Calls read so far.
    count: u32,
}

#[derive(Clone, Copy)]
enum State {
    /// Before anything, where bare calls are possible.
    Start,
    Text,
    /// After a call, before anything but newlines and markers that follow calls.
    Called,
    Call(Open),
}

/// A call that has begun.
#[derive(Clone, Copy)]
struct Open {
    /// Where in the held text it begins, after its marker.
    body: usize,
    /// Up to where its end was looked for.
    searched: usize,
    end: End,
    brackets: Brackets,
}

impl Open {
    fn at(body: usize, end: End) -> Self {
        Self { body, searched: body, end, brackets: Brackets::default() }
    }
}

impl Calls {
    /// A reader of calls to these tools.
    pub fn new(form: &'static Form, tools: Tools) -> Self {
        let state = if form.bare.is_some() { State::Start } else { State::Text };
        Self { form, tools, held: String::new(), state, count: 0 }
    }

    /// Takes the next piece of content.
    pub fn push(&mut self, text: &str, deltas: &mut Vec<Delta>) {
        self.held.push_str(text);
        while self.step(deltas) {}
    }

    /// Goes on by one state; false waits for more text.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        match self.state {
            State::Start => {
                let Some(bare) = self.form.bare else {
                    self.state = State::Text;
                    return true;
                };
                self.state = match (bare.begins)(&self.held, &self.tools) {
                    Some(true) => State::Call(Open::at(0, bare.end)),
                    Some(false) => State::Text,
                    None => return false,
                };
                true
            }
            State::Text => match find_first(&self.held, self.form.open) {
                Some((at, marker)) => {
                    let text = self.held[..at].trim_end_matches('\n').len();
                    let rest = self.held.split_off(text);
                    push(deltas, Delta::Content, &mem::replace(&mut self.held, rest));
                    self.state = State::Call(Open::at(at - text + marker.len(), self.form.end));
                    true
                }
                None => {
                    let settled = settled_len(&self.held, self.form.open);
                    let settled = self.held[..settled].trim_end_matches('\n').len();
                    let rest = self.held.split_off(settled);
                    push(deltas, Delta::Content, &mem::replace(&mut self.held, rest));
                    false
                }
            },
            State::Called => {
                let rest = self.held.trim_start_matches('\n');
                if let Some(rest) = self.form.after.iter().find_map(|marker| rest.strip_prefix(marker)) {
                    self.held = rest.to_owned();
                } else if self.form.after.iter().any(|marker| marker.starts_with(rest)) || rest.is_empty() {
                    self.held = rest.to_owned();
                    return false;
                } else {
                    self.held = rest.to_owned();
                    self.state = State::Text;
                }
                true
            }
            State::Call(open) => match self.find_end(open) {
                Some((text, end)) => {
                    self.settle(open.body..text, end, true, deltas);
                    true
                }
                None => false,
            },
        }
    }

    /// Where the call's text ends, and where its marker does. Notes how far it looked.
    fn find_end(&mut self, mut open: Open) -> Option<(usize, usize)> {
        let found = match open.end {
            End::Marker(close, inside) => loop {
                let Some((at, marker)) = find_first(&self.held[open.searched..], close) else {
                    open.searched = settled_len(&self.held, close).max(open.searched);
                    break None;
                };
                let at = open.searched + at;
                open.searched = at + marker.len();
                if !inside(&self.held[open.body..at]) {
                    break Some((at, open.searched));
                }
            },
            End::Bracket(quotes) => {
                let rest = &self.held.as_bytes()[open.searched..];
                let end =
                    rest.iter().position(|byte| open.brackets.close(*byte, quotes)).map(|at| open.searched + at + 1);
                open.searched = self.held.len();
                end.map(|end| (end, end))
            }
        };
        self.state = State::Call(open);
        found
    }

    /// Settles the call whose text is at `text`, and which the next one can follow at `end`.
    fn settle(&mut self, text: std::ops::Range<usize>, end: usize, closed: bool, deltas: &mut Vec<Delta>) {
        let rest = self.held.split_off(end);
        let whole = mem::replace(&mut self.held, rest);
        let block = Block { text: &whole[text], closed, tools: &self.tools };
        self.state = match (self.form.read)(&block).filter(|calls| !calls.is_empty()) {
            Some(calls) => {
                for (name, arguments) in calls {
                    deltas.push(Delta::ToolCall { index: self.count, name, arguments });
                    self.count += 1;
                }
                State::Called
            }
            None => {
                deltas.push(Delta::Malformed { text: whole });
                State::Text
            }
        };
    }

    /// Ends the content and gives what was held back.
    pub fn finish(&mut self, deltas: &mut Vec<Delta>) {
        // Each round settles one call or ends.
        while let State::Call(open) = self.state {
            let close: &[&str] = if let End::Marker(close, _) = open.end { close } else { &[] };
            let unclosed = open.body + settled_len(&self.held[open.body..], close);
            let block = Block { text: &self.held[open.body..unclosed], closed: false, tools: &self.tools };
            let whole = (self.form.read)(&block).is_some();
            match find_first(&self.held[open.body..], close) {
                // Something made every closing marker look like part of an argument.
                Some((at, marker)) if !whole => {
                    let at = open.body + at;
                    self.settle(open.body..at, at + marker.len(), true, deltas);
                    while self.step(deltas) {}
                }
                // Models may leave the last closing marker out.
                _ => self.settle(open.body..unclosed, self.held.len(), false, deltas),
            }
        }
        push(deltas, Delta::Content, &mem::take(&mut self.held));
    }
}

/// Follows brackets and strings, byte by byte.
#[derive(Clone, Copy, Debug, Default)]
struct Brackets {
    /// Something other than white space came.
    begun: bool,
    depth: u32,
    quote: Option<u8>,
    escaped: bool,
}

impl Brackets {
    /// Takes the next byte; whether it closes the bracket that was opened first.
    fn close(&mut self, byte: u8, quotes: Quotes) -> bool {
        let first = !self.begun && !byte.is_ascii_whitespace();
        self.begun |= first;
        if self.depth == 0 {
            self.depth = u32::from(byte == b'{' || (byte == b'[' && first));
            return false;
        }
        match (self.quote, byte) {
            (Some(_), _) if self.escaped => self.escaped = false,
            (Some(_), b'\\') => self.escaped = true,
            (Some(quote), _) if byte == quote => self.quote = None,
            (Some(_), _) => {}
            (None, b'"') => self.quote = Some(byte),
            (None, b'\'') if quotes == Quotes::Python => self.quote = Some(byte),
            (None, b'[' | b'{' | b'(') => self.depth += 1,
            (None, b']' | b'}' | b')') => self.depth -= 1,
            (None, _) => {}
        }
        self.depth == 0
    }
}

/// Whether text that stops here stops inside of a string.
pub fn ends_inside_string(text: &str, quotes: Quotes) -> bool {
    let mut quote = None;
    let mut escaped = false;
    for byte in text.bytes() {
        match (quote, byte) {
            (Some(_), _) if escaped => escaped = false,
            (Some(_), b'\\') => escaped = true,
            (Some(open), _) if byte == open => quote = None,
            (Some(_), _) => {}
            (None, b'"') => quote = Some(byte),
            (None, b'\'') if quotes == Quotes::Python => quote = Some(byte),
            (None, _) => {}
        }
    }
    quote.is_some()
}

/// Whether JSON that stops here stops inside of a string.
pub fn inside_json(json: &str) -> bool {
    ends_inside_string(json, Quotes::Json)
}

/// Whether a template has all of these texts.
pub fn has_all(template: &str, texts: &[&str]) -> bool {
    texts.iter().all(|text| template.contains(text))
}

#[cfg(test)]
mod tests {
    use super::{Brackets, Quotes, inside_json};

    #[test]
    fn strings_are_followed() {
        assert!(inside_json(r#"{"a": "b"#));
        assert!(inside_json(r#"{"a": "b\""#));
        assert!(!inside_json(r#"{"a": "b\\""#));
        assert!(!inside_json("{"));
    }

    #[test]
    fn brackets_are_followed() {
        fn end(text: &str, quotes: Quotes) -> Option<&str> {
            let mut brackets = Brackets::default();
            text.bytes().position(|byte| brackets.close(byte, quotes)).map(|at| &text[..=at])
        }
        assert_eq!(end(r#" [{"a": "]"}] [1]"#, Quotes::Json), Some(r#" [{"a": "]"}]"#));
        assert_eq!(end(r#"f[ARGS]{"a": "}\"}"} {"#, Quotes::Json), Some(r#"f[ARGS]{"a": "}\"}"}"#));
        assert_eq!(end("[f(a='it\\'s]')] x", Quotes::Python), Some("[f(a='it\\'s]')]"));
        assert_eq!(end(r#"{"a": "it's"}"#, Quotes::Json), Some(r#"{"a": "it's"}"#));
        assert_eq!(end("words [1] {", Quotes::Json), None);
    }
}
