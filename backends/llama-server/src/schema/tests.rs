use super::*;

/// What becomes of a schema that refers to nothing.
fn one(schema: &Value) -> Result<Value, String> {
    translated(schema).map(|mut translated| translated["$defs"]["d0"].take())
}

#[test]
fn what_the_child_gets_right_is_sent() {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema", "title": "A person", "type": "object",
        "properties": {
            "name": { "type": "string", "minLength": 1, "maxLength": 9, "description": "who" },
            "code": { "type": "string", "pattern": "^[a-z]{3}$" },
            "age": { "type": "integer", "minimum": 0, "exclusiveMaximum": 150 },
            "kind": { "enum": ["a", 1, null], "type": "string" },
            "next": { "$ref": "#/$defs/next" },
            "tags": { "type": "array", "items": { "type": "string" }, "minItems": 1 },
            "either": { "anyOf": [{ "type": "null" }, { "const": 5 }] },
            "any": true,
        },
        "required": ["name"], "additionalProperties": false,
        "$defs": { "next": { "oneOf": [{ "type": "boolean" }, { "$ref": "#" }] } },
    });
    let sent = translated(&schema).unwrap();
    let wanted = json!({ "$ref": "#/$defs/d0", "$defs": {
        "d0": {
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "name": { "type": "string", "minLength": 1, "maxLength": 9 },
                "code": { "type": "string", "pattern": "^(([a-z]){3,3})$" },
                "age": { "type": "integer", "minimum": 0, "maximum": 149 },
                "kind": { "enum": ["a"] },
                "next": { "$ref": "#/$defs/d1" },
                "tags": { "type": "array", "items": { "type": "string" }, "minItems": 1 },
                "either": { "anyOf": [{ "type": "null" }, { "enum": [5] }] },
                "any": {},
            },
            "required": ["name"],
        },
        "d1": { "anyOf": [{ "type": "boolean" }, { "$ref": "#/$defs/d0" }] },
    } });
    assert_eq!(sent, wanted);
    assert_eq!(one(&json!({})), Ok(json!({})));
}

#[test]
fn what_the_child_gets_wrong_is_said_otherwise() {
    for (schema, wanted) in [
        (
            json!({ "type": ["integer", "null"], "maximum": -3, "maxLength": 3 }),
            json!({ "anyOf": [
                { "type": "integer", "minimum": -999_999_999_999_999_i64, "maximum": -3 }, { "type": "null" }] }),
        ),
        (
            json!({ "type": "integer", "exclusiveMinimum": 2.5, "maximum": 7.5 }),
            json!({ "type": "integer", "minimum": 3, "maximum": 7 }),
        ),
        (json!({ "maxLength": 3 }), json!({ "type": "string", "maxLength": 3 })),
        (json!({ "allOf": [{ "type": "integer" }], "title": "x" }), json!({ "type": "integer" })),
        (
            json!({ "type": "object", "properties": { "a": {} }, "allOf": [
                { "properties": { "b": { "type": "null" } } }, { "required": ["a", "b"] }] }),
            json!({ "type": "object", "properties": { "a": {}, "b": { "type": "null" } }, "required": ["a", "b"] }),
        ),
        (
            json!({ "prefixItems": [{ "const": 1 }], "items": false, "minItems": 1 }),
            json!({ "type": "array", "prefixItems": [{ "$ref": "#/$defs/d1" }] }),
        ),
        (
            json!({ "prefixItems": [{}], "items": { "type": "null" }, "maxItems": 3 }),
            json!({ "anyOf": [
                { "type": "array", "maxItems": 0 },
                { "type": "array", "prefixItems": [{ "$ref": "#/$defs/d1" }] },
                { "type": "array", "prefixItems": [{ "$ref": "#/$defs/d1" }, { "$ref": "#/$defs/d2" }] },
                { "type": "array", "prefixItems": [
                    { "$ref": "#/$defs/d1" }, { "$ref": "#/$defs/d2" }, { "$ref": "#/$defs/d2" }] },
            ] }),
        ),
        (json!({ "items": false }), json!({ "type": "array", "maxItems": 0 })),
        (
            json!({ "type": "object", "properties": { "a": {} }, "additionalProperties": true }),
            json!({ "type": "object", "properties": { "a": {} }, "required": [] }),
        ),
        (
            json!({ "additionalProperties": { "type": "null" } }),
            json!({ "type": "object", "additionalProperties": { "type": "null" }, "required": [] }),
        ),
    ] {
        assert_eq!(one(&schema).as_ref(), Ok(&wanted), "{schema}");
    }
    let date = one(&json!({ "type": "string", "format": "date" })).unwrap();
    assert!(date["pattern"].as_str().unwrap().contains("02"), "{date}");
    // What is defined twice under names that the child takes for one has two numbers.
    let sent = translated(&json!({ "anyOf": [{ "$ref": "#/$defs/a-b" }, { "$ref": "#/$defs/a_b" }],
        "$defs": { "a-b": { "const": 1 }, "a_b": { "const": 2 } } }))
    .unwrap();
    assert_eq!(sent["$defs"]["d0"]["anyOf"], json!([{ "$ref": "#/$defs/d1" }, { "$ref": "#/$defs/d2" }]));
    assert_eq!(sent["$defs"]["d2"], json!({ "enum": [2] }));
}

