//! Which tokens an answer's text is made of: what was sent, what is held back, and how likely it was.
//!
//! A token is reported with the text that settles it: not before the stop filter has let its text through, and at the latest
//! with the end. Streamed and blocking answers thus report the same tokens in the same order.

use std::{collections::VecDeque, mem};

use mesh_core::{
    Candidate, Delta, TokenLogprob,
    answer::{Likely, TokenText},
};
use mesh_text::Tokenizer;

/// A candidate with its bytes, which engines that give tokens leave to the tokenizer.
fn likely(candidate: Candidate, tokenizer: Option<&Tokenizer>) -> Likely {
    let bytes = candidate.bytes.or_else(|| tokenizer?.token_bytes(candidate.id)).unwrap_or_default();
    Likely { bytes, logprob: candidate.logprob }
}

/// Tokens that came together, and where in the decoded text theirs is.
struct Span {
    tokens: u32,
    start: usize,
    end: usize,
    texts: Vec<TokenText>,
}

/// The tokens of one answer.
#[derive(Default)]
pub(super) struct Ledger {
    /// Whether probabilities are reported.
    report: bool,
    /// Bytes and characters that were decoded.
    decoded: usize,
    decoded_chars: usize,
    /// Bytes that the stop filter let through.
    passed: usize,
    /// Tokens whose text it holds back.
    held: VecDeque<Span>,
    /// Tokens whose text went to the dialect, which has made nothing of it yet.
    settling: u32,
    texts: Vec<TokenText>,
    /// Whether the last text that came out was reasoning.
    in_reasoning: bool,
    /// Tokens whose text went to the reasoning.
    pub(super) reasoning_tokens: u32,
    logprob_sum: f64,
    logprobs: u32,
}

impl Ledger {
    /// For an answer that begins after `chars` characters.
    pub(super) fn new(report: bool, chars: usize) -> Self {
        Self { report, decoded_chars: chars, ..Self::default() }
    }

    /// Tokens that came, and the text that they complete.
    pub(super) fn came(&mut self, tokens: u32, text: &str, logprobs: Vec<TokenLogprob>, tokenizer: Option<&Tokenizer>) {
        let mut offset_chars = self.decoded_chars;
        let mut texts = Vec::new();
        for TokenLogprob { chosen, top } in logprobs {
            self.logprob_sum += f64::from(chosen.logprob);
            self.logprobs += 1;
            if self.report {
                let chosen = likely(chosen, tokenizer);
                let top = top.into_iter().map(|candidate| likely(candidate, tokenizer)).collect();
                let chars = chosen.text().chars().count();
                texts.push(TokenText { chosen, top, offset_chars });
                offset_chars += chars;
            }
        }
        let start = self.decoded;
        self.decoded += text.len();
        self.decoded_chars += text.chars().count();
        self.held.push_back(Span { tokens, start, end: self.decoded, texts });
    }

    /// The stop filter let text through.
    pub(super) fn passed(&mut self, bytes: usize) {
        self.passed += bytes;
        while self.held.front().is_some_and(|span| span.end <= self.passed) {
            self.settle_next();
        }
    }

    /// A stop string ends the answer: what is held back is no part of it, but for a token of which some was let through.
    pub(super) fn stopped(&mut self) {
        let passed = self.passed;
        self.held.retain(|span| span.start < passed);
        self.end();
    }

    /// Nothing more will come.
    pub(super) fn end(&mut self) {
        while !self.held.is_empty() {
            self.settle_next();
        }
    }

    fn settle_next(&mut self) {
        if let Some(span) = self.held.pop_front() {
            self.settling += span.tokens;
            self.texts.extend(span.texts);
        }
    }

    /// The dialect made `delta` of the text so far. Returns what is reported with it.
    pub(super) fn made(&mut self, delta: &Delta) -> Vec<TokenText> {
        self.in_reasoning = matches!(delta, Delta::Reasoning(_));
        self.rest()
    }

    /// What belongs to no delta.
    pub(super) fn rest(&mut self) -> Vec<TokenText> {
        let tokens = mem::take(&mut self.settling);
        if self.in_reasoning {
            self.reasoning_tokens += tokens;
        }
        mem::take(&mut self.texts)
    }

    /// The mean of the tokens' log-probabilities, where they are known.
    pub(super) fn logprob_mean(&self) -> Option<f32> {
        (self.logprobs > 0).then(|| (self.logprob_sum / f64::from(self.logprobs)) as f32)
    }
}
