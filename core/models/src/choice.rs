//! Which of a model's files are its weights. Pure: works on names, local or on the hub.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fmt,
    path::PathBuf,
};

use mesh_core::{ProbeError, WeightFormat};
use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use crate::{
    error::FetchError,
    reference::{plain_relative, quoted},
    store::Want,
};

/// Name of the list of a sharded checkpoint's files.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Most shards a model may have.
pub(crate) const SHARDS_MAX: usize = 4096;

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

/// Chooses among `files`, names relative to the model's root with `/` between directories. `reference` is the model as
/// the user spelled it, for the commands an error suggests.
pub(crate) fn choose(reference: &str, files: &[String], want: Want, quant: Option<&str>) -> Result<Choice, FetchError> {
    let groups = gguf_groups(files);
    let safetensors = safetensors(files);
    let command = |rest: &str| format!("mesh-llm --model {}{rest}", quoted(reference));
    let has = match (safetensors.is_some(), groups.is_empty()) {
        (true, _) => Some(WeightFormat::Safetensors),
        (false, false) => Some(WeightFormat::Gguf),
        (false, true) => None,
    };
    let want = if quant.is_some() { Want::Gguf } else { want };
    let wanted = match want {
        Want::Any => None,
        Want::Gguf => Some(WeightFormat::Gguf),
        Want::Safetensors => Some(WeightFormat::Safetensors),
    };
    let wrong = || FetchError::WrongFormat { model: reference.to_owned(), has, wanted };
    match (want, safetensors) {
        (Want::Any, Some(_)) if !groups.is_empty() => Err(ambiguous(
            reference,
            vec!["safetensors".into(), "GGUF".into()],
            vec![command(" --mlx"), command(" --gguf")],
        )),
        (Want::Any | Want::Safetensors, Some(found)) => match found {
            Ok(choice) => Ok(choice),
            Err(several) => {
                let base = reference.trim_end_matches('/');
                let commands = several
                    .iter()
                    .map(|file| format!("mesh-llm --model {} --mlx", quoted(&format!("{base}/{file}"))))
                    .collect();
                Err(ambiguous(reference, several, commands))
            }
        },
        (Want::Safetensors, None) => Err(wrong()),
        (Want::Any | Want::Gguf, _) => gguf(reference, groups, quant).unwrap_or_else(|| Err(wrong())),
    }
}

fn ambiguous(reference: &str, candidates: Vec<String>, commands: Vec<String>) -> FetchError {
    FetchError::Probe(ProbeError::Ambiguous { root: PathBuf::from(reference), candidates, commands })
}

/// The one GGUF that is meant; `None` if there is none at all.
fn gguf(
    reference: &str,
    groups: BTreeMap<String, Vec<String>>,
    quant: Option<&str>,
) -> Option<Result<Choice, FetchError>> {
    if groups.is_empty() {
        return None;
    }
    let fits = |stem: &str| quant.is_none_or(|quant| names_quant(stem, quant));
    let mut fitting: Vec<_> = groups.iter().filter(|(stem, _)| fits(stem)).collect();
    if let (Some((_, files)), None) = (fitting.pop(), fitting.first()) {
        return Some(match missing_shard(files) {
            None => Ok(Choice::Gguf(files.clone())),
            Some(file) => Err(FetchError::Probe(ProbeError::MissingFile { root: PathBuf::from(reference), file })),
        });
    }
    // Nothing fits the quantization, or several files fit: show what there is.
    let base = reference.rsplit_once(':').filter(|_| quant.is_some()).map_or(reference, |(base, _)| base);
    let base = base.trim_end_matches('/');
    let candidates: Vec<String> = groups.into_values().filter_map(|files| files.into_iter().next()).collect();
    let command = |file: &String| match base.split_once('@') {
        // `org/repo@revision`: the file goes before the revision.
        Some((repo, revision)) => format!("mesh-llm --model {}", quoted(&format!("{repo}/{file}@{revision}"))),
        None => format!("mesh-llm --model {}", quoted(&format!("{base}/{file}"))),
    };
    let commands = candidates.iter().map(command).collect();
    Some(Err(ambiguous(reference, candidates, commands)))
}

