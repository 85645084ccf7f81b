//! From a conversation or a text to what an engine takes.

use std::sync::Arc;

use mesh_core::{Prompt, PromptForm, SubmitError, Thinking};
use mesh_text::{DialectParser, ParserContext, TemplateInput};
use serde_json::Value;

use super::{Chat, Effort, PipelineError, Subject};
use crate::served::ServedModel;

/// A prompt and what reads its answer.
pub struct Prepared {
    /// For the engine.
    pub prompt: Prompt,
    /// Absent for text completions, whose answers are text as it comes.
    pub reader: Option<Reader>,
}

/// What reads the answer to a conversation.
pub struct Reader {
    /// Tells reasoning, content and tool calls apart.
    pub parser: Box<dyn DialectParser>,
    /// Special tokens that it has to see.
    pub markers: &'static [&'static str],
}

/// Renders and tokenizes, away from the threads that serve connections: a long prompt takes its time.
pub async fn prepare(model: &Arc<ServedModel>, subject: Subject) -> Result<Prepared, PipelineError> {
    let _permit = model.preparing.acquire().await;
    let model = model.clone();
    tokio::task::spawn_blocking(move || prepare_now(&model, subject)).await.unwrap_or(Err(PipelineError::Panicked))
}

fn prepare_now(model: &ServedModel, subject: Subject) -> Result<Prepared, PipelineError> {
    match subject {
        // A rendered template writes its own begin-of-text token; raw text gets it from the tokenizer.
        Subject::Chat(chat) => {
            let (text, reader) = render(model, chat)?;
            Ok(Prepared { prompt: in_form(model, text, false)?, reader: Some(reader) })
        }
        Subject::Text(text) => Ok(Prepared { prompt: in_form(model, text, true)?, reader: None }),
        Subject::Tokens(ids) => Ok(Prepared { prompt: checked(model, ids)?, reader: None }),
    }
}

fn in_form(model: &ServedModel, text: String, add_special: bool) -> Result<Prompt, PipelineError> {
    match model.handle.capabilities().prompt {
        PromptForm::Text => Ok(Prompt::Text { text, add_special }),
        PromptForm::Tokens => {
            let tokenizer = model.tokenizer.as_ref().ok_or(PipelineError::NoTokenizer)?;
            checked(model, tokenizer.encode(&text, add_special)?)
        }
    }
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

fn render(model: &ServedModel, chat: Chat) -> Result<(String, Reader), PipelineError> {
    let tools = !chat.tools.is_empty();
    if tools && !model.dialect.tools() {
        return Err(PipelineError::NoTools { dialect: model.dialect.id() });
    }
    let mut kwargs = chat.kwargs;
    if let Some(effort) = chat.effort {
        let (name, value) = switch(model.thinking, effort)?;
        kwargs.insert(name.to_owned(), value);
    }
    let template = model.template(tools)?;
    let messages = serde_json::to_value(&chat.messages)
        .map_err(|error| mesh_core::TemplateError::Failed { what: error.to_string() })?;
    let tools_value = tools.then_some(Value::Array(chat.tools));
    let token = |fact: &Option<mesh_core::Fact<String>>| fact.as_ref().map(|fact| fact.value.clone());
    let (bos, eos) = (token(&model.profile.bos_token), token(&model.profile.eos_token));
    let text = template.render(&TemplateInput {
        messages: &messages,
        tools: tools_value.as_ref(),
        add_generation_prompt: true,
        bos_token: bos.as_deref(),
        eos_token: eos.as_deref(),
        kwargs: &kwargs,
        now: chrono::Local::now().naive_local(),
    })?;
    let context = ParserContext { prompt_opens_reasoning: model.dialect.opens_reasoning(&text), tools };
    let reader = Reader { parser: model.dialect.parser(&context), markers: model.dialect.markers(&context) };
    Ok((text, reader))
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
    use super::*;

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
