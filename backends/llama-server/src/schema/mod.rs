//! JSON schemas as the child can be trusted with. It makes a grammar of a schema, passes over what it does not know, and does
//! not survive some of what makes no sense. What it is sent is therefore put together anew, of what it gets right: every
//! answer that the child then allows is valid for the schema that was asked for. What that cannot be done with is refused by
//! its keyword.
//!
//! - [`text`], [`pattern`]: texts and numbers.
//! - [`choice`]: when one of several is no more than one.

mod choice;
mod pattern;
mod text;

use std::collections::{BTreeMap, HashMap, VecDeque};

use serde_json::{Map, Value, json};

/// Schemas nested deeper than this are refused.
const DEPTH_MAX: usize = 64;
/// Most repetitions that a schema counts, all of its lengths and patterns together. The child's grammar has a rule for each.
const REPETITIONS_MAX: u64 = 100_000;
/// Most repetitions that something has to have.
const REPETITIONS_MIN_MAX: u64 = 2000;

/// Most lengths of an array that begins with items of their own, and most items.
const TUPLE_LENGTHS_MAX: usize = 16;
const TUPLE_ITEMS_MAX: usize = 64;

/// Keywords that say nothing about what is valid, and those that references look into.
const ANNOTATIONS: [&str; 16] = [
    "$schema",
    "$id",
    "$comment",
    "$anchor",
    "$defs",
    "definitions",
    "title",
    "description",
    "default",
    "example",
    "examples",
    "deprecated",
    "readOnly",
    "writeOnly",
    "contentEncoding",
    "contentMediaType",
];
const TYPES: [&str; 7] = ["string", "integer", "number", "boolean", "null", "array", "object"];
/// Keywords that say it all by themselves. The child takes the first of these and forgets what is beside it.
const ALONE: [&str; 6] = ["$ref", "oneOf", "anyOf", "allOf", "const", "enum"];
/// Keywords of one type, which say nothing about values of others.
const OF_TYPES: [(&str, &[&str]); 4] = [
    ("string", &["minLength", "maxLength", "pattern", "format"]),
    ("integer", &["minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"]),
    ("array", &["items", "prefixItems", "minItems", "maxItems"]),
    ("object", &["properties", "required", "additionalProperties"]),
];

/// What the keywords of a schema say that are no annotations.
type Keywords<'a> = BTreeMap<&'a str, &'a Value>;

/// The schema that the child is sent. Says which keyword it would not keep to, with its place.
pub(crate) fn translated(schema: &Value) -> Result<Value, String> {
    let mut translation = Translation { root: schema, targets: Vec::new(), numbers: HashMap::new(), repetitions: 0 };
    translation.number("");
    let mut definitions = Vec::new();
    while let Some(target) = translation.targets.get(definitions.len()).cloned() {
        let schema = translation.root.pointer(&target).ok_or_else(|| format!("`$ref`: #{target}, which is nowhere"))?;
        definitions.push(translation.schema(schema, &format!("#{target}"), 0)?);
    }
    if let Some(index) = endless(&definitions) {
        return Err(format!("`$ref`: #{} leads back to itself and nowhere else", translation.targets[index]));
    }
    // Behind references, which are numbered, no name in a schema is taken for that of another of the grammar's rules.
    let definitions = definitions.into_iter().enumerate().map(|(index, schema)| (name(index), schema));
    Ok(json!({ "$ref": reference(0), "$defs": definitions.collect::<Map<_, _>>() }))
}

fn name(index: usize) -> String {
    format!("d{index}")
}

fn reference(index: usize) -> String {
    format!("#/$defs/{}", name(index))
}

/// What the value of a schema's type is called.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::String(_) => "string",
        Value::Number(number) if number.as_f64().is_some_and(|number| number.fract() == 0.0) => "integer",
        Value::Number(_) => "number",
        Value::Bool(_) => "boolean",
        Value::Null => "null",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

