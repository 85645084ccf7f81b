//! Repositories on the hub, downloaded into the hub's own cache, where other tools find them too.
//!
//! What is complete in the cache is used without asking the network, so that a model that once ran runs offline. A branch
//! names a commit only when all that was wanted of it is there: what was interrupted never looks whole.

mod cache;
mod fetch;
mod hash;
mod kept;
mod plan;
mod watch;
mod wire;

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use futures::{StreamExt, TryStreamExt, stream};
use hf_hub::HFClient;
use mesh_core::{ProbeError, ProgressSink};

use self::{
    cache::{Cache, Folder},
    fetch::Fetch,
    plan::Plan,
    watch::Watch,
    wire::{CONNECT_TIMEOUT, Context, Listed, Listing, Patience, STALL_TIMEOUT, Wire, root_cause},
};
pub use self::{
    cache::{hash_of, revision_of},
    kept::{Checked, Freed, Verdict},
};
pub(crate) use self::{
    cache::{main_snapshot, snapshot_of, within},
    plan::Asked,
};
use crate::{
    choice::{Candidate, Choice, INDEX},
    disk,
    error::FetchError,
    gguf::{Gguf, context::BEGINNING_BYTES},
    local,
    store::Artifact,
};

/// Longest time to wait for a first answer.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for a search.
const SEARCH_TIMEOUT: Duration = Duration::from_secs(30);
/// Files that are fetched at the same time.
const PARALLEL_FILES: usize = 4;
/// First pause before a request is made again.
const FIRST_PAUSE: Duration = Duration::from_millis(500);

/// The hub and its cache.
#[derive(Debug)]
pub(crate) struct Hub {
    client: HFClient,
    wire: Wire,
    cache: Cache,
}

/// What has to be in the cache for a repository to count as being there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Completeness {
    /// The weights: enough where nothing can be fetched.
    Weights,
    /// All that would be fetched, as far as it is known: by the list of the commit's files, or, where another tool put the
    /// files there, config and tokenizer.
    Whole,
}

/// A repository that a search found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// `org/repo`.
    pub repo: String,
    /// Downloads of the last month.
    pub downloads: Option<u64>,
    /// Words that the hub knows it by.
    pub tags: Vec<String>,
}

impl Hub {
    /// The hub of `HF_ENDPOINT`, `HF_TOKEN`, `HF_HOME` and `HF_HUB_CACHE`.
    pub fn from_environment() -> Result<Self, FetchError> {
        Self::new(None, FIRST_PAUSE)
    }

    /// The hub at an endpoint with a cache directory, and little patience.
    #[cfg(test)]
    pub fn at(endpoint: &str, cache: &Path) -> Result<Self, FetchError> {
        Self::new(Some((endpoint, cache)), Duration::from_millis(5))
    }

    fn new(at: Option<(&str, &Path)>, first: Duration) -> Result<Self, FetchError> {
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
        let client = builder.build().map_err(|error| unusable(error.to_string()))?;
        let wire = Wire::new(http, client.endpoint(), Patience { first })?;
        let cache = Cache { root: client.cache_dir().to_owned() };
        Ok(Self { client, wire, cache })
    }

