//! Texts, whole numbers, and how many of something there are.

use mesh_core::formats;
use serde_json::{Map, Value, json};

use super::{Keywords, Translation, pattern};

/// The child counts with numbers of so many digits.
const INTEGER_MAX: f64 = 999_999_999_999_999.0;

impl Translation<'_> {
    pub(super) fn text(&mut self, keywords: &Keywords<'_>, at: &str) -> Result<Value, String> {
        let bounded = ["minLength", "maxLength"].into_iter().find(|keyword| keywords.contains_key(keyword));
        let formed: Vec<_> =
            ["pattern", "format"].into_iter().filter(|keyword| keywords.contains_key(keyword)).collect();
        let expression = match (&formed[..], bounded) {
            ([], _) => {
                let (least, most) = counts(keywords, ["minLength", "maxLength"], at)?;
                self.repeat(least, most, at)?;
                let mut text = Map::from_iter([("type".to_owned(), "string".into())]);
                if least > 0 {
                    text.insert("minLength".into(), least.into());
                }
                text.extend(most.map(|most| ("maxLength".to_owned(), most.into())));
                return Ok(text.into());
            }
            ([_, _, ..], _) => return Err(format!("`pattern` and `format` together at {at}")),
            ([formed], Some(bounded)) => return Err(format!("`{bounded}` beside `{formed}` at {at}")),
            (["pattern"], None) => {
                let given = keywords["pattern"].as_str();
                given.ok_or_else(|| format!("{at}/pattern has to be a text"))?.to_owned()
            }
            (_, None) => {
                let format = keywords["format"];
                let known = format.as_str().and_then(formats::pattern);
                let names = formats::NAMES.join(", ");
                known.ok_or_else(|| format!("`format`: {format} at {at}/format; those that can be: {names}"))?
            }
        };
        let written = pattern::translated(&expression);
        let (pattern, repetitions) = written.map_err(|why| format!("`pattern`: {why}, at {at}/pattern"))?;
        self.repeat(0, Some(repetitions), at)?;
        Ok(json!({ "type": "string", "pattern": pattern }))
    }
}

/// A whole number between bounds.
pub(super) fn integer(keywords: &Keywords<'_>, at: &str) -> Result<Value, String> {
    let bound = |keyword: &str| match keywords.get(keyword) {
        None => Ok(None),
        Some(value) => match value.as_f64().filter(|value| value.abs() <= INTEGER_MAX) {
            Some(value) => Ok(Some(value)),
            None => Err(format!("`{keyword}`: {value}, not a number of at most 15 digits, at {at}/{keyword}")),
        },
    };
    let least = [bound("minimum")?.map(f64::ceil), bound("exclusiveMinimum")?.map(|bound| bound.floor() + 1.0)];
    let most = [bound("maximum")?.map(f64::floor), bound("exclusiveMaximum")?.map(|bound| bound.ceil() - 1.0)];
    let mut least = least.into_iter().flatten().reduce(f64::max);
    let most = most.into_iter().flatten().reduce(f64::min);
    if most.is_some_and(|most| least.is_some_and(|least| most < least)) {
        return Err(format!("no number is between the bounds at {at}"));
    }
    // Alone, a bound below zero lets the child write zeros in front.
    if most.is_some_and(|most| most < 0.0) {
        least.get_or_insert(-INTEGER_MAX);
    }
    let mut number = Map::from_iter([("type".to_owned(), "integer".into())]);
    for (keyword, bound) in [("minimum", least), ("maximum", most)] {
        number.extend(bound.map(|bound| (keyword.to_owned(), Value::from(bound as i64))));
    }
    Ok(number.into())
}

/// The least and the most of something.
pub(super) fn counts(keywords: &Keywords<'_>, names: [&str; 2], at: &str) -> Result<(u64, Option<u64>), String> {
    let count = |name: &str| match keywords.get(name) {
        None => Ok(None),
        Some(value) => {
            let whole = value.as_f64().filter(|value| value.fract() == 0.0 && (0.0..1e15).contains(value));
            whole.map(|count| Some(count as u64)).ok_or_else(|| format!("`{name}`: {value} at {at}/{name}"))
        }
    };
    let [least, most] = names;
    Ok((count(least)?.unwrap_or(0), count(most)?))
}