/// A definition that begins with itself: the child cannot make a grammar of it.
fn endless(definitions: &[Value]) -> Option<usize> {
    let begins: Vec<Vec<usize>> = definitions.iter().map(beginnings).collect();
    let mut awaited: Vec<usize> = begins.iter().map(Vec::len).collect();
    let mut users = vec![Vec::new(); definitions.len()];
    for (index, targets) in begins.iter().enumerate() {
        targets.iter().for_each(|target| users[*target].push(index));
    }
    let mut ended: VecDeque<usize> = (0..definitions.len()).filter(|index| awaited[*index] == 0).collect();
    while let Some(index) = ended.pop_front() {
        for user in &users[index] {
            awaited[*user] -= 1;
            if awaited[*user] == 0 {
                ended.push_back(*user);
            }
        }
    }
    awaited.iter().position(|awaited| *awaited > 0)
}

/// The definitions that what is written may be one of.
fn beginnings(schema: &Value) -> Vec<usize> {
    if let Some(target) = schema.get("$ref").and_then(Value::as_str) {
        return target.rsplit('d').next().and_then(|index| index.parse().ok()).into_iter().collect();
    }
    let several = schema.get("anyOf").and_then(Value::as_array);
    several.into_iter().flatten().flat_map(beginnings).collect()
}

struct Translation<'a> {
    root: &'a Value,
    /// Pointers to what is defined, in the order of their numbers.
    targets: Vec<String>,
    numbers: HashMap<String, usize>,
    repetitions: u64,
}

impl<'a> Translation<'a> {
    fn schema(&mut self, schema: &'a Value, at: &str, depth: usize) -> Result<Value, String> {
        if depth > DEPTH_MAX {
            return Err(format!("the schema is nested more than {DEPTH_MAX} levels deep at {at}"));
        }
        let keywords = keywords(schema, at)?;
        let given: Vec<_> = ALONE.into_iter().filter(|keyword| keywords.contains_key(keyword)).collect();
        let [alone] = given[..] else {
            return match given[..] {
                [one, other, ..] => Err(format!("`{one}` and `{other}` together at {at}")),
                _ => self.of_types(&keywords, at, depth),
            };
        };
        let value = keywords[alone];
        let here = format!("{at}/{alone}");
        let beside = keywords.keys().find(|keyword| match alone {
            "const" | "enum" => !matches!(**keyword, "const" | "enum" | "type"),
            "allOf" => !matches!(**keyword, "allOf" | "type" | "properties" | "required"),
            _ => **keyword != alone,
        });
        if let Some(other) = beside {
            return Err(format!("`{alone}` and `{other}` together at {at}"));
        }
        match alone {
            "$ref" => {
                let inside = value.as_str().and_then(|text| text.strip_prefix('#'));
                let target = inside.filter(|pointer| self.root.pointer(pointer).is_some());
                let target = target.ok_or_else(|| format!("`$ref`: {value}, which is not in the schema, at {here}"))?;
                Ok(json!({ "$ref": reference(self.number(target)) }))
            }
            "const" => only_of_types(&keywords, vec![value], at),
            "enum" => {
                let values = value.as_array().ok_or_else(|| format!("{here} has to be a list"))?;
                only_of_types(&keywords, values.iter().collect(), at)
            }
            "allOf" => self.all_of(&keywords, at, depth),
            _ => {
                let several = list(value, &here)?;
                if alone == "oneOf" {
                    let pairs = several.iter().enumerate().flat_map(|(index, one)| {
                        several[..index].iter().enumerate().map(move |(other, schema)| (other, schema, index, one))
                    });
                    for (index, one, later, other) in pairs {
                        if !choice::disjoint(self.root, one, other) {
                            let why = "may be valid together, which is not known to be impossible";
                            return Err(format!("`oneOf`: numbers {index} and {later} {why}, at {here}"));
                        }
                    }
                }
                let each = several.iter().enumerate();
                let each = each.map(|(index, schema)| self.schema(schema, &format!("{here}/{index}"), depth + 1));
                Ok(json!({ "anyOf": each.collect::<Result<Vec<_>, _>>()? }))
            }
        }
    }

    /// The number of the definition of what a pointer leads to.
    fn number(&mut self, target: &str) -> usize {
        let next = self.targets.len();
        let number = *self.numbers.entry(target.to_owned()).or_insert(next);
        if number == next {
            self.targets.push(target.to_owned());
        }
        number
    }

