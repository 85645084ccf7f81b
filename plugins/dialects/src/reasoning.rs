//! A block of reasoning at the beginning of an answer, between two markers.
//!
//! Newlines that touch a marker belong to it and are dropped, and so is white space before the opening one; every
//! other character is kept. The block is recognised at the beginning only: later on, the markers are text like any
//! other, as in an answer about them. A block that is not closed is reasoning up to the end.

use std::mem;

use mesh_text::{
    Delta,
    scan::{find_first, settled_len},
};

/// Splits a stream into reasoning and the rest.
#[derive(Debug)]
pub struct Reasoning {
    open: &'static str,
    close: &'static str,
    until: &'static [&'static str],
    or_closed: bool,
    state: State,
    held: String,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Before anything but white space.
    Start,
    /// In the block, before anything but newlines. `reopens`: the prompt opened the block, and the model may write
    /// the opening marker once more.
    Opened { reopens: bool },
    /// In the block.
    Inside,
    /// After the block, before anything but newlines.
    Closed,
    /// In the rest.
    Rest,
}

impl Reasoning {
    /// A splitter for these markers. `opened`: the prompt ends inside the block.
    pub fn new(open: &'static str, close: &'static str, opened: bool) -> Self {
        let state = if opened { State::Opened { reopens: true } } else { State::Start };
        Self { open, close, until: &[], or_closed: false, state, held: String::new() }
    }

    /// The block also ends before any of these markers, which then belong to what follows.
    pub fn until(self, markers: &'static [&'static str]) -> Self {
        Self { until: markers, ..self }
    }

    /// A closing marker that the text begins with says that there is no reasoning, and is dropped.
    pub fn or_closed(self) -> Self {
        Self { or_closed: true, ..self }
    }

    /// Takes the next piece of text; gives [`Delta::Reasoning`] and [`Delta::Content`].
    pub fn push(&mut self, text: &str) -> Vec<Delta> {
        self.held.push_str(text);
        let mut deltas = Vec::new();
        while self.step(&mut deltas) {}
        deltas
    }

    /// Ends the text; gives what was held back.
    pub fn finish(&mut self) -> Vec<Delta> {
        let held = mem::take(&mut self.held);
        let delta = match self.state {
            _ if held.is_empty() => return Vec::new(),
            State::Opened { .. } | State::Inside => Delta::Reasoning(held),
            State::Start | State::Closed | State::Rest => Delta::Content(held),
        };
        vec![delta]
    }

    /// Goes on by one state; false waits for more text.
    fn step(&mut self, deltas: &mut Vec<Delta>) -> bool {
        self.state = match self.state {
            State::Start => {
                let text = self.held.trim_start();
                if let Some(rest) = text.strip_prefix(self.open) {
                    self.held = rest.to_owned();
                    State::Opened { reopens: false }
                } else if self.or_closed
                    && let Some(rest) = text.strip_prefix(self.close)
                {
                    self.held = rest.to_owned();
                    State::Closed
                } else if self.open.starts_with(text) || (self.or_closed && self.close.starts_with(text)) {
                    return false;
                } else {
                    State::Rest
                }
            }
            State::Opened { reopens } => {
                self.drop_newlines();
                if reopens && let Some(rest) = self.held.strip_prefix(self.open) {
                    self.held = rest.to_owned();
                    State::Opened { reopens: false }
                } else if self.held.is_empty() || (reopens && self.open.starts_with(&self.held)) {
                    return false;
                } else {
                    State::Inside
                }
            }
            State::Inside => match find_first(&self.held, &self.ends()) {
                Some((at, marker)) => {
                    let dropped = if marker == self.close { marker.len() } else { 0 };
                    let rest = self.held.split_off(at + dropped);
                    let block = mem::replace(&mut self.held, rest);
                    push(deltas, Delta::Reasoning, block[..at].trim_end_matches('\n'));
                    State::Closed
                }
                None => {
                    let settled = settled_len(&self.held, &self.ends());
                    let settled = self.held[..settled].trim_end_matches('\n').len();
                    let rest = self.held.split_off(settled);
                    push(deltas, Delta::Reasoning, &mem::replace(&mut self.held, rest));
                    return false;
                }
            },
            State::Closed => {
                self.drop_newlines();
                if self.held.is_empty() {
                    return false;
                }
                State::Rest
            }
            State::Rest => {
                push(deltas, Delta::Content, &mem::take(&mut self.held));
                return false;
            }
        };
        true
    }

    fn ends(&self) -> Vec<&'static str> {
        self.until.iter().copied().chain([self.close]).collect()
    }

    fn drop_newlines(&mut self) {
        let dropped = self.held.len() - self.held.trim_start_matches('\n').len();
        self.held.drain(..dropped);
    }
}

/// Adds a delta unless its text is empty.
pub(crate) fn push(deltas: &mut Vec<Delta>, kind: fn(String) -> Delta, text: &str) {
    if !text.is_empty() {
        deltas.push(kind(text.to_owned()));
    }
}
