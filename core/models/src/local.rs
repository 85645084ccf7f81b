//! Models that lie on disk: which files are the weights, and are they all there.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use mesh_core::{ProbeError, WeightFormat};

use crate::{
    choice::{self, Candidate, Choice, INDEX, Room, Wish},
    error::FetchError,
    gguf::{Gguf, context::BEGINNING_BYTES},
    hub::{self, snapshot_of, within},
    store::{Artifact, Want},
};

/// Most files of a directory that are looked at.
const FILES_MAX: usize = 100_000;
/// Largest index file, in bytes. Kimi K2's has 15 MB.
const INDEX_BYTES_MAX: u64 = 48 << 20;

/// The model at `path`, which the user spelled `reference`.
pub(crate) fn locate(path: &Path, reference: &str, want: Want) -> Result<Artifact, FetchError> {
    locate_fitting(path, reference, want, None)
}

/// The same on a machine that has so much room, where the directory holds several quantizations.
pub(crate) fn locate_fitting(
    path: &Path,
    reference: &str,
    want: Want,
    room: Option<Room>,
) -> Result<Artifact, FetchError> {
    // A repository's folder in a hub's cache stands for its main branch.
    let snapshot = hub::main_snapshot(path);
    let path = snapshot.as_deref().unwrap_or(path);
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ProbeError::Missing { path: path.to_owned() },
        _ => ProbeError::Io { path: path.to_owned(), source },
    })?;
    if metadata.is_dir() {
        let files = files(path)?;
        fenced(path, files.iter().map(|file| file.path.as_str()))?;
        let wish = Wish { reference, want, quant: None, room };
        let known = choice::telling(wish, &files)
            .and_then(|file| context_bytes(&path.join(file), room.map_or(0, |room| room.context_tokens)));
        let room = room.map(|room| Room { context_bytes: known.unwrap_or(room.context_bytes), ..room });
        let (choice, note) = choice::choose(Wish { room, ..wish }, &files)?;
        if let Some(note) = note {
            tracing::info!("{note}");
        }
        return assemble(path, directory_name(path), choice);
    }
    let root = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    fenced(root, files(root)?.iter().map(|file| file.path.as_str()))?;
    let choice = one_file(path, root, &name)?;
    let has = match &choice {
        Choice::Gguf(_) => WeightFormat::Gguf,
        _ => WeightFormat::Safetensors,
    };
    let wanted = match want {
        Want::Any => has,
        Want::Gguf => WeightFormat::Gguf,
        Want::Safetensors => WeightFormat::Safetensors,
    };
    if has != wanted {
        return Err(FetchError::WrongFormat { model: reference.to_owned(), has: Some(has), wanted: Some(wanted) });
    }
    // A GGUF is named after its file, unless that is called `model` like every other.
    let stem = name.strip_suffix(".gguf").unwrap_or(&name);
    let stem = choice::shard(stem).map_or(stem, |(stem, ..)| stem);
    let served = if has == WeightFormat::Gguf && stem != "model" { stem.to_owned() } else { directory_name(root) };
    assemble(root, served, choice)
}

/// What a context of so many tokens takes, by a GGUF's header.
pub(crate) fn context_bytes(gguf: &Path, tokens: u64) -> Option<u64> {
    let mut beginning = Vec::new();
    let file = fs::File::open(gguf).ok()?;
    file.take(BEGINNING_BYTES as u64).read_to_end(&mut beginning).ok()?;
    Gguf::beginning(beginning)?.context_bytes(tokens)
}

/// What naming one file means: a GGUF with its shards, a safetensors file, or an index with its shards.
fn one_file(path: &Path, root: &Path, name: &str) -> Result<Choice, FetchError> {
    if name.ends_with(".safetensors.index.json") {
        if name != INDEX {
            let what = format!("only {INDEX} is understood as an index");
            return Err(ProbeError::Malformed { path: path.to_owned(), what }.into());
        }
        return Ok(Choice::Indexed);
    }
    if let Some(stem) = name.strip_suffix(".safetensors") {
        let sharded = choice::shard(stem).is_some() && root.join(INDEX).is_file();
        return Ok(if sharded { Choice::Indexed } else { Choice::Safetensors(vec![name.to_owned()]) });
    }
    let mut magic = [0; 4];
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let mut file = fs::File::open(path).map_err(io)?;
    let is_gguf = file.read_exact(&mut magic).is_ok() && &magic == b"GGUF";
    if !is_gguf && !name.to_lowercase().ends_with(".gguf") {
        let what = "neither a GGUF, nor a .safetensors file, nor an index of some".to_owned();
        return Err(ProbeError::Malformed { path: path.to_owned(), what }.into());
    }
    let Some((stem, _, total)) = name.strip_suffix(".gguf").and_then(choice::shard) else {
        return Ok(Choice::Gguf(vec![name.to_owned()]));
    };
    if total as usize > choice::SHARDS_MAX {
        let what = format!("its name claims {total} parts; at most {} are read", choice::SHARDS_MAX);
        return Err(ProbeError::Malformed { path: path.to_owned(), what }.into());
    }
    Ok(Choice::Gguf((1..=total).map(|number| format!("{stem}-{number:05}-of-{total:05}.gguf")).collect()))
}