    /// A value of one of the types that the keywords name.
    fn of_types(&mut self, keywords: &Keywords<'a>, at: &str, depth: usize) -> Result<Value, String> {
        let mut types = types(keywords, at)?;
        if types.is_empty() {
            // Whatever is of another type would be valid too, and is left out.
            let of = |keyword: &&str| OF_TYPES.iter().find(|(_, of)| of.contains(keyword)).map(|(name, _)| *name);
            types.extend(keywords.keys().filter_map(of));
            types.dedup();
            match (types[..].first(), types.len()) {
                (None, _) => return Ok(json!({})),
                (Some(&"integer"), 1) => {
                    let keyword = keywords.keys().next().copied().unwrap_or_default();
                    return Err(format!("`{keyword}` without `type`: `integer` at {at}/{keyword}"));
                }
                (Some(_), 1) => {}
                _ => return Err(format!("keywords of several types, and no `type`, at {at}")),
            }
        }
        let mut each =
            types.into_iter().map(|kind| self.of_type(kind, keywords, at, depth)).collect::<Result<Vec<_>, _>>()?;
        Ok(if each.len() == 1 { each.remove(0) } else { json!({ "anyOf": each }) })
    }

    fn of_type(&mut self, kind: &str, keywords: &Keywords<'a>, at: &str, depth: usize) -> Result<Value, String> {
        match kind {
            "string" => self.text(keywords, at),
            "integer" => text::integer(keywords, at),
            "number" => match OF_TYPES[1].1.iter().find(|keyword| keywords.contains_key(**keyword)) {
                Some(keyword) => {
                    Err(format!("`{keyword}` for a `number`, where it can be for an `integer`, at {at}/{keyword}"))
                }
                None => Ok(json!({ "type": "number" })),
            },
            "array" => self.array(keywords, at, depth),
            "object" => self.object(keywords, at, depth),
            other => Ok(json!({ "type": other })),
        }
    }

    /// Counts repetitions.
    fn repeat(&mut self, least: u64, most: Option<u64>, at: &str) -> Result<(), String> {
        self.repetitions = self.repetitions.saturating_add(most.unwrap_or(least));
        if most.is_some_and(|most| most < least) {
            return Err(format!("a most of {} and a least of {least} at {at}", most.unwrap_or_default()));
        }
        if least > REPETITIONS_MIN_MAX {
            return Err(format!(
                "{least} repetitions at least, of {REPETITIONS_MIN_MAX} that may be asked for, at {at}"
            ));
        }
        if self.repetitions > REPETITIONS_MAX {
            return Err(format!("more than {REPETITIONS_MAX} repetitions in the whole schema, at {at}"));
        }
        Ok(())
    }

    fn array(&mut self, keywords: &Keywords<'a>, at: &str, depth: usize) -> Result<Value, String> {
        let (least, most) = text::counts(keywords, ["minItems", "maxItems"], at)?;
        let here = |keyword: &str| format!("{at}/{keyword}");
        let mut array = Map::from_iter([("type".to_owned(), "array".into())]);
        if let Some(value) = keywords.get("prefixItems") {
            return self.tuple(list(value, &here("prefixItems"))?.len(), keywords.get("items"), (least, most), at);
        }
        self.repeat(least, most, at)?;
        let most = match keywords.get("items") {
            Some(Value::Bool(false)) if least == 0 => Some(0),
            Some(Value::Bool(false)) => return Err(format!("`items`: false beside `minItems` at {at}")),
            Some(items) => {
                array.insert("items".into(), self.schema(items, &here("items"), depth + 1)?);
                most
            }
            None => most,
        };
        if least > 0 {
            array.insert("minItems".into(), least.into());
        }
        array.extend(most.map(|most| ("maxItems".to_owned(), most.into())));
        Ok(array.into())
    }

