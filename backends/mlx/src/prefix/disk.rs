//! The folder of the disk tier: one sub-folder a model, one file a run of tokens.
//!
//! - A file's name says where its run begins and which tokens it ends after; see [`Chain`]. It is written under another
//!   name first, so what has its name is whole. Should the machine have crashed since, the checksum tells.
//! - A file's time is when it was used last, and never before the time of one that continues it: whoever uses a file stamps
//!   all before it too. Deleting the oldest first, of equals the one that begins latest, thus deletes leaves first, without
//!   knowing the tree, which other processes may have changed.
//! - The budget is that of the folder, all models and processes together. A file only ever gives way to one used later.
//! - Files hold conversations: nobody but the user may read them.

use std::{
    cmp::Reverse,
    fs::{self, DirBuilder, File, OpenOptions},
    io::{self, BufWriter},
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use sha2::{Digest, Sha256};

use super::{
    file::{self, Chain, Content, Draft, FORMAT, FileError, Hash, Head, RUN_TOKENS_MAX, hex, unhex},
    payload::NamedTensor,
    tree::FileRef,
};

/// Writing stops for good after so many failures in a row.
const WRITE_FAILURES_MAX: u32 = 8;

/// What is left of writers that died is swept away after this.
const PART_AGE_MAX: Duration = Duration::from_secs(3600);

/// Entries of a folder that are looked at.
const ENTRIES_MAX: usize = 65_536;

/// Models' folders that are looked at.
const MODELS_MAX: usize = 1024;

/// Where and how much the disk tier keeps.
#[derive(Clone, Debug)]
pub struct DiskSettings {
    /// Created if it is not there. Processes may share it.
    pub folder: PathBuf,
    /// What the files in it may hold together, of all models.
    pub bytes_max: u64,
    /// How many files.
    pub files_max: usize,
    /// What the payloads depend on beside the tokens: the weights' hash, their quantization, the layout of the payloads.
    pub model: String,
}

/// A file found at start.
#[derive(Debug)]
pub(super) struct Found {
    pub file: FileRef,
    pub head: Head,
    /// The hash of all tokens up to the run's end, if the name is right.
    pub hash: Hash,
    /// When it was used last, in microseconds since 1970.
    pub used: u64,
}

/// Why a file was not written.
#[derive(Debug, thiserror::Error)]
pub(super) enum WriteError {
    /// It would never be.
    #[error("it is too long, or cannot be written as a file")]
    Unwritable,
    /// Only files used later would have to give way.
    #[error("all files were used later")]
    NoRoom,
    #[error(transparent)]
    Io(#[from] io::Error),
    #[error("writing failed too often")]
    GivenUp,
}

pub(super) struct Disk {
    settings: DiskSettings,
    own: PathBuf,
    parts: u64,
    failures: u32,
    warned: bool,
}

/// A file that counts against the budget.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Entry {
    path: PathBuf,
    used: u64,
    start: usize,
    bytes: u64,
}

impl Disk {
    pub fn open(settings: DiskSettings) -> io::Result<Self> {
        let mut builder = DirBuilder::new();
        builder.recursive(true);
        #[cfg(unix)]
        std::os::unix::fs::DirBuilderExt::mode(&mut builder, 0o700);
        let own = settings.folder.join(folder_name(&settings.model));
        builder.create(&own)?;
        #[cfg(unix)]
        fs::set_permissions(&own, std::os::unix::fs::PermissionsExt::from_mode(0o700))?;
        Ok(Self { settings, own, parts: 0, failures: 0, warned: false })
    }

    /// The hash before the first token.
    pub fn chain(&self) -> Chain {
        Chain::new(&self.settings.model)
    }

    /// Reads the heads of at most `files_max` files, the last used first, until they have `tokens_max` tokens together.
    /// Sorted by where they begin.
    pub fn scan(&mut self, files_max: usize, tokens_max: usize) -> Vec<Found> {
        self.sweep();
        let mut entries = list(&self.own);
        entries.sort_by_key(|entry| (Reverse(entry.used), entry.start));
        entries.truncate(files_max.min(self.settings.files_max));
        let (mut found, mut tokens) = (Vec::new(), 0);
        for entry in entries {
            let Some(name) = entry.path.file_name().and_then(|name| name.to_str()) else { continue };
            match self.head(name) {
                Ok(one) => {
                    tokens += one.head.tokens.len();
                    if tokens > tokens_max {
                        break;
                    }
                    found.push(one);
                }
                Err(error) => self.give_up(name, &error),
            }
        }
        found.sort_by_key(|found| found.file.start);
        found
    }

    fn head(&self, name: &str) -> Result<Found, FileError> {
        let (start, hash, pointed) = parse_name(name).ok_or(FileError::Unfit("its name is none of ours"))?;
        let file = File::open(self.own.join(name))?;
        let metadata = file.metadata()?;
        let head = file::read_head(io::BufReader::new(file), metadata.len(), &self.settings.model)?;
        if (head.start, head.pointed) != (start, pointed) {
            return Err(FileError::Unfit("its name is that of another"));
        }
        let file = FileRef { name: name.into(), start, tokens: head.tokens.len(), bytes: metadata.len(), pointed };
        Ok(Found { file, head, hash, used: micros(metadata.modified()?).min(now()) })
    }

    /// Reads a file and verifies it.
    pub fn read(&self, file: &FileRef) -> Result<Content, FileError> {
        let opened = File::open(self.own.join(&file.name))?;
        let length = opened.metadata()?.len();
        if length > file.bytes {
            return Err(io::Error::other("it has grown").into());
        }
        file::read_content(io::BufReader::new(opened), length)
    }

    /// Whether a file is there, as far as its name and length tell.
    pub fn has(&self, file: &FileRef) -> bool {
        fs::metadata(self.own.join(&file.name)).is_ok_and(|metadata| metadata.len() == file.bytes)
    }

    /// Says in the log that a file is of no use, and deletes it if it is its own fault. One such file is news.
    pub fn give_up(&mut self, name: &str, error: &FileError) {
        match error {
            FileError::Io(error) if error.kind() == io::ErrorKind::NotFound => return,
            FileError::Io(_) => {}
            FileError::Unfit(_) => drop(fs::remove_file(self.own.join(name))),
        }
        if !std::mem::replace(&mut self.warned, true) {
            tracing::warn!(file = name, %error, "a file of the prefix cache is of no use, and others may be");
        } else {
            tracing::debug!(file = name, %error, "a file of the prefix cache is of no use");
        }
    }

    /// Says when a file was used, in microseconds since 1970.
    pub fn stamp(&self, file: &FileRef, used: u64) {
        let opened = OpenOptions::new().write(true).open(self.own.join(&file.name));
        // Another process may have deleted it; that is noticed when it is needed.
        let _ = opened.and_then(|file| file.set_modified(UNIX_EPOCH + Duration::from_micros(used)));
    }

    /// Fails if a file of so many bytes that were used then would not be written, as things are.
    pub fn room(&self, bytes: u64, used: u64) -> Result<(), WriteError> {
        self.doomed(&self.all(), bytes, used).map(drop)
    }

    /// Which files go so that another can be written.
    fn doomed<'a>(&self, entries: &'a [Entry], bytes: u64, used: u64) -> Result<Vec<&'a Entry>, WriteError> {
        if self.failures >= WRITE_FAILURES_MAX {
            return Err(WriteError::GivenUp);
        }
        if bytes > self.settings.bytes_max {
            return Err(WriteError::Unwritable);
        }
        give_way(entries, &self.settings, bytes, used).ok_or(WriteError::NoRoom)
    }

    /// Writes a file that was used then. Answers it, and the names of those that had to give way.
    pub fn write(
        &mut self,
        before: &Chain,
        start: usize,
        run: &[u32],
        segment: Vec<NamedTensor>,
        point: Option<Vec<NamedTensor>>,
        used: u64,
    ) -> Result<(FileRef, Vec<String>), WriteError> {
        if !(1..=RUN_TOKENS_MAX).contains(&run.len()) {
            return Err(WriteError::Unwritable);
        }
        let pointed = point.is_some();
        let head = Head { start, parent: before.hash(), tokens: run.to_vec(), pointed };
        let draft = Draft::new(&self.settings.model, &head, segment, point).map_err(|_| WriteError::Unwritable)?;
        let bytes = draft.bytes();
        let mut end = before.clone();
        end.extend(run);
        let file = FileRef { name: name(start, &end.hash(), pointed), start, tokens: run.len(), bytes, pointed };
        let entries = self.all();
        let mut gone = Vec::new();
        for entry in self.doomed(&entries, bytes, used)? {
            let _ = fs::remove_file(&entry.path);
            gone.extend(entry.path.file_name().map(|name| name.to_string_lossy().into_owned()));
        }
        match self.place(&draft, &file.name) {
            Ok(()) => self.failures = 0,
            Err(error) => {
                self.failures += 1;
                tracing::warn!(%error, failures = self.failures, "a file of the prefix cache could not be written");
                return Err(error.into());
            }
        }
        self.stamp(&file, used);
        // It may have taken its own place.
        gone.retain(|name| *name != file.name);
        Ok((file, gone))
    }

    /// Writes under another name and renames. Nothing is synced: a crash costs the file, and the checksum tells.
    fn place(&mut self, draft: &Draft, name: &str) -> io::Result<()> {
        self.parts += 1;
        let part = self.own.join(format!("{}-{}.part", std::process::id(), self.parts));
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(true);
        #[cfg(unix)]
        std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
        let written = options.open(&part).and_then(|file| {
            draft.write(BufWriter::with_capacity(1 << 20, file)).map_err(|error| match error {
                FileError::Io(error) => error,
                FileError::Unfit(why) => io::Error::other(why),
            })
        });
        written.and_then(|()| fs::rename(&part, self.own.join(name))).inspect_err(|_| drop(fs::remove_file(&part)))
    }

    /// Deletes what writers that died have left.
    fn sweep(&self) {
        for entry in fs::read_dir(&self.own).into_iter().flatten().take(ENTRIES_MAX).flatten() {
            let is_part = entry.path().extension().is_some_and(|ending| ending == "part");
            let age = entry.metadata().and_then(|metadata| metadata.modified()).map(|time| time.elapsed());
            if is_part && matches!(age, Ok(Ok(age)) if age > PART_AGE_MAX) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }

    /// The files of all models.
    fn all(&self) -> Vec<Entry> {
        let folders = fs::read_dir(&self.settings.folder).into_iter().flatten().take(MODELS_MAX).flatten();
        let models = folders.filter(|folder| is_folder_name(&folder.file_name().to_string_lossy()));
        models.flat_map(|folder| list(&folder.path())).collect()
    }
}

