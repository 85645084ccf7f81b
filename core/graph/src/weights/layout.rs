//! Other names and layouts of the same weights, brought to the ones that graphs ask for. Nothing is computed before it
//! is evaluated; where rows stay in order, nothing is copied either.

use std::collections::{HashMap, HashSet};

use mlx_rs::{Array, Dtype, ops, ops::indexing};

use super::{Source, Tensor, Weights};
use crate::{
    ffi::{self, Mode},
    model::GraphError,
    quantization::{Fp8, Scheme},
};

/// Names that multimodal wrappers put before those of the language model.
const WRAPPED: &[(&str, &str)] = &[
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
];

/// The wrapper that the last two of these share.
const OUTER: &str = "language_model.";

/// Mixtral's names for a mixture and its experts' projections, which others have taken over, and the usual ones.
pub const MIXTRAL_NAMES: &[(&str, &str)] =
    &[(".w1.", ".gate_proj."), (".w2.", ".down_proj."), (".w3.", ".up_proj."), (".block_sparse_moe.", ".mlp.")];

/// What may stand behind a matrix's name.
const PARTS: [&str; 4] = ["weight", "scales", "biases", "bias"];

impl Weights {
    /// Replaces `from` by `to` wherever it stands in a name.
    pub fn rename(&mut self, pairs: &[(&str, &str)]) {
        let Source::Files(tensors) = &mut self.source else { return };
        // Of all pairs: what stands in a place under one of the names may be missing there under another.
        let in_name = |name: &String| -> Vec<String> {
            pairs.iter().filter_map(|(from, _)| Some(name[..name.find(from)?].to_owned())).collect()
        };
        let places: HashSet<String> = tensors.keys().flat_map(in_name).collect();
        for (from, to) in pairs {
            if !tensors.keys().any(|name| name.contains(from)) {
                continue;
            }
            let all = std::mem::take(tensors);
            tensors.extend(all.into_iter().map(|(name, tensor)| (name.replace(from, to), tensor)));
            self.renamed.push(Renamed { from: (*from).to_owned(), to: (*to).to_owned(), places: Some(places.clone()) });
        }
    }

    /// Takes the language model's names out of a multimodal wrapper's, and leaves out what begins with any of
    /// `prefixes`: parts that are known and not computed, such as a vision tower.
    pub fn text_part(&mut self, prefixes: &[&str]) {
        self.leave_out(prefixes);
        let Source::Files(tensors) = &mut self.source else { return };
        let has = |prefix: &str| tensors.keys().any(|name| name.starts_with(prefix));
        // Of two names in one wrapper, one may be missing.
        let present: Vec<_> =
            WRAPPED.iter().filter(|(from, _)| has(from) || from.starts_with(OUTER) && has(OUTER)).collect();
        for (from, to) in present {
            let all = std::mem::take(tensors);
            tensors.extend(all.into_iter().map(|(name, tensor)| match name.strip_prefix(from) {
                Some(rest) => (format!("{to}{rest}"), tensor),
                None => (name, tensor),
            }));
            let places = Some([String::new()].into());
            self.renamed.push(Renamed { from: (*from).to_owned(), to: (*to).to_owned(), places });
        }
    }

    /// Drops the tensors whose names begin with any of `prefixes`, or with `model.` and any of them.
    pub fn leave_out(&mut self, prefixes: &[&str]) {
        if let Source::Files(tensors) = &mut self.source {
            tensors.retain(|name, _| {
                let inner = name.strip_prefix("model.").unwrap_or(name);
                !prefixes.iter().any(|prefix| name.starts_with(prefix) || inner.starts_with(prefix))
            });
        }
    }

    /// Drops the tensors whose names end with any of `endings`.
    pub fn leave_out_endings(&mut self, endings: &[&str]) {
        if let Source::Files(tensors) = &mut self.source {
            tensors.retain(|name, _| !endings.iter().any(|ending| name.ends_with(ending)));
        }
    }

    /// The name a graph asks for, as the checkpoint would have it.
    pub(super) fn published(&self, name: &str) -> String {
        self.renamed.iter().rev().fold(name.to_owned(), |name, Renamed { from, to, places }| match name.find(to) {
            Some(at) if places.as_ref().is_none_or(|places| places.contains(&name[..at])) => {
                format!("{}{from}{}", &name[..at], &name[at + to.len()..])
            }
            _ => name,
        })
    }

    fn tensors(&mut self) -> Option<&mut HashMap<String, Tensor>> {
        match &mut self.source {
            Source::Files(tensors) => Some(tensors),
            Source::Random { .. } => None,
        }
    }

