//! The hub's cache on disk, which other tools read and write too: `blobs` by hash, `snapshots` of links to them by commit,
//! `refs` that name a commit. `.listings` is ours: what a commit holds, so that what lacks a file is known to.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

use super::{hash::Hash, wire::Listing};
use crate::{error::FetchError, local, reference::plain_relative};

/// Largest list of files that is read, in bytes.
const LISTING_BYTES_MAX: u64 = 16 << 20;
/// What is added to the name of a blob that is not whole.
pub(super) const PARTIAL: &str = ".incomplete";
/// The beginning of a model's folder.
pub(crate) const FOLDER: &str = "models--";

/// The cache of one hub.
#[derive(Clone, Debug)]
pub(crate) struct Cache {
    pub root: PathBuf,
}

/// A repository in it.
#[derive(Clone, Debug)]
pub(crate) struct Folder {
    /// `org/repo`.
    pub repo: String,
    /// Its folder.
    pub path: PathBuf,
    root: PathBuf,
}

impl Cache {
    /// The folder of a repository, there or not.
    pub fn folder(&self, repo: &str) -> Folder {
        let path = self.root.join(format!("{FOLDER}{}", repo.replace('/', "--")));
        Folder { repo: repo.to_owned(), path, root: self.root.clone() }
    }

    /// Every repository that is there, by name.
    pub fn folders(&self) -> Vec<Folder> {
        let entries = fs::read_dir(&self.root).into_iter().flatten().flatten();
        let mut folders: Vec<_> = entries
            .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
            .filter_map(|entry| {
                let name = entry.file_name().to_string_lossy().into_owned();
                let repo = name.strip_prefix(FOLDER)?.replace("--", "/");
                Some(Folder { repo, path: entry.path(), root: self.root.clone() })
            })
            .collect();
        folders.sort_by(|a, b| a.repo.cmp(&b.repo));
        folders
    }
}

impl Folder {
    /// Where a blob is.
    pub fn blob(&self, hash: &Hash) -> PathBuf {
        self.path.join("blobs").join(hash.hex())
    }

    /// Where it grows.
    pub fn partial(&self, hash: &Hash) -> PathBuf {
        self.path.join("blobs").join(format!("{}{PARTIAL}", hash.hex()))
    }

