//! Repositories on the hub, downloaded into the hub's own cache, where other tools find them too.
//!
//! What is complete in the cache is used without asking the network, so that a model that once ran runs offline.

use std::{
    path::{Path, PathBuf},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use futures::StreamExt;
use hf_hub::{
    HFClient, HFError, HFRepository, RepoTypeModel,
    progress::{DownloadEvent, ProgressEvent, ProgressHandler},
    repository::RepoTreeEntry,
};
use mesh_core::{ProbeError, ProgressSink, Stage, WeightFormat};

use crate::{
    choice::{self, Choice, INDEX},
    error::FetchError,
    local,
    reference::{HubRef, plain_relative},
    store::{Artifact, Want},
};

/// Longest time to wait for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// Longest time to wait for a first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for the list of a repository's files.
const LIST_TIMEOUT: Duration = Duration::from_secs(60);
/// A download that brings nothing for so long is given up.
const STALL_TIMEOUT: Duration = Duration::from_secs(60);
/// Longest time to wait for another process that downloads the same file.
const LOCK_TIMEOUT: Duration = Duration::from_secs(60 * 60);
/// Most files of a repository that are looked at.
const FILES_MAX: usize = 20_000;
/// Files that come along with safetensors weights.
const SIDECARS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "chat_template.json",
];

/// The hub and its cache.
#[derive(Debug)]
pub(crate) struct Hub {
    client: HFClient,
    http: reqwest::Client,
}

/// What has to be in the cache for a repository to count as being there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completeness {
    /// The weights: enough where nothing can be fetched.
    Weights,
    /// Config and tokenizer, too. We fetch them before the weights; a tool that fetches single files may leave them
    /// out.
    Sidecars,
}

/// A file as the hub lists it.
#[derive(Clone, Debug)]
struct Listing {
    path: String,
    bytes: u64,
}

impl Hub {
    /// The hub of `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_CACHE`.
    pub fn from_environment() -> Result<Self, FetchError> {
        Self::new(None)
    }

    /// The hub at an endpoint with a cache directory.
    #[cfg(test)]
    pub fn at(endpoint: &str, cache: &Path) -> Result<Self, FetchError> {
        Self::new(Some((endpoint, cache)))
    }

    fn new(at: Option<(&str, &Path)>) -> Result<Self, FetchError> {
        let unusable = |error: String| FetchError::Unreachable { what: format!("it is set up wrongly: {error}") };
        let http = reqwest::Client::builder()
            .user_agent(concat!("mesh-llm/", env!("CARGO_PKG_VERSION")))
            .connect_timeout(CONNECT_TIMEOUT)
            .read_timeout(STALL_TIMEOUT)
            .build()
            .map_err(|error| unusable(error.to_string()))?;
        let mut builder = HFClient::builder().client(http.clone()).retry_max_attempts(2);
        if let Some((endpoint, cache)) = at {
            builder = builder.endpoint(endpoint).cache_dir(cache);
        }
        Ok(Self { client: builder.build().map_err(|error| unusable(error.to_string()))?, http })
    }

    /// Finds or downloads what `hub` names; `name` is what it will be served under, `reference` how the user spelled
    /// it.
    pub async fn locate(
        &self,
        hub: &HubRef,
        name: &str,
        reference: &str,
        want: Want,
        offline: bool,
        progress: &ProgressSink,
    ) -> Result<Artifact, FetchError> {
        if let Some(Ok(artifact)) = self.cached(hub, name, reference, want, Completeness::Sidecars) {
            return Ok(artifact);
        }
        if offline {
            return match self.cached(hub, name, reference, want, Completeness::Weights) {
                Some(Ok(artifact)) => Ok(artifact),
                // Ambiguity in the cache is worth more than "not there".
                Some(Err(error @ FetchError::Probe(ProbeError::Ambiguous { .. }))) => Err(error),
                _ => Err(FetchError::Offline { model: reference.to_owned() }),
            };
        }
        if let Err(error) = self.reachable().await {
            let cached = self.cached(hub, name, reference, want, Completeness::Weights);
            return cached.and_then(Result::ok).ok_or(error);
        }
        let listing = self.list(hub).await?;
        let paths: Vec<String> = listing.iter().map(|file| file.path.clone()).collect();
        let plan = Plan::new(hub, reference, &paths, want)?;
        let watch = Watch::new(progress);
        let mut root = None;
        for file in plan.sidecars.iter().chain(&plan.weights) {
            root = Some(self.download(hub, file, &listing, &watch, root).await?);
        }
        let Some(mut root) = root else {
            return Err(FetchError::NotFound { what: hub.repo.clone() });
        };
        if plan.choice == Choice::Indexed {
            let index = root.join(&plan.directory).join(INDEX);
            let shards = local::indexed(&index)?;
            for shard in shards {
                let file = plan.below(&shard);
                root = self.download(hub, &file, &listing, &watch, Some(root)).await?;
            }
        }
        local::assemble(&root.join(&plan.directory), name.to_owned(), plan.choice)
    }

