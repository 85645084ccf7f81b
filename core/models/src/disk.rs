//! Room on disk: what is there is measured, whether it is enough is decided apart.

use std::path::Path;

use crate::error::NoSpace;

/// What is left free for everybody else, in bytes.
const SPARE_BYTES: u64 = 64 << 20;

/// Whether so many bytes more may be written into a directory that has `free` of them.
pub(crate) fn check(what: &str, needed: u64, free: Option<u64>, directory: &Path) -> Result<(), NoSpace> {
    match free {
        Some(free) if needed > 0 && needed.saturating_add(SPARE_BYTES) > free => Err(NoSpace {
            what: what.to_owned(),
            needed_bytes: needed,
            free_bytes: free,
            directory: directory.to_owned(),
        }),
        // Where it cannot be measured, the attempt shows it.
        _ => Ok(()),
    }
}

/// The bytes that this user may still write where a directory is or will be.
#[cfg(unix)]
pub(crate) fn free(directory: &Path) -> Option<u64> {
    let there = directory.ancestors().find(|directory| directory.is_dir())?;
    let statistics = rustix::fs::statvfs(there).ok()?;
    Some(statistics.f_bavail.saturating_mul(statistics.f_frsize))
}

/// The bytes that this user may still write where a directory is or will be.
#[cfg(not(unix))]
pub(crate) fn free(_: &Path) -> Option<u64> {
    None
}

#[cfg(test)]
mod tests {
    use mesh_core::Hint;

    use super::*;

    #[test]
    fn a_full_disk_is_said_with_numbers() {
        let at = Path::new("/models/hub");
        assert!(check("o/r", 0, Some(0), at).is_ok(), "what needs nothing fits everywhere");
        assert!(check("o/r", 1 << 40, None, at).is_ok());
        assert!(check("o/r", 1 << 30, Some((1 << 30) + SPARE_BYTES), at).is_ok());
        let error = check("o/r", 5 << 30, Some(2 << 30), at).unwrap_err();
        insta::assert_snapshot!(format!("{error}\nhint: {}", error.hint().unwrap()));
        assert!(check("o/r", u64::MAX, Some(u64::MAX - 1), at).is_err());
    }

    #[test]
    fn this_disk_has_some_room() {
        let root = tempfile::tempdir().unwrap();
        let free = free(&root.path().join("not/yet/there"));
        assert!(free.is_none_or(|free| free > 0), "{free:?}");
        assert_eq!(free.is_some(), cfg!(unix));
    }
}
