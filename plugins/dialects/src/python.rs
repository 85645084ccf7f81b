//! Python's literals and calls with keyword arguments, as models write them: `f(a=1, b="x")`.

use serde_json::{Map, Number, Value};

use crate::typed::Arguments;

/// Deepest nesting that is read.
const DEPTH_MAX: usize = 64;

/// Reads a literal: strings, numbers, `True`, `None`, lists, tuples and dicts. JSON's words for them count too.
pub fn literal(text: &str) -> Option<Value> {
    let mut reader = Reader { rest: text, lenient: false };
    let value = reader.value(0)?;
    reader.ends().then_some(value)
}

/// Reads a list of calls, `[f(a=1), g()]`, to names and the texts of JSON objects. `offers` tells the names that are
/// functions.
pub fn calls(text: &str, offers: impl Fn(&str) -> bool) -> Option<Vec<(String, String)>> {
    // Strings are written without escapes by some templates, and then by the models that read them.
    [false, true].into_iter().find_map(|lenient| {
        let mut reader = Reader { rest: text, lenient };
        let calls = reader.calls(&offers)?;
        reader.ends().then_some(calls)
    })
}

struct Reader<'a> {
    rest: &'a str,
    /// A quote ends a string only if what follows can follow a string.
    lenient: bool,
}

impl<'a> Reader<'a> {
    fn ends(&mut self) -> bool {
        self.rest.trim_start().is_empty()
    }

    /// Takes this text, after white space.
    fn take(&mut self, text: &str) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(text) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn word(&mut self, of_a_word: impl Fn(char) -> bool) -> &'a str {
        self.rest = self.rest.trim_start();
        let end = self.rest.find(|c| !of_a_word(c)).unwrap_or(self.rest.len());
        let (word, rest) = self.rest.split_at(end);
        self.rest = rest;
        word
    }

    fn calls(&mut self, offers: &impl Fn(&str) -> bool) -> Option<Vec<(String, String)>> {
        let mut calls = Vec::new();
        self.take("[").then_some(())?;
        while !self.take("]") {
            let name = self.word(|c| c.is_alphanumeric() || "_.-".contains(c));
            if !offers(name) || !self.take("(") {
                return None;
            }
            let mut arguments = Arguments::default();
            while !self.take(")") {
                let name = self.word(|c| c.is_alphanumeric() || "_-".contains(c));
                if !self.take("=") {
                    return None;
                }
                let value = self.value(0)?;
                if !arguments.add(name, value) || !(self.take(",") || self.rest.trim_start().starts_with(')')) {
                    return None;
                }
            }
            calls.push((name.to_owned(), arguments.text()));
            if !self.take(",") && !self.rest.trim_start().starts_with(']') {
                return None;
            }
        }
        Some(calls)
    }

    fn value(&mut self, depth: usize) -> Option<Value> {
        if depth > DEPTH_MAX {
            return None;
        }
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '"' | '\'' => self.string().map(Value::String),
            '[' => self.list(']', depth),
            '(' => self.list(')', depth),
            '{' => self.dict(depth),
            _ => {
                let word = self.word(|c| c.is_alphanumeric() || "+-._".contains(c));
                match word {
                    "True" | "true" => Some(Value::Bool(true)),
                    "False" | "false" => Some(Value::Bool(false)),
                    "None" | "null" => Some(Value::Null),
                    _ => number(word),
                }
            }
        }
    }

    fn list(&mut self, close: char, depth: usize) -> Option<Value> {
        self.rest = &self.rest[1..];
        let mut items = Vec::new();
        loop {
            self.rest = self.rest.trim_start();
            if let Some(rest) = self.rest.strip_prefix(close) {
                self.rest = rest;
                return Some(Value::Array(items));
            }
            items.push(self.value(depth + 1)?);
            if !self.take(",") && !self.rest.starts_with(close) {
                return None;
            }
        }
    }

    fn dict(&mut self, depth: usize) -> Option<Value> {
        self.rest = &self.rest[1..];
        let mut map = Map::new();
        while !self.take("}") {
            let key = match self.value(depth + 1)? {
                Value::String(key) => key,
                Value::Array(_) | Value::Object(_) => return None,
                key => key.to_string(),
            };
            self.take(":").then_some(())?;
            map.insert(key, self.value(depth + 1)?);
            if !self.take(",") && !self.rest.starts_with('}') {
                return None;
            }
        }
        Some(Value::Object(map))
    }

    fn string(&mut self) -> Option<String> {
        let quote = self.rest.chars().next()?;
        let triple: String = [quote; 3].iter().collect();
        let close = if self.rest.starts_with(&triple) && self.rest.len() >= 6 { triple } else { quote.to_string() };
        self.rest = &self.rest[close.len()..];
        let mut text = String::new();
        let mut rest = self.rest;
        loop {
            if let Some(after) = rest.strip_prefix(close.as_str())
                && (!self.lenient || can_follow_string(after))
            {
                self.rest = after;
                return Some(text);
            }
            let c = rest.chars().next()?;
            rest = &rest[c.len_utf8()..];
            match c {
                '\\' => rest = escape(rest, &mut text)?,
                c => text.push(c),
            }
        }
    }
}

fn can_follow_string(rest: &str) -> bool {
    let rest = rest.trim_start();
    // After a comma comes another argument or another value, not prose.
    match rest.chars().next() {
        Some(')' | ']' | '}' | ':') => true,
        Some(',') => {
            let next = rest[1..].trim_start();
            let word = next.find(|c: char| !(c.is_alphanumeric() || c == '_')).unwrap_or(next.len());
            word == 0 || next[word..].starts_with('=')
        }
        _ => false,
    }
}

