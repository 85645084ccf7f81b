//! A stand-in for the hub that speaks its protocol as far as downloads need it: lists in pages, redirects of large files to
//! another host, ranges, hashes in headers, refusals with their codes; and whatever trouble a test asks for.
//!
//! Every connection is answered once and closed.

use std::{
    collections::{BTreeMap, VecDeque},
    io::{BufRead, BufReader, Read, Write},
    net::{TcpListener, TcpStream},
    path::Path,
    sync::{Arc, Condvar, Mutex, MutexGuard},
    time::Duration,
};

use serde_json::json;
use sha2::Digest;

/// Longest time that a paused answer waits to be released.
const PAUSE_MAX: Duration = Duration::from_secs(60);
/// A token that opens gated repositories.
pub const TOKEN: &str = "hf_stand_in";

/// What goes wrong with the next answer about something.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Trouble {
    /// A status, and in how many seconds to come back.
    Status(u16, Option<u64>),
    /// The connection ends after so many bytes of the body.
    Cut(usize),
    /// So many bytes of the body come, and the rest when the test says so.
    Pause(usize),
    /// The last byte is another one.
    Corrupt,
    /// The body is longer than it should be, and nothing says how long.
    Longer,
    /// The whole body comes, whatever range was asked for.
    NoRanges,
}

/// A request that was answered.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Request {
    /// `GET` or `HEAD`.
    pub method: String,
    /// Path and query.
    pub target: String,
    /// The first byte that was asked for.
    pub from: Option<usize>,
    /// Whether a token came along.
    pub token: bool,
    /// Whether it went to the host of large files.
    pub large: bool,
}

#[derive(Default)]
struct Repo {
    /// Contents by commit, oldest first; the last is `main`.
    commits: Vec<(String, BTreeMap<String, Vec<u8>>)>,
    gated: bool,
}

#[derive(Default)]
struct State {
    repos: BTreeMap<String, Repo>,
    trouble: BTreeMap<String, VecDeque<Trouble>>,
    requests: Vec<Request>,
    page: usize,
    paused: usize,
    released: usize,
}

struct Shared {
    state: Mutex<State>,
    changed: Condvar,
    large: String,
    endpoint: String,
}

impl Shared {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

/// The stand-in. It answers until the process ends.
pub struct Hub {
    /// What to set `HF_ENDPOINT` to.
    pub endpoint: String,
    shared: Arc<Shared>,
}

impl Hub {
    /// Starts one without repositories.
    pub fn start() -> Self {
        let listen = || TcpListener::bind("127.0.0.1:0").unwrap();
        let (front, large) = (listen(), listen());
        let address = |listener: &TcpListener| format!("http://{}", listener.local_addr().unwrap());
        let endpoint = address(&front);
        let state = State { page: 1000, ..State::default() };
        let shared = Arc::new(Shared {
            state: Mutex::new(state),
            changed: Condvar::new(),
            large: address(&large),
            endpoint: endpoint.clone(),
        });
        for (listener, is_large) in [(front, false), (large, true)] {
            let shared = shared.clone();
            std::thread::spawn(move || {
                for stream in listener.incoming().flatten() {
                    let shared = shared.clone();
                    // A client that leaves is no failure of ours.
                    std::thread::spawn(move || drop(answer(stream, &shared, is_large)));
                }
            });
        }
        Self { endpoint, shared }
    }

    /// The same with one repository.
    pub fn with(repo: &str, files: &[(&str, &[u8])]) -> Self {
        let hub = Self::start();
        hub.put(repo, files);
        hub
    }

    /// Makes these the files of a repository: a new commit if there are some already. Returns the commit.
    pub fn put(&self, repo: &str, files: &[(&str, &[u8])]) -> String {
        let files = files.iter().map(|(name, content)| ((*name).to_owned(), content.to_vec())).collect();
        self.put_owned(repo, files)
    }

    /// The same with the files of a directory, without some.
    pub fn put_directory(&self, repo: &str, directory: &Path, without: &[&str]) -> String {
        let mut files = BTreeMap::new();
        for entry in std::fs::read_dir(directory).unwrap().flatten() {
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.path().is_file() && !without.contains(&name.as_str()) {
                files.insert(name, std::fs::read(entry.path()).unwrap());
            }
        }
        self.put_owned(repo, files)
    }

    fn put_owned(&self, repo: &str, files: BTreeMap<String, Vec<u8>>) -> String {
        let mut names = sha1::Sha1::new();
        for (name, content) in &files {
            names.update(format!("{name} {}\n", git_hash(content)));
        }
        let commit = hex(&names.finalize());
        let mut state = self.shared.state();
        state.repos.entry(repo.to_owned()).or_default().commits.push((commit.clone(), files));
        commit
    }

