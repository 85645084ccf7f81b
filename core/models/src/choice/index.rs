//! The list of a sharded checkpoint's files.

use std::{collections::BTreeSet, fmt};

use serde::{
    Deserialize, Deserializer,
    de::{IgnoredAny, MapAccess, Visitor},
};

use crate::reference::plain_relative;

/// Name of that list.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Most shards a model may have.
pub(crate) const SHARDS_MAX: usize = 4096;

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
                while let Some((_, file)) = map.next_entry::<IgnoredAny, String>()? {
                    shards.insert(file);
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
