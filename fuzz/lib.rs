//! What the targets share: a model on disk of which one file is the fuzzer's, and messages that have to stay what they are.

use std::{fs, path::PathBuf, sync::OnceLock};

use mesh_backend_mesh::codec;
use mesh_core::{ModelProfile, ProgressSink};
use mesh_models::{Store, StoreOptions, Want, probe};
use peak_alloc::PeakAlloc;
use serde::{Serialize, de::DeserializeOwned};

/// A directory of this process.
fn root() -> PathBuf {
    static ROOT: OnceLock<tempfile::TempDir> = OnceLock::new();
    ROOT.get_or_init(|| tempfile::tempdir().expect("a directory")).path().to_owned()
}

/// A safetensors file with one tensor.
pub fn weights() -> Vec<u8> {
    let header = br#"{"model.norm.weight":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    [&(header.len() as u64).to_le_bytes()[..], header, &[0; 4]].concat()
}

/// What is understood of a directory with these files.
pub fn understood(files: &[(&str, &[u8])]) -> Option<ModelProfile> {
    let root = root();
    for (name, content) in files {
        fs::write(root.join(name), content).expect("a file");
    }
    // Made once: a store has an HTTP client, which takes longer to make than any model to understand.
    static STORE: OnceLock<(Store, tokio::runtime::Runtime)> = OnceLock::new();
    let (store, runtime) = STORE.get_or_init(|| {
        let store =
            Store::new(StoreOptions { cache: Some(root.join("cache")), offline: true, ..StoreOptions::default() });
        (store.expect("a store"), tokio::runtime::Builder::new_current_thread().build().expect("a runtime"))
    });
    let found = runtime.block_on(store.locate(root.to_str().expect("a name"), Want::Any, &ProgressSink::silent()));
    probe(&found.ok()?).ok()
}

/// A place for what is imported.
pub fn place(name: &str) -> PathBuf {
    root().join(name)
}

#[global_allocator]
static MEMORY: PeakAlloc = PeakAlloc;

/// What reading takes whatever is read, in bytes: a reader's own buffers, complaints.
const MEMORY_BYTES_BASE: usize = 4 << 10;

/// Most bytes of memory that a byte of a message takes.
const GROWTH_MAX: usize = 256;

/// Reads a message of at most `bytes_max`. It has to be within its memory, and to say the same once it is written again.
pub fn message<T: Serialize + DeserializeOwned>(content: &[u8], bytes_max: usize) -> Option<T> {
    let before = MEMORY.current_usage();
    MEMORY.reset_peak_usage();
    let read = codec::decode::<T>(content, bytes_max);
    let taken = MEMORY.peak_usage().saturating_sub(before);
    let may = MEMORY_BYTES_BASE + GROWTH_MAX * content.len();
    assert!(taken <= may, "{} bytes took {taken}, and {may} are the most", content.len());
    let value = read.ok()?;
    let written = codec::encode(&value);
    let again: T = codec::decode(&written, usize::MAX).expect("what was written is read");
    // Bytes rather than values: a number that is none is not equal to itself.
    assert_eq!(codec::encode(&again), written);
    Some(value)
}
