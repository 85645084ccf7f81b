//! What goes back over the wire. `mesh-llm chat --url` reads the same types, hence `Deserialize`.

use mesh_core::{FinishReason, Usage};
use mesh_text::{Answer, Delta};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::logprobs::{ChatLogprobs, TextLogprobs};
use crate::{
    defaults::ReasoningField,
    pipeline::{CallIds, Finish, Finished, TokenText},
};

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
    #[serde(default)]
    pub completion_tokens_details: CompletionTokensDetails,
}

/// `usage.prompt_tokens_details`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct PromptTokensDetails {
    pub cached_tokens: u32,
}

/// `usage.completion_tokens_details`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct CompletionTokensDetails {
    pub reasoning_tokens: u32,
}

impl From<Usage> for WireUsage {
    fn from(usage: Usage) -> Self {
        Self {
            completion_tokens_details: CompletionTokensDetails::default(),
            prompt_tokens: usage.prompt_tokens,
            completion_tokens: usage.completion_tokens,
            total_tokens: usage.prompt_tokens.saturating_add(usage.completion_tokens),
            prompt_tokens_details: PromptTokensDetails { cached_tokens: usage.cached_tokens },
        }
    }
}

impl WireUsage {
    /// Of several answers. A prompt that has several, `choices` of them, counts once.
    pub fn of<'a>(finished: impl IntoIterator<Item = &'a Finished>, choices: usize) -> Self {
        let (mut sum, mut reasoning_tokens) = (Usage::default(), 0u32);
        for (index, finished) in finished.into_iter().enumerate() {
            if index % choices.max(1) == 0 {
                sum.prompt_tokens = sum.prompt_tokens.saturating_add(finished.usage.prompt_tokens);
                sum.cached_tokens = sum.cached_tokens.saturating_add(finished.usage.cached_tokens);
            }
            sum.completion_tokens = sum.completion_tokens.saturating_add(finished.usage.completion_tokens);
            reasoning_tokens = reasoning_tokens.saturating_add(finished.reasoning_tokens);
        }
        Self { completion_tokens_details: CompletionTokensDetails { reasoning_tokens }, ..sum.into() }
    }
}

/// Something about an answer that its reader should know.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct Warning {
    /// A word for programs.
    pub code: String,
    /// For people.
    pub message: String,
}

impl Warning {
    fn malformed_call() -> Self {
        Self {
            code: "malformed_tool_call".into(),
            message: "the model wrote a tool call that does not parse; it is part of the content".into(),
        }
    }

