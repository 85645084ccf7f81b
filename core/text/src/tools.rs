//! The tools that a request offers, as a dialect's parser has to know them: their names, and what their parameters are.

use std::{collections::HashMap, sync::Arc};

use serde_json::Value;

/// Most `$ref`s that are followed one after the other.
const REFERENCES_MAX: usize = 16;

/// The tools of one request. Cheap to clone.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Tools(Arc<HashMap<String, Value>>);

impl Tools {
    /// Reads tools as templates see them: `{"type": "function", "function": {"name": …, "parameters": …}}`, or what
    /// `function` holds by itself. What has no name cannot be called and is left out.
    pub fn of(tools: &[Value]) -> Self {
        let read = |tool: &Value| {
            let function = tool.get("function").unwrap_or(tool);
            let name = function.get("name")?.as_str()?.to_owned();
            Some((name, function.get("parameters").cloned().unwrap_or(Value::Null)))
        };
        Self(Arc::new(tools.iter().filter_map(read).collect()))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whether a tool of this name is offered.
    pub fn offers(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// The names of the tools, in no order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }

    /// The schema of a tool's parameters as a whole.
    pub fn schema(&self, name: &str) -> Option<Schema<'_>> {
        let root = self.0.get(name)?;
        Some(Schema { root, node: root }.resolved())
    }
}

/// A place in a JSON schema.
#[derive(Clone, Copy, Debug)]
pub struct Schema<'a> {
    root: &'a Value,
    node: &'a Value,
}

impl<'a> Schema<'a> {
    /// The schema of a property of the objects that this one describes.
    pub fn property(self, name: &str) -> Option<Self> {
        let own = |schema: Self| {
            let properties = schema.node.get("properties").and_then(|properties| properties.get(name));
            // `additionalProperties` may be a truth value, which describes nothing.
            let node = properties.or(schema.node.get("additionalProperties")).filter(|node| node.is_object())?;
            Some(schema.at(node))
        };
        own(self).or_else(|| self.alternatives().find_map(own))
    }

    /// The schema of the items of the arrays that this one describes.
    pub fn items(self) -> Option<Self> {
        let own = |schema: Self| Some(schema.at(schema.node.get("items").filter(|node| node.is_object())?));
        own(self).or_else(|| self.alternatives().find_map(own))
    }

    /// The types it allows (`string`, `integer` …), in its order; empty where it does not say.
    pub fn types(self) -> Vec<&'a str> {
        let mut types = self.own_types();
        types.extend(self.alternatives().flat_map(Self::own_types));
        let mut known = Vec::new();
        types.retain(|kind| {
            !known.contains(kind) && {
                known.push(*kind);
                true
            }
        });
        types
    }

    fn own_types(self) -> Vec<&'a str> {
        match self.node.get("type") {
            Some(Value::String(kind)) => vec![kind.as_str()],
            Some(Value::Array(kinds)) => kinds.iter().filter_map(Value::as_str).collect(),
            _ => {
                let values = self.node.get("enum").and_then(Value::as_array).map_or(&[][..], Vec::as_slice);
                values.iter().chain(self.node.get("const")).map(kind_of).collect()
            }
        }
    }

    fn alternatives(self) -> impl Iterator<Item = Self> {
        let lists = ["anyOf", "oneOf", "allOf"].into_iter().filter_map(move |key| self.node.get(key)?.as_array());
        lists.flatten().map(move |node| self.at(node))
    }

    fn at(self, node: &'a Value) -> Self {
        Self { node, ..self }.resolved()
    }

    /// Follows `$ref`s into the same schema.
    fn resolved(mut self) -> Self {
        for _ in 0..REFERENCES_MAX {
            let Some(pointer) = self.node.get("$ref").and_then(Value::as_str) else { break };
            let Some(node) = pointer.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer)) else { break };
            self.node = node;
        }
        self
    }
}

fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(number) if number.is_f64() => "number",
        Value::Number(_) => "integer",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::Tools;

    #[test]
    fn names_and_types_are_found() {
        let parameters = json!({
            "type": "object",
            "$defs": {"Point": {"type": "object", "properties": {"x": {"type": "number"}}}, "Loop": {"$ref": "#/$defs/Loop"}},
            "properties": {
                "plain": {"type": "string"},
                "several": {"type": ["integer", "null"]},
                "either": {"anyOf": [{"type": "string"}, {"type": "null"}, {"type": "string"}]},
                "chosen": {"enum": ["a", 1, null]},
                "point": {"$ref": "#/$defs/Point"},
                "points": {"type": "array", "items": {"$ref": "#/$defs/Point"}},
                "loop": {"$ref": "#/$defs/Loop"},
                "outside": {"$ref": "https://example.com/schema"},
                "open": {},
            },
        });
        let tools = Tools::of(&[
            json!({"type": "function", "function": {"name": "f", "parameters": parameters}}),
            json!({"name": "bare"}),
            json!({"type": "function"}),
        ]);
        let mut names: Vec<&str> = tools.names().collect();
        names.sort_unstable();
        assert_eq!(names, ["bare", "f"]);
        assert!(tools.offers("f") && !tools.offers("g") && !tools.is_empty() && Tools::default().is_empty());
        let schema = tools.schema("f").unwrap();
        let types = |name: &str| schema.property(name).unwrap().types();
        assert_eq!(types("plain"), ["string"]);
        assert_eq!(types("several"), ["integer", "null"]);
        assert_eq!(types("either"), ["string", "null"]);
        assert_eq!(types("chosen"), ["string", "integer", "null"]);
        assert_eq!(types("point"), ["object"]);
        assert_eq!(schema.property("point").unwrap().property("x").unwrap().types(), ["number"]);
        let items = schema.property("points").unwrap().items().unwrap();
        assert_eq!(items.property("x").unwrap().types(), ["number"]);
        for open in ["loop", "outside", "open"] {
            assert!(types(open).is_empty(), "{open}");
        }
        assert!(schema.property("absent").is_none());
        assert!(tools.schema("bare").unwrap().property("x").is_none());
    }
}
