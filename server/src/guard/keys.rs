//! API keys: whose they are, and a comparison that tells nothing by how long it takes.

use std::{fmt, fs, path::Path, sync::Arc};

use sha2::{Digest, Sha256};
use subtle::ConstantTimeEq;
use warp::http::{HeaderMap, header::AUTHORIZATION};

/// Most keys of a server.
pub const KEYS_MAX: usize = 1024;
/// Longest key, in bytes.
pub const KEY_BYTES_MAX: usize = 512;
/// Keys shorter than this can be guessed, in bytes.
const KEY_BYTES_SAFE: usize = 16;
/// Longest name of a key, in bytes.
const NAME_BYTES_MAX: usize = 64;
/// Longest file of keys, in bytes.
const FILE_BYTES_MAX: u64 = 1 << 20;

/// Where Anthropic's clients put their key.
const X_API_KEY: &str = "x-api-key";

/// What a key is called in the log.
pub type KeyName = Arc<str>;

/// The keys of a server, as digests: nobody who reads its memory or a dump of this reads a key.
#[derive(Clone, Default)]
pub struct Keys(Vec<Key>);

#[derive(Clone)]
struct Key {
    name: KeyName,
    digest: [u8; 32],
}

/// Keys that cannot be used. Says where, and never what the key was.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("{at}: {what}")]
    Unreadable {
        /// The file.
        at: String,
        /// Why.
        what: String,
    },
    /// An entry is none.
    #[error("{at}: {what}")]
    Malformed {
        /// The line, or the place in the list.
        at: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There is nothing in it.
    #[error("{at} holds no key")]
    Empty {
        /// The file or the variable.
        at: String,
    },
    /// There are too many.
    #[error("there are more than {KEYS_MAX} keys")]
    TooMany,
}

impl Keys {
    /// Reads a file: one key a line, `#` begins a line of comment, `name:` may stand before a key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let at = path.display().to_string();
        let unreadable = |what: String| KeyError::Unreadable { at: at.clone(), what };
        let length = fs::metadata(path).map_err(|error| unreadable(error.to_string()))?.len();
        if length > FILE_BYTES_MAX {
            return Err(unreadable(format!("the file is larger than {FILE_BYTES_MAX} bytes")));
        }
        let text = fs::read_to_string(path).map_err(|error| unreadable(error.to_string()))?;
        let lines = text.lines().enumerate().map(|(number, line)| (format!("{at}, line {}", number + 1), line.trim()));
        Self::of(lines.filter(|(_, line)| !line.starts_with('#')), &at)
    }

    /// Takes a list apart: keys with commas between them, `name:` may stand before each.
    pub fn list(text: &str, at: &str) -> Result<Self, KeyError> {
        let entries =
            text.split(',').enumerate().map(|(number, key)| (format!("{at}, key {}", number + 1), key.trim()));
        Self::of(entries, at)
    }

    fn of<'a>(entries: impl Iterator<Item = (String, &'a str)>, at: &str) -> Result<Self, KeyError> {
        let mut keys = Vec::new();
        for (at, entry) in entries.filter(|(_, entry)| !entry.is_empty()) {
            if keys.len() == KEYS_MAX {
                return Err(KeyError::TooMany);
            }
            keys.push(Key::parse(entry).map_err(|what| KeyError::Malformed { at, what })?);
        }
        if keys.is_empty() { Err(KeyError::Empty { at: at.into() }) } else { Ok(Self(keys)) }
    }

    /// These and others.
    pub fn and(mut self, others: Self) -> Result<Self, KeyError> {
        self.0.extend(others.0);
        if self.0.len() > KEYS_MAX { Err(KeyError::TooMany) } else { Ok(self) }
    }

    /// Whether there are none, and thus none is asked for.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Whose key a request brings: in `authorization: Bearer`, or in `x-api-key`.
    pub(super) fn of_request(&self, headers: &HeaderMap) -> Result<KeyName, Stranger> {
        let bearer = headers.get(AUTHORIZATION).and_then(|value| bearer(value.as_bytes()));
        let given = [bearer, headers.get(X_API_KEY).map(|value| value.as_bytes().trim_ascii())];
        let mut stranger = Stranger::Nobody;
        for key in given.into_iter().flatten().filter(|key| !key.is_empty()) {
            match self.owner(key) {
                Some(name) => return Ok(name),
                None => stranger = Stranger::Unknown,
            }
        }
        Err(stranger)
    }

    /// Compares with all keys, however early one matches.
    fn owner(&self, key: &[u8]) -> Option<KeyName> {
        let digest = digest(key);
        let matching = |known: &&Key| bool::from(known.digest.ct_eq(&digest));
        self.0.iter().filter(matching).fold(None, |found, key| found.or(Some(&key.name))).cloned()
    }
}

/// Who has no key that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stranger {
    /// There was no key.
    Nobody,
    /// There was one, which is nobody's.
    Unknown,
}

impl Key {
    fn parse(entry: &str) -> Result<Self, &'static str> {
        let (name, key) = match entry.split_once(':') {
            Some((name, key)) => (Some(name.trim()), key.trim()),
            None => (None, entry),
        };
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"._-".contains(&byte);
        if name.is_some_and(|name| !(1..=NAME_BYTES_MAX).contains(&name.len()) || !name.bytes().all(plain)) {
            return Err(
                "what stands before the first colon is the key's name: up to 64 letters, digits, `.`, `_`, `-`",
            );
        }
        if !(1..=KEY_BYTES_MAX).contains(&key.len()) || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err("a key has 1 to 512 visible ASCII characters and no spaces");
        }
        let digest = digest(key.as_bytes());
        let short = || format!("sha256:{:02x}{:02x}{:02x}{:02x}", digest[0], digest[1], digest[2], digest[3]);
        let name: KeyName = name.map_or_else(short, str::to_owned).into();
        if key.len() < KEY_BYTES_SAFE {
            tracing::warn!(key = &*name, "the key has fewer than {KEY_BYTES_SAFE} characters and may be guessed");
        }
        Ok(Self { name, digest })
    }
}

