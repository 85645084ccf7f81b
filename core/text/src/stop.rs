//! Cuts a stream of text at stop strings, without ever letting out a part of one.

use std::{cmp::Reverse, mem};

use crate::scan::settled_len;

/// What a piece of text came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct StopOutput {
    /// Text that can go out.
    pub text: String,
    /// The stop string that was hit; it is not part of `text`, and nothing after it will be.
    pub stopped: Option<String>,
}

/// Finds the stop string that is complete first, as generation would have ended there; of several that end at the
/// same place, the longest. Later text cannot overturn that, so the outcome does not depend on how the text was cut.
///
/// Holds back at most one byte less than the longest stop string. A piece costs time in proportion to its length times
/// the number of stop strings: bound their number and length before they get here.
#[derive(Clone, Debug)]
pub struct StopFilter {
    stops: Vec<String>,
    held: String,
    stopped: bool,
}

impl StopFilter {
    /// A filter for these strings. Empty ones are ignored.
    pub fn new(mut stops: Vec<String>) -> Self {
        stops.retain(|stop| !stop.is_empty());
        Self { stops, held: String::new(), stopped: false }
    }

    /// Takes the next piece of text. After a hit everything is dropped.
    pub fn push(&mut self, text: &str) -> StopOutput {
        if self.stopped {
            return StopOutput::default();
        }
        self.held.push_str(text);
        if let Some((at, stop)) = self.hit() {
            self.stopped = true;
            self.held.truncate(at);
            return StopOutput { text: mem::take(&mut self.held), stopped: Some(stop) };
        }
        let stops: Vec<&str> = self.stops.iter().map(String::as_str).collect();
        let rest = self.held.split_off(settled_len(&self.held, &stops));
        StopOutput { text: mem::replace(&mut self.held, rest), stopped: None }
    }

    /// Ends the stream and returns what was held back and turned out to be no stop string.
    pub fn finish(&mut self) -> String {
        self.stopped = true;
        mem::take(&mut self.held)
    }

    /// Where the winning stop string begins in the held text, and which it is.
    fn hit(&self) -> Option<(usize, String)> {
        let found = self.stops.iter().filter_map(|stop| self.held.find(stop.as_str()).map(|at| (at, stop)));
        let (at, stop) = found.min_by_key(|(at, stop)| (at + stop.len(), Reverse(stop.len())))?;
        Some((at, stop.clone()))
    }
}

#[cfg(test)]
#[path = "stop_tests.rs"]
mod tests;
