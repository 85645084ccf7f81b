#![no_main]
//! What members ask of one another, and what they are told.

use libfuzzer_sys::fuzz_target;
use mesh_backend_mesh::wire::{CALL_BYTES_MAX, Call, SAID_BYTES_MAX, Said};
use mesh_fuzz::message;

fuzz_target!(|content: &[u8]| {
    message::<Call>(content, CALL_BYTES_MAX);
    message::<Said>(content, SAID_BYTES_MAX);
});
