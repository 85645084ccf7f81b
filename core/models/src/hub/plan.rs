//! What has to be fetched of a repository, decided from names and sizes alone.

use mesh_core::WeightFormat;

use crate::{
    choice::{self, Candidate, Choice, INDEX, Room, Wish},
    error::FetchError,
    near::near,
    reference::HubRef,
    store::Want,
};

/// Files that come along with safetensors weights, besides templates.
const SIDECARS: &[&str] = &[
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.json",
];
/// The tokenizer where there is no tokenizer.json.
const TOKENIZER_MODEL: &str = "tokenizer.model";
/// The directory of templates by name.
const TEMPLATES: &str = "additional_chat_templates/";

/// What is asked of a repository.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Asked<'a> {
    /// The repository, or something in it.
    pub hub: &'a HubRef,
    /// The name it will be served under.
    pub name: &'a str,
    /// How the user spelled it.
    pub reference: &'a str,
    /// Which format.
    pub want: Want,
    /// What the machine has, where quantizations may be chosen among.
    pub room: Option<Room>,
}

/// What has to be fetched.
#[derive(Debug)]
pub(super) struct Plan {
    /// Directory of the repository that holds the model; empty for the top.
    pub directory: String,
    pub choice: Choice,
    pub sidecars: Vec<String>,
    /// Known once the index is, where there is one.
    pub weights: Vec<String>,
    /// Why these and not others, where there were others.
    pub note: Option<String>,
}

impl Asked<'_> {
    fn wish(&self) -> Wish<'_> {
        let quant = self.hub.quant.as_deref();
        Wish { reference: self.reference, want: self.want, quant, room: self.room }
    }

    /// The file whose header tells what a context takes, where that decides.
    pub(super) fn telling(&self, files: &[Candidate]) -> Option<String> {
        if self.hub.file.is_some() { None } else { choice::telling(self.wish(), files) }
    }

    /// The same, now that it is known.
    pub(super) fn knowing(self, context_bytes: Option<u64>) -> Self {
        let room = self.room.map(|room| Room { context_bytes: context_bytes.unwrap_or(room.context_bytes), ..room });
        Self { room, ..self }
    }
}

impl Plan {
    pub fn new(asked: Asked<'_>, files: &[Candidate]) -> Result<Self, FetchError> {
        let file = asked.hub.file.as_deref();
        let directory = file.and_then(|file| file.rsplit_once('/')).map_or("", |(directory, _)| directory).to_owned();
        let prefix = if directory.is_empty() { String::new() } else { format!("{directory}/") };
        let below: Vec<Candidate> = files
            .iter()
            .filter_map(|file| {
                let path = file.path.strip_prefix(&prefix)?.to_owned();
                Some(Candidate { path, bytes: file.bytes })
            })
            .collect();
        let (choice, note) = match file {
            Some(file) => (named(asked, file.strip_prefix(&prefix).unwrap_or(file), &below, files)?, None),
            None => choice::choose(asked.wish(), &below)?,
        };
        let mut plan = Self { directory, choice, sidecars: Vec::new(), weights: Vec::new(), note };
        match &plan.choice {
            Choice::Gguf(names) => plan.weights = names.iter().map(|name| plan.below(name)).collect(),
            Choice::Safetensors(names) => plan.weights = names.iter().map(|name| plan.below(name)).collect(),
            Choice::Indexed => {}
        }
        if !matches!(plan.choice, Choice::Gguf(_)) {
            plan.sidecars = sidecars(&below).into_iter().map(|name| plan.below(name)).collect();
        }
        Ok(plan)
    }

    /// Refuses weights that could not be served: before the first byte of them is fetched.
    pub fn complete(&self, asked: Asked<'_>) -> Result<(), FetchError> {
        let there = |name: &str| self.sidecars.contains(&self.below(name));
        let missing = match () {
            () if matches!(self.choice, Choice::Gguf(_)) => None,
            () if !there("config.json") => Some("config.json"),
            () if !there("tokenizer.json") && !there(TOKENIZER_MODEL) => Some("tokenizer.json"),
            () => None,
        };
        let incomplete =
            |file: &str| FetchError::Incomplete { model: asked.reference.to_owned(), file: file.to_owned() };
        missing.map_or(Ok(()), |file| Err(incomplete(file)))
    }

    /// A file of the model, as the repository calls it.
    pub fn below(&self, name: &str) -> String {
        if self.directory.is_empty() { name.to_owned() } else { format!("{}/{name}", self.directory) }
    }
}

/// The files that come along, in the order in which they are fetched.
fn sidecars(files: &[Candidate]) -> Vec<&str> {
    let there = |name: &&str| files.iter().any(|file| file.path == *name);
    let mut found: Vec<&str> = SIDECARS.iter().copied().filter(there).collect();
    if !found.contains(&"tokenizer.json") {
        found.extend([TOKENIZER_MODEL].iter().copied().filter(there));
    }
    let template = |path: &&str| {
        let name = path.strip_prefix(TEMPLATES).unwrap_or(path);
        name.ends_with(".jinja") && !name.contains('/')
    };
    found.extend(files.iter().map(|file| file.path.as_str()).filter(template));
    found.extend([INDEX].iter().copied().filter(there));
    found
}

/// What naming one file of a repository means.
fn named(asked: Asked<'_>, name: &str, files: &[Candidate], all: &[Candidate]) -> Result<Choice, FetchError> {
    let Asked { hub, reference, want, .. } = asked;
    if !files.iter().any(|file| file.path == name) {
        let wanted = hub.file.as_deref().unwrap_or(name);
        let revision = hub.revision.as_ref().map_or(String::new(), |revision| format!("@{revision}"));
        let known = all.iter().map(|file| file.path.as_str());
        let weights = known.filter(|path| path.ends_with(".gguf") || path.contains(".safetensors"));
        let near = near(wanted, weights).into_iter().map(|file| format!("{}/{file}{revision}", hub.repo)).collect();
        return Err(FetchError::NotFound { what: format!("{}/{wanted}", hub.repo), near });
    }
    let (has, choice) = if let Some(stem) = name.strip_suffix(".gguf") {
        let parts = match choice::shard(stem) {
            Some((stem, _, total)) => {
                let of = |file: &&Candidate| {
                    let parts = file.path.strip_suffix(".gguf").and_then(choice::shard);
                    parts.is_some_and(|(other, _, parts)| other == stem && parts == total)
                };
                let parts: Vec<Candidate> = files.iter().filter(of).cloned().collect();
                choice::choose(Wish { reference, want: Want::Gguf, quant: None, room: None }, &parts)?.0
            }
            // What was named is taken for what it is, a projector too.
            None => Choice::Gguf(vec![name.to_owned()]),
        };
        (WeightFormat::Gguf, parts)
    } else if name == INDEX {
        (WeightFormat::Safetensors, Choice::Indexed)
    } else if let Some(stem) = name.strip_suffix(".safetensors") {
        let sharded = choice::shard(stem).is_some() && files.iter().any(|file| file.path == INDEX);
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
