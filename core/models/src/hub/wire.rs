//! Requests to the hub: tried again as the hub asks, refused with its reason, never with a token for somebody else.
//!
//! hf-hub's own requests do not look at `Retry-After`, and its downloads begin anew and keep whatever body comes. Here
//! are the few that a download is made of. What hf-hub knows better (search, where hub and cache are) stays with it. Its
//! Xet, chunks of a file from several places, is not used: hf-hub writes those into the blob itself, where half of one
//! looks whole. The hub gives every file in one piece, too.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use backon::{BackoffBuilder, ExponentialBuilder};
use reqwest::{
    Response, StatusCode, Url,
    header::{AUTHORIZATION, HeaderMap, LINK, RANGE, RETRY_AFTER},
};
use serde::{Deserialize, Serialize};

use super::hash::Hash;
use crate::{error::FetchError, reference::plain_relative};

/// Longest time to wait for a connection.
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// A connection that brings nothing for so long is given up.
pub(super) const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time that the hub may have us wait before we come back.
const RETRY_AFTER_MAX: Duration = Duration::from_secs(120);
/// How often a request that fails is made again, unless something arrives meanwhile.
const RETRIES: usize = 5;
/// Most files of a repository that are looked at.
const FILES_MAX: usize = 20_000;
/// Largest answer that is not a file, in bytes.
const ANSWER_BYTES_MAX: usize = 32 << 20;
/// Most of an error's text that is passed on, in characters.
const COMPLAINT_CHARS_MAX: usize = 300;

/// What of a file is wanted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Bytes {
    All,
    From(u64),
    First(usize),
}

/// A request that failed.
#[derive(Debug)]
pub(super) struct Fault {
    pub error: FetchError,
    /// Whether it is worth trying again.
    pub again: bool,
    /// When the hub wants to be asked again.
    pub after: Option<Duration>,
}

impl Fault {
    /// One that another try does not mend.
    pub fn last(error: FetchError) -> Self {
        Self { error, again: false, after: None }
    }

    /// One that another try may mend.
    pub fn passing(what: &str, why: impl std::fmt::Display) -> Self {
        let error = FetchError::Download { what: what.to_owned(), why: why.to_string() };
        Self { error, again: true, after: None }
    }
}

impl From<FetchError> for Fault {
    fn from(error: FetchError) -> Self {
        Self::last(error)
    }
}

/// Pauses between tries.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// The first pause; each next one is twice as long, up to half a minute.
    pub first: Duration,
}

impl Patience {
    /// The pauses of one request.
    pub fn pauses(self) -> Pauses {
        let policy = ExponentialBuilder::default()
            .with_min_delay(self.first)
            .with_max_delay(Duration::from_secs(30))
            .with_max_times(RETRIES)
            .with_jitter();
        Pauses { patience: self, left: policy.build() }
    }
}

/// What is left of them.
pub(super) struct Pauses {
    patience: Patience,
    left: backon::ExponentialBackoff,
}

impl Pauses {
    /// Waits for the next try, or says why there is none. Jitter only adds: what the hub asks for is the least.
    pub async fn after(&mut self, fault: Fault) -> Result<(), FetchError> {
        let Fault { error, again, after } = fault;
        if !again {
            return Err(error);
        }
        if let Some(wanted) = after.filter(|wanted| *wanted > RETRY_AFTER_MAX) {
            let FetchError::Download { what, why } = error else { return Err(error) };
            let why = format!("{why}, and it asks to come back in {} s", wanted.as_secs());
            return Err(FetchError::Download { what, why });
        }
        let Some(pause) = self.left.next() else { return Err(error) };
        let pause = pause.max(after.unwrap_or_default());
        tracing::info!("{error}; trying again in {:.1} s", pause.as_secs_f64());
        tokio::time::sleep(pause).await;
        Ok(())
    }

    /// Something arrived: what fails next is a new failure.
    pub fn renew(&mut self) {
        *self = self.patience.pauses();
    }
}

/// A file as the hub lists it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listed {
    /// Its name, with `/` between directories.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// What it has to hash to.
    pub hash: Hash,
}

/// A repository at one commit.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listing {
    /// The commit.
    pub commit: String,
    /// Its files.
    pub files: Vec<Listed>,
    /// What a context takes, where that had to be known.
    #[serde(default)]
    pub context: Option<Context>,
}

/// What a context takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Context {
    /// Its length.
    pub tokens: u64,
    /// What it takes.
    pub bytes: u64,
}

