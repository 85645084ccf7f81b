//! What an answer is held to: a grammar of the request, calls that it forces, and an end to its reasoning.

use std::sync::Arc;

use mesh_core::{Constraint, Grammar, PromptForm, Rules, SubmitError};
use mesh_text::{
    CallSchema, ConstraintError, Dialect,
    constraint::{reasoning, schema, watched::watched},
};
use serde_json::{Map, Value, json};

use super::{PipelineError, ToolChoice, forced};
use crate::served::ServedModel;

/// What a request asks of its answer's form, and the texts whose tokens it needs to know.
#[derive(Debug, Default)]
pub struct Wish {
    /// What the answer has to be.
    pub grammar: Option<Grammar>,
    /// Texts that no repetition goes across.
    pub breakers: Vec<String>,
}

/// Calls that have to fit their functions.
pub(super) struct Calls {
    schemas: Vec<CallSchema>,
    many: bool,
    /// They have to be made.
    forced: bool,
}

/// Keywords beside which `additionalProperties` may speak of properties that they name.
const NAMING: [&str; 7] = ["$ref", "allOf", "anyOf", "oneOf", "if", "patternProperties", "unevaluatedProperties"];

/// Arguments are those that the function declares, unless it says otherwise: a schema that is silent lets a model that has to
/// call make more of them up without end.
fn close(parameters: &mut Map<String, Value>) {
    if parameters.contains_key("properties") && !NAMING.iter().any(|keyword| parameters.contains_key(*keyword)) {
        parameters.entry("additionalProperties").or_insert(Value::Bool(false));
    }
}

impl Calls {
    /// Those of `tools` that `choice` forces. Where it leaves the choice to the model, they have to fit where functions are
    /// strict.
    pub(super) fn of(tools: &[Value], choice: &ToolChoice, single: bool) -> Option<Self> {
        let strict = |tool: &Value| tool.pointer("/function/strict") == Some(&Value::Bool(true));
        let forced = *choice != ToolChoice::Auto;
        if !forced && !tools.iter().any(strict) {
            return None;
        }
        let named = |tool: &Value| {
            let name = tool.pointer("/function/name")?.as_str()?.to_owned();
            let parameters = match tool.pointer("/function/parameters") {
                _ if !forced && !strict(tool) => json!({ "type": "object" }),
                Some(Value::Object(parameters)) => {
                    let mut parameters = parameters.clone();
                    // Arguments are an object, whatever the schema leaves open.
                    if !parameters.contains_key("$ref") {
                        parameters.entry("type").or_insert_with(|| "object".into());
                    }
                    close(&mut parameters);
                    Value::Object(parameters)
                }
                _ => json!({ "type": "object", "properties": {}, "additionalProperties": false }),
            };
            Some(CallSchema { name, parameters })
        };
        let all = tools.iter().filter_map(named);
        let (schemas, many): (Vec<_>, _) = match choice {
            ToolChoice::Auto => (all.collect(), false),
            ToolChoice::Required => (all.collect(), !single),
            ToolChoice::Named(wanted) => (all.filter(|call| call.name == *wanted).collect(), false),
        };
        (!schemas.is_empty()).then_some(Self { schemas, many, forced })
    }

    /// The grammar of an answer that makes them, and whether the dialect reads it; else it is plain JSON.
    fn grammar(&self, dialect: Option<&dyn Dialect>) -> (Grammar, bool) {
        match dialect.and_then(|dialect| dialect.call_grammar(&self.schemas, self.many)) {
            Some(lark) => (Grammar::Lark(lark.into()), true),
            None => (Grammar::JsonSchema(Arc::new(forced::schema(&self.schemas, self.many))), false),
        }
    }

    /// The places in errors are those of the schemas that were sent.
    fn check(&self) -> Result<(), schema::SchemaError> {
        for call in &self.schemas {
            schema::enforceable(&call.parameters).map_err(|error| schema::SchemaError {
                at: format!("{}.parameters.{}", call.name, error.at),
                ..error
            })?;
        }
        Ok(())
    }
}

/// What is known of an answer's form before it begins.
#[derive(Clone, Copy)]
pub(super) struct Conditions<'a> {
    /// The dialect of the answer; absent for text completions.
    pub dialect: Option<&'static dyn Dialect>,
    /// Special tokens that are part of its text.
    pub markers: &'a [&'static str],
    /// The prompt ends inside a reasoning block.
    pub opened: bool,
    /// Most tokens of reasoning.
    pub thinking_tokens_max: Option<u32>,
}

/// What holds for the answer.
#[derive(Default)]
pub(super) struct Settled {
    /// For the engine.
    pub constraint: Option<Constraint>,
    /// It holds from the first token on: there is no reasoning before.
    pub at_once: bool,
    /// The answer is calls in plain JSON.
    pub plain_calls: bool,
}

