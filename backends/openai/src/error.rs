//! What went wrong with the server, and what clients are told of it: its own words where it refuses a request, none of where it
//! is.

use std::{sync::Arc, time::Duration};

use mesh_core::{
    EngineError,
    node::{Rejection, RejectionKind},
    queue::{RETRY_AFTER_MAX, RETRY_AFTER_MIN, RETRY_AFTER_UNMEASURED},
};

use crate::{options::Address, wire::ErrorAnswer};

/// Longest text of the server that is passed on, in bytes.
const MESSAGE_BYTES_MAX: usize = 2048;
/// Longest word of it, such as a code, in bytes.
const WORD_BYTES_MAX: usize = 128;

/// A conversation with the server that went wrong. What it says is for the log.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Trouble {
    /// No connection: nothing was sent.
    #[error("it cannot be reached: {0}")]
    Unreachable(String),
    /// The connection broke.
    #[error("the connection broke: {0}")]
    Broke(String),
    /// An answer other than success.
    #[error("it refused ({status}): {}", .said.message)]
    Refused {
        /// HTTP status.
        status: u16,
        /// Its words.
        said: ErrorAnswer,
        /// When it wants to be asked again.
        retry_after: Option<Duration>,
    },
    /// An error in the middle of an answer.
    #[error("it reported an error: {0}")]
    Reported(String),
    /// Something that is not understood.
    #[error("it sent something malformed: {0}")]
    Malformed(String),
    /// More than is read.
    #[error("it sent more than {0} bytes at once")]
    TooLarge(usize),
    /// The answer ended before its end.
    #[error("it ended the answer before it was complete")]
    CutOff,
    /// It is the server that asks.
    #[error("its address leads to this very server, which cannot share itself")]
    Itself,
    /// Nothing came for too long.
    #[error("it was silent for {} ms", .0.as_millis())]
    Silent(Duration),
}

impl Trouble {
    /// Whether it may be a sign that the server is gone, or serves something else now.
    pub fn doubtful(&self) -> bool {
        match self {
            Self::Unreachable(_) | Self::Broke(_) | Self::CutOff | Self::Silent(_) | Self::Malformed(_) => true,
            Self::Refused { status, .. } => *status == 404 || *status >= 500,
            Self::Reported(_) | Self::TooLarge(_) | Self::Itself => false,
        }
    }
}

/// What clients must not see of the server, and what they see in its place.
#[derive(Clone, Debug)]
pub(crate) struct Veil(Vec<(String, String)>);

impl Veil {
    pub fn new(address: &Address, key: Option<&str>) -> Self {
        let mut words: Vec<String> = vec![address.base.clone(), address.authority.clone()];
        // What every machine calls itself tells nothing, and a letter or two are found in every text.
        if address.host != "localhost" && address.host.len() > 3 {
            words.push(address.host.clone());
        }
        words.extend(key.filter(|key| key.len() > 3).map(str::to_owned));
        Self(words.into_iter().map(|word| (word, "the shared server".to_owned())).collect())
    }

    /// The same, over the server's own name of a model.
    pub fn and(&self, id: &str, name: &str) -> Self {
        let other = (id != name).then(|| (id.to_owned(), name.to_owned()));
        Self(other.into_iter().chain(self.0.iter().cloned()).collect())
    }

    /// The text without them, and no longer than is passed on.
    pub fn over(&self, text: &str) -> String {
        let end = text.floor_char_boundary(MESSAGE_BYTES_MAX);
        let mut made = text[..end].to_owned();
        if end < text.len() {
            // Half of a word may tell as much as all of it.
            let longest = self.0.iter().map(|(word, _)| begun(&made, word)).max().unwrap_or(0);
            made.truncate(made.len() - longest);
        }
        for (word, instead) in &self.0 {
            made = replaced(&made, word, instead);
        }
        made
    }
}

/// Bytes of the beginning of `word` that `text` ends with.
fn begun(text: &str, word: &str) -> usize {
    let ends = |length: &usize| {
        let end = text.len().checked_sub(*length).and_then(|from| text.get(from..));
        end.zip(word.get(..*length)).is_some_and(|(end, begun)| end.eq_ignore_ascii_case(begun))
    };
    (1..word.len()).rev().find(ends).unwrap_or(0)
}

/// `text` with `word` replaced, however it is capitalised.
fn replaced(text: &str, word: &str, instead: &str) -> String {
    let (plain, word) = (text.to_ascii_lowercase(), word.to_ascii_lowercase());
    let (mut made, mut from) = (String::new(), 0);
    for (at, found) in plain.match_indices(&word) {
        made.push_str(&text[from..at]);
        made.push_str(instead);
        from = at + found.len();
    }
    made.push_str(&text[from..]);
    made
}

