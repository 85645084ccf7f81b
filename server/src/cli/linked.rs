//! The one list of linked crates. A crate that nobody mentions is not linked, and its registrations vanish with it.

use mesh_backend_llama_server as _;
use mesh_backend_mesh as _;
use mesh_backend_mlx as _;
use mesh_dialects as _;
use mesh_families as _;

#[cfg(test)]
mod tests {
    use mesh_core::registry;

    #[test]
    fn every_linked_crate_registers_what_it_brings() {
        assert_eq!(registry::backends().unwrap().ids(), ["llama-server", "mesh", "mlx"]);
        let families = registry::families().unwrap().ids();
        for family in ["llama", "qwen2", "qwen3"] {
            assert!(families.contains(&family), "{family} is not among {families:?}");
        }
        assert_eq!(mesh_text::dialects().unwrap().len(), mesh_dialects::linked());
    }

    #[test]
    fn every_familys_dialect_is_linked() {
        for family in registry::families().unwrap().iter() {
            let dialect = family.conventions().dialect;
            assert!(mesh_text::dialects().unwrap().get(dialect).is_ok(), "{}: {dialect}", family.id());
        }
    }
}
