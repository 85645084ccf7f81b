//! The golden checkpoints and templates beside the checkout.

use std::path::{Path, PathBuf};

/// A path under `../shared`, seen from the workspace's root; `None`, said on stderr with the test's name, where it is
/// not there.
///
/// # Panics
/// In CI (the environment variable `CI` is set), where a missing folder is a failure.
pub fn shared(test: &str, path: &str) -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap_or(Path::new("."));
    let wanted = root.join("../shared").join(path);
    if wanted.exists() {
        return Some(wanted);
    }
    assert!(std::env::var_os("CI").is_none(), "{} is missing", wanted.display());
    eprintln!("skipped: {test} needs {}", wanted.display());
    None
}

/// A golden checkpoint, or a file of one, by its name; `None`, said with the name of the test that asks, where it is not there.
///
/// # Panics
/// Like [`shared`].
pub fn golden(name: &str) -> Option<PathBuf> {
    // Tests run in threads that are called like them.
    let thread = std::thread::current();
    let found = shared(thread.name().unwrap_or("a test"), &format!("golden/{name}"))?;
    Some(found.canonicalize().unwrap_or(found))
}
