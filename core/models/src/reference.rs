//! The one grammar of model references.
//!
//! | spelled | means |
//! |---|---|
//! | a path that exists, or anything that can only be a path | a directory, a `.gguf`, a `.safetensors` or its index |
//! | `Qwen3-4B-MLX` | a catalog entry |
//! | `org/repo[/file][@revision][:QUANT]` | a hub repository; `QUANT` picks among GGUF files |
//! | the address of a repository's page or file | the same |

use std::{
    fmt,
    path::{Path, PathBuf},
};

use percent_encoding::percent_decode_str;
use reqwest::Url;

use crate::error::FetchError;

/// Longest reference, in bytes.
const REFERENCE_BYTES_MAX: usize = 4096;
/// Longest organisation or repository name, in bytes; the hub's own limit.
const NAME_BYTES_MAX: usize = 96;

/// A repository on the hub, or something in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HubRef {
    /// `org/repo`.
    pub repo: String,
    /// File in it, with `/` between directories.
    pub file: Option<String>,
    /// Branch, tag or commit; absent means the main branch.
    pub revision: Option<String>,
    /// Quantization that picks among GGUF files, such as `Q4_K_M`.
    pub quant: Option<String>,
}

/// As it is spelled.
impl fmt::Display for HubRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.repo)?;
        for (mark, part) in [('/', &self.file), ('@', &self.revision), (':', &self.quant)] {
            if let Some(part) = part {
                write!(f, "{mark}{part}")?;
            }
        }
        Ok(())
    }
}

/// What a model reference means.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Reference {
    /// A file or directory.
    Path(PathBuf),
    /// A name to be looked up in the catalog.
    Name(String),
    /// Something on the hub.
    Hub(HubRef),
}

impl Reference {
    /// Reads a reference. `exists` tells whether a path is there: a path that is wins over every other meaning.
    pub fn parse(reference: &str, exists: impl Fn(&Path) -> bool) -> Result<Self, FetchError> {
        let refuse = |what: &str| {
            let shown: String = reference.chars().take(200).collect();
            Err(FetchError::Reference { reference: shown, what: what.to_owned() })
        };
        if reference.trim().is_empty() {
            return refuse("it is empty");
        }
        if reference.len() > REFERENCE_BYTES_MAX {
            return refuse("it is too long");
        }
        if reference.contains('\0') {
            return refuse("it holds a NUL character");
        }
        // Before paths: no file system has `https://` in its names by accident.
        if reference.starts_with("https://") || reference.starts_with("http://") {
            return match hub_address(reference) {
                Ok(hub) => Ok(Self::Hub(hub)),
                Err(what) => refuse(&what),
            };
        }
        let path = home_expanded(reference);
        if exists(&path) || only_a_path(reference) {
            return Ok(Self::Path(path));
        }
        if !reference.contains('/') {
            return Ok(Self::Name(reference.to_owned()));
        }
        match hub_shorthand(reference) {
            Ok(hub) => Ok(Self::Hub(hub)),
            Err(what) => refuse(&what),
        }
    }

    /// The reference as other machines are told: they have the hub and the catalog in common with this one, and none of its
    /// directories. Of a path that is its last part, if it has one.
    pub fn public(&self) -> Option<String> {
        match self {
            Self::Path(path) => {
                let path = path.to_string_lossy();
                let last = path.trim_end_matches(['/', '\\']).rsplit(['/', '\\']).next();
                last.filter(|last| !matches!(*last, "" | "." | ".." | "~") && !last.ends_with(':')).map(str::to_owned)
            }
            Self::Name(name) => Some(name.clone()),
            Self::Hub(hub) => Some(hub.to_string()),
        }
    }
}

/// `~/x` as the shell would have it; quoted or as `--model=~/x` the shell leaves it alone.
fn home_expanded(reference: &str) -> PathBuf {
    match (reference.strip_prefix("~/"), dirs::home_dir()) {
        (Some(rest), Some(home)) => home.join(rest),
        _ => PathBuf::from(reference),
    }
}