/// Reads what follows a backslash into `text`; returns what comes after it.
fn escape<'a>(rest: &'a str, text: &mut String) -> Option<&'a str> {
    let c = rest.chars().next()?;
    let rest = &rest[c.len_utf8()..];
    let plain = match c {
        'n' => '\n',
        't' => '\t',
        'r' => '\r',
        'b' => '\u{8}',
        'f' => '\u{c}',
        'a' => '\u{7}',
        'v' => '\u{b}',
        '0' => '\0',
        '\n' => return Some(rest),
        '\\' | '\'' | '"' | '/' => c,
        'x' | 'u' | 'U' => {
            let digits = match c {
                'x' => 2,
                'u' => 4,
                _ => 8,
            };
            let (unit, rest) = hex(rest, digits)?;
            // JSON writes what is beyond 16 bits as two.
            if (0xd800..0xdc00).contains(&unit) {
                let (low, rest) = hex(rest.strip_prefix("\\u")?, 4)?;
                let low = low.checked_sub(0xdc00).filter(|low| *low < 0x400)?;
                text.push(char::from_u32(0x10000 + ((unit - 0xd800) << 10) + low)?);
                return Some(rest);
            }
            text.push(char::from_u32(unit)?);
            return Some(rest);
        }
        other => {
            // Python keeps a backslash that means nothing.
            text.push('\\');
            other
        }
    };
    text.push(plain);
    Some(rest)
}

fn hex(text: &str, digits: usize) -> Option<(u32, &str)> {
    let (digits, rest) = text.split_at_checked(digits)?;
    let all_hex = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
    Some((u32::from_str_radix(digits, 16).ok().filter(|_| all_hex)?, rest))
}

fn number(word: &str) -> Option<Value> {
    let word = word.replace('_', "");
    let plain = word.strip_prefix('+').unwrap_or(&word);
    if let Ok(number) = serde_json::from_str::<Number>(plain) {
        return Some(Value::Number(number));
    }
    // `.5`, `1.` and `007` are numbers to Python or to models. Infinities are none to JSON.
    let digits = plain.strip_prefix('-').unwrap_or(plain);
    let begins =
        digits.starts_with(|c: char| c.is_ascii_digit() || c == '.') && digits.contains(|c: char| c.is_ascii_digit());
    Number::from_f64(plain.parse().ok().filter(|_| begins)?).map(Value::Number)
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::{calls, literal};

    #[test]
    fn literals_are_read() {
        let cases: [(&str, Value); 22] = [
            ("1", json!(1)),
            ("-1.5e3", json!(-1500.0)),
            ("+2", json!(2)),
            ("1_000", json!(1000)),
            (".5", json!(0.5)),
            ("1.", json!(1.0)),
            ("True", json!(true)),
            ("null", json!(null)),
            ("'it\\'s'", json!("it's")),
            ("\"it's\"", json!("it's")),
            ("''", json!("")),
            ("'''a'b\"c'''", json!("a'b\"c")),
            (r"'\n\t\\\x41\u00e9\U0001f600\q'", json!("\n\t\\Aé😀\\q")),
            (r#""\ud83d\ude00""#, json!("😀")),
            ("[1, 'a', [None],]", json!([1, "a", [null]])),
            ("[]", json!([])),
            ("(1, 2)", json!([1, 2])),
            ("{'a': 1, \"b\": {'c': [True]}}", json!({"a": 1, "b": {"c": [true]}})),
            ("{1: 2, None: 3,}", json!({"1": 2, "null": 3})),
            ("{}", json!({})),
            ("{\"a\": true}", json!({"a": true})),
            (" 'x' ", json!("x")),
        ];
        for (text, expected) in cases {
            assert_eq!(literal(text), Some(expected), "{text}");
        }
        let deep = "[".repeat(100_000);
        for bad in [
            "",
            "x",
            "'",
            "'a",
            "[1",
            "[1 2]",
            "{'a'}",
            "{[1]: 2}",
            "1 2",
            "inf",
            "nan",
            "1__x",
            "'\\u12'",
            "'\\ud83d'",
            "'\\u+041'",
            &deep,
        ] {
            assert_eq!(literal(bad), None, "{bad:.20}");
        }
    }

    #[test]
    fn calls_are_read() {
        let read = |text: &str| calls(text, |name| ["f", "a.g"].contains(&name));
        let expected = |list: &[(&str, &str)]| {
            Some(list.iter().map(|(name, arguments)| ((*name).to_owned(), (*arguments).to_owned())).collect::<Vec<_>>())
        };
        assert_eq!(read("[f(a=1, b='x'), a.g()]"), expected(&[("f", r#"{"a":1,"b":"x"}"#), ("a.g", "{}")]));
        assert_eq!(read(" [ f ( a = [ 1 ] , ) , ] "), expected(&[("f", r#"{"a":[1]}"#)]));
        assert_eq!(read("[f(a='it's, ok', b=2)]"), expected(&[("f", r#"{"a":"it's, ok","b":2}"#)]));
        assert_eq!(read("[f(a='say \"hi\"')]"), expected(&[("f", r#"{"a":"say \"hi\""}"#)]));
        for bad in [
            "",
            "[",
            "f()",
            "[h()]",
            "[f]",
            "[f(1)]",
            "[f(a=)]",
            "[f(a=1 b=2)]",
            "[f(a=1, a=2)]",
            "[f()] x",
            "[f() f()]",
        ] {
            assert_eq!(read(bad), None, "{bad}");
        }
    }
}
