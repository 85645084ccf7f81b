//! Arguments that dialects write without quotes, and whose types are known from the tool's schema alone.

use mesh_text::{Tools, tools::Schema};
use serde_json::{Map, Value};

use crate::python;

/// The value that `text` stands for as `parameter` of `function`. Of the types that the schema allows, the first that
/// the text can be; what can be none of them is a string. Where the schema says nothing, JSON is taken for what it is.
pub fn argument(tools: &Tools, function: &str, parameter: &str, text: &str) -> Value {
    let schema = tools.schema(function).and_then(|schema| schema.property(parameter));
    value(schema, text)
}

/// The value that `text` stands for, of this schema.
pub fn value(schema: Option<Schema<'_>>, text: &str) -> Value {
    let types = schema.map(Schema::types).unwrap_or_default();
    let string = || Value::String(text.to_owned());
    if types.is_empty() {
        return serde_json::from_str(text.trim()).unwrap_or_else(|_| string());
    }
    // Who writes `null` where it is allowed hardly means the word.
    if types.contains(&"null") && is_null(text) {
        return Value::Null;
    }
    types.into_iter().find_map(|kind| of_type(kind, text)).unwrap_or_else(string)
}

fn of_type(kind: &str, text: &str) -> Option<Value> {
    if kind == "string" {
        return Some(Value::String(text.to_owned()));
    }
    let text = text.trim();
    let json: Option<Value> = serde_json::from_str(text).ok();
    match kind {
        "boolean" => match text {
            "true" | "True" => Some(Value::Bool(true)),
            "false" | "False" => Some(Value::Bool(false)),
            _ => None,
        },
        "null" => is_null(text).then_some(Value::Null),
        "integer" => json.filter(|value| value.is_i64() || value.is_u64() || value.as_f64().is_some_and(is_whole)),
        "number" => json.filter(Value::is_number),
        "array" => json.or_else(|| python::literal(text)).filter(Value::is_array),
        "object" => json.or_else(|| python::literal(text)).filter(Value::is_object),
        _ => None,
    }
}

fn is_null(text: &str) -> bool {
    matches!(text.trim(), "null" | "None")
}

fn is_whole(number: f64) -> bool {
    number.fract() == 0.0
}

/// Arguments as the text of a JSON object. Nothing is written twice.
#[derive(Default)]
pub struct Arguments(Map<String, Value>);

impl Arguments {
    /// Adds one; false if it is there already, or has no name.
    pub fn add(&mut self, name: &str, value: Value) -> bool {
        !name.is_empty() && self.0.insert(name.to_owned(), value).is_none()
    }

    /// The text.
    pub fn text(self) -> String {
        Value::Object(self.0).to_string()
    }
}

/// Whether this can be the name of a function or of a parameter: no white space, quote or bracket, and not endless.
pub fn is_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= NAME_BYTES_MAX
        && name.chars().all(|c| !c.is_whitespace() && !"<>{}[]()\"'`=,".contains(c))
}

/// Longest name of a function, in bytes.
const NAME_BYTES_MAX: usize = 256;

#[cfg(test)]
mod tests {
    use mesh_text::Tools;
    use serde_json::{Value, json};

    use super::{argument, is_name};

    #[test]
    fn values_have_the_types_of_the_schema() {
        let tools = Tools::of(&[json!({"name": "f", "parameters": {"properties": {
            "s": {"type": "string"}, "i": {"type": "integer"}, "n": {"type": "number"}, "b": {"type": "boolean"},
            "l": {"type": "array"}, "o": {"type": "object"}, "sn": {"type": ["string", "null"]},
            "is": {"anyOf": [{"type": "integer"}, {"type": "string"}]}, "e": {"enum": ["1", "2"]},
        }}})]);
        let cases: [(&str, &str, Value); 26] = [
            ("s", "5", json!("5")),
            ("s", "null", json!("null")),
            ("s", "{\"a\": 1}", json!("{\"a\": 1}")),
            ("s", " x\n", json!(" x\n")),
            ("i", "5", json!(5)),
            ("i", " -5\n", json!(-5)),
            ("i", "18446744073709551615", json!(18446744073709551615u64)),
            ("i", "5.0", json!(5.0)),
            ("i", "5.5", json!("5.5")),
            ("i", "five", json!("five")),
            ("n", "1e3", json!(1000.0)),
            ("n", "2", json!(2)),
            ("b", "True", json!(true)),
            ("b", "false", json!(false)),
            ("b", "yes", json!("yes")),
            ("l", "[1, \"a\"]", json!([1, "a"])),
            ("l", "['a', None]", json!(["a", null])),
            ("l", "{}", json!("{}")),
            ("o", "{\"a\": {\"b\": 1}}", json!({"a": {"b": 1}})),
            ("o", "{'a': True}", json!({"a": true})),
            ("sn", "null", json!(null)),
            ("sn", "None!", json!("None!")),
            ("is", "5", json!(5)),
            ("is", "5 o'clock", json!("5 o'clock")),
            ("e", "1", json!("1")),
            ("unknown", "[1]", json!([1])),
        ];
        for (parameter, text, expected) in cases {
            assert_eq!(argument(&tools, "f", parameter, text), expected, "{parameter} {text:?}");
        }
        assert_eq!(argument(&tools, "unknown", "s", "Paris"), json!("Paris"));
        assert_eq!(argument(&tools, "unknown", "s", "true"), json!(true));
    }

    #[test]
    fn names_are_words() {
        for name in ["f", "get_weather", "a.b-c:d", "天気"] {
            assert!(is_name(name), "{name}");
        }
        for name in ["", "a b", "<f>", "f(", "\"f\"", &"x".repeat(257)] {
            assert!(!is_name(name), "{name}");
        }
    }
}