/// Now, in microseconds since 1970.
pub(super) fn now() -> u64 {
    micros(SystemTime::now())
}

fn micros(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros().try_into().unwrap_or(u64::MAX))
}

/// Which files go so that `bytes` more fit; nothing if even all that were used before `used` do not suffice.
fn give_way<'a>(entries: &'a [Entry], settings: &DiskSettings, bytes: u64, used: u64) -> Option<Vec<&'a Entry>> {
    let mut oldest: Vec<&Entry> = entries.iter().filter(|entry| entry.used < used).collect();
    oldest.sort_by_key(|entry| (entry.used, Reverse(entry.start)));
    let mut total = entries.iter().map(|entry| entry.bytes).sum::<u64>().saturating_add(bytes);
    let mut files = entries.len() + 1;
    let mut doomed = Vec::new();
    let mut next = oldest.into_iter();
    while total > settings.bytes_max || files > settings.files_max {
        let entry = next.next()?;
        total -= entry.bytes;
        files -= 1;
        doomed.push(entry);
    }
    Some(doomed)
}

/// The files of one model's folder, by their names.
fn list(folder: &Path) -> Vec<Entry> {
    // A clock that was wrong once must not make a file the youngest for ever.
    let now = now();
    let entries = fs::read_dir(folder).into_iter().flatten().take(ENTRIES_MAX).flatten();
    let ours = entries.filter_map(|entry| {
        let (start, _, _) = parse_name(entry.file_name().to_str()?)?;
        let metadata = entry.metadata().ok().filter(fs::Metadata::is_file)?;
        let used = micros(metadata.modified().ok()?).min(now);
        Some(Entry { path: entry.path(), used, start, bytes: metadata.len() })
    });
    ours.collect()
}

