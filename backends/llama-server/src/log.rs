//! The last lines that a child wrote, bounded in number and length.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, PoisonError},
};

use tokio::io::{AsyncRead, AsyncReadExt};

/// Lines kept.
const LINES_MAX: usize = 200;
/// Bytes kept of a line; the rest of it is dropped.
const LINE_BYTES_MAX: usize = 1024;

/// A ring of lines. Cheap to clone; clones share the lines.
#[derive(Clone, Debug, Default)]
pub(crate) struct Tail(Arc<Mutex<VecDeque<String>>>);

impl Tail {
    /// Adds a line.
    pub fn push(&self, mut line: String) {
        if line.len() > LINE_BYTES_MAX {
            line.truncate(line.floor_char_boundary(LINE_BYTES_MAX));
        }
        let mut lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if lines.len() == LINES_MAX {
            lines.pop_front();
        }
        lines.push_back(line);
    }

    /// The last `count` lines that are not blank, joined by ` | `.
    pub fn last(&self, count: usize) -> String {
        let lines = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let lines: Vec<&str> = lines.iter().map(|line| line.trim()).filter(|line| !line.is_empty()).collect();
        lines[lines.len().saturating_sub(count)..].join(" | ")
    }

    /// Whether any line kept contains `text`.
    pub fn contains(&self, text: &str) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().any(|line| line.contains(text))
    }
}

/// Cuts bytes into lines, keeping no more than the bound of each.
#[derive(Debug, Default)]
struct Lines {
    line: Vec<u8>,
}

impl Lines {
    fn feed(&mut self, bytes: &[u8], mut emit: impl FnMut(String)) {
        for (index, part) in bytes.split(|byte| *byte == b'\n').enumerate() {
            if index > 0 {
                self.flush(&mut emit);
            }
            let room = LINE_BYTES_MAX.saturating_sub(self.line.len());
            self.line.extend_from_slice(&part[..part.len().min(room)]);
        }
    }

    fn flush(&mut self, emit: &mut impl FnMut(String)) {
        emit(String::from_utf8_lossy(&self.line).trim_end().to_owned());
        self.line.clear();
    }
}

/// Reads `stream` to its end into `tail`, and to the log at debug.
pub(crate) async fn drain(mut stream: impl AsyncRead + Unpin, tail: Tail) {
    let mut lines = Lines::default();
    let mut buffer = [0; 4096];
    let mut emit = |line: String| {
        tracing::debug!(target: "mesh_backend_llama_server::child", "{line}");
        tail.push(line);
    };
    while let Ok(count) = stream.read(&mut buffer).await
        && count > 0
    {
        lines.feed(&buffer[..count], &mut emit);
    }
    if !lines.line.is_empty() {
        lines.flush(&mut emit);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_ring_is_bounded_both_ways() {
        let tail = Tail::default();
        for number in 0..LINES_MAX + 5 {
            tail.push(format!("{number} {}", "é".repeat(LINE_BYTES_MAX)));
        }
        let lines = tail.0.lock().unwrap();
        assert_eq!(lines.len(), LINES_MAX);
        assert!(lines[0].starts_with("5 ") && lines.iter().all(|line| line.len() <= LINE_BYTES_MAX));
    }

    #[test]
    fn the_last_lines() {
        let tail = Tail::default();
        for line in ["one", "", "  ", "two", "three "] {
            tail.push(line.into());
        }
        assert_eq!(tail.last(2), "two | three");
        assert_eq!(tail.last(9), "one | two | three");
        assert!(tail.contains("tw") && !tail.contains("four"));
    }

    #[tokio::test]
    async fn an_endless_line_is_cut() {
        let tail = Tail::default();
        drain(&[b'x'; 100_000][..], tail.clone()).await;
        assert_eq!(tail.last(1).len(), LINE_BYTES_MAX);
    }

    proptest! {
        #[test]
        fn lines_do_not_depend_on_how_bytes_arrive(text in "[a-zé\n]{0,200}", cut in 1usize..20) {
            let (mut whole, mut pieces) = (Vec::new(), Vec::new());
            Lines::default().feed(text.as_bytes(), |line| whole.push(line));
            let mut lines = Lines::default();
            for piece in text.as_bytes().chunks(cut) {
                lines.feed(piece, |line| pieces.push(line));
            }
            prop_assert_eq!(whole.len(), text.matches('\n').count());
            prop_assert_eq!(whole, pieces);
        }
    }
}
