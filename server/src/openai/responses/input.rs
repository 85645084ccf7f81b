//! The items of a request, and their way into [`mesh_core::chat`].

use base64::{Engine, prelude::BASE64_STANDARD};
use mesh_core::chat::{FunctionCall, Message, ToolCall};
use schemars::{JsonSchema, json_schema};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::openai::{
    BadRequest,
    bad_request::{brief, element, kind},
    schema::schema,
};

/// A text, or a list of items.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct Input(pub Value);

schema!(Input, "ResponsesInput", |generator| {
    let items = [
        generator.subschema_for::<MessageItem>(),
        generator.subschema_for::<CallItem>(),
        generator.subschema_for::<OutputItem>(),
        generator.subschema_for::<ReasoningItem>(),
    ];
    json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": { "anyOf": items } }] })
});

/// `message`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a message item")]
#[allow(missing_docs)]
pub struct MessageItem {
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub id: Option<String>,
    /// `user`, `assistant`, `system` or `developer`.
    pub role: Option<String>,
    /// A text, or a list of parts that are text.
    pub content: Option<Value>,
    pub status: Option<String>,
    pub phase: Option<String>,
}

/// `function_call`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a function_call item")]
#[schemars(rename = "FunctionCallItem")]
#[allow(missing_docs)]
pub struct CallItem {
    #[serde(rename = "type")]
    pub kind: String,
    pub id: Option<String>,
    pub call_id: String,
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
    pub status: Option<String>,
}

/// `function_call_output`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a function_call_output item")]
#[schemars(rename = "FunctionCallOutputItem")]
#[allow(missing_docs)]
pub struct OutputItem {
    #[serde(rename = "type")]
    pub kind: String,
    pub id: Option<String>,
    pub call_id: String,
    /// A text, or a list of parts that are text.
    pub output: Value,
    pub status: Option<String>,
}

/// `reasoning`, as it was answered.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a reasoning item")]
#[schemars(rename = "ReasoningInputItem")]
#[allow(missing_docs)]
pub struct ReasoningItem {
    #[serde(rename = "type")]
    pub kind: String,
    pub id: Option<String>,
    pub summary: Option<Vec<TextPart>>,
    pub content: Option<Vec<TextPart>>,
    pub encrypted_content: Option<String>,
    pub status: Option<String>,
}

/// A part of text.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a text part")]
#[schemars(rename = "ResponsesTextPart")]
#[allow(missing_docs)]
pub struct TextPart {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: String,
    /// As in answers: accepted, and not read.
    pub annotations: Option<Vec<Value>>,
    /// As in answers: accepted, and not read.
    pub logprobs: Option<Vec<Value>>,
}

/// What opens reasoning that was handed out for safe keeping.
const SEAL: &str = "mesh-llm reasoning ";

/// Reasoning in a form that clients hand back without looking into it.
pub fn seal(reasoning: &str) -> String {
    BASE64_STANDARD.encode(format!("{SEAL}{reasoning}"))
}

fn unseal(sealed: &str) -> Option<String> {
    let text = String::from_utf8(BASE64_STANDARD.decode(sealed).ok()?).ok()?;
    Some(text.strip_prefix(SEAL)?.to_owned())
}

/// What was said, as messages, and as items to be shown again.
pub fn read(input: Input, id: &str) -> Result<(Vec<Message>, Vec<Value>), BadRequest> {
    let items = match input.0 {
        Value::String(text) => vec![json!({ "type": "message", "role": "user", "content": text })],
        Value::Array(items) => items,
        other => {
            let what = format!("found {}, expected a string or a list of items", kind(&other));
            return Err(BadRequest::Type { param: "input".into(), what });
        }
    };
    let (mut messages, mut shown) = (Messages::default(), Vec::new());
    for (index, mut item) in items.into_iter().enumerate() {
        let path = format!("input[{index}]");
        let Value::Object(fields) = &mut item else {
            return Err(BadRequest::Type { param: path, what: format!("found {}, expected an item", kind(&item)) });
        };
        let kind = match fields.get("type") {
            None | Some(Value::Null) => "message".to_owned(),
            Some(Value::String(kind)) => kind.clone(),
            Some(_) => return Err(BadRequest::value(format!("{path}.type"), "has to be a string")),
        };
        // Read as it came, shown complete.
        let read = item.clone();
        if let Value::Object(fields) = &mut item {
            fields.insert("type".into(), kind.clone().into());
            fields.entry("id").or_insert_with(|| format!("item_{id}_{index}").into());
            if let Some(Value::String(text)) = fields.get("content") {
                let part = if fields.get("role").is_some_and(|role| role == "assistant") { "output" } else { "input" };
                let parts = json!([{ "type": format!("{part}_text"), "text": text }]);
                fields.insert("content".into(), parts);
            }
        }
        shown.push(item);
        match kind.as_str() {
            "message" => messages.message(&path, element(&path, read)?)?,
            "function_call" => messages.call(&path, element(&path, read)?)?,
            "function_call_output" => messages.output(&path, element(&path, read)?)?,
            "reasoning" => messages.reasoning(&path, element(&path, read)?)?,
            kind => {
                let why = format!(
                    "it is of type `{}`; message, function_call, function_call_output and reasoning can be read",
                    brief(kind)
                );
                return Err(BadRequest::unsupported(path, why));
            }
        }
    }
    Ok((messages.end(), shown))
}