/// Settles what an answer is held to.
pub(super) fn settle(
    model: &ServedModel,
    grammar: Option<Grammar>,
    calls: Option<&Calls>,
    conditions: Conditions<'_>,
) -> Result<Settled, PipelineError> {
    let on_tokens = model.handle.capabilities().prompt == PromptForm::Tokens;
    let field = if calls.is_some() { "tools" } else { "response_format" };
    let refused = |error: ConstraintError| PipelineError::Constraint { field, error };
    let form = conditions.dialect.and_then(Dialect::reasoning);
    if conditions.thinking_tokens_max.is_some() && (form.is_none() || !on_tokens) {
        let why = match form {
            None => "does not show where its reasoning ends".to_owned(),
            Some(_) => "is served by a backend that cannot end its reasoning".to_owned(),
        };
        return Err(PipelineError::NoSwitch { field: "thinking_budget", why });
    }
    let (grammar, in_dialect) = match calls {
        Some(calls) => {
            calls.check().map_err(|error| refused(error.into()))?;
            let (grammar, read) = calls.grammar(conditions.dialect.filter(|_| on_tokens));
            (Some(grammar), read)
        }
        None => (grammar, true),
    };
    let plain_calls = !in_dialect;
    let watch = calls.is_some_and(|calls| !calls.forced);
    let trigger = conditions.dialect.and_then(Dialect::call_trigger);
    if watch && (plain_calls || trigger.is_none()) {
        return Err(PipelineError::NoStrict);
    }
    // A budget alone asks nothing of the text.
    let anything = || conditions.thinking_tokens_max.map(|_| Grammar::Regex("(?s:.*)".into()));
    if let Some(knob) = grammar.clone().or_else(anything).map(|grammar| grammar.knob())
        && !model.handle.capabilities().knobs.contains(&knob)
    {
        let lacks =
            |field, what| PipelineError::NoSwitch { field, why: format!("is served by a backend that cannot {what}") };
        return Err(match (&grammar, calls) {
            (None, _) => lacks("thinking_budget", "end its reasoning"),
            (Some(_), Some(_)) if watch => PipelineError::NoStrict,
            (Some(_), Some(_)) => lacks("tool_choice", "force calls"),
            (Some(_), None) => SubmitError::Unsupported { knob }.into(),
        });
    }
    if !on_tokens {
        let Some(grammar) = grammar else { return Ok(Settled::default()) };
        if let Grammar::JsonSchema(value) = &grammar {
            schema::enforceable(value).map_err(|error| refused(error.into()))?;
        }
        return Ok(Settled { constraint: Some(Constraint { grammar, rules: None }), at_once: true, plain_calls });
    }
    if grammar.is_none() && conditions.thinking_tokens_max.is_none() {
        return Ok(Settled::default());
    }
    let vocabulary = model.vocabulary(conditions.markers).map_err(refused)?;
    let mut content = grammar.as_ref().map(|grammar| vocabulary.rules(grammar)).transpose().map_err(refused)?;
    if let (true, Some(trigger), Some(call)) = (watch, trigger, &content) {
        content = Some(watched(&vocabulary, trigger, call.clone()).map_err(refused)?);
    }
    let (rules, at_once): (Option<Arc<dyn Rules>>, bool) = match form {
        Some(form) => {
            let tokens_max = conditions.thinking_tokens_max;
            let reasoning = reasoning::Reasoning { form, opened: conditions.opened, tokens_max };
            (Some(reasoning::reasoned(&vocabulary, reasoning, content).map_err(refused)?), false)
        }
        None => (content, true),
    };
    let constraint = grammar.or_else(anything).map(|grammar| Constraint { grammar, rules });
    Ok(Settled { constraint, at_once, plain_calls })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn arguments_are_those_that_are_declared_unless_the_schema_speaks_of_others() {
        let parameters = |schema: Value| {
            let tool = json!({ "type": "function", "function": { "name": "f", "parameters": schema } });
            let calls = Calls::of(&[tool], &ToolChoice::Required, true).unwrap();
            calls.schemas[0].parameters["additionalProperties"].clone()
        };
        let declared = json!({ "a": { "type": "string" } });
        assert_eq!(parameters(json!({ "properties": declared })), false);
        assert_eq!(parameters(json!({ "type": "object", "properties": {} })), false);
        assert_eq!(parameters(json!({ "properties": declared, "additionalProperties": true })), true);
        assert_eq!(parameters(json!({ "type": "object" })), Value::Null);
        assert_eq!(parameters(json!({ "properties": declared, "anyOf": [{ "required": ["a"] }] })), Value::Null);
    }
}
