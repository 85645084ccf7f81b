//! From a conversation or a text to what an engine takes.

use std::{borrow::Cow, sync::Arc};

use chrono::NaiveDateTime;
use mesh_core::{Constraint, Landmarks, Prompt, PromptForm, SubmitError, TemplateError, Thinking};
use mesh_text::{Dialect, DialectParser, ParserContext, Template, TemplateInput, Tokenizer, Tools};
use serde_json::{Map, Value};

use super::{
    Chat, Effort, PipelineError, Subject,
    constraint::{self, Calls, Conditions, Wish},
    forced::ForcedCalls,
    landmarks,
};
use crate::served::ServedModel;

/// A prompt and what reads its answer.
pub struct Prepared {
    /// For the engine.
    pub prompt: Prompt,
    /// Where other prompts are likely to part from it, for engines that remember prompts.
    pub landmarks: Landmarks,
    /// Absent for text completions, whose answers are text as it comes.
    pub reader: Option<ReaderPlan>,
    /// What the answer is held to.
    pub constraint: Option<Constraint>,
    /// Tokens that hold one of the texts that were asked about, where the engine takes tokens.
    pub breaker_ids: Vec<u32>,
    /// The prompt, where it is to be put in front of the answer.
    pub echo: Option<String>,
}

/// How answers to a conversation are read.
pub struct ReaderPlan {
    dialect: &'static dyn Dialect,
    context: ParserContext,
    /// The answer is calls in plain JSON.
    plain_calls: bool,
    calls_max: Option<u32>,
}

impl ReaderPlan {
    /// Special tokens that the reader has to see.
    pub fn shown(&self) -> Vec<String> {
        self.dialect.markers(&self.context).iter().map(|marker| (*marker).to_owned()).collect()
    }

    /// What reads one answer.
    pub fn reader(&self) -> Reader {
        let parser = self.dialect.parser(&self.context);
        let parser = if self.plain_calls { Box::new(ForcedCalls::new(Some(parser))) } else { parser };
        Reader { parser, markers: self.dialect.markers(&self.context), calls_max: self.calls_max }
    }
}

/// What reads the answer to a conversation.
pub struct Reader {
    /// Tells reasoning, content and tool calls apart.
    pub parser: Box<dyn DialectParser>,
    /// Special tokens that it has to see.
    pub markers: &'static [&'static str],
    /// Calls after which the answer is over.
    pub calls_max: Option<u32>,
}

/// Renders and tokenizes, away from the threads that serve connections: a long prompt takes its time, and so does a grammar.
pub async fn prepare(
    model: &Arc<ServedModel>,
    subject: Subject,
    wish: Wish,
    echo: bool,
) -> Result<Prepared, PipelineError> {
    let _permit = model.preparing.acquire().await;
    let model = model.clone();
    let prepared = tokio::task::spawn_blocking(move || prepare_now(&model, subject, wish, echo)).await;
    prepared.unwrap_or(Err(PipelineError::Panicked))
}