    /// Lets only those have files of a repository who bring the token.
    pub fn gate(&self, repo: &str) {
        self.shared.state().repos.entry(repo.to_owned()).or_default().gated = true;
    }

    /// How many files of a list come at once.
    pub fn page(&self, files: usize) {
        self.shared.state().page = files;
    }

    /// Lets the next answer about something go wrong: `org/repo/file` for a file's content, `org/repo` for the list of
    /// files, `search`. Several happen one after the other.
    pub fn trouble(&self, what: &str, trouble: Trouble) {
        self.shared.state().trouble.entry(what.to_owned()).or_default().push_back(trouble);
    }

    /// Every request so far.
    pub fn requests(&self) -> Vec<Request> {
        self.shared.state().requests.clone()
    }

    /// The requests for a file's content, as the host that has it saw them: the first byte of each.
    pub fn fetched(&self, file: &str) -> Vec<usize> {
        let state = self.shared.state();
        let of = |request: &&Request| {
            let path = request.target.split('?').next().unwrap_or_default();
            request.method == "GET" && path.ends_with(&format!("/{file}")) && (request.large || !is_large(file))
        };
        state.requests.iter().filter(of).map(|request| request.from.unwrap_or(0)).collect()
    }

    /// Waits until so many answers have been paused in all.
    pub fn wait_for_pauses(&self, count: usize) {
        let state = self.shared.state();
        let waited = self.shared.changed.wait_timeout_while(state, PAUSE_MAX, |state| state.paused < count).unwrap();
        assert!(!waited.1.timed_out(), "nothing was paused");
    }

