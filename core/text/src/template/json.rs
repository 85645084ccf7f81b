//! JSON in and out: request values as template values, and `tojson` as transformers defines it (`json.dumps`).

use std::fmt::Write;

use minijinja::{
    Error, State, Value,
    value::{Kwargs, ValueKind},
};

use super::{
    number::float_repr,
    python::{self, Budget, type_error},
};

/// A JSON value as templates see it, keys in their order.
pub fn from_json(value: &serde_json::Value) -> Value {
    use serde_json::Value as Json;
    match value {
        Json::Null => Value::from(()),
        Json::Bool(value) => Value::from(*value),
        Json::Number(number) => match (number.as_i64(), number.as_u64(), number.as_f64()) {
            (Some(value), ..) => Value::from(value),
            (_, Some(value), _) => Value::from(value),
            (.., Some(value)) => Value::from(value),
            _ => Value::from(number.to_string()),
        },
        Json::String(text) => Value::from(text.as_str()),
        Json::Array(items) => items.iter().map(from_json).collect(),
        Json::Object(map) => Value::from_pairs(map.iter().map(|(key, value)| (key.as_str(), from_json(value)))),
    }
}

/// About the size of a JSON value as text, in bytes.
pub fn size(value: &serde_json::Value) -> usize {
    use serde_json::Value as Json;
    match value {
        Json::String(text) => text.len() + 2,
        Json::Array(items) => items.iter().map(|item| size(item) + 2).sum::<usize>() + 2,
        Json::Object(map) => map.iter().map(|(key, item)| key.len() + size(item) + 6).sum::<usize>() + 2,
        Json::Null | Json::Bool(_) | Json::Number(_) => 4,
    }
}

/// The `tojson` filter: `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
pub fn tojson(
    state: &State,
    value: &Value,
    ensure_ascii: Option<bool>,
    indent: Option<Value>,
    options: Kwargs,
) -> Result<String, Error> {
    let ensure_ascii = ensure_ascii.or(options.get("ensure_ascii")?);
    let indent = indent.or(options.get("indent")?);
    let separators: Option<Value> = options.get("separators")?;
    let sort_keys: Option<bool> = options.get("sort_keys")?;
    options.assert_all_used()?;
    let indent = indent.filter(|indent| !indent.is_none()).map(|indent| indent_text(&indent)).transpose()?;
    let (item, key) = match separators.filter(|separators| !separators.is_none()) {
        Some(separators) => pair(&separators)?,
        None => ((if indent.is_some() { "," } else { ", " }).to_owned(), ": ".to_owned()),
    };
    let sort_keys = sort_keys.unwrap_or(false);
    let writer =
        Writer { budget: Budget::of(state), ensure_ascii: ensure_ascii.unwrap_or(false), indent, item, key, sort_keys };
    let mut output = String::new();
    writer.value(value, 0, &mut output)?;
    python::charge(state, output.len())?;
    Ok(output)
}

/// Widest indentation of one level, in characters.
const INDENT_MAX: usize = 64;

fn indent_text(indent: &Value) -> Result<String, Error> {
    let text = match (indent.as_str(), i64::try_from(indent.clone())) {
        (Some(text), _) => text.to_owned(),
        (None, Ok(width)) => " ".repeat(usize::try_from(width).unwrap_or(0).min(INDENT_MAX + 1)),
        (None, Err(_)) => return Err(type_error("tojson: indent has to be a number or a string")),
    };
    if text.len() > INDENT_MAX {
        return Err(type_error(format!("tojson: indent has to be at most {INDENT_MAX} characters wide")));
    }
    Ok(text)
}

fn pair(separators: &Value) -> Result<(String, String), Error> {
    let parts: Vec<Value> = separators.try_iter()?.take(3).collect();
    match parts.as_slice() {
        [item, key] if item.as_str().is_some() && key.as_str().is_some() => Ok((text(item), text(key))),
        _ => Err(type_error("tojson: separators has to be a pair of strings")),
    }
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or_default().to_owned()
}

struct Writer {
    budget: Budget,
    ensure_ascii: bool,
    indent: Option<String>,
    item: String,
    key: String,
    sort_keys: bool,
}

