//! Which tensors of a shard are quantized, and what is written for each.

use std::{collections::BTreeMap, fs::File, ops::Range, path::Path};

use memmap2::Mmap;
use mesh_core::Part;
use mesh_graph::Scheme;
use safetensors::{Dtype, SafeTensors};

use super::ConvertError;

/// Bytes before a header, which hold its length.
const LENGTH_BYTES: usize = 8;

/// A tensor of the source.
#[derive(Clone, Debug)]
pub(super) struct Planned {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Where it lies in its file.
    pub span: Range<usize>,
    /// How it is quantized, or why it is left as it is.
    treatment: Result<Scheme, &'static str>,
    /// Where it goes in a stack, if it is an expert's.
    stack: Option<Stack>,
}

/// A place in a stack of experts' matrices.
#[derive(Clone, Debug, PartialEq)]
struct Stack {
    module: String,
    index: usize,
    count: usize,
}

/// A tensor to be written.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Output {
    pub name: String,
    pub dtype: Dtype,
    pub shape: Vec<usize>,
}

impl Output {
    pub fn bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.bitsize() / 8) as u64
    }
}

impl Planned {
    pub fn scheme(&self) -> Option<Scheme> {
        self.treatment.ok()
    }

    /// Why it is left as it is, where it is.
    pub fn kept(&self) -> Option<&'static str> {
        self.treatment.err()
    }

    pub fn values(&self) -> u64 {
        self.shape.iter().product::<usize>() as u64
    }

    pub fn bytes(&self) -> u64 {
        self.span.len() as u64
    }

    /// Values of a row.
    pub fn columns(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// How it will be stored, in words.
    pub fn form(&self) -> String {
        match self.treatment {
            Ok(Scheme { group_size, bits, mode }) => format!("{} {bits}-bit group {group_size}", mode.id()),
            Err(_) => format!("{:?}", self.dtype),
        }
    }

    /// What is written for it: of experts that are stacked, by the first for all.
    pub fn outputs(&self) -> Vec<Output> {
        match &self.stack {
            None => self.parts(),
            Some(Stack { index: 0, count, .. }) => {
                let mut parts = self.parts();
                parts.iter_mut().for_each(|part| part.shape.insert(0, *count));
                parts
            }
            Some(_) => Vec::new(),
        }
    }

    /// Where in its outputs it begins, in bytes of each.
    pub fn offset(&self, part: &Output) -> u64 {
        self.stack.as_ref().map_or(0, |stack| stack.index as u64 * part.bytes())
    }

    /// What is made of this tensor alone, under the names of its outputs.
    pub fn parts(&self) -> Vec<Output> {
        let Ok(Scheme { group_size, bits, mode }) = self.treatment else {
            return vec![Output { name: self.name.clone(), dtype: self.dtype, shape: self.shape.clone() }];
        };
        let shape = |columns: usize| {
            let mut shape = self.shape.clone();
            if let Some(last) = shape.last_mut() {
                *last = columns;
            }
            shape
        };
        let module = match &self.stack {
            Some(stack) => &stack.module,
            None => self.name.strip_suffix(".weight").unwrap_or(&self.name),
        };
        let output =
            |leaf: &str, dtype, columns| Output { name: format!("{module}.{leaf}"), dtype, shape: shape(columns) };
        let groups = self.columns() / group_size as usize;
        let codes = output("weight", Dtype::U32, self.columns() * bits as usize / 32);
        match mode.has_biases() {
            true => vec![codes, output("scales", self.dtype, groups), output("biases", self.dtype, groups)],
            false => vec![codes, output("scales", Dtype::U8, groups)],
        }
    }
}

/// Projections of experts, by the names they have, and the ones that stacks have.
const PROJECTIONS: &[(&str, &str)] = &[
    ("gate_proj", "gate_proj"),
    ("up_proj", "up_proj"),
    ("down_proj", "down_proj"),
    ("w1", "gate_proj"),
    ("w2", "down_proj"),
    ("w3", "up_proj"),
];

