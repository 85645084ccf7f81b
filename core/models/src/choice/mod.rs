//! Which of a model's files are its weights. Pure: works on names and sizes, local or on the hub.

mod index;
mod quant;
#[cfg(test)]
mod tests;

use std::{collections::BTreeMap, path::PathBuf};

use mesh_core::{ProbeError, WeightFormat};

pub(crate) use index::{INDEX, SHARDS_MAX, index_shards};
pub use quant::Room;

use crate::{
    error::{FetchError, Unread, shown_bytes},
    near::near,
    reference::quoted,
    store::Want,
};

/// A file to choose among.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Candidate {
    /// Its name, relative to the model's root, with `/` between directories.
    pub path: String,
    /// Its size.
    pub bytes: u64,
}

/// What was chosen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Choice {
    /// The shards that the index names.
    Indexed,
    /// These safetensors files, in order.
    Safetensors(Vec<String>),
    /// These GGUF files, in order.
    Gguf(Vec<String>),
}

/// What is wanted of a model.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Wish<'a> {
    /// The model as the user spelled it, for the commands an error suggests.
    pub reference: &'a str,
    /// Which format.
    pub want: Want,
    /// Which quantization.
    pub quant: Option<&'a str>,
    /// What the machine has, where several quantizations may be chosen among.
    pub room: Option<Room>,
}

impl Wish<'_> {
    /// The reference without its quantization, which a file or another one may follow.
    fn base(&self) -> &str {
        let without = self.reference.rsplit_once(':').filter(|_| self.quant.is_some());
        without.map_or(self.reference, |(base, _)| base).trim_end_matches('/')
    }

    fn command(&self, reference: &str, flag: &str) -> String {
        format!("mesh-llm --model {}{flag}", quoted(reference))
    }

    /// One file. In `org/repo@revision` it goes before the revision.
    fn file(&self, file: &str) -> String {
        match self.base().split_once('@') {
            Some((repo, revision)) => format!("{repo}/{file}@{revision}"),
            None => format!("{}/{file}", self.base()),
        }
    }

    /// A repository takes a quantization behind a colon; a directory does not.
    fn takes_quant(&self) -> bool {
        let base = self.base();
        base.split('@').next().is_some_and(|repo| repo.matches('/').count() == 1)
            && !base.starts_with(['.', '/', '~'])
            && !base.contains("://")
    }
}

/// A GGUF with all its parts.
#[derive(Clone, Debug)]
struct Group {
    stem: String,
    files: Vec<String>,
    bytes: u64,
    quant: Option<quant::Quant>,
}

/// What was chosen, and a line on why, where something else might have been.
pub(crate) type Chosen = (Choice, Option<String>);

/// Chooses among `files`.
pub(crate) fn choose(wish: Wish<'_>, files: &[Candidate]) -> Result<Chosen, FetchError> {
    let groups = gguf_groups(files);
    let safetensors = safetensors(files);
    let has = match (safetensors.is_some(), groups.is_empty()) {
        (true, _) => Some(WeightFormat::Safetensors),
        (false, false) => Some(WeightFormat::Gguf),
        (false, true) => None,
    };
    let want = if wish.quant.is_some() { Want::Gguf } else { wish.want };
    let wanted = match want {
        Want::Any => None,
        Want::Gguf => Some(WeightFormat::Gguf),
        Want::Safetensors => Some(WeightFormat::Safetensors),
    };
    let model = || wish.reference.to_owned();
    let wrong = || match (has, unread(files)) {
        (None, Some((kind, files))) => FetchError::Unread { model: model(), kind, files },
        _ => FetchError::WrongFormat { model: model(), has, wanted },
    };
    match (want, safetensors) {
        (Want::Any, Some(_)) if !groups.is_empty() => Err(both(wish, &groups)),
        (Want::Any | Want::Safetensors, Some(found)) => match found {
            Ok(Choice::Safetensors(shards)) => match missing_shard(&shards, ".safetensors") {
                Some(file) => Err(FetchError::Probe(ProbeError::MissingFile { root: PathBuf::from(model()), file })),
                None => Ok((Choice::Safetensors(shards), None)),
            },
            Ok(choice) => Ok((choice, None)),
            Err(several) => {
                let commands = several.iter().map(|file| wish.command(&wish.file(file), " --mlx")).collect();
                Err(ambiguous(wish, several, commands))
            }
        },
        (Want::Safetensors, None) => Err(wrong()),
        (Want::Any | Want::Gguf, _) if groups.is_empty() => Err(wrong()),
        (Want::Any | Want::Gguf, _) => gguf(wish, groups),
    }
}

/// The GGUF that tells what a context takes, where it takes room to choose: any will do, they are of one model.
pub(crate) fn telling(wish: Wish<'_>, files: &[Candidate]) -> Option<String> {
    let room = wish.room?;
    let undecided = choose(Wish { room: None, ..wish }, files).is_err();
    if !undecided || room.context_tokens == 0 {
        return None;
    }
    match choose(Wish { room: Some(Room::BOUNDLESS), ..wish }, files) {
        Ok((Choice::Gguf(parts), _)) => parts.into_iter().next(),
        _ => None,
    }
}