#[test]
fn what_the_child_would_not_keep_to_is_named() {
    for (schema, named) in [
        (json!({ "type": "number", "multipleOf": 3 }), "`multipleOf` at #/multipleOf"),
        (json!({ "type": "number", "minimum": 3 }), "`minimum` for a `number`"),
        (json!({ "minimum": 3 }), "`minimum` without `type`: `integer`"),
        (json!({ "minItems": 2, "minLength": 3 }), "several types"),
        (json!({ "not": {} }), "`not`"),
        (json!({ "properties": { "a": { "uniqueItems": true } } }), "`uniqueItems` at #/properties/a/uniqueItems"),
        (json!({ "type": "string", "pattern": "(?=a)b" }), "`pattern`: look-around"),
        (json!({ "type": "string", "format": "ipv4" }), "`format`: \"ipv4\""),
        (json!({ "type": "string", "pattern": "^a$", "maxLength": 3 }), "`maxLength` beside `pattern`"),
        (json!({ "type": "string", "pattern": "^a$", "format": "date" }), "together"),
        (json!({ "type": "string", "minLength": 3, "maxLength": 1 }), "a most of 1 and a least of 3"),
        (json!({ "type": "string", "minLength": 2001 }), "2001 repetitions at least"),
        (json!({ "type": "string", "maxLength": 1_000_000_000 }), "more than 100000 repetitions"),
        (json!({ "type": "string", "pattern": "^((a{0,999}){0,999}){0,99999}$" }), "more than 100000 repetitions"),
        (json!({ "type": "string", "maxLength": 2.5 }), "`maxLength`: 2.5"),
        (json!({ "type": "array", "items": {}, "minItems": 3, "maxItems": 1 }), "a most of 1"),
        (json!({ "prefixItems": [{}], "minItems": 2 }), "`prefixItems` with 2 to 1 items"),
        (json!({ "prefixItems": [{}], "items": {} }), "without `maxItems`"),
        (json!({ "prefixItems": [{}], "items": {}, "maxItems": 99 }), "`prefixItems` with 0 to 99 items"),
        (json!({ "type": "integer", "minimum": 5, "maximum": 3 }), "no number"),
        (json!({ "type": "integer", "minimum": 1e30 }), "`minimum`: 1e+30"),
        (json!({ "type": "strong" }), "`type`: \"strong\""),
        (json!({ "type": [] }), "`type`: []"),
        (json!({ "type": "string", "enum": [1] }), "no value is possible"),
        (json!({ "enum": [] }), "no value is possible"),
        (json!({ "anyOf": [] }), "#/anyOf has to be a list"),
        (json!({ "required": ["b"], "properties": { "a": {} } }), "`required`: \"b\""),
        (json!({ "allOf": [{ "required": ["b"] }, { "properties": { "a": {} } }] }), "`required`: \"b\""),
        (json!({ "allOf": [{ "type": "integer" }, { "maximum": 9 }] }), "`allOf`"),
        (json!({ "allOf": [{ "properties": { "a": {} } }, { "properties": { "a": {} } }] }), "several properties"),
        (json!({ "oneOf": [{ "const": 1 }, { "type": "integer" }] }), "`oneOf`: numbers 0 and 1"),
        (json!({ "properties": { "a": {} }, "additionalProperties": {} }), "`additionalProperties` that are a schema"),
        (json!({ "$ref": "https://example.org/x" }), "`$ref`"),
        (json!({ "$ref": "#/$defs/none" }), "`$ref`"),
        (json!({ "$ref": "#" }), "leads back to itself"),
        (
            json!({ "anyOf": [{ "type": "null" }, { "$ref": "#/$defs/a" }], "$defs": { "a": { "$ref": "#" } } }),
            "leads back",
        ),
        (json!({ "anyOf": [{}], "type": "object" }), "`anyOf` and `type` together"),
        (json!({ "enum": [1], "const": 1 }), "together"),
        (json!({ "items": false, "minItems": 1 }), "`items`: false"),
        (json!({ "properties": { "a": false } }), "has to be an object"),
        (json!([]), "has to be an object"),
    ] {
        let error = translated(&schema).unwrap_err();
        assert!(error.contains(named), "{schema}: {error}");
    }
    let mut deep = json!({});
    for _ in 0..=DEPTH_MAX {
        deep = json!({ "items": deep });
    }
    assert!(translated(&deep).unwrap_err().contains("levels deep"));
}
