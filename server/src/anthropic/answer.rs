//! The message that comes back. One writer makes the events, and the whole message is what they add up to.

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_core::{FinishReason, Usage};
use mesh_text::Delta;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::pipeline::{CallIds, Finish, Finished};

/// A message of the assistant.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "AnthropicAnswer")]
#[allow(missing_docs)]
pub struct Message {
    pub id: String,
    /// `message`.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// `assistant`.
    pub role: &'static str,
    pub model: String,
    pub content: Vec<Block>,
    /// Absent until the answer is over.
    pub stop_reason: Option<StopReason>,
    /// The one of `stop_sequences` that ended it.
    pub stop_sequence: Option<String>,
    pub usage: MessageUsage,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicBlock")]
#[allow(missing_docs)]
pub enum Block {
    Text { text: String },
    Thinking { thinking: String, signature: String },
    ToolUse { id: String, name: String, input: Map<String, Value> },
}

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum StopReason {
    EndTurn,
    MaxTokens,
    StopSequence,
    ToolUse,
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct MessageUsage {
    /// Tokens of the prompt that were computed.
    pub input_tokens: u32,
    /// Always 0: what is remembered is not counted apart.
    pub cache_creation_input_tokens: u32,
    /// Tokens of the prompt that were not computed again.
    pub cache_read_input_tokens: u32,
    /// Tokens written.
    pub output_tokens: u32,
}

impl From<Usage> for MessageUsage {
    fn from(usage: Usage) -> Self {
        Self {
            input_tokens: usage.prompt_tokens.saturating_sub(usage.cached_tokens),
            cache_creation_input_tokens: 0,
            cache_read_input_tokens: usage.cached_tokens,
            output_tokens: usage.completion_tokens,
        }
    }
}

/// An event of a streamed message.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "AnthropicEvent")]
#[allow(missing_docs)]
pub enum Event {
    MessageStart { message: Message },
    Ping,
    ContentBlockStart { index: usize, content_block: Block },
    ContentBlockDelta { index: usize, delta: BlockDelta },
    ContentBlockStop { index: usize },
    MessageDelta { delta: MessageEnd, usage: MessageUsage },
    MessageStop,
}

impl Event {
    /// Its type, which is also its name as a server-sent event.
    pub fn name(&self) -> &'static str {
        match self {
            Self::MessageStart { .. } => "message_start",
            Self::Ping => "ping",
            Self::ContentBlockStart { .. } => "content_block_start",
            Self::ContentBlockDelta { .. } => "content_block_delta",
            Self::ContentBlockStop { .. } => "content_block_stop",
            Self::MessageDelta { .. } => "message_delta",
            Self::MessageStop => "message_stop",
        }
    }
}

/// What a block is longer by.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum BlockDelta {
    TextDelta { text: String },
    ThinkingDelta { thinking: String },
    SignatureDelta { signature: String },
    InputJsonDelta { partial_json: String },
}

/// How a message ended.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct MessageEnd {
    pub stop_reason: Option<StopReason>,
    pub stop_sequence: Option<String>,
}

/// Turns the deltas of an answer into events, and keeps the message they add up to.
#[derive(Debug)]
pub struct Writer {
    message: Message,
    /// Whether the last block may still grow.
    open: bool,
    calls: usize,
    call_ids: CallIds,
}

impl Writer {
    /// An answer that is yet to be written.
    pub fn new(id: String, model: String, call_ids: CallIds) -> Self {
        let message = Message {
            id,
            kind: "message",
            role: "assistant",
            model,
            content: Vec::new(),
            stop_reason: None,
            stop_sequence: None,
            usage: MessageUsage::default(),
        };
        Self { message, open: false, calls: 0, call_ids }
    }

    /// What comes first.
    pub fn start(&self) -> Vec<Event> {
        vec![Event::MessageStart { message: self.message.clone() }, Event::Ping]
    }

