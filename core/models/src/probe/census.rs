//! What a checkpoint's tensors add up to: parameters, by what they are part of and how they are stored.

use std::collections::BTreeMap;

use mesh_core::{Part, Stored};

use super::safetensors::{Entry, Tensors};

/// Sums over tensors.
#[derive(Debug, Default)]
pub(super) struct Census {
    rows: BTreeMap<(Part, String), Stored>,
}

impl Census {
    /// Counts a tensor, or a part of one.
    pub fn add(&mut self, part: Part, form: String, tensors: u64, parameters: u64, bytes: u64) {
        let empty = || Stored { part, form: form.clone(), tensors: 0, parameters: 0, bytes: 0 };
        let row = self.rows.entry((part, form.clone())).or_insert_with(empty);
        row.tensors = row.tensors.saturating_add(tensors);
        row.parameters = row.parameters.saturating_add(parameters);
        row.bytes = row.bytes.saturating_add(bytes);
    }

    /// All parameters.
    pub fn parameters(&self) -> u64 {
        self.rows.values().fold(0, |sum, row| sum.saturating_add(row.parameters))
    }

    /// Those that one token meets, where it goes to `chosen` of `all` experts.
    pub fn active(&self, chosen: u32, all: u32) -> Option<u64> {
        let experts = self.rows.values().filter(|row| row.part == Part::Experts);
        let experts = experts.fold(0u64, |sum, row| sum.saturating_add(row.parameters));
        if experts == 0 || all == 0 || chosen > all {
            return None;
        }
        let met = u128::from(experts) * u128::from(chosen) / u128::from(all);
        Some(self.parameters().saturating_sub(experts).saturating_add(u64::try_from(met).ok()?))
    }

    /// The form that most values have.
    pub fn prevailing(&self) -> Option<&str> {
        let mut forms: BTreeMap<&str, u64> = BTreeMap::new();
        for row in self.rows.values() {
            let sum = forms.entry(&row.form).or_default();
            *sum = sum.saturating_add(row.parameters);
        }
        forms.into_iter().max_by_key(|(_, sum)| *sum).map(|(form, _)| form)
    }

    /// The rows, by part.
    pub fn stored(self) -> Vec<Stored> {
        self.rows.into_values().collect()
    }
}

/// How the matrices of a checkpoint are packed, by their modules' names.
pub(super) struct Packing<'a> {
    /// `mode`: `affine`, `mxfp4` …
    pub mode: &'a str,
    /// Values that share a scale, by module.
    pub group_size: &'a dyn Fn(&str) -> u64,
}

/// Counts the tensors of a checkpoint, codes as the values they stand for.
pub(super) fn checkpoint(tensors: &Tensors, packing: &Packing<'_>) -> Census {
    let mut census = Census::default();
    let entries = &tensors.entries;
    let form = |module: &str| {
        let (weight, scales) = (&entries.get(&format!("{module}.weight")), &entries[&format!("{module}.scales")]);
        let group = (packing.group_size)(module);
        let affine = entries.contains_key(&format!("{module}.biases"));
        let mode = if affine { "affine" } else { packing.mode };
        let values = scales.columns.saturating_mul(group).max(1);
        let bits = weight.map_or(0, |weight| weight.columns.saturating_mul(32) / values);
        format!("{mode} {bits}-bit group {group}")
    };
    for (name, entry) in entries {
        let Entry { dtype, elements, bytes, .. } = *entry;
        let part = Part::of(name);
        let has = |name: &str| entries.contains_key(name);
        let packed = |ending: &str| {
            let module = name.strip_suffix(ending)?;
            has(&format!("{module}.scales")).then_some(module)
        };
        if let Some(module) = packed(".scales") {
            // One scale stands for one group, however many bits its codes have.
            let values = elements.saturating_mul((packing.group_size)(module));
            census.add(part, form(module), 1, values, bytes);
        } else if let Some(module) = packed(".biases").or_else(|| packed(".weight")) {
            census.add(part, form(module), 0, 0, bytes);
        } else if name.ends_with("_scales") && has(&name.replace("_scales", "_blocks")) {
            census.add(part, "mxfp4 4-bit group 32".into(), 1, elements.saturating_mul(32), bytes);
        } else if name.ends_with("_blocks") && has(&name.replace("_blocks", "_scales")) {
            census.add(part, "mxfp4 4-bit group 32".into(), 0, 0, bytes);
        } else if let Some(scaled) = name.strip_suffix("_scale_inv").and_then(|name| entries.get(name)) {
            census.add(part, format!("{:?}", scaled.dtype), 0, 0, bytes);
        } else {
            census.add(part, format!("{dtype:?}"), 1, elements, bytes);
        }
    }
    census
}