fn prepare_now(model: &ServedModel, subject: Subject, wish: Wish, echo: bool) -> Result<Prepared, PipelineError> {
    let breaker_ids = match &model.tokenizer {
        Some(tokenizer) if !wish.breakers.is_empty() => tokenizer.tokens_with(&wish.breakers),
        _ => Vec::new(),
    };
    let (prompt, landmarks, reader, settled, echo) = match subject {
        // A rendered template writes its own begin-of-text token; raw text gets it from the tokenizer.
        Subject::Chat(chat) => {
            let tools = Tools::of(&chat.tools);
            let calls = Calls::of(&chat.tools, &chat.tool_choice, chat.single_call);
            let (single, thinking_tokens_max) = (chat.single_call, chat.thinking_tokens_max);
            let conversation = Conversation::of(model, chat)?;
            let text = conversation.render(&conversation.messages, true)?;
            let dialect = model.dialect;
            let opened = dialect.opens_reasoning(&text);
            let mut context = ParserContext { prompt_opens_reasoning: opened, tools };
            let markers = dialect.markers(&context);
            let conditions = Conditions { dialect: Some(dialect), markers, opened, thinking_tokens_max };
            let settled = constraint::settle(model, wish.grammar, calls.as_ref(), conditions)?;
            if settled.at_once {
                context.prompt_opens_reasoning = false;
            }
            if settled.plain_calls {
                context.tools = Tools::default();
            }
            let calls_max = single.then_some(1);
            let reader = ReaderPlan { dialect, context, plain_calls: settled.plain_calls, calls_max };
            let (prompt, landmarks) = match model.handle.capabilities().prompt {
                PromptForm::Text => (Prompt::Text { text, add_special: false }, Landmarks::default()),
                PromptForm::Tokens => in_tokens(model, &conversation, &text)?,
                PromptForm::Chat => return Err(PipelineError::Panicked),
            };
            (prompt, landmarks, Some(reader), settled, None)
        }
        subject @ (Subject::Text(_) | Subject::Tokens(_)) => {
            let conditions = Conditions { dialect: None, markers: &[], opened: false, thinking_tokens_max: None };
            let settled = constraint::settle(model, wish.grammar, None, conditions)?;
            let (prompt, echo) = plain(model, subject, echo)?;
            (prompt, Landmarks::default(), None, settled, echo)
        }
    };
    Ok(Prepared { prompt, landmarks, reader, constraint: settled.constraint, breaker_ids, echo })
}

/// A prompt without a conversation, and its text if that is to be given back.
fn plain(model: &ServedModel, subject: Subject, echo: bool) -> Result<(Prompt, Option<String>), PipelineError> {
    match subject {
        Subject::Tokens(ids) => {
            let text = match (&model.tokenizer, echo) {
                (Some(tokenizer), true) => Some(tokenizer.decode(&ids)),
                (None, true) => return Err(PipelineError::NoEcho),
                (_, false) => None,
            };
            Ok((checked(model, ids)?, text))
        }
        Subject::Text(text) => {
            let echoed = echo.then(|| text.clone());
            let prompt = match model.handle.capabilities().prompt {
                PromptForm::Text => Prompt::Text { text, add_special: true },
                PromptForm::Tokens => checked(model, tokenizer(model)?.encode(&text, true)?)?,
                PromptForm::Chat => return Err(PipelineError::Panicked),
            };
            Ok((prompt, echoed))
        }
        Subject::Chat(_) => Err(PipelineError::Panicked),
    }
}

/// A conversation as its template writes it, which may take its time.
pub(super) fn rendered(model: &ServedModel, chat: Chat, add_generation_prompt: bool) -> Result<String, PipelineError> {
    let conversation = Conversation::of(model, chat)?;
    Ok(conversation.render(&conversation.messages, add_generation_prompt)?)
}

fn tokenizer(model: &ServedModel) -> Result<&Tokenizer, PipelineError> {
    model.tokenizer.as_ref().ok_or(PipelineError::NoTokenizer)
}

/// The tokens of a rendered conversation, and its landmarks where somebody remembers them.
fn in_tokens(
    model: &ServedModel,
    conversation: &Conversation<'_>,
    text: &str,
) -> Result<(Prompt, Landmarks), PipelineError> {
    let tokenizer = tokenizer(model)?;
    if text.len() < landmarks::PROMPT_BYTES_MIN || !model.handle.capabilities().prefix_reuse {
        return Ok((checked(model, tokenizer.encode(text, false)?)?, Landmarks::default()));
    }
    let (ids, ends) = tokenizer.encode_with_ends(text, false)?;
    let prompt = checked(model, ids)?;
    let Value::Array(messages) = &conversation.messages else { return Ok((prompt, Landmarks::default())) };
    let render = |messages| conversation.render(&Value::Array(messages), false).ok();
    Ok((prompt, landmarks::find(messages, conversation.tools.is_some(), text, &ends, render)))
}

