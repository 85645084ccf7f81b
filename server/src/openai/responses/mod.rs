//! `/v1/responses`, both ways.
//!
//! - [`request`]: the body, and its way into a conversation.
//! - [`input`]: the items of a request.
//! - [`object`]: the response, its items and its events.
//! - [`writer`]: from the deltas of an answer to events, and to the response they add up to.
//! - [`store`]: responses that can be continued and looked at.

pub mod input;
pub mod object;
pub mod request;
pub mod store;
pub mod writer;

pub use object::{Event, ResponseObject};
pub use request::ResponsesRequest;
pub use store::Store;
pub use writer::Writer;
