//! Blocks of messages as they come over the wire, and their way into [`mesh_core::chat`].

use mesh_core::chat::{FunctionCall, Message, ToolCall};
use schemars::{JsonSchema, json_schema};
use serde::Deserialize;
use serde_json::{Map, Value};

use crate::openai::{
    BadRequest,
    bad_request::{brief, element, kind},
    message::CacheControl,
    schema::schema,
};

/// A message of a request.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a message object")]
#[schemars(rename = "AnthropicMessage")]
#[allow(missing_docs)]
pub struct WireMessage {
    #[schemars(required, extend("enum" = ["user", "assistant", "system"]))]
    pub role: Option<String>,
    #[schemars(required)]
    pub content: Option<Content>,
}

/// A text, or a list of blocks.
#[derive(Clone, Debug, Deserialize)]
#[serde(transparent)]
pub struct Content(Value);

schema!(Content, "AnthropicContent", |generator| {
    let mut block = generator.subschema_for::<TextBlock>();
    let others = [
        generator.subschema_for::<ThinkingBlock>(),
        generator.subschema_for::<ToolUseBlock>(),
        generator.subschema_for::<ToolResultBlock>(),
    ];
    block = json_schema!({ "anyOf": [block, others[0], others[1], others[2]] });
    json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": block }] })
});

/// `text`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a text block")]
#[allow(missing_docs)]
pub struct TextBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub text: String,
    pub cache_control: Option<CacheControl>,
    /// Only an empty list is possible: answers cite nothing.
    pub citations: Option<Vec<Value>>,
}

/// `thinking`, as it was answered.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a thinking block")]
#[allow(missing_docs)]
pub struct ThinkingBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub thinking: String,
    /// Accepted, and not looked into.
    pub signature: Option<String>,
}

/// `tool_use`, as it was answered.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a tool_use block")]
#[allow(missing_docs)]
pub struct ToolUseBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub id: String,
    pub name: String,
    pub input: Map<String, Value>,
    pub cache_control: Option<CacheControl>,
    /// Clients send back what they were given, and their own words for it.
    pub caller: Option<Caller>,
    /// Only null is possible: no tool here belongs to a set of tools.
    #[schemars(with = "()")]
    pub toolset_name: Option<String>,
}

/// Who made a call.
#[derive(Clone, Copy, Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "snake_case", deny_unknown_fields)]
pub enum Caller {
    /// The model itself.
    Direct,
}

/// `tool_result`.
#[derive(Clone, Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a tool_result block")]
#[allow(missing_docs)]
pub struct ToolResultBlock {
    #[serde(rename = "type")]
    pub kind: String,
    pub tool_use_id: String,
    pub content: Option<Content>,
    /// True puts `Error: ` in front of the result: templates have no other word for it.
    pub is_error: Option<bool>,
    pub cache_control: Option<CacheControl>,
}

impl Content {
    /// The text of blocks that are all text. They belong together as they stand: nothing is put between them.
    pub fn text(self, path: &str) -> Result<String, BadRequest> {
        let mut whole = String::new();
        for (path, kind, block) in self.blocks(path)? {
            match kind.as_str() {
                "text" => whole.push_str(&text(&path, block)?),
                kind => return Err(unsupported(path, kind, "only text can be read here")),
            }
        }
        Ok(whole)
    }

    /// The blocks with their paths and types; a text is one block.
    fn blocks(self, path: &str) -> Result<Vec<(String, String, Value)>, BadRequest> {
        let blocks = match self.0 {
            Value::String(text) => {
                return Ok(vec![(path.to_owned(), "text".into(), serde_json::json!({ "type": "text", "text": text }))]);
            }
            Value::Array(blocks) => blocks,
            other => {
                let what = format!("found {}, expected a string or a list of content blocks", kind(&other));
                return Err(BadRequest::Type { param: path.to_owned(), what });
            }
        };
        let typed = blocks.into_iter().enumerate().map(|(index, block)| {
            let path = format!("{path}[{index}]");
            let Value::Object(fields) = &block else {
                let what = format!("found {}, expected a content block object", kind(&block));
                return Err(BadRequest::Type { param: path, what });
            };
            let kind = fields.get("type").and_then(Value::as_str).map(str::to_owned);
            Ok((path.clone(), kind.ok_or_else(|| BadRequest::missing(format!("{path}.type")))?, block))
        });
        typed.collect()
    }
}