    /// Repositories in the cache that hold weights: name, snapshot, format, bytes of weights.
    pub fn repositories(&self) -> Vec<(String, PathBuf, WeightFormat, u64)> {
        let mut found = Vec::new();
        let Ok(entries) = std::fs::read_dir(self.client.cache_dir()) else { return found };
        for entry in entries.flatten() {
            let folder = entry.file_name().to_string_lossy().into_owned();
            let Some(repo) = folder.strip_prefix("models--").map(|repo| repo.replace("--", "/")) else { continue };
            let Some(snapshot) = self.snapshot(&repo, None) else { continue };
            for (format, ending) in [(WeightFormat::Safetensors, ".safetensors"), (WeightFormat::Gguf, ".gguf")] {
                let files = local::files_below(&snapshot);
                let weights: Vec<_> = files.iter().filter(|file| file.ends_with(ending)).collect();
                if !weights.is_empty() {
                    let sizes = weights.iter().filter_map(|file| std::fs::metadata(snapshot.join(file)).ok());
                    let bytes = sizes.map(|metadata| metadata.len()).sum();
                    found.push((repo.clone(), snapshot.clone(), format, bytes));
                }
            }
        }
        found.sort();
        found
    }

    /// The snapshot of a revision in the cache.
    fn snapshot(&self, repo: &str, revision: Option<&str>) -> Option<PathBuf> {
        let folder = self.client.cache_dir().join(format!("models--{}", repo.replace('/', "--")));
        let revision = revision.unwrap_or("main");
        let reference = folder.join("refs").join(revision);
        // A commit names its snapshot itself; branches and tags are files that name one.
        let commit = match crate::probe::read_capped(&reference, 256) {
            Ok(Some(text)) => String::from_utf8(text).ok()?.trim().to_owned(),
            _ => revision.to_owned(),
        };
        let snapshot = folder.join("snapshots").join(&commit);
        (plain_relative(&commit) && snapshot.is_dir()).then_some(snapshot)
    }

    /// What the cache holds of it, if that is complete.
    pub fn cached(
        &self,
        hub: &HubRef,
        name: &str,
        reference: &str,
        want: Want,
        complete: Completeness,
    ) -> Option<Result<Artifact, FetchError>> {
        let snapshot = self.snapshot(&hub.repo, hub.revision.as_deref())?;
        let plan = match Plan::new(hub, reference, &local::files_below(&snapshot), want) {
            Ok(plan) => plan,
            Err(error) => return Some(Err(error)),
        };
        let root = snapshot.join(&plan.directory);
        let sidecars = ["config.json", "tokenizer.json"].iter().all(|file| root.join(file).is_file());
        let enough = sidecars || complete == Completeness::Weights || matches!(plan.choice, Choice::Gguf(_));
        let artifact = local::assemble(&root, name.to_owned(), plan.choice);
        Some(artifact).filter(|artifact| artifact.is_err() || enough)
    }

