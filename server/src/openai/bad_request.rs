//! What can be wrong with a request. Each names the field and says what was expected.

use serde::de::DeserializeOwned;
use serde_json::Value;

/// A request that cannot be honoured as it stands.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum BadRequest {
    /// The body is not JSON.
    #[error("the body is not valid JSON: {what}")]
    Json {
        /// Where and why.
        what: String,
    },
    /// A field nobody knows.
    #[error("unknown parameter: `{param}`")]
    Unknown {
        /// Its name with its path.
        param: String,
    },
    /// A field that is known and not supported.
    #[error("`{param}` is not supported: {why}")]
    Unsupported {
        /// Its name with its path.
        param: String,
        /// Why, or what is supported instead.
        why: String,
    },
    /// A field of the wrong type.
    #[error("`{param}`: {what}")]
    Type {
        /// Its name with its path.
        param: String,
        /// What was found and what was expected.
        what: String,
    },
    /// A field of the right type with a value that is not possible.
    #[error("`{param}` {what}")]
    Value {
        /// Its name with its path.
        param: String,
        /// What is possible.
        what: String,
    },
    /// A field that has to be there.
    #[error("`{param}` is missing")]
    Missing {
        /// Its name.
        param: String,
    },
}

impl BadRequest {
    /// The field it is about.
    pub fn param(&self) -> Option<&str> {
        match self {
            Self::Json { .. } => None,
            Self::Unknown { param }
            | Self::Unsupported { param, .. }
            | Self::Type { param, .. }
            | Self::Value { param, .. }
            | Self::Missing { param } => Some(param),
        }
    }

    /// A word for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Json { .. } => "invalid_json",
            Self::Unknown { .. } => "unknown_parameter",
            Self::Unsupported { .. } => "unsupported_parameter",
            Self::Type { .. } => "invalid_type",
            Self::Value { .. } => "invalid_value",
            Self::Missing { .. } => "missing_required_parameter",
        }
    }

    pub(crate) fn unsupported(param: impl Into<String>, why: impl Into<String>) -> Self {
        Self::Unsupported { param: param.into(), why: why.into() }
    }

    pub(crate) fn value(param: impl Into<String>, what: impl Into<String>) -> Self {
        Self::Value { param: param.into(), what: what.into() }
    }

    pub(crate) fn missing(param: impl Into<String>) -> Self {
        Self::Missing { param: param.into() }
    }
}

/// Most characters of a parser's message that are repeated to the client: messages quote the value they found.
const MESSAGE_CHARS_MAX: usize = 200;

/// Reads a request. Errors name the field by its path, such as `messages[0].role`.
pub fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, BadRequest> {
    let mut reader = serde_json::Deserializer::from_slice(body);
    let request = serde_path_to_error::deserialize(&mut reader).map_err(|error| {
        let path = error.path().to_string();
        classify(&path, error.inner())
    })?;
    reader.end().map_err(|error| BadRequest::Json { what: error.to_string() })?;
    Ok(request)
}

/// Reads a part of a request that was read as a value before. Errors name the field with `path` before it.
pub(crate) fn element<T: DeserializeOwned>(path: &str, value: Value) -> Result<T, BadRequest> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let within = error.path().to_string();
        let path = match within.as_str() {
            "." => path.to_owned(),
            within if within.starts_with('[') => format!("{path}{within}"),
            within => format!("{path}.{within}"),
        };
        classify(&path, error.inner())
    })
}

/// A client's word, short enough to be repeated to it.
pub(crate) fn brief(word: &str) -> String {
    word.chars().take(40).collect()
}

/// The type of a value, for people.
pub(crate) fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "a list",
        Value::Object(_) => "an object",
    }
}

fn classify(path: &str, error: &serde_json::Error) -> BadRequest {
    if !error.is_data() {
        return BadRequest::Json { what: error.to_string() };
    }
    // serde_json appends the position, which says nothing to someone who sent a single line.
    let text = error.to_string();
    let text = text.rsplit_once(" at line ").map_or(text.as_str(), |(head, _)| head);
    let named = |prefix: &str| Some(text.strip_prefix(prefix)?.split('`').next()?.to_owned());
    if let Some(name) = named("unknown field `") {
        return BadRequest::Unknown { param: join(path, &name) };
    }
    if let Some(name) = named("missing field `") {
        return BadRequest::Missing { param: join(path, &name) };
    }
    if let Some(name) = named("duplicate field `") {
        return BadRequest::Value { param: join(path, &name), what: "is given twice".into() };
    }
    let param = if path == "." { "body".to_owned() } else { path.to_owned() };
    // A structure that is given as a list is read by position, and mostly too short.
    if text.starts_with("invalid length") {
        return BadRequest::Type { param, what: "expected an object".into() };
    }
    let (found, expected) = text.rsplit_once(", expected ").unwrap_or((text, ""));
    let (kind, found) = found.split_once(": ").unwrap_or(("", found));
    let found: String = found.chars().take(MESSAGE_CHARS_MAX).collect();
    let found = found_in_words(&found);
    let what = if expected.is_empty() { found } else { format!("{found}, expected {}", in_words(expected)) };
    match kind {
        "invalid value" => BadRequest::Value { param, what: format!("is {what}") },
        _ => BadRequest::Type { param, what: format!("found {what}") },
    }
}

/// The path of a field inside the object at `path`. The path may or may not name the field already.
fn join(path: &str, name: &str) -> String {
    match path {
        "." | "?" => name.to_owned(),
        path if path == name || path.ends_with(&format!(".{name}")) => path.to_owned(),
        path => format!("{}.{name}", path.trim_end_matches(".?")),
    }
}

/// Rust's names of types, for people.
fn in_words(expected: &str) -> &str {
    match expected {
        "f32" | "f64" => "a number",
        "u32" => "an integer between 0 and 4294967295",
        "u64" | "usize" => "an integer of 0 or more",
        "i32" | "i64" => "an integer",
        "a sequence" => "a list",
        "a map" => "an object",
        expected if expected.starts_with("struct ") => "an object",
        expected => expected,
    }
}

/// serde's names of what it found, for people.
fn found_in_words(found: &str) -> String {
    match found {
        "sequence" => "a list".into(),
        "map" => "an object".into(),
        found => found.replace("floating point", "number"),
    }
}