fn name(start: usize, hash: &Hash, pointed: bool) -> String {
    format!("{start:08x}-{}{}.safetensors", hex(hash), if pointed { "-point" } else { "" })
}

fn parse_name(text: &str) -> Option<(usize, Hash, bool)> {
    let (start, rest) = text.strip_suffix(".safetensors")?.split_once('-')?;
    let (hash, pointed) = rest.strip_suffix("-point").map_or((rest, false), |hash| (hash, true));
    let (start, hash) = (usize::from_str_radix(start, 16).ok()?, unhex(hash)?);
    // One name only for each.
    (start <= u32::MAX as usize && name(start, &hash, pointed) == text).then_some((start, hash, pointed))
}

fn folder_name(model: &str) -> String {
    hex(&Sha256::new().chain_update(FORMAT).chain_update([0]).chain_update(model).finalize()[..16])
}

fn is_folder_name(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_give_way_and_of_equals_what_begins_latest() {
        let entry = |used, start, bytes| Entry { path: format!("{used} {start}").into(), used, start, bytes };
        let entries = [entry(2, 0, 10), entry(1, 0, 10), entry(1, 7, 10), entry(1, 3, 10), entry(9, 0, 10)];
        let limits =
            |bytes_max, files_max| DiskSettings { folder: PathBuf::new(), bytes_max, files_max, model: String::new() };
        let gone = |limits: DiskSettings, bytes, used| {
            let doomed = give_way(&entries, &limits, bytes, used)?;
            Some(doomed.iter().map(|entry| (entry.used, entry.start)).collect::<Vec<_>>())
        };
        assert_eq!(gone(limits(60, 6), 10, 5), Some(vec![]));
        assert_eq!(gone(limits(59, 6), 10, 5), Some(vec![(1, 7)]));
        assert_eq!(gone(limits(60, 5), 10, 5), Some(vec![(1, 7)]));
        assert_eq!(gone(limits(60, 6), 40, 5), Some(vec![(1, 7), (1, 3), (1, 0)]));
        assert_eq!(gone(limits(60, 6), 41, 5), Some(vec![(1, 7), (1, 3), (1, 0), (2, 0)]));
        assert_eq!(gone(limits(60, 6), 51, 5), None, "the youngest was used later");
        assert_eq!(gone(limits(60, 6), 41, 2), None, "what was used at the same time stays");
        assert_eq!(gone(limits(60, 0), 0, 99), None);
        assert_eq!(gone(limits(u64::MAX, 99), u64::MAX, 99), Some(vec![]));
    }

    #[test]
    fn a_file_has_one_name() {
        let hash = [0xab; 32];
        for (start, pointed) in [(0, false), (17, true), (u32::MAX as usize, false)] {
            let text = name(start, &hash, pointed);
            assert_eq!(parse_name(&text), Some((start, hash, pointed)));
            for other in [text.to_uppercase(), format!("0{text}"), format!("{text}x"), text.replace('-', "--")] {
                assert_eq!(parse_name(&other), None, "{other}");
            }
        }
        assert_eq!(parse_name(&name(1 << 32, &hash, false)), None);
    }
}