/// The engine checks again; here the error comes before a place in its queue is taken.
fn checked(model: &ServedModel, ids: Vec<u32>) -> Result<Prompt, PipelineError> {
    if ids.is_empty() {
        return Err(SubmitError::Empty.into());
    }
    let max = model.handle.capabilities().context_tokens_max;
    let prompt = u32::try_from(ids.len()).unwrap_or(u32::MAX);
    if prompt >= max {
        return Err(SubmitError::TooLong { prompt, max }.into());
    }
    if let Some(vocab_size) = model.profile.vocab_size.as_ref().map(|fact| fact.value)
        && let Some(&id) = ids.iter().find(|id| **id >= vocab_size)
    {
        return Err(SubmitError::UnknownToken { id, vocab_size }.into());
    }
    Ok(Prompt::Tokens(ids))
}

/// A conversation and everything its template sees beside the messages, so that others can be rendered like it.
struct Conversation<'a> {
    template: &'a Template,
    messages: Value,
    tools: Option<Value>,
    kwargs: Map<String, Value>,
    bos: Option<&'a str>,
    eos: Option<&'a str>,
    now: NaiveDateTime,
}

impl<'a> Conversation<'a> {
    fn of(model: &'a ServedModel, chat: Chat) -> Result<Self, PipelineError> {
        let (dialect, tools) = (model.dialect, !chat.tools.is_empty());
        if tools && !dialect.tools() {
            return Err(PipelineError::NoTools { dialect: dialect.id() });
        }
        let mut kwargs = chat.kwargs;
        if let Some(effort) = chat.effort {
            let (name, value) = switch(model.thinking, effort)?;
            kwargs.insert(name.to_owned(), value);
        }
        let mut messages =
            serde_json::to_value(&chat.messages).map_err(|error| TemplateError::Failed { what: error.to_string() })?;
        messages.as_array_mut().into_iter().flatten().for_each(name_reasoning);
        Ok(Self {
            template: model.template(tools)?,
            messages,
            tools: tools.then_some(Value::Array(chat.tools)),
            kwargs,
            bos: model.profile.bos_token.as_ref().map(|fact| fact.value.as_str()),
            eos: model.profile.eos_token.as_ref().map(|fact| fact.value.as_str()),
            now: chrono::Local::now().naive_local(),
        })
    }

    fn render(&self, messages: &Value, add_generation_prompt: bool) -> Result<String, TemplateError> {
        let given = with_content(messages, || self.template.takes_no_content());
        self.template.render(&TemplateInput {
            messages: &given,
            tools: self.tools.as_ref(),
            add_generation_prompt,
            bos_token: self.bos,
            eos_token: self.eos,
            kwargs: &self.kwargs,
            now: self.now,
        })
    }
}

/// The messages with empty text where calls stand without any, if the template cannot be given none.
fn with_content(messages: &Value, takes_no_content: impl FnOnce() -> bool) -> Cow<'_, Value> {
    let bare =
        |message: &Value| message.get("tool_calls").is_some() && message.get("content").is_none_or(Value::is_null);
    let Some(all) = messages.as_array().filter(|all| all.iter().any(bare)) else { return Cow::Borrowed(messages) };
    if takes_no_content() {
        return Cow::Borrowed(messages);
    }
    let mut all = all.clone();
    for message in all.iter_mut().filter(|message| bare(message)) {
        message["content"] = "".into();
    }
    Cow::Owned(all.into())
}

/// Gives the reasoning of a message all the names that templates read it by. Each reads one of them.
fn name_reasoning(message: &mut Value) {
    let Some(message) = message.as_object_mut() else { return };
    let Some(reasoning) = message.get("reasoning_content").cloned() else { return };
    message.insert("reasoning".into(), reasoning.clone());
    // gpt-oss's template refuses this beside content where there are calls.
    let content = message.get("content").and_then(Value::as_str).is_some_and(|content| !content.is_empty());
    if !content || !message.contains_key("tool_calls") {
        message.insert("thinking".into(), reasoning);
    }
}

