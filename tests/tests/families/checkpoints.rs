//! The golden checkpoints.

use std::{fs, path::Path};

use mesh_core::{ModelProfile, WeightFormat};
use mesh_models::{Artifact, probe};

/// Names of all golden directories under `root`, sorted.
///
/// # Panics
/// If the folder cannot be read, or holds none.
pub fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root).expect("the goldens");
    let mut names: Vec<String> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().join("reference.safetensors").exists())
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    assert!(!names.is_empty(), "no goldens in {}", root.display());
    names.sort();
    names
}

/// What is known of one.
///
/// # Panics
/// If it cannot be probed.
pub fn profile(root: &Path) -> ModelProfile {
    let artifact = Artifact {
        name: root.file_name().unwrap_or_default().to_string_lossy().into_owned(),
        weights: vec![root.join("model.safetensors")],
        root: root.to_owned(),
        format: WeightFormat::Safetensors,
    };
    probe(&artifact).unwrap_or_else(|error| panic!("{}: {error}", root.display()))
}

/// What a difference of logits may be at most.
///
/// # Panics
/// If the directory does not say.
pub fn tolerance(root: &Path) -> f32 {
    let text = fs::read_to_string(root.join("tolerance")).expect("a tolerance");
    text.trim().parse().expect("a number")
}
