//! Which tensors an import writes, and what is in them.

use std::{borrow::Cow, collections::BTreeSet};

use safetensors::{Dtype, View};

use super::{Manner, config::Model, repack};
use crate::{
    error::ImportError,
    gguf::{Block, GROUP, Gguf, Group, Packing, Tensor, TensorType},
};

/// A tensor to be written.
#[derive(Debug)]
pub(super) struct Output<'a> {
    pub name: String,
    pub dtype: Dtype,
    /// What the GGUF stores it as.
    pub kind: TensorType,
    /// The slowest dimension first.
    pub shape: Vec<usize>,
    /// Rows of the GGUF's tensor.
    rows: &'a [u8],
    row_bytes: usize,
    /// Rows of one head, where they have to be put back in order.
    permuted: Option<usize>,
    part: Part,
}

/// What of the source an output holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// All of it, as it is.
    Whole,
    /// The codes of affine groups, of that many bits.
    Codes(Block, usize),
    /// The groups' scales; codes have that many bits.
    Scales(Block, usize),
    Biases(Block, usize),
    /// The values, in 32-bit floats.
    Values(Packing),
    /// The same, less one.
    LessOne(Packing),
}

impl Output<'_> {
    /// The module and the bits of its codes, if this is a quantized weight.
    pub fn quantized(&self) -> Option<(&str, usize)> {
        match self.part {
            Part::Codes(_, bits) => Some((self.name.strip_suffix(".weight")?, bits)),
            _ => None,
        }
    }

    /// How it is stored, in words; `None` for what belongs to another output.
    pub fn form(&self) -> Option<String> {
        match self.part {
            Part::Codes(_, bits) => Some(format!("affine {bits}-bit group {GROUP}")),
            Part::Scales(..) | Part::Biases(..) => None,
            Part::Whole | Part::Values(_) | Part::LessOne(_) => Some(format!("{:?}", self.dtype)),
        }
    }

    /// Appends the values of a row of the source, as the output shall have them.
    pub fn values(&self, row: &[u8], out: &mut Vec<f32>) {
        let start = out.len();
        if let Some(packing) = Packing::of(self.kind) {
            packing.values(row, out);
        }
        if matches!(self.part, Part::LessOne(_)) {
            out[start..].iter_mut().for_each(|value| *value -= 1.0);
        }
    }

    /// Appends the values of a row of `written`, where that holds floats.
    pub fn written_values(&self, written: &[u8], row: usize, count: usize, out: &mut Vec<f32>) {
        let packing = match self.dtype {
            Dtype::F16 => Packing::F16,
            Dtype::BF16 => Packing::BF16,
            _ => Packing::F32,
        };
        let bytes = count * packing.bytes();
        packing.values(&written[row * bytes..(row + 1) * bytes], out);
    }

    /// The source's rows in the order of the output.
    pub fn ordered(&self) -> impl Iterator<Item = &[u8]> {
        let count = self.rows.len() / self.row_bytes;
        (0..count).map(move |row| {
            let from = self.permuted.map_or(row, |head| unpermuted(row, head));
            &self.rows[from * self.row_bytes..(from + 1) * self.row_bytes]
        })
    }

    fn content(&self) -> Cow<'_, [u8]> {
        if self.part == Part::Whole && self.permuted.is_none() {
            return Cow::Borrowed(self.rows);
        }
        let mut out = Vec::with_capacity(self.bytes());
        let mut floats = Vec::new();
        for row in self.ordered() {
            match self.part {
                Part::Whole => out.extend_from_slice(row),
                Part::Codes(block, bits) => {
                    groups(block, bits, row, |group| repack::pack(&group.codes, bits, &mut out))
                }
                Part::Scales(block, bits) => groups(block, bits, row, |group| out.extend(group.scale.to_le_bytes())),
                Part::Biases(block, bits) => groups(block, bits, row, |group| out.extend(group.bias.to_le_bytes())),
                Part::Values(packing) | Part::LessOne(packing) => {
                    let less = if matches!(self.part, Part::LessOne(_)) { 1.0 } else { 0.0 };
                    floats.clear();
                    packing.values(row, &mut floats);
                    out.extend(floats.iter().flat_map(|value| (value - less).to_le_bytes()));
                }
            }
        }
        Cow::Owned(out)
    }

    /// Its size where it is written.
    pub fn bytes(&self) -> usize {
        self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8
    }
}

