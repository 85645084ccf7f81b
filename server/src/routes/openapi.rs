//! `/openapi.json`: the list of routes and the wire types, in a form that programs read.

use std::sync::LazyLock;

use schemars::{Schema, SchemaGenerator, generate::SchemaSettings};
use serde_json::{Map, Value, json};
use warp::Reply;

use super::{
    all,
    route::{ErrorForm, Route},
};
use crate::{anthropic, openai::response::ErrorBody};

pub(super) fn routes() -> Vec<Route> {
    static DOCUMENT: LazyLock<Value> = LazyLock::new(document);
    vec![
        Route::get("/openapi.json", |_, _| async { Ok(warp::reply::json(&*DOCUMENT).into_response()) })
            .says("This document.")
            .gives::<Map<String, Value>>(),
    ]
}

/// Bodies of requests, by method and path.
static EXAMPLES: LazyLock<Value> =
    LazyLock::new(|| serde_json::from_str(include_str!("examples.json")).unwrap_or_default());

/// Schemas of requests and of answers differ where a type is both: what is optional to read is always written.
struct Schemas {
    read: SchemaGenerator,
    written: SchemaGenerator,
}

impl Schemas {
    fn new() -> Self {
        let settings = |place: &str| {
            SchemaSettings::draft2020_12().with(|settings| {
                settings.definitions_path = format!("/components/schemas/{place}").into();
                settings.meta_schema = None;
            })
        };
        // References name `/components/schemas/read/X`; `flat` makes a name of the last two.
        Self {
            read: settings("read").for_deserialize().into_generator(),
            written: settings("written").for_serialize().into_generator(),
        }
    }

    fn components(mut self) -> Map<String, Value> {
        let mut all = Map::new();
        for (place, generator) in [("read", &mut self.read), ("written", &mut self.written)] {
            for (name, schema) in generator.take_definitions(false) {
                all.insert(format!("{place}.{name}"), flat(schema));
            }
        }
        all
    }
}

/// With references to where [`Schemas::components`] puts things.
fn flat(mut value: Value) -> Value {
    match &mut value {
        Value::Object(fields) => {
            for (key, value) in fields.iter_mut() {
                match value {
                    Value::String(place) if key == "$ref" => {
                        *place = place
                            .replace("/components/schemas/read/", "/components/schemas/read.")
                            .replace("/components/schemas/written/", "/components/schemas/written.");
                    }
                    other => *other = flat(other.take()),
                }
            }
        }
        Value::Array(values) => values.iter_mut().for_each(|value| *value = flat(value.take())),
        _ => {}
    }
    value
}

fn of(schema: Schema) -> Value {
    flat(schema.to_value())
}

fn document() -> Value {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for route in all() {
        let path = route.path.replace("*}", "}");
        let operation = operation(&route, &path, &mut schemas);
        let entry = paths.entry(path).or_insert_with(|| json!({}));
        entry[route.method.as_str().to_lowercase()] = operation;
    }
    json!({
        "openapi": "3.1.0",
        "info": { "title": "mesh-llm", "version": env!("CARGO_PKG_VERSION") },
        "paths": paths,
        "components": { "schemas": schemas.components() },
    })
}

/// What may be answered instead, and why.
fn refusals(route: &Route) -> Vec<(&'static str, &'static str)> {
    let mut refusals = vec![
        ("400", "The request cannot be honoured as it stands; the error says why."),
        ("401", "The server asks for an API key, and this was none of its keys."),
        ("403", "The server does not go by this name, or this page may not use it."),
        ("500", "The server failed; its log says more."),
    ];
    if route.request.is_some() {
        refusals.extend([
            ("404", "There is no such model, or nothing of that id."),
            ("408", "The body did not arrive in time."),
            ("409", "The request was cancelled."),
            ("413", "The body is larger than is read."),
            ("503", "The server is busy, is loading the model, or has no memory for it now; try again later."),
        ]);
    } else if route.path.contains('{') {
        refusals.push(("404", "There is nothing of that name."));
    }
    refusals
}

/// One event of a stream. An answer that breaks off ends in an error.
fn server_sent(event: Value, error: &Value, last: Option<&str>) -> Value {
    let mut data = json!({ "contentMediaType": "application/json", "contentSchema": { "anyOf": [event, error] } });
    if let Some(last) = last {
        data = json!({ "anyOf": [{ "const": last }, data] });
    }
    data["type"] = "string".into();
    let properties = json!({ "event": { "type": "string" }, "data": data });
    json!({ "type": "object", "properties": properties, "required": ["data"] })
}

