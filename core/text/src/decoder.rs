//! Token ids to text, one at a time: byte-exact, linear, and the same as decoding all at once.
//!
//! A character can be spread over several tokens. What is not yet a whole character is held back; what can never
//! become one is U+FFFD. One difference to the `tokenizers` crate is intended: where bytes that stand for themselves
//! (`<0xE2>`) end in an incomplete character, that crate garbles the whole run of them, characters already complete
//! included. Here only the incomplete one is lost, as a stream cannot take back what it has sent.

use std::{fmt, mem, sync::Arc};

use serde_json::Value;

use crate::tokenizer::{DecoderOptions, Tokenizer};

/// How a tokenizer turns tokens into text: its decoder, taken apart into steps on single tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Plan {
    steps: Vec<Step>,
    /// What is stripped off the text as a whole.
    strip: Option<Strip>,
    /// Tokenizers without a decoder separate tokens by spaces.
    separated: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Step {
    Replace { from: String, to: String },
    Metaspace { replacement: char, drop_first: bool },
    Strip(Strip),
    ByteFallback,
    ByteLevel,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Strip {
    content: char,
    start: usize,
    stop: usize,
}

/// Most characters a decoder may strip at an end.
const STRIP_MAX: u64 = 16;

impl Plan {
    /// Takes a decoder of tokenizer.json apart. The error names what is not supported.
    pub(crate) fn of(decoder: Option<&Value>) -> Result<Self, String> {
        let Some(decoder) = decoder else { return Ok(Self { separated: true, ..Self::default() }) };
        let mut plan = Self::default();
        let mut fused = false;
        plan.add(decoder, &mut fused)?;
        Ok(plan)
    }

    fn add(&mut self, decoder: &Value, fused: &mut bool) -> Result<(), String> {
        let text = |key: &str| decoder[key].as_str().map(str::to_owned);
        let kind = text("type").unwrap_or_else(|| "one without a type".into());
        if *fused && kind != "Strip" && kind != "Fuse" {
            return Err(format!("{kind} after the tokens are fused"));
        }
        let lacks = |what: &str| format!("{kind} without a usable {what}");
        let character = |key: &str| text(key).and_then(|text| text.chars().next()).ok_or_else(|| lacks(key));
        match kind.as_str() {
            "Sequence" => {
                let parts = decoder["decoders"].as_array().ok_or_else(|| lacks("list"))?;
                parts.iter().try_for_each(|part| self.add(part, fused))?;
            }
            "Fuse" => *fused = true,
            "ByteLevel" => {
                self.steps.push(Step::ByteLevel);
                *fused = true;
            }
            "ByteFallback" => self.steps.push(Step::ByteFallback),
            "Replace" => {
                let from = decoder["pattern"]["String"].as_str().filter(|from| !from.is_empty());
                let from = from.ok_or_else(|| lacks("pattern of plain text"))?.to_owned();
                self.steps.push(Step::Replace { from, to: text("content").ok_or_else(|| lacks("content"))? });
            }
            "Metaspace" => {
                let drop_first = decoder["prepend_scheme"].as_str() != Some("never");
                self.steps.push(Step::Metaspace { replacement: character("replacement")?, drop_first });
            }
            "Strip" => {
                let count = |key: &str| decoder[key].as_u64().filter(|count| *count <= STRIP_MAX);
                let (Some(start), Some(stop)) = (count("start"), count("stop")) else { return Err(lacks("count")) };
                let strip = Strip { content: character("content")?, start: start as usize, stop: stop as usize };
                if !*fused {
                    self.steps.push(Step::Strip(strip));
                } else if self.strip.replace(strip).is_some() {
                    return Err("two Strips of the whole text".into());
                }
            }
            _ => return Err(kind),
        }
        Ok(())
    }
}

impl Plan {
    fn piece(&self, token: String, first: bool) -> Piece {
        let mut token = token;
        for step in &self.steps {
            match step {
                Step::Replace { from, to } => token = token.replace(from, to),
                Step::Metaspace { replacement, drop_first } => {
                    let space = if first && *drop_first { "" } else { " " };
                    token = token.replace(*replacement, space);
                }
                Step::Strip(strip) => {
                    let mut rest = token.as_str();
                    (0..strip.start).for_each(|_| rest = rest.strip_prefix(strip.content).unwrap_or(rest));
                    (0..strip.stop).for_each(|_| rest = rest.strip_suffix(strip.content).unwrap_or(rest));
                    token = rest.to_owned();
                }
                Step::ByteFallback => {
                    if let Some(byte) = fallback_byte(&token) {
                        return Piece::Bytes(vec![byte]);
                    }
                }
                Step::ByteLevel => {
                    let bytes: Option<Vec<u8>> = token.chars().map(level_byte).collect();
                    // Added tokens are spelled as they are, and need not be made of the alphabet.
                    return Piece::Bytes(bytes.unwrap_or_else(|| token.into_bytes()));
                }
            }
        }
        Piece::Text(token)
    }

    /// The bytes that a token stands for within a text.
    pub(crate) fn bytes(&self, token: String) -> Vec<u8> {
        let bytes = match self.piece(token, false) {
            Piece::Text(text) => text.into_bytes(),
            Piece::Bytes(bytes) => bytes,
        };
        if self.separated { [b" ", &bytes[..]].concat() } else { bytes }
    }
}

/// What one token stands for.
enum Piece {
    Text(String),
    /// Bytes that may be part of a character.
    Bytes(Vec<u8>),
}

/// Decodes one answer. The concatenation of everything returned is the text.
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    plan: Arc<Plan>,
    options: DecoderOptions,
    /// True until the first token that is not left out.
    first: bool,
    /// Bytes of a character that is not complete: at most 3.
    partial: Vec<u8>,
    /// True if each byte of a broken character counts by itself.
    bytewise: bool,
    /// Leading characters that may still be stripped.
    strip_start: usize,
    /// Trailing characters that would be stripped if nothing followed.
    held: String,
}