/// True for spellings that mean a path even if nothing is there.
fn only_a_path(reference: &str) -> bool {
    let weights = |name: &str| {
        [".gguf", ".safetensors", ".safetensors.index.json"].iter().any(|ending| name.to_lowercase().ends_with(ending))
    };
    ["/", "./", "../", "~/"].iter().any(|start| reference.starts_with(start))
        || matches!(reference, "." | ".." | "~")
        || reference.ends_with('/')
        || reference.contains('\\')
        || Path::new(reference).is_absolute()
        || (weights(reference) && reference.matches('/').count() < 2)
}

/// `org/repo[/file][@revision][:QUANT]`.
fn hub_shorthand(reference: &str) -> Result<HubRef, String> {
    let (rest, quant) = match reference.rsplit_once(':') {
        Some((rest, quant)) => (rest, Some(quant)),
        None => (reference, None),
    };
    let (path, revision) = match rest.split_once('@') {
        Some((path, revision)) => (path, Some(revision)),
        None => (rest, None),
    };
    let mut parts = path.splitn(3, '/');
    let (org, name, file) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default(), parts.next());
    hub_ref(org, name, file, revision, quant)
}

/// The address of a repository's page, of a directory in it, or of a file.
fn hub_address(address: &str) -> Result<HubRef, String> {
    let url = Url::parse(address).map_err(|error| error.to_string())?;
    let host = url.host_str().unwrap_or_default();
    let endpoint = std::env::var("HF_ENDPOINT").ok().and_then(|endpoint| Url::parse(&endpoint).ok());
    let label = host.trim_start_matches("www.").split('.').next().unwrap_or_default();
    let is_endpoint = endpoint.as_ref().is_some_and(|endpoint| endpoint.host_str() == Some(host));
    if !is_endpoint && !["huggingface", "hf"].contains(&label) {
        return Err("only addresses of the Hugging Face hub (or of HF_ENDPOINT) are understood".into());
    }
    let mut parts = Vec::new();
    for part in url.path_segments().into_iter().flatten().filter(|part| !part.is_empty()) {
        let decoded = percent_decode_str(part).decode_utf8().map_err(|_| "its path is not UTF-8".to_owned())?;
        parts.push(decoded.into_owned());
    }
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    match parts[..] {
        [org, name] | [org, name, "tree"] => hub_ref(org, name, None, None, None),
        [org, name, "tree", revision] => hub_ref(org, name, None, Some(revision), None),
        [org, name, "resolve" | "blob", revision, ref file @ ..] if !file.is_empty() => {
            hub_ref(org, name, Some(&file.join("/")), Some(revision), None)
        }
        _ => Err("the address names neither a repository nor a file in one".into()),
    }
}

fn hub_ref(
    org: &str,
    name: &str,
    file: Option<&str>,
    revision: Option<&str>,
    quant: Option<&str>,
) -> Result<HubRef, String> {
    for part in [org, name] {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if part.is_empty() || part.len() > NAME_BYTES_MAX || !part.chars().all(allowed) || part.starts_with('.') {
            return Err(format!("`{part}` cannot be the name of an organisation or repository"));
        }
        // The cache joins the two by `--`.
        if part.contains("--") || part.contains("..") {
            return Err(format!("`{part}` cannot be the name of an organisation or repository"));
        }
    }
    if let Some(file) = file
        && !plain_relative(file)
    {
        return Err(format!("`{file}` is not a file in a repository"));
    }
    if let Some(revision) = revision {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_./+".contains(c);
        if !plain_relative(revision) || !revision.chars().all(allowed) {
            return Err(format!("`{revision}` is not a revision"));
        }
    }
    if let Some(quant) = quant {
        let allowed = |c: char| c.is_ascii_alphanumeric() || "-_.".contains(c);
        if quant.is_empty() || !quant.chars().all(allowed) {
            return Err(format!("`{quant}` is not a quantization such as Q4_K_M"));
        }
        if file.is_some() {
            return Err("it names both a file and a quantization; one of them is enough".into());
        }
    }
    Ok(HubRef {
        repo: format!("{org}/{name}"),
        file: file.map(str::to_owned),
        revision: revision.map(str::to_owned),
        quant: quant.map(str::to_owned),
    })
}

