//! Messages and tools as they come over the wire, and their way into [`mesh_core::chat`].

use std::fmt;

use mesh_core::chat::{FunctionCall, Message, ToolCall};
use serde::{Deserialize, Deserializer, de};
use serde_json::Value;

use super::{BadRequest, bad_request::brief};

/// A message of a request.
#[derive(Clone, Debug, Default, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a message object")]
#[allow(missing_docs)]
pub struct WireMessage {
    #[schemars(required, extend("enum" = ["system", "developer", "user", "assistant", "tool"]))]
    pub role: Option<String>,
    pub content: Option<Content>,
    pub name: Option<String>,
    pub reasoning_content: Option<String>,
    /// Another name of `reasoning_content`.
    pub reasoning: Option<String>,
    pub tool_calls: Option<Vec<WireCall>>,
    pub tool_call_id: Option<String>,
    pub refusal: Option<String>,
    #[schemars(length(max = 0))]
    pub annotations: Option<Vec<Value>>,
    #[schemars(skip)]
    pub audio: Option<Value>,
    #[schemars(skip)]
    pub function_call: Option<Value>,
    /// What was said of an earlier answer. Clients hand it back with the message.
    pub warnings: Option<Vec<Value>>,
}

/// Text, or parts that are text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// A string.
    Text(String),
    /// A list of typed parts.
    Parts(Vec<Part>),
}

/// One part of a message.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(expecting = "a content part object")]
#[allow(missing_docs)]
pub struct Part {
    #[serde(rename = "type")]
    #[schemars(extend("const" = "text"))]
    pub kind: String,
    #[schemars(required)]
    pub text: Option<String>,
    /// Anthropic's, which clients send to any server.
    pub cache_control: Option<CacheControl>,
    /// What other types of parts carry.
    #[serde(flatten)]
    pub rest: serde_json::Map<String, Value>,
}

/// Says that a prompt may be remembered up to here. Accepted and put to no use: beginnings are remembered without.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a cache control object")]
#[allow(missing_docs, dead_code)]
pub struct CacheControl {
    #[serde(rename = "type")]
    kind: Ephemeral,
    ttl: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Eq, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "lowercase")]
enum Ephemeral {
    Ephemeral,
}

impl<'de> Deserialize<'de> for Content {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Visitor;
        impl<'de> de::Visitor<'de> for Visitor {
            type Value = Content;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string or a list of content parts")
            }

            fn visit_str<E: de::Error>(self, text: &str) -> Result<Content, E> {
                Ok(Content::Text(text.to_owned()))
            }

            fn visit_string<E: de::Error>(self, text: String) -> Result<Content, E> {
                Ok(Content::Text(text))
            }

            fn visit_seq<A: de::SeqAccess<'de>>(self, seq: A) -> Result<Content, A::Error> {
                Vec::deserialize(de::value::SeqAccessDeserializer::new(seq)).map(Content::Parts)
            }
        }
        deserializer.deserialize_any(Visitor)
    }
}

/// A tool call that the assistant made earlier.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a tool call object")]
#[allow(missing_docs)]
pub struct WireCall {
    pub id: String,
    #[serde(rename = "type")]
    pub kind: Option<String>,
    pub function: WireFunctionCall,
    /// Clients that put streamed chunks back together keep it.
    pub index: Option<u32>,
}

/// What a tool call calls.
#[derive(Clone, Debug, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, expecting = "an object with `name` and `arguments`")]
pub struct WireFunctionCall {
    /// The function.
    pub name: String,
    /// A JSON object, as text.
    pub arguments: String,
}

/// Checks and translates the messages of a request.
pub fn messages(wire: Vec<WireMessage>) -> Result<Vec<Message>, BadRequest> {
    if wire.is_empty() {
        return Err(BadRequest::value("messages", "has to have at least one message"));
    }
    wire.into_iter().enumerate().map(|(index, wire)| message(&format!("messages[{index}]"), wire)).collect()
}