/// A request that the server did not take.
pub(crate) fn rejection(trouble: &Trouble, veil: &Veil) -> Rejection {
    match trouble {
        Trouble::Refused { status, said, retry_after } => refused(*status, said, *retry_after, veil),
        Trouble::Unreachable(_) => unavailable("the shared server cannot be reached at the moment; try again"),
        Trouble::Silent(_) => unavailable("the shared server did not answer in time; try again"),
        Trouble::Reported(what) => failed(format!("the shared server failed: {}", veil.over(what))),
        Trouble::Broke(_) | Trouble::CutOff => failed("the shared server broke off before it answered"),
        Trouble::Malformed(_) => failed("the shared server answered with something that is not understood here"),
        Trouble::Itself => failed("the shared server is this very server, which cannot share itself"),
        Trouble::TooLarge(bytes) => failed(format!("the shared server answered with more than {bytes} bytes at once")),
    }
}

fn unavailable(what: &str) -> Rejection {
    Rejection::unavailable("share_unavailable", what, RETRY_AFTER_UNMEASURED)
}

fn failed(what: impl Into<String>) -> Rejection {
    Rejection { retry_after: Some(RETRY_AFTER_MIN), ..Rejection::new(RejectionKind::Failed, "share_failed", what) }
}

fn refused(status: u16, said: &ErrorAnswer, retry_after: Option<Duration>, veil: &Veil) -> Rejection {
    let soon = Some(retry_after.unwrap_or(RETRY_AFTER_UNMEASURED).clamp(RETRY_AFTER_MIN, RETRY_AFTER_MAX));
    let message = || match veil.over(&said.message) {
        message if message.trim().is_empty() => format!("the shared server refused the request ({status})"),
        message => message,
    };
    let word = |word: &Option<String>| {
        word.as_deref().map(|word| veil.over(&word[..word.floor_char_boundary(WORD_BYTES_MAX)]))
    };
    let code = |usual: &str| word(&said.code).filter(|code| !code.is_empty()).unwrap_or_else(|| usual.to_owned());
    let rejection =
        |kind, code: String| Rejection { param: word(&said.param), ..Rejection::new(kind, &code, message()) };
    match status {
        // Whoever shares the server gave the key, not the client.
        401 | 403 => failed("the shared server does not accept the key that it is asked with"),
        404 => rejection(RejectionKind::NotFound, code("not_found")),
        408 | 409 | 425 | 429 => {
            Rejection { retry_after: soon, ..rejection(RejectionKind::Unavailable, code("share_busy")) }
        }
        501 => rejection(RejectionKind::Invalid, code("unsupported")),
        400..=499 if said.about_length() => rejection(RejectionKind::Invalid, "context_length_exceeded".into()),
        400..=499 => rejection(RejectionKind::Invalid, code("invalid_request")),
        502..=504 => {
            Rejection { retry_after: soon, ..unavailable("the shared server cannot serve at the moment; try again") }
        }
        _ => Rejection { retry_after: soon, ..failed(format!("the shared server failed ({status})")) },
    }
}

/// An answer that was begun and not finished.
pub(crate) fn broken(trouble: &Trouble, veil: &Veil) -> EngineError {
    let what: Arc<str> = match trouble {
        Trouble::Reported(what) => format!("the shared server broke off: {}", veil.over(what)).into(),
        Trouble::Silent(_) => "the shared server broke off: it fell silent".into(),
        Trouble::Malformed(_) => "the shared server broke off: it sent something that is not understood here".into(),
        Trouble::TooLarge(bytes) => format!("the shared server broke off: it sent more than {bytes} bytes").into(),
        Trouble::Unreachable(_) | Trouble::Broke(_) | Trouble::CutOff | Trouble::Itself | Trouble::Refused { .. } => {
            "the shared server broke off before the answer was complete".into()
        }
    };
    EngineError::Failed { what }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::address;

    #[test]
    fn what_is_veiled_is_not_seen_in_part_either() {
        let veil = Veil::new(&address("http://gpu-7.example.com:8000/v1").unwrap(), Some("sk-secret"));
        let seen =
            veil.over("at HTTP://GPU-7.example.com:8000, gpu-7.example.com:8000 and gpu-7.example.com: sk-secret");
        assert_eq!(seen, "at the shared server, the shared server and the shared server: the shared server");
        for before in MESSAGE_BYTES_MAX - 10..MESSAGE_BYTES_MAX {
            let long = format!("{}sk-secret{}", "ä ".repeat(before / 3), "x".repeat(100));
            let seen = veil.over(&long);
            assert!(!seen.contains("sk-") && seen.len() <= MESSAGE_BYTES_MAX + 100, "{seen}");
        }
        assert_eq!(veil.over("a gpu-7 and a key"), "a gpu-7 and a key");
        assert_eq!(veil.and("/m/x.gguf", "x").over("/m/x.gguf: no"), "x: no");
    }
}
