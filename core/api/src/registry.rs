//! Discovery of what the binary links. `inventory` promises no order and finds only what is linked, hence sorted views,
//! duplicates refused at start-up naming both, and unknown names answered with the known ones.

use std::{collections::BTreeMap, fmt, sync::OnceLock};

use crate::{
    backend::InferenceBackend,
    family::{self, ModelFamily},
    profile::ModelProfile,
};

/// A sorted view of everything registered of one kind.
pub struct Registry<T: ?Sized + 'static> {
    kind: &'static str,
    entries: BTreeMap<&'static str, (&'static T, &'static str)>,
}

/// Two registrations that exclude each other; the process must not start.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{kind} `{name}` is registered twice: by {first} and by {second}")]
pub struct RegistryError {
    /// `backend`, `family` …
    pub kind: &'static str,
    /// What both claim.
    pub name: String,
    /// Module path of one.
    pub first: &'static str,
    /// Module path of the other.
    pub second: &'static str,
}

/// A name nobody registered.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("no {kind} is called `{name}`; there are: {}", .known.join(", "))]
pub struct UnknownName {
    /// `backend`, `family` …
    pub kind: &'static str,
    /// What was asked for.
    pub name: String,
    /// What there is, sorted.
    pub known: Vec<&'static str>,
}

impl<T: ?Sized> Registry<T> {
    /// Collects `(id, origin, entry)` triples; `origin` is the registering module's path.
    pub fn collect(
        kind: &'static str,
        found: impl IntoIterator<Item = (&'static str, &'static str, &'static T)>,
    ) -> Result<Self, RegistryError> {
        let mut entries = BTreeMap::new();
        for (id, origin, entry) in found {
            if let Some((_, other)) = entries.insert(id, (entry, origin)) {
                let (first, second) = if other < origin { (other, origin) } else { (origin, other) };
                return Err(RegistryError { kind, name: id.to_owned(), first, second });
            }
        }
        Ok(Self { kind, entries })
    }

    /// The entry of that id.
    pub fn get(&self, name: &str) -> Result<&'static T, UnknownName> {
        self.entries.get(name).map(|(entry, _)| *entry).ok_or_else(|| UnknownName {
            kind: self.kind,
            name: name.to_owned(),
            known: self.ids(),
        })
    }

    /// All ids, sorted.
    pub fn ids(&self) -> Vec<&'static str> {
        self.entries.keys().copied().collect()
    }

    /// All entries, sorted by id.
    pub fn iter(&self) -> impl Iterator<Item = &'static T> + '_ {
        self.entries.values().map(|(entry, _)| *entry)
    }

    /// Number of entries.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// True if nothing is registered.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    fn origins(&self) -> impl Iterator<Item = (&'static T, &'static str)> + '_ {
        self.entries.values().copied()
    }
}

impl<T: ?Sized> fmt::Debug for Registry<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Registry").field("kind", &self.kind).field("ids", &self.ids()).finish()
    }
}

/// A backend's registration; made by [`register_backend!`](crate::register_backend).
pub struct BackendEntry {
    /// The backend.
    pub backend: &'static dyn InferenceBackend,
    /// Module path of the registration.
    pub origin: &'static str,
}
inventory::collect!(BackendEntry);

/// A family's registration; made by `mesh_graph::register_family!`.
pub struct FamilyEntry {
    /// The family.
    pub family: &'static dyn ModelFamily,
    /// Module path of the registration.
    pub origin: &'static str,
}
inventory::collect!(FamilyEntry);

/// Registers a `static` backend.
#[macro_export]
macro_rules! register_backend {
    ($backend:expr) => {
        $crate::__inventory::submit! {
            $crate::registry::BackendEntry { backend: $backend, origin: ::core::module_path!() }
        }
    };
}

/// Every linked backend.
pub fn backends() -> Result<&'static Registry<dyn InferenceBackend>, RegistryError> {
    static ALL: OnceLock<Result<Registry<dyn InferenceBackend>, RegistryError>> = OnceLock::new();
    ALL.get_or_init(|| {
        let found = inventory::iter::<BackendEntry>.into_iter();
        Registry::collect("backend", found.map(|entry| (entry.backend.info().id, entry.origin, entry.backend)))
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// Every linked family. Besides ids, the names they claim have to be unique.
pub fn families() -> Result<&'static Registry<dyn ModelFamily>, RegistryError> {
    static ALL: OnceLock<Result<Registry<dyn ModelFamily>, RegistryError>> = OnceLock::new();
    ALL.get_or_init(|| {
        let found = inventory::iter::<FamilyEntry>.into_iter();
        let all = Registry::collect("family", found.map(|entry| (entry.family.id(), entry.origin, entry.family)))?;
        unique_claims(&all)?;
        Ok(all)
    })
    .as_ref()
    .map_err(Clone::clone)
}

/// Checks that no two families claim the same name.
pub fn unique_claims(families: &Registry<dyn ModelFamily>) -> Result<(), RegistryError> {
    let mut seen: BTreeMap<(&str, &str), &'static str> = BTreeMap::new();
    for (family, origin) in families.origins() {
        let claims = family.claims();
        let lists = [
            ("model_type", claims.model_types),
            ("architecture", claims.architectures),
            ("GGUF architecture", claims.gguf_architectures),
        ];
        for (kind, name) in lists.iter().flat_map(|(kind, names)| names.iter().map(|name| (*kind, *name))) {
            if let Some(first) = seen.insert((kind, name), origin) {
                return Err(RegistryError { kind: "family", name: format!("{kind} {name}"), first, second: origin });
            }
        }
    }
    Ok(())
}

/// The family that claims a model, if any does.
pub fn family_of(families: &Registry<dyn ModelFamily>, profile: &ModelProfile) -> Option<&'static dyn ModelFamily> {
    families.iter().find(|candidate| family::claims(*candidate, profile))
}

#[cfg(test)]
mod tests {
    use super::*;

    static ONE: u8 = 1;
    static TWO: u8 = 2;

    #[test]
    fn entries_are_sorted_and_unknown_names_answered() {
        let all: Registry<u8> = Registry::collect("thing", [("b", "m::b", &TWO), ("a", "m::a", &ONE)]).unwrap();
        assert_eq!(all.ids(), ["a", "b"]);
        assert_eq!(all.iter().copied().collect::<Vec<_>>(), [1, 2]);
        let error = all.get("c").unwrap_err();
        assert_eq!(error.to_string(), "no thing is called `c`; there are: a, b");
    }

    #[test]
    fn duplicates_name_both_whatever_the_order() {
        let found = [("a", "m::first", &ONE), ("a", "m::second", &TWO)];
        let mut reversed = found;
        reversed.reverse();
        for found in [found, reversed] {
            let error = Registry::collect("thing", found).err().unwrap();
            assert_eq!(error.to_string(), "thing `a` is registered twice: by m::first and by m::second");
        }
    }
}
