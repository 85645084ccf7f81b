//! Looking after what is on disk, and looking for what is not.

use std::{fs, path::Path};

use mesh_core::ProgressSink;

use super::{Checked, Entry, Found, Freed, IMPORTS, MODELS, Store, Want, asked, hub_ref};
use crate::{
    error::FetchError,
    hub::{self, Asked, Verdict},
    import, mirror,
    reference::{HubRef, Reference},
    unpack,
};

/// Most repositories that a search gives.
const FOUND_MAX: usize = 20;

/// What a search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finds {
    /// Names of the catalog, with what is said of them.
    pub catalog: Vec<Entry>,
    /// Repositories on the hub, the most downloaded first.
    pub hub: Vec<Found>,
}

impl Store {
    /// Looks for models by words: in the catalog, and on the hub unless the network may not be used.
    ///
    /// # Errors
    ///
    /// A hub that cannot be reached or does not answer, where the catalog has nothing either.
    pub async fn search(&self, words: &str) -> Result<Finds, FetchError> {
        let catalog: Vec<Entry> = self.catalog.search(words).cloned().collect();
        let hub = match self.offline {
            true => Ok(Vec::new()),
            false => self.hub.search(words, FOUND_MAX).await,
        };
        let hub = match hub {
            Err(error) if !catalog.is_empty() => {
                tracing::warn!("{error}; these are the names of the catalog alone");
                Vec::new()
            }
            hub => hub?,
        };
        Ok(Finds { catalog, hub })
    }

    /// Removes a model from the cache, and what was made of it there: a catalog name, a repository, a revision, a
    /// quantization or a file of one, or a directory of the cache.
    ///
    /// # Errors
    ///
    /// What is not in the cache, or lies outside it.
    pub fn remove(&self, reference: &str) -> Result<Freed, FetchError> {
        match Reference::parse(reference, Path::exists)? {
            Reference::Hub(hub) => self.hub.remove(self.asked_of(&hub, reference)),
            Reference::Name(name) => self.remove_entry(self.catalog.find(&name)?),
            Reference::Path(path) => self.remove_path(&path),
        }
    }

    fn asked_of<'a>(&self, hub: &'a HubRef, reference: &'a str) -> Asked<'a> {
        Asked { hub, name: reference, reference, want: Want::Any, room: None }
    }

