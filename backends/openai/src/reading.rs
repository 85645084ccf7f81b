//! Events of the server become parts of an answer. Values in, values out: no connection, no clock.

use std::{collections::VecDeque, time::Duration};

use mesh_core::{
    FinishReason, Timings, Usage,
    answer::{Delta, Finish, Finished, Likely, Part, TokenText},
};
use serde_json::Value;

use crate::{
    error::Trouble,
    request::How,
    wire::{self, Choice, Chunk, ErrorAnswer, Fragment, TokenLogprobs},
};

/// Most tool calls of an answer.
const CALLS_MAX: usize = 128;
/// Most text of all its tool calls, in bytes.
const CALLS_BYTES_MAX: usize = 4 << 20;

/// Reads one answer.
#[derive(Default)]
pub(crate) struct Reading {
    how: How,
    calls: Vec<Call>,
    calls_bytes: usize,
    tools_called: u32,
    malformed_calls: u32,
    finish: Option<String>,
    /// More is not wanted.
    enough: bool,
    stopped_by: Option<String>,
    usage: Option<wire::Usage>,
    timings: Option<Timings>,
    /// Pieces of text: tokens, as good as can be known without usage.
    pieces: u32,
    reasoning_pieces: u32,
    logprob_sum: f64,
    logprobs: u32,
    /// Of the tokens reported so far.
    chars: usize,
    /// The beginning of a character, of which the rest is the next token's.
    partial: Vec<u8>,
}

/// A tool call that is being put together.
struct Call {
    index: u32,
    id: Option<String>,
    name: String,
    arguments: String,
}

/// Whether more is to come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Progress {
    /// The answer goes on.
    Goes,
    /// It said why it ended; its usage may follow.
    Ended,
    /// Nothing follows that is of use.
    Over,
}

impl Reading {
    pub fn new(how: How, parts: &mut VecDeque<Part>) -> Self {
        let echo = how.echo.as_ref().filter(|echo| !echo.is_empty());
        parts.extend(echo.map(|echo| Part::Delta(Delta::Content(echo.clone()))));
        let chars = echo.map_or(0, |echo| echo.chars().count());
        Self { how, chars, ..Self::default() }
    }