    /// A piece of the answer.
    pub fn delta(&mut self, delta: Delta) -> Vec<Event> {
        let mut events = Vec::new();
        match delta {
            Delta::Content(text) | Delta::Malformed { text } => {
                if !matches!((self.open, self.message.content.last()), (true, Some(Block::Text { .. }))) {
                    self.close(&mut events);
                    self.begin(Block::Text { text: String::new() }, &mut events);
                }
                if let Some(Block::Text { text: whole }) = self.message.content.last_mut() {
                    whole.push_str(&text);
                }
                events.push(self.grown(BlockDelta::TextDelta { text }));
            }
            Delta::Reasoning(thinking) => {
                if !matches!((self.open, self.message.content.last()), (true, Some(Block::Thinking { .. }))) {
                    self.close(&mut events);
                    let block = Block::Thinking { thinking: String::new(), signature: String::new() };
                    self.begin(block, &mut events);
                }
                if let Some(Block::Thinking { thinking: whole, .. }) = self.message.content.last_mut() {
                    whole.push_str(&thinking);
                }
                events.push(self.grown(BlockDelta::ThinkingDelta { thinking }));
            }
            Delta::ToolCall { name, arguments, .. } => {
                self.close(&mut events);
                let id = self.message.id.rsplit('_').next().unwrap_or_default();
                let id = self.call_ids.id(format!("toolu_{id}_{}", self.calls), self.calls, &name);
                self.calls += 1;
                self.begin(Block::ToolUse { id, name, input: Map::new() }, &mut events);
                // Dialects give the text of an object and nothing else.
                if let (Some(Block::ToolUse { input, .. }), Ok(whole)) =
                    (self.message.content.last_mut(), serde_json::from_str(&arguments))
                {
                    *input = whole;
                }
                events.push(self.grown(BlockDelta::InputJsonDelta { partial_json: arguments }));
                self.close(&mut events);
            }
        }
        events
    }

    /// The end of the answer.
    pub fn finish(&mut self, finished: Finished) -> Vec<Event> {
        let mut events = Vec::new();
        self.close(&mut events);
        let reason = match finished.finish {
            Finish::Engine(FinishReason::Stop) => StopReason::EndTurn,
            Finish::Engine(FinishReason::Length) => StopReason::MaxTokens,
            Finish::StopString => StopReason::StopSequence,
            Finish::ToolCalls => StopReason::ToolUse,
        };
        self.message.stop_reason = Some(reason);
        self.message.stop_sequence = finished.stopped_by.filter(|_| reason == StopReason::StopSequence);
        self.message.usage = finished.usage.into();
        let delta =
            MessageEnd { stop_reason: self.message.stop_reason, stop_sequence: self.message.stop_sequence.clone() };
        events.push(Event::MessageDelta { delta, usage: self.message.usage });
        events.push(Event::MessageStop);
        events
    }

    /// The message as far as it is written.
    pub fn into_message(self) -> Message {
        self.message
    }

    /// Names the message in logs.
    pub fn id(&self) -> &str {
        &self.message.id
    }

    fn index(&self) -> usize {
        self.message.content.len().saturating_sub(1)
    }

    fn begin(&mut self, block: Block, events: &mut Vec<Event>) {
        self.message.content.push(block.clone());
        self.open = true;
        events.push(Event::ContentBlockStart { index: self.index(), content_block: block });
    }

    fn grown(&self, delta: BlockDelta) -> Event {
        Event::ContentBlockDelta { index: self.index(), delta }
    }

    fn close(&mut self, events: &mut Vec<Event>) {
        if !std::mem::take(&mut self.open) {
            return;
        }
        let index = self.index();
        if let Some(Block::Thinking { signature, .. }) = self.message.content.last_mut() {
            // Clients hand it back as it is, and some refuse a block without one. Nothing is proven by it.
            *signature = BASE64_STANDARD.encode(format!("{}/{index}", self.message.id));
            let signature = signature.clone();
            events.push(self.grown(BlockDelta::SignatureDelta { signature }));
        }
        events.push(Event::ContentBlockStop { index });
    }
}

/// What `/v1/messages/count_tokens` answers.
#[derive(Clone, Copy, Debug, Serialize, JsonSchema)]
pub struct Counted {
    /// Tokens of the prompt.
    pub input_tokens: usize,
}