/// How the hub is spoken to.
#[derive(Debug)]
pub(super) struct Wire {
    pub http: reqwest::Client,
    endpoint: Url,
    token: Option<String>,
    pub patience: Patience,
}

impl Wire {
    pub fn new(http: reqwest::Client, endpoint: &str, patience: Patience) -> Result<Self, FetchError> {
        let endpoint = Url::parse(endpoint)
            .ok()
            .filter(|url| !url.cannot_be_a_base())
            .ok_or_else(|| FetchError::Unreachable { what: format!("HF_ENDPOINT: `{endpoint}` is no address") })?;
        Ok(Self { http, endpoint, token: token(), patience })
    }

    /// An address below the endpoint. Each part is one part of the path, whatever is in it.
    fn address(&self, parts: &[&str]) -> Url {
        let mut url = self.endpoint.clone();
        if let Ok(mut path) = url.path_segments_mut() {
            path.pop_if_empty().extend(parts);
        }
        url
    }

    /// Where a file's content is.
    pub fn file_address(&self, repo: &str, commit: &str, file: &str) -> Url {
        let mut parts: Vec<&str> = repo.split('/').collect();
        parts.extend(["resolve", commit]);
        parts.extend(file.split('/'));
        self.address(&parts)
    }

    /// One request, once, for all bytes or some of them.
    pub async fn get(&self, url: Url, bytes: Bytes, repo: &str, what: &str) -> Result<Response, Fault> {
        let mut request = self.http.get(url);
        if let Some(token) = &self.token {
            // reqwest takes it off again before it follows a redirect to another host.
            request = request.header(AUTHORIZATION, format!("Bearer {token}"));
        }
        request = match bytes {
            Bytes::All | Bytes::From(0) => request,
            Bytes::From(from) => request.header(RANGE, format!("bytes={from}-")),
            Bytes::First(count) => request.header(RANGE, format!("bytes=0-{}", count.saturating_sub(1))),
        };
        let response = request.send().await.map_err(|error| Fault {
            error: FetchError::Unreachable { what: format!("{what}: {}", root_cause(&error)) },
            again: !error.is_builder() && !error.is_redirect(),
            after: None,
        })?;
        let status = response.status();
        if status.is_success() || (bytes != Bytes::All && status == StatusCode::RANGE_NOT_SATISFIABLE) {
            return Ok(response);
        }
        Err(refusal(response, repo, what).await)
    }

    /// The beginning of a file: at most so many bytes.
    pub async fn beginning(&self, repo: &str, commit: &str, file: &str, bytes: usize) -> Result<Vec<u8>, FetchError> {
        let (what, url) = (format!("{repo}/{file}"), self.file_address(repo, commit, file));
        let mut pauses = self.patience.pauses();
        loop {
            let outcome = match self.get(url.clone(), Bytes::First(bytes), repo, &what).await {
                Ok(mut response) => first_bytes(&mut response, &what, bytes).await,
                Err(fault) => Err(fault),
            };
            match outcome {
                Ok(beginning) => return Ok(beginning),
                Err(fault) => pauses.after(fault).await?,
            }
        }
    }

    /// An answer that is not a file, with its headers; tried again where that makes sense.
    async fn answer(&self, url: Url, repo: &str, what: &str) -> Result<(HeaderMap, Vec<u8>), FetchError> {
        let mut pauses = self.patience.pauses();
        loop {
            let fault = match self.get(url.clone(), Bytes::All, repo, what).await {
                Ok(response) => {
                    let headers = response.headers().clone();
                    match body(response, what, ANSWER_BYTES_MAX).await {
                        Ok(body) => return Ok((headers, body)),
                        Err(fault) => fault,
                    }
                }
                Err(fault) => fault,
            };
            pauses.after(fault).await?;
        }
    }

