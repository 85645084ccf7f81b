//! What goes back over the wire. `mesh-llm chat --url` reads the same types, hence `Deserialize`.

use mesh_core::{FinishReason, Usage};
use mesh_text::{Answer, Delta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::pipeline::{Finish, Finished};

/// Why an answer ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs)]
pub enum WireFinish {
    Stop,
    Length,
    ToolCalls,
}

impl From<Finish> for WireFinish {
    fn from(finish: Finish) -> Self {
        match finish {
            Finish::Engine(FinishReason::Length) => Self::Length,
            Finish::Engine(FinishReason::Stop) | Finish::StopString => Self::Stop,
            Finish::ToolCalls => Self::ToolCalls,
        }
    }
}

/// `usage`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct WireUsage {
    pub prompt_tokens: u32,
    pub completion_tokens: u32,
    pub total_tokens: u32,
    pub prompt_tokens_details: PromptTokensDetails,
}

/// `usage.prompt_tokens_details`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct PromptTokensDetails {
    pub cached_tokens: u32,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        Self {
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

/// What all chunks and the answer of one request have in common.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Envelope {
    /// `chatcmpl-…` or `cmpl-…`.
    pub id: String,
    /// Seconds since 1970.
    pub created: u64,
    /// The model's served name.
    pub model: String,
}

/// A tool call in an answer or a chunk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct AnswerCall {
    /// Present in chunks only.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub index: Option<u32>,
    pub id: String,
    #[serde(rename = "type")]
    pub kind: String,
    pub function: AnswerFunction,
}

/// The function of a tool call.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct AnswerFunction {
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
}

/// The id of an answer's tool call. Derived, so that streamed and blocking answers to one request agree.
fn call_id(envelope: &Envelope, index: usize) -> String {
    let id = envelope.id.rsplit('-').next().unwrap_or_default();
    format!("call_{id}_{index}")
}

/// `chat.completion`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: [ChatChoice; 1],
    pub usage: WireUsage,
}

/// The one choice of a chat completion.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChatChoice {
    pub index: u32,
    pub message: AnswerMessage,
    pub logprobs: Option<()>,
    pub finish_reason: WireFinish,
}

/// The assistant's message.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct AnswerMessage {
    pub role: &'static str,
    /// `null` where the answer is tool calls and nothing else.
    pub content: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnswerCall>,
}

impl ChatCompletion {
    /// A whole answer.
    pub fn new(envelope: Envelope, answer: Answer, finished: &Finished) -> Self {
        let tool_calls: Vec<_> = answer
            .tool_calls
            .into_iter()
            .enumerate()
            .map(|(index, call)| AnswerCall {
                index: None,
                id: call_id(&envelope, index),
                kind: "function".into(),
                function: AnswerFunction { name: call.name, arguments: call.arguments },
            })
            .collect();
        let content = (!answer.content.is_empty() || tool_calls.is_empty()).then_some(answer.content);
        let message = AnswerMessage {
            role: "assistant",
            content,
            reasoning_content: (!answer.reasoning.is_empty()).then_some(answer.reasoning),
            tool_calls,
        };
        let choice = ChatChoice { index: 0, message, logprobs: None, finish_reason: finished.finish.into() };
        Self {
            id: envelope.id,
            object: "chat.completion",
            created: envelope.created,
            model: envelope.model,
            choices: [choice],
            usage: finished.usage.into(),
        }
    }
}

/// `chat.completion.chunk`.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChatChunk {
    pub id: String,
    pub object: String,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChunkChoice>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub usage: Option<WireUsage>,
}

/// The one choice of a chunk.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChunkChoice {
    pub index: u32,
    pub delta: ChunkDelta,
    #[serde(default)]
    pub logprobs: Option<()>,
    pub finish_reason: Option<WireFinish>,
}

/// What a chunk adds to the message.
#[derive(Clone, Debug, Default, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChunkDelta {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub role: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnswerCall>,
}