    fn remove_entry(&self, entry: &Entry) -> Result<Freed, FetchError> {
        let mut freed = Freed::default();
        let hub = hub_ref(entry);
        match self.hub.remove(asked(entry, &hub, Want::Any)) {
            Ok(removed) => freed.add(removed),
            Err(FetchError::NotCached { .. } | FetchError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
        if entry.sha256.is_some() {
            let (name, stamp) = self.kept_as(entry);
            freed.remove(&self.cache.join(MODELS).join(&name), format!("{MODELS}/{name}"))?;
            let made = format!("{name}-{stamp}-");
            for directory in super::subdirectories(&self.cache.join(IMPORTS)) {
                let folder = directory.file_name().unwrap_or_default().to_string_lossy().into_owned();
                if folder.starts_with(&made) {
                    freed.remove(&directory, format!("{IMPORTS}/{folder}"))?;
                }
            }
        }
        if freed.what.is_empty() {
            return Err(FetchError::NotCached { what: entry.name.clone() });
        }
        Ok(freed)
    }

    /// A directory that was imported, or a snapshot of the hub's cache. Nothing else is ours to remove.
    fn remove_path(&self, path: &Path) -> Result<Freed, FetchError> {
        let real = fs::canonicalize(path).map_err(FetchError::io(path))?;
        let mut freed = Freed::default();
        for kept in [IMPORTS, MODELS] {
            let Ok(root) = fs::canonicalize(self.cache.join(kept)) else { continue };
            if let Some(first) = real.strip_prefix(&root).ok().and_then(|below| below.components().next()) {
                let folder = Path::new(&first);
                freed.remove(&root.join(folder), format!("{kept}/{}", folder.display()))?;
                return Ok(freed);
            }
        }
        let Some((_, repo, commit)) = hub::snapshot_of(&real).filter(|(root, ..)| self.hub.is_cache(root)) else {
            return Err(FetchError::NotOurs { path: path.to_owned() });
        };
        let hub = HubRef { repo, file: None, revision: Some(commit), quant: None };
        self.hub.remove(self.asked_of(&hub, &path.to_string_lossy()))
    }

    /// Removes what nobody refers to: snapshots that no branch or tag names, blobs that no snapshot holds, and what
    /// interrupted downloads left.
    pub fn prune(&self) -> Result<Freed, FetchError> {
        let mut freed = self.hub.prune()?;
        let leftovers = [(mirror::WORK, "a download"), (unpack::WORK, "an unpacked file"), (import::WORK, "an import")];
        for kept in [MODELS, IMPORTS] {
            let root = self.cache.join(kept);
            for directory in super::subdirectories(&root).into_iter().chain([root]) {
                for entry in fs::read_dir(&directory).into_iter().flatten().flatten() {
                    let name = entry.file_name().to_string_lossy().into_owned();
                    let left = leftovers.iter().find(|(prefix, _)| name.starts_with(prefix));
                    if let Some((_, what)) = left.filter(|_| is_old(&entry.path())) {
                        freed.remove(&entry.path(), format!("{kept}: part of {what}, {name}"))?;
                    }
                }
            }
        }
        Ok(freed)
    }

    /// Hashes what is in the cache again: one model, or all of it.
    ///
    /// # Errors
    ///
    /// A model that is not in the cache. Damage is no error but a verdict.
    pub async fn verify(&self, reference: Option<&str>, progress: &ProgressSink) -> Result<Vec<Checked>, FetchError> {
        let absent = |what: &str| FetchError::NotCached { what: what.to_owned() };
        let entries: Vec<&Entry> = match reference.map(|text| Reference::parse(text, Path::exists)).transpose()? {
            None => self.catalog.entries().iter().collect(),
            Some(Reference::Name(name)) => vec![self.catalog.find(&name)?],
            Some(Reference::Hub(hub)) => return self.hub.verify(Some(&hub.repo), self.offline, progress).await,
            Some(Reference::Path(path)) => {
                let real = fs::canonicalize(&path).map_err(FetchError::io(&path))?;
                let found = hub::snapshot_of(&real).filter(|(root, ..)| self.hub.is_cache(root));
                let (_, repo, _) = found.ok_or_else(|| absent(&path.to_string_lossy()))?;
                return self.hub.verify(Some(&repo), self.offline, progress).await;
            }
        };
        let mut checked = Vec::new();
        let mut seen = Vec::new();
        for entry in &entries {
            let (Some(file), Some(sha256)) = (&entry.file, &entry.sha256) else { continue };
            let path = self.cache.join(MODELS).join(self.catalog.keeper(entry)).join(file);
            if !path.is_file() || seen.contains(&path) {
                continue;
            }
            let bytes = fs::metadata(&path).map_or(0, |metadata| metadata.len());
            let hashed = path.clone();
            let actual = tokio::task::spawn_blocking(move || mirror::sha256(&hashed)).await;
            let actual =
                actual.map_err(|error| FetchError::Download { what: file.clone(), why: error.to_string() })??;
            let verdict = match actual == *sha256 {
                true => Verdict::Sound,
                false => {
                    Verdict::Damaged { expected: format!("SHA-256 {sha256}"), actual: format!("SHA-256 {actual}") }
                }
            };
            checked.push(Checked { model: entry.name.clone(), file: file.clone(), bytes, verdict });
            seen.push(path);
        }
        let repo = match (&entries[..], reference) {
            ([entry], Some(_)) => Some(entry.repo.as_str()),
            _ => None,
        };
        match self.hub.verify(repo, self.offline, progress).await {
            Ok(found) => checked.extend(found),
            Err(FetchError::NotCached { .. }) if !checked.is_empty() => {}
            Err(FetchError::NotCached { what }) => return Err(absent(reference.unwrap_or(&what))),
            Err(error) => return Err(error),
        }
        Ok(checked)
    }
}

/// Whether something was left behind, rather than being written now.
fn is_old(path: &Path) -> bool {
    const OLD: std::time::Duration = std::time::Duration::from_secs(24 * 60 * 60);
    let modified = fs::metadata(path).and_then(|metadata| metadata.modified());
    modified.is_ok_and(|modified| modified.elapsed().is_ok_and(|age| age > OLD))
}
