//! What OpenAI-compatible servers are sent and send, typed. Fields that are not used here are not listed.

use std::collections::BTreeMap;

use mesh_core::chat;
use serde::{Deserialize, Deserializer, Serialize};
use serde_json::{Map, Value};

/// Declares a body whose absent fields are not sent.
macro_rules! body {
    ($(#[$meta:meta])* $name:ident<$life:lifetime> { $($field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Debug, Default, Serialize)]
        pub(crate) struct $name<$life> {
            pub model: &$life str,
            $(#[serde(skip_serializing_if = "Option::is_none")] pub $field: Option<$type>,)*
        }
    };
}

body! {
    /// Body of `POST /v1/chat/completions` and `POST /v1/completions`.
    Completion<'a> {
        messages: Vec<Message<'a>>,
        prompt: Prompt<'a>,
        stream: bool,
        stream_options: StreamOptions,
        max_tokens: u32,
        min_tokens: u32,
        temperature: f32,
        top_p: f32,
        top_k: u32,
        min_p: f32,
        typical_p: f32,
        xtc_probability: f32,
        xtc_threshold: f32,
        dry_multiplier: f32,
        dry_base: f32,
        dry_allowed_length: u32,
        dry_penalty_last_n: i64,
        dry_sequence_breakers: Vec<&'a str>,
        seed: u64,
        repetition_penalty: f32,
        repeat_penalty: f32,
        repeat_last_n: i64,
        presence_penalty: f32,
        frequency_penalty: f32,
        logit_bias: BTreeMap<String, f32>,
        ignore_eos: bool,
        stop: &'a [String],
        logprobs: Logprobs,
        top_logprobs: u32,
        response_format: Value,
        structured_outputs: Value,
        tools: &'a [Value],
        tool_choice: Value,
        parallel_tool_calls: bool,
        chat_template_kwargs: Map<String, Value>,
        enable_thinking: bool,
        reasoning_effort: &'a str,
        thinking_budget: u32,
    }
}

/// `logprobs`: yes or no for conversations, a number for texts.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Logprobs {
    Chat(bool),
    Text(u32),
}

#[derive(Debug, Serialize)]
pub(crate) struct StreamOptions {
    pub include_usage: bool,
}

/// What is continued.
#[derive(Debug, Serialize)]
#[serde(untagged)]
pub(crate) enum Prompt<'a> {
    Text(&'a str),
    Tokens(&'a [u32]),
}

/// A message of a conversation.
#[derive(Debug, Serialize)]
pub(crate) struct Message<'a> {
    pub role: &'a str,
    pub content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub name: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning_content: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub tool_calls: Vec<Call<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tool_call_id: Option<&'a str>,
}

/// A call that the assistant made earlier.
#[derive(Debug, Serialize)]
pub(crate) struct Call<'a> {
    pub id: &'a str,
    #[serde(rename = "type")]
    pub kind: &'a str,
    pub function: Function<'a>,
}

#[derive(Debug, Serialize)]
pub(crate) struct Function<'a> {
    pub name: &'a str,
    /// A JSON object, as text.
    pub arguments: String,
}

impl<'a> Message<'a> {
    /// `plain_reasoning`: earlier reasoning goes by the name `reasoning`, not `reasoning_content`.
    pub fn new(message: &'a chat::Message, plain_reasoning: bool) -> Self {
        let calls = message.tool_calls.iter().map(|call| Call {
            id: &call.id,
            kind: &call.kind,
            function: Function {
                name: &call.function.name,
                arguments: match &call.function.arguments {
                    Value::String(text) => text.clone(),
                    other => other.to_string(),
                },
            },
        });
        let reasoning = message.reasoning_content.as_deref();
        Self {
            role: &message.role,
            content: message.content.as_deref(),
            name: message.name.as_deref(),
            reasoning_content: reasoning.filter(|_| !plain_reasoning),
            reasoning: reasoning.filter(|_| plain_reasoning),
            tool_calls: calls.collect(),
            tool_call_id: message.tool_call_id.as_deref(),
        }
    }
}

