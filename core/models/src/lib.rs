//! From what a user types to a model on disk and a profile of it.

pub mod error;
pub mod store;

pub use error::{FetchError, ImportError};
pub use store::{Artifact, Listed, Origin, Store, StoreOptions, Want};

use mesh_core::{ModelProfile, ProbeError};

/// Catalog name of the model that is served when none is named.
pub const DEFAULT_MODEL: &str = "SmolLM2-135M-Instruct";

/// What is known about an artifact from its config and headers.
pub fn probe(artifact: &Artifact) -> Result<ModelProfile, ProbeError> {
    Err(ProbeError::Missing { path: artifact.root.clone() })
}
