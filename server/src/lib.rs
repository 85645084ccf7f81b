//! The server of mesh-llm: models by name, the walk of a request, and an OpenAI-compatible door to both.
//!
//! Names no backend and no family: it finds what the binary links through the registry.
//!
//! - [`openai`], [`anthropic`]: the wire formats.
//! - [`routes`], [`body`], [`sse`], [`error`]: HTTP.
//! - [`listen`], [`tls`], [`guard`], [`metrics`], [`otel`]: what is around the routes, and knows none of them.
//! - [`page`]: the page at `/`.
//! - [`running`]: what can be cancelled.
//! - [`pipeline`]: the walk of a request.
//! - [`measure`]: how fast an engine is.
//! - [`defaults`]: what holds where neither request nor configuration says.
//! - [`slots`], [`served`], [`lease`], [`voting`]: models, from a name to something that answers.

pub mod anthropic;
pub mod body;
pub mod defaults;
mod door;
pub mod error;
pub mod guard;
pub mod hosting;
pub mod lease;
pub mod listen;
pub mod measure;
pub mod metrics;
pub mod openai;
pub mod otel;
pub mod page;
pub mod pipeline;
mod record;
pub mod routes;
pub mod running;
pub mod served;
pub mod slots;
pub mod sse;
pub mod talk;
pub mod tls;
pub mod voting;