    /// Reads the data of one event.
    pub fn event(&mut self, data: &str, parts: &mut VecDeque<Part>) -> Result<Progress, Trouble> {
        let data = data.trim();
        if data == "[DONE]" {
            return if self.finish.is_some() { Ok(Progress::Over) } else { Err(Trouble::CutOff) };
        }
        if data.is_empty() {
            return Ok(self.progress());
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(|error| Trouble::Malformed(error.to_string()))?;
        if let Some(error) = chunk.error.filter(|error| !error.is_null()) {
            return Err(Trouble::Reported(ErrorAnswer::of(&error).message));
        }
        if let Some(timings) = chunk.timings {
            let span = |ms: Option<f64>| Duration::try_from_secs_f64(ms.unwrap_or(0.0) / 1000.0).unwrap_or_default();
            self.timings = Some(Timings { prefill: span(timings.prompt_ms), decode: span(timings.predicted_ms) });
        }
        self.usage = chunk.usage.or(self.usage);
        for choice in chunk.choices.into_iter().filter(|choice| choice.index == 0) {
            if self.finish.is_some() {
                break;
            }
            self.choice(choice, parts)?;
        }
        Ok(self.progress())
    }

    fn progress(&self) -> Progress {
        match &self.finish {
            None => Progress::Goes,
            Some(_) if self.enough || self.usage.is_some() => Progress::Over,
            Some(_) => Progress::Ended,
        }
    }

    fn choice(&mut self, choice: Choice, parts: &mut VecDeque<Part>) -> Result<(), Trouble> {
        if let Some(logprobs) = choice.logprobs {
            let tokens = self.tokens(logprobs);
            if !tokens.is_empty() && self.how.logprobs.is_some() {
                parts.push_back(Part::Tokens(tokens));
            }
        }
        let delta = choice.delta.unwrap_or_default();
        let reasoning = delta.reasoning_content.filter(|text| !text.is_empty()).or(delta.reasoning);
        if let Some(text) = reasoning.filter(|text| !text.is_empty()) {
            self.reasoning_pieces = self.reasoning_pieces.saturating_add(1);
            self.piece(Delta::Reasoning(text), parts);
        }
        for text in [delta.content, delta.refusal, choice.text].into_iter().flatten().filter(|text| !text.is_empty()) {
            self.piece(Delta::Content(text), parts);
        }
        for fragment in delta.tool_calls {
            if self.fragment(fragment)? {
                (self.finish, self.enough) = (Some("tool_calls".into()), true);
                break;
            }
        }
        if self.finish.is_none() {
            self.finish = choice.finish_reason.filter(|reason| !reason.is_empty());
            self.stopped_by = choice.stop_reason.and_then(|reason| reason.as_str().map(str::to_owned));
        }
        if let Some(reason) = &self.finish {
            // Words of vLLM and SGLang for requests that broke.
            if matches!(reason.as_str(), "abort" | "error") {
                return Err(Trouble::Reported(format!("it ended with `{reason}`")));
            }
            self.call(parts);
        }
        Ok(())
    }

    fn piece(&mut self, delta: Delta, parts: &mut VecDeque<Part>) {
        self.pieces = self.pieces.saturating_add(1);
        parts.push_back(Part::Delta(delta));
    }

    /// Adds to a call. True once the first call is whole and no other is wanted.
    fn fragment(&mut self, fragment: Fragment) -> Result<bool, Trouble> {
        let Fragment { index, id, function } = fragment;
        self.pieces = self.pieces.saturating_add(1);
        let id = id.filter(|id| !id.is_empty());
        let last = self.calls.last();
        // Servers that do not number their calls begin a new one with its id.
        let index = index.unwrap_or_else(|| match last {
            Some(last) if id.is_none() || last.id == id => last.index,
            Some(last) => last.index.saturating_add(1),
            None => 0,
        });
        let arguments = match function.arguments {
            None | Some(Value::Null) => String::new(),
            Some(Value::String(text)) => text,
            Some(object @ Value::Object(_)) => object.to_string(),
            Some(other) => return Err(Trouble::Malformed(format!("a call's arguments are {other}"))),
        };
        let name = function.name.unwrap_or_default();
        self.calls_bytes += arguments.len() + name.len();
        if self.calls_bytes > CALLS_BYTES_MAX {
            return Err(Trouble::TooLarge(CALLS_BYTES_MAX));
        }
        // Ollama had versions that number every call 0.
        let another =
            |call: &Call| id.is_some() && call.id != id && !name.is_empty() && object(&call.arguments).is_some();
        let place = self.calls.iter().rposition(|call| call.index == index);
        match place.filter(|place| !another(&self.calls[*place])) {
            Some(place) => {
                let call = &mut self.calls[place];
                // Some repeat the name with every piece.
                if call.name != name {
                    call.name.push_str(&name);
                }
                call.arguments.push_str(&arguments);
            }
            // The first may still be written, where pieces of several calls take turns.
            None if self.how.single_call && !self.calls.is_empty() => {
                return Ok(self.calls.first().is_some_and(|first| object(&first.arguments).is_some()));
            }
            None if self.calls.len() >= CALLS_MAX => {
                return Err(Trouble::Malformed(format!("more than {CALLS_MAX} tool calls")));
            }
            None => self.calls.push(Call { index, id, name, arguments }),
        }
        Ok(false)
    }

    /// Gives the calls, which are whole now.
    fn call(&mut self, parts: &mut VecDeque<Part>) {
        self.calls.sort_by_key(|call| call.index);
        for Call { name, arguments, .. } in self.calls.drain(..) {
            match object(&arguments) {
                Some(arguments) if !name.is_empty() => {
                    let (index, arguments) = (self.tools_called, arguments.to_owned());
                    self.tools_called += 1;
                    parts.push_back(Part::Delta(Delta::ToolCall { index, name, arguments }));
                }
                _ => {
                    self.malformed_calls += 1;
                    parts.push_back(Part::Delta(Delta::Malformed { text: format!("{name}{arguments}") }));
                }
            }
        }
    }

    /// The end, where the answer said why.
    pub fn finished(&mut self) -> Result<Finished, Trouble> {
        let reason = self.finish.as_deref().ok_or(Trouble::CutOff)?;
        let finish = match reason {
            "length" | "max_tokens" => Finish::Engine(FinishReason::Length),
            _ if self.tools_called > 0 => Finish::ToolCalls,
            _ if self.stopped_by.is_some() => Finish::StopString,
            _ => Finish::Engine(FinishReason::Stop),
        };
        let (usage, reasoning_tokens) = match self.usage {
            Some(usage) => {
                let cached_tokens = usage.prompt_tokens_details.cached_tokens.min(usage.prompt_tokens);
                let reasoning = usage.completion_tokens_details.reasoning_tokens.min(usage.completion_tokens);
                let wire::Usage { prompt_tokens, completion_tokens, .. } = usage;
                (Usage { prompt_tokens, cached_tokens, completion_tokens }, reasoning)
            }
            None => {
                tracing::debug!(pieces = self.pieces, "the shared server reported no usage: its pieces are counted");
                let usage = Usage { completion_tokens: self.pieces, ..Usage::default() };
                (usage, self.reasoning_pieces)
            }
        };
        Ok(Finished {
            finish,
            usage,
            timings: self.timings,
            stopped_by: self.stopped_by.take().filter(|_| finish == Finish::StopString),
            reasoning_tokens,
            malformed_calls: self.malformed_calls,
            tokens: Vec::new(),
            logprob_mean: (self.logprobs > 0).then(|| (self.logprob_sum / f64::from(self.logprobs)) as f32),
        })
    }

    fn tokens(&mut self, logprobs: TokenLogprobs) -> Vec<TokenText> {
        let tokens = match logprobs.content {
            Some(content) => content.into_iter().map(of_chat).collect(),
            None => of_text(logprobs),
        };
        let top = self.how.logprobs.unwrap_or(0) as usize;
        let with_offset = |(chosen, mut alternatives): (Likely, Vec<Likely>)| {
            alternatives.truncate(top);
            self.logprob_sum += f64::from(chosen.logprob);
            self.logprobs = self.logprobs.saturating_add(1);
            let offset_chars = self.chars;
            self.partial.extend_from_slice(&chosen.bytes);
            self.chars += whole_characters(&mut self.partial);
            TokenText { chosen, top: alternatives, offset_chars }
        };
        tokens.into_iter().map(with_offset).collect()
    }
}

/// Arguments that are whole. A call without any is one of an empty object.
fn object(arguments: &str) -> Option<&str> {
    let arguments = if arguments.trim().is_empty() { "{}" } else { arguments };
    serde_json::from_str::<Value>(arguments).is_ok_and(|value| value.is_object()).then_some(arguments)
}

/// Takes the characters out of `bytes` that are complete, and counts them.
fn whole_characters(bytes: &mut Vec<u8>) -> usize {
    let (mut count, mut read) = (0, 0);
    for chunk in bytes.utf8_chunks() {
        count += chunk.valid().chars().count();
        read += chunk.valid().len();
        let rest = chunk.invalid();
        if read + rest.len() == bytes.len() && std::str::from_utf8(rest).is_err_and(|error| error.error_len().is_none())
        {
            break; // may be completed
        }
        count += usize::from(!rest.is_empty());
        read += rest.len();
    }
    bytes.drain(..read);
    count
}

fn likely(token: String, bytes: Option<Vec<u8>>, logprob: Option<f32>) -> Likely {
    // JSON has no infinity: what is impossible is null, or a very small number.
    let logprob = logprob.filter(|logprob| logprob.is_finite()).unwrap_or(f32::MIN);
    Likely { bytes: bytes.unwrap_or_else(|| token.into_bytes()), logprob }
}

fn of_chat(token: wire::TokenLogprob) -> (Likely, Vec<Likely>) {
    let one = |one: wire::Likely| likely(one.token, one.bytes, one.logprob);
    (one(token.chosen), token.top_logprobs.into_iter().map(one).collect())
}

fn of_text(logprobs: TokenLogprobs) -> Vec<(Likely, Vec<Likely>)> {
    let mut values = logprobs.token_logprobs.unwrap_or_default().into_iter();
    let mut tops = logprobs.top_logprobs.unwrap_or_default().into_iter();
    let tokens = logprobs.tokens.unwrap_or_default().into_iter();
    tokens
        .map(|token| {
            let top = tops.next().flatten().unwrap_or_default();
            let mut top: Vec<_> = top
                .into_iter()
                .map(|(token, value)| likely(token, None, value.as_f64().map(|value| value as f32)))
                .collect();
            top.sort_by(|one, other| other.logprob.total_cmp(&one.logprob));
            (likely(token, None, values.next().flatten()), top)
        })
        .collect()
}
