//! Models that lie on disk: which files are the weights, and are they all there.

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
};

use mesh_core::{ProbeError, WeightFormat};

use crate::{
    choice::{self, Choice, INDEX},
    error::FetchError,
    store::{Artifact, Want},
};

/// Most files of a directory that are looked at.
const FILES_MAX: usize = 100_000;
/// Largest index file, in bytes. Kimi K2's has 15 MB.
const INDEX_BYTES_MAX: u64 = 48 << 20;

/// The model at `path`, which the user spelled `reference`.
pub(crate) fn locate(path: &Path, reference: &str, want: Want) -> Result<Artifact, FetchError> {
    let metadata = fs::metadata(path).map_err(|source| match source.kind() {
        std::io::ErrorKind::NotFound => ProbeError::Missing { path: path.to_owned() },
        _ => ProbeError::Io { path: path.to_owned(), source },
    })?;
    if metadata.is_dir() {
        let choice = choice::choose(reference, &files(path)?, want, None)?;
        return assemble(path, directory_name(path), choice);
    }
    let root = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
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

/// The names of the files directly in a directory.
fn files(root: &Path) -> Result<Vec<String>, FetchError> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root).map_err(FetchError::io(root))?.take(FILES_MAX) {
        let entry = entry.map_err(FetchError::io(root))?;
        // Follows links: hub snapshots consist of them.
        if entry.path().is_file() {
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
    }
    names.sort();
    Ok(names)
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
    }
}