/// The artifact that a choice among the files of `root` makes; every file has to be there.
pub(crate) fn assemble(root: &Path, name: String, choice: Choice) -> Result<Artifact, FetchError> {
    let (format, files) = match choice {
        Choice::Gguf(files) => (WeightFormat::Gguf, files),
        Choice::Safetensors(files) => (WeightFormat::Safetensors, files),
        Choice::Indexed => (WeightFormat::Safetensors, indexed(&root.join(INDEX))?),
    };
    // Absolute, so that the artifact means the same wherever it is used.
    let root = std::path::absolute(root).map_err(FetchError::io(root))?;
    let mut weights = Vec::new();
    for file in files {
        let path = root.join(&file);
        if !path.is_file() {
            return Err(ProbeError::MissingFile { root, file }.into());
        }
        weights.push(path);
    }
    Ok(Artifact { name, root, weights, format })
}

/// The shards that an index file names.
pub(crate) fn indexed(path: &Path) -> Result<Vec<String>, FetchError> {
    let bytes = crate::probe::read_capped(path, INDEX_BYTES_MAX)?
        .ok_or_else(|| ProbeError::Missing { path: path.to_owned() })?;
    choice::index_shards(&bytes).map_err(|what| ProbeError::Malformed { path: path.to_owned(), what }.into())
}

/// The files directly in a directory.
fn files(root: &Path) -> Result<Vec<Candidate>, FetchError> {
    let mut files = Vec::new();
    for entry in fs::read_dir(root).map_err(FetchError::io(root))?.take(FILES_MAX) {
        let entry = entry.map_err(FetchError::io(root))?;
        // Follows links: hub snapshots consist of them.
        if let Ok(metadata) = fs::metadata(entry.path())
            && metadata.is_file()
        {
            files.push(Candidate { path: entry.file_name().to_string_lossy().into_owned(), bytes: metadata.len() });
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// In a snapshot of a hub's cache links lead to blobs of that cache. One that leads elsewhere is refused: whoever made the
/// snapshot does not choose what is read. Links in a user's own directory are the user's.
fn fenced<'a>(root: &Path, files: impl Iterator<Item = &'a str>) -> Result<(), FetchError> {
    let absolute = std::path::absolute(root).map_err(FetchError::io(root))?;
    let real = fs::canonicalize(root).map_err(FetchError::io(root))?;
    let Some((cache, ..)) = snapshot_of(&absolute).or_else(|| snapshot_of(&real)) else { return Ok(()) };
    for file in files {
        let path = root.join(file);
        let target = fs::canonicalize(&path).map_err(FetchError::io(&path))?;
        if !within(&target, &cache) {
            return Err(FetchError::Outside { path, target });
        }
    }
    Ok(())
}

/// The names of all files below a directory, with `/` between directories.
pub(crate) fn files_below(root: &Path) -> Vec<String> {
    const DEPTH_MAX: usize = 8;
    fn walk(directory: &Path, prefix: &str, depth: usize, names: &mut Vec<String>) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            if names.len() >= FILES_MAX {
                return;
            }
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth < DEPTH_MAX => {
                    walk(&entry.path(), &format!("{name}/"), depth + 1, names);
                }
                Ok(_) if entry.path().is_file() => names.push(name),
                _ => {}
            }
        }
    }
    let mut names = Vec::new();
    walk(root, "", 0, &mut names);
    names.sort();
    names
}