    /// Answers within seconds whether there is a hub at all.
    async fn reachable(&self) -> Result<(), FetchError> {
        let endpoint = self.client.endpoint();
        let unreachable = |why: String| FetchError::Unreachable { what: format!("{endpoint}: {why}") };
        match tokio::time::timeout(ANSWER_TIMEOUT, self.http.head(endpoint).send()).await {
            // Whatever it says about its front page, it is there.
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(unreachable(root_cause(&error))),
            Err(_) => Err(unreachable(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    }

    fn repository(&self, repo: &str) -> HFRepository<RepoTypeModel> {
        let (owner, name) = hf_hub::split_id(repo);
        self.client.model(owner, name)
    }

    /// Every file of the repository at its revision.
    async fn list(&self, hub: &HubRef) -> Result<Vec<Listing>, FetchError> {
        let repository = self.repository(&hub.repo);
        let listing = async {
            let entries =
                repository.list_tree().maybe_revision(hub.revision.clone()).recursive(true).limit(FILES_MAX).send()?;
            futures::pin_mut!(entries);
            let mut files = Vec::new();
            while let Some(entry) = entries.next().await {
                if let RepoTreeEntry::File { path, size, .. } = entry? {
                    files.push(Listing { path, bytes: size });
                }
            }
            Ok(files)
        };
        let what = hub.revision.as_ref().map_or(hub.repo.clone(), |revision| format!("{}@{revision}", hub.repo));
        let files: Vec<Listing> = match tokio::time::timeout(LIST_TIMEOUT, listing).await {
            Ok(files) => files.map_err(|error| translate(error, &hub.repo, what))?,
            Err(_) => {
                return Err(FetchError::Unreachable {
                    what: format!("no list of the files of {what} within {} s", LIST_TIMEOUT.as_secs()),
                });
            }
        };
        // Names become paths in the cache.
        Ok(files.into_iter().filter(|file| plain_relative(&file.path)).collect())
    }

    /// Downloads one file and returns its snapshot, which has to be `root` where that is given.
    async fn download(
        &self,
        hub: &HubRef,
        file: &str,
        listing: &[Listing],
        watch: &Arc<Watch>,
        root: Option<PathBuf>,
    ) -> Result<PathBuf, FetchError> {
        let what = format!("{}/{file}", hub.repo);
        let Some(listed) = listing.iter().find(|listed| listed.path == file) else {
            return Err(FetchError::NotFound { what });
        };
        let repository = self.repository(&hub.repo);
        let begun = Instant::now();
        let path = loop {
            watch.start(file, listed.bytes);
            let download = repository
                .download_file()
                .filename(file)
                .maybe_revision(hub.revision.clone())
                .progress(Arc::clone(watch))
                .send();
            let result = tokio::select! {
                result = download => result,
                () = watch.stalled() => {
                    let why = format!("nothing arrived for {} s", STALL_TIMEOUT.as_secs());
                    return Err(FetchError::Download { what, why });
                }
            };
            match result {
                Ok(path) => break path,
                // Another process is downloading this file; hf-hub itself waits for ten seconds only.
                Err(HFError::CacheLockTimeout { .. }) if begun.elapsed() < LOCK_TIMEOUT => {}
                Err(error) => return Err(translate(error, &hub.repo, what)),
            }
        };
        // hf-hub 1.0 keeps whatever body the server answers with, an error page too.
        let bytes = std::fs::metadata(&path).map_err(FetchError::io(&path))?.len();
        if bytes != listed.bytes {
            discard(&path);
            let why = format!("{bytes} bytes arrived, the hub lists {}", listed.bytes);
            return Err(FetchError::Download { what, why });
        }
        watch.finish(listed.bytes);
        let depth = file.split('/').count();
        let snapshot = path.ancestors().nth(depth).unwrap_or(Path::new("")).to_owned();
        match root {
            Some(root) if root != snapshot => {
                Err(FetchError::Download { what, why: "the repository changed meanwhile".into() })
            }
            _ => Ok(snapshot),
        }
    }
}

/// Removes a cached file that is wrong: the pointer and what it points to.
pub(crate) fn discard(pointer: &Path) {
    if let Ok(blob) = std::fs::canonicalize(pointer)
        && blob != pointer
    {
        let _ = std::fs::remove_file(blob);
    }
    let _ = std::fs::remove_file(pointer);
}

/// What has to be fetched, decided from names alone.
#[derive(Debug)]
struct Plan {
    /// Directory of the repository that holds the model; empty for the top.
    directory: String,
    choice: Choice,
    sidecars: Vec<String>,
    weights: Vec<String>,
}

impl Plan {
    fn new(hub: &HubRef, reference: &str, files: &[String], want: Want) -> Result<Self, FetchError> {
        let directory = match &hub.file {
            Some(file) => file.rsplit_once('/').map_or(String::new(), |(directory, _)| directory.to_owned()),
            None => String::new(),
        };
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let below: Vec<String> =
            files.iter().filter_map(|file| file.strip_prefix(&prefix)).map(str::to_owned).collect();
        let choice = match &hub.file {
            Some(file) => {
                let name = file.strip_prefix(&prefix).unwrap_or(file);
                named(hub, reference, name, &below, want)?
            }
            None => choice::choose(reference, &below, want, hub.quant.as_deref())?,
        };
        let mut plan = Self { directory, choice, sidecars: Vec::new(), weights: Vec::new() };
        let there = |name: &&str| below.iter().any(|file| file == name);
        match &plan.choice {
            Choice::Gguf(names) => plan.weights = names.iter().map(|name| plan.below(name)).collect(),
            Choice::Safetensors(names) => {
                plan.weights = names.iter().map(|name| plan.below(name)).collect();
                plan.sidecars = SIDECARS.iter().copied().filter(there).map(|name| plan.below(name)).collect();
            }
            Choice::Indexed => {
                let names = SIDECARS.iter().copied().chain([INDEX]).filter(there);
                plan.sidecars = names.map(|name| plan.below(name)).collect();
            }
        }
        Ok(plan)
    }

    fn below(&self, name: &str) -> String {
        if self.directory.is_empty() { name.to_owned() } else { format!("{}/{name}", self.directory) }
    }
}

/// What naming one file of a repository means.
fn named(hub: &HubRef, reference: &str, name: &str, files: &[String], want: Want) -> Result<Choice, FetchError> {
    if !files.iter().any(|file| file == name) {
        return Err(FetchError::NotFound { what: format!("{}/{}", hub.repo, hub.file.as_deref().unwrap_or(name)) });
    }
    let (has, choice) = if let Some(stem) = name.strip_suffix(".gguf") {
        let parts = match choice::shard(stem) {
            Some((stem, _, total)) => {
                let of = |file: &&String| {
                    let parts = file.strip_suffix(".gguf").and_then(choice::shard);
                    parts.is_some_and(|(other, _, parts)| other == stem && parts == total)
                };
                files.iter().filter(of).cloned().collect()
            }
            None => vec![name.to_owned()],
        };
        (WeightFormat::Gguf, choice::choose(reference, &parts, Want::Gguf, None)?)
    } else if name == INDEX {
        (WeightFormat::Safetensors, Choice::Indexed)
    } else if let Some(stem) = name.strip_suffix(".safetensors") {
        let sharded = choice::shard(stem).is_some() && files.iter().any(|file| file == INDEX);
        let choice = if sharded { Choice::Indexed } else { Choice::Safetensors(vec![name.to_owned()]) };
        (WeightFormat::Safetensors, choice)
    } else {
        return Err(FetchError::Reference {
            reference: reference.to_owned(),
            what: format!("`{name}` is neither a .gguf, nor a .safetensors, nor {INDEX}"),
        });
    };
    let wanted = match want {
        Want::Any => has,
        Want::Gguf => WeightFormat::Gguf,
        Want::Safetensors => WeightFormat::Safetensors,
    };
    if has == wanted {
        Ok(choice)
    } else {
        Err(FetchError::WrongFormat { model: reference.to_owned(), has: Some(has), wanted: Some(wanted) })
    }
}

fn translate(error: HFError, repo: &str, what: String) -> FetchError {
    let status = match &error {
        HFError::Http { context } => Some(context.status.as_u16()),
        HFError::AuthRequired { .. } => Some(401),
        HFError::Forbidden { .. } => Some(403),
        HFError::RepoNotFound { .. } | HFError::RevisionNotFound { .. } | HFError::EntryNotFound { .. } => Some(404),
        _ => None,
    };
    match (status, error) {
        // The hub answers 401 for repositories that do not exist, too.
        (Some(401 | 403), _) => FetchError::Denied { repo: repo.to_owned() },
        (Some(404), _) => FetchError::NotFound { what },
        (_, HFError::Request { source, .. }) if source.is_connect() || source.is_timeout() => {
            FetchError::Unreachable { what: root_cause(&source) }
        }
        (_, error) => FetchError::Download { what, why: error.to_string() },
    }
}

/// The innermost cause: "connection refused" rather than "error sending request".
fn root_cause(error: &dyn std::error::Error) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Passes progress on and remembers when there was some.
struct Watch {
    sink: ProgressSink,
    now: Mutex<Now>,
}

struct Now {
    stage: Stage,
    bytes: u64,
    seen: Instant,
}

impl Watch {
    fn new(sink: &ProgressSink) -> Arc<Self> {
        let now = Now { stage: Stage::Download { file: String::new() }, bytes: 0, seen: Instant::now() };
        Arc::new(Self { sink: sink.clone(), now: Mutex::new(now) })
    }

    fn with(&self, change: impl FnOnce(&mut Now)) {
        change(&mut self.now.lock().unwrap_or_else(PoisonError::into_inner));
    }

    fn start(&self, file: &str, bytes: u64) {
        let stage = Stage::Download { file: file.to_owned() };
        self.sink.report(&stage, 0, Some(bytes));
        self.with(|now| *now = Now { stage, bytes, seen: Instant::now() });
    }

    fn advance(&self, done: u64) {
        self.with(|now| {
            now.seen = Instant::now();
            // The last report is made when the file is in place.
            if done < now.bytes {
                self.sink.report(&now.stage, done, Some(now.bytes));
            }
        });
    }

    fn finish(&self, bytes: u64) {
        self.with(|now| self.sink.report(&now.stage, bytes, Some(bytes)));
    }

    /// Returns when nothing has arrived for too long.
    async fn stalled(&self) {
        loop {
            tokio::time::sleep(Duration::from_secs(1)).await;
            let mut idle = Duration::ZERO;
            self.with(|now| idle = now.seen.elapsed());
            if idle > STALL_TIMEOUT {
                return;
            }
        }
    }
}

impl ProgressHandler for Watch {
    fn on_progress(&self, event: &ProgressEvent) {
        let ProgressEvent::Download(event) = event else { return };
        match event {
            DownloadEvent::Progress { files } => files.iter().for_each(|file| self.advance(file.bytes_completed)),
            DownloadEvent::AggregateProgress { bytes_completed, .. } => self.advance(*bytes_completed),
            DownloadEvent::Start { .. } | DownloadEvent::Complete => {}
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