    /// Tools were offered to a model that is not told of them.
    pub fn tools_not_shown() -> Self {
        Self {
            code: "tools_not_shown".into(),
            message:
                "the model's chat template does not show it tools: it calls one only where `tool_choice` forces it"
                    .into(),
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
    /// Where reasoning is.
    pub reasoning_field: ReasoningField,
    /// Answers to each prompt.
    pub choices: usize,
    /// How calls are named.
    pub call_ids: CallIds,
    /// What is to be known of every answer.
    pub warnings: Vec<Warning>,
}

impl Envelope {
    /// The two fields for reasoning, of which one or both hold it.
    fn reasoning(&self, text: String) -> (Option<String>, Option<String>) {
        match self.reasoning_field {
            ReasoningField::ReasoningContent => (Some(text), None),
            ReasoningField::Reasoning => (None, Some(text)),
            ReasoningField::Both => (Some(text.clone()), Some(text)),
        }
    }
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
fn call_id(envelope: &Envelope, choice: u32, index: usize, name: &str) -> String {
    let id = envelope.id.rsplit('-').next().unwrap_or_default();
    let own = if choice == 0 { format!("call_{id}_{index}") } else { format!("call_{id}_{choice}_{index}") };
    envelope.call_ids.id(own, index, name)
}

/// `chat.completion`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChatCompletion {
    pub id: String,
    pub object: &'static str,
    pub created: u64,
    pub model: String,
    pub choices: Vec<ChatChoice>,
    pub usage: WireUsage,
}

/// One choice of a chat completion.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChatChoice {
    pub index: u32,
    pub message: AnswerMessage,
    pub logprobs: Option<ChatLogprobs>,
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
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnswerCall>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Warning>,
}

impl ChatCompletion {
    /// Whole answers. `logprobs`: with what their tokens were.
    pub fn new(envelope: Envelope, answers: Vec<(Answer, Finished)>, logprobs: bool) -> Self {
        let usage = WireUsage::of(answers.iter().map(|(_, finished)| finished), envelope.choices);
        let choices = (0..).zip(answers).map(|(index, (answer, finished))| ChatChoice {
            index,
            logprobs: logprobs.then(|| ChatLogprobs::of(&finished.tokens)),
            finish_reason: finished.finish.into(),
            message: message(&envelope, index, answer, finished.malformed_calls),
        });
        let choices = choices.collect();
        Self {
            id: envelope.id,
            object: "chat.completion",
            created: envelope.created,
            model: envelope.model,
            choices,
            usage,
        }
    }
}

fn message(envelope: &Envelope, choice: u32, answer: Answer, malformed_calls: u32) -> AnswerMessage {
    let calls = answer.tool_calls.into_iter().enumerate().map(|(index, call)| AnswerCall {
        index: None,
        id: call_id(envelope, choice, index, &call.name),
        kind: "function".into(),
        function: AnswerFunction { name: call.name, arguments: call.arguments },
    });
    let tool_calls: Vec<_> = calls.collect();
    let (reasoning_content, reasoning) =
        if answer.reasoning.is_empty() { (None, None) } else { envelope.reasoning(answer.reasoning) };
    AnswerMessage {
        role: "assistant",
        content: (!answer.content.is_empty() || tool_calls.is_empty()).then_some(answer.content),
        reasoning_content,
        reasoning,
        tool_calls,
        warnings: {
            let malformed = (0..malformed_calls).map(|_| Warning::malformed_call());
            envelope.warnings.iter().cloned().chain(malformed).collect()
        },
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

/// One choice of a chunk.
#[derive(Clone, Debug, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ChunkChoice {
    pub index: u32,
    pub delta: ChunkDelta,
    #[serde(default)]
    pub logprobs: Option<ChatLogprobs>,
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
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<AnswerCall>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<Warning>,
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

    fn with(envelope: &Envelope, choice: ChunkChoice) -> Self {
        Self::new(envelope, vec![choice], None)
    }

    /// The first chunk of a choice, which names the role.
    pub fn role(envelope: &Envelope, index: u32) -> Self {
        let delta = ChunkDelta {
            role: Some("assistant".into()),
            content: Some(String::new()),
            warnings: envelope.warnings.clone(),
            ..ChunkDelta::default()
        };
        Self::with(envelope, ChunkChoice { index, delta, logprobs: None, finish_reason: None })
    }

    /// A piece of an answer, and what its tokens were where that was asked for.
    pub fn delta(envelope: &Envelope, index: u32, delta: Delta, tokens: &[TokenText]) -> Self {
        let none = ChunkDelta::default();
        let delta = match delta {
            Delta::Content(text) => ChunkDelta { content: Some(text), ..none },
            Delta::Malformed { text } => {
                ChunkDelta { content: Some(text), warnings: vec![Warning::malformed_call()], ..none }
            }
            Delta::Reasoning(text) => {
                let (reasoning_content, reasoning) = envelope.reasoning(text);
                ChunkDelta { reasoning_content, reasoning, ..none }
            }
            Delta::ToolCall { index: call, name, arguments } => ChunkDelta {
                tool_calls: vec![AnswerCall {
                    index: Some(call),
                    id: call_id(envelope, index, call as usize, &name),
                    kind: "function".into(),
                    function: AnswerFunction { name, arguments },
                }],
                ..none
            },
        };
        let logprobs = (!tokens.is_empty()).then(|| ChatLogprobs::of(tokens));
        Self::with(envelope, ChunkChoice { index, delta, logprobs, finish_reason: None })
    }

    /// The last chunk of an answer.
    pub fn finish(envelope: &Envelope, index: u32, finished: &Finished) -> Self {
        let logprobs = (!finished.tokens.is_empty()).then(|| ChatLogprobs::of(&finished.tokens));
        let finish_reason = Some(finished.finish.into());
        Self::with(envelope, ChunkChoice { index, delta: ChunkDelta::default(), logprobs, finish_reason })
    }

    /// The chunk after the last one, with the usage of all answers.
    pub fn usage(envelope: &Envelope, usage: WireUsage) -> Self {
        Self::new(envelope, Vec::new(), Some(usage))
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

/// One choice of a text completion.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct TextChoice {
    pub index: u32,
    pub text: String,
    pub logprobs: Option<TextLogprobs>,
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

    /// Whole answers, of which `usage` counts those as well that were left out. `logprobs`: with what their tokens were.
    pub fn whole(envelope: &Envelope, answers: Vec<(Answer, Finished)>, usage: WireUsage, logprobs: bool) -> Self {
        let choices = (0..).zip(answers).map(|(index, (answer, finished))| TextChoice {
            index,
            text: answer.content,
            logprobs: logprobs.then(|| TextLogprobs::of(&finished.tokens)),
            finish_reason: Some(finished.finish.into()),
        });
        Self::new(envelope, choices.collect(), Some(usage))
    }

    /// A piece of an answer, and what its tokens were where that was asked for.
    pub fn delta(envelope: &Envelope, index: u32, text: String, tokens: &[TokenText]) -> Self {
        let logprobs = (!tokens.is_empty()).then(|| TextLogprobs::of(tokens));
        Self::new(envelope, vec![TextChoice { index, text, logprobs, finish_reason: None }], None)
    }

    /// The last chunk of an answer.
    pub fn finish(envelope: &Envelope, index: u32, finished: &Finished) -> Self {
        let logprobs = (!finished.tokens.is_empty()).then(|| TextLogprobs::of(&finished.tokens));
        let finish_reason = Some(finished.finish.into());
        Self::new(envelope, vec![TextChoice { index, text: String::new(), logprobs, finish_reason }], None)
    }

    /// The chunk after the last one, with the usage of all answers.
    pub fn usage(envelope: &Envelope, usage: WireUsage) -> Self {
        Self::new(envelope, Vec::new(), Some(usage))
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