/// The directory's own name; for a hub snapshot, which is named after a commit, the repository's.
fn directory_name(root: &Path) -> String {
    let root = fs::canonicalize(root).unwrap_or_else(|_| PathBuf::from(root));
    let names: Vec<_> = root.iter().map(|part| part.to_string_lossy()).collect();
    if let [.., repo, snapshots, _] = &names[..]
        && snapshots == "snapshots"
        && let Some(repo) = repo.strip_prefix("models--")
    {
        return repo.replace("--", "/");
    }
    root.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::tiny_llama;

    fn directory(files: &[(&str, &str)]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = root.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        root
    }

    #[test]
    fn shards_come_from_the_index_and_have_to_be_there() {
        let index =
            r#"{"weight_map": {"a": "model-00002-of-00002.safetensors", "b": "model-00001-of-00002.safetensors"}}"#;
        let root = directory(&[(INDEX, index), ("model-00001-of-00002.safetensors", "")]);
        let error = locate(root.path(), "x", Want::Any).unwrap_err();
        assert!(error.to_string().contains("model-00002-of-00002.safetensors"), "{error}");
        fs::write(root.path().join("model-00002-of-00002.safetensors"), "").unwrap();
        for named in ["", INDEX, "model-00002-of-00002.safetensors"] {
            let artifact = locate(&root.path().join(named), "x", Want::Safetensors).unwrap();
            assert_eq!(artifact.weights.len(), 2, "{named}");
            assert!(artifact.weights[0].ends_with("model-00001-of-00002.safetensors"));
        }
    }

    #[test]
    fn single_files_mean_themselves() {
        let root =
            directory(&[("custom.gguf", "GGUF"), ("model.safetensors", ""), ("blob", "GGUF"), ("notes.txt", "hi")]);
        let at = |name: &str, want| locate(&root.path().join(name), name, want);
        let artifact = at("custom.gguf", Want::Gguf).unwrap();
        assert_eq!((artifact.name.as_str(), artifact.format), ("custom", WeightFormat::Gguf));
        assert_eq!(at("blob", Want::Any).unwrap().format, WeightFormat::Gguf);
        let artifact = at("model.safetensors", Want::Any).unwrap();
        assert_eq!(artifact.name, fs::canonicalize(root.path()).unwrap().file_name().unwrap().to_string_lossy());
        assert!(matches!(at("custom.gguf", Want::Safetensors), Err(FetchError::WrongFormat { .. })));
        assert!(matches!(at("notes.txt", Want::Any), Err(FetchError::Probe(ProbeError::Malformed { .. }))));
        assert!(matches!(at("none", Want::Any), Err(FetchError::Probe(ProbeError::Missing { .. }))));
    }

    #[test]
    fn gguf_parts_come_together() {
        let root = directory(&[("m-00001-of-00002.gguf", "GGUF"), ("m-00002-of-00002.gguf", "GGUF")]);
        let artifact = locate(&root.path().join("m-00001-of-00002.gguf"), "x", Want::Any).unwrap();
        assert_eq!((artifact.name.as_str(), artifact.weights.len()), ("m", 2));
        assert_eq!(locate(root.path(), "x", Want::Any).unwrap().weights.len(), 2);
    }

    #[test]
    fn snapshots_are_named_after_their_repository() {
        let root = directory(&[("models--o--r/snapshots/0123/model.safetensors", "")]);
        let artifact = locate(&root.path().join("models--o--r/snapshots/0123"), "x", Want::Any).unwrap();
        assert_eq!(artifact.name, "o/r");
        // By its folder it is found only once a branch names it.
        let folder = root.path().join("models--o--r");
        assert!(locate(&folder, "x", Want::Any).is_err());
        fs::create_dir_all(folder.join("refs")).unwrap();
        fs::write(folder.join("refs/main"), "0123\n").unwrap();
        assert_eq!(locate(&folder, "x", Want::Any).unwrap(), artifact);
    }

    #[test]
    fn of_a_directorys_quantizations_the_largest_that_fits_is_chosen() {
        let header = tiny_llama("gpt-2").finish();
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("m-Q4_0.gguf"), &header).unwrap();
        fs::write(root.path().join("m-Q8_0.gguf"), [&header[..], &[0; 32]].concat()).unwrap();
        // Two heads of eight values, keys and values of 16 bits, 64 tokens.
        let context = 2 * (8 + 8) * 2 * 64;
        let fitting = |memory_bytes: usize| {
            let room = Room { memory_bytes: memory_bytes as u64, context_bytes: 0, context_tokens: 64 };
            locate_fitting(root.path(), "x", Want::Any, Some(room)).map(|artifact| artifact.weights[0].clone())
        };
        assert!(fitting(header.len() + 32 + context).unwrap().ends_with("m-Q8_0.gguf"));
        assert!(fitting(header.len() + 31 + context).unwrap().ends_with("m-Q4_0.gguf"));
        assert!(fitting(header.len() + context - 1).is_err());
        assert!(locate(root.path(), "x", Want::Any).is_err(), "without a word on room, there is nothing to go by");
    }

    #[cfg(unix)]
    #[test]
    fn links_of_a_snapshot_stay_in_its_cache() {
        use std::os::unix::fs::symlink;
        let root = directory(&[("hub/models--o--r/blobs/b", "x"), ("secret", "y"), ("plain/config.json", "{}")]);
        let snapshot = root.path().join("hub/models--o--r/snapshots/0123");
        fs::create_dir_all(&snapshot).unwrap();
        symlink("../../blobs/b", snapshot.join("model.safetensors")).unwrap();
        assert_eq!(locate(&snapshot, "x", Want::Any).unwrap().name, "o/r");
        // By a link to the snapshot it is the same.
        symlink(&snapshot, root.path().join("here")).unwrap();
        assert_eq!(locate(&root.path().join("here"), "x", Want::Any).unwrap().weights.len(), 1);
        symlink("../../../../secret", snapshot.join("config.json")).unwrap();
        for path in [snapshot.clone(), snapshot.join("model.safetensors"), root.path().join("here")] {
            let error = locate(&path, "x", Want::Any).unwrap_err();
            assert!(matches!(error, FetchError::Outside { .. }), "{error}");
        }
        // In a directory of the user's own, links may lead anywhere.
        symlink(root.path().join("secret"), root.path().join("plain/model.safetensors")).unwrap();
        locate(&root.path().join("plain"), "x", Want::Any).unwrap();
    }
}
