//! JSON schemas that an answer can be held to, written by hand and by chance, and whether an answer keeps to one.

use serde_json::{Value, json};

/// Numbers that look drawn and are the same each time.
#[derive(Debug)]
pub struct Draws(pub u64);

impl Draws {
    /// A number below `bound`.
    pub fn below(&mut self, bound: usize) -> usize {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % bound
    }
}

/// So many schemas, the first by hand and the others by chance. Whoever keeps to one is done soon: all but digits and white
/// space is bounded.
#[must_use]
pub fn bounded(count: usize) -> Vec<Value> {
    put_together(by_hand(), count, false)
}

/// So many schemas, some of which an answer can keep to for as long as it likes.
#[must_use]
pub fn all(count: usize) -> Vec<Value> {
    put_together([without_end(), by_hand()].concat(), count, true)
}

fn put_together(mut schemas: Vec<Value>, count: usize, open: bool) -> Vec<Value> {
    let mut draws = Draws(5);
    while schemas.len() < count {
        schemas.push(by_chance(&mut draws, 3, open));
    }
    schemas
}

/// Says what is wrong with an answer to a schema, if anything is.
///
/// # Errors
/// It is no JSON, or it does not validate.
///
/// # Panics
/// The schema is none.
pub fn check(schema: &Value, answer: &str) -> Result<(), String> {
    let validator = jsonschema::options().should_validate_formats(true).build(schema);
    let validator = validator.unwrap_or_else(|error| panic!("{schema}: {error}"));
    let value: Value = match serde_json::from_str(answer) {
        Ok(value) => value,
        // JSON has no bound for numbers; what reads it here has.
        Err(error) if error.to_string().starts_with("number out of range") => return Ok(()),
        Err(error) => return Err(format!("{schema}: {error}: {answer}")),
    };
    validator.validate(&value).map_err(|error| format!("{schema}: {error}: {answer}"))
}

/// Each keyword that can be enforced is a part of one of these.
fn by_hand() -> Vec<Value> {
    let mut schemas = vec![
        json!({ "type": ["integer", "null", "string"], "maxLength": 6 }),
        json!({ "enum": ["a", 1, null, { "b": [true] }, 2.5, "é\"\\\n"] }),
        json!({ "const": { "a": [1, "x", {}], "b": -3 } }),
        json!({ "const": "</think><tool_call>" }),
        json!({ "type": "string", "minLength": 3, "maxLength": 5 }),
        json!({ "type": "string", "maxLength": 0 }),
        json!({ "type": "string", "pattern": "^[a-c]{2,4}-\\d{1,6}$" }),
        json!({ "type": "string", "pattern": "^.{0,3}b{1,3}.?$" }),
        json!({ "type": "string", "pattern": "^(foo|bär){1,4}$" }),
        json!({ "type": "string", "pattern": "^[0-9]{3}$", "minLength": 3 }),
        json!({ "type": "integer", "minimum": -5, "maximum": 17 }),
        json!({ "type": "integer", "exclusiveMinimum": 0, "exclusiveMaximum": 100, "multipleOf": 7 }),
        json!({ "type": "integer", "exclusiveMinimum": -30, "exclusiveMaximum": 1200 }),
        json!({ "type": "number", "minimum": 0.5, "exclusiveMaximum": 2 }),
        json!({ "type": "number", "multipleOf": 0.25, "minimum": 0, "maximum": 10 }),
        json!({ "type": "number", "maximum": -1 }),
        json!({ "type": "array", "items": { "type": "integer" }, "minItems": 2, "maxItems": 4 }),
        json!({ "type": "array", "prefixItems": [{ "type": "boolean" }, { "const": 1 }], "items": false, "minItems": 2 }),
        json!({ "type": "array", "prefixItems": [{ "type": "null" }], "items": { "type": "boolean" }, "maxItems": 3 }),
        json!({ "type": "array", "maxItems": 0 }),
        json!({ "type": "object", "additionalProperties": false }),
        json!({ "type": "object", "patternProperties": { "^[a-z]{1,3}$": { "type": "boolean" } },
            "additionalProperties": false, "minProperties": 1, "maxProperties": 3 }),
        json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a", "b"],
            "additionalProperties": { "type": "null" }, "maxProperties": 2 }),
        json!({ "type": "object", "properties": { "a": { "type": "null" }, "b": { "type": "boolean" } },
            "additionalProperties": false }),
        json!({ "anyOf": [{ "type": "boolean" }, { "type": "string", "maxLength": 2 }] }),
        json!({ "oneOf": [{ "type": "integer" }, { "type": "array", "items": { "type": "null" }, "maxItems": 4 }] }),
        json!({ "oneOf": [
            { "type": "object", "properties": { "kind": { "const": "a" }, "n": { "type": "integer" } },
              "required": ["kind", "n"], "additionalProperties": false },
            { "type": "object", "properties": { "kind": { "const": "b" }, "s": { "enum": ["x", "y"] } },
              "required": ["kind", "s"], "additionalProperties": false }] }),
        json!({ "allOf": [{ "type": "integer", "minimum": 3 }, { "maximum": 9 }] }),
        json!({ "allOf": [
            { "type": "object", "properties": { "a": { "type": "integer" }, "b": true }, "required": ["a"],
              "additionalProperties": false },
            { "type": "object", "properties": { "b": { "type": "boolean" } }, "required": ["b"] }] }),
        json!({ "$ref": "#/$defs/pair",
            "$defs": { "pair": { "type": "array", "items": { "$ref": "#/$defs/digit" }, "minItems": 2, "maxItems": 2 },
                "digit": { "type": "integer", "minimum": 0, "maximum": 9 } } }),
        json!({ "type": "object", "properties": { "value": { "type": "integer" }, "next": {
            "anyOf": [{ "type": "null" }, { "$ref": "#" }] } }, "required": ["value", "next"],
            "additionalProperties": false }),
        json!({ "definitions": { "s": { "type": "string", "maxLength": 4 } }, "type": "object",
            "properties": { "x": { "$ref": "#/definitions/s" } }, "required": ["x"], "additionalProperties": false }),
        json!({ "type": "object", "title": "Person", "description": "d", "$comment": "c", "properties": {
            "name": { "type": "string", "title": "Name", "examples": ["A"], "maxLength": 12 },
            "age": { "type": ["integer", "null"], "minimum": 0, "default": null } },
            "required": ["name", "age"], "additionalProperties": false }),
        json!({ "format": "date", "type": "string", "pattern": "^2", "allOf": [{ "maxLength": 12 }] }),
    ];
    for format in ["date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"] {
        schemas.push(json!({ "type": "string", "format": format }));
    }
    schemas
}

