//! `POST /v1/chat/completions`: the request.

use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{
    BadRequest,
    fields::{Shared, refuse_set, request, tokens_max},
    message::{self, WireMessage},
};
use crate::pipeline::{Ask, Chat, Effort, Subject, ToolChoice};

/// `reasoning`: how much of it.
#[derive(Clone, Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object")]
pub struct WireReasoning {
    /// As `reasoning_effort`.
    #[schemars(extend("enum" = ["none", "minimal", "low", "medium", "high", "xhigh", null]))]
    pub effort: Option<String>,
    /// As `thinking_budget`.
    pub max_tokens: Option<u32>,
}

request! {
    /// The body of a chat completion.
    ChatRequest {
        #[schemars(required, length(min = 1))]
        messages: Option<Vec<WireMessage>>,
        #[schemars(range(min = 1))]
        max_completion_tokens: Option<u32>,
        tools: Option<Vec<Value>>,
        tool_choice: Option<Value>,
        /// False has an answer end with its first call.
        parallel_tool_calls: Option<bool>,
        chat_template_kwargs: Option<Map<String, Value>>,
        #[schemars(extend("enum" = ["none", "minimal", "low", "medium", "high", "xhigh", null]))]
        reasoning_effort: Option<String>,
        enable_thinking: Option<bool>,
        /// Most tokens of reasoning.
        thinking_budget: Option<u32>,
        #[serde(default, deserialize_with = "crate::openai::fields::object")]
        reasoning: Option<WireReasoning>,
        logprobs: Option<bool>,
        #[schemars(range(max = 20))]
        top_logprobs: Option<u32>,
        /// Says who asks. Accepted and put to no use, like `user`.
        safety_identifier: Option<String>,
        /// Names requests with a common beginning. Accepted and put to no use: beginnings are found without.
        prompt_cache_key: Option<String>,
        #[schemars(extend("enum" = ["auto", null]))]
        service_tier: Option<Value>,
        #[schemars(extend("enum" = [false, null]))]
        store: Option<Value>,
        #[schemars(extend("enum" = [{}, null]))]
        metadata: Option<Value>,
        #[schemars(skip)]
        functions: Option<Value>,
        #[schemars(skip)]
        function_call: Option<Value>,
        #[schemars(extend("enum" = [["text"], null]))]
        modalities: Option<Value>,
        #[schemars(skip)]
        audio: Option<Value>,
        #[schemars(skip)]
        prediction: Option<Value>,
        #[schemars(skip)]
        web_search_options: Option<Value>,
        #[schemars(skip)]
        verbosity: Option<Value>,
        #[schemars(skip)]
        prompt_cache_retention: Option<Value>,
    }
}

/// Most alternatives that can be asked for with each token.
const TOP_LOGPROBS_MAX: u32 = 20;

impl ChatRequest {
    /// Checks everything that does not depend on the model, and translates it. `id` names the job.
    pub fn ask(self, id: &str) -> Result<(Shared, Ask), BadRequest> {
        let mut shared = self.shared()?;
        self.refuse()?;
        shared.names.extend(self.names());
        if self.max_tokens.is_some()
            && self.max_completion_tokens.is_some()
            && self.max_tokens != self.max_completion_tokens
        {
            return Err(BadRequest::value("max_completion_tokens", "contradicts `max_tokens`; give one of them"));
        }
        let limit = tokens_max("max_tokens", self.max_tokens)?
            .or(tokens_max("max_completion_tokens", self.max_completion_tokens)?);
        let logprobs = self.logprobs()?;
        let (tools, tool_choice) = self.tools()?;
        if shared.grammar.is_some() && !tools.is_empty() {
            let what =
                "cannot go with `tools` that may be called; set `tool_choice` to `none`, or leave one of them out";
            return Err(BadRequest::value("response_format", what));
        }
        let effort = self.effort()?;
        let thinking_tokens_max = self.thinking_tokens_max()?;
        let messages = message::messages(self.messages.ok_or_else(|| BadRequest::missing("messages"))?)?;
        let kwargs = self.chat_template_kwargs.unwrap_or_default();
        let single_call = self.parallel_tool_calls == Some(false);
        let chat = Chat { messages, tools, tool_choice, single_call, kwargs, effort, thinking_tokens_max };
        let ask = Ask {
            sampling: shared.sampling.clone(),
            tokens_max: limit,
            tokens_min: shared.tokens_min,
            ignore_eos: shared.ignore_eos,
            logprobs,
            stop: shared.stop.clone(),
            grammar: shared.grammar.clone(),
            choices: shared.n,
            ..Ask::new(id, Subject::Chat(chat))
        };
        Ok((shared, ask))
    }

