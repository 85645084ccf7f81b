#![no_main]
//! Lists of shards.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let weights = mesh_fuzz::weights();
    let files = [("model.safetensors.index.json", content), ("model-00001-of-00001.safetensors", &weights)];
    if let Some(profile) = mesh_fuzz::understood(&files) {
        assert!(profile.weights.iter().all(|path| path.starts_with(&profile.root)), "{:?}", profile.weights);
    }
});