    /// An array that begins with items of their own. The child writes all of them and nothing more, so that each length is a
    /// schema of its own.
    fn tuple(
        &mut self,
        length: usize,
        items: Option<&&Value>,
        (least, most): (u64, Option<u64>),
        at: &str,
    ) -> Result<Value, String> {
        let first: Vec<_> = (0..length).map(|index| self.refer(&format!("{at}/prefixItems/{index}"))).collect();
        let further = match items {
            // What is not said to be there is not written.
            None | Some(Value::Bool(_)) => None,
            Some(_) => Some(self.refer(&format!("{at}/items"))),
        };
        let (Ok(least), most) = (usize::try_from(least), most.and_then(|most| usize::try_from(most).ok())) else {
            return Err(format!("`minItems`: {least} at {at}"));
        };
        let most = match (&further, most) {
            (None, most) => most.unwrap_or(length).min(length),
            (Some(_), Some(most)) => most,
            (Some(_), None) => return Err(format!("`prefixItems` and `items` without `maxItems` at {at}")),
        };
        // Without other wishes, all of them.
        let least = if items.is_none() && least == 0 && most == length { length } else { least };
        if most < least || most - least > TUPLE_LENGTHS_MAX || most > TUPLE_ITEMS_MAX {
            let limits = format!("{TUPLE_LENGTHS_MAX} lengths up to {TUPLE_ITEMS_MAX}");
            return Err(format!("`prefixItems` with {least} to {most} items, of {limits} that are possible, at {at}"));
        }
        let all = first.into_iter().chain(further.into_iter().cycle());
        let all: Vec<Value> = all.take(most).collect();
        let each = (least..=most).map(|length| match length {
            0 => json!({ "type": "array", "maxItems": 0 }),
            _ => json!({ "type": "array", "prefixItems": all[..length] }),
        });
        let mut each: Vec<Value> = each.collect();
        Ok(if each.len() == 1 { each.remove(0) } else { json!({ "anyOf": each }) })
    }

    /// A reference to what is at a place in the schema.
    fn refer(&mut self, at: &str) -> Value {
        json!({ "$ref": reference(self.number(at.trim_start_matches('#'))) })
    }

    fn object(&mut self, keywords: &Keywords<'a>, at: &str, depth: usize) -> Result<Value, String> {
        let mut object = Map::from_iter([("type".to_owned(), "object".into())]);
        let mut properties = Map::new();
        if let Some(value) = keywords.get("properties") {
            for (name, schema) in map(value, &format!("{at}/properties"))? {
                let schema = self.schema(schema, &format!("{at}/properties/{}", escaped(name)), depth + 1)?;
                properties.insert(name.clone(), schema);
            }
        }
        let mut required = Vec::new();
        if let Some(value) = keywords.get("required") {
            for name in value.as_array().ok_or_else(|| format!("{at}/required has to be a list"))? {
                let listed = name.as_str().is_some_and(|name| properties.contains_key(name));
                if !listed {
                    return Err(format!("`required`: {name}, which is not among `properties`, at {at}/required"));
                }
                required.push(name.clone());
            }
        }
        match keywords.get("additionalProperties") {
            // Beside properties the child writes no others, unless it is told to; then some that are no JSON.
            None => {}
            Some(Value::Bool(true)) if !properties.is_empty() => {}
            Some(value @ Value::Bool(_)) => drop(object.insert("additionalProperties".into(), (*value).clone())),
            Some(_) if !properties.is_empty() => {
                return Err(format!("`additionalProperties` that are a schema beside `properties` at {at}"));
            }
            Some(value) => {
                let schema = self.schema(value, &format!("{at}/additionalProperties"), depth + 1)?;
                object.insert("additionalProperties".into(), schema);
            }
        }
        if keywords.contains_key("properties") {
            object.insert("properties".into(), properties.into());
        }
        object.insert("required".into(), required.into());
        Ok(object.into())
    }

