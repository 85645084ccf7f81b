//! Every golden of a family that is linked, against its reference.

use conformance::shared::shared;
use mesh_backend_mlx::verify::{Comparison, Precision, verify};
use mesh_core::{DeviceKind, WeightFormat, registry};
use mesh_families as _;
use mesh_models::{Artifact, probe};

/// The goldens that this build must pass; others belong to families that are not linked.
const GOLDENS: &[&str] = &[
    "llama",
    "llama-mxfp4",
    "llama-q3",
    "llama-q4",
    "llama-q4g32",
    "llama-q6",
    "llama-q8",
    "llama_untied",
    "mistral",
    "mistral_window",
    "qwen2",
    "qwen3",
    "qwen3-q4",
];

#[test]
fn goldens_pass() {
    let Some(root) = shared("goldens_pass", "golden") else { return };
    let families = registry::families().expect("families are unique");
    let mut failures = Vec::new();
    for name in GOLDENS {
        let root = root.join(name);
        let artifact = Artifact {
            name: (*name).into(),
            weights: vec![root.join("model.safetensors")],
            root: root.clone(),
            format: WeightFormat::Safetensors,
        };
        let profile = probe(&artifact).unwrap_or_else(|error| panic!("{name}: {error}"));
        let family = registry::family_of(families, &profile);
        let comparison =
            Comparison { device: DeviceKind::Cpu, precision: Precision::Exact, kernels: true, tolerance: 2e-4 };
        let checks = verify(&profile, family, comparison).unwrap_or_else(|error| panic!("{name}: {error}"));
        for check in checks {
            println!("{name:16} {:36} {:.1e} {}", check.name, check.max_abs_diff, check.fault.unwrap_or_default());
            if !check.passed {
                failures.push(format!("{name}: {}", check.name));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}