fn message(path: &str, wire: WireMessage) -> Result<Message, BadRequest> {
    let role = wire.role.ok_or_else(|| BadRequest::missing(format!("{path}.role")))?;
    if !matches!(role.as_str(), "system" | "developer" | "user" | "assistant" | "tool") {
        let what = "has to be system, developer, user, assistant or tool";
        return Err(BadRequest::value(format!("{path}.role"), what));
    }
    for (name, set) in [("audio", wire.audio.is_some()), ("function_call", wire.function_call.is_some())] {
        if set {
            return Err(BadRequest::unsupported(format!("{path}.{name}"), "only text and tool calls are"));
        }
    }
    if wire.annotations.as_ref().is_some_and(|annotations| !annotations.is_empty()) {
        return Err(BadRequest::unsupported(format!("{path}.annotations"), "only text and tool calls are"));
    }
    let calls = wire.tool_calls.unwrap_or_default();
    if !calls.is_empty() && role != "assistant" {
        return Err(BadRequest::value(format!("{path}.tool_calls"), "belongs to messages of the assistant"));
    }
    if role == "tool" && wire.tool_call_id.is_none() {
        return Err(BadRequest::missing(format!("{path}.tool_call_id")));
    }
    let content = match wire.content {
        Some(content) => Some(text(path, content)?),
        // A refusal is what the assistant said instead.
        None => wire.refusal,
    };
    if content.is_none() && calls.is_empty() {
        return Err(BadRequest::missing(format!("{path}.content")));
    }
    let reasoning_content = match (wire.reasoning_content, wire.reasoning) {
        (Some(one), Some(other)) if one != other => {
            let what = "contradicts `reasoning_content`; give one of them";
            return Err(BadRequest::value(format!("{path}.reasoning"), what));
        }
        (one, other) => one.or(other),
    };
    let tool_calls =
        calls.into_iter().enumerate().map(|(index, wire)| call(&format!("{path}.tool_calls[{index}]"), wire));
    Ok(Message {
        role,
        content,
        name: wire.name,
        reasoning_content,
        tool_calls: tool_calls.collect::<Result<_, _>>()?,
        tool_call_id: wire.tool_call_id,
    })
}

/// Text parts belong together as they stand: nothing is put between them.
fn text(path: &str, content: Content) -> Result<String, BadRequest> {
    let parts = match content {
        Content::Text(text) => return Ok(text),
        Content::Parts(parts) => parts,
    };
    let mut whole = String::new();
    for (index, part) in parts.into_iter().enumerate() {
        let path = format!("{path}.content[{index}]");
        if part.kind != "text" {
            let why = format!("it is of type `{}`, and only text can be read", brief(&part.kind));
            return Err(BadRequest::unsupported(path, why));
        }
        if let Some((name, _)) = part.rest.iter().find(|(_, value)| !value.is_null()) {
            return Err(BadRequest::Unknown { param: format!("{path}.{}", brief(name)) });
        }
        whole.push_str(&part.text.ok_or_else(|| BadRequest::missing(format!("{path}.text")))?);
    }
    Ok(whole)
}

fn call(path: &str, wire: WireCall) -> Result<ToolCall, BadRequest> {
    if wire.kind.as_deref().is_some_and(|kind| kind != "function") {
        return Err(BadRequest::value(format!("{path}.type"), "has to be function"));
    }
    let arguments = match serde_json::from_str(&wire.function.arguments) {
        Ok(arguments @ Value::Object(_)) => arguments,
        _ => {
            return Err(BadRequest::value(format!("{path}.function.arguments"), "has to be the text of a JSON object"));
        }
    };
    Ok(ToolCall {
        id: wire.id,
        kind: "function".into(),
        function: FunctionCall { name: wire.function.name, arguments },
    })
}

/// Checks the shape of `tools`, which templates get as they came.
pub fn tools(tools: &[Value]) -> Result<(), BadRequest> {
    for (index, tool) in tools.iter().enumerate() {
        let path = format!("tools[{index}]");
        if tool.get("type").and_then(Value::as_str) != Some("function") {
            return Err(BadRequest::unsupported(format!("{path}.type"), "it has to be `function`"));
        }
        let name = tool.pointer("/function/name").and_then(Value::as_str).unwrap_or_default();
        if name.is_empty() {
            return Err(BadRequest::missing(format!("{path}.function.name")));
        }
        if tool.pointer("/function/parameters").is_some_and(|schema| !schema.is_object() && !schema.is_null()) {
            return Err(BadRequest::value(format!("{path}.function.parameters"), "has to be a JSON schema object"));
        }
    }
    Ok(())
}