impl ChatChunk {
    fn new(envelope: &Envelope, choices: Vec<ChunkChoice>, usage: Option<WireUsage>) -> Self {
        Self {
            id: envelope.id.clone(),
            object: "chat.completion.chunk".into(),
            created: envelope.created,
            model: envelope.model.clone(),
            choices,
            usage,
        }
    }

    fn with(envelope: &Envelope, delta: ChunkDelta, finish: Option<WireFinish>) -> Self {
        let choice = ChunkChoice { index: 0, delta, logprobs: None, finish_reason: finish };
        Self::new(envelope, vec![choice], None)
    }

    /// The first chunk, which names the role.
    pub fn role(envelope: &Envelope) -> Self {
        let delta =
            ChunkDelta { role: Some("assistant".into()), content: Some(String::new()), ..ChunkDelta::default() };
        Self::with(envelope, delta, None)
    }

    /// A piece of the answer.
    pub fn delta(envelope: &Envelope, delta: Delta) -> Self {
        let delta = match delta {
            Delta::Content(text) | Delta::Malformed { text } => {
                ChunkDelta { content: Some(text), ..ChunkDelta::default() }
            }
            Delta::Reasoning(text) => ChunkDelta { reasoning_content: Some(text), ..ChunkDelta::default() },
            Delta::ToolCall { index, name, arguments } => ChunkDelta {
                tool_calls: vec![AnswerCall {
                    index: Some(index),
                    id: call_id(envelope, index as usize),
                    kind: "function".into(),
                    function: AnswerFunction { name, arguments },
                }],
                ..ChunkDelta::default()
            },
        };
        Self::with(envelope, delta, None)
    }

    /// The last chunk of the answer.
    pub fn finish(envelope: &Envelope, finished: &Finished) -> Self {
        Self::with(envelope, ChunkDelta::default(), Some(finished.finish.into()))
    }

    /// The chunk after the last one, with the usage.
    pub fn usage(envelope: &Envelope, finished: &Finished) -> Self {
        Self::new(envelope, Vec::new(), Some(finished.usage.into()))
    }
}

/// `text_completion`, whole or a chunk.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct TextCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<TextChoice>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub usage: Option<WireUsage>,
}

/// The one choice of a text completion.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct TextChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<()>,
    pub finish_reason: Option<WireFinish>,
}

impl TextCompletion {
    fn new(envelope: &Envelope, choices: Vec<TextChoice>, usage: Option<WireUsage>) -> Self {
        Self {
            id: envelope.id.clone(),
            object: "text_completion",
            created: envelope.created,
            model: envelope.model.clone(),
            choices,
            usage,
        }
    }

    fn with(envelope: &Envelope, text: String, finish: Option<WireFinish>, usage: Option<WireUsage>) -> Self {
        Self::new(envelope, vec![TextChoice { index: 0, text, logprobs: None, finish_reason: finish }], usage)
    }

    /// A whole answer.
    pub fn whole(envelope: &Envelope, text: String, finished: &Finished) -> Self {
        Self::with(envelope, text, Some(finished.finish.into()), Some(finished.usage.into()))
    }

    /// A piece of the answer.
    pub fn delta(envelope: &Envelope, text: String) -> Self {
        Self::with(envelope, text, None, None)
    }

    /// The last chunk of the answer.
    pub fn finish(envelope: &Envelope, finished: &Finished) -> Self {
        Self::with(envelope, String::new(), Some(finished.finish.into()), None)
    }

    /// The chunk after the last one, with the usage.
    pub fn usage(envelope: &Envelope, finished: &Finished) -> Self {
        Self::new(envelope, Vec::new(), Some(finished.usage.into()))
    }
}

/// `{"error": …}`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorBody {
    /// The error.
    pub error: ErrorObject,
}

/// An OpenAI error object.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct ErrorObject {
    /// What was wrong, and what to do next.
    pub message: String,
    /// `invalid_request_error`, `server_error` …
    #[serde(rename = "type")]
    pub kind: String,
    /// A word for programs.
    #[serde(default)]
    pub code: Option<String>,
    /// The field it is about.
    #[serde(default)]
    pub param: Option<String>,
}
