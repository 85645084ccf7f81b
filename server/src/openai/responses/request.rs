//! `POST /v1/responses`: the request.

use std::{collections::BTreeMap, sync::Arc};

use mesh_core::{Grammar, Sampling, chat::Message};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    input::{self, Input},
    object::{Echo, Reasoning},
};
use crate::{
    openai::{
        BadRequest,
        bad_request::{brief, element, kind},
        fields::{refuse_set, tokens_max, within},
    },
    pipeline::{Ask, Chat, Effort, Subject, ToolChoice},
};

/// Most entries of `metadata`.
pub const METADATA_MAX: usize = 16;
/// Longest key and value of `metadata` together, in bytes.
pub const METADATA_BYTES_MAX: usize = 1024;

/// The body of a request for a response.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct ResponsesRequest {
    #[schemars(required, length(min = 1))]
    pub model: Option<String>,
    #[schemars(required)]
    pub input: Option<Input>,
    pub instructions: Option<String>,
    pub previous_response_id: Option<String>,
    /// Keep the response, so that it can be continued; true unless given.
    pub store: Option<bool>,
    pub stream: Option<bool>,
    #[serde(default, deserialize_with = "crate::openai::fields::object")]
    pub stream_options: Option<StreamOptions>,
    #[schemars(range(min = 1))]
    pub max_output_tokens: Option<u32>,
    #[schemars(range(min = 0, max = 2))]
    pub temperature: Option<f32>,
    #[schemars(extend("exclusiveMinimum" = 0), range(max = 1))]
    pub top_p: Option<f32>,
    pub tools: Option<Vec<Value>>,
    /// `auto`, `none`, `required`, or `{"type": "function", "name": …}`.
    pub tool_choice: Option<Value>,
    pub parallel_tool_calls: Option<bool>,
    #[serde(default, deserialize_with = "crate::openai::fields::object")]
    pub reasoning: Option<ReasoningOptions>,
    #[serde(default, deserialize_with = "crate::openai::fields::object")]
    pub text: Option<TextOptions>,
    pub metadata: Option<BTreeMap<String, String>>,
    #[schemars(extend("enum" = ["disabled", null]))]
    pub truncation: Option<Value>,
    /// `reasoning.encrypted_content` is the only one.
    #[schemars(extend("items" = { "const": "reasoning.encrypted_content" }))]
    pub include: Option<Vec<String>>,
    /// Says who asks. Accepted and put to no use: it is neither logged nor kept.
    pub user: Option<String>,
    /// The same.
    pub safety_identifier: Option<String>,
    /// Names requests with a common beginning. Accepted and put to no use: beginnings are found without.
    pub prompt_cache_key: Option<String>,
    #[schemars(skip)]
    pub prompt_cache_retention: Option<Value>,
    #[schemars(extend("enum" = ["auto", "default", null]))]
    pub service_tier: Option<String>,
    #[schemars(extend("enum" = [false, null]))]
    pub background: Option<Value>,
    #[schemars(skip)]
    pub conversation: Option<Value>,
    #[schemars(skip)]
    pub prompt: Option<Value>,
    #[schemars(skip)]
    pub max_tool_calls: Option<Value>,
    #[schemars(extend("enum" = [0, null]))]
    pub top_logprobs: Option<Value>,
    #[schemars(skip)]
    pub context_management: Option<Value>,
}

/// `stream_options`.
#[derive(Clone, Copy, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[schemars(rename = "ResponsesStreamOptions")]
#[allow(missing_docs)]
pub struct StreamOptions {
    #[schemars(extend("enum" = [false, null]))]
    pub include_obfuscation: Option<bool>,
}

/// `reasoning`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct ReasoningOptions {
    /// `none`, `minimal`, `low`, `medium`, `high` or `xhigh`.
    #[schemars(extend("enum" = ["none", "minimal", "low", "medium", "high", "xhigh", null]))]
    pub effort: Option<String>,
    /// `auto` or `detailed` give the reasoning as the summary.
    #[schemars(extend("enum" = ["auto", "detailed", null]))]
    pub summary: Option<String>,
}

/// `text`.
#[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct TextOptions {
    pub format: Option<Value>,
    #[schemars(extend("enum" = ["medium", null]))]
    pub verbosity: Option<String>,
}

/// `text.format`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a format object")]
#[allow(missing_docs)]
struct Format {
    #[serde(rename = "type")]
    kind: String,
    #[allow(dead_code)]
    name: Option<String>,
    #[allow(dead_code)]
    description: Option<String>,
    schema: Option<Map<String, Value>>,
    #[allow(dead_code)]
    strict: Option<bool>,
}

/// An element of `tools`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a tool object")]
#[allow(missing_docs)]
struct Tool {
    #[serde(rename = "type")]
    #[allow(dead_code)]
    kind: String,
    name: Option<String>,
    description: Option<String>,
    parameters: Option<Map<String, Value>>,
    strict: Option<bool>,
}

