//! What the cache keeps, and how it is looked after: listed, removed, cleared of leftovers, hashed again.

use std::{
    collections::BTreeSet,
    fs::{self, File},
    path::{Path, PathBuf},
};

use mesh_core::{ProgressSink, Stage, WeightFormat};

use super::{
    Hub,
    cache::{Folder, PARTIAL},
    hash::Hash,
    on_disk,
    plan::{Asked, Plan},
};
use crate::{choice::Choice, error::FetchError, local};

/// What was removed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Freed {
    /// Room that is free again, in bytes.
    pub bytes: u64,
    /// Files and directories, one line each.
    pub what: Vec<String>,
}

impl Freed {
    /// Adds up.
    pub(crate) fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.what.extend(other.what);
    }

    /// Removes a file or a directory.
    pub(crate) fn remove(&mut self, path: &Path, what: String) -> Result<(), FetchError> {
        let Ok(metadata) = fs::symlink_metadata(path) else { return Ok(()) };
        let bytes = if metadata.is_dir() { size_below(path) } else { metadata.len() };
        let removed = if metadata.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) };
        removed.map_err(FetchError::io(path))?;
        self.bytes += bytes;
        self.what.push(what);
        Ok(())
    }
}

/// What a file turned out to be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It has the hash it should have.
    Sound,
    /// It has another one.
    Damaged {
        /// What was expected.
        expected: String,
        /// What it hashes to.
        actual: String,
    },
    /// It is named, and its content is not there.
    Missing,
    /// Nothing says what it should hash to.
    Unknown,
}

/// A file that was hashed again.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// The model it belongs to.
    pub model: String,
    /// Its name in the model.
    pub file: String,
    /// Its size in bytes.
    pub bytes: u64,
    /// How it is.
    pub verdict: Verdict,
}

impl Hub {
    /// Repositories in the cache that hold weights: name, snapshot, format, bytes of weights.
    pub fn repositories(&self) -> Vec<(String, PathBuf, WeightFormat, u64)> {
        let mut found = Vec::new();
        for folder in self.cache.folders() {
            let Some(commit) = folder.commit(None) else { continue };
            let snapshot = folder.snapshot(&commit);
            let files = on_disk(&snapshot);
            for (format, ending) in [(WeightFormat::Safetensors, ".safetensors"), (WeightFormat::Gguf, ".gguf")] {
                let weights = files.iter().filter(|file| file.path.ends_with(ending));
                let (count, bytes) = weights.fold((0, 0), |(count, bytes), file| (count + 1, bytes + file.bytes));
                if count > 0 {
                    found.push((folder.repo.clone(), snapshot.clone(), format, bytes));
                }
            }
        }
        found.sort();
        found
    }

    /// Removes what is asked for from the cache: a whole repository, a revision of it, or some of its files.
    pub fn remove(&self, asked: Asked<'_>) -> Result<Freed, FetchError> {
        let hub = asked.hub;
        let folder = self.cache.folder(&hub.repo);
        let absent = || FetchError::NotCached { what: asked.reference.to_owned() };
        if !folder.path.is_dir() {
            return Err(absent());
        }
        let mut freed = Freed::default();
        if hub.file.is_none() && hub.quant.is_none() && hub.revision.is_none() {
            freed.remove(&folder.path, hub.repo.clone())?;
            return Ok(freed);
        }
        let commit = folder.commit(hub.revision.as_deref()).ok_or_else(absent)?;
        let snapshot = folder.snapshot(&commit);
        if hub.file.is_none() && hub.quant.is_none() {
            freed.remove(&snapshot, format!("{}@{commit}", hub.repo))?;
            for (name, _) in folder.references().into_iter().filter(|(_, named)| *named == commit) {
                freed.remove(&folder.path.join("refs").join(&name), format!("{}@{name}", hub.repo))?;
            }
        } else {
            let plan = Plan::new(asked, &on_disk(&snapshot))?;
            let weights = match plan.choice {
                Choice::Indexed => vec![hub.file.clone().unwrap_or_default()],
                _ => plan.weights,
            };
            for file in weights {
                freed.remove(&snapshot.join(&file), format!("{}/{file}", hub.repo))?;
            }
        }
        // Links take next to nothing; it is what they led to that counts.
        freed.bytes = 0;
        freed.add(sweep(&folder, Sweep { partials: false, snapshots: false })?);
        let empty = |part: &str| pointers(&folder.path.join(part)).is_empty();
        if empty("snapshots") && empty("blobs") {
            fs::remove_dir_all(&folder.path).map_err(FetchError::io(&folder.path))?;
        }
        Ok(freed)
    }

    /// Removes what nobody refers to: snapshots that no branch or tag names, blobs that no snapshot holds, and what
    /// interrupted downloads left.
    pub fn prune(&self) -> Result<Freed, FetchError> {
        let mut freed = Freed::default();
        for folder in self.cache.folders() {
            freed.add(sweep(&folder, Sweep { partials: true, snapshots: true })?);
        }
        Ok(freed)
    }

