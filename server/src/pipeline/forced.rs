//! Calls that a request forces, where the dialect has no form for them that a grammar could describe: plain JSON.

use std::mem;

use mesh_text::{
    CallSchema, Delta, DialectParser,
    constraint::{CALLS_MAX, schema::moved},
};
use serde_json::{Map, Value, json};

/// The schema of an answer that is a call of one of these functions, or with `many` a list of them.
pub(super) fn schema(calls: &[CallSchema], many: bool) -> Value {
    let at = |index: usize| match (many, calls.len()) {
        (false, 1) => "#".to_owned(),
        (false, _) => format!("#/anyOf/{index}"),
        (true, 1) => "#/items".to_owned(),
        (true, _) => format!("#/items/anyOf/{index}"),
    };
    let one = |(index, call): (usize, &CallSchema)| {
        json!({
            "type": "object",
            "properties": {
                "name": { "const": call.name },
                "arguments": moved(&call.parameters, &format!("{}/properties/arguments", at(index))),
            },
            "required": ["name", "arguments"],
            "additionalProperties": false,
        })
    };
    let mut options: Vec<Value> = calls.iter().enumerate().map(one).collect();
    let item = if options.len() == 1 { options.remove(0) } else { json!({ "anyOf": options }) };
    if many { json!({ "type": "array", "items": item, "minItems": 1, "maxItems": CALLS_MAX }) } else { item }
}

/// Reads such an answer. `before` reads what comes before it.
pub(super) struct ForcedCalls {
    before: Option<Box<dyn DialectParser>>,
    held: String,
}

impl ForcedCalls {
    pub(super) fn new(before: Option<Box<dyn DialectParser>>) -> Self {
        Self { before, held: String::new() }
    }

    /// Keeps content back, which is calls once it is whole.
    fn keep(&mut self, deltas: Vec<Delta>) -> Vec<Delta> {
        let mut others = Vec::new();
        for delta in deltas {
            match delta {
                Delta::Content(text) => self.held.push_str(&text),
                other => others.push(other),
            }
        }
        others
    }
}

impl DialectParser for ForcedCalls {
    fn push(&mut self, text: &str) -> Vec<Delta> {
        match &mut self.before {
            Some(before) => {
                let deltas = before.push(text);
                self.keep(deltas)
            }
            None => {
                self.held.push_str(text);
                Vec::new()
            }
        }
    }

    fn finish(&mut self) -> Vec<Delta> {
        let rest = self.before.as_mut().map(|before| before.finish()).unwrap_or_default();
        let mut deltas = self.keep(rest);
        let held = mem::take(&mut self.held);
        match read(&held) {
            _ if held.is_empty() => {}
            Some(calls) => {
                let calls = (0..).zip(calls);
                deltas.extend(calls.map(|(index, (name, arguments))| Delta::ToolCall { index, name, arguments }));
            }
            None => deltas.push(Delta::Malformed { text: held }),
        }
        deltas
    }
}

fn read(text: &str) -> Option<Vec<(String, String)>> {
    let calls = match serde_json::from_str(text).ok()? {
        Value::Array(calls) if !calls.is_empty() => calls,
        call @ Value::Object(_) => vec![call],
        _ => return None,
    };
    let one = |call: Value| {
        let Value::Object(mut call): Value = call else { return None };
        let arguments: Map<String, Value> = match call.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            None => Map::new(),
            Some(_) => return None,
        };
        let name = call.get("name")?.as_str()?.to_owned();
        Some((name, Value::Object(arguments).to_string()))
    };
    calls.into_iter().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(name: &str, parameters: Value) -> CallSchema {
        CallSchema { name: name.into(), parameters }
    }

    #[test]
    fn references_of_parameters_go_with_them() {
        let one = call("f", json!({ "$ref": "#/$defs/a", "$defs": { "a": { "type": "object" } } }));
        let two = call("g", json!({ "type": "object" }));
        for (schema, at) in [
            (schema(std::slice::from_ref(&one), false), ""),
            (schema(std::slice::from_ref(&one), true), "/items"),
            (schema(&[one.clone(), two.clone()], false), "/anyOf/0"),
            (schema(&[one, two], true), "/items/anyOf/0"),
        ] {
            let arguments = schema.pointer(&format!("{at}/properties/arguments")).unwrap();
            let target = arguments["$ref"].as_str().unwrap().strip_prefix('#').unwrap();
            assert_eq!(schema.pointer(target), Some(&json!({ "type": "object" })), "{schema}");
        }
    }

    #[test]
    fn calls_are_read_whole_and_what_is_none_is_said() {
        let deltas = |text: &str| {
            let mut parser = ForcedCalls::new(None);
            let mut deltas: Vec<Delta> = text.chars().flat_map(|c| parser.push(&c.to_string())).collect();
            deltas.extend(parser.finish());
            deltas
        };
        let one = Delta::ToolCall { index: 0, name: "f".into(), arguments: "{\"a\":1}".into() };
        assert_eq!(deltas("{\"name\": \"f\", \"arguments\": {\"a\": 1}}"), std::slice::from_ref(&one));
        let two = Delta::ToolCall { index: 1, name: "g".into(), arguments: "{}".into() };
        assert_eq!(deltas("[{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"g\"}]"), [one, two]);
        assert_eq!(deltas("{\"name\": \"f\""), [Delta::Malformed { text: "{\"name\": \"f\"".into() }]);
        assert_eq!(deltas(""), []);
    }
}