/// Hands the affine groups of a row to `each`: those its blocks have, or else new ones with codes of so many bits.
fn groups(block: Block, bits: usize, row: &[u8], mut each: impl FnMut(&Group)) {
    let mut values = Vec::new();
    for stored in row.chunks_exact(block.bytes()) {
        if block.affine_bits().is_some() {
            block.groups(stored, &mut each);
            continue;
        }
        values.clear();
        block.values(stored, &mut values);
        values.as_chunks().0.iter().for_each(|values| each(&repack::quantized(values, bits)));
    }
}

/// Where llama.cpp put row `row` of a head of `head` rows: it interleaves the two halves that rotate together.
fn unpermuted(row: usize, head: usize) -> usize {
    let (first, within) = (row - row % head, row % head);
    let (half, pair) = (within / (head / 2), within % (head / 2));
    first + 2 * pair + half
}

/// An output that tells when it is written.
pub(super) struct Ticking<'a, F: Fn()> {
    pub output: &'a Output<'a>,
    pub tick: &'a F,
}

impl<F: Fn()> View for Ticking<'_, F> {
    fn dtype(&self) -> Dtype {
        self.output.dtype
    }

    fn shape(&self) -> &[usize] {
        &self.output.shape
    }

    fn data(&self) -> Cow<'_, [u8]> {
        (self.tick)();
        self.output.content()
    }

    fn data_len(&self) -> usize {
        self.output.bytes()
    }
}

/// Every tensor of the GGUF as outputs; one that has no place, or cannot be repacked, is an error.
pub(super) fn plan<'a, D: AsRef<[u8]>>(
    ggufs: &'a [Gguf<D>],
    model: &Model,
    manner: Manner,
) -> Result<Vec<Output<'a>>, ImportError> {
    let mut outputs = Vec::new();
    let mut seen = BTreeSet::new();
    let tensors = ggufs.iter().flat_map(|gguf| gguf.tensors.iter().map(move |tensor| (gguf, tensor)));
    for (gguf, tensor) in tensors.filter(|(_, tensor)| tensor.name != super::rope::FACTORS) {
        let Some((module, leaf)) = rename(&tensor.name, model) else {
            return Err(ImportError::UnknownTensor {
                tensor: tensor.name.clone(),
                architecture: model.architecture.name.to_owned(),
            });
        };
        if !seen.insert(&tensor.name) {
            return Err(setting(&tensor.name, "it is there twice"));
        }
        let permuted = permuted(tensor, &module, model)?;
        let rows = gguf.tensor_data(tensor).ok_or_else(|| refused(tensor))?;
        let sizes: Option<Vec<usize>> = tensor.shape.iter().rev().map(|size| usize::try_from(*size).ok()).collect();
        let Some(shape) = sizes.filter(|shape| shape.len() <= 2) else {
            return Err(setting(&tensor.name, "it has more than two dimensions"));
        };
        let count = if shape.len() == 1 && permuted.is_some() { shape[0] } else { tensor.rows() };
        let row_bytes = rows.len() / count;
        let kind = tensor.kind;
        let output =
            |name: String, dtype, shape, part| Output { name, dtype, kind, shape, rows, row_bytes, permuted, part };
        let packing = Packing::of(tensor.kind).ok_or_else(|| refused(tensor))?;
        if model.architecture.norms_with_one && module.ends_with("norm") {
            outputs.push(output(format!("{module}.{leaf}"), Dtype::F32, shape, Part::LessOne(packing)));
            continue;
        }
        let block = match packing {
            Packing::F32 | Packing::F16 | Packing::BF16 => {
                let dtype = match packing {
                    Packing::F16 => Dtype::F16,
                    Packing::BF16 => Dtype::BF16,
                    _ => Dtype::F32,
                };
                outputs.push(output(format!("{module}.{leaf}"), dtype, shape, Part::Whole));
                continue;
            }
            Packing::Blocks(block) => block,
        };
        if leaf != "weight" || shape.len() != 2 {
            return Err(refused(tensor));
        }
        let anew = Some(block.bits_anew()).filter(|_| manner == Manner::Compact);
        let Some(bits) = block.affine_bits().or(anew) else {
            outputs.push(output(format!("{module}.{leaf}"), Dtype::F32, shape, Part::Values(packing)));
            continue;
        };
        let (out, groups) = (shape[0], shape[1] / GROUP);
        let codes = vec![out, groups * bits];
        outputs.push(output(format!("{module}.weight"), Dtype::U32, codes, Part::Codes(block, bits)));
        outputs.push(output(format!("{module}.scales"), Dtype::F32, vec![out, groups], Part::Scales(block, bits)));
        outputs.push(output(format!("{module}.biases"), Dtype::F32, vec![out, groups], Part::Biases(block, bits)));
    }
    Ok(outputs)
}

