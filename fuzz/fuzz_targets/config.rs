#![no_main]
//! config.json.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let weights = mesh_fuzz::weights();
    if let Some(profile) = mesh_fuzz::understood(&[("model.safetensors", &weights), ("config.json", content)]) {
        let _ = (profile.kv_bytes_per_token(), profile.facts());
    }
});
