//! A family's graph, registered together with the family itself.

use std::sync::OnceLock;

use mesh_core::{
    family::ModelFamily,
    registry::{Registry, RegistryError},
};
use serde_json::Value;

use crate::{
    model::{CausalModel, GraphError},
    weights::Weights,
};

/// A family that knows how to compute.
pub trait GraphFamily: ModelFamily {
    /// Builds the graph of `config` (config.json whole) from `weights`. Takes every tensor it needs; the caller checks
    /// that none is left.
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError>;
}

/// A graph's registration; made by [`register_family!`](crate::register_family).
pub struct GraphEntry {
    /// The family.
    pub family: &'static dyn GraphFamily,
    /// Module path of the registration.
    pub origin: &'static str,
}
mesh_core::__inventory::collect!(GraphEntry);

/// Registers a `static` family with its graph.
#[macro_export]
macro_rules! register_family {
    ($family:expr) => {
        $crate::__core::__inventory::submit! {
            $crate::__core::registry::FamilyEntry { family: $family, origin: ::core::module_path!() }
        }
        $crate::__core::__inventory::submit! {
            $crate::family::GraphEntry { family: $family, origin: ::core::module_path!() }
        }
    };
}

/// Every linked family that has a graph.
pub fn graph_families() -> Result<&'static Registry<dyn GraphFamily>, RegistryError> {
    static ALL: OnceLock<Result<Registry<dyn GraphFamily>, RegistryError>> = OnceLock::new();
    ALL.get_or_init(|| {
        let found = mesh_core::__inventory::iter::<GraphEntry>.into_iter();
        Registry::collect("family", found.map(|entry| (entry.family.id(), entry.origin, entry.family)))
    })
    .as_ref()
    .map_err(Clone::clone)
}