fn ambiguous(wish: Wish<'_>, candidates: Vec<String>, commands: Vec<String>) -> FetchError {
    FetchError::Probe(ProbeError::Ambiguous { root: PathBuf::from(wish.reference), candidates, commands })
}

/// A model in both formats: one group each, and a command for each group and each quantization.
fn both(wish: Wish<'_>, groups: &[Group]) -> FetchError {
    let ggufs: Vec<String> = groups.iter().map(Group::shown).collect();
    let mut commands = vec![wish.command(wish.reference, " --mlx"), wish.command(wish.reference, " --gguf")];
    if groups.len() > 1 {
        commands.extend(groups.iter().map(|group| group.command(wish, groups)));
    }
    ambiguous(wish, vec!["safetensors".into(), format!("GGUF ({})", ggufs.join(", "))], commands)
}

impl Group {
    /// `Q4_K_M, 2.5 GB`, or the file's name where it says nothing.
    fn shown(&self) -> String {
        let name = self.quant.as_ref().map_or_else(|| self.first(), |quant| &quant.name);
        format!("{name} {}", shown_bytes(self.bytes))
    }

    fn first(&self) -> &str {
        self.files.first().map_or(&self.stem, |file| file)
    }

    /// The shortest reference that means this one.
    fn reference(&self, wish: Wish<'_>, all: &[Group]) -> String {
        if let Some(quant) = self.quant.as_ref().filter(|_| wish.takes_quant())
            && all.iter().filter(|group| names_quant(&group.stem, &quant.name)).count() == 1
        {
            return format!("{}:{}", wish.base(), quant.name);
        }
        wish.file(self.first())
    }

    /// The command that means this one.
    fn command(&self, wish: Wish<'_>, all: &[Group]) -> String {
        wish.command(&self.reference(wish, all), "")
    }
}

/// The one GGUF that is meant.
fn gguf(wish: Wish<'_>, groups: Vec<Group>) -> Result<Chosen, FetchError> {
    let fits = |group: &&Group| wish.quant.is_none_or(|quant| names_quant(&group.stem, quant));
    let fitting: Vec<&Group> = groups.iter().filter(fits).collect();
    if let (Some(quant), true) = (wish.quant, fitting.is_empty()) {
        let name = |group: &Group| group.quant.as_ref().map_or(String::new(), |quant| quant.name.clone());
        let names: Vec<String> = groups.iter().map(name).collect();
        let mut offered = near(quant, names.iter().map(String::as_str));
        if offered.is_empty() {
            offered = names;
        }
        let is_offered = |group: &&Group| offered.contains(&name(group));
        let near = groups.iter().filter(is_offered).map(|group| group.reference(wish, &groups)).collect();
        return Err(FetchError::NotFound { what: format!("{quant} in {}", wish.base()), near });
    }
    let (chosen, note) = match fitting[..] {
        [one] => (one, None),
        _ => largest(wish, &fitting).ok_or_else(|| {
            let candidates = fitting.iter().map(|group| format!("{} {}", group.first(), shown_bytes(group.bytes)));
            let commands = fitting.iter().map(|group| group.command(wish, &groups)).collect();
            ambiguous(wish, candidates.collect(), commands)
        })?,
    };
    match missing_shard(&chosen.files, ".gguf") {
        None => Ok((Choice::Gguf(chosen.files.clone()), note)),
        Some(file) => Err(FetchError::Probe(ProbeError::MissingFile { root: PathBuf::from(wish.reference), file })),
    }
}

/// Among quantizations of one model the largest that the machine takes. Different models are not chosen among, and
/// neither is where a quantization was named that several files have.
fn largest<'a>(wish: Wish<'_>, groups: &[&'a Group]) -> Option<(&'a Group, Option<String>)> {
    let room = wish.room.filter(|_| wish.quant.is_none())?;
    let rest = |group: &Group| group.quant.as_ref().map(|quant| quant.rest.clone());
    let first = rest(groups.first()?)?;
    if groups.iter().any(|group| rest(group).as_ref() != Some(&first)) {
        return None;
    }
    let sizes: Vec<u64> = groups.iter().map(|group| group.bytes).collect();
    let chosen = groups[quant::largest_fitting(&sizes, room)?];
    let others: Vec<String> =
        groups.iter().filter(|group| group.stem != chosen.stem).map(|group| group.shown()).collect();
    let another = groups.iter().find(|group| group.stem != chosen.stem);
    let owned: Vec<Group> = groups.iter().map(|group| (*group).clone()).collect();
    let note = format!(
        "{}: {} is the largest quantization that fits: {} for its weights and {} for a context of {} \
         tokens, of {} of memory. There are others ({}); to choose one, name it: {}",
        wish.reference,
        chosen.first(),
        shown_bytes(chosen.bytes),
        shown_bytes(room.context_bytes),
        room.context_tokens,
        shown_bytes(room.memory_bytes),
        others.join(", "),
        another.map(|group| group.command(wish, &owned)).unwrap_or_default(),
    );
    Some((chosen, Some(note)))
}