fn refused(tensor: &Tensor) -> ImportError {
    ImportError::TensorType { tensor: tensor.name.clone(), kind: tensor.kind.to_string(), known: importable() }
}

/// The types that an import takes.
fn importable() -> Vec<&'static str> {
    ["F32", "F16", "BF16"].into_iter().chain(Block::NAMES.iter().copied()).collect()
}

fn setting(key: &str, what: impl Into<String>) -> ImportError {
    ImportError::Setting { key: key.to_owned(), what: what.into() }
}

/// The rows of a head, for the tensors whose rows llama.cpp reorders.
fn permuted(tensor: &Tensor, module: &str, model: &Model) -> Result<Option<usize>, ImportError> {
    let heads = match module.rsplit('.').next() {
        Some("q_proj") => model.heads,
        Some("k_proj") => model.kv_heads,
        _ => return Ok(None),
    };
    let rows = tensor.shape.last().copied().unwrap_or(0);
    let expected = u64::from(heads) * u64::from(model.head_dim);
    if rows != expected {
        return Err(setting(&tensor.name, format!("it has {rows} rows; {heads} heads have {expected}")));
    }
    Ok(model.architecture.permuted.then_some(model.head_dim as usize))
}

/// Module and leaf that a GGUF tensor is called in a checkpoint.
fn rename(name: &str, model: &Model) -> Option<(String, &'static str)> {
    let (stem, leaf) = match name.rsplit_once('.')? {
        (stem, "weight") => (stem, "weight"),
        (stem, "bias") => (stem, "bias"),
        _ => return None,
    };
    let top = match stem {
        "token_embd" => Some("model.embed_tokens"),
        "output_norm" => Some("model.norm"),
        "output" => Some("lm_head"),
        _ => None,
    };
    if let Some(top) = top {
        return (leaf == "weight").then(|| (top.to_owned(), leaf));
    }
    let (layer, part) = stem.strip_prefix("blk.")?.split_once('.')?;
    let layer: u32 = layer.parse().ok().filter(|layer| *layer < model.layers)?;
    if let Some((_, norm)) = model.architecture.norms.iter().find(|(name, _)| *name == part) {
        return (leaf == "weight").then(|| (format!("model.layers.{layer}.{norm}"), leaf));
    }
    let elsewhere = model.architecture.bias_everywhere;
    let (part, may_bias) = match part {
        "attn_q" => ("self_attn.q_proj", true),
        "attn_k" => ("self_attn.k_proj", true),
        "attn_v" => ("self_attn.v_proj", true),
        "attn_output" => ("self_attn.o_proj", elsewhere),
        "ffn_gate" => ("mlp.gate_proj", elsewhere),
        "ffn_up" => ("mlp.up_proj", elsewhere),
        "ffn_down" => ("mlp.down_proj", elsewhere),
        _ => return None,
    };
    (leaf == "weight" || may_bias).then(|| (format!("model.layers.{layer}.{part}"), leaf))
}