    /// Lets everything that is paused go on.
    pub fn release(&self) {
        let mut state = self.shared.state();
        state.released = state.paused;
        self.shared.changed.notify_all();
    }
}

/// Large files are those that a hub keeps apart from git.
fn is_large(file: &str) -> bool {
    [".safetensors", ".gguf", "tokenizer.json", ".bin"].iter().any(|ending| file.ends_with(ending))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What git calls a file.
pub fn git_hash(content: &[u8]) -> String {
    let mut hash = sha1::Sha1::new();
    hash.update(format!("blob {}\0", content.len()));
    hash.update(content);
    hex(&hash.finalize())
}

/// The SHA-256 of a file.
pub fn sha256(content: &[u8]) -> String {
    hex(&sha2::Sha256::digest(content))
}

/// A head and a body.
struct Answer {
    status: u16,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    trouble: Option<Trouble>,
}

impl Answer {
    fn new(status: u16, body: impl Into<Vec<u8>>) -> Self {
        Self { status, headers: Vec::new(), body: body.into(), trouble: None }
    }

    fn header(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn refusal(status: u16, code: &str, message: &str) -> Self {
        let answer = Self::new(status, json!({ "error": message }).to_string()).header("X-Error-Message", message);
        if code.is_empty() { answer } else { answer.header("X-Error-Code", code) }
    }
}

fn decoded(part: &str) -> String {
    let mut out = Vec::new();
    let bytes = part.as_bytes();
    let mut at = 0;
    while at < bytes.len() {
        let code = part.get(at + 1..at + 3).and_then(|digits| u8::from_str_radix(digits, 16).ok());
        match (bytes[at], code) {
            (b'%', Some(code)) => {
                out.push(code);
                at += 3;
            }
            (byte, _) => {
                out.push(byte);
                at += 1;
            }
        }
    }
    String::from_utf8_lossy(&out).into_owned()
}

fn answer(stream: TcpStream, shared: &Shared, large: bool) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let (mut from, mut to, mut token) = (None, None, None);
    loop {
        let mut header = String::new();
        if reader.read_line(&mut header)? <= 2 {
            break;
        }
        let Some((name, value)) = header.trim_end().split_once(": ") else { continue };
        match name.to_lowercase().as_str() {
            "range" => {
                let range = value.strip_prefix("bytes=").and_then(|range| range.split_once('-'));
                (from, to) = range.map_or((None, None), |(from, to)| (from.parse().ok(), to.parse().ok()));
            }
            "authorization" => token = Some(value.to_owned()),
            _ => {}
        }
    }
    let mut words = line.split_whitespace();
    let (method, target) = (words.next().unwrap_or_default().to_owned(), words.next().unwrap_or_default().to_owned());
    let request = Request { method: method.clone(), target: target.clone(), from, token: token.is_some(), large };
    let answer = {
        let mut state = shared.state();
        state.requests.push(request);
        let open = token.is_some_and(|token| token == format!("Bearer {TOKEN}"));
        route(&mut state, shared, &target, large, open, method == "GET")
    };
    send(stream, shared, answer, from.map(|from| (from, to)), &method)
}

/// The trouble that is next for something, if it is of the kind that this step can make.
fn next_trouble(state: &mut State, what: &str, status: bool) -> Option<Trouble> {
    let queue = state.trouble.get_mut(what)?;
    let fits = matches!(queue.front()?, Trouble::Status(..)) == status;
    if fits { queue.pop_front() } else { None }
}

fn refused(trouble: Trouble) -> Answer {
    let Trouble::Status(status, after) = trouble else { unreachable!("only a status is a refusal") };
    let answer = Answer::new(status, "<html>come back later</html>");
    match after {
        Some(seconds) => answer.header("Retry-After", seconds.to_string()),
        None => answer,
    }
}

fn route(state: &mut State, shared: &Shared, target: &str, large: bool, open: bool, gets: bool) -> Answer {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let parts: Vec<String> = path.split('/').filter(|part| !part.is_empty()).map(decoded).collect();
    let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
    let value = |name: &str| query.split('&').find_map(|pair| pair.strip_prefix(name)?.strip_prefix('=')).map(decoded);
    match parts[..] {
        [] => Answer::new(200, "<html>a hub</html>"),
        ["api", "models"] => {
            if let Some(trouble) = next_trouble(state, "search", true) {
                return refused(trouble);
            }
            let words = value("search").unwrap_or_default().replace('+', " ").to_lowercase();
            let hits =
                state.repos.keys().filter(|repo| words.split(' ').all(|word| repo.to_lowercase().contains(word)));
            let hits: Vec<_> = hits
                .map(|repo| json!({ "_id": "0", "id": repo, "downloads": 7, "tags": ["text-generation"] }))
                .collect();
            Answer::new(200, json!(hits).to_string()).header("Content-Type", "application/json")
        }
        ["api", "models", org, name, kind @ ("revision" | "tree"), revision] => {
            let repo = format!("{org}/{name}");
            if let Some(trouble) = next_trouble(state, &repo, true) {
                return refused(trouble);
            }
            let page = state.page;
            match found(state, &repo, revision) {
                Err(refusal) => refusal,
                Ok((commit, _)) if kind == "revision" => {
                    Answer::new(200, json!({ "_id": "0", "id": repo, "sha": commit, "private": false }).to_string())
                }
                Ok((commit, files)) => {
                    let begin: usize = value("cursor").and_then(|cursor| cursor.parse().ok()).unwrap_or(0);
                    let entries: Vec<_> = files.iter().skip(begin).take(page).map(entry).collect();
                    let answer = Answer::new(200, json!(entries).to_string());
                    if begin + page >= files.len() {
                        return answer;
                    }
                    let rest = format!("api/models/{repo}/tree/{commit}?recursive=true&cursor={}", begin + page);
                    answer.header("Link", format!("<{}/{rest}>; rel=\"next\"", shared.endpoint))
                }
            }
        }
        ["lfs", org, name, commit, ref file @ ..] if large => {
            let (repo, file) = (format!("{org}/{name}"), file.join("/"));
            let content = found(state, &repo, commit).ok().and_then(|(_, files)| files.get(&file).cloned());
            match content {
                Some(content) => {
                    let etag = format!("\"{}\"", sha256(&content));
                    let trouble = gets.then(|| next_trouble(state, &format!("{repo}/{file}"), false)).flatten();
                    Answer { trouble, ..Answer::new(200, content) }
                        .header("ETag", etag)
                        .header("Accept-Ranges", "bytes")
                }
                None => Answer::new(404, "<html>no such file</html>"),
            }
        }
        [org, name, "resolve", revision, ref file @ ..] if !large && !file.is_empty() => {
            let (repo, file) = (format!("{org}/{name}"), file.join("/"));
            let what = format!("{repo}/{file}");
            if let Some(trouble) = gets.then(|| next_trouble(state, &what, true)).flatten() {
                return refused(trouble);
            }
            let gated = state.repos.get(&repo).is_some_and(|repo| repo.gated);
            if gated && !open {
                return Answer::refusal(401, "GatedRepo", "Access to this model is restricted.");
            }
            let (commit, content) = match found(state, &repo, revision) {
                Err(refusal) => return refusal,
                Ok((commit, files)) => match files.get(&file) {
                    Some(content) => (commit.to_owned(), content.clone()),
                    None => return Answer::refusal(404, "EntryNotFound", "Entry not found"),
                },
            };
            if is_large(&file) {
                let address = format!("{}/lfs/{repo}/{commit}/{file}", shared.large);
                return Answer::new(302, format!("Found. Redirecting to {address}"))
                    .header("Location", address)
                    .header("X-Repo-Commit", commit)
                    .header("X-Linked-Size", content.len().to_string())
                    .header("X-Linked-Etag", format!("\"{}\"", sha256(&content)));
            }
            let trouble = gets.then(|| next_trouble(state, &what, false)).flatten();
            let etag = format!("\"{}\"", git_hash(&content));
            let answer = Answer { trouble, ..Answer::new(200, content) };
            answer.header("ETag", etag).header("X-Repo-Commit", commit).header("Accept-Ranges", "bytes")
        }
        _ => Answer::refusal(404, "", "Not found"),
    }
}

/// A repository's files at a revision, or what a hub says to those who bring no token of theirs.
fn found<'a>(state: &'a State, repo: &str, revision: &str) -> Result<(&'a str, &'a BTreeMap<String, Vec<u8>>), Answer> {
    let Some(repo) = state.repos.get(repo).filter(|repo| !repo.commits.is_empty()) else {
        return Err(Answer::refusal(401, "RepoNotFound", "Repository not found"));
    };
    let commit = match revision {
        "main" => repo.commits.last(),
        _ => repo.commits.iter().rev().find(|(commit, _)| commit == revision),
    };
    commit
        .map(|(commit, files)| (commit.as_str(), files))
        .ok_or_else(|| Answer::refusal(404, "RevisionNotFound", "Revision not found"))
}

/// A line of a list of files. Of a large one git has a pointer.
fn entry((path, content): (&String, &Vec<u8>)) -> serde_json::Value {
    if !is_large(path) {
        return json!({ "type": "file", "oid": git_hash(content), "size": content.len(), "path": path });
    }
    let sha256 = sha256(content);
    let pointer = format!("version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {}\n", content.len());
    let lfs = json!({ "oid": sha256, "size": content.len(), "pointerSize": pointer.len() });
    json!({
        "type": "file", "oid": git_hash(pointer.as_bytes()), "size": content.len(), "path": path, "lfs": lfs,
    })
}

fn send(
    mut stream: TcpStream,
    shared: &Shared,
    mut answer: Answer,
    range: Option<(usize, Option<usize>)>,
    method: &str,
) -> std::io::Result<()> {
    let whole = answer.body.len();
    let ranged = answer.headers.iter().any(|(name, _)| *name == "Accept-Ranges");
    if let Some((from, to)) =
        range.filter(|_| ranged && answer.status == 200 && answer.trouble != Some(Trouble::NoRanges))
    {
        if from >= whole {
            answer = Answer::new(416, "").header("Content-Range", format!("bytes */{whole}"));
        } else {
            answer.status = 206;
            let last = to.unwrap_or(whole).min(whole - 1);
            answer.body = answer.body.get(from..=last).unwrap_or_default().to_vec();
            answer = answer.header("Content-Range", format!("bytes {from}-{last}/{whole}"));
        }
    }
    let mut body = std::mem::take(&mut answer.body);
    match answer.trouble {
        Some(Trouble::Corrupt) => {
            if let Some(last) = body.last_mut() {
                *last ^= 1;
            }
        }
        Some(Trouble::Longer) => body.extend_from_slice(b"<html>and more</html>"),
        _ => {}
    }
    write!(stream, "HTTP/1.1 {} Answer\r\nConnection: close\r\n", answer.status)?;
    for (name, value) in &answer.headers {
        write!(stream, "{name}: {value}\r\n")?;
    }
    if answer.trouble != Some(Trouble::Longer) {
        write!(stream, "Content-Length: {}\r\n", body.len())?;
    }
    stream.write_all(b"\r\n")?;
    if method == "HEAD" {
        return stream.flush();
    }
    let (first, rest) = match answer.trouble {
        Some(Trouble::Cut(bytes) | Trouble::Pause(bytes)) => body.split_at(bytes.min(body.len())),
        _ => (&body[..], &[][..]),
    };
    stream.write_all(first)?;
    stream.flush()?;
    if let Some(Trouble::Pause(_)) = answer.trouble {
        let mut state = shared.state();
        state.paused += 1;
        let place = state.paused;
        shared.changed.notify_all();
        let waited = shared.changed.wait_timeout_while(state, PAUSE_MAX, |state| state.released < place);
        drop(waited);
        stream.write_all(rest)?;
    }
    stream.flush()?;
    // What the client still says is read, so that the connection ends in order and nothing on its way is lost.
    stream.shutdown(std::net::Shutdown::Write)?;
    stream.set_read_timeout(Some(Duration::from_secs(1)))?;
    let mut left = [0; 256];
    while stream.read(&mut left).is_ok_and(|read| read > 0) {}
    Ok(())
}