/// A request, checked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who shall answer.
    pub model: String,
    /// Answer in events rather than at once.
    pub stream: bool,
    /// What is repeated in the response.
    pub echo: Echo,
    /// Hand out the reasoning for safe keeping.
    pub sealed: bool,
    /// What is new in the conversation.
    pub messages: Vec<Message>,
    /// The same, as items to be shown again.
    pub items: Vec<Value>,
    chat: Chat,
    sampling: Sampling,
    tokens_max: Option<u32>,
    grammar: Option<Grammar>,
}

impl Asked {
    /// The request itself, after what was said `before`. `id` names the job.
    pub fn ask(&self, id: &str, before: &[Message]) -> Ask {
        let instructions = self.echo.instructions.clone();
        let system =
            instructions.map(|text| Message { role: "system".into(), content: Some(text), ..Message::default() });
        let mut chat = self.chat.clone();
        chat.messages = system.into_iter().chain(before.iter().cloned()).chain(self.messages.iter().cloned()).collect();
        Ask {
            sampling: self.sampling.clone(),
            tokens_max: self.tokens_max,
            grammar: self.grammar.clone(),
            ..Ask::new(id, Subject::Chat(chat))
        }
    }
}

impl ResponsesRequest {
    /// Checks everything that does not depend on the model or on what is stored. `id` is the response's.
    pub fn check(self, id: &str) -> Result<Asked, BadRequest> {
        self.refuse()?;
        let model = self.model.filter(|model| !model.is_empty()).ok_or_else(|| BadRequest::missing("model"))?;
        let stream = self.stream.unwrap_or(false);
        if let Some(options) = self.stream_options {
            if !stream {
                return Err(BadRequest::value("stream_options", "is only possible with `stream`: true"));
            }
            if options.include_obfuscation == Some(true) {
                return Err(BadRequest::unsupported(
                    "stream_options.include_obfuscation",
                    "events hold what they hold",
                ));
            }
        }
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        if self.top_p == Some(0.0) {
            return Err(BadRequest::value("top_p", "has to be above 0 and at most 1"));
        }
        let limit = tokens_max("max_output_tokens", self.max_output_tokens)?;
        let input = self.input.ok_or_else(|| BadRequest::missing("input"))?;
        let short = id.rsplit('_').next().unwrap_or_default();
        let (messages, items) = input::read(input, short)?;
        if messages.is_empty() && self.previous_response_id.is_none() {
            return Err(BadRequest::value("input", "has to have at least one item"));
        }
        for (index, include) in self.include.iter().flatten().enumerate() {
            if include != "reasoning.encrypted_content" {
                let why = "only `reasoning.encrypted_content` is";
                return Err(BadRequest::unsupported(format!("include[{index}]"), why));
            }
        }
        let metadata = self.metadata.unwrap_or_default();
        let long = |(key, value): (&String, &String)| key.len() + value.len() > METADATA_BYTES_MAX;
        if metadata.len() > METADATA_MAX || metadata.iter().any(long) {
            let what = format!("may have {METADATA_MAX} entries of {METADATA_BYTES_MAX} bytes each");
            return Err(BadRequest::value("metadata", what));
        }
        let reasoning = self.reasoning.unwrap_or_default();
        let effort = effort(&reasoning)?;
        let (format, grammar) = format(self.text)?;
        let given = self.tools.unwrap_or_default();
        let mut tools: Vec<_> =
            given.iter().cloned().enumerate().map(|(index, value)| tool(index, value)).collect::<Result<_, _>>()?;
        let tool_choice = forced(self.tool_choice.as_ref(), &mut tools)?;
        let single_call = self.parallel_tool_calls == Some(false) && !tools.is_empty();
        let chat = Chat { tools, tool_choice, single_call, effort, ..Chat::default() };
        let echo = Echo {
            instructions: self.instructions,
            max_output_tokens: limit,
            metadata,
            parallel_tool_calls: self.parallel_tool_calls.unwrap_or(true),
            previous_response_id: self.previous_response_id,
            reasoning: Reasoning { effort: reasoning.effort, summary: reasoning.summary },
            store: self.store.unwrap_or(true),
            temperature: self.temperature,
            text: json!({ "format": format }),
            tool_choice: self.tool_choice.unwrap_or_else(|| "auto".into()),
            tools: given,
            top_p: self.top_p,
            truncation: "disabled",
        };
        let sampling = Sampling { temperature: self.temperature, top_p: self.top_p, ..Sampling::default() };
        let sealed = self.include.is_some_and(|include| !include.is_empty());
        Ok(Asked { model, stream, echo, sealed, messages, items, chat, sampling, tokens_max: limit, grammar })
    }

