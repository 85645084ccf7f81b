//! Tool calls written as JSON.

use serde_json::{Map, Value};

/// Reads `{"name": …, "arguments": {…}}`; `parameters` is taken for `arguments`, and arguments may be absent, or be
/// JSON inside a string, as some models write them. Returns the name and the arguments as the text of a JSON object.
pub fn read(json: &str) -> Option<(String, String)> {
    read_value(serde_json::from_str(json).ok()?)
}

/// Reads several calls, one after the other, separated by white space or `;`.
pub fn read_all(text: &str) -> Option<Vec<(String, String)>> {
    let mut calls = Vec::new();
    let mut rest = text.trim();
    while !rest.is_empty() {
        let mut values = serde_json::Deserializer::from_str(rest).into_iter::<Value>();
        calls.push(read_value(values.next()?.ok()?)?);
        rest = rest[values.byte_offset()..].trim_start_matches(|c: char| c == ';' || c.is_whitespace());
    }
    (!calls.is_empty()).then_some(calls)
}

/// Reads one call, or a list of several.
pub fn read_list(json: &str) -> Option<Vec<(String, String)>> {
    match serde_json::from_str(json).ok()? {
        Value::Array(calls) => calls.into_iter().map(read_value).collect(),
        call => Some(vec![read_value(call)?]),
    }
}

/// Reads arguments: a JSON object.
pub fn read_arguments(json: &str) -> Option<String> {
    Some(Value::Object(serde_json::from_str::<Map<String, Value>>(json).ok()?).to_string())
}

fn read_value(value: Value) -> Option<(String, String)> {
    let Value::Object(mut call) = value else { return None };
    let name = match call.get("name") {
        Some(Value::String(name)) if !name.is_empty() => name.clone(),
        _ => return None,
    };
    let arguments = match call.remove("arguments").or_else(|| call.remove("parameters")) {
        Some(Value::Object(arguments)) => arguments,
        Some(Value::String(text)) => serde_json::from_str::<Map<String, Value>>(&text).ok()?,
        Some(Value::Null) | None => Map::new(),
        Some(_) => return None,
    };
    Some((name, Value::Object(arguments).to_string()))
}

#[cfg(test)]
mod tests {
    use super::{read, read_all, read_list};

    #[test]
    fn reads_the_forms_models_write() {
        let call = |name: &str, arguments: &str| Some((name.to_owned(), arguments.to_owned()));
        assert_eq!(read(r#" {"name": "f", "arguments": {"b": 1, "a": "é"}} "#), call("f", r#"{"b":1,"a":"é"}"#));
        assert_eq!(read(r#"{"name": "f", "parameters": {}}"#), call("f", "{}"));
        assert_eq!(read(r#"{"name": "f"}"#), call("f", "{}"));
        assert_eq!(read(r#"{"name": "f", "arguments": "{\"a\": 1}"}"#), call("f", r#"{"a":1}"#));
        for bad in ["", "{", "[]", r#"{"name": 1}"#, r#"{"name": ""}"#, r#"{"name": "f", "arguments": [1]}"#] {
            assert_eq!(read(bad), None, "{bad}");
        }
        assert_eq!(read(&"[".repeat(100_000)), None);
        assert_eq!(read_all(r#"{"name": "f"}; {"name": "g"}"#).map(|calls| calls.len()), Some(2));
        assert_eq!(read_all(r#"{"name": "f"} and"#), None);
        assert_eq!(read_all(" "), None);
        assert_eq!(read_list(r#"[{"name": "f"}, {"name": "g"}]"#).map(|calls| calls.len()), Some(2));
        assert_eq!(read_list(r#"{"name": "f"}"#).map(|calls| calls.len()), Some(1));
        assert_eq!(read_list(r#"[{"name": "f"}, 1]"#), None);
    }
}
