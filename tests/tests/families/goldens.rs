//! Every golden checkpoint against its reference.

use std::collections::BTreeSet;

use conformance::shared::shared;
use mesh_backend_mlx::verify::{Comparison, Precision, verify};
use mesh_core::{DeviceKind, registry};

use crate::checkpoints::{names, profile, tolerance};

#[test]
fn goldens_pass() {
    let Some(root) = shared("goldens_pass", "golden") else { return };
    let families = registry::families().expect("families are unique");
    let only = std::env::var("GOLDEN").ok();
    let mut failures = Vec::new();
    for name in names(&root).into_iter().filter(|name| only.as_ref().is_none_or(|only| name.starts_with(only.as_str())))
    {
        let profile = profile(&root.join(&name));
        let family = registry::family_of(families, &profile);
        let comparison = Comparison {
            device: DeviceKind::Cpu,
            precision: Precision::Exact,
            kernels: true,
            tolerance: tolerance(&root.join(&name)),
        };
        let checks = match verify(&profile, family, comparison) {
            Ok(checks) => checks,
            Err(error) => {
                failures.push(format!("{name}: {error}"));
                continue;
            }
        };
        for check in checks {
            println!("{name:16} {:36} {:.1e} {}", check.name, check.max_abs_diff, check.fault.unwrap_or_default());
            if !check.passed {
                failures.push(format!("{name}: {} ({:.1e})", check.name, check.max_abs_diff));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:#?}");
}

/// Every family has a golden, and every golden a family.
#[test]
fn families_and_goldens_match() {
    let Some(root) = shared("families_and_goldens_match", "golden") else { return };
    let families = registry::families().expect("families are unique");
    let mut proven = BTreeSet::new();
    for name in names(&root) {
        let profile = profile(&root.join(&name));
        let family = registry::family_of(families, &profile).unwrap_or_else(|| panic!("no family claims {name}"));
        proven.insert(family.id());
    }
    let all: BTreeSet<&str> = families.iter().map(|family| family.id()).collect();
    assert_eq!(proven, all, "families with a golden, and all families");
}
