#![no_main]
//! Headers of safetensors files.

use libfuzzer_sys::fuzz_target;

fuzz_target!(|content: &[u8]| {
    let _ = mesh_fuzz::understood(&[("model.safetensors", content), ("config.json", br#"{"model_type":"llama"}"#)]);
});