/// Texts of any length, keys of any name.
fn without_end() -> Vec<Value> {
    vec![
        json!({}),
        json!(true),
        json!({ "type": ["integer", "null", "string"] }),
        json!({ "type": "string", "pattern": "^[a-c]{2,4}-\\d+$" }),
        json!({ "type": "string", "pattern": "b+" }),
        json!({ "type": "string", "pattern": "^(foo|bär)+$" }),
        json!({ "type": "string", "pattern": "^\\w+@\\w+$" }),
        json!({ "type": "string", "format": "uri" }),
        json!({ "format": "date", "pattern": "^2", "allOf": [{ "maxLength": 12 }] }),
        json!({ "type": "object", "additionalProperties": { "type": "boolean" }, "minProperties": 1, "maxProperties": 3 }),
        json!({ "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a", "b"] }),
        json!({ "type": "object", "patternProperties": { "^x_": { "type": "integer" } }, "additionalProperties": false }),
        json!({ "oneOf": [{ "type": "integer" }, { "type": "array", "items": { "type": "null" } }] }),
        json!({ "allOf": [
            { "type": "object", "properties": { "a": { "type": "integer" } }, "required": ["a"] },
            { "type": "object", "properties": { "b": { "type": "boolean" } }, "required": ["b"] }] }),
        json!({ "type": "object", "properties": { "name": { "type": "string" }, "age": {
            "type": ["integer", "null"], "minimum": 0 } }, "required": ["name", "age"], "additionalProperties": false }),
    ]
}

const PATTERNS: [&str; 4] = ["^[A-Z]{2,5}$", "^\\w{1,6}@\\w{1,4}$", "^[^x]{0,9}x$", "^(a|bc){0,6}$"];

/// A schema put together by chance. An open one may have objects with keys of any name.
fn by_chance(draws: &mut Draws, depth: usize, open: bool) -> Value {
    let kinds = if depth == 0 { 7 } else { 12 };
    let low = draws.below(50) as i64 - 25;
    match draws.below(kinds) {
        0 => json!({ "type": "boolean" }),
        1 => json!({ "type": "integer", "minimum": low, "maximum": low + draws.below(300) as i64 }),
        2 => json!({ "type": "number", "minimum": low, "exclusiveMaximum": low + 1 + draws.below(9) as i64 }),
        3 => json!({ "type": "string", "minLength": draws.below(3), "maxLength": 3 + draws.below(9) }),
        4 => json!({ "enum": (0..1 + draws.below(4)).map(|n| format!("v{n}")).collect::<Vec<_>>() }),
        5 => json!({ "type": "string", "pattern": PATTERNS[draws.below(4)] }),
        6 => json!({ "const": json!([null, 7, "k", [1, 2]])[draws.below(4)] }),
        7 | 8 => {
            let names: Vec<String> = (0..1 + draws.below(4)).map(|n| format!("p{n}")).collect();
            let mut schema = json!({ "type": "object", "properties": {}, "additionalProperties": false });
            for name in &names {
                schema["properties"][name] = by_chance(draws, depth - 1, open);
            }
            let required: Vec<_> = names.into_iter().filter(|_| draws.below(3) > 0).collect();
            schema["required"] = required.into();
            if open && draws.below(3) == 0 {
                schema["additionalProperties"] = by_chance(draws, 0, open);
            }
            schema
        }
        9 => json!({ "type": "array", "items": by_chance(draws, depth - 1, open), "minItems": draws.below(2),
            "maxItems": 1 + draws.below(4) }),
        10 => json!({ "type": "array", "prefixItems": [by_chance(draws, 0, open), by_chance(draws, depth - 1, open)],
            "items": by_chance(draws, 0, open), "minItems": draws.below(3), "maxItems": 4 }),
        _ => json!({ "anyOf": [by_chance(draws, depth - 1, open), by_chance(draws, depth - 1, open)] }),
    }
}