/// One event of an answer.
#[derive(Debug, Deserialize)]
pub(crate) struct Chunk {
    #[serde(default, deserialize_with = "or_default")]
    pub choices: Vec<Choice>,
    pub usage: Option<Usage>,
    pub timings: Option<Timings>,
    /// Present where the answer breaks off.
    pub error: Option<Value>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Choice {
    #[serde(default)]
    pub index: u32,
    pub delta: Option<ChunkDelta>,
    /// Of a text completion.
    pub text: Option<String>,
    pub logprobs: Option<TokenLogprobs>,
    pub finish_reason: Option<String>,
    /// vLLM's: the stop string, or the id of the token, that ended the answer.
    pub stop_reason: Option<Value>,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct ChunkDelta {
    pub content: Option<String>,
    pub reasoning_content: Option<String>,
    pub reasoning: Option<String>,
    pub refusal: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub tool_calls: Vec<Fragment>,
}

/// A piece of a tool call.
#[derive(Debug, Deserialize)]
pub(crate) struct Fragment {
    pub index: Option<u32>,
    pub id: Option<String>,
    #[serde(default, deserialize_with = "or_default")]
    pub function: FunctionFragment,
}

#[derive(Debug, Default, Deserialize)]
pub(crate) struct FunctionFragment {
    pub name: Option<String>,
    /// Text, of which a JSON object is put together. Some servers send the object.
    pub arguments: Option<Value>,
}

/// Probabilities, as conversations report them, or as texts do.
#[derive(Debug, Deserialize)]
pub(crate) struct TokenLogprobs {
    pub content: Option<Vec<TokenLogprob>>,
    pub tokens: Option<Vec<String>>,
    pub token_logprobs: Option<Vec<Option<f32>>>,
    pub top_logprobs: Option<Vec<Option<Map<String, Value>>>>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct TokenLogprob {
    #[serde(flatten)]
    pub chosen: Likely,
    #[serde(default, deserialize_with = "or_default")]
    pub top_logprobs: Vec<Likely>,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Likely {
    pub token: String,
    pub bytes: Option<Vec<u8>>,
    pub logprob: Option<f32>,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct Usage {
    #[serde(default, deserialize_with = "count")]
    pub prompt_tokens: u32,
    #[serde(default, deserialize_with = "count")]
    pub completion_tokens: u32,
    #[serde(default, deserialize_with = "or_default")]
    pub prompt_tokens_details: PromptDetails,
    #[serde(default, deserialize_with = "or_default")]
    pub completion_tokens_details: CompletionDetails,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct PromptDetails {
    #[serde(default, deserialize_with = "count")]
    pub cached_tokens: u32,
}

#[derive(Clone, Copy, Debug, Default, Deserialize)]
pub(crate) struct CompletionDetails {
    #[serde(default, deserialize_with = "count")]
    pub reasoning_tokens: u32,
}

/// llama-server's, in milliseconds.
#[derive(Clone, Copy, Debug, Deserialize)]
pub(crate) struct Timings {
    pub prompt_ms: Option<f64>,
    pub predicted_ms: Option<f64>,
}

/// Why a request was refused, in whichever of the usual forms.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct ErrorAnswer {
    pub message: String,
    pub code: Option<String>,
    pub param: Option<String>,
}

/// llama-server's word for a prompt that is too long.
const TOO_LONG: &str = "exceed_context_size_error";

impl ErrorAnswer {
    /// Reads a body, whatever it is.
    pub fn read(body: &[u8]) -> Self {
        match serde_json::from_slice(body) {
            Ok(value) => Self::of(&value),
            Err(_) => Self { message: String::from_utf8_lossy(body).into_owned(), ..Self::default() },
        }
    }

    /// OpenAI's form is `{"error": {…}}`, Ollama's native one `{"error": "…"}`, older vLLM's is flat, FastAPI's own `{"detail": …}`.
    pub fn of(value: &Value) -> Self {
        let error = value.get("error").filter(|error| !error.is_null()).unwrap_or(value);
        let text = |key: &str| error.get(key).and_then(Value::as_str).map(str::to_owned);
        let message = match (error, text("message"), error.get("detail")) {
            (Value::String(text), ..) => text.clone(),
            (_, Some(message), _) => message,
            (_, None, Some(Value::String(detail))) => detail.clone(),
            (_, None, Some(detail)) => detail.to_string(),
            (_, None, None) => error.to_string(),
        };
        let kind = text("type");
        let code = text("code").or_else(|| kind.filter(|kind| kind == TOO_LONG));
        Self { message, code, param: text("param") }
    }

    /// Whether it says that the prompt is too long.
    pub fn about_length(&self) -> bool {
        let code = self.code.as_deref();
        code == Some(TOO_LONG)
            || code == Some("context_length_exceeded")
            || self.message.contains("maximum context length")
    }
}

/// Answer of `GET /v1/models`.
#[derive(Debug, Deserialize)]
pub(crate) struct Models {
    #[serde(default, deserialize_with = "or_default")]
    pub data: Vec<Value>,
}

/// Body of `POST /v1/embeddings`.
#[derive(Debug, Serialize)]
pub(crate) struct Embeddings<'a> {
    pub model: &'a str,
    pub input: Vec<Prompt<'a>>,
    pub encoding_format: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub pooling: Option<&'static str>,
}

/// Its answer.
#[derive(Debug, Deserialize)]
pub(crate) struct EmbeddingList {
    pub data: Vec<Embedding>,
    #[serde(default, deserialize_with = "or_default")]
    pub usage: Usage,
}

#[derive(Debug, Deserialize)]
pub(crate) struct Embedding {
    pub index: Option<usize>,
    pub embedding: Vec<f32>,
}

body! {
    /// Body of `POST /tokenize`, `/detokenize` and `/apply-template`.
    Tokens<'a> {
        content: &'a str,
        prompt: &'a str,
        messages: Vec<Message<'a>>,
        tools: &'a [Value],
        chat_template_kwargs: Map<String, Value>,
        add_generation_prompt: bool,
        add_special: bool,
        add_special_tokens: bool,
        parse_special: bool,
        with_pieces: bool,
        tokens: &'a [u32],
    }
}

/// Answer of `POST /tokenize`.
#[derive(Debug, Deserialize)]
pub(crate) struct Tokenized {
    pub tokens: Vec<Token>,
}

/// A token, with what it stands for where that was asked for.
#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Token {
    Id(u32),
    Piece { id: u32, piece: Piece },
}

#[derive(Debug, Deserialize)]
#[serde(untagged)]
pub(crate) enum Piece {
    Text(String),
    Bytes(Vec<u8>),
}

/// Answer of `POST /detokenize` and `POST /apply-template`.
#[derive(Debug, Deserialize)]
pub(crate) struct Detokenized {
    pub content: Option<String>,
    pub prompt: Option<String>,
}

/// `null` is what absent is.
fn or_default<'de, T: Default + Deserialize<'de>, D: Deserializer<'de>>(deserializer: D) -> Result<T, D::Error> {
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// A number of tokens; what is none counts as 0, and too many as the most.
fn count<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    let count = Value::deserialize(deserializer)?.as_u64().unwrap_or(0);
    Ok(u32::try_from(count).unwrap_or(u32::MAX))
}
