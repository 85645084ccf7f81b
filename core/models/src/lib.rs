//! From what a user types to a model on disk and a profile of it.
//!
//! - [`mod@reference`]: the one grammar of model references; [`catalog`]: models known by name.
//! - [`store`]: finds a model, fetching it from the hub or a mirror.
//! - [`probe()`]: what a model is, from its configs and headers, every file size-capped.
//! - [`gguf`]: the header reader; [`import`]: a GGUF into an MLX directory; [`unpack`]: into a GGUF of plain floats.

pub mod catalog;
mod choice;
mod disk;
pub mod error;
pub mod gguf;
mod hub;
pub mod import;
mod local;
mod mirror;
mod near;
pub mod probe;
pub mod reference;
pub mod store;
#[cfg(test)]
mod testing;
pub mod unpack;

pub use choice::Room;
pub use error::{FetchError, ImportError, Unread};
pub use hub::{Checked, Found, Freed, Verdict, hash_of, revision_of};
pub use import::{ImportReport, Imported, Manner, import_gguf, import_measured};
pub use probe::probe;
pub use store::{Artifact, Exact, Finds, Listed, Origin, Store, StoreOptions, Want};
pub use unpack::{Floats, UnpackReport, unpack_gguf};

/// Catalog name of the model that is served when none is named.
pub const DEFAULT_MODEL: &str = "SmolLM2-135M-Instruct";