fn unsupported(path: String, kind: &str, why: &str) -> BadRequest {
    BadRequest::unsupported(path, format!("it is of type `{}`, and {why}", brief(kind)))
}

fn text(path: &str, block: Value) -> Result<String, BadRequest> {
    let block: TextBlock = element(path, block)?;
    if block.citations.is_some_and(|citations| !citations.is_empty()) {
        return Err(BadRequest::unsupported(format!("{path}.citations"), "only text is read"));
    }
    Ok(block.text)
}

/// Checks and translates the messages of a request. A message with results of tools becomes several.
pub fn messages(wire: Vec<WireMessage>) -> Result<Vec<Message>, BadRequest> {
    if wire.is_empty() {
        return Err(BadRequest::value("messages", "has to have at least one message"));
    }
    let last = wire.len() - 1;
    let mut messages = Vec::new();
    for (index, wire) in wire.into_iter().enumerate() {
        let path = format!("messages[{index}]");
        let role = wire.role.ok_or_else(|| BadRequest::missing(format!("{path}.role")))?;
        let content = wire.content.ok_or_else(|| BadRequest::missing(format!("{path}.content")))?;
        let blocks = content.blocks(&format!("{path}.content"))?;
        match role.as_str() {
            "user" => user(blocks, &mut messages)?,
            "assistant" if index == last => {
                let why = "an answer cannot be begun for the model; end with a message of the user";
                return Err(BadRequest::unsupported(path, why));
            }
            "assistant" => messages.push(assistant(&path, blocks)?),
            "system" => {
                let text = Content(blocks.into_iter().map(|(_, _, block)| block).collect());
                let content = Some(text.text(&format!("{path}.content"))?);
                messages.push(Message { role, content, ..Message::default() });
            }
            _ => return Err(BadRequest::value(format!("{path}.role"), "has to be user or assistant")),
        }
    }
    Ok(messages)
}

fn user(blocks: Vec<(String, String, Value)>, messages: &mut Vec<Message>) -> Result<(), BadRequest> {
    let mut said: Option<String> = None;
    let say = |said: &mut Option<String>, messages: &mut Vec<Message>| {
        if let Some(text) = said.take() {
            messages.push(Message { role: "user".into(), content: Some(text), ..Message::default() });
        }
    };
    let any = !blocks.is_empty();
    for (path, kind, block) in blocks {
        match kind.as_str() {
            "text" => said.get_or_insert_default().push_str(&text(&path, block)?),
            "tool_result" => {
                say(&mut said, messages);
                let block: ToolResultBlock = element(&path, block)?;
                let mut content = match block.content {
                    Some(content) => content.text(&format!("{path}.content"))?,
                    None => String::new(),
                };
                if block.is_error == Some(true) {
                    content.insert_str(0, "Error: ");
                }
                messages.push(Message {
                    role: "tool".into(),
                    content: Some(content),
                    tool_call_id: Some(block.tool_use_id),
                    ..Message::default()
                });
            }
            kind => return Err(unsupported(path, kind, "users' messages are text and results of tools")),
        }
    }
    if !any {
        said = Some(String::new());
    }
    say(&mut said, messages);
    Ok(())
}

fn assistant(path: &str, blocks: Vec<(String, String, Value)>) -> Result<Message, BadRequest> {
    let mut message = Message { role: "assistant".into(), ..Message::default() };
    for (path, kind, block) in blocks {
        match kind.as_str() {
            "text" => message.content.get_or_insert_default().push_str(&text(&path, block)?),
            "thinking" => {
                let block: ThinkingBlock = element(&path, block)?;
                message.reasoning_content.get_or_insert_default().push_str(&block.thinking);
            }
            "tool_use" => {
                let block: ToolUseBlock = element(&path, block)?;
                if block.toolset_name.is_some() {
                    return Err(BadRequest::unsupported(format!("{path}.toolset_name"), "there are no sets of tools"));
                }
                message.tool_calls.push(ToolCall {
                    id: block.id,
                    kind: "function".into(),
                    function: FunctionCall { name: block.name, arguments: Value::Object(block.input) },
                });
            }
            kind => return Err(unsupported(path, kind, "answers are text, thinking and calls of tools")),
        }
    }
    if message.content.is_none() && message.tool_calls.is_empty() {
        if message.reasoning_content.is_none() {
            return Err(BadRequest::value(format!("{path}.content"), "has to have at least one block"));
        }
        message.content = Some(String::new());
    }
    Ok(message)
}