/// The template variable that a wish for more or less reasoning comes down to. A model that knows on and off only
/// takes every level but `none` as on.
fn switch(thinking: Thinking, effort: Effort) -> Result<(&'static str, Value), PipelineError> {
    match (thinking, effort) {
        (Thinking::Variable(name), Effort::Switch(on)) => Ok((name, on.into())),
        (Thinking::Variable(name), Effort::Level(level)) => Ok((name, (level != "none").into())),
        (Thinking::Effort(name), Effort::Level(level)) => Ok((name, level.into())),
        (Thinking::Effort(name), Effort::Switch(_)) => Err(PipelineError::NoSwitch {
            field: "enable_thinking",
            why: format!("has levels of reasoning rather than a switch; use `{name}`"),
        }),
        (Thinking::Fixed, effort) => Err(PipelineError::NoSwitch {
            field: match effort {
                Effort::Switch(_) => "enable_thinking",
                Effort::Level(_) => "reasoning_effort",
            },
            why: "has no switch for reasoning".into(),
        }),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn reasoning_in_the_history_has_the_name_that_the_template_reads() {
        let names = |mut message: Value| {
            name_reasoning(&mut message);
            ["reasoning_content", "reasoning", "thinking"]
                .map(|name| message.get(name).is_some_and(|text| text == "hm"))
        };
        assert_eq!(names(json!({"content": "a", "reasoning_content": "hm"})), [true, true, true]);
        assert_eq!(names(json!({"content": null, "reasoning_content": "hm", "tool_calls": [1]})), [true, true, true]);
        assert_eq!(names(json!({"content": "a", "reasoning_content": "hm", "tool_calls": [1]})), [true, true, false]);
        assert_eq!(names(json!({"content": "a"})), [false, false, false]);
    }

    #[test]
    fn calls_without_text_have_empty_text_where_a_template_needs_some() {
        let messages = json!([
            { "role": "assistant", "content": null, "tool_calls": [1] },
            { "role": "assistant", "tool_calls": [1] },
            { "role": "assistant", "content": "a", "tool_calls": [1] },
            { "role": "assistant", "content": null },
        ]);
        let contents = |given: Cow<'_, Value>| -> Vec<Value> {
            given.as_array().unwrap().iter().map(|message| message["content"].clone()).collect()
        };
        assert_eq!(contents(with_content(&messages, || false)), [json!(""), json!(""), json!("a"), Value::Null]);
        assert_eq!(*with_content(&messages, || true), messages);
        let spoken = json!([{ "role": "user", "content": "a" }]);
        assert_eq!(*with_content(&spoken, || panic!("nobody needs to know")), spoken);
    }

    #[test]
    fn a_wish_for_reasoning_becomes_the_familys_variable() {
        let level = |level: &str| Effort::Level(level.into());
        let variable = Thinking::Variable("enable_thinking");
        assert_eq!(switch(variable, Effort::Switch(false)).unwrap(), ("enable_thinking", false.into()));
        assert_eq!(switch(variable, level("none")).unwrap(), ("enable_thinking", false.into()));
        assert_eq!(switch(variable, level("low")).unwrap(), ("enable_thinking", true.into()));
        let effort = Thinking::Effort("reasoning_effort");
        assert_eq!(switch(effort, level("high")).unwrap(), ("reasoning_effort", "high".into()));
        assert!(switch(effort, Effort::Switch(true)).unwrap_err().to_string().contains("use `reasoning_effort`"));
        for (wish, named) in [(Effort::Switch(true), "enable_thinking"), (level("low"), "reasoning_effort")] {
            let Err(PipelineError::NoSwitch { field, .. }) = switch(Thinking::Fixed, wish) else { panic!() };
            assert_eq!(field, named);
        }
    }
}
