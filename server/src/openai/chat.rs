//! `POST /v1/chat/completions`: the request.

use serde_json::{Map, Value, json};

use super::{
    BadRequest,
    fields::{Shared, refuse_set, request, tokens_max},
    message::{self, WireMessage},
};
use crate::pipeline::{Ask, Chat, Effort, Subject};

request! {
    /// The body of a chat completion.
    ChatRequest {
        messages: Option<Vec<WireMessage>>,
        max_completion_tokens: Option<u32>,
        tools: Option<Vec<Value>>,
        tool_choice: Option<Value>,
        /// True says what holds anyway: an answer may hold several calls.
        parallel_tool_calls: Option<bool>,
        response_format: Option<Value>,
        chat_template_kwargs: Option<Map<String, Value>>,
        reasoning_effort: Option<String>,
        enable_thinking: Option<bool>,
        logprobs: Option<bool>,
        top_logprobs: Option<u32>,
        /// Says who asks. Accepted and put to no use, like `user`.
        safety_identifier: Option<String>,
        /// Names requests with a common beginning. Accepted and put to no use: beginnings are found without.
        prompt_cache_key: Option<String>,
        service_tier: Option<Value>,
        store: Option<Value>,
        metadata: Option<Value>,
        functions: Option<Value>,
        function_call: Option<Value>,
        modalities: Option<Value>,
        audio: Option<Value>,
        prediction: Option<Value>,
        web_search_options: Option<Value>,
        verbosity: Option<Value>,
        prompt_cache_retention: Option<Value>,
    }
}

/// Most alternatives that can be asked for with each token.
const TOP_LOGPROBS_MAX: u32 = 20;

impl ChatRequest {
    /// Checks everything that does not depend on the model, and translates it. `id` names the job.
    pub fn ask(self, id: &str) -> Result<(Shared, Ask), BadRequest> {
        let shared = self.shared()?;
        self.refuse()?;
        if self.max_tokens.is_some()
            && self.max_completion_tokens.is_some()
            && self.max_tokens != self.max_completion_tokens
        {
            return Err(BadRequest::value("max_completion_tokens", "contradicts `max_tokens`; give one of them"));
        }
        let limit = tokens_max("max_tokens", self.max_tokens)?
            .or(tokens_max("max_completion_tokens", self.max_completion_tokens)?);
        let logprobs = self.logprobs()?;
        let tools = self.tools()?;
        let effort = self.effort()?;
        let messages = message::messages(self.messages.ok_or_else(|| BadRequest::missing("messages"))?)?;
        let chat = Chat { messages, tools, kwargs: self.chat_template_kwargs.unwrap_or_default(), effort };
        let ask = Ask {
            sampling: shared.sampling.clone(),
            tokens_max: limit,
            ignore_eos: shared.ignore_eos,
            logprobs,
            stop: shared.stop.clone(),
            ..Ask::new(id, Subject::Chat(chat))
        };
        Ok((shared, ask))
    }

    fn refuse(&self) -> Result<(), BadRequest> {
        let none = Value::Null;
        refuse_set(&[
            ("response_format", &self.response_format, json!({ "type": "text" }), "only {\"type\": \"text\"} is"),
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
        ])?;
        if self.parallel_tool_calls == Some(false) {
            return Err(BadRequest::unsupported("parallel_tool_calls", "answers may hold several calls"));
        }
        Ok(())
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

    /// The tools to show the model: none of them where the request forbids calls.
    fn tools(&self) -> Result<Vec<Value>, BadRequest> {
        let tools = self.tools.clone().unwrap_or_default();
        message::tools(&tools)?;
        match &self.tool_choice {
            None => Ok(tools),
            Some(Value::String(choice)) if choice == "auto" => Ok(tools),
            Some(Value::String(choice)) if choice == "none" => Ok(Vec::new()),
            Some(_) => Err(BadRequest::unsupported("tool_choice", "only `auto` and `none` are")),
        }
    }

    fn effort(&self) -> Result<Option<Effort>, BadRequest> {
        match (&self.reasoning_effort, self.enable_thinking) {
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
