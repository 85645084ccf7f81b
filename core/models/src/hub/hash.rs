//! What the hub says a file hashes to, which is also what the cache calls it: SHA-256 for large files, git's SHA-1 of a
//! blob for small ones.

use std::{fmt, fs::File, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use sha2::Digest;

/// A hash in lower-case hexadecimal.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Hash(String);

impl Hash {
    /// The SHA-256 of a file.
    pub fn sha256(hex: &str) -> Option<Self> {
        Self::of_length(hex, 64)
    }

    /// The SHA-1 that git calls a file by.
    pub fn git(hex: &str) -> Option<Self> {
        Self::of_length(hex, 40)
    }

    /// A blob of the cache, by its name. Other tools keep blobs under names that are no hashes.
    pub fn named(name: &str) -> Option<Self> {
        Self::sha256(name).or_else(|| Self::git(name))
    }

    fn of_length(hex: &str, length: usize) -> Option<Self> {
        let plain = hex.len() == length && hex.bytes().all(|byte| byte.is_ascii_hexdigit());
        plain.then(|| Self(hex.to_lowercase()))
    }

    /// Its digits: nothing else can be in them, so that it is safe as the name of a file.
    pub fn hex(&self) -> &str {
        &self.0
    }

    /// Begins to hash a file of so many bytes.
    pub fn hasher(&self, bytes: u64) -> Hasher {
        if self.0.len() == 64 {
            return Hasher::Sha256(sha2::Sha256::new());
        }
        let mut sha1 = sha1::Sha1::new();
        sha1.update(format!("blob {bytes}\0"));
        Hasher::Git(sha1)
    }

    /// What a file hashes to, in the same way.
    pub fn of(&self, path: &Path) -> std::io::Result<Self> {
        let file = File::open(path)?;
        let mut hasher = self.hasher(file.metadata()?.len());
        hasher.read(file)?;
        Ok(hasher.finish())
    }
}

impl fmt::Display for Hash {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", if self.0.len() == 64 { "SHA-256" } else { "git SHA-1" }, self.0)
    }
}

impl TryFrom<String> for Hash {
    type Error = String;

    fn try_from(hex: String) -> Result<Self, String> {
        Self::named(&hex).ok_or_else(|| "neither a SHA-256 nor a SHA-1".into())
    }
}

impl From<Hash> for String {
    fn from(hash: Hash) -> Self {
        hash.0
    }
}

/// A hash in the making.
#[derive(Clone)]
pub(crate) enum Hasher {
    Sha256(sha2::Sha256),
    Git(sha1::Sha1),
}

impl Hasher {
    pub fn update(&mut self, bytes: &[u8]) {
        match self {
            Self::Sha256(hasher) => hasher.update(bytes),
            Self::Git(hasher) => hasher.update(bytes),
        }
    }

    /// Hashes what is left of `from`.
    pub fn read(&mut self, mut from: impl Read) -> std::io::Result<()> {
        let mut buffer = vec![0; 1 << 18];
        loop {
            match from.read(&mut buffer)? {
                0 => return Ok(()),
                read => self.update(&buffer[..read]),
            }
        }
    }

    pub fn finish(self) -> Hash {
        let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect();
        match self {
            Self::Sha256(hasher) => Hash(hex(&hasher.finalize())),
            Self::Git(hasher) => Hash(hex(&hasher.finalize())),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_kinds_are_as_git_and_the_hub_count_them() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("x");
        std::fs::write(&path, "hello\n").unwrap();
        // `printf 'hello\n' | git hash-object --stdin`, and `sha256sum`.
        let git = Hash::git("ce013625030ba8dba906f756967f9e9ca394464a").unwrap();
        let sha256 = Hash::sha256("5891B5B522D5DF086D0FF0B110FBD9D21BB4FC7163AF34D08286A2E846F6BE03").unwrap();
        assert_eq!(git.of(&path).unwrap(), git);
        assert_eq!(sha256.of(&path).unwrap(), sha256);
        assert_eq!(Hash::named(git.hex()), Some(git));
    }

    #[test]
    fn nothing_else_is_a_hash() {
        for bad in ["", "../../x", &"g".repeat(64), &"0".repeat(41), &format!("{}/", "0".repeat(39))] {
            assert_eq!(Hash::named(bad), None, "{bad}");
        }
    }
}
