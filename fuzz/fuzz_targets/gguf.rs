#![no_main]
//! Headers of GGUF files, and what an import makes of them.

use libfuzzer_sys::fuzz_target;
use mesh_core::ProgressSink;

fuzz_target!(|content: &[u8]| {
    let _ = mesh_fuzz::understood(&[("m.gguf", content)]);
    let out = mesh_fuzz::place("out");
    if mesh_models::import_gguf(&mesh_fuzz::place("m.gguf"), &out, &ProgressSink::silent()).is_ok() {
        std::fs::remove_dir_all(&out).expect("it was made");
    }
});
