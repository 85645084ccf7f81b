//! Which JSON schemas the child enforces. It makes a grammar of a schema and passes over what it does not know, so that has
//! to be found before.

use serde_json::{Map, Value};

/// Schemas nested deeper than this are refused.
const DEPTH_MAX: usize = 64;

/// Keywords that say nothing about what is valid.
const ANNOTATIONS: [&str; 14] = [
    "$schema",
    "$id",
    "$comment",
    "$anchor",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentEncoding",
    "contentMediaType",
];

/// Texts of these formats are described to the child's grammars.
const FORMATS: [&str; 9] = ["date", "time", "date-time", "uuid", "uuid1", "uuid2", "uuid3", "uuid4", "uuid5"];

/// Says which keyword the child would not enforce, with its place.
pub(crate) fn check(schema: &Value) -> Result<(), String> {
    Checker { root: schema }.schema(schema, "#", 0)
}

struct Checker<'a> {
    root: &'a Value,
}

impl Checker<'_> {
    fn schema(&self, schema: &Value, at: &str, depth: usize) -> Result<(), String> {
        if depth > DEPTH_MAX {
            return Err(format!("the schema is nested more than {DEPTH_MAX} levels deep at {at}"));
        }
        let keywords = match schema {
            Value::Object(keywords) => keywords,
            Value::Bool(true) => return Ok(()),
            _ => return Err(format!("{at} has to be an object")),
        };
        for (keyword, value) in keywords {
            self.keyword(keywords, keyword, value, &format!("{at}/{keyword}"), depth)?;
        }
        // The child takes the first of these and forgets the others.
        let alone = ["$ref", "oneOf", "anyOf", "const", "enum"];
        let given: Vec<_> = alone.iter().filter(|keyword| keywords.contains_key(**keyword)).collect();
        let beside = |keyword: &&String| {
            let bystander =
                ANNOTATIONS.contains(&keyword.as_str()) || matches!(keyword.as_str(), "$defs" | "definitions");
            // What a constant or one of several constants is, it shows itself.
            let implied = keyword.as_str() == "type" && matches!(given[..], [&"const" | &"enum"]);
            !bystander && !implied && !alone.contains(&keyword.as_str())
        };
        match (&given[..], keywords.keys().find(beside)) {
            ([one, other, ..], _) => Err(format!("`{one}` and `{other}` together at {at}")),
            ([one], Some(other)) => Err(format!("`{one}` and `{other}` together at {at}")),
            _ => Ok(()),
        }
    }

    fn keyword(
        &self,
        keywords: &Map<String, Value>,
        keyword: &str,
        value: &Value,
        at: &str,
        depth: usize,
    ) -> Result<(), String> {
        let has_type = |name: &str| keywords.get("type").and_then(Value::as_str) == Some(name);
        let only_of = |name: &str| match has_type(name) {
            true => Ok(()),
            false => Err(format!("`{keyword}` without `type`: `{name}` at {at}")),
        };
        match keyword {
            "type" | "const" | "enum" | "required" => Ok(()),
            "properties" | "$defs" | "definitions" => {
                let named = value.as_object().ok_or_else(|| format!("{at} has to be an object"))?;
                named.iter().try_for_each(|(name, schema)| self.schema(schema, &format!("{at}/{name}"), depth + 1))
            }
            "additionalProperties" if value.is_boolean() => Ok(()),
            "items" if value.is_boolean() => Err(format!("`items`: {value} at {at}")),
            "additionalProperties" | "items" => self.schema(value, at, depth + 1),
            "prefixItems" if keywords.contains_key("items") => Err(format!("`prefixItems` beside `items` at {at}")),
            "prefixItems" | "anyOf" | "oneOf" | "allOf" => {
                let several = value.as_array().ok_or_else(|| format!("{at} has to be a list"))?;
                several
                    .iter()
                    .enumerate()
                    .try_for_each(|(index, schema)| self.schema(schema, &format!("{at}/{index}"), depth + 1))
            }
            "minItems" | "maxItems" => Ok(()),
            "minLength" | "maxLength" if keywords.contains_key("pattern") || keywords.contains_key("format") => {
                Err(format!("`{keyword}` beside `pattern` or `format` at {at}"))
            }
            "minLength" | "maxLength" => only_of("string"),
            "pattern" => match value.as_str() {
                Some(pattern) if pattern.starts_with('^') && pattern.ends_with('$') => only_of("string"),
                _ => Err(format!("a `pattern` that is not anchored by ^ and $ at {at}")),
            },
            "format" => match value.as_str() {
                Some(format) if FORMATS.contains(&format) => only_of("string"),
                _ => Err(format!("`format`: {value} at {at}")),
            },
            "minimum" | "maximum" | "exclusiveMinimum" | "exclusiveMaximum" => only_of("integer"),
            "$ref" => {
                let inside = value.as_str().and_then(|text| text.strip_prefix('#'));
                match inside.and_then(|pointer| self.root.pointer(pointer)) {
                    Some(_) => Ok(()),
                    None => Err(format!("`$ref`: {value}, which is not in the schema, at {at}")),
                }
            }
            annotation if ANNOTATIONS.contains(&annotation) => Ok(()),
            other => Err(format!("`{other}` at {at}")),
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_child_enforces_passes() {
        let schema = json!({
            "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A person", "type": "object",
            "properties": {
                "name": { "type": "string", "minLength": 1, "maxLength": 9, "description": "who" },
                "born": { "type": "string", "format": "date" },
                "code": { "type": "string", "pattern": "^[a-z]{3}$" },
                "age": { "type": "integer", "minimum": 0, "exclusiveMaximum": 150 },
                "kind": { "enum": ["a", 1, null], "type": "string" },
                "next": { "$ref": "#/$defs/next" },
                "tags": { "type": "array", "items": { "type": "string" }, "minItems": 1 },
                "either": { "anyOf": [{ "type": "null" }, { "const": 5 }] },
            },
            "required": ["name"], "additionalProperties": false,
            "$defs": { "next": { "oneOf": [{ "type": "boolean" }, { "$ref": "#" }] } },
        });
        assert_eq!(check(&schema), Ok(()));
        assert_eq!(check(&json!({})), Ok(()));
    }

    #[test]
    fn what_the_child_would_pass_over_is_named() {
        for (schema, named) in [
            (json!({ "type": "number", "multipleOf": 3 }), "`multipleOf` at #/multipleOf"),
            (json!({ "type": "number", "minimum": 3 }), "`minimum` without `type`: `integer`"),
            (json!({ "not": {} }), "`not`"),
            (json!({ "properties": { "a": { "uniqueItems": true } } }), "`uniqueItems` at #/properties/a/uniqueItems"),
            (json!({ "type": "string", "pattern": "a" }), "not anchored"),
            (json!({ "type": "string", "format": "email" }), "`format`: \"email\""),
            (json!({ "type": "string", "pattern": "^a$", "maxLength": 3 }), "`maxLength` beside `pattern`"),
            (json!({ "$ref": "https://example.org/x" }), "`$ref`"),
            (json!({ "$ref": "#/$defs/none" }), "`$ref`"),
            (json!({ "anyOf": [{}], "type": "object" }), "`anyOf` and `type` together"),
            (json!({ "enum": [1], "const": 1 }), "together"),
            (json!({ "items": false }), "`items`: false"),
            (json!({ "properties": { "a": false } }), "has to be an object"),
            (json!([]), "has to be an object"),
        ] {
            let error = check(&schema).unwrap_err();
            assert!(error.contains(named), "{schema}: {error}");
        }
        let mut deep = json!({});
        for _ in 0..=DEPTH_MAX {
            deep = json!({ "items": deep });
        }
        assert!(check(&deep).unwrap_err().contains("levels deep"));
    }
}