    /// Splits the matrix `name` of `inner` columns, with all that belongs to it, into consecutive rows under other names.
    /// Does nothing where the parts stand there already.
    pub fn split_rows(&mut self, name: &str, inner: i32, parts: &[(&str, i32)]) -> Result<(), GraphError> {
        let total: i32 = parts.iter().map(|(_, rows)| rows).sum();
        let split = parts.iter().all(|(to, _)| self.has(&format!("{to}.weight")));
        if !split && self.tensors().is_some() && !self.has(&format!("{name}.weight")) {
            let name = self.published(&format!("{name}.weight"));
            return Err(GraphError::Weights(format!("tensor `{name}` of shape {:?} is missing", [total, inner])));
        }
        self.parts_of(name, total, |array, axis| {
            let mut start = 0;
            let mut split = Vec::new();
            for (to, rows) in parts {
                split.push(((*to).to_owned(), rows_of(array, axis, start, start + rows)?));
                start += rows;
            }
            Ok(split)
        })
    }

    /// Splits a matrix whose rows alternate between `even` and `odd`, of `rows` each.
    pub fn split_alternating_rows(&mut self, name: &str, rows: i32, even: &str, odd: &str) -> Result<(), GraphError> {
        self.parts_of(name, 2 * rows, |array, axis| {
            let every_other = |first: i32| -> Result<Array, GraphError> {
                let picked: Vec<i32> = (0..rows).map(|row| 2 * row + first).collect();
                picked_rows(array, &picked, axis)
            };
            Ok(vec![(even.to_owned(), every_other(0)?), (odd.to_owned(), every_other(1)?)])
        })
    }

    /// Puts the rows of a matrix in another order: row `i` becomes what `order[i]` was. Does nothing where there is no
    /// such matrix.
    pub fn reorder_rows(&mut self, name: &str, order: &[i32]) -> Result<(), GraphError> {
        let rows = order.len() as i32;
        self.parts_of(name, rows, |array, axis| Ok(vec![(name.to_owned(), picked_rows(array, order, axis)?)]))
    }

    /// Replaces each part of the matrix `name`, which has so many rows, by what `change` makes of it, along the axis that
    /// counts rows.
    fn parts_of(
        &mut self,
        name: &str,
        rows: i32,
        change: impl Fn(&Array, i32) -> Result<Vec<(String, Array)>, GraphError>,
    ) -> Result<(), GraphError> {
        self.unpack_fp8(name)?;
        let Some(tensors) = self.tensors() else { return Ok(()) };
        let mut renamed = Vec::new();
        for part in PARTS {
            let Some(tensor) = tensors.remove(&format!("{name}.{part}")) else { continue };
            let axis = tensor.array.ndim() as i32 - if part == "bias" { 1 } else { 2 };
            if axis < 0 || tensor.array.dim(axis) != rows {
                let (name, shape) = (&tensor.published, tensor.array.shape());
                return Err(GraphError::Weights(format!("tensor `{name}` has shape {shape:?}, not {rows} rows")));
            }
            for (to, array) in change(&tensor.array, axis)? {
                if to != name {
                    renamed.push(Renamed { from: name.to_owned(), to: to.clone(), places: None });
                }
                tensors.insert(format!("{to}.{part}"), Tensor { array, published: tensor.published.clone() });
            }
        }
        self.renamed.extend(renamed);
        Ok(())
    }

    /// Experts in MXFP4 as published: `{name}_blocks` of `[experts, out, in / 32, 16]` bytes with `{name}_scales` and
    /// `{name}_bias`, which become `{name}.weight`, `.scales` and `.bias`. Does nothing where they are not.
    pub fn unpack_mxfp4_blocks(&mut self, name: &str) -> Result<(), GraphError> {
        let published = |part| self.published(&format!("{name}_{part}"));
        let missing = match (self.shape(&format!("{name}_blocks")), self.shape(&format!("{name}_scales"))) {
            (None, None) => return Ok(()),
            (Some([experts, out, groups, _]), None) => Some((published("scales"), vec![*experts, *out, *groups])),
            (None, Some(scales)) => Some((published("blocks"), [scales, &[16]].concat())),
            _ => None,
        };
        if let Some((name, shape)) = missing {
            return Err(GraphError::Weights(format!("tensor `{name}` of shape {shape:?} is missing")));
        }
        let (from, to) = (format!("{name}_bias"), format!("{name}.bias"));
        self.renamed.push(Renamed { from, to, places: None });
        let Some(tensors) = self.tensors() else { return Ok(()) };
        for (from, to) in [("_blocks", ".weight"), ("_scales", ".scales"), ("_bias", ".bias")] {
            let Some(Tensor { array, published }) = tensors.remove(&format!("{name}{from}")) else { continue };
            // Low nibble first in both, so the bytes are MLX's words already.
            let array = match (from, array.shape()) {
                ("_blocks", [experts, out, groups, 16]) => {
                    let shape = [*experts, *out, groups * 4];
                    array.reshape(&[*experts, *out, groups * 16])?.view_dtype(Dtype::Uint32)?.reshape(&shape)?
                }
                ("_blocks", shape) => {
                    let what = format!("tensor `{published}` has shape {shape:?}, not [experts, out, in / 32, 16]");
                    return Err(GraphError::Weights(what));
                }
                _ => array,
            };
            let published = published.replace(from, to);
            tensors.insert(format!("{name}{to}"), Tensor { array, published });
        }
        let scheme = Scheme { group_size: 32, bits: 4, mode: Mode::Mxfp4 };
        self.quantization.set_default(scheme);
        Ok(())
    }