fn operation(route: &Route, path: &str, schemas: &mut Schemas) -> Value {
    let error = match route.form {
        ErrorForm::OpenAi => schemas.written.subschema_for::<ErrorBody>(),
        ErrorForm::Anthropic => schemas.written.subschema_for::<anthropic::error::ErrorBody>(),
    };
    let error = of(error);
    let mut content = Map::new();
    if let Some(response) = route.response {
        content.insert("application/json".into(), json!({ "schema": of(response(&mut schemas.written)) }));
    }
    if let Some(event) = route.event {
        let schema = server_sent(of(event(&mut schemas.written)), &error, route.last);
        content.insert("text/event-stream".into(), json!({ "schema": schema }));
    }
    let mut responses =
        Map::from_iter([("200".to_owned(), json!({ "description": "The answer.", "content": content.clone() }))]);
    for (status, description) in refusals(route) {
        let content = json!({ "application/json": { "schema": error } });
        responses.insert(status.into(), json!({ "description": description, "content": content }));
    }
    if path == "/readyz" {
        responses.insert("503".into(), json!({ "description": "Not ready yet.", "content": content }));
    } else if let Some(busy) = responses.get_mut("503") {
        let seconds = json!({ "type": "integer", "minimum": 1 });
        busy["headers"] = json!({
            "Retry-After": { "description": "Seconds; absent where the server is about to end.", "schema": seconds },
        });
    }
    let mut operation = json!({ "summary": route.summary, "responses": responses });
    let names = path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
    let parameters: Vec<_> = names
        .map(|name| json!({ "name": name, "in": "path", "required": true, "schema": { "type": "string" } }))
        .chain(route.queries.iter().map(|(name, schema)| {
            let schema: Value = serde_json::from_str(schema).unwrap_or_default();
            json!({ "name": name, "in": "query", "required": false, "schema": schema })
        }))
        .collect();
    if !parameters.is_empty() {
        operation["parameters"] = parameters.into();
    }
    if let Some(request) = route.request {
        let schema = of(request(&mut schemas.read));
        let mut content = json!({ "schema": schema });
        if let Some(examples) = EXAMPLES.get(format!("{} {path}", route.method)) {
            content["examples"] = examples.clone();
        }
        operation["requestBody"] = json!({ "required": true, "content": { "application/json": content } });
    }
    operation
}

#[cfg(test)]
mod tests {
    use super::*;

    fn references(value: &Value, found: &mut Vec<String>) {
        match value {
            Value::Object(fields) => fields.iter().for_each(|(key, value)| match value {
                Value::String(place) if key == "$ref" => found.push(place.clone()),
                value => references(value, found),
            }),
            Value::Array(values) => values.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }

    #[test]
    fn every_route_is_described_and_every_reference_leads_somewhere() {
        let document = document();
        let mut described = 0;
        for route in all() {
            let path = route.path.replace("*}", "}");
            let method = route.method.as_str().to_lowercase();
            let operation = &document["paths"][&path][&method];
            assert!(operation["summary"].as_str().is_some_and(|summary| !summary.is_empty()), "{method} {path}");
            let json = &operation["responses"]["200"]["content"]["application/json"]["schema"];
            assert!(json.is_object() || json.is_boolean(), "{method} {path} does not say what it gives");
            assert!(operation["responses"]["400"].is_object());
            let examples = &operation["requestBody"]["content"]["application/json"]["examples"];
            assert_eq!(route.request.is_some(), examples["plain"]["value"].is_object(), "{method} {path}: examples");
            described += 1;
        }
        let paths = document["paths"].as_object().unwrap().values();
        assert_eq!(paths.map(|path| path.as_object().unwrap().len()).sum::<usize>(), described);
        let mut found = Vec::new();
        references(&document, &mut found);
        assert!(!found.is_empty());
        for place in found {
            assert!(document.pointer(place.trim_start_matches('#')).is_some(), "{place}");
        }
    }

    #[test]
    fn requests_refuse_what_is_unknown_in_the_document_as_well() {
        let document = document();
        for path in ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses", "/tokenize"] {
            let schema = &document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"];
            let place = schema["$ref"].as_str().unwrap().trim_start_matches('#');
            let schema = document.pointer(place).unwrap();
            assert_eq!(schema["additionalProperties"], false, "{path}");
            assert!(schema["properties"]["model"].is_object(), "{path}");
        }
    }
}
