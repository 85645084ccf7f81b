//! Which JSON schemas can be enforced while an answer is written. Everything else is refused by its keyword: a schema that is
//! enforced in part would be a promise not kept.

use mesh_core::formats::{self, pattern};
use serde_json::{Map, Value};

/// Longest schema, in bytes of JSON.
pub const SCHEMA_BYTES_MAX: usize = 256 << 10;

/// A schema that cannot be enforced.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("`{at}` cannot be enforced: {why}")]
pub struct SchemaError {
    /// Where it is, such as `properties.name.not`; its last part is the keyword.
    pub at: String,
    /// Why, or what can be.
    pub why: String,
}

/// Keywords that hold one schema.
const SCHEMAS: &[&str] = &["items", "additionalItems", "additionalProperties"];
/// Keywords that hold a list of schemas.
const LISTS: &[&str] = &["anyOf", "oneOf", "allOf", "prefixItems"];
/// Keywords that hold schemas by name.
const MAPS: &[&str] = &["properties", "patternProperties", "$defs", "definitions"];
/// Keywords whose value is the grammar's business.
const VALUES: &[&str] = &[
    "const",
    "enum",
    "type",
    "required",
    "minItems",
    "maxItems",
    "minProperties",
    "maxProperties",
    "minLength",
    "maxLength",
    "pattern",
    "minimum",
    "maximum",
    "exclusiveMinimum",
    "exclusiveMaximum",
    "multipleOf",
];
/// Keywords that say nothing about which values are valid.
const ANNOTATIONS: &[&str] = &[
    "$schema",
    "$id",
    "id",
    "$anchor",
    "$comment",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentMediaType",
    "contentEncoding",
];
/// Formats that the grammar's own expressions are right about. Others have patterns: [`mesh_core::formats`].
const FORMATS: &[&str] = &["duration", "ipv4", "ipv6", "uri"];

/// The schema as grammars are made of it, without annotations and keywords that ask for nothing.
///
/// # Errors
///
/// A keyword in it cannot be enforced.
pub fn enforceable(schema: &Value) -> Result<Value, SchemaError> {
    if schema.to_string().len() > SCHEMA_BYTES_MAX {
        return Err(refused("$", format!("it has more than {SCHEMA_BYTES_MAX} bytes")));
    }
    walk("", schema)
}

fn refused(at: impl Into<String>, why: impl Into<String>) -> SchemaError {
    SchemaError { at: at.into(), why: why.into() }
}

fn walk(at: &str, schema: &Value) -> Result<Value, SchemaError> {
    let here = |key: &str| if at.is_empty() { key.to_owned() } else { format!("{at}.{key}") };
    let schema = match schema {
        Value::Bool(_) => return Ok(schema.clone()),
        Value::Object(schema) => schema,
        _ => return Err(refused(here("$"), "a schema has to be an object or a boolean")),
    };
    let mut kept = Map::new();
    let mut texts_of_format = None;
    for (key, value) in schema {
        let at = here(key);
        let key = key.as_str();
        let value = match key {
            // Nothing is asked for.
            _ if ANNOTATIONS.contains(&key) => continue,
            "uniqueItems" if value == &Value::Bool(false) => continue,
            "items" if value.is_array() => list(&at, value)?,
            _ if SCHEMAS.contains(&key) => walk(&at, value)?,
            _ if LISTS.contains(&key) => list(&at, value)?,
            _ if MAPS.contains(&key) => map(&at, value)?,
            "format" if value.as_str().and_then(pattern).is_some() => {
                let pattern = value.as_str().and_then(pattern).unwrap_or_default();
                // Beside a pattern that the schema has itself. Formats say nothing about what is no text.
                let texts = serde_json::json!({ "type": "string", "pattern": pattern });
                let types = ["null", "boolean", "number", "array", "object"];
                texts_of_format = Some(match schema.get("type") {
                    Some(Value::String(kind)) if kind == "string" => texts,
                    _ => serde_json::json!({ "anyOf": [texts, { "type": types }] }),
                });
                continue;
            }
            "format" => match value.as_str() {
                Some(format) if FORMATS.contains(&format) => value.clone(),
                _ => {
                    let names = [&formats::NAMES, FORMATS].concat().join(", ");
                    return Err(refused(at, format!("formats that can be: {names}")));
                }
            },
            "$ref" => match value.as_str() {
                Some(target) if is_local(target) => value.clone(),
                _ => return Err(refused(at, "references have to point into the schema, such as `#/$defs/name`")),
            },
            _ if VALUES.contains(&key) => value.clone(),
            _ => return Err(refused(at, format!("the keyword `{}` is not supported", brief(key)))),
        };
        kept.insert(key.to_owned(), value);
    }
    if let Some(format) = texts_of_format {
        match kept.entry("allOf").or_insert_with(|| Value::Array(Vec::new())) {
            Value::Array(all) => all.push(format),
            // A list is all that gets here.
            _ => return Err(refused(here("allOf"), "it has to be a list of schemas")),
        }
    }
    Ok(Value::Object(kept))
}