    /// One schema is that schema. Several have to be objects, and are put together.
    fn all_of(&mut self, keywords: &Keywords<'a>, at: &str, depth: usize) -> Result<Value, String> {
        let here = format!("{at}/allOf");
        let several = list(keywords["allOf"], &here)?;
        if let ([only], 1) = (several, keywords.len()) {
            return self.schema(only, &format!("{here}/0"), depth + 1);
        }
        let own: Keywords<'a> =
            keywords.iter().filter(|(name, _)| **name != "allOf").map(|(name, value)| (*name, *value)).collect();
        let mut parts = vec![(own, at.to_owned())];
        for (index, mut part) in several.iter().enumerate() {
            let mut at = format!("{here}/{index}");
            for _ in 0..DEPTH_MAX {
                let Some(target) = part.get("$ref").and_then(Value::as_str).and_then(|text| text.strip_prefix('#'))
                else {
                    break;
                };
                let root = self.root;
                part = root.pointer(target).ok_or_else(|| format!("`$ref`: #{target}, which is nowhere, at {at}"))?;
                at = format!("#{target}");
            }
            parts.push((self::keywords(part, &at)?, at));
        }
        let (mut properties, mut required) = (Map::new(), Vec::new());
        for (part, at) in &parts {
            if let Some(other) = part.keys().find(|name| !matches!(**name, "type" | "properties" | "required")) {
                return Err(format!("`allOf` of several, with `{other}`, at {at}"));
            }
            let kinds = types(part, at)?;
            if !(kinds == ["object"]
                || (kinds.is_empty() && (part.contains_key("properties") || part.contains_key("required"))))
                && !part.is_empty()
            {
                return Err(format!("`allOf` of several that are not all objects at {at}"));
            }
            if let Some(value) = part.get("properties") {
                for (name, schema) in map(value, &format!("{at}/properties"))? {
                    let schema = self.schema(schema, &format!("{at}/properties/{}", escaped(name)), depth + 1)?;
                    if properties.insert(name.clone(), schema).is_some() {
                        return Err(format!("`allOf` with several properties called {name:?} at {at}"));
                    }
                }
            }
            if let Some(value) = part.get("required") {
                required
                    .extend(value.as_array().ok_or_else(|| format!("{at}/required has to be a list"))?.iter().cloned());
            }
        }
        if let Some(name) =
            required.iter().find(|name| !name.as_str().is_some_and(|name| properties.contains_key(name)))
        {
            return Err(format!("`required`: {name}, which is not among `properties`, at {here}"));
        }
        Ok(json!({ "type": "object", "properties": properties, "required": required }))
    }
}

/// The keywords of a schema that say something, all of them known.
fn keywords<'a>(schema: &'a Value, at: &str) -> Result<Keywords<'a>, String> {
    let all = match schema {
        Value::Object(all) => all,
        Value::Bool(true) => return Ok(Keywords::new()),
        _ => return Err(format!("{at} has to be an object")),
    };
    let said = all.iter().filter(|(keyword, _)| !ANNOTATIONS.contains(&keyword.as_str()));
    let keywords: Keywords<'a> = said.map(|(keyword, value)| (keyword.as_str(), value)).collect();
    let known = |keyword: &str| {
        keyword == "type" || ALONE.contains(&keyword) || OF_TYPES.iter().any(|(_, of)| of.contains(&keyword))
    };
    match keywords.keys().find(|keyword| !known(keyword)) {
        Some(keyword) => Err(format!("`{keyword}` at {at}/{keyword}")),
        None => Ok(keywords),
    }
}

/// The types that are named, none if any will do.
fn types<'a>(keywords: &Keywords<'a>, at: &str) -> Result<Vec<&'a str>, String> {
    let named: Vec<&Value> = match keywords.get("type") {
        None => return Ok(Vec::new()),
        Some(Value::Array(several)) if !several.is_empty() => several.iter().collect(),
        Some(one) => vec![one],
    };
    let known = |name: &'a Value| name.as_str().filter(|name| TYPES.contains(name));
    let types = named.into_iter().map(|name| known(name).ok_or_else(|| format!("`type`: {name} at {at}/type")));
    types.collect()
}

/// Those of some values that are of the types that are named beside them.
fn only_of_types(keywords: &Keywords<'_>, mut values: Vec<&Value>, at: &str) -> Result<Value, String> {
    let types = types(keywords, at)?;
    values.retain(|value| {
        let own = type_of(value);
        types.is_empty() || types.contains(&own) || (own == "integer" && types.contains(&"number"))
    });
    match values.is_empty() {
        true => Err(format!("no value is possible at {at}")),
        false => Ok(json!({ "enum": values })),
    }
}

/// A name as a part of a pointer.
fn escaped(name: &str) -> String {
    name.replace('~', "~0").replace('/', "~1")
}

fn list<'a>(value: &'a Value, at: &str) -> Result<&'a [Value], String> {
    match value.as_array() {
        Some(several) if !several.is_empty() => Ok(several),
        _ => Err(format!("{at} has to be a list with something in it")),
    }
}

fn map<'a>(value: &'a Value, at: &str) -> Result<&'a Map<String, Value>, String> {
    value.as_object().ok_or_else(|| format!("{at} has to be an object"))
}

#[cfg(test)]
mod tests;
