//! The contract of a dialect: the wire format in which a family of models writes reasoning, content and tool calls.
//! Adding one is one file that implements [`Dialect`] and calls [`register_dialect!`](crate::register_dialect).
//!
//! Two invariants hold for every dialect, and the tests of each check them: the text of the deltas does not depend on
//! how the input was cut, and no text is lost: what does not parse comes back as [`Delta::Malformed`].

use std::sync::OnceLock;

use mesh_core::{
    Delta,
    registry::{Registry, RegistryError},
};
use serde::Serialize;

use crate::tools::Tools;

/// What a parser has to know about the request it reads the answer of.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct ParserContext {
    /// The prompt ends inside a reasoning block, so that the answer begins there. [`Dialect::opens_reasoning`] tells.
    pub prompt_opens_reasoning: bool,
    /// The tools that the request offers. Without any, text that looks like a call is content.
    pub tools: Tools,
}

/// How an answer shows where its reasoning begins and ends, for constraints that begin with the content.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ReasoningForm {
    /// What opens the reasoning, where the prompt did not.
    pub open: &'static str,
    /// What closes it.
    pub close: &'static str,
    /// What opens the content after it, or instead of it; empty where content needs no opening.
    pub content: &'static str,
}

/// A function that may be called, for grammars.
#[derive(Clone, Debug, PartialEq)]
pub struct CallSchema {
    /// Its name.
    pub name: String,
    /// The JSON schema of its arguments, whose references are to itself.
    pub parameters: serde_json::Value,
}

/// Reads one answer. Fed with text in any pieces.
pub trait DialectParser: Send {
    /// Takes the next piece of text and returns what it settles. Text that may turn out to be a marker is held back.
    fn push(&mut self, text: &str) -> Vec<Delta>;

    /// Ends the answer and returns what was held back.
    fn finish(&mut self) -> Vec<Delta>;
}

/// A wire format. Stateless; registered with [`register_dialect!`](crate::register_dialect).
pub trait Dialect: Send + Sync {
    /// Unique id, such as `hermes`; what [`Conventions::dialect`](mesh_core::Conventions) names.
    fn id(&self) -> &'static str;

    /// Whether it has a form for tool calls.
    fn tools(&self) -> bool;

    /// A parser for one answer.
    fn parser(&self, context: &ParserContext) -> Box<dyn DialectParser>;

    /// Whether a rendered prompt ends inside a reasoning block.
    fn opens_reasoning(&self, prompt: &str) -> bool {
        self.reasoning().is_some_and(|form| prompt.trim_end().ends_with(form.open))
    }

    /// How its answers show where reasoning ends; `None` where there is none, or nothing that says so.
    fn reasoning(&self) -> Option<ReasoningForm> {
        None
    }

    /// A Lark grammar, with llguidance's `%json`, of an answer that is calls of these functions and nothing else, as the
    /// parser reads them: one, or with `many` several. `None` where calls have no form that a grammar could describe.
    fn call_grammar(&self, calls: &[CallSchema], many: bool) -> Option<String> {
        let _ = (calls, many);
        None
    }

    /// What each call of [`Dialect::call_grammar`] begins with, and nothing else: where an answer that may call or not has to
    /// be watched from on. `None` where there is no such marker.
    fn call_trigger(&self) -> Option<&'static str> {
        None
    }

    /// What ids of calls look like in a conversation.
    fn call_ids(&self) -> CallIds {
        CallIds::Any
    }

    /// Whether a chat template's text shows that its model speaks this dialect.
    fn evidence(&self, template: &str) -> Option<Evidence> {
        let _ = template;
        None
    }

    /// Tokens that the parser has to see in the text even where the tokenizer calls them special:
    /// [`DecoderOptions::keep`](crate::DecoderOptions::keep).
    fn markers(&self, context: &ParserContext) -> &'static [&'static str] {
        let _ = context;
        &[]
    }
}

/// What ids of calls look like in a conversation, so that the model's template takes back what was answered, and the model
/// sees what it was trained on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CallIds {
    /// Anything; most templates leave them out.
    #[default]
    Any,
    /// Nine letters and digits; other ids are refused by the templates.
    NineAlphanumerics,
    /// `functions.NAME:NUMBER`, the calls of a conversation counted from 0.
    FunctionAndNumber,
}

/// What in a template speaks for a dialect.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Evidence {
    /// It writes reasoning between markers that the dialect reads; here is one.
    Reasoning(&'static str),
    /// It writes tool calls in the dialect's form; here is what shows it.
    Calls(&'static str),
}

/// A dialect's registration; made by [`register_dialect!`](crate::register_dialect).
pub struct DialectEntry {
    /// The dialect.
    pub dialect: &'static dyn Dialect,
    /// Module path of the registration.
    pub origin: &'static str,
}
inventory::collect!(DialectEntry);

/// Registers a `static` dialect.
#[macro_export]
macro_rules! register_dialect {
    ($dialect:expr) => {
        $crate::__inventory::submit! {
            $crate::dialect::DialectEntry { dialect: $dialect, origin: ::core::module_path!() }
        }
    };
}

/// Every linked dialect.
pub fn dialects() -> Result<&'static Registry<dyn Dialect>, RegistryError> {
    static ALL: OnceLock<Result<Registry<dyn Dialect>, RegistryError>> = OnceLock::new();
    ALL.get_or_init(|| {
        let found = inventory::iter::<DialectEntry>.into_iter();
        Registry::collect("dialect", found.map(|entry| (entry.dialect.id(), entry.origin, entry.dialect)))
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// A tool call of a whole answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct AnsweredCall {
    /// The function's name.
    pub name: String,
    /// The arguments: the text of a JSON object.
    pub arguments: String,
}

/// A whole answer.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Answer {
    /// Text for the user, calls that do not parse included.
    pub content: String,
    /// Text of the reasoning; empty if there is none.
    pub reasoning: String,
    /// The tool calls, in order.
    pub tool_calls: Vec<AnsweredCall>,
}

/// Puts an answer together from its deltas.
pub fn assemble(deltas: impl IntoIterator<Item = Delta>) -> Answer {
    let mut answer = Answer::default();
    for delta in deltas {
        match delta {
            Delta::Content(text) | Delta::Malformed { text } => answer.content.push_str(&text),
            Delta::Reasoning(text) => answer.reasoning.push_str(&text),
            Delta::ToolCall { name, arguments, .. } => answer.tool_calls.push(AnsweredCall { name, arguments }),
        }
    }
    answer
}
