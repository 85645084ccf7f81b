//! Where Jinja in Python differs from minijinja: how values print, and what some tests and filters mean.

use std::{cell::Cell, fmt::Write};

use minijinja::{
    Environment, Error, ErrorKind, Output, State, Value, escape_formatter,
    value::{Kwargs, ValueKind},
};

use super::{OUTPUT_BYTES_MAX, number::float_repr};

/// Values nested deeper than this don't print; nothing JSON on the wire gets there.
pub const DEPTH_MAX: usize = 200;

/// Adds the differences to an environment.
pub fn install(environment: &mut Environment<'_>) {
    environment.set_formatter(format);
    environment.add_filter("string", string);
    // Its own takes space in proportion to the square of the depth.
    environment.add_filter("pprint", string);
    environment.add_filter("trim", trim);
    environment.add_filter("default", default);
    environment.add_filter("d", default);
    environment.add_filter("int", int);
    environment.add_filter("float", float);
    environment.add_filter("escape", escape);
    environment.add_filter("e", escape);
    environment.add_filter("forceescape", escape);
    environment.add_filter("wordcount", |state: &State, value: &Value| {
        Ok::<_, Error>(to_str(state, value)?.split_whitespace().count())
    });
    environment.add_test("iterable", |value: &Value| !value.is_none() && value.try_iter().is_ok());
    environment.add_test("sequence", |value: &Value| {
        let kinds = [ValueKind::Seq, ValueKind::Iterable, ValueKind::Map, ValueKind::String, ValueKind::Undefined];
        kinds.contains(&value.kind())
    });
    environment.add_test("callable", |value: &Value| value.kind() == ValueKind::Plain);
}

/// What a filter or method may still produce. Values can be lazy and far larger than the memory they take, and
/// minijinja's own accounting does not see what happens inside of our functions.
pub struct Budget {
    bytes: Cell<usize>,
}

impl Budget {
    /// What the rendering's fuel still pays for.
    pub fn of(state: &State) -> Self {
        let fuel = state.fuel_levels().map_or(0, |(_, remaining)| remaining);
        let bytes = usize::try_from(fuel.saturating_mul(BYTES_PER_FUEL)).unwrap_or(usize::MAX);
        Self { bytes: Cell::new(bytes.min(OUTPUT_BYTES_MAX)) }
    }

    /// Takes note of bytes before they are produced. A value of any size counts for one at least.
    pub fn spend(&self, bytes: usize) -> Result<(), Error> {
        let left = self.bytes.get().checked_sub(bytes.max(1)).ok_or_else(|| Error::from(ErrorKind::OutOfFuel))?;
        self.bytes.set(left);
        Ok(())
    }
}

/// Bytes of text made from values that one unit of fuel pays for: what minijinja charges for JSON.
const BYTES_PER_FUEL: u64 = 4;

/// Charges a rendering for text made by our functions.
pub fn charge(state: &State, bytes: usize) -> Result<(), Error> {
    state.consume_fuel(bytes as u64 / BYTES_PER_FUEL)
}

fn prints_differently(value: &Value) -> bool {
    is_float(value) || matches!(value.kind(), ValueKind::Seq | ValueKind::Iterable | ValueKind::Map)
}

fn format(out: &mut Output, state: &mut State, value: &Value) -> Result<(), Error> {
    if !prints_differently(value) {
        return escape_formatter(out, state, value);
    }
    out.write_str(&to_str(state, value)?).map_err(Error::from)
}

fn string(state: &State, value: Value) -> Result<Value, Error> {
    if value.kind() == ValueKind::String { Ok(value) } else { to_str(state, &value).map(Value::from) }
}

fn trim(state: &State, value: &Value, characters: Option<&str>) -> Result<String, Error> {
    Ok(strip(&to_str(state, value)?, characters, true, true).to_owned())
}

/// `default(value, default_value='', boolean=False)`.
fn default(value: Value, other: Option<Value>, boolean: Option<bool>, options: Kwargs) -> Result<Value, Error> {
    let other = other.or(options.get("default_value")?).unwrap_or_else(|| Value::from(""));
    let boolean = boolean.or(options.get("boolean")?).unwrap_or(false);
    options.assert_all_used()?;
    Ok(if value.is_undefined() || (boolean && !value.is_true()) { other } else { value })
}

