//! Whether two schemas have a value in common. The child writes what any of a `oneOf` allows, which is right where none
//! allows what another does.

use serde_json::Value;

/// References and properties that are followed.
const DEPTH_MAX: usize = 8;

/// Whether it is certain that no value is valid for both. References lead into `root`.
pub(super) fn disjoint(root: &Value, one: &Value, other: &Value) -> bool {
    apart(root, one, other, DEPTH_MAX)
}

fn apart(root: &Value, one: &Value, other: &Value, depth: usize) -> bool {
    let Some(depth) = depth.checked_sub(1) else { return false };
    for (one, other) in [(one, other), (other, one)] {
        if let Some(target) = referred(root, one) {
            return apart(root, target, other, depth);
        }
    }
    if let (Some(ones), Some(others)) = (values(one), values(other)) {
        return !ones.iter().any(|one| others.iter().any(|other| same(one, other)));
    }
    if let (Some(ones), Some(others)) = (types(one), types(other)) {
        let meet = |one: &str| others.contains(&one) || (others.contains(&"number") && one == "integer");
        if !ones.iter().any(|one| meet(one) || (*one == "number" && others.contains(&"integer"))) {
            return true;
        }
    }
    // A property that both have to have, and that tells them apart. It takes objects on both sides.
    let objects = |schema| types(schema) == Some(vec!["object"]);
    let properties = |schema: &'_ Value| schema.get("properties").and_then(Value::as_object).cloned();
    let (Some(ones), Some(others)) = (properties(one), properties(other)) else { return false };
    let required = |schema: &Value, name: &str| {
        let names = schema.get("required").and_then(Value::as_array);
        names.is_some_and(|names| names.iter().any(|one| one == name))
    };
    objects(one)
        && objects(other)
        && ones.iter().any(|(name, own)| {
            required(one, name)
                && required(other, name)
                && others.get(name).is_some_and(|theirs| apart(root, own, theirs, depth))
        })
}

fn referred<'a>(root: &'a Value, schema: &Value) -> Option<&'a Value> {
    root.pointer(schema.get("$ref")?.as_str()?.strip_prefix('#')?)
}

/// The only values.
fn values(schema: &Value) -> Option<Vec<&Value>> {
    match (schema.get("const"), schema.get("enum")) {
        (Some(only), _) => Some(vec![only]),
        (None, Some(several)) => Some(several.as_array()?.iter().collect()),
        (None, None) => None,
    }
}

fn same(one: &Value, other: &Value) -> bool {
    match (one.as_f64(), other.as_f64()) {
        (Some(one), Some(other)) => one == other,
        _ => one == other,
    }
}

/// The only types.
fn types(schema: &Value) -> Option<Vec<&str>> {
    match schema.get("type") {
        Some(Value::String(only)) => Some(vec![only]),
        Some(Value::Array(several)) => several.iter().map(Value::as_str).collect(),
        Some(_) => None,
        None => Some(values(schema)?.into_iter().map(super::type_of).collect()),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_has_nothing_in_common_is_found() {
        let root = json!({ "$defs": { "a": { "const": "a" }, "loop": { "$ref": "#/$defs/loop" } } });
        let tagged = |tag: &str| {
            json!({ "type": "object", "properties": { "tag": { "const": tag }, "n": { "type": "integer" } },
                "required": ["tag"] })
        };
        for (one, other, wanted) in [
            (json!({ "type": "string" }), json!({ "type": "integer" }), true),
            (json!({ "type": "number" }), json!({ "type": "integer" }), false),
            (json!({ "type": ["string", "null"] }), json!({ "type": ["null", "array"] }), false),
            (json!({ "const": 1 }), json!({ "enum": [2, 3] }), true),
            (json!({ "const": 1 }), json!({ "enum": [1.0, 2] }), false),
            (json!({ "const": 1.0 }), json!({ "type": "integer" }), false),
            (json!({ "const": 1 }), json!({ "type": "integer" }), false),
            (json!({ "const": 1 }), json!({ "type": "string" }), true),
            (json!({ "$ref": "#/$defs/a" }), json!({ "const": "b" }), true),
            (json!({ "$ref": "#/$defs/loop" }), json!({ "const": "b" }), false),
            (tagged("a"), tagged("b"), true),
            (tagged("a"), tagged("a"), false),
            (tagged("a"), json!({ "type": "object", "properties": { "tag": { "const": "b" } } }), false),
            (json!({}), json!({ "type": "null" }), false),
        ] {
            assert_eq!(disjoint(&root, &one, &other), wanted, "{one} {other}");
            assert_eq!(disjoint(&root, &other, &one), wanted, "{other} {one}");
        }
    }
}
