//! Where Jinja in Python differs from minijinja: how values print, and what some tests and filters mean.

use std::fmt::Write;

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter,
    value::{Rest, ValueKind},
};

use super::number::float_repr;

/// Values nested deeper than this don't print; nothing JSON on the wire gets there.
pub const DEPTH_MAX: usize = 200;

/// Adds the differences to an environment.
pub fn install(environment: &mut Environment<'_>) {
    environment.set_formatter(format);
    environment.add_filter("string", string);
    environment.add_filter("trim", trim);
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Seq, ValueKind::Iterable, ValueKind::Map, ValueKind::String, ValueKind::Undefined];
        kinds.contains(&value.kind())
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// Charges a rendering for text made outside of minijinja's own accounting, as minijinja charges for JSON.
pub fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / 4)
}

fn prints_differently(value: &Value) -> bool {
    is_float(value) || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if !prints_differently(value) {
        return escape_formatter(out, state, value);
    }
    let text = to_str(value);
    charge(state, text.len())?;
    out.write_str(&text).map_err(Error::from)
}

fn string(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String {
        return Ok(value);
    }
    let text = to_str(&value);
    charge(state, text.len())?;
    Ok(Value::from(text))
}

fn trim(value: &Value, characters: Option<&str>, _rest: Rest<Value>) -> String {
    strip(&to_str(value), characters, true, true).to_owned()
}

/// `str.strip` and its halves.
pub fn strip<'a>(text: &'a str, characters: Option<&str>, start: bool, end: bool) -> &'a str {
    let dropped = |c: char| characters.map_or(is_space(c), |characters| characters.contains(c));
    let text = if start { text.trim_start_matches(dropped) } else { text };
    if end { text.trim_end_matches(dropped) } else { text }
}

/// `str.isspace` for one character: Unicode's white space and four separators that Python adds.
pub fn is_space(c: char) -> bool {
    c.is_whitespace() || ('\x1c'..='\x1f').contains(&c)
}

/// Whether the value is a Python float.
pub fn is_float(value: &Value) -> bool {
    value.kind() == ValueKind::Number && !value.is_integer()
}

/// `str(value)`.
pub fn to_str(value: &Value) -> String {
    match value.as_str() {
        Some(text) => text.to_owned(),
        None if value.is_undefined() => String::new(),
        None => {
            let mut output = String::new();
            repr(value, 0, &mut output);
            output
        }
    }
}

fn repr(value: &Value, depth: usize, output: &mut String) {
    if depth > DEPTH_MAX {
        output.push_str("...");
        return;
    }
    match value.kind() {
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), output),
        ValueKind::Undefined => output.push_str("Undefined"),
        ValueKind::Number if is_float(value) => match f64::try_from(value.clone()) {
            Ok(number) => output.push_str(&float_repr(number)),
            Err(_) => output.push_str(&value.to_string()),
        },
        ValueKind::Map => {
            output.push('{');
            for (index, key) in value.try_iter().into_iter().flatten().enumerate() {
                if index > 0 {
                    output.push_str(", ");
                }
                repr(&key, depth + 1, output);
                output.push_str(": ");
                repr(&value.get_item(&key).unwrap_or_default(), depth + 1, output);
            }
            output.push('}');
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            output.push(if tuple { '(' } else { '[' });
            let mut count = 0;
            for item in value.try_iter().into_iter().flatten() {
                if count > 0 {
                    output.push_str(", ");
                }
                repr(&item, depth + 1, output);
                count += 1;
            }
            output.push_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
        }
        _ => output.push_str(&value.to_string()),
    }
}

fn string_repr(text: &str, output: &mut String) {
    let quote = if text.contains('\'') && !text.contains('"') { '"' } else { '\'' };
    output.push(quote);
    for c in text.chars() {
        match c {
            '\\' => output.push_str("\\\\"),
            '\n' => output.push_str("\\n"),
            '\r' => output.push_str("\\r"),
            '\t' => output.push_str("\\t"),
            c if c == quote => {
                output.push('\\');
                output.push(c);
            }
            c if !is_printable(c) => {
                // Writing to a String cannot fail.
                let _ = match u32::from(c) {
                    code @ 0..=0xff => write!(output, "\\x{code:02x}"),
                    code @ 0x100..=0xffff => write!(output, "\\u{code:04x}"),
                    code => write!(output, "\\U{code:08x}"),
                };
            }
            c => output.push(c),
        }
    }
    output.push(quote);
}

/// `str.isprintable` for one character, for the characters that occur: controls, separators and format characters.
fn is_printable(c: char) -> bool {
    let format = matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{200b}'..='\u{200f}' | '\u{202a}'..='\u{202e}'
        | '\u{2060}'..='\u{206f}' | '\u{feff}' | '\u{e0001}'..='\u{e007f}');
    c == ' ' || !(c.is_control() || c.is_whitespace() || format)
}

/// An error about a value of the wrong kind.
pub fn type_error(what: impl Into<String>) -> Error {
    Error::new(ErrorKind::InvalidOperation, what.into())
}