impl Writer {
    fn value(&self, value: &Value, depth: usize, output: &mut String) -> Result<(), Error> {
        if depth > python::DEPTH_MAX {
            return Err(type_error("tojson: the value is nested too deeply"));
        }
        self.budget.spend(value.as_str().map_or(0, str::len))?;
        match value.kind() {
            ValueKind::None => output.push_str("null"),
            ValueKind::Bool => output.push_str(if value.is_true() { "true" } else { "false" }),
            ValueKind::Number => output.push_str(&number(value)),
            ValueKind::String => self.string(value.as_str().unwrap_or_default(), output),
            ValueKind::Seq | ValueKind::Iterable => {
                let items = value.try_iter()?.checked();
                self.container(['[', ']'], items, depth, output, |item, output| self.value(&item, depth + 1, output))?;
            }
            ValueKind::Map => {
                let mut pairs = Vec::new();
                for name in value.try_iter()?.checked() {
                    let name = name?;
                    self.budget.spend(name.as_str().map_or(0, str::len))?;
                    let item = value.get_item(&name)?;
                    pairs.push((key_text(&name)?, item));
                }
                if self.sort_keys {
                    pairs.sort_by(|a, b| a.0.cmp(&b.0));
                }
                self.container(['{', '}'], pairs.into_iter().map(Ok), depth, output, |(name, item), output| {
                    self.string(&name, output);
                    output.push_str(&self.key);
                    self.value(&item, depth + 1, output)
                })?;
            }
            kind => return Err(type_error(format!("tojson: a value of type {kind} is not JSON"))),
        }
        Ok(())
    }

    fn container<T>(
        &self,
        [open, close]: [char; 2],
        items: impl Iterator<Item = Result<T, Error>>,
        depth: usize,
        output: &mut String,
        write: impl Fn(T, &mut String) -> Result<(), Error>,
    ) -> Result<(), Error> {
        output.push(open);
        let mut empty = true;
        for item in items {
            if !empty {
                output.push_str(&self.item);
            }
            empty = false;
            self.newline(depth + 1, output)?;
            write(item?, output)?;
        }
        if !empty {
            self.newline(depth, output)?;
        }
        output.push(close);
        Ok(())
    }

    fn newline(&self, depth: usize, output: &mut String) -> Result<(), Error> {
        if let Some(indent) = &self.indent {
            self.budget.spend(depth * indent.len())?;
            output.push('\n');
            (0..depth).for_each(|_| output.push_str(indent));
        }
        Ok(())
    }

    fn string(&self, text: &str, output: &mut String) {
        output.push('"');
        for c in text.chars() {
            match c {
                '"' => output.push_str("\\\""),
                '\\' => output.push_str("\\\\"),
                '\n' => output.push_str("\\n"),
                '\r' => output.push_str("\\r"),
                '\t' => output.push_str("\\t"),
                '\x08' => output.push_str("\\b"),
                '\x0c' => output.push_str("\\f"),
                c if c < ' ' || (self.ensure_ascii && !(' '..='~').contains(&c)) => {
                    let mut units = [0; 2];
                    for unit in c.encode_utf16(&mut units) {
                        // Writing to a String cannot fail.
                        let _ = write!(output, "\\u{unit:04x}");
                    }
                }
                c => output.push(c),
            }
        }
        output.push('"');
    }
}

fn number(value: &Value) -> String {
    if !python::is_float(value) {
        return value.to_string();
    }
    match f64::try_from(value.clone()) {
        Ok(number) if number.is_nan() => "NaN".into(),
        Ok(number) if number.is_infinite() => (if number > 0.0 { "Infinity" } else { "-Infinity" }).into(),
        Ok(number) => float_repr(number),
        Err(_) => value.to_string(),
    }
}

fn key_text(key: &Value) -> Result<String, Error> {
    match key.kind() {
        ValueKind::String => Ok(text(key)),
        ValueKind::None => Ok("null".into()),
        ValueKind::Bool => Ok((if key.is_true() { "true" } else { "false" }).into()),
        ValueKind::Number => Ok(number(key)),
        kind => Err(type_error(format!("tojson: a key of type {kind} is not JSON"))),
    }
}