/// `int(value, default=0, base=10)`: what is no number is the default.
fn int(value: &Value, other: Option<Value>, base: Option<u32>, options: Kwargs) -> Result<Value, Error> {
    let other = other.or(options.get("default")?).unwrap_or_else(|| Value::from(0));
    let base = base.or(options.get("base")?).unwrap_or(10);
    options.assert_all_used()?;
    if !(2..=36).contains(&base) {
        return Err(type_error("int: the base has to be from 2 to 36"));
    }
    let whole = |number: f64| {
        // Beyond these no whole number of the template language reaches.
        (number.is_finite() && number.abs() < 1e38).then(|| Value::from(number.trunc() as i128))
    };
    let read = match value.as_str() {
        Some(text) => {
            let text = text.trim_matches(is_space).replace('_', "").to_lowercase();
            let (sign, digits) = match text.strip_prefix('-') {
                Some(digits) => (-1, digits),
                None => (1, text.strip_prefix('+').unwrap_or(&text)),
            };
            let prefix = match base {
                2 => "0b",
                8 => "0o",
                16 => "0x",
                _ => "",
            };
            let digits = digits.strip_prefix(prefix).unwrap_or(digits);
            let plain = digits.starts_with(|c: char| c.is_digit(base));
            let number = i128::from_str_radix(digits, base).ok().filter(|_| plain);
            number.map(|number| Value::from(sign * number)).or_else(|| whole(parse_float(&text)?))
        }
        None if value.kind() == ValueKind::Bool => Some(Value::from(i64::from(value.is_true()))),
        None if is_float(value) => f64::try_from(value.clone()).ok().and_then(whole),
        None if value.kind() == ValueKind::Number => Some(value.clone()),
        None => None,
    };
    Ok(read.unwrap_or(other))
}

/// `float(value, default=0.0)`: what is no number is the default.
fn float(value: &Value, other: Option<Value>, options: Kwargs) -> Result<Value, Error> {
    let other = other.or(options.get("default")?).unwrap_or_else(|| Value::from(0.0));
    options.assert_all_used()?;
    let read = match value.as_str() {
        Some(text) => parse_float(text),
        None if value.kind() == ValueKind::Bool => Some(if value.is_true() { 1.0 } else { 0.0 }),
        None => f64::try_from(value.clone()).ok(),
    };
    Ok(read.map_or(other, Value::from))
}

fn parse_float(text: &str) -> Option<f64> {
    text.trim_matches(is_space).replace('_', "").parse().ok()
}

/// `markupsafe.escape`, which names fewer characters than minijinja does.
fn escape(state: &State, value: &Value) -> Result<Value, Error> {
    let text = to_str(state, value)?;
    let budget = Budget::of(state);
    let mut escaped = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => escaped.push_str("&amp;"),
            '<' => escaped.push_str("&lt;"),
            '>' => escaped.push_str("&gt;"),
            '\'' => escaped.push_str("&#39;"),
            '"' => escaped.push_str("&#34;"),
            c => escaped.push(c),
        }
    }
    budget.spend(escaped.len())?;
    Ok(Value::from(escaped))
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

/// `str(value)`, charged for.
pub fn to_str(state: &State, value: &Value) -> Result<String, Error> {
    if let Some(text) = value.as_str() {
        return Ok(text.to_owned());
    }
    if value.is_undefined() {
        return Ok(String::new());
    }
    let mut output = String::new();
    repr(value, 0, &Budget::of(state), &mut output)?;
    charge(state, output.len())?;
    Ok(output)
}

fn repr(value: &Value, depth: usize, budget: &Budget, output: &mut String) -> Result<(), Error> {
    if depth > DEPTH_MAX {
        return Err(type_error("the value is nested too deeply to print"));
    }
    let before = output.len();
    match value.kind() {
        ValueKind::String => string_repr(value.as_str().unwrap_or_default(), output),
        ValueKind::Undefined => output.push_str("Undefined"),
        ValueKind::Number if is_float(value) => match f64::try_from(value.clone()) {
            Ok(number) => output.push_str(&float_repr(number)),
            Err(_) => output.push_str(&value.to_string()),
        },
        ValueKind::Map => {
            output.push('{');
            for (index, key) in value.try_iter()?.checked().enumerate() {
                let key = key?;
                output.push_str(if index > 0 { ", " } else { "" });
                repr(&key, depth + 1, budget, output)?;
                output.push_str(": ");
                repr(&value.get_item(&key)?, depth + 1, budget, output)?;
            }
            output.push('}');
            return budget.spend(1);
        }
        ValueKind::Seq | ValueKind::Iterable => {
            let tuple = value.is_tuple();
            output.push(if tuple { '(' } else { '[' });
            let mut count = 0_usize;
            for item in value.try_iter()?.checked() {
                output.push_str(if count > 0 { ", " } else { "" });
                repr(&item?, depth + 1, budget, output)?;
                count += 1;
            }
            output.push_str(match (tuple, count) {
                (true, 1) => ",)",
                (true, _) => ")",
                (false, _) => "]",
            });
            return budget.spend(1);
        }
        _ => output.push_str(&value.to_string()),
    }
    budget.spend(output.len() - before)
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
