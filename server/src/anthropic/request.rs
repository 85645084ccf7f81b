//! `POST /v1/messages` and `/v1/messages/count_tokens`: the requests.

use std::sync::Arc;

use mesh_core::{Grammar, Sampling, chat::Message};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::content::{self, Content, WireMessage};
use crate::{
    openai::{
        BadRequest,
        bad_request::brief,
        fields::{refuse_set, stops, tokens_max, within},
        message::CacheControl,
    },
    pipeline::{self, Ask, Chat, Effort, Subject},
};

/// Declares a request: its own fields and those that say what the model reads.
macro_rules! request {
    ($(#[$meta:meta])* $name:ident { $($(#[$field_meta:meta])* $field:ident: $type:ty,)* }) => {
        $(#[$meta])*
        #[derive(Clone, Debug, Default, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, expecting = "an object")]
        #[allow(missing_docs)]
        pub struct $name {
            #[schemars(required, length(min = 1))]
            pub model: Option<String>,
            #[schemars(required, length(min = 1))]
            pub messages: Option<Vec<WireMessage>>,
            pub system: Option<Content>,
            pub tools: Option<Vec<Tool>>,
            #[serde(default, deserialize_with = "crate::openai::fields::object")]
            pub tool_choice: Option<ToolChoice>,
            #[serde(default, deserialize_with = "crate::openai::fields::object")]
            pub thinking: Option<Thinking>,
            #[serde(default, deserialize_with = "crate::openai::fields::object")]
            pub output_config: Option<OutputConfig>,
            #[serde(default, deserialize_with = "crate::openai::fields::object")]
            pub cache_control: Option<CacheControl>,
            #[schemars(skip)]
            pub context_management: Option<Value>,
            #[schemars(extend("enum" = [[], null]))]
            pub mcp_servers: Option<Value>,
            $($(#[$field_meta])* pub $field: $type,)*
        }

        impl $name {
            fn read(&mut self) -> Read {
                Read {
                    model: self.model.take(),
                    messages: self.messages.take(),
                    system: self.system.take(),
                    tools: self.tools.take(),
                    tool_choice: self.tool_choice.take(),
                    thinking: self.thinking.take(),
                    output_config: self.output_config.take(),
                    context_management: self.context_management.take(),
                    mcp_servers: self.mcp_servers.take(),
                }
            }
        }
    };
}

request! {
    /// The body of a message request.
    MessagesRequest {
        #[schemars(required, range(min = 1))]
        max_tokens: Option<u32>,
        #[schemars(length(max = 4), inner(length(min = 1, max = 1024)))]
        stop_sequences: Option<Vec<String>>,
        stream: Option<bool>,
        #[schemars(range(min = 0, max = 2))]
        temperature: Option<f32>,
        #[schemars(extend("exclusiveMinimum" = 0), range(max = 1))]
        top_p: Option<f32>,
        top_k: Option<u32>,
        #[serde(default, deserialize_with = "crate::openai::fields::object")]
        metadata: Option<Metadata>,
        /// `auto` or `standard_only`, which are the same here: there is one tier.
        #[schemars(extend("enum" = ["auto", "standard_only", null]))]
        service_tier: Option<String>,
        #[schemars(skip)]
        container: Option<Value>,
        #[schemars(skip)]
        inference_geo: Option<Value>,
    }
}

request! {
    /// The body of a request to count tokens.
    CountRequest {}
}

/// What the model reads.
struct Read {
    model: Option<String>,
    messages: Option<Vec<WireMessage>>,
    system: Option<Content>,
    tools: Option<Vec<Tool>>,
    tool_choice: Option<ToolChoice>,
    thinking: Option<Thinking>,
    output_config: Option<OutputConfig>,
    context_management: Option<Value>,
    mcp_servers: Option<Value>,
}

/// A tool the model may call.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a tool object")]
#[schemars(rename = "AnthropicTool")]
#[allow(missing_docs)]
pub struct Tool {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub name: Option<String>,
    pub description: Option<String>,
    pub input_schema: Option<Map<String, Value>>,
    pub cache_control: Option<CacheControl>,
    pub strict: Option<bool>,
    pub input_examples: Option<Value>,
    pub defer_loading: Option<Value>,
    pub allowed_callers: Option<Value>,
    pub eager_input_streaming: Option<Value>,
    /// What tools of other types carry.
    #[serde(default)]
    pub max_uses: Option<Value>,
}

/// Whether tools have to be called.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[schemars(rename = "AnthropicToolChoice")]
#[allow(missing_docs)]
pub struct ToolChoice {
    /// `auto`, `any`, `tool` or `none`.
    #[serde(rename = "type")]
    pub kind: String,
    pub name: Option<String>,
    pub disable_parallel_tool_use: Option<bool>,
}

/// Whether the model reasons aloud.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct Thinking {
    /// `enabled`, `disabled`, or `adaptive`, which leaves it to the model.
    #[serde(rename = "type")]
    pub kind: String,
    pub budget_tokens: Option<u32>,
    /// Only `summarized` is possible, which says what holds anyway: reasoning is shown.
    pub display: Option<String>,
}

/// How the answer is to be.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct OutputConfig {
    /// `low`, `medium`, `high` or `max`.
    pub effort: Option<String>,
    #[serde(default, deserialize_with = "crate::openai::fields::object")]
    pub format: Option<OutputFormat>,
}

/// What the answer has to be.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct OutputFormat {
    /// `json_schema`.
    #[serde(rename = "type")]
    pub kind: String,
    pub schema: Option<Map<String, Value>>,
}

/// Says who asks. Accepted and put to no use: it is neither logged nor kept.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
#[allow(missing_docs)]
pub struct Metadata {
    pub user_id: Option<String>,
}

/// A request, checked.
#[derive(Clone, Debug)]
pub struct Asked {
    /// Who shall answer.
    pub model: String,
    /// Answer in events rather than at once.
    pub stream: bool,
    /// The request.
    pub ask: Ask,
}

impl MessagesRequest {
    /// Checks everything that does not depend on the model, and translates it. `id` names the job.
    pub fn ask(mut self, id: &str) -> Result<Asked, BadRequest> {
        let limit = tokens_max("max_tokens", self.max_tokens)?.ok_or_else(|| BadRequest::missing("max_tokens"))?;
        refuse_set(&[
            ("container", &self.container, Value::Null, "nothing is executed here"),
            ("inference_geo", &self.inference_geo, Value::Null, "answers are computed on this machine"),
        ])?;
        if !matches!(self.service_tier.as_deref(), None | Some("auto" | "standard_only")) {
            return Err(BadRequest::value("service_tier", "has to be auto or standard_only"));
        }
        within("temperature", self.temperature, 0.0, 2.0)?;
        within("top_p", self.top_p, 0.0, 1.0)?;
        if self.top_p == Some(0.0) {
            return Err(BadRequest::value("top_p", "has to be above 0 and at most 1"));
        }
        let stop = stops("stop_sequences", self.stop_sequences.take().unwrap_or_default())?;
        let (model, chat, grammar) = self.read().check(Some(limit))?;
        let sampling =
            Sampling { temperature: self.temperature, top_p: self.top_p, top_k: self.top_k, ..Sampling::default() };
        let ask = Ask { sampling, tokens_max: Some(limit), stop, grammar, ..Ask::new(id, Subject::Chat(chat)) };
        Ok(Asked { model, stream: self.stream.unwrap_or(false), ask })
    }
}

impl CountRequest {
    /// The model, and the conversation whose tokens are to be counted.
    pub fn check(mut self) -> Result<(String, Subject), BadRequest> {
        let (model, chat, _) = self.read().check(None)?;
        Ok((model, Subject::Chat(chat)))
    }
}

impl Read {
    fn check(self, limit: Option<u32>) -> Result<(String, Chat, Option<Grammar>), BadRequest> {
        let model = self.model.filter(|model| !model.is_empty()).ok_or_else(|| BadRequest::missing("model"))?;
        refuse_set(&[
            ("context_management", &self.context_management, Value::Null, "conversations are read whole"),
            ("mcp_servers", &self.mcp_servers, json!([]), "tools are the client's to call"),
        ])?;
        let mut messages = Vec::new();
        if let Some(system) = self.system {
            let content = Some(system.text("system")?);
            messages.push(Message { role: "system".into(), content, ..Message::default() });
        }
        messages.extend(content::messages(self.messages.ok_or_else(|| BadRequest::missing("messages"))?)?);
        let tools = self.tools.unwrap_or_default().into_iter().enumerate();
        let mut tools: Vec<_> = tools.map(|(index, tool)| tool.check(index)).collect::<Result<_, _>>()?;
        let mut chat = Chat::default();
        if let Some(choice) = self.tool_choice {
            chat.tool_choice = choice.check(&mut tools)?;
            chat.single_call = choice.disable_parallel_tool_use == Some(true) && !tools.is_empty();
        }
        let (mut effort, grammar) = match self.output_config {
            Some(config) => config.check()?,
            None => (None, None),
        };
        if let Some(thinking) = self.thinking {
            let (switch, budget) = thinking.check(limit)?;
            chat.thinking_tokens_max = budget;
            // A level says more than on.
            effort = match (switch, effort) {
                (Some(false), Some(_)) => {
                    return Err(BadRequest::value(
                        "output_config.effort",
                        "cannot go with `thinking` that is disabled",
                    ));
                }
                (switch, None) => switch.map(Effort::Switch),
                (_, effort) => effort,
            };
        }
        Ok((model, Chat { messages, tools, effort, ..chat }, grammar))
    }
}

impl Tool {
    /// The tool as templates know tools.
    fn check(self, index: usize) -> Result<Value, BadRequest> {
        let path = format!("tools[{index}]");
        if let Some(kind) = self.kind.filter(|kind| kind != "custom") {
            let why = format!("it is `{}`, and only tools of the client's own are (`custom`)", brief(&kind));
            return Err(BadRequest::unsupported(format!("{path}.type"), why));
        }
        for (name, value, trivial) in [
            ("input_examples", &self.input_examples, json!([])),
            ("defer_loading", &self.defer_loading, json!(false)),
            ("allowed_callers", &self.allowed_callers, json!(["direct"])),
            ("eager_input_streaming", &self.eager_input_streaming, json!(false)),
            ("max_uses", &self.max_uses, Value::Null),
        ] {
            if value.as_ref().is_some_and(|value| *value != trivial) {
                return Err(BadRequest::unsupported(format!("{path}.{name}"), "leave it out"));
            }
        }
        let name = self.name.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| BadRequest::missing(format!("{path}.name")))?;
        let schema = self.input_schema.ok_or_else(|| BadRequest::missing(format!("{path}.input_schema")))?;
        let mut function = Map::from_iter([("name".to_owned(), Value::String(name))]);
        function.extend(self.description.map(|text| ("description".to_owned(), Value::String(text))));
        function.insert("parameters".into(), Value::Object(schema));
        function.extend(self.strict.map(|strict| ("strict".to_owned(), Value::Bool(strict))));
        Ok(json!({ "type": "function", "function": function }))
    }
}

