//! Methods of Python's strings, lists and dicts: those minijinja-contrib has, and those it lacks or does differently.

use minijinja::{
    Error, ErrorKind, State, Value,
    value::{Tuple, ValueKind, from_args},
};
use minijinja_contrib::pycompat;

use super::python::{self, Budget, is_space, type_error};

/// Calls `value.method(*arguments)`.
pub fn call(state: &mut State, value: &Value, method: &str, arguments: &[Value]) -> Result<Value, Error> {
    let ours = match value.kind() {
        ValueKind::String => string(state, value.as_str().unwrap_or_default(), method, arguments)?,
        ValueKind::Seq | ValueKind::Iterable => list(state, value, method, arguments)?,
        ValueKind::Map => dict(value, method, arguments)?,
        _ => None,
    };
    match ours {
        Some(result) => Ok(result),
        None => pycompat::unknown_method_callback(state, value, method, arguments),
    }
}

fn string(state: &State, text: &str, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
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
        "startswith" | "endswith" => {
            let (what,): (&Value,) = from_args(arguments)?;
            let matches = |what: &Value| -> Result<bool, Error> {
                let what = required_str(what)?;
                Ok(if method == "startswith" { text.starts_with(what) } else { text.ends_with(what) })
            };
            let several: Vec<Value> = if what.is_tuple() { what.try_iter()?.collect() } else { vec![what.clone()] };
            let mut any = false;
            for what in &several {
                any |= matches(what)?;
            }
            Value::from(any)
        }
        "join" => {
            let (items,): (&Value,) = from_args(arguments)?;
            let budget = Budget::of(state);
            let mut joined = String::new();
            for (index, item) in items.try_iter()?.checked().enumerate() {
                let item = item?;
                let item = required_str(&item)?;
                budget.spend(text.len() + item.len())?;
                joined.push_str(if index > 0 { text } else { "" });
                joined.push_str(item);
            }
            Value::from(joined)
        }
        "replace" => {
            let (old, new, limit): (&str, &str, Option<i64>) = from_args(arguments)?;
            let limit = limit.and_then(|limit| usize::try_from(limit).ok()).unwrap_or(usize::MAX);
            let count = text.matches(old).count().min(limit);
            Budget::of(state).spend(text.len().saturating_add(count.saturating_mul(new.len())))?;
            Value::from(text.replacen(old, new, limit))
        }
        "format" => {
            // The formatting itself keeps no account of what it is given, nor of how wide it is asked to be.
            if widest_field(text) > WIDTH_MAX {
                return Err(type_error(format!("format: a field is wider than {WIDTH_MAX} characters")));
            }
            for argument in arguments {
                python::to_str(state, argument)?;
            }
            return Ok(None);
        }
        "center" | "ljust" | "rjust" | "zfill" => {
            let (width, fill): (i64, Option<&str>) = from_args(arguments)?;
            Value::from(padded(state, text, method, width, fill)?)
        }
        "swapcase" => {
            let () = from_args(arguments)?;
            let swap =
                |c: char| if c.is_uppercase() { c.to_lowercase().to_string() } else { c.to_uppercase().to_string() };
            Value::from(text.chars().map(swap).collect::<String>())
        }
        "title" => {
            let () = from_args(arguments)?;
            Value::from(title(text))
        }
        "casefold" => {
            let () = from_args(arguments)?;
            Value::from(text.to_lowercase())
        }
        _ => return Ok(None),
    }))
}

/// `str.title`: every run of letters is a word, so that an apostrophe begins one.
fn title(text: &str) -> String {
    let mut titled = String::with_capacity(text.len());
    let mut within = false;
    for c in text.chars() {
        match within {
            true => titled.extend(c.to_lowercase()),
            false => titled.extend(c.to_uppercase()),
        }
        within = c.is_alphabetic();
    }
    titled
}

/// `str.center`, `ljust`, `rjust` and `zfill`.
fn padded(state: &State, text: &str, method: &str, width: i64, fill: Option<&str>) -> Result<String, Error> {
    let fill = fill.unwrap_or(if method == "zfill" { "0" } else { " " });
    let mut characters = fill.chars();
    let (Some(_), None) = (characters.next(), characters.next()) else {
        return Err(type_error(format!("{method}: has to fill with one character")));
    };
    let width = usize::try_from(width).unwrap_or(0);
    let missing = width.saturating_sub(text.chars().count());
    Budget::of(state).spend(missing.saturating_mul(fill.len()).saturating_add(text.len()))?;
    let (before, after) = match method {
        // As Python rounds: the odd one goes to the left of a text of odd length, else to the right.
        "center" => {
            let left = missing / 2 + (missing & width & 1);
            (left, missing - left)
        }
        "ljust" => (0, missing),
        _ => (missing, 0),
    };
    let (sign, digits) = match text.strip_prefix(['+', '-']) {
        Some(digits) if method == "zfill" => text.split_at(text.len() - digits.len()),
        _ => ("", text),
    };
    Ok([sign, &fill.repeat(before), digits, &fill.repeat(after)].concat())
}

/// Widest field, and most decimals, of `str.format`, in characters.
const WIDTH_MAX: usize = 1000;

/// The largest number in the format specifications (`{name:>20.3f}`) of a format string.
fn widest_field(format: &str) -> usize {
    let fields = format.split('{').skip(1).filter_map(|field| Some(field.split('}').next()?.split_once(':')?.1));
    let numbers = fields.flat_map(|spec| spec.split(|c: char| !c.is_ascii_digit()));
    numbers.filter(|digits| !digits.is_empty()).map(|digits| digits.parse().unwrap_or(usize::MAX)).max().unwrap_or(0)
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

fn list(state: &State, value: &Value, method: &str, arguments: &[Value]) -> Result<Option<Value>, Error> {
    Ok(Some(match method {
        "index" => {
            let (what,): (&Value,) = from_args(arguments)?;
            let budget = Budget::of(state);
            for (index, item) in value.try_iter()?.checked().enumerate() {
                budget.spend(1)?;
                if item? == *what {
                    return Ok(Some(Value::from(index)));
                }
            }
            return Err(type_error("index: not in the list"));
        }
        "count" => {
            let (what,): (&Value,) = from_args(arguments)?;
            let budget = Budget::of(state);
            let mut count = 0;
            for item in value.try_iter()?.checked() {
                budget.spend(1)?;
                count += u64::from(item? == *what);
            }
            Value::from(count)
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