/// The words of a file's name.
fn words(file: &str) -> impl Iterator<Item = String> {
    let name = file.rsplit('/').next().unwrap_or(file).to_lowercase();
    let words: Vec<String> = name.split(|c: char| !c.is_ascii_alphanumeric()).map(str::to_owned).collect();
    words.into_iter()
}

/// Weights that change a model and are none: adapters. What was merged is a model.
fn is_adapter(file: &str) -> bool {
    let adapter = |word: &String| ["adapter", "adapters", "lora", "loras", "qlora"].contains(&word.as_str());
    words(file).any(|word| adapter(&word)) && !words(file).any(|word| word.starts_with("merge"))
}

/// GGUF files by stem, the shards of one model together and in order. Projectors (`mmproj`) are no models.
fn gguf_groups(files: &[Candidate]) -> Vec<Group> {
    let mut groups: BTreeMap<String, (Vec<String>, u64)> = BTreeMap::new();
    for Candidate { path, bytes } in files {
        let name = path.rsplit('/').next().unwrap_or(path).to_lowercase();
        let other = |word: String| ["mmproj", "imatrix"].contains(&word.as_str());
        if !name.ends_with(".gguf") || words(&name).any(other) || is_adapter(&name) {
            continue;
        }
        let stem = &path[..path.len() - ".gguf".len()];
        let stem = shard(stem).map_or(stem, |(stem, ..)| stem);
        let group = groups.entry(stem.to_owned()).or_default();
        group.0.push(path.clone());
        group.1 = group.1.saturating_add(*bytes);
    }
    let group = |(stem, (mut files, bytes)): (String, (Vec<String>, u64))| {
        files.sort();
        Group { quant: quant::read(&stem), stem, files, bytes }
    };
    groups.into_iter().map(group).collect()
}

/// The safetensors files of the model; `Err` names several that do not belong together, `None` if there are none.
fn safetensors(files: &[Candidate]) -> Option<Result<Choice, Vec<String>>> {
    let there = |name: &str| files.iter().any(|file| file.path == name);
    if there(INDEX) {
        return Some(Ok(Choice::Indexed));
    }
    if there("model.safetensors") {
        return Some(Ok(Choice::Safetensors(vec!["model.safetensors".into()])));
    }
    let mut found: Vec<String> = files
        .iter()
        .map(|file| &file.path)
        .filter(|file| file.ends_with(".safetensors") && !file.contains('/'))
        .filter(|file| !file.starts_with("consolidated") && !is_adapter(file))
        .cloned()
        .collect();
    found.sort();
    let shards: Vec<String> = found.iter().filter(|file| file.starts_with("model")).cloned().collect();
    match (found.len(), shards.is_empty()) {
        (0, _) => None,
        (_, false) => Some(Ok(Choice::Safetensors(shards))),
        (1, true) => Some(Ok(Choice::Safetensors(found))),
        _ => Some(Err(found)),
    }
}

/// Weights that are there and are not read, where no others are.
fn unread(files: &[Candidate]) -> Option<(Unread, Vec<String>)> {
    const SHOWN_MAX: usize = 4;
    let some = |test: &dyn Fn(&str) -> bool| {
        let found = files.iter().map(|file| &file.path).filter(|path| test(path));
        let found: Vec<String> = found.take(SHOWN_MAX).cloned().collect();
        (!found.is_empty()).then_some(found)
    };
    let ending = |path: &str, endings: &[&str]| endings.iter().any(|ending| path.to_lowercase().ends_with(ending));
    let adapter = |path: &str| ending(path, &[".safetensors", ".gguf", ".bin"]) && is_adapter(path);
    let pickled = |path: &str| ending(path, &[".bin", ".pt", ".pth", ".ckpt", ".pkl"]);
    some(&adapter)
        .map(|found| (Unread::Adapters, found))
        .or_else(|| some(&pickled).map(|found| (Unread::Pickles, found)))
}

/// Splits `x-00002-of-00003` into `x`, 2 and 3.
pub(crate) fn shard(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, total) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| (text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit())).then_some(());
    digits(total).and(digits(number))?;
    Some((stem, number.parse().ok()?, total.parse().ok()?))
}

/// The first shard that a group of files lacks.
fn missing_shard(files: &[String], ending: &str) -> Option<String> {
    let (stem, _, total) = shard(files.first()?.strip_suffix(ending)?)?;
    (1..=total).map(|number| format!("{stem}-{number:05}-of-{total:05}{ending}")).find(|name| !files.contains(name))
}

/// True if a file's stem names the quantization as a word of its own: `Q4_K` is not in `x-Q4_K_M`.
fn names_quant(stem: &str, quant: &str) -> bool {
    let (stem, quant) = (stem.to_ascii_lowercase(), quant.to_ascii_lowercase());
    stem.match_indices(&quant).any(|(start, _)| {
        let before = stem[..start].chars().next_back();
        let after = stem[start + quant.len()..].chars().next();
        before.is_none_or(|c| !c.is_ascii_alphanumeric())
            && after.is_none_or(|c| !c.is_ascii_alphanumeric() && c != '_')
    })
}