    /// The file that whoever fetches a blob locks, as hf-hub and Python's library do.
    pub fn lock(&self, hash: &Hash) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default();
        self.root.join(".locks").join(name).join(format!("{}.lock", hash.hex()))
    }

    /// Where a commit's files are.
    pub fn snapshot(&self, commit: &str) -> PathBuf {
        self.path.join("snapshots").join(commit)
    }

    /// The commit that a branch, a tag or a commit means, if its snapshot is there.
    pub fn commit(&self, revision: Option<&str>) -> Option<String> {
        let revision = revision.unwrap_or("main");
        if !plain_relative(revision) {
            return None;
        }
        // A commit names its snapshot itself; branches and tags are files that name one.
        let commit = match crate::probe::read_capped(&self.path.join("refs").join(revision), 256) {
            Ok(Some(text)) => String::from_utf8(text).ok()?.trim().to_owned(),
            _ => revision.to_owned(),
        };
        let one = plain_relative(&commit) && !commit.contains('/');
        (one && self.snapshot(&commit).is_dir()).then_some(commit)
    }

    /// What a commit is known to hold.
    pub fn listing(&self, commit: &str) -> Option<Listing> {
        let text = crate::probe::read_capped(&self.listing_path(commit), LISTING_BYTES_MAX).ok()??;
        let listing: Listing = serde_json::from_slice(&text).ok()?;
        let sound = listing.commit == commit && listing.files.iter().all(|file| plain_relative(&file.path));
        sound.then_some(listing)
    }

    fn listing_path(&self, commit: &str) -> PathBuf {
        self.path.join(".listings").join(format!("{commit}.json"))
    }

    /// Remembers what a commit holds.
    pub fn remember(&self, listing: &Listing) -> Result<(), FetchError> {
        let text = serde_json::to_vec(listing).unwrap_or_default();
        write_whole(&self.listing_path(&listing.commit), &text)
    }

    /// Lets a branch or tag name a commit: the last step of a download.
    pub fn name(&self, revision: Option<&str>, commit: &str) -> Result<(), FetchError> {
        let revision = revision.unwrap_or("main");
        if revision == commit {
            return Ok(());
        }
        write_whole(&self.path.join("refs").join(revision), commit.as_bytes())
    }

    /// Puts a whole blob into a snapshot.
    pub fn point(&self, commit: &str, file: &str, hash: &Hash) -> Result<(), FetchError> {
        let pointer = self.snapshot(commit).join(file);
        let directory = pointer.parent().unwrap_or(&self.path);
        fs::create_dir_all(directory).map_err(FetchError::io(directory))?;
        let temporary = tempfile::Builder::new().prefix(".link-").tempdir_in(directory);
        let temporary = temporary.map_err(FetchError::io(directory))?;
        let link = temporary.path().join("link");
        link_blob(self, file, hash, &link).map_err(FetchError::io(&pointer))?;
        fs::rename(&link, &pointer).map_err(FetchError::io(&pointer))
    }

    /// The file that a snapshot's name leads to. One that leads out of the cache is refused: what is served would be a
    /// file that the user did not mean.
    pub fn resolve(&self, commit: &str, file: &str) -> Result<Option<PathBuf>, FetchError> {
        let path = self.snapshot(commit).join(file);
        let Ok(target) = fs::canonicalize(&path) else { return Ok(None) };
        match within(&target, &self.root) {
            true => Ok(Some(target).filter(|target| target.is_file())),
            false => Err(FetchError::Outside { path, target }),
        }
    }

    /// The names of branches and tags, with the commits they name.
    pub fn references(&self) -> Vec<(String, String)> {
        let root = self.path.join("refs");
        let read = |name: &String| {
            let text = crate::probe::read_capped(&root.join(name), 256).ok()??;
            Some((name.clone(), String::from_utf8(text).ok()?.trim().to_owned()))
        };
        local::files_below(&root).iter().filter_map(read).collect()
    }

    /// The commits that have a snapshot.
    pub fn commits(&self) -> Vec<String> {
        let entries = fs::read_dir(self.path.join("snapshots")).into_iter().flatten().flatten();
        let directories = entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
        let mut commits: Vec<_> = directories.map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
        commits.sort();
        commits
    }
}

#[cfg(unix)]
fn link_blob(_: &Folder, file: &str, hash: &Hash, link: &Path) -> std::io::Result<()> {
    let up = "../".repeat(file.split('/').count() + 1);
    std::os::unix::fs::symlink(format!("{up}blobs/{}", hash.hex()), link)
}

#[cfg(not(unix))]
fn link_blob(folder: &Folder, _: &str, hash: &Hash, link: &Path) -> std::io::Result<()> {
    let blob = folder.blob(hash);
    fs::hard_link(&blob, link).or_else(|_| fs::copy(&blob, link).map(drop))
}

/// Whether a resolved path is below a directory, itself resolved.
pub(crate) fn within(target: &Path, root: &Path) -> bool {
    fs::canonicalize(root).is_ok_and(|root| target.starts_with(root))
}

/// The cache, the repository and the commit of a path that has the form of a snapshot:
/// `CACHE/models--O--R/snapshots/COMMIT`, or something in it.
pub(crate) fn snapshot_of(path: &Path) -> Option<(PathBuf, String, String)> {
    let parts: Vec<_> = path.components().collect();
    let name = |at: usize| match parts.get(at) {
        Some(Component::Normal(name)) => name.to_str(),
        _ => None,
    };
    let is_folder = |at: usize| name(at).is_some_and(|name| name.starts_with(FOLDER));
    let at = (0..parts.len()).rev().find(|&at| is_folder(at) && name(at + 1) == Some("snapshots"))?;
    let repo = name(at)?.strip_prefix(FOLDER)?.replace("--", "/");
    Some((parts[..at].iter().collect(), repo, name(at + 2)?.to_owned()))
}