    /// Every file of a repository at a revision.
    pub async fn list(&self, repo: &str, revision: Option<&str>) -> Result<Listing, FetchError> {
        let what = revision.map_or(repo.to_owned(), |revision| format!("{repo}@{revision}"));
        let malformed = |why: String| FetchError::Listing { what: what.clone(), why };
        let mut parts = vec!["api", "models"];
        parts.extend(repo.split('/'));
        let of = |rest: [&str; 2]| self.address(&[&parts[..], &rest[..]].concat());
        let (_, body) = self.answer(of(["revision", revision.unwrap_or("main")]), repo, &what).await?;
        #[derive(Deserialize)]
        struct Info {
            sha: String,
        }
        let info: Info = serde_json::from_slice(&body).map_err(|error| malformed(error.to_string()))?;
        let commit = info.sha;
        // It becomes the name of a directory.
        if commit.len() != 40 || !commit.bytes().all(|byte| byte.is_ascii_hexdigit()) {
            return Err(malformed("it names no commit".into()));
        }
        let mut next = Some(of(["tree", &commit]));
        if let Some(url) = &mut next {
            url.set_query(Some("recursive=true"));
        }
        let mut files = Vec::new();
        while let Some(url) = next.take() {
            let (headers, body) = self.answer(url, repo, &what).await?;
            let entries: Vec<Entry> = serde_json::from_slice(&body).map_err(|error| malformed(error.to_string()))?;
            let seen = files.len();
            for entry in entries {
                // Names become paths in the cache.
                if entry.kind == "file" && !plain_relative(&entry.path) {
                    let shown: String = entry.path.chars().take(200).collect();
                    return Err(malformed(format!("`{shown}` is no name of a file")));
                }
                files.extend(entry.listed());
            }
            if files.len() > FILES_MAX {
                return Err(malformed(format!("it has more than {FILES_MAX} files")));
            }
            // Pages stay at the endpoint, and each brings something: a hub that leads in circles is left.
            let link = headers.get(LINK).and_then(|value| next_page(value.to_str().ok()?));
            next = link
                .and_then(|link| self.endpoint.join(&link).ok())
                .filter(|url| url.origin() == self.endpoint.origin() && files.len() > seen);
        }
        Ok(Listing { commit, files, context: None })
    }
}

/// A line of the hub's list of files.
#[derive(Deserialize)]
struct Entry {
    #[serde(rename = "type")]
    kind: String,
    path: String,
    #[serde(default)]
    oid: String,
    #[serde(default)]
    size: u64,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    oid: String,
    size: u64,
}

impl Entry {
    /// Nothing for directories, and for files that the hub gives no hash for: what cannot be checked is not fetched.
    fn listed(self) -> Option<Listed> {
        if self.kind != "file" {
            return None;
        }
        let (hash, bytes) = match &self.lfs {
            Some(lfs) => (Hash::sha256(&lfs.oid)?, lfs.size),
            None => (Hash::git(&self.oid)?, self.size),
        };
        Some(Listed { path: self.path, bytes, hash })
    }
}

/// The first bytes of a body. Of a server without ranges the rest is left: the connection ends with the answer.
async fn first_bytes(response: &mut Response, what: &str, bytes: usize) -> Result<Vec<u8>, Fault> {
    let mut first = Vec::new();
    while first.len() < bytes {
        match response.chunk().await.map_err(|error| Fault::passing(what, root_cause(&error)))? {
            Some(chunk) => first.extend_from_slice(&chunk),
            None => break,
        }
    }
    Ok(first)
}

/// A body of at most so many bytes.
pub(super) async fn body(mut response: Response, what: &str, bytes_max: usize) -> Result<Vec<u8>, Fault> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|error| Fault::passing(what, root_cause(&error)))? {
        body.extend_from_slice(&chunk);
        if body.len() > bytes_max {
            let why = format!("the hub's answer is longer than {bytes_max} bytes");
            return Err(Fault::last(FetchError::Download { what: what.to_owned(), why }));
        }
    }
    Ok(body)
}

/// What a status other than success means.
async fn refusal(response: Response, repo: &str, what: &str) -> Fault {
    let status = response.status();
    let header = |name: &str| response.headers().get(name).and_then(|value| value.to_str().ok()).map(str::to_owned);
    let (code, message) = (header("x-error-code").unwrap_or_default(), header("x-error-message"));
    let after = header(RETRY_AFTER.as_str()).and_then(|text| retry_after(&text, SystemTime::now()));
    let repo = repo.to_owned();
    match (status.as_u16(), code.as_str()) {
        (401 | 403, "GatedRepo") => return Fault::last(FetchError::Gated { repo }),
        // The hub answers 401 for repositories that do not exist, too.
        (401 | 403, _) => return Fault::last(FetchError::Denied { repo }),
        (404, _) => return Fault::last(FetchError::NotFound { what: what.to_owned(), near: Vec::new() }),
        _ => {}
    }
    let again = status.is_server_error() || matches!(status.as_u16(), 408 | 425 | 429);
    let said = match message {
        Some(message) => message,
        None => body(response, what, 64 << 10).await.ok().and_then(|body| complaint(&body)).unwrap_or_default(),
    };
    let said: String = said.chars().filter(|c| !c.is_control()).take(COMPLAINT_CHARS_MAX).collect();
    let why = format!("the hub answers {status}{}{said}", if said.is_empty() { "" } else { ": " });
    Fault { error: FetchError::Download { what: what.to_owned(), why }, again, after }
}