    /// A matrix in 8-bit floats with `{name}.weight_scale_inv` becomes a plain one. Does nothing to others.
    pub(super) fn unpack_fp8(&mut self, name: &str) -> Result<(), GraphError> {
        let Some(fp8) = self.quantization.fp8() else { return Ok(()) };
        let dtype = self.placement.floats.unwrap_or(Dtype::Bfloat16);
        let key = format!("{name}.weight");
        let scales_key = format!("{key}_scale_inv");
        let missing = self.published(&scales_key);
        let Some(tensors) = self.tensors() else { return Ok(()) };
        // How inputs would be scaled; they are not.
        tensors.remove(&format!("{name}.activation_scale"));
        tensors.remove(&format!("{name}.input_scale"));
        let Some(codes) = tensors.get(&key).filter(|codes| codes.array.dtype() == Dtype::Uint8) else { return Ok(()) };
        let [out, inner] = codes.array.shape()[..] else {
            return Err(GraphError::Weights(format!("tensor `{}` is no matrix", codes.published)));
        };
        let wanted = match fp8 {
            Fp8::Whole => Vec::new(),
            Fp8::Blocks([rows, columns]) => vec![(out + rows - 1) / rows, (inner + columns - 1) / columns],
        };
        let Some(scales) = tensors.remove(&scales_key) else {
            return Err(GraphError::Weights(format!("tensor `{missing}` of shape {wanted:?} is missing")));
        };
        if scales.array.shape() != wanted && (fp8 != Fp8::Whole || scales.array.size() != 1) {
            let (name, found) = (&scales.published, scales.array.shape());
            return Err(GraphError::Weights(format!("tensor `{name}` has shape {found:?}, not {wanted:?}")));
        }
        let scales = scales.array.as_dtype(Dtype::Float32)?;
        let scales = match fp8 {
            Fp8::Whole => scales.reshape(&[1, 1])?,
            Fp8::Blocks([rows, columns]) => {
                let spread = ops::repeat_axis::<f32>(ops::repeat_axis::<f32>(scales, rows, 0)?, columns, 1)?;
                ffi::slice(&spread, [0, 0], [out, inner])?
            }
        };
        if let Some(codes) = tensors.get_mut(&key) {
            codes.array = ffi::from_fp8(&codes.array, Dtype::Float32)?.multiply(scales)?.as_dtype(dtype)?;
        }
        Ok(())
    }

    /// A stack of matrices published the other way round, `[count, in, out]` and without `.weight`, becomes
    /// `{name}.weight`; its `{name}_bias` becomes `{name}.bias`. Does nothing where there is none.
    pub fn turn_stack(&mut self, name: &str) -> Result<(), GraphError> {
        let Some(tensors) = self.tensors() else { return Ok(()) };
        let Some(Tensor { array, published }) = tensors.remove(name) else { return Ok(()) };
        let array = array.swap_axes(-1, -2)?.contiguous()?;
        tensors.insert(format!("{name}.weight"), Tensor { array, published });
        if let Some(bias) = tensors.remove(&format!("{name}_bias")) {
            tensors.insert(format!("{name}.bias"), bias);
        }
        for (ending, to) in [("", ".weight"), ("_bias", ".bias")] {
            let (from, to) = (format!("{name}{ending}"), format!("{name}{to}"));
            self.renamed.push(Renamed { from, to, places: None });
        }
        Ok(())
    }
}

/// What was replaced in names, to tell the checkpoint's own in errors.
pub(super) struct Renamed {
    from: String,
    to: String,
    /// What stood before it; `None` where `from` is a whole name.
    places: Option<HashSet<String>>,
}

fn picked_rows(array: &Array, rows: &[i32], axis: i32) -> Result<Array, GraphError> {
    let rows = Array::from_slice(rows, &[rows.len() as i32]);
    Ok(indexing::take_axis(array, &rows, axis)?.contiguous()?)
}

/// Contiguous, which MLX's CUDA kernels for packed and gathered matrices need and do not see to; of a matrix that is no
/// stack, consecutive rows are so already and are not copied.
fn rows_of(array: &Array, axis: i32, start: i32, stop: i32) -> Result<Array, GraphError> {
    let shape = array.shape();
    let rows = match (shape, axis) {
        ([_], 0) => ffi::slice(array, [start], [stop])?,
        ([_, b], 0) => ffi::slice(array, [start, 0], [stop, *b])?,
        ([a, _], 1) => ffi::slice(array, [0, start], [*a, stop])?,
        ([a, _, c], 1) => ffi::slice(array, [0, start, 0], [*a, stop, *c])?,
        _ => return Err(GraphError::Weights(format!("a tensor of shape {shape:?} cannot be split by rows"))),
    };
    Ok(rows.contiguous()?)
}