/// The commit that a directory of the cache is a snapshot of.
pub fn revision_of(root: &Path) -> Option<String> {
    snapshot_of(root).map(|(.., commit)| commit)
}

/// The SHA-256 of a file of a snapshot, in hexadecimal, as the cache knows it: nothing is read.
pub fn hash_of(file: &Path) -> Option<String> {
    let blob = std::fs::read_link(file).ok()?;
    Hash::sha256(blob.file_name()?.to_str()?).map(|hash| hash.hex().to_owned())
}

/// The snapshot of the main branch, if a directory is a repository's folder: `CACHE/models--O--R`.
pub(crate) fn main_snapshot(path: &Path) -> Option<PathBuf> {
    let name = path.file_name()?.to_str()?;
    let repo = name.strip_prefix(FOLDER)?.replace("--", "/");
    let root = path.parent()?.to_owned();
    let folder = Folder { repo, path: path.to_owned(), root };
    Some(folder.snapshot(&folder.commit(None)?))
}

/// Writes a small file so that it is there whole or not at all.
fn write_whole(path: &Path, content: &[u8]) -> Result<(), FetchError> {
    use std::io::Write;
    let directory = path.parent().unwrap_or(Path::new("."));
    fs::create_dir_all(directory).map_err(FetchError::io(directory))?;
    let mut temporary = tempfile::NamedTempFile::new_in(directory).map_err(FetchError::io(directory))?;
    temporary.write_all(content).map_err(FetchError::io(path))?;
    let persisted = temporary.persist(path);
    persisted.map(drop).map_err(|error| FetchError::Io { path: path.to_owned(), source: error.error })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn snapshots_are_known_by_their_form() {
        let at = |path: &str| {
            snapshot_of(Path::new(path)).map(|(root, repo, commit)| format!("{} {repo} {commit}", root.display()))
        };
        let found = Some("/c/hub o/r 0123".to_owned());
        assert_eq!(at("/c/hub/models--o--r/snapshots/0123"), found);
        assert_eq!(at("/c/hub/models--o--r/snapshots/0123/sub/x.gguf"), found);
        for path in ["/c/hub/models--o--r/blobs/0123", "/c/hub/models--o--r/snapshots", "/c/models"] {
            assert_eq!(at(path), None);
        }
    }

    #[cfg(unix)]
    #[test]
    fn links_lead_to_blobs_and_nowhere_else() {
        let root = tempfile::tempdir().unwrap();
        let cache = Cache { root: root.path().join("hub") };
        let folder = cache.folder("o/r");
        let hash = Hash::named(&"a".repeat(64)).unwrap();
        fs::create_dir_all(folder.path.join("blobs")).unwrap();
        fs::write(folder.blob(&hash), "x").unwrap();
        for file in ["x", "sub/y", "sub/deeper/z"] {
            folder.point("c0", file, &hash).unwrap();
            folder.point("c0", file, &hash).unwrap();
            assert_eq!(fs::read(folder.resolve("c0", file).unwrap().unwrap()).unwrap(), b"x");
        }
        assert_eq!(local::files_below(&folder.snapshot("c0")), ["sub/deeper/z", "sub/y", "x"]);
        fs::write(root.path().join("secret"), "y").unwrap();
        std::os::unix::fs::symlink("../../../../secret", folder.snapshot("c0").join("out")).unwrap();
        assert!(matches!(folder.resolve("c0", "out"), Err(FetchError::Outside { .. })));
        assert!(folder.resolve("c0", "none").unwrap().is_none());
        fs::create_dir_all(folder.path.join("refs")).unwrap();
        fs::write(folder.path.join("refs/main"), "../../../..").unwrap();
        assert_eq!(folder.commit(None), None);
        folder.name(None, "c0").unwrap();
        assert_eq!((folder.commit(None), folder.commit(Some("c0"))), (Some("c0".into()), Some("c0".into())));
        assert_eq!(folder.commit(Some("../main")), None);
    }
}