/// Items of one turn of the assistant become one message.
#[derive(Default)]
struct Messages {
    done: Vec<Message>,
    turn: Option<Message>,
}

impl Messages {
    fn turn(&mut self) -> &mut Message {
        self.turn.get_or_insert_with(|| Message { role: "assistant".into(), ..Message::default() })
    }

    fn flush(&mut self) {
        if let Some(mut turn) = self.turn.take() {
            if turn.content.is_none() && turn.tool_calls.is_empty() {
                turn.content = Some(String::new());
            }
            self.done.push(turn);
        }
    }

    fn end(mut self) -> Vec<Message> {
        self.flush();
        self.done
    }

    fn message(&mut self, path: &str, item: MessageItem) -> Result<(), BadRequest> {
        let role = item.role.ok_or_else(|| BadRequest::missing(format!("{path}.role")))?;
        let content = item.content.ok_or_else(|| BadRequest::missing(format!("{path}.content")))?;
        let content = text(&format!("{path}.content"), content)?;
        match role.as_str() {
            "assistant" => {
                // What follows calls is another turn.
                if self.turn.as_ref().is_some_and(|turn| turn.content.is_some() || !turn.tool_calls.is_empty()) {
                    self.flush();
                }
                self.turn().content = Some(content);
            }
            "user" | "system" | "developer" => {
                self.flush();
                self.done.push(Message { role, content: Some(content), ..Message::default() });
            }
            _ => {
                let what = "has to be user, assistant, system or developer";
                return Err(BadRequest::value(format!("{path}.role"), what));
            }
        }
        Ok(())
    }

    fn call(&mut self, path: &str, item: CallItem) -> Result<(), BadRequest> {
        let Ok(arguments @ Value::Object(_)) = serde_json::from_str(&item.arguments) else {
            return Err(BadRequest::value(format!("{path}.arguments"), "has to be the text of a JSON object"));
        };
        let function = FunctionCall { name: item.name, arguments };
        self.turn().tool_calls.push(ToolCall { id: item.call_id, kind: "function".into(), function });
        Ok(())
    }

    fn output(&mut self, path: &str, item: OutputItem) -> Result<(), BadRequest> {
        self.flush();
        self.done.push(Message {
            role: "tool".into(),
            content: Some(text(&format!("{path}.output"), item.output)?),
            tool_call_id: Some(item.call_id),
            ..Message::default()
        });
        Ok(())
    }

    fn reasoning(&mut self, path: &str, item: ReasoningItem) -> Result<(), BadRequest> {
        let parts =
            |parts: Option<Vec<TextPart>>| -> String { parts.into_iter().flatten().map(|part| part.text).collect() };
        let mut reasoning = parts(item.content);
        if reasoning.is_empty()
            && let Some(sealed) = item.encrypted_content
        {
            reasoning = unseal(&sealed).ok_or_else(|| {
                BadRequest::value(format!("{path}.encrypted_content"), "was not handed out by this server")
            })?;
        }
        if reasoning.is_empty() {
            reasoning = parts(item.summary);
        }
        if self.turn.as_ref().is_some_and(|turn| turn.content.is_some() || !turn.tool_calls.is_empty()) {
            self.flush();
        }
        self.turn().reasoning_content.get_or_insert_default().push_str(&reasoning);
        Ok(())
    }
}

/// Parts of text belong together as they stand: nothing is put between them.
fn text(path: &str, content: Value) -> Result<String, BadRequest> {
    let parts = match content {
        Value::String(text) => return Ok(text),
        Value::Array(parts) => parts,
        other => {
            let what = format!("found {}, expected a string or a list of content parts", kind(&other));
            return Err(BadRequest::Type { param: path.to_owned(), what });
        }
    };
    let mut whole = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}[{index}]");
        match part.get("type").and_then(Value::as_str) {
            Some("input_text" | "output_text" | "text") => whole.push_str(&element::<TextPart>(&path, part)?.text),
            Some("refusal") => whole.push_str(part.get("refusal").and_then(Value::as_str).unwrap_or_default()),
            Some(kind) => {
                let why = format!("it is of type `{}`, and only text can be read", brief(kind));
                return Err(BadRequest::unsupported(path, why));
            }
            None if part.is_object() => return Err(BadRequest::missing(format!("{path}.type"))),
            None => {
                let what = format!("found {}, expected a content part object", kind(&part));
                return Err(BadRequest::Type { param: path, what });
            }
        }
    }
    Ok(whole)
}