    /// Finds or downloads what is asked for.
    pub async fn locate(
        &self,
        asked: Asked<'_>,
        offline: bool,
        progress: &ProgressSink,
    ) -> Result<Artifact, FetchError> {
        match self.cached(asked, Completeness::Whole) {
            Some(Ok(artifact)) => return Ok(artifact),
            Some(Err(error @ FetchError::Outside { .. })) => return Err(error),
            _ => {}
        }
        if offline {
            return match self.cached(asked, Completeness::Weights) {
                Some(Ok(artifact)) => Ok(artifact),
                // Ambiguity in the cache is worth more than "not there".
                Some(Err(error @ FetchError::Probe(ProbeError::Ambiguous { .. }))) => Err(error),
                _ => Err(FetchError::Offline { model: asked.reference.to_owned() }),
            };
        }
        if let Err(error) = self.reachable().await {
            let cached = self.cached(asked, Completeness::Weights);
            return cached.and_then(Result::ok).ok_or(error);
        }
        let repo = &asked.hub.repo;
        let mut listing = self.wire.list(repo, asked.hub.revision.as_deref()).await?;
        let files = candidates(&listing);
        listing.context = self.context(asked, &listing, &files).await;
        let asked = asked.knowing(listing.context.map(|context| context.bytes));
        let mut plan = Plan::new(asked, &files)?;
        plan.complete(asked)?;
        if let Some(note) = &plan.note {
            tracing::info!("{note}");
        }
        let folder = self.cache.folder(repo);
        let commit = listing.commit.as_str();
        if plan.choice == Choice::Indexed {
            let index = plan.below(INDEX);
            self.fetch(&folder, &listing, std::slice::from_ref(&index), progress).await?;
            let shards = local::indexed(&folder.snapshot(commit).join(&index))?;
            plan.weights = shards.iter().map(|shard| plan.below(shard)).collect();
            plan.sidecars.retain(|file| *file != index);
        }
        let files = [&plan.sidecars[..], &plan.weights[..]].concat();
        self.fetch(&folder, &listing, &files, progress).await?;
        let artifact =
            local::assemble(&folder.snapshot(commit).join(&plan.directory), asked.name.to_owned(), plan.choice)?;
        folder.remember(&listing)?;
        folder.name(asked.hub.revision.as_deref(), commit)?;
        Ok(artifact)
    }

    /// What a context takes, from the beginning of a file on the hub, where that decides what is fetched.
    async fn context(&self, asked: Asked<'_>, listing: &Listing, files: &[Candidate]) -> Option<Context> {
        let (file, tokens) = (asked.telling(files)?, asked.room?.context_tokens);
        let beginning = self.wire.beginning(&asked.hub.repo, &listing.commit, &file, BEGINNING_BYTES).await;
        let known = beginning.map(|beginning| Gguf::beginning(beginning)?.context_bytes(tokens));
        match known {
            Ok(Some(bytes)) => Some(Context { tokens, bytes }),
            // It is not what was asked for; choosing goes on with what is usual.
            Ok(None) => None,
            Err(error) => {
                tracing::info!("{error}; what a context takes is not known");
                None
            }
        }
    }

    /// Puts files of a commit into its snapshot, several at a time.
    async fn fetch(
        &self,
        folder: &Folder,
        listing: &Listing,
        files: &[String],
        progress: &ProgressSink,
    ) -> Result<(), FetchError> {
        let repo = &folder.repo;
        let listed = |file: &String| {
            let listed = listing.files.iter().find(|listed| listed.path == *file);
            listed.ok_or_else(|| FetchError::Incomplete { model: repo.clone(), file: file.clone() })
        };
        let wanted: Vec<&Listed> = files.iter().map(listed).collect::<Result<_, _>>()?;
        // What is there in part is counted for what it lacks.
        let lacks = |listed: &&Listed| match fetch::whole(&folder.blob(&listed.hash), listed.bytes) {
            true => 0,
            false => {
                let partial = std::fs::metadata(folder.partial(&listed.hash)).map_or(0, |metadata| metadata.len());
                listed.bytes.saturating_sub(partial)
            }
        };
        let needed = wanted.iter().map(lacks).fold(0, u64::saturating_add);
        disk::check(repo, needed, disk::free(&self.cache.root), &self.cache.root)?;
        let bytes = wanted.iter().map(|listed| listed.bytes).fold(0, u64::saturating_add);
        let watch = Watch::new(progress, repo, wanted.len(), bytes);
        let fetch = Fetch { wire: &self.wire, folder, commit: &listing.commit, watch: &watch };
        let files: Vec<_> = wanted.into_iter().map(|listed| fetch.file(listed)).collect();
        stream::iter(files).buffer_unordered(PARALLEL_FILES).try_collect().await
    }

