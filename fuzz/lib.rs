//! What the targets share: a model on disk of which one file is the fuzzer's.

use std::{fs, path::PathBuf, sync::OnceLock};

use mesh_core::{ModelProfile, ProgressSink};
use mesh_models::{Store, StoreOptions, Want, probe};

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
