//! One file: continued where it was cut, checked by size and hash, fetched once however many want it.

use std::{
    fs::{self, File, TryLockError},
    io::{Seek, Write},
    path::Path,
    time::{Duration, Instant},
};

use reqwest::{StatusCode, header::CONTENT_RANGE};

use super::{
    cache::Folder,
    hash::Hasher,
    watch::Watch,
    wire::{Bytes, Fault, Listed, Wire, root_cause},
};
use crate::error::FetchError;

/// Longest time to wait for another process that fetches the same file and gets nowhere.
const LOCK_TIMEOUT: Duration = Duration::from_secs(600);
/// How often such a file is looked at.
const LOCK_POLL: Duration = Duration::from_millis(100);

/// Fetches files of one commit.
pub(super) struct Fetch<'a> {
    pub wire: &'a Wire,
    pub folder: &'a Folder,
    pub commit: &'a str,
    pub watch: &'a Watch,
}

/// A blob as far as it has come.
struct Partial {
    file: File,
    done: u64,
    hasher: Hasher,
    /// Whether some of it was there before, from who knows whom.
    found: bool,
}

impl Fetch<'_> {
    /// Puts a file into the snapshot, from the hub unless its blob is there.
    pub async fn file(&self, listed: &Listed) -> Result<(), FetchError> {
        let (blob, partial) = (self.folder.blob(&listed.hash), self.folder.partial(&listed.hash));
        self.watch.at(&listed.path, 0, listed.bytes);
        if !whole(&blob, listed.bytes) {
            let directory = blob.parent().unwrap_or(&self.folder.path);
            fs::create_dir_all(directory).map_err(FetchError::io(directory))?;
            let _lock = self.lock(listed, &partial).await?;
            // Whoever held the lock may have fetched it.
            if !whole(&blob, listed.bytes) {
                self.fill(listed, &partial).await?;
                fs::rename(&partial, &blob).map_err(FetchError::io(&blob))?;
            }
        }
        self.folder.point(self.commit, &listed.path, &listed.hash)?;
        self.watch.over(&listed.path, listed.bytes);
        Ok(())
    }

    fn what(&self, listed: &Listed) -> String {
        format!("{}/{}", self.folder.repo, listed.path)
    }

    /// Waits until nobody else fetches this file, in this process or another, and shows how it grows.
    async fn lock(&self, listed: &Listed, partial: &Path) -> Result<Option<File>, FetchError> {
        let path = self.folder.lock(&listed.hash);
        let directory = path.parent().unwrap_or(&self.folder.path);
        fs::create_dir_all(directory).map_err(FetchError::io(directory))?;
        let file = File::options().create(true).truncate(false).write(true).open(&path);
        let file = file.map_err(FetchError::io(&path))?;
        let (mut grown, mut since) = (0, Instant::now());
        loop {
            match file.try_lock() {
                Ok(()) => return Ok(Some(file)),
                Err(TryLockError::WouldBlock) => {}
                Err(TryLockError::Error(error)) => {
                    // Some file systems of networks have none.
                    tracing::debug!("{}: {error}; going on without a lock", path.display());
                    return Ok(None);
                }
            }
            let there = fs::metadata(partial).map_or(0, |metadata| metadata.len());
            if there != grown {
                (grown, since) = (there, Instant::now());
                self.watch.at(&listed.path, there, listed.bytes);
            } else if since.elapsed() > LOCK_TIMEOUT {
                let why =
                    format!("another process fetches this file, and nothing has come for {} s", LOCK_TIMEOUT.as_secs());
                return Err(FetchError::Download { what: self.what(listed), why });
            }
            tokio::time::sleep(LOCK_POLL).await;
        }
    }

    /// Brings what is missing, until it is whole and right.
    async fn fill(&self, listed: &Listed, path: &Path) -> Result<(), FetchError> {
        let mut partial = Partial::open(path, listed).await?;
        let mut pauses = self.wire.patience.pauses();
        loop {
            let before = partial.done;
            let outcome = if partial.done == listed.bytes { Ok(()) } else { self.receive(listed, &mut partial).await };
            match outcome {
                Ok(()) => {}
                Err(fault) => {
                    if partial.done > before {
                        pauses.renew();
                    }
                    pauses.after(fault).await?;
                    continue;
                }
            }
            let actual = partial.hasher.clone().finish();
            if actual == listed.hash {
                return partial.file.sync_all().map_err(FetchError::io(path));
            }
            if partial.found {
                tracing::info!("{}: what was put together of it is wrong; fetching it anew", self.what(listed));
                partial.restart(listed).map_err(FetchError::io(path))?;
                continue;
            }
            drop(partial);
            fs::remove_file(path).map_err(FetchError::io(path))?;
            return Err(FetchError::Checksum {
                file: self.what(listed),
                expected: listed.hash.to_string(),
                actual: actual.to_string(),
            });
        }
    }

    /// Receives what is missing in one answer.
    async fn receive(&self, listed: &Listed, partial: &mut Partial) -> Result<(), Fault> {
        let what = self.what(listed);
        let url = self.wire.file_address(&self.folder.repo, self.commit, &listed.path);
        let mut response = self.wire.get(url, Bytes::From(partial.done), &self.folder.repo, &what).await?;
        let begins = response.headers().get(CONTENT_RANGE).and_then(|range| range_start(range.to_str().ok()?));
        let continues = response.status() == StatusCode::PARTIAL_CONTENT && begins == Some(partial.done);
        if partial.done > 0 && !continues {
            // Not every server knows ranges.
            partial.restart(listed).map_err(|error| Fault::last(FetchError::io(&listed.path)(error)))?;
            if !response.status().is_success() || response.status() == StatusCode::PARTIAL_CONTENT {
                return Err(Fault::passing(&what, format!("the hub answers {}", response.status())));
            }
        }
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => self.take(listed, partial, &chunk)?,
                Ok(None) if partial.done == listed.bytes => return Ok(()),
                Ok(None) => return Err(self.cut(listed, partial, "the connection ended")),
                Err(error) => return Err(self.cut(listed, partial, &root_cause(&error))),
            }
        }
    }

    fn cut(&self, listed: &Listed, partial: &Partial, why: &str) -> Fault {
        Fault::passing(&self.what(listed), format!("{why} after {} of {} bytes", partial.done, listed.bytes))
    }

    /// Keeps a piece. More than was listed is an error before it is on disk.
    fn take(&self, listed: &Listed, partial: &mut Partial, chunk: &[u8]) -> Result<(), Fault> {
        let what = self.what(listed);
        if chunk.len() as u64 > listed.bytes - partial.done {
            let why = format!("more arrives than the {} bytes that the hub lists", listed.bytes);
            partial.restart(listed).map_err(|error| Fault::last(FetchError::io(&what)(error)))?;
            return Err(Fault::passing(&what, why));
        }
        // Unbuffered: what has arrived is on disk, however this process ends.
        partial.file.write_all(chunk).map_err(|error| Fault::last(FetchError::io(&what)(error)))?;
        partial.hasher.update(chunk);
        partial.done += chunk.len() as u64;
        self.watch.at(&listed.path, partial.done, listed.bytes);
        Ok(())
    }
}