/// A pointer into the same document, of plain segments.
fn is_local(target: &str) -> bool {
    (target == "#" || target.starts_with("#/")) && !target.contains(['~', '%'])
}

fn list(at: &str, value: &Value) -> Result<Value, SchemaError> {
    let Value::Array(schemas) = value else { return Err(refused(at, "it has to be a list of schemas")) };
    let walked = schemas.iter().enumerate().map(|(index, schema)| walk(&format!("{at}[{index}]"), schema));
    Ok(Value::Array(walked.collect::<Result<_, _>>()?))
}

fn map(at: &str, value: &Value) -> Result<Value, SchemaError> {
    let Value::Object(schemas) = value else { return Err(refused(at, "it has to be an object of schemas")) };
    let walked =
        schemas.iter().map(|(name, schema)| Ok((name.clone(), walk(&format!("{at}.{}", brief(name)), schema)?)));
    Ok(Value::Object(walked.collect::<Result<_, _>>()?))
}

fn brief(word: &str) -> String {
    word.chars().take(60).collect()
}

/// The schema for a place further down in another one: its references to itself point there. `prefix` is the pointer of the
/// place, such as `#/properties/arguments`.
pub fn moved(schema: &Value, prefix: &str) -> Value {
    let deeper = |key: &str, value: &Value| match (key, value) {
        ("$ref", Value::String(target)) if target == "#" || target.starts_with("#/") => {
            Value::String(format!("{prefix}{}", target.strip_prefix('#').unwrap_or_default()))
        }
        // Names, each with a schema.
        (key, Value::Object(map)) if MAPS.contains(&key) => {
            map.iter().map(|(name, schema)| (name.clone(), moved(schema, prefix))).collect::<Map<_, _>>().into()
        }
        (key, value) if SCHEMAS.contains(&key) || LISTS.contains(&key) => moved(value, prefix),
        (_, value) => value.clone(),
    };
    match schema {
        Value::Object(map) => {
            map.iter().map(|(key, value)| (key.clone(), deeper(key, value))).collect::<Map<_, _>>().into()
        }
        Value::Array(list) => list.iter().map(|value| moved(value, prefix)).collect::<Vec<_>>().into(),
        other => other.clone(),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_cannot_be_enforced_is_named_with_its_place() {
        for (schema, at) in [
            (json!({ "not": {} }), "not"),
            (json!({ "properties": { "a": { "uniqueItems": true } } }), "properties.a.uniqueItems"),
            (json!({ "anyOf": [{}, { "if": {} }] }), "anyOf[1].if"),
            (json!({ "items": { "contains": {} } }), "items.contains"),
            (json!({ "$defs": { "x": { "propertyNames": {} } } }), "$defs.x.propertyNames"),
            (json!({ "format": "color" }), "format"),
            (json!({ "format": "unknown" }), "format"),
            (json!({ "$ref": "https://example.com/x" }), "$ref"),
            (json!({ "$ref": "#/$defs/a~1b" }), "$ref"),
            (json!({ "x-guidance": {} }), "x-guidance"),
            (json!({ "nullable": true }), "nullable"),
            (json!({ "items": 3 }), "items.$"),
            (json!([]), "$"),
        ] {
            assert_eq!(enforceable(&schema).unwrap_err().at, at, "{schema}");
        }
    }

    #[test]
    fn annotations_pass_and_are_left_out() {
        let schema = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "T", "type": "object",
            "properties": { "title": { "type": "string", "description": "a title", "default": "x" } },
            "uniqueItems": false,
        });
        let kept = json!({ "type": "object", "properties": { "title": { "type": "string" } } });
        assert_eq!(enforceable(&schema).unwrap(), kept);
    }

    #[test]
    fn references_move_along() {
        let schema = json!({ "$ref": "#/$defs/a", "$defs": { "a": { "items": { "$ref": "#" } } }, "const": { "$ref": "#" },
            "properties": { "const": { "$ref": "#" } } });
        let moved = moved(&schema, "#/properties/arguments");
        assert_eq!(moved["$ref"], "#/properties/arguments/$defs/a");
        assert_eq!(moved["$defs"]["a"]["items"]["$ref"], "#/properties/arguments");
        assert_eq!(moved["const"]["$ref"], "#");
        assert_eq!(moved["properties"]["const"]["$ref"], "#/properties/arguments");
    }
}