impl fmt::Debug for StreamDecoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StreamDecoder").field("partial", &self.partial).finish_non_exhaustive()
    }
}

impl StreamDecoder {
    pub(crate) fn new(tokenizer: Tokenizer, plan: Arc<Plan>, options: DecoderOptions) -> Self {
        let strip_start = plan.strip.as_ref().map_or(0, |strip| if options.continues { 0 } else { strip.start });
        let bytewise = plan.steps.contains(&Step::ByteFallback);
        let first = !options.continues;
        Self { tokenizer, plan, options, first, partial: Vec::new(), bytewise, strip_start, held: String::new() }
    }

    /// Takes the next token and returns the text it completes, which may be empty. Unknown ids stand for nothing.
    pub fn push(&mut self, id: u32) -> String {
        let Some(token) = self.tokenizer.decoded_token(id) else { return String::new() };
        let kept = self.options.keep_all || self.options.keep.contains(&token) || !self.tokenizer.is_special(&token);
        if !kept {
            return String::new();
        }
        let mut text = String::new();
        let first = mem::replace(&mut self.first, false);
        if self.plan.separated && !first {
            text.push(' ');
        }
        match self.plan.piece(token, first) {
            Piece::Bytes(bytes) => {
                self.partial.extend(bytes);
                drain(&mut self.partial, self.bytewise, false, &mut text);
            }
            Piece::Text(piece) => {
                drain(&mut self.partial, self.bytewise, true, &mut text);
                text.push_str(&piece);
            }
        }
        self.strip(text)
    }

    /// Ends the text and returns what was held back. The decoder is as new afterwards.
    pub fn finish(&mut self) -> String {
        let mut text = String::new();
        drain(&mut self.partial, self.bytewise, true, &mut text);
        let text = self.strip(text);
        *self = Self::new(self.tokenizer.clone(), self.plan.clone(), mem::take(&mut self.options));
        text
    }

    fn strip(&mut self, text: String) -> String {
        let Some(strip) = &self.plan.strip else { return text };
        let mut text = text.as_str();
        while self.strip_start > 0 && !text.is_empty() {
            match text.strip_prefix(strip.content) {
                Some(rest) => {
                    text = rest;
                    self.strip_start -= 1;
                }
                None => self.strip_start = 0,
            }
        }
        self.held.push_str(text);
        let mut settled = self.held.as_str();
        (0..strip.stop).for_each(|_| settled = settled.strip_suffix(strip.content).unwrap_or(settled));
        let rest = self.held.split_off(settled.len());
        mem::replace(&mut self.held, rest)
    }
}

/// Moves whole characters from `partial` to `text`, and with `end` the rest as U+FFFD.
fn drain(partial: &mut Vec<u8>, bytewise: bool, end: bool, text: &mut String) {
    let replace = |count: usize, text: &mut String| {
        (0..if bytewise { count } else { 1 }).for_each(|_| text.push(char::REPLACEMENT_CHARACTER));
    };
    while !partial.is_empty() {
        let (valid, broken) = match std::str::from_utf8(partial) {
            Ok(whole) => (whole.len(), 0),
            Err(error) => {
                let valid = error.valid_up_to();
                let rest = if end { partial.len() - valid } else { 0 };
                (valid, error.error_len().unwrap_or(rest))
            }
        };
        text.push_str(&String::from_utf8_lossy(&partial[..valid]));
        if broken > 0 {
            replace(broken, text);
        }
        partial.drain(..valid + broken);
        if broken == 0 {
            break;
        }
    }
}

/// The byte of a token such as `<0xE2>`.
fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    let hexadecimal = digits.len() == 2 && digits.bytes().all(|digit| digit.is_ascii_hexdigit());
    if hexadecimal { u8::from_str_radix(digits, 16).ok() } else { None }
}

/// The byte that a character of the byte-level alphabet stands for: printable Latin-1 for itself, and the 68 other
/// bytes, in order, for the characters from U+0100 on.
fn level_byte(c: char) -> Option<u8> {
    let code = u32::from(c);
    match code {
        0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff => u8::try_from(code).ok(),
        0x100..=0x120 => u8::try_from(code - 0x100).ok(),
        0x121..=0x142 => u8::try_from(code - 0x121 + 0x7f).ok(),
        0x143 => Some(0xad),
        _ => None,
    }
}

#[cfg(test)]
#[path = "decoder_tests.rs"]
mod tests;