impl Partial {
    /// What is there already, hashed.
    async fn open(path: &Path, listed: &Listed) -> Result<Self, FetchError> {
        let file = File::options().read(true).write(true).create(true).truncate(false).open(path);
        let mut file = file.map_err(FetchError::io(path))?;
        let mut done = file.metadata().map_err(FetchError::io(path))?.len();
        if done > listed.bytes {
            file.set_len(0).map_err(FetchError::io(path))?;
            done = 0;
        }
        let mut hasher = listed.hash.hasher(listed.bytes);
        let reading = tokio::task::spawn_blocking(move || {
            hasher.read(&mut file)?;
            file.seek(std::io::SeekFrom::Start(done))?;
            Ok::<_, std::io::Error>((file, hasher))
        });
        let read = reading.await.unwrap_or_else(|error| Err(std::io::Error::other(error)));
        let (file, hasher) = read.map_err(FetchError::io(path))?;
        Ok(Self { file, done, hasher, found: done > 0 })
    }

    fn restart(&mut self, listed: &Listed) -> std::io::Result<()> {
        self.file.set_len(0)?;
        self.file.rewind()?;
        (self.done, self.hasher, self.found) = (0, listed.hash.hasher(listed.bytes), false);
        Ok(())
    }
}

/// Whether a blob is there. It was hashed before it got its name; its size tells of tools that did not.
pub(super) fn whole(blob: &Path, bytes: u64) -> bool {
    fs::metadata(blob).is_ok_and(|metadata| metadata.is_file() && metadata.len() == bytes)
}

/// The first byte of `bytes 5-9/10`.
fn range_start(range: &str) -> Option<u64> {
    range.trim().strip_prefix("bytes ")?.split_once('-')?.0.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    #[test]
    fn ranges_say_where_they_begin() {
        assert_eq!(super::range_start("bytes 5-9/10"), Some(5));
        assert_eq!(super::range_start("bytes */10"), None);
        assert_eq!(super::range_start("lines 5-9"), None);
    }
}