/// GGUF files by stem, the shards of one model together and in order. Projectors (`mmproj`) are no models.
fn gguf_groups(files: &[String]) -> BTreeMap<String, Vec<String>> {
    let mut groups: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for file in files {
        let name = file.rsplit('/').next().unwrap_or(file).to_lowercase();
        if !name.ends_with(".gguf") || name.starts_with("mmproj") || name.contains("imatrix") {
            continue;
        }
        let stem = &file[..file.len() - ".gguf".len()];
        let stem = shard(stem).map_or(stem, |(stem, ..)| stem);
        groups.entry(stem.to_owned()).or_default().push(file.clone());
    }
    groups.values_mut().for_each(|group| group.sort());
    groups
}

/// The safetensors files of the model; `Err` names several that do not belong together, `None` if there are none.
fn safetensors(files: &[String]) -> Option<Result<Choice, Vec<String>>> {
    let there = |name: &str| files.iter().any(|file| file == name);
    if there(INDEX) {
        return Some(Ok(Choice::Indexed));
    }
    if there("model.safetensors") {
        return Some(Ok(Choice::Safetensors(vec!["model.safetensors".into()])));
    }
    let mut found: Vec<String> = files
        .iter()
        .filter(|file| file.ends_with(".safetensors") && !file.contains('/'))
        .filter(|file| !["adapter", "consolidated"].iter().any(|start| file.starts_with(start)))
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

/// Splits `x-00002-of-00003` into `x`, 2 and 3.
pub(crate) fn shard(stem: &str) -> Option<(&str, u32, u32)> {
    let (rest, total) = stem.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    let digits = |text: &str| (text.len() == 5 && text.bytes().all(|c| c.is_ascii_digit())).then_some(());
    digits(total).and(digits(number))?;
    Some((stem, number.parse().ok()?, total.parse().ok()?))
}

/// The first shard that a group of GGUF files lacks.
fn missing_shard(files: &[String]) -> Option<String> {
    let (stem, _, total) = shard(files.first()?.strip_suffix(".gguf")?)?;
    (1..=total).map(|number| format!("{stem}-{number:05}-of-{total:05}.gguf")).find(|name| !files.contains(name))
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

#[derive(Deserialize)]
struct Index {
    weight_map: Shards,
}

/// The files of a `weight_map`. It has a line for each tensor, of which only the file is kept, and that once.
struct Shards(BTreeSet<String>);

impl<'de> Deserialize<'de> for Shards {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Map;
        impl<'de> Visitor<'de> for Map {
            type Value = Shards;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map from tensors to files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Shards, A::Error> {
                let mut shards = BTreeSet::new();
                while let Some((_, file)) = map.next_entry::<IgnoredAny, Cow<'_, str>>()? {
                    if !shards.contains(&*file) {
                        shards.insert(file.into_owned());
                    }
                    if shards.len() > SHARDS_MAX {
                        break;
                    }
                }
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(Shards(shards))
            }
        }
        deserializer.deserialize_map(Map)
    }
}

/// The shard names of an index file, sorted; `Err` says what is wrong with it.
pub(crate) fn index_shards(index: &[u8]) -> Result<Vec<String>, String> {
    let Index { weight_map: Shards(shards) } = serde_json::from_slice(index).map_err(|error| error.to_string())?;
    let shards: Vec<String> = shards.into_iter().collect();
    if shards.is_empty() || shards.len() > SHARDS_MAX {
        return Err(format!("`weight_map` names {} files; 1 to {SHARDS_MAX} are read", shards.len()));
    }
    if let Some(bad) = shards.iter().find(|name| !plain_relative(name) || !name.ends_with(".safetensors")) {
        return Err(format!(
            "`weight_map` names `{}`, which is no file of this model",
            bad.chars().take(200).collect::<String>()
        ));
    }
    Ok(shards)
}