impl fmt::Debug for Keys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.0.iter().map(|key| &key.name)).finish()
    }
}

fn digest(key: &[u8]) -> [u8; 32] {
    Sha256::digest(key).into()
}

fn bearer(value: &[u8]) -> Option<&[u8]> {
    let (scheme, rest) = value.split_at_checked(7)?;
    scheme.eq_ignore_ascii_case(b"bearer ").then(|| rest.trim_ascii())
}

/// Whether others than its owner may read a file that holds a secret.
#[cfg(unix)]
pub fn is_readable_by_others(path: &Path) -> bool {
    use std::os::unix::fs::PermissionsExt;
    fs::metadata(path).is_ok_and(|metadata| metadata.permissions().mode() & 0o077 != 0)
}

/// Whether others than its owner may read a file that holds a secret. Not known here.
#[cfg(not(unix))]
pub fn is_readable_by_others(_: &Path) -> bool {
    false
}

#[cfg(test)]
mod tests {
    use warp::http::HeaderValue;

    use super::*;

    const LONG: &str = "sk-0123456789abcdef";

    fn list(text: &str) -> Result<Vec<String>, String> {
        let keys = Keys::list(text, "LIST").map_err(|error| error.to_string())?;
        Ok(keys.0.iter().map(|key| key.name.to_string()).collect())
    }

    #[test]
    fn keys_are_named_by_their_owner_or_by_their_digest() {
        let digest = "sha256:ba7816bf"; // of `abc`
        assert_eq!(list("abc, ci:abc ,"), Ok(vec![digest.into(), "ci".into()]));
        assert_eq!(list("ci:a:b"), Ok(vec!["ci".into()]), "a key with a colon has a name");
        for (text, what) in [
            ("", "LIST holds no key"),
            (" , ", "LIST holds no key"),
            (":abc", "LIST, key 1: what stands before"),
            ("abc,a b:c", "LIST, key 2: what stands before"),
            ("abc,a:", "LIST, key 2: a key has"),
            ("gehëim", "LIST, key 1: a key has"),
            (&"x".repeat(513), "LIST, key 1: a key has"),
            (&"abc,".repeat(1025), "there are more than 1024 keys"),
        ] {
            let error = list(text).unwrap_err();
            assert!(error.starts_with(what), "{text:.20}: {error}");
            assert!(!error.contains("gehëim") && !error.contains("abc"), "the key is said: {error}");
        }
    }

    #[test]
    fn a_file_holds_a_key_a_line() {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), format!("# of the team\n\nci: {LONG}\n  {LONG}#1  \n")).unwrap();
        let keys = Keys::read(file.path()).unwrap();
        assert_eq!(keys.owner(LONG.as_bytes()).as_deref(), Some("ci"));
        assert!(keys.owner(format!("{LONG}#1").as_bytes()).unwrap().starts_with("sha256:"));
        fs::write(file.path(), "ok\n# no\na b\n").unwrap();
        assert!(Keys::read(file.path()).unwrap_err().to_string().contains("line 3: a key has"));
        assert!(Keys::read(Path::new("no/such/keys")).unwrap_err().to_string().starts_with("no/such/keys: "));
    }

    #[test]
    fn nothing_shows_a_key() {
        let shown = format!("{:?}", Keys::list(&format!("ci:{LONG},{LONG}2"), "LIST").unwrap());
        assert!(shown.contains("ci") && !shown.contains("0123"), "{shown}");
    }

    #[test]
    fn requests_show_their_key_in_either_header() {
        let keys = Keys::list(&format!("ci:{LONG},{LONG}2"), "LIST").unwrap();
        let ask = |headers: &[(&'static str, &str)]| {
            let headers = headers.iter().map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap()));
            keys.of_request(&headers.collect::<HeaderMap<HeaderValue>>()).map(|name| name.to_string())
        };
        let ci = Ok("ci".to_owned());
        assert_eq!(ask(&[("authorization", &format!("Bearer {LONG}"))]), ci);
        assert_eq!(ask(&[("authorization", &format!("bEARER   {LONG} "))]), ci);
        assert_eq!(ask(&[("x-api-key", LONG)]), ci);
        assert_eq!(ask(&[("authorization", "Bearer x"), ("x-api-key", LONG)]), ci);
        assert_eq!(ask(&[]), Err(Stranger::Nobody));
        assert_eq!(ask(&[("authorization", "Bearer ")]), Err(Stranger::Nobody));
        assert_eq!(ask(&[("authorization", LONG)]), Err(Stranger::Nobody));
        assert_eq!(ask(&[("authorization", &format!("Basic {LONG}"))]), Err(Stranger::Nobody));
        for wrong in [&LONG[..LONG.len() - 1], &format!("{LONG}3"), &LONG.to_uppercase(), "ci"] {
            assert_eq!(ask(&[("x-api-key", wrong)]), Err(Stranger::Unknown), "{wrong}");
        }
    }
}
