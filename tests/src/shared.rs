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