#[cfg(test)]
mod tests {
    use mesh_core::Hint;

    use super::*;

    fn pick(files: &[&str], want: Want, quant: Option<&str>) -> Result<Choice, FetchError> {
        let files: Vec<String> = files.iter().map(|file| (*file).to_owned()).collect();
        choose("o/r", &files, want, quant)
    }

    #[test]
    fn one_kind_needs_no_flag() {
        assert_eq!(pick(&["config.json", INDEX, "model.safetensors"], Want::Any, None).unwrap(), Choice::Indexed);
        assert_eq!(
            pick(&["model.safetensors", "reference.safetensors"], Want::Any, None).unwrap(),
            Choice::Safetensors(vec!["model.safetensors".into()])
        );
        assert_eq!(
            pick(&["mmproj-x.gguf", "x.Q4_1.gguf"], Want::Any, None).unwrap(),
            Choice::Gguf(vec!["x.Q4_1.gguf".into()])
        );
    }

    #[test]
    fn both_kinds_need_one() {
        let files = ["model.safetensors", "model.gguf"];
        let error = pick(&files, Want::Any, None).unwrap_err();
        assert_eq!(
            error.hint().unwrap(),
            "say which one:\n  mesh-llm --model o/r --mlx\n  mesh-llm --model o/r --gguf"
        );
        assert!(matches!(pick(&files, Want::Gguf, None), Ok(Choice::Gguf(_))));
        assert!(matches!(pick(&files, Want::Safetensors, None), Ok(Choice::Safetensors(_))));
    }

    #[test]
    fn quantizations_are_words() {
        let files =
            ["m-Q4_K_M.gguf", "m-Q4_K_S.gguf", "big/m-Q8_0-00001-of-00002.gguf", "big/m-Q8_0-00002-of-00002.gguf"];
        assert_eq!(pick(&files, Want::Any, Some("q4_k_m")).unwrap(), Choice::Gguf(vec!["m-Q4_K_M.gguf".into()]));
        assert_eq!(
            pick(&files, Want::Any, Some("Q8_0")).unwrap(),
            Choice::Gguf(vec![files[2].into(), files[3].into()])
        );
        for quant in [None, Some("Q4_K")] {
            let error = pick(&files, Want::Any, quant).unwrap_err();
            assert!(error.hint().unwrap().contains("mesh-llm --model o/r/m-Q4_K_S.gguf"), "{error}");
        }
    }

    #[test]
    fn incomplete_and_missing_sets_are_named() {
        let error = pick(&["m-00001-of-00003.gguf", "m-00003-of-00003.gguf"], Want::Any, None).unwrap_err();
        assert!(error.to_string().contains("m-00002-of-00003.gguf"), "{error}");
        let error = pick(&["model.safetensors"], Want::Gguf, None).unwrap_err();
        assert_eq!(error.to_string(), "o/r has no GGUF weights, only safetensors");
        let error = pick(&["README.md"], Want::Any, None).unwrap_err();
        assert_eq!(error.to_string(), "o/r has no weights");
    }

    #[test]
    fn an_index_cannot_reach_outside() {
        let index = |name: &str| format!(r#"{{"weight_map": {{"a": "{name}"}}}}"#);
        assert_eq!(index_shards(index("model.safetensors").as_bytes()).unwrap(), ["model.safetensors"]);
        for bad in ["../x.safetensors", "/x.safetensors", "x.bin", "", "C:x.safetensors"] {
            assert!(index_shards(index(bad).as_bytes()).is_err(), "{bad}");
        }
        assert!(index_shards(b"{}").is_err());
        assert!(index_shards(br#"{"weight_map": {}}"#).is_err());
    }
}