/// The text of an error in JSON. Other bodies are pages for browsers.
fn complaint(body: &[u8]) -> Option<String> {
    let value: serde_json::Value = serde_json::from_slice(body).ok()?;
    value.get("error")?.as_str().map(str::to_owned)
}

/// `Retry-After`: seconds, or a date.
fn retry_after(text: &str, now: SystemTime) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(now).unwrap_or_default())
}

/// The address of the next page in a `Link` header.
fn next_page(link: &str) -> Option<String> {
    link.split(',').find_map(|one| {
        let (address, rest) = one.trim().strip_prefix('<')?.split_once('>')?;
        rest.replace(' ', "").contains("rel=\"next\"").then(|| address.to_owned())
    })
}

/// The user's token, found where the hub's own tools keep it.
fn token() -> Option<String> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.trim().is_empty());
    let yes = |value: String| ["1", "on", "yes", "true"].contains(&value.to_lowercase().as_str());
    if set("HF_HUB_DISABLE_IMPLICIT_TOKEN").is_some_and(yes) {
        return None;
    }
    let file = || set("HF_TOKEN_PATH").map_or_else(|| hf_hub::hf_home().join("token"), PathBuf::from);
    let kept = || String::from_utf8(crate::probe::read_capped(&file(), 4096).ok()??).ok();
    let token = set("HF_TOKEN").or_else(kept)?.trim().to_owned();
    // Anything else could not be sent.
    (!token.is_empty() && token.bytes().all(|byte| byte.is_ascii_graphic())).then_some(token)
}

/// The innermost cause: "connection refused" rather than "error sending request".
pub(super) fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn retry_after_is_seconds_or_a_date() {
        let now = httpdate::parse_http_date("Sun, 06 Nov 1994 08:49:37 GMT").unwrap();
        assert_eq!(retry_after(" 7 ", now), Some(Duration::from_secs(7)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:50:07 GMT", now), Some(Duration::from_secs(30)));
        assert_eq!(retry_after("Sun, 06 Nov 1994 08:00:00 GMT", now), Some(Duration::ZERO));
        assert_eq!(retry_after("soon", now), None);
    }

    #[test]
    fn pages_are_linked() {
        let link = r#"<https://hub.example/a?cursor=1>; rel="prev", <https://hub.example/a?cursor=2>; rel="next""#;
        assert_eq!(next_page(link).as_deref(), Some("https://hub.example/a?cursor=2"));
        assert_eq!(next_page(r#"<https://hub.example/a>; rel="last""#), None);
        assert_eq!(next_page(""), None);
    }

    #[test]
    fn a_file_without_a_hash_is_no_file() {
        let entry = |text: &str| serde_json::from_str::<Entry>(text).unwrap().listed();
        assert!(entry(r#"{"type": "file", "path": "x", "oid": "0", "size": 1}"#).is_none());
        assert!(entry(r#"{"type": "directory", "path": "x", "oid": "0"}"#).is_none());
        let oid = "0123456789abcdef0123456789abcdef01234567";
        let plain = entry(&format!(r#"{{"type": "file", "path": "x", "oid": "{oid}", "size": 1}}"#)).unwrap();
        assert_eq!(plain.bytes, 1);
        let upward = format!(
            r#"{{"type": "file", "path": "x", "oid": "{oid}", "size": 9, "lfs": {{"oid": "../{}", "size": 1}}}}"#,
            "0".repeat(61)
        );
        assert!(entry(&upward).is_none());
    }

    #[tokio::test]
    async fn the_hub_is_not_waited_for_longer_than_people_do() {
        let fault = Fault { after: Some(Duration::from_secs(3600)), ..Fault::passing("o/r", "the hub answers 429") };
        let mut pauses = Patience { first: Duration::from_millis(1) }.pauses();
        let error = pauses.after(fault).await.unwrap_err().to_string();
        assert!(error.ends_with("the hub answers 429, and it asks to come back in 3600 s"), "{error}");
        for _ in 0..RETRIES {
            pauses.after(Fault::passing("o/r", "cut")).await.unwrap();
        }
        assert!(pauses.after(Fault::passing("o/r", "cut")).await.is_err());
    }
}