    fn refuse(&self) -> Result<(), BadRequest> {
        let none = Value::Null;
        refuse_set(&[
            ("service_tier", &self.service_tier, json!("auto"), "only `auto` is"),
            ("store", &self.store, json!(false), "nothing is stored"),
            ("metadata", &self.metadata, json!({}), "nothing is stored"),
            ("functions", &self.functions, none.clone(), "use `tools`"),
            ("function_call", &self.function_call, none.clone(), "use `tool_choice`"),
            ("modalities", &self.modalities, json!(["text"]), "only [\"text\"] is"),
            ("audio", &self.audio, none.clone(), "answers are text"),
            ("prediction", &self.prediction, none.clone(), "leave it out"),
            ("web_search_options", &self.web_search_options, none.clone(), "leave it out"),
            ("verbosity", &self.verbosity, none.clone(), "leave it out"),
            ("prompt_cache_retention", &self.prompt_cache_retention, none, "leave it out"),
        ])
    }

    fn logprobs(&self) -> Result<Option<u32>, BadRequest> {
        match (self.logprobs.unwrap_or(false), self.top_logprobs) {
            (false, None | Some(0)) => Ok(None),
            (false, Some(_)) => Err(BadRequest::value("top_logprobs", "is only possible with `logprobs`: true")),
            (true, Some(top)) if top > TOP_LOGPROBS_MAX => {
                Err(BadRequest::value("top_logprobs", format!("has to be between 0 and {TOP_LOGPROBS_MAX}")))
            }
            (true, top) => Ok(Some(top.unwrap_or(0))),
        }
    }

    /// The tools to show the model, none of them where the request forbids calls, and which of them has to be called.
    fn tools(&self) -> Result<(Vec<Value>, ToolChoice), BadRequest> {
        let tools = self.tools.clone().unwrap_or_default();
        message::tools(&tools)?;
        let choice = match &self.tool_choice {
            None => ToolChoice::Auto,
            Some(Value::String(choice)) if choice == "auto" => ToolChoice::Auto,
            Some(Value::String(choice)) if choice == "none" => return Ok((Vec::new(), ToolChoice::Auto)),
            Some(Value::String(choice)) if choice == "required" => ToolChoice::Required,
            Some(choice) => match (choice.get("type").and_then(Value::as_str), choice.pointer("/function/name")) {
                (Some("function"), Some(Value::String(name))) => ToolChoice::Named(name.clone()),
                _ => {
                    let what =
                        "has to be none, auto, required or {\"type\": \"function\", \"function\": {\"name\": …}}";
                    return Err(BadRequest::value("tool_choice", what));
                }
            },
        };
        let name = |tool: &Value| tool.pointer("/function/name").and_then(Value::as_str).map(str::to_owned);
        match &choice {
            ToolChoice::Auto => {}
            _ if tools.is_empty() => return Err(BadRequest::value("tool_choice", "is only possible with `tools`")),
            ToolChoice::Named(wanted) if !tools.iter().any(|tool| name(tool).as_ref() == Some(wanted)) => {
                return Err(BadRequest::value("tool_choice.function.name", "is none of `tools`"));
            }
            ToolChoice::Required | ToolChoice::Named(_) => {}
        }
        Ok((tools, choice))
    }

    fn thinking_tokens_max(&self) -> Result<Option<u32>, BadRequest> {
        match (self.thinking_budget, self.reasoning.as_ref().and_then(|reasoning| reasoning.max_tokens)) {
            (Some(one), Some(other)) if one != other => {
                Err(BadRequest::value("reasoning.max_tokens", "contradicts `thinking_budget`; give one of them"))
            }
            (one, other) => Ok(one.or(other)),
        }
    }

    /// What is said in `reasoning` alone.
    fn names(&self) -> Vec<(&'static str, &'static str)> {
        let Some(reasoning) = &self.reasoning else { return Vec::new() };
        let mut names = Vec::new();
        if reasoning.effort.is_some() && self.reasoning_effort.is_none() {
            names.push(("reasoning_effort", "reasoning.effort"));
        }
        if reasoning.max_tokens.is_some() && self.thinking_budget.is_none() {
            names.push(("thinking_budget", "reasoning.max_tokens"));
        }
        names
    }

    fn effort(&self) -> Result<Option<Effort>, BadRequest> {
        let nested = self.reasoning.as_ref().and_then(|reasoning| reasoning.effort.as_ref());
        if nested.is_some() && self.reasoning_effort.is_some() && nested != self.reasoning_effort.as_ref() {
            return Err(BadRequest::value("reasoning.effort", "contradicts `reasoning_effort`; give one of them"));
        }
        match (self.reasoning_effort.as_ref().or(nested), self.enable_thinking) {
            (None, None) => Ok(None),
            (None, Some(thinking)) => Ok(Some(Effort::Switch(thinking))),
            (Some(_), Some(_)) => Err(BadRequest::value("enable_thinking", "cannot go with `reasoning_effort`")),
            (Some(effort), None) => match effort.as_str() {
                "none" | "minimal" | "low" | "medium" | "high" | "xhigh" => Ok(Some(Effort::Level(effort.clone()))),
                _ => {
                    let what = "has to be none, minimal, low, medium, high or xhigh";
                    Err(BadRequest::value("reasoning_effort", what))
                }
            },
        }
    }
}
