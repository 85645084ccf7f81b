//! Wishes of a request that several surfaces have, under their own names.

use crate::{openai::BadRequest, pipeline::Chat};

/// A call that has to be made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Forced {
    /// Of one of the tools.
    Any,
    /// Of this one.
    Named(String),
}

/// What a surface calls the fields.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Names {
    pub forced: &'static str,
    pub single_call: &'static str,
    pub thinking_tokens_max: &'static str,
}

/// The wishes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Wish {
    /// A call that has to be made.
    pub forced: Option<Forced>,
    /// The answer ends with its first call.
    pub single_call: bool,
    /// Most tokens of reasoning.
    pub thinking_tokens_max: Option<u32>,
    /// What they are called.
    pub names: Names,
}

impl Wish {
    /// Puts the wishes to the conversation, which has no words for them yet: the one place to connect.
    pub fn put(self, chat: &mut Chat) -> Result<(), BadRequest> {
        let _ = chat;
        if let Some(forced) = self.forced {
            let what = match forced {
                Forced::Any => "calls cannot be forced".to_owned(),
                Forced::Named(name) => format!("a call of `{name}` cannot be forced"),
            };
            return Err(BadRequest::unsupported(self.names.forced, what));
        }
        if self.single_call {
            return Err(BadRequest::unsupported(self.names.single_call, "answers may hold several calls"));
        }
        if self.thinking_tokens_max.is_some() {
            return Err(BadRequest::unsupported(self.names.thinking_tokens_max, "reasoning has no budget of its own"));
        }
        Ok(())
    }
}