impl ToolChoice {
    /// What is forced. `none` shows no tools to the model.
    fn check(&self, tools: &mut Vec<Value>) -> Result<pipeline::ToolChoice, BadRequest> {
        if self.kind != "tool" && self.name.is_some() {
            return Err(BadRequest::value("tool_choice.name", "is only possible with `type`: \"tool\""));
        }
        match self.kind.as_str() {
            "auto" => Ok(pipeline::ToolChoice::Auto),
            "none" => {
                tools.clear();
                Ok(pipeline::ToolChoice::Auto)
            }
            "any" if tools.is_empty() => Err(BadRequest::value("tool_choice", "is only possible with `tools`")),
            "any" => Ok(pipeline::ToolChoice::Required),
            "tool" => {
                let name = self.name.clone().ok_or_else(|| BadRequest::missing("tool_choice.name"))?;
                if !tools.iter().any(|tool| tool["function"]["name"] == name.as_str()) {
                    return Err(BadRequest::value("tool_choice.name", "has to be the name of one of `tools`"));
                }
                Ok(pipeline::ToolChoice::Named(name))
            }
            _ => Err(BadRequest::value("tool_choice.type", "has to be auto, any, tool or none")),
        }
    }
}

impl Thinking {
    /// On or off, if the request says; and the budget.
    fn check(self, limit: Option<u32>) -> Result<(Option<bool>, Option<u32>), BadRequest> {
        if self.display.is_some_and(|display| display != "summarized") {
            return Err(BadRequest::unsupported("thinking.display", "reasoning is always shown, as it is"));
        }
        if self.kind != "enabled" && self.budget_tokens.is_some() {
            return Err(BadRequest::value("thinking.budget_tokens", "is only possible with `type`: \"enabled\""));
        }
        match self.kind.as_str() {
            "disabled" => Ok((Some(false), None)),
            "adaptive" => Ok((None, None)),
            "enabled" => {
                let budget = self.budget_tokens.ok_or_else(|| BadRequest::missing("thinking.budget_tokens"))?;
                if budget == 0 || limit.is_some_and(|limit| budget >= limit) {
                    let what = "has to be 1 or more, and less than `max_tokens`";
                    return Err(BadRequest::value("thinking.budget_tokens", what));
                }
                Ok((Some(true), Some(budget)))
            }
            _ => Err(BadRequest::value("thinking.type", "has to be enabled, disabled or adaptive")),
        }
    }
}

impl OutputConfig {
    fn check(self) -> Result<(Option<Effort>, Option<Grammar>), BadRequest> {
        let effort = match self.effort.as_deref() {
            None => None,
            Some("low" | "medium" | "high") => self.effort.map(Effort::Level),
            // The levels that templates know end with `high`.
            Some("xhigh" | "max") => Some(Effort::Level("high".into())),
            Some(_) => {
                return Err(BadRequest::value("output_config.effort", "has to be low, medium, high, xhigh or max"));
            }
        };
        let grammar = match self.format {
            None => None,
            Some(format) if format.kind != "json_schema" => {
                return Err(BadRequest::value("output_config.format.type", "has to be json_schema"));
            }
            Some(format) => {
                let schema = format.schema.ok_or_else(|| BadRequest::missing("output_config.format.schema"))?;
                Some(Grammar::JsonSchema(Arc::new(Value::Object(schema))))
            }
        };
        Ok((effort, grammar))
    }
}
