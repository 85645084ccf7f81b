//! Profiles for tests, made by hand.

use std::path::PathBuf;

use mesh_core::{Fact, ModelProfile, Source, WeightFormat};

/// A GGUF of which nothing is known but its architecture and the size of its file, 0 where there is none.
pub fn profile(name: &str, gguf: PathBuf, architecture: &str) -> ModelProfile {
    let source = Source::file("model.gguf");
    let root = gguf.parent().map(PathBuf::from).unwrap_or_default();
    let bytes = gguf.metadata().map_or(0, |metadata| metadata.len());
    let format = Fact::new(WeightFormat::Gguf, source.clone());
    let gguf_architecture = Some(Fact::new(architecture.to_owned(), source));
    ModelProfile { gguf_architecture, ..ModelProfile::of_files(name.to_owned(), root, vec![gguf], format, bytes) }
}