/// True for a path that stays below where it is resolved: no `..`, no root, no drive, no empty part.
pub(crate) fn plain_relative(path: &str) -> bool {
    !path.is_empty()
        && path.len() <= 1024
        && !path.contains(['\\', '\0', ':'])
        && path.split('/').all(|part| !part.is_empty() && part != "." && part != "..")
}

/// A reference as it can be pasted into a shell.
pub(crate) fn quoted(reference: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./@:+~%=,".contains(c);
    if !reference.is_empty() && reference.chars().all(plain) {
        reference.to_owned()
    } else {
        format!("'{}'", reference.replace('\'', r"'\''"))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn parse(reference: &str) -> Result<Reference, FetchError> {
        Reference::parse(reference, |_| false)
    }

    fn hub(repo: &str, file: Option<&str>, revision: Option<&str>, quant: Option<&str>) -> Reference {
        Reference::Hub(HubRef {
            repo: repo.into(),
            file: file.map(Into::into),
            revision: revision.map(Into::into),
            quant: quant.map(Into::into),
        })
    }

    #[test]
    fn the_documented_spellings() {
        let repo = "mlx-community/Qwen2.5-0.5B-Instruct-4bit";
        let index = "model.safetensors.index.json";
        let cases = [
            ("Qwen3-4B-MLX", Reference::Name("Qwen3-4B-MLX".into())),
            ("LFM2-350M-MLX", Reference::Name("LFM2-350M-MLX".into())),
            (repo, hub(repo, None, None, None)),
            (&format!("{repo}/{index}"), hub(repo, Some(index), None, None)),
            ("some-org/some-repo", hub("some-org/some-repo", None, None, None)),
            ("o/r:Q4_K_M", hub("o/r", None, None, Some("Q4_K_M"))),
            ("o/r@v1.0", hub("o/r", None, Some("v1.0"), None)),
            ("o/r@refs/pr/3:Q8_0", hub("o/r", None, Some("refs/pr/3"), Some("Q8_0"))),
            ("o/r/sub/x.gguf@main", hub("o/r", Some("sub/x.gguf"), Some("main"), None)),
            ("https://huggingface.example/o/r", hub("o/r", None, None, None)),
            ("https://huggingface.example/o/r/tree/main/", hub("o/r", None, Some("main"), None)),
            ("https://hf.example/o/r/blob/main/a/x.gguf", hub("o/r", Some("a/x.gguf"), Some("main"), None)),
            (
                "https://huggingface.example/o/r/resolve/refs%2Fpr%2F1/x%20y.gguf?download=true",
                hub("o/r", Some("x y.gguf"), Some("refs/pr/1"), None),
            ),
            ("./x", Reference::Path("./x".into())),
            ("/models/custom.gguf", Reference::Path("/models/custom.gguf".into())),
            ("models/custom.gguf", Reference::Path("models/custom.gguf".into())),
            ("model.safetensors", Reference::Path("model.safetensors".into())),
            ("models/qwen/", Reference::Path("models/qwen/".into())),
        ];
        for (spelled, meant) in cases {
            assert_eq!(parse(spelled).unwrap(), meant, "{spelled}");
        }
    }

    #[test]
    fn nonsense_is_refused() {
        for spelled in [
            "",
            " ",
            "org/",
            "o//r",
            "o/r/../../x",
            "o/r/a/../b.gguf",
            "o/r@",
            "o/r@a..b/../c",
            "o/r:",
            "o/r:Q 4",
            "o/r/x.gguf:Q4_0",
            "a b/c",
            ".git/config",
            "a--b/c",
            "https://example.org/o/r",
            "https://huggingface.example/o",
            "https://huggingface.example/o/r/resolve/main",
            "https://huggingface.example/o/r/resolve/main/..%2f..%2fx",
        ] {
            let parsed = parse(spelled);
            let path = matches!(parsed, Ok(Reference::Path(_))) && spelled.ends_with('/');
            assert!(path || matches!(parsed, Err(FetchError::Reference { .. })), "{spelled}: {parsed:?}");
        }
    }

    #[test]
    fn what_exists_wins() {
        assert_eq!(Reference::parse("a/b", |_| true).unwrap(), Reference::Path("a/b".into()));
        assert_eq!(Reference::parse("Qwen3-4B-MLX", |_| true).unwrap(), Reference::Path("Qwen3-4B-MLX".into()));
    }

    #[test]
    fn home_is_expanded() {
        let Some(home) = dirs::home_dir() else { return };
        assert_eq!(parse("~/m/x.gguf").unwrap(), Reference::Path(home.join("m/x.gguf")));
    }

    #[test]
    fn others_are_told_of_the_hub_and_not_of_directories() {
        let public = |spelled: &str| parse(spelled).unwrap().public();
        for (spelled, told) in [
            ("/home/ann/models/qwen.gguf", "qwen.gguf"),
            ("../ann/qwen", "qwen"),
            ("~/secret/qwen/", "qwen"),
            ("secret/qwen.gguf", "qwen.gguf"),
            (r"C:\Users\ann\qwen.gguf", "qwen.gguf"),
            ("Qwen3-4B-MLX", "Qwen3-4B-MLX"),
            ("org/repo:Q4_K_M", "org/repo:Q4_K_M"),
            ("https://huggingface.co/org/repo/blob/main/a/x.gguf", "org/repo/a/x.gguf@main"),
        ] {
            assert_eq!(public(spelled).as_deref(), Some(told), "{spelled}");
        }
        for nameless in [".", "..", "../..", "/", r"C:\"] {
            assert_eq!(public(nameless), None, "{nameless}");
        }
        // A directory that is there is one, whatever else its name could mean.
        assert_eq!(Reference::parse("secret/qwen", |_| true).unwrap().public().as_deref(), Some("qwen"));
    }

    proptest! {
        #[test]
        fn parts_come_back(
            org in "[a-z][a-z0-9]{0,8}",
            name in "[A-Za-z][A-Za-z0-9._]{0,12}[a-z]",
            file in proptest::option::of("[a-z]{1,6}/[a-z0-9]{1,6}[.]gguf"),
            revision in proptest::option::of("[a-z0-9]{1,8}(/[a-z0-9]{1,4})?"),
            quant in proptest::option::of("[A-Z0-9]{1,4}_[A-Z0-9]{1,2}"),
        ) {
            prop_assume!(!name.contains(".."));
            let quant = if file.is_some() { None } else { quant };
            let meant = HubRef { repo: format!("{org}/{name}"), file, revision, quant };
            let spelled = meant.to_string();
            prop_assume!(!only_a_path(&spelled));
            prop_assert_eq!(parse(&spelled).unwrap(), Reference::Hub(meant));
        }

        #[test]
        fn anything_parses_or_is_refused_and_never_escapes(spelled in "\\PC{0,40}") {
            if let Ok(Reference::Hub(hub)) = parse(&spelled) {
                prop_assert!(hub.file.as_deref().is_none_or(plain_relative));
                prop_assert!(hub.revision.as_deref().is_none_or(plain_relative));
                prop_assert!(plain_relative(&hub.repo));
                prop_assert_eq!(hub.repo.matches('/').count(), 1);
            }
        }

        #[test]
        fn quoting_survives_a_shell(text in "[ -~]{1,20}") {
            let quoted = quoted(&text);
            // What a POSIX shell makes of single quotes and escaped ones.
            let back = if quoted.starts_with('\'') {
                quoted[1..quoted.len() - 1].replace(r"'\''", "'")
            } else {
                quoted
            };
            prop_assert_eq!(back, text);
        }
    }
}
