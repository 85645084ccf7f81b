//! Schemas of the wire types that are read by hand.

use schemars::json_schema;

use super::{
    completion::Prompts,
    fields::{STOPS_MAX, Strings},
    message::{Content, Part},
};

/// Implements `JsonSchema` by an expression.
macro_rules! schema {
    ($type:ty, $name:literal, |$generator:ident| $schema:expr) => {
        impl schemars::JsonSchema for $type {
            fn schema_name() -> std::borrow::Cow<'static, str> {
                $name.into()
            }

            fn json_schema($generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
                $schema
            }
        }
    };
}
pub(crate) use schema;

schema!(Content, "Content", |generator| {
    let part = generator.subschema_for::<Part>();
    json_schema!({ "anyOf": [{ "type": "string" }, { "type": "array", "items": part }] })
});

schema!(Strings, "Strings", |_generator| json_schema!({
    "anyOf": [
        { "type": "string", "minLength": 1 },
        { "type": "array", "items": { "type": "string", "minLength": 1 }, "maxItems": STOPS_MAX },
    ]
}));

schema!(Prompts, "Prompt", |_generator| json_schema!({
    "anyOf": [
        { "type": "string" },
        { "type": "array", "items": { "type": "integer", "minimum": 0 } },
        { "type": "array", "items": { "type": "string" } },
        { "type": "array", "items": { "type": "array", "items": { "type": "integer", "minimum": 0 } } },
    ]
}));
