//! The response, its items and its events.

use std::collections::BTreeMap;

use mesh_core::Usage;
use schemars::JsonSchema;
use serde::Serialize;
use serde_json::Value;

/// A response, at whatever stage.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "Response")]
#[allow(missing_docs)]
pub struct ResponseObject {
    pub id: String,
    /// `response`.
    pub object: &'static str,
    pub created_at: u64,
    pub status: Status,
    /// Always false: answers are given while the client waits.
    pub background: bool,
    pub error: Option<ResponseError>,
    pub incomplete_details: Option<Incomplete>,
    pub model: String,
    pub output: Vec<Item>,
    pub usage: Option<ResponseUsage>,
    #[serde(flatten)]
    pub echo: Echo,
}

/// What is repeated of the request.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Echo {
    pub instructions: Option<String>,
    pub max_output_tokens: Option<u32>,
    pub metadata: BTreeMap<String, String>,
    pub parallel_tool_calls: bool,
    pub previous_response_id: Option<String>,
    pub reasoning: Reasoning,
    pub store: bool,
    pub temperature: Option<f32>,
    pub text: Value,
    pub tool_choice: Value,
    pub tools: Vec<Value>,
    pub top_p: Option<f32>,
    /// `disabled`.
    pub truncation: &'static str,
}

/// How much reasoning was asked for.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "ResponseReasoning")]
#[allow(missing_docs)]
pub struct Reasoning {
    pub effort: Option<String>,
    pub summary: Option<String>,
}

/// Where a response or an item is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum Status {
    InProgress,
    Completed,
    Incomplete,
    Failed,
    Cancelled,
}

impl Status {
    /// In a word, for people.
    pub fn word(self) -> &'static str {
        match self {
            Self::InProgress => "in progress",
            Self::Completed => "completed",
            Self::Incomplete => "incomplete",
            Self::Failed => "failed",
            Self::Cancelled => "cancelled",
        }
    }
}

/// Why a response failed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponseError {
    pub code: String,
    pub message: String,
}

/// Why a response is not complete.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct Incomplete {
    /// `max_output_tokens`.
    pub reason: &'static str,
}

/// A piece of a response.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponseItem")]
#[allow(missing_docs)]
pub enum Item {
    Reasoning {
        id: String,
        status: Status,
        summary: Vec<Part>,
        content: Vec<Part>,
        #[serde(skip_serializing_if = "Option::is_none")]
        encrypted_content: Option<String>,
    },
    Message {
        id: String,
        status: Status,
        role: &'static str,
        content: Vec<Part>,
    },
    FunctionCall {
        id: String,
        status: Status,
        call_id: String,
        name: String,
        arguments: String,
    },
}

impl Item {
    /// Its id.
    pub fn id(&self) -> &str {
        match self {
            Self::Reasoning { id, .. } | Self::Message { id, .. } | Self::FunctionCall { id, .. } => id,
        }
    }

    pub(super) fn set_status(&mut self, now: Status) {
        let (Self::Reasoning { status, .. } | Self::Message { status, .. } | Self::FunctionCall { status, .. }) = self;
        *status = now;
    }
}

/// A piece of an item.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case")]
#[schemars(rename = "ResponsePart")]
#[allow(missing_docs)]
pub enum Part {
    OutputText { text: String, annotations: [Value; 0], logprobs: [Value; 0] },
    ReasoningText { text: String },
    SummaryText { text: String },
}

impl Part {
    /// Its text.
    pub fn text(&self) -> &str {
        let (Self::OutputText { text, .. } | Self::ReasoningText { text } | Self::SummaryText { text }) = self;
        text
    }

    pub(super) fn push(&mut self, more: &str) {
        let (Self::OutputText { text, .. } | Self::ReasoningText { text } | Self::SummaryText { text }) = self;
        text.push_str(more);
    }
}

/// Tokens read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ResponseUsage {
    pub input_tokens: u32,
    pub input_tokens_details: InputDetails,
    pub output_tokens: u32,
    pub output_tokens_details: OutputDetails,
    pub total_tokens: u32,
}

/// Of the tokens read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct InputDetails {
    /// Those that were not computed again.
    pub cached_tokens: u32,
}

/// Of the tokens written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
pub struct OutputDetails {
    /// Those of the reasoning.
    pub reasoning_tokens: u32,
}

impl ResponseUsage {
    /// Usage, of which so many tokens were reasoning.
    pub fn new(usage: Usage, reasoning_tokens: u32) -> Self {
        Self {
            input_tokens: usage.prompt_tokens,
            input_tokens_details: InputDetails { cached_tokens: usage.cached_tokens },
            output_tokens: usage.completion_tokens,
            output_tokens_details: OutputDetails { reasoning_tokens },
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
        }
    }
}

/// An event of a streamed response.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[schemars(rename = "ResponseEvent")]
pub struct Event {
    /// Also its name as a server-sent event.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// Counts the events from 0.
    pub sequence_number: u64,
    /// What it is about.
    #[serde(flatten)]
    pub about: About,
}

/// What an event is about.
#[derive(Clone, Debug, PartialEq, Serialize, JsonSchema)]
#[serde(untagged)]
#[schemars(rename = "ResponseEventAbout")]
#[allow(missing_docs)]
pub enum About {
    Response { response: Box<ResponseObject> },
    Item { output_index: usize, item: Item },
    Part { item_id: String, output_index: usize, content_index: usize, part: Part },
    SummaryPart { item_id: String, output_index: usize, summary_index: usize, part: Part },
    TextDelta { item_id: String, output_index: usize, content_index: usize, delta: String, logprobs: [Value; 0] },
    Text { item_id: String, output_index: usize, content_index: usize, text: String, logprobs: [Value; 0] },
    ReasoningDelta { item_id: String, output_index: usize, content_index: usize, delta: String },
    Reasoning { item_id: String, output_index: usize, content_index: usize, text: String },
    SummaryDelta { item_id: String, output_index: usize, summary_index: usize, delta: String },
    Summary { item_id: String, output_index: usize, summary_index: usize, text: String },
    ArgumentsDelta { item_id: String, output_index: usize, delta: String },
    Arguments { item_id: String, output_index: usize, name: String, arguments: String },
    Error { code: String, message: String, param: Option<String> },
}

/// A response that was forgotten.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Deleted {
    pub id: String,
    /// `response`.
    pub object: &'static str,
    pub deleted: bool,
}

/// The items of a request.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ItemList {
    /// `list`.
    pub object: &'static str,
    pub data: Vec<Value>,
    pub first_id: Option<String>,
    pub last_id: Option<String>,
    pub has_more: bool,
}
