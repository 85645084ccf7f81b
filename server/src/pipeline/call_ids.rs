//! The ids of tool calls, such as the model's template takes back.

use mesh_text::CallIds as Form;
use sha2::{Digest, Sha256};

use super::Subject;

/// How the calls of one answer are named.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CallIds {
    form: Form,
    /// Calls in the conversation so far.
    before: usize,
}

impl CallIds {
    /// Of an answer to `subject`.
    pub(super) fn new(form: Form, subject: &Subject) -> Self {
        let before = match subject {
            Subject::Chat(chat) => chat.messages.iter().map(|message| message.tool_calls.len()).sum(),
            Subject::Text(_) | Subject::Tokens(_) => 0,
        };
        Self { form, before }
    }

    /// The id of the answer's call number `index`, of the function `name`. `own` names it among all calls of all answers, and
    /// is its id where any will do.
    pub fn id(&self, own: String, index: usize, name: &str) -> String {
        match self.form {
            Form::Any => own,
            Form::NineAlphanumerics => Sha256::digest(own.as_bytes()).iter().take(9).map(alphanumeric).collect(),
            Form::FunctionAndNumber => format!("functions.{name}:{}", self.before + index),
        }
    }
}

fn alphanumeric(byte: &u8) -> char {
    const ALL: &[u8; 62] = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz";
    char::from(ALL[usize::from(*byte) % ALL.len()])
}

#[cfg(test)]
mod tests {
    use mesh_core::chat::{FunctionCall, Message, ToolCall};

    use super::*;
    use crate::pipeline::Chat;

    #[test]
    fn ids_have_the_form_that_the_template_takes_back() {
        let call = |name: &str| ToolCall {
            id: "x".into(),
            kind: "function".into(),
            function: FunctionCall { name: name.into(), arguments: serde_json::json!({}) },
        };
        let message =
            Message { tool_calls: vec![call("f"), call("g")], role: "assistant".into(), ..Message::default() };
        let chat = Subject::Chat(Chat { messages: vec![message], ..Chat::default() });
        let id = |form, own: &str, index| CallIds::new(form, &chat).id(own.to_owned(), index, "f");
        assert_eq!(id(Form::Any, "call_1_0", 0), "call_1_0");
        assert_eq!(id(Form::FunctionAndNumber, "call_1_1", 1), "functions.f:3");
        let nine: Vec<_> = (0..100).map(|own| id(Form::NineAlphanumerics, &own.to_string(), 0)).collect();
        assert!(nine.iter().all(|id| id.len() == 9 && id.bytes().all(|byte| byte.is_ascii_alphanumeric())), "{nine:?}");
        assert_eq!(nine.iter().collect::<std::collections::BTreeSet<_>>().len(), nine.len());
        assert_eq!(id(Form::NineAlphanumerics, "7", 0), nine[7], "the same wherever it is asked for");
    }
}
