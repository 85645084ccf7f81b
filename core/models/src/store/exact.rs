//! One GGUF in two forms that keep the value of every weight, for comparing who computes them.

use std::{
    fs,
    path::{Path, PathBuf},
    time::UNIX_EPOCH,
};

use mesh_core::ProgressSink;
use sha2::{Digest, Sha256};

use super::{Artifact, Store, Want, make};
use crate::{
    error::FetchError,
    import, local,
    reference::Reference,
    unpack::{self, Floats},
};

/// A GGUF in the two forms.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Exact {
    /// Imported into an MLX directory.
    pub imported: Artifact,
    /// A GGUF of 32-bit floats.
    pub unpacked: Artifact,
}

/// A GGUF as it was published.
struct Published {
    name: String,
    files: Vec<PathBuf>,
    /// What things made of it are named after.
    made: Result<(String, String), FetchError>,
}

impl Store {
    /// Finds the GGUF that `reference` names, as [`Store::locate`] does, and makes both forms of it in the cache, unless
    /// they are there. The floats take 4 bytes a parameter.
    ///
    /// # Errors
    ///
    /// Besides those of finding it: a model that has no GGUF, or one in several files, and one that cannot be imported
    /// or unpacked.
    pub async fn exact(&self, reference: &str, progress: &ProgressSink) -> Result<Exact, FetchError> {
        let Published { name, files, made } = self.published(reference, progress).await?;
        let [file] = &files[..] else {
            let what = format!("it is in {} files, and one is needed", files.len());
            return Err(FetchError::Reference { reference: reference.to_owned(), what });
        };
        let (file, made) = (file.clone(), made?);
        let imported = self.made_of(&made, &format!("v{}", import::VERSION));
        let floats = Floats::F32;
        let unpacked =
            self.made_of(&made, &format!("{floats}-v{}", unpack::VERSION)).join(format!("{}.{floats}.gguf", made.0));
        if !imported.is_dir() {
            let (file, out, progress) = (file.clone(), imported.clone(), progress.clone());
            make(&name, move || import::import_gguf(&file, &out, &progress)).await?;
        }
        if !unpacked.is_file() {
            let (out, progress) = (unpacked.clone(), progress.clone());
            make(&name, move || unpack::unpack_gguf(&file, &out, floats, &progress)).await?;
        }
        Ok(Exact {
            imported: Artifact { name: name.clone(), ..local::locate(&imported, reference, Want::Safetensors)? },
            unpacked: super::gguf_artifact(&name, unpacked),
        })
    }

    /// The files of the GGUF that `reference` names as they were published, in order, and the model's name: what
    /// [`Store::locate`] finds, but of a catalog entry never what was made of it.
    ///
    /// # Errors
    ///
    /// Those of finding it, and a model that has no GGUF.
    pub async fn gguf_files(
        &self,
        reference: &str,
        progress: &ProgressSink,
    ) -> Result<(String, Vec<PathBuf>), FetchError> {
        let Published { name, files, .. } = self.published(reference, progress).await?;
        Ok((name, files))
    }

    async fn published(&self, reference: &str, progress: &ProgressSink) -> Result<Published, FetchError> {
        // What an entry is unpacked into is not what is asked for here.
        if let Reference::Name(name) = Reference::parse(reference, Path::exists)?
            && self.catalog.find(&name)?.sha256.is_some()
        {
            let entry = self.catalog.find(&name)?;
            let files = vec![self.gguf(entry, progress).await?];
            return Ok(Published { name: entry.name.clone(), files, made: Ok(self.kept_as(entry)) });
        }
        let Artifact { name, weights: files, .. } = self.locate(reference, Want::Gguf, progress).await?;
        let made = files.first().map_or_else(Default::default, |file| (stem(file), file.clone()));
        let made = stamp(&made.1).map(|stamp| (made.0, stamp));
        Ok(Published { name, files, made })
    }
}

fn stem(file: &Path) -> String {
    file.file_stem().unwrap_or_default().to_string_lossy().into_owned()
}

/// Tells a file from what else may be or have been called so. Where it lies, its size and its time will do: hashing the
/// content takes longer than the comparison it is for.
fn stamp(file: &Path) -> Result<String, FetchError> {
    let path: PathBuf = fs::canonicalize(file).map_err(FetchError::io(file))?;
    let metadata = fs::metadata(&path).map_err(FetchError::io(file))?;
    let modified = metadata.modified().map_err(FetchError::io(file))?;
    let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_nanos();
    let text = format!("{}\n{}\n{since}", path.display(), metadata.len());
    Ok(Sha256::digest(text).iter().take(6).map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{probe, store::tests::house, testing::tiny_llama};

    #[tokio::test]
    async fn a_file_is_imported_and_unpacked_once_and_again_when_it_changes() {
        let house = house(&[], true);
        let silent = ProgressSink::silent();
        let file = house.root.path().join("tiny.gguf");
        let content =
            |value: u8| tiny_llama("gpt-2").tensor("blk.0.ffn_up.weight", &[32, 32], 8, vec![value; 34 * 32]).finish();
        fs::write(&file, content(1)).unwrap();
        let reference = file.to_string_lossy();
        let made = house.store.exact(&reference, &silent).await.unwrap();
        assert_eq!((&made.imported.name, &made.unpacked.name), (&"tiny".to_owned(), &"tiny".to_owned()));
        let (imported, unpacked) = (probe(&made.imported).unwrap(), probe(&made.unpacked).unwrap());
        assert_eq!(imported.quantization.unwrap().value.bits, Some(8));
        assert_eq!((unpacked.quantization, unpacked.weight_bytes.value > 4 * 32 * 32), (None, true));
        let time = |made: &Exact| {
            let of = |artifact: &Artifact| fs::metadata(&artifact.weights[0]).unwrap().modified().unwrap();
            (of(&made.imported), of(&made.unpacked))
        };
        let before = time(&made);
        let again = house.store.exact(&reference, &silent).await.unwrap();
        assert_eq!((&again, time(&again)), (&made, before));

        fs::write(&file, [&content(2)[..], &[0; 32]].concat()).unwrap();
        let other = house.store.exact(&reference, &silent).await.unwrap();
        assert_ne!((other.imported.root, other.unpacked.root), (made.imported.root, made.unpacked.root));
    }

    #[tokio::test]
    async fn models_without_a_gguf_are_refused() {
        let house = house(&[], true);
        let error = house.store.exact("Qwen3-0.6B-MLX", &ProgressSink::silent()).await.unwrap_err();
        assert_eq!(error.to_string(), "Qwen3-0.6B-MLX has no GGUF weights, only safetensors");
    }
}
