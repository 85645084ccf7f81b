//! Anthropic's wire format, both ways: `/v1/messages` and what it counts.
//!
//! As strict as [`openai`](crate::openai): every field is honoured, or refused by its name.
//!
//! - [`request`]: the body, and its way into a conversation.
//! - [`content`]: blocks of messages.
//! - [`answer`]: the message that comes back, whole or in events.
//! - [`error`]: errors in Anthropic's form.

pub mod answer;
pub mod content;
pub mod error;
pub mod request;

pub use answer::{Message, Writer};
pub use request::{CountRequest, MessagesRequest};
