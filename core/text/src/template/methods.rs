//! Methods of Python's strings, lists and dicts: those minijinja-contrib has, and those it lacks or does differently.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::python::{self, is_space, type_error};

/// Calls `value.method(*arguments)`.
pub fn call(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let ours = match value.kind() {
        ValueKind::String => string(value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => list(value, method, arguments)?,
        ValueKind::Map => dict(value, method, arguments)?,
        _ => None,
    };
    match ours {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

fn string(text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "strip" | "lstrip" | "rstrip" => {
            let (characters,): (Option<Value>,) = from_args(arguments)?;
            let characters = characters.filter(|characters| !characters.is_none());
            let characters = characters.as_ref().map(required_str).transpose()?;
            Value::from(python::strip(text, characters, method != "rstrip", method != "lstrip"))
        }
        "split" | "rsplit" => {
            let (separator, limit, options): (Option<Value>, Option<i64>, minijinja::value::Kwargs) =
                from_args(arguments)?;
            let separator = separator.or(options.get("sep")?).filter(|separator| !separator.is_none());
            let limit = limit.or(options.get("maxsplit")?).and_then(|limit| usize::try_from(limit).ok());
            options.assert_all_used()?;
            let separator = separator.as_ref().map(required_str).transpose()?;
            if separator == Some("") {
                return Err(type_error("split: the separator is empty"));
            }
            match method {
                "split" => split(text, separator, limit).into_iter().map(Value::from).collect(),
                _ => rsplit(text, separator, limit).into_iter().map(Value::from).collect(),
            }
        }
        "removeprefix" => {
            let (prefix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_prefix(prefix).unwrap_or(text))
        }
        "removesuffix" => {
            let (suffix,): (&str,) = from_args(arguments)?;
            Value::from(text.strip_suffix(suffix).unwrap_or(text))
        }
        "partition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let (before, found, after) = match text.split_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => (text, "", ""),
            };
            Value::from(Tuple::from([before, found, after].map(Value::from)))
        }
        "rpartition" => {
            let (separator,): (&str,) = from_args(arguments)?;
            let (before, found, after) = match text.rsplit_once(separator) {
                Some((before, after)) => (before, separator, after),
                None => ("", "", text),
            };
            Value::from(Tuple::from([before, found, after].map(Value::from)))
        }
        "index" => {
            let (what,): (&str,) = from_args(arguments)?;
            let at = text.find(what).ok_or_else(|| type_error("index: substring not found"))?;
            Value::from(text[..at].chars().count())
        }
        "casefold" => {
            let () = from_args(arguments)?;
            Value::from(text.to_lowercase())
        }
        _ => return Ok(None),
    }))
}

fn required_str(value: &Value) -> Result<&str, Error> {
    value.as_str().ok_or_else(|| type_error(format!("expected a string, not {}", value.kind())))
}

/// `str.split`; `limit` is the most cuts.
fn split<'a>(text: &'a str, separator: Option<&str>, limit: Option<usize>) -> Vec<&'a str> {
    let cuts = limit.unwrap_or(usize::MAX);
    if let Some(separator) = separator {
        return text.splitn(cuts.saturating_add(1), separator).collect();
    }
    let mut words = Vec::new();
    let mut rest = text.trim_start_matches(is_space);
    while !rest.is_empty() {
        let end = if words.len() < cuts { rest.find(is_space) } else { None };
        let (word, after) = rest.split_at(end.unwrap_or(rest.len()));
        words.push(word);
        rest = after.trim_start_matches(is_space);
    }
    words
}

/// `str.rsplit`; `limit` is the most cuts.
fn rsplit<'a>(text: &'a str, separator: Option<&str>, limit: Option<usize>) -> Vec<&'a str> {
    let cuts = limit.unwrap_or(usize::MAX);
    let mut words = Vec::new();
    if let Some(separator) = separator {
        words.extend(text.rsplitn(cuts.saturating_add(1), separator));
    } else {
        let mut rest = text.trim_end_matches(is_space);
        while !rest.is_empty() {
            let space = if words.len() < cuts { rest.char_indices().rfind(|(_, c)| is_space(*c)) } else { None };
            let (before, word) = rest.split_at(space.map_or(0, |(at, c)| at + c.len_utf8()));
            words.push(word);
            rest = before.trim_end_matches(is_space);
        }
    }
    words.reverse();
    words
}

fn list(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let (what,): (&Value,) = from_args(arguments)?;
            let mut items = value.try_iter()?;
            Value::from(items.position(|item| item == *what).ok_or_else(|| type_error("index: not in the list"))?)
        }
        "count" => {
            let (what,): (&Value,) = from_args(arguments)?;
            Value::from(value.try_iter()?.filter(|item| item == what).count())
        }
        "copy" => {
            let () = from_args(arguments)?;
            value.clone()
        }
        "append" | "extend" | "insert" | "pop" | "remove" | "clear" | "sort" | "reverse" => {
            return Err(immutable("list", method));
        }
        _ => return Ok(None),
    }))
}

fn dict(value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "copy" => {
            let () = from_args(arguments)?;
            value.clone()
        }
        "pop" | "popitem" | "update" | "setdefault" | "clear" => return Err(immutable("dict", method)),
        _ => return Ok(None),
    }))
}

/// transformers renders in Jinja's immutable sandbox, which refuses these too.
fn immutable(kind: &str, method: &str) -> Error {
    Error::new(ErrorKind::InvalidOperation, format!("a template may not change values: `{method}` of a {kind}"))
}
