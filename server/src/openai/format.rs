//! What an answer has to be: `response_format`, and vLLM's `structured_outputs`.

use std::sync::Arc;

use mesh_core::Grammar;
use mesh_text::constraint::GRAMMAR_BYTES_MAX;
use serde_json::{Map, Value};

use super::BadRequest;

/// Most texts that `structured_outputs.choice` may hold.
pub const OPTIONS_MAX: usize = 1024;

/// What is asked for, in either form. Whether it can be enforced is seen where the model is known.
pub fn grammar(
    response_format: Option<&Value>,
    structured_outputs: Option<&Value>,
) -> Result<Option<Grammar>, BadRequest> {
    let format = response_format.map(of_format).transpose()?.flatten();
    let outputs = structured_outputs.map(of_outputs).transpose()?;
    match (format, outputs) {
        (Some(_), Some(_)) => Err(BadRequest::value("structured_outputs", "cannot go with `response_format`")),
        (format, outputs) => Ok(format.or(outputs)),
    }
}

fn of_format(format: &Value) -> Result<Option<Grammar>, BadRequest> {
    const PARAM: &str = "response_format";
    let format = object(PARAM, format)?;
    let kind = format.get("type").ok_or_else(|| BadRequest::missing("response_format.type"))?;
    match kind.as_str() {
        Some("text") => only(PARAM, format, &["type"]).map(|()| None),
        Some("json_object") => {
            only(PARAM, format, &["type", "schema"])?;
            match format.get("schema").filter(|schema| !schema.is_null()) {
                Some(schema) => schema_of("response_format.schema", schema).map(Some),
                None => Ok(Some(Grammar::JsonObject)),
            }
        }
        Some("json_schema") => {
            only(PARAM, format, &["type", "json_schema"])?;
            let named = format.get("json_schema").ok_or_else(|| BadRequest::missing("response_format.json_schema"))?;
            let param = "response_format.json_schema";
            let named = object(param, named)?;
            // A schema is enforced whether it says that it is strict or not.
            only(param, named, &["name", "description", "schema", "strict"])?;
            let path = "response_format.json_schema.schema";
            schema_of(path, named.get("schema").ok_or_else(|| BadRequest::missing(path))?).map(Some)
        }
        Some("regex") => {
            only(PARAM, format, &["type", "pattern"])?;
            text_of("response_format.pattern", format.get("pattern")).map(|pattern| Some(Grammar::Regex(pattern)))
        }
        Some("lark") => {
            only(PARAM, format, &["type", "grammar"])?;
            text_of("response_format.grammar", format.get("grammar")).map(|grammar| Some(Grammar::Lark(grammar)))
        }
        _ => Err(BadRequest::value("response_format.type", "has to be text, json_object, json_schema, regex or lark")),
    }
}

fn of_outputs(outputs: &Value) -> Result<Grammar, BadRequest> {
    const PARAM: &str = "structured_outputs";
    let outputs = object(PARAM, outputs)?;
    only(PARAM, outputs, &["json", "json_object", "regex", "choice", "grammar"])?;
    let mut given = outputs.iter().filter(|(_, value)| !value.is_null() && **value != Value::Bool(false));
    let one = || BadRequest::value(PARAM, "has to have one of json, json_object, regex, choice and grammar");
    let (Some((key, value)), None) = (given.next(), given.next()) else { return Err(one()) };
    let path = format!("{PARAM}.{key}");
    match key.as_str() {
        "json_object" if value == &Value::Bool(true) => Ok(Grammar::JsonObject),
        "json_object" => Err(BadRequest::value(path, "has to be a boolean")),
        "regex" => text_of(&path, Some(value)).map(Grammar::Regex),
        "grammar" => text_of(&path, Some(value)).map(Grammar::Lark),
        "choice" => choice(&path, value),
        // Some clients send the schema as text.
        _ => match value.as_str().map(serde_json::from_str::<Value>) {
            Some(Ok(schema)) => schema_of(&path, &schema),
            Some(Err(_)) => Err(BadRequest::value(path, "is not a JSON schema")),
            None => schema_of(&path, value),
        },
    }
}

/// One of these texts.
fn choice(path: &str, value: &Value) -> Result<Grammar, BadRequest> {
    let options = value.as_array().filter(|options| (1..=OPTIONS_MAX).contains(&options.len()));
    let what = || BadRequest::value(path, format!("has to be a list of 1 to {OPTIONS_MAX} strings that are not empty"));
    let mut pattern = String::new();
    for option in options.ok_or_else(what)? {
        let option = option.as_str().filter(|option| !option.is_empty()).ok_or_else(what)?;
        pattern.push(if pattern.is_empty() { '(' } else { '|' });
        for character in option.chars() {
            if character.is_ascii_punctuation() {
                pattern.push('\\');
            }
            pattern.push(character);
        }
    }
    pattern.push(')');
    text_of(path, Some(&Value::String(pattern))).map(Grammar::Regex)
}