    fn refuse(&self) -> Result<(), BadRequest> {
        let none = Value::Null;
        refuse_set(&[
            ("truncation", &self.truncation, json!("disabled"), "only `disabled` is: conversations are read whole"),
            ("background", &self.background, json!(false), "answers are given while the client waits"),
            ("conversation", &self.conversation, none.clone(), "use `previous_response_id`"),
            ("prompt", &self.prompt, none.clone(), "use `instructions` and `input`"),
            ("max_tool_calls", &self.max_tool_calls, none.clone(), "there are no tools but the client's own"),
            ("top_logprobs", &self.top_logprobs, json!(0), "use /v1/chat/completions for probabilities"),
            ("prompt_cache_retention", &self.prompt_cache_retention, none.clone(), "leave it out"),
            ("context_management", &self.context_management, none, "conversations are read whole"),
        ])?;
        match self.service_tier.as_deref() {
            None | Some("auto" | "default") => Ok(()),
            Some(_) => Err(BadRequest::unsupported("service_tier", "only `auto` and `default` are")),
        }
    }
}

fn effort(reasoning: &ReasoningOptions) -> Result<Option<Effort>, BadRequest> {
    match reasoning.summary.as_deref() {
        None | Some("auto" | "detailed") => {}
        Some("concise") => {
            return Err(BadRequest::unsupported("reasoning.summary", "reasoning comes as it is; use `detailed`"));
        }
        Some(_) => return Err(BadRequest::value("reasoning.summary", "has to be auto or detailed")),
    }
    match reasoning.effort.as_deref() {
        None => Ok(None),
        Some(level @ ("none" | "minimal" | "low" | "medium" | "high" | "xhigh")) => {
            Ok(Some(Effort::Level(level.to_owned())))
        }
        Some(_) => {
            let what = "has to be none, minimal, low, medium, high or xhigh";
            Err(BadRequest::value("reasoning.effort", what))
        }
    }
}

fn format(text: Option<TextOptions>) -> Result<(Value, Option<Grammar>), BadRequest> {
    let text = text.unwrap_or_default();
    if !matches!(text.verbosity.as_deref(), None | Some("medium")) {
        return Err(BadRequest::unsupported("text.verbosity", "say it in `instructions`"));
    }
    let Some(value) = text.format else { return Ok((json!({ "type": "text" }), None)) };
    let format: Format = element("text.format", value.clone())?;
    match format.kind.as_str() {
        "text" => Ok((value, None)),
        "json_object" => Ok((value, Some(Grammar::JsonObject))),
        "json_schema" => {
            let schema = format.schema.ok_or_else(|| BadRequest::missing("text.format.schema"))?;
            Ok((value, Some(Grammar::JsonSchema(Arc::new(Value::Object(schema))))))
        }
        _ => Err(BadRequest::value("text.format.type", "has to be text, json_object or json_schema")),
    }
}

/// A tool as templates know tools.
fn tool(index: usize, value: Value) -> Result<Value, BadRequest> {
    let path = format!("tools[{index}]");
    match value.get("type").and_then(Value::as_str) {
        Some("function") => {}
        Some(kind) => {
            let why = format!("it is `{}`, and only `function` is", brief(kind));
            return Err(BadRequest::unsupported(format!("{path}.type"), why));
        }
        None if value.is_object() => return Err(BadRequest::missing(format!("{path}.type"))),
        None => {
            return Err(BadRequest::Type {
                param: path,
                what: format!("found {}, expected a tool object", kind(&value)),
            });
        }
    }
    let tool: Tool = element(&path, value)?;
    let name = tool.name.filter(|name| !name.is_empty());
    let mut function =
        Map::from_iter([("name".into(), name.ok_or_else(|| BadRequest::missing(format!("{path}.name")))?.into())]);
    function.extend(tool.description.map(|text| ("description".to_owned(), Value::String(text))));
    function.extend(tool.parameters.map(|schema| ("parameters".to_owned(), Value::Object(schema))));
    function.extend(tool.strict.map(|strict| ("strict".to_owned(), Value::Bool(strict))));
    Ok(json!({ "type": "function", "function": function }))
}

/// What is forced. `none` shows no tools to the model.
fn forced(choice: Option<&Value>, tools: &mut Vec<Value>) -> Result<ToolChoice, BadRequest> {
    let forced = match choice {
        None => return Ok(ToolChoice::Auto),
        Some(Value::String(choice)) => match choice.as_str() {
            "auto" => return Ok(ToolChoice::Auto),
            "none" => {
                tools.clear();
                return Ok(ToolChoice::Auto);
            }
            "required" => ToolChoice::Required,
            _ => return Err(BadRequest::value("tool_choice", "has to be auto, none, required, or name a function")),
        },
        Some(choice) if choice.get("type").is_some_and(|kind| kind == "function") => {
            let name = choice.get("name").and_then(Value::as_str);
            let name = name.ok_or_else(|| BadRequest::missing("tool_choice.name"))?;
            if !tools.iter().any(|tool| tool["function"]["name"] == name) {
                return Err(BadRequest::value("tool_choice.name", "has to be the name of one of `tools`"));
            }
            ToolChoice::Named(name.to_owned())
        }
        Some(_) => return Err(BadRequest::unsupported("tool_choice", "it has to be a word, or to name a function")),
    };
    if tools.is_empty() {
        return Err(BadRequest::value("tool_choice", "is only possible with `tools`"));
    }
    Ok(forced)
}