    /// What the cache holds of it, if that is complete.
    pub fn cached(&self, asked: Asked<'_>, complete: Completeness) -> Option<Result<Artifact, FetchError>> {
        let folder = self.cache.folder(&asked.hub.repo);
        let commit = folder.commit(asked.hub.revision.as_deref())?;
        let snapshot = folder.snapshot(&commit);
        let listing = folder.listing(&commit).filter(|_| complete == Completeness::Whole);
        let files = match &listing {
            Some(listing) => candidates(listing),
            None => on_disk(&snapshot),
        };
        let tokens = asked.room.map_or(0, |room| room.context_tokens);
        let known = listing.as_ref().and_then(|listing| listing.context).filter(|context| context.tokens == tokens);
        let asked = match (known, asked.telling(&files)) {
            (Some(context), _) => asked.knowing(Some(context.bytes)),
            (None, Some(file)) => asked.knowing(local::context_bytes(&snapshot.join(file), tokens)),
            (None, None) => asked,
        };
        let plan = match Plan::new(asked, &files) {
            Ok(plan) => plan,
            Err(error) => return Some(Err(error)),
        };
        // Another tool may have fetched the one file that it wanted.
        let sparse = listing.is_none() && complete == Completeness::Whole && plan.complete(asked).is_err();
        let mut needed = plan.weights.clone();
        if complete == Completeness::Whole {
            needed.extend(plan.sidecars.iter().cloned());
        }
        if plan.choice == Choice::Indexed {
            needed.push(plan.below(INDEX));
            let index = snapshot.join(plan.below(INDEX));
            needed.extend(local::indexed(&index).ok()?.iter().map(|shard| plan.below(shard)));
        }
        for file in needed {
            let bytes = files.iter().find(|known| known.path == file).map(|known| known.bytes);
            match folder.resolve(&commit, &file) {
                Ok(Some(path)) if bytes.is_none_or(|bytes| fetch::whole(&path, bytes)) => {}
                Ok(_) => return None,
                Err(error) => return Some(Err(error)),
            }
        }
        if sparse {
            return None;
        }
        if let Some(note) = &plan.note {
            tracing::info!("{note}");
        }
        Some(local::assemble(&snapshot.join(&plan.directory), asked.name.to_owned(), plan.choice))
    }

    /// Repositories whose names or descriptions hold the words, the most downloaded first.
    pub async fn search(&self, words: &str, limit: usize) -> Result<Vec<Found>, FetchError> {
        self.reachable().await?;
        let what = || format!("the search for `{words}`");
        let searching = async {
            let found = self.client.list_models().search(words).sort("downloads").limit(limit).send()?;
            found.try_collect::<Vec<_>>().await
        };
        let found = tokio::time::timeout(SEARCH_TIMEOUT, searching).await.map_err(|_| FetchError::Download {
            what: what(),
            why: format!("no answer within {} s", SEARCH_TIMEOUT.as_secs()),
        })?;
        let found = found.map_err(|error| FetchError::Download { what: what(), why: error.to_string() })?;
        let plain = |model: hf_hub::repository::ModelInfo| Found {
            repo: model.id,
            downloads: model.downloads,
            tags: model.tags.unwrap_or_default(),
        };
        Ok(found.into_iter().map(plain).collect())
    }

    /// Whether a directory is this hub's cache.
    pub fn is_cache(&self, root: &Path) -> bool {
        std::fs::canonicalize(&self.cache.root).is_ok_and(|cache| cache == root)
    }

    /// Answers within seconds whether there is a hub at all.
    async fn reachable(&self) -> Result<(), FetchError> {
        let endpoint = self.client.endpoint();
        let unreachable = |why: String| FetchError::Unreachable { what: format!("{endpoint}: {why}") };
        match tokio::time::timeout(ANSWER_TIMEOUT, self.wire.http.head(endpoint).send()).await {
            // Whatever it says about its front page, it is there.
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(unreachable(root_cause(&error))),
            Err(_) => Err(unreachable(format!("no answer within {} s", ANSWER_TIMEOUT.as_secs()))),
        }
    }
}

fn candidates(listing: &Listing) -> Vec<Candidate> {
    listing.files.iter().map(|file| Candidate { path: file.path.clone(), bytes: file.bytes }).collect()
}

/// The files of a snapshot.
fn on_disk(snapshot: &Path) -> Vec<Candidate> {
    let size = |path: &PathBuf| std::fs::metadata(path).map_or(0, |metadata| metadata.len());
    let files = local::files_below(snapshot).into_iter();
    files.map(|path| Candidate { bytes: size(&snapshot.join(&path)), path }).collect()
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

#[cfg(test)]
pub(crate) mod tests;