    /// Hashes the files of a repository again, or of all of them: against what the hub listed when they came, or lists now,
    /// or else against their blobs' names.
    pub async fn verify(
        &self,
        repo: Option<&str>,
        offline: bool,
        progress: &ProgressSink,
    ) -> Result<Vec<Checked>, FetchError> {
        let folders: Vec<Folder> =
            self.cache.folders().into_iter().filter(|folder| repo.is_none_or(|repo| folder.repo == repo)).collect();
        if let (Some(repo), true) = (repo, folders.is_empty()) {
            return Err(FetchError::NotCached { what: repo.to_owned() });
        }
        let mut checked = Vec::new();
        let mut online = !offline;
        for folder in folders {
            for commit in folder.commits() {
                let mut listing = folder.listing(&commit);
                if listing.is_none() && online {
                    online = self.reachable().await.is_ok();
                    if online {
                        listing = self.wire.list(&folder.repo, Some(&commit)).await.ok();
                    }
                }
                let (folder, progress) = (folder.clone(), progress.clone());
                let hashing = tokio::task::spawn_blocking(move || {
                    let expected = |file: &str| {
                        let listed = listing.as_ref()?.files.iter().find(|listed| listed.path == file)?;
                        Some(listed.hash.clone())
                    };
                    check(&folder, &commit, &expected, &progress)
                });
                let found = hashing.await;
                checked.extend(
                    found.map_err(|error| FetchError::Download { what: "hashing".into(), why: error.to_string() })?,
                );
            }
        }
        Ok(checked)
    }
}

/// Hashes every file of a snapshot.
fn check(
    folder: &Folder,
    commit: &str,
    expected: &dyn Fn(&str) -> Option<Hash>,
    progress: &ProgressSink,
) -> Vec<Checked> {
    let snapshot = folder.snapshot(commit);
    let files = pointers(&snapshot);
    let stage = Stage::Check { what: folder.repo.clone() };
    let sizes: Vec<u64> =
        files.iter().map(|file| fs::metadata(snapshot.join(file)).map_or(0, |found| found.len())).collect();
    let (mut done, total) = (0, sizes.iter().sum::<u64>());
    let mut checked = Vec::new();
    for (file, bytes) in files.into_iter().zip(sizes) {
        progress.report(&stage, done, Some(total.max(1)));
        let path = snapshot.join(&file);
        let named = || {
            let blob = fs::canonicalize(&path).ok()?;
            Hash::named(&blob.file_name()?.to_string_lossy())
        };
        let verdict = match (expected(&file).or_else(named), path.is_file()) {
            (_, false) => Verdict::Missing,
            (None, true) => Verdict::Unknown,
            (Some(hash), true) => match hash.of(&path) {
                Ok(actual) if actual == hash => Verdict::Sound,
                Ok(actual) => Verdict::Damaged { expected: hash.to_string(), actual: actual.to_string() },
                Err(error) => Verdict::Damaged { expected: hash.to_string(), actual: error.to_string() },
            },
        };
        done += bytes;
        checked.push(Checked { model: folder.repo.clone(), file, bytes, verdict });
    }
    progress.report(&stage, total.max(1), Some(total.max(1)));
    checked
}

/// What is swept, besides blobs that no snapshot holds.
struct Sweep {
    partials: bool,
    snapshots: bool,
}

fn sweep(folder: &Folder, what: Sweep) -> Result<Freed, FetchError> {
    let mut freed = Freed::default();
    let named: BTreeSet<String> = folder.references().into_iter().map(|(_, commit)| commit).collect();
    for commit in folder.commits() {
        if what.snapshots && !named.contains(&commit) {
            let mut links = Freed::default();
            links.remove(&folder.snapshot(&commit), format!("{}@{commit}", folder.repo))?;
            // Links take next to nothing; their blobs are counted below.
            freed.what.extend(links.what);
        }
    }
    let commits: BTreeSet<String> = folder.commits().into_iter().collect();
    for listing in local::files_below(&folder.path.join(".listings")) {
        if listing.strip_suffix(".json").is_none_or(|commit| !commits.contains(commit)) {
            fs::remove_file(folder.path.join(".listings").join(&listing)).ok();
        }
    }
    let held: BTreeSet<PathBuf> = commits
        .iter()
        .map(|commit| folder.snapshot(commit))
        .flat_map(|snapshot| pointers(&snapshot).into_iter().map(move |file| snapshot.join(file)))
        .filter_map(|path| fs::canonicalize(path).ok())
        .collect();
    let blobs = folder.path.join("blobs");
    for name in local::files_below(&blobs) {
        let path = blobs.join(&name);
        let partial = name.strip_suffix(PARTIAL);
        let wanted = match partial {
            Some(_) => !what.partials,
            None => fs::canonicalize(&path).is_ok_and(|path| held.contains(&path)),
        };
        if !wanted && unlocked(folder, partial.unwrap_or(&name)) {
            let shown = if partial.is_some() { "part of a download" } else { "blob" };
            freed.remove(&path, format!("{}: {shown} {name}", folder.repo))?;
        }
    }
    Ok(freed)
}

/// Whether nobody is fetching a blob at the moment.
fn unlocked(folder: &Folder, name: &str) -> bool {
    let Some(hash) = Hash::named(name) else { return true };
    match File::open(folder.lock(&hash)) {
        Ok(file) => file.try_lock().is_ok(),
        Err(_) => true,
    }
}

/// The names in a snapshot, those that lead nowhere among them.
fn pointers(snapshot: &Path) -> Vec<String> {
    const DEPTH_MAX: usize = 8;
    fn walk(directory: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
        for entry in fs::read_dir(directory).into_iter().flatten().flatten() {
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => {
                    walk(&entry.path(), &format!("{name}/"), depth + 1, names);
                }
                Ok(kind) if !kind.is_dir() => names.push(name),
                _ => {}
            }
        }
    }
    let mut names = Vec::new();
    walk(snapshot, "", 0, &mut names);
    names.sort();
    names
}

/// The bytes of the files below a directory; links count for nothing.
fn size_below(directory: &Path) -> u64 {
    let real = |name: &String| {
        let metadata = fs::symlink_metadata(directory.join(name)).ok()?;
        metadata.is_file().then_some(metadata.len())
    };
    pointers(directory).iter().filter_map(real).sum()
}