/// Puts matrices of experts that stand by themselves into stacks, as mlx-lm stores them: wherever all of a layer are there
/// and alike.
pub(super) fn stack_experts(shards: &mut [Vec<Planned>]) {
    let mut stacks: BTreeMap<String, Vec<(usize, &mut Planned)>> = BTreeMap::new();
    for tensor in shards.iter_mut().flatten() {
        if let Some((module, index)) = expert(&tensor.name) {
            stacks.entry(module).or_default().push((index, tensor));
        }
    }
    for (module, mut members) in stacks {
        members.sort_by_key(|(index, _)| *index);
        let whole = members.iter().enumerate().all(|(at, (index, _))| at == *index);
        let (_, first) = &members[0];
        let alike = members.iter().all(|(_, tensor)| {
            tensor.shape == first.shape && tensor.dtype == first.dtype && tensor.treatment == first.treatment
        });
        if !whole || !alike || first.treatment.is_err() {
            continue;
        }
        let count = members.len();
        for (index, tensor) in members {
            tensor.stack = Some(Stack { module: module.clone(), index, count });
        }
    }
}

/// The stack that a tensor's name puts it in, and its place there.
fn expert(name: &str) -> Option<(String, usize)> {
    let (layer, rest) = name.split_once(".experts.")?;
    let (index, projection) = rest.strip_suffix(".weight")?.split_once('.')?;
    let (_, stacked) = PROJECTIONS.iter().find(|(own, _)| *own == projection)?;
    Some((format!("{layer}.switch_mlp.{stacked}"), index.parse().ok()?))
}

/// The tensors of a shard.
pub(super) fn shard(path: &Path, scheme: Scheme) -> Result<Vec<Planned>, ConvertError> {
    let map = map(path)?;
    let broken =
        |error: safetensors::SafeTensorError| ConvertError::Broken { path: path.to_owned(), what: error.to_string() };
    let (length, header) = SafeTensors::read_metadata(&map).map_err(broken)?;
    let data = LENGTH_BYTES + length;
    let mut planned = Vec::new();
    for name in header.offset_keys() {
        let Some(info) = header.info(&name) else { continue };
        let span = data + info.data_offsets.0..data + info.data_offsets.1;
        let (dtype, shape) = (info.dtype, info.shape.clone());
        let treatment = treatment(&name, dtype, &shape, scheme);
        planned.push(Planned { name, dtype, shape, span, treatment, stack: None });
    }
    Ok(planned)
}

pub(super) fn map(path: &Path) -> Result<Mmap, ConvertError> {
    let file = File::open(path).map_err(ConvertError::io(path))?;
    // SAFETY: the map is only read. Model files are replaced by renaming, which leaves the mapped one alone.
    unsafe { Mmap::map(&file) }.map_err(ConvertError::io(path))
}

/// Matrices are quantized, as mlx-lm does; what is small, or decides where tokens go, is not worth its error.
fn treatment(name: &str, dtype: Dtype, shape: &[usize], scheme: Scheme) -> Result<Scheme, &'static str> {
    if !matches!(dtype, Dtype::F32 | Dtype::F16 | Dtype::BF16) {
        return Err("no floats");
    }
    if shape.len() < 2 || shape.contains(&0) {
        return Err("no matrix");
    }
    if !name.ends_with(".weight") {
        return Err("laid out in another way");
    }
    match Part::of(name) {
        Part::Norm => return Err("a norm"),
        Part::Router => return Err("decides which experts are asked"),
        Part::Senses => return Err("not part of the language model"),
        _ => {}
    }
    // [channels, 1, kernel], or the other way round.
    if shape.len() > 2 && Part::of(name) != Part::Experts {
        return Err("no matrix");
    }
    let columns = shape.last().copied().unwrap_or(0);
    if !columns.is_multiple_of(scheme.group_size as usize) || !(columns * scheme.bits as usize).is_multiple_of(32) {
        return Err("its rows do not divide into groups");
    }
    Ok(scheme)
}