fn schema_of(path: &str, schema: &Value) -> Result<Grammar, BadRequest> {
    match schema {
        Value::Object(_) | Value::Bool(_) => Ok(Grammar::JsonSchema(Arc::new(schema.clone()))),
        _ => Err(BadRequest::value(path, "has to be a JSON schema: an object")),
    }
}

fn text_of(path: &str, value: Option<&Value>) -> Result<Arc<str>, BadRequest> {
    let value = value.ok_or_else(|| BadRequest::missing(path))?;
    match value.as_str() {
        Some(text) if text.len() > GRAMMAR_BYTES_MAX => {
            Err(BadRequest::value(path, format!("has more than {GRAMMAR_BYTES_MAX} bytes")))
        }
        Some("") | None => Err(BadRequest::value(path, "has to be a string that is not empty")),
        Some(text) => Ok(text.into()),
    }
}

fn object<'a>(path: &str, value: &'a Value) -> Result<&'a Map<String, Value>, BadRequest> {
    value.as_object().ok_or_else(|| BadRequest::value(path, "has to be an object"))
}

/// Refuses keys that are not `known`, unless they are null.
fn only(path: &str, object: &Map<String, Value>, known: &[&str]) -> Result<(), BadRequest> {
    match object.iter().find(|(key, value)| !known.contains(&key.as_str()) && !value.is_null()) {
        Some((key, _)) => {
            let key: String = key.chars().take(60).collect();
            Err(BadRequest::Unknown { param: format!("{path}.{key}") })
        }
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn both_forms_are_read() {
        let format = |value: Value| grammar(Some(&value), None).unwrap();
        let outputs = |value: Value| grammar(None, Some(&value)).unwrap().unwrap();
        let schema = || Grammar::JsonSchema(Arc::new(json!({ "type": "integer" })));
        assert_eq!(format(json!({ "type": "text" })), None);
        assert_eq!(format(json!({ "type": "json_object" })), Some(Grammar::JsonObject));
        let named = json!({ "name": "n", "strict": true, "schema": { "type": "integer" } });
        assert_eq!(format(json!({ "type": "json_schema", "json_schema": named })), Some(schema()));
        assert_eq!(format(json!({ "type": "regex", "pattern": "a+" })), Some(Grammar::Regex("a+".into())));
        assert_eq!(
            format(json!({ "type": "lark", "grammar": "start: \"a\"" })),
            Some(Grammar::Lark("start: \"a\"".into()))
        );
        assert_eq!(outputs(json!({ "json": { "type": "integer" }, "regex": null })), schema());
        assert_eq!(outputs(json!({ "json": "{\"type\": \"integer\"}" })), schema());
        assert_eq!(outputs(json!({ "choice": ["a.b", "c|d"] })), Grammar::Regex("(a\\.b|c\\|d)".into()));
        assert_eq!(outputs(json!({ "grammar": "g" })), Grammar::Lark("g".into()));
    }

    #[test]
    fn mistakes_are_named() {
        for (format, param) in [
            (json!("json"), "response_format"),
            (json!({}), "response_format.type"),
            (json!({ "type": "xml" }), "response_format.type"),
            (json!({ "type": "json_schema" }), "response_format.json_schema"),
            (json!({ "type": "json_schema", "json_schema": {} }), "response_format.json_schema.schema"),
            (json!({ "type": "json_schema", "json_schema": { "schema": 1 } }), "response_format.json_schema.schema"),
            (json!({ "type": "json_object", "more": 1 }), "response_format.more"),
            (json!({ "type": "regex", "pattern": "" }), "response_format.pattern"),
        ] {
            assert_eq!(grammar(Some(&format), None).unwrap_err().param(), Some(param), "{format}");
        }
        for (outputs, param) in [
            (json!({}), "structured_outputs"),
            (json!({ "json": {}, "regex": "a" }), "structured_outputs"),
            (json!({ "choice": [] }), "structured_outputs.choice"),
            (json!({ "json": "{" }), "structured_outputs.json"),
            (json!({ "whitespace_pattern": " " }), "structured_outputs.whitespace_pattern"),
        ] {
            assert_eq!(grammar(None, Some(&outputs)).unwrap_err().param(), Some(param), "{outputs}");
        }
        let both = grammar(Some(&json!({ "type": "json_object" })), Some(&json!({ "regex": "a" })));
        assert_eq!(both.unwrap_err().param(), Some("structured_outputs"));
    }
}
