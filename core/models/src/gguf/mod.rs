//! A reader for GGUF headers (versions 2 and 3, little-endian).
//!
//! It is our own because the crates that read GGUF allocate by the counts a file claims. Here nothing does: metadata
//! stays where it is in the (memory-mapped) file and is only walked, every count is checked against the bytes that
//! are left, and what is kept (keys, tensor names and shapes) is smaller than the part of the file it was read from.

mod block;
pub(crate) mod context;
mod k_block;
mod packing;
mod reader;
mod tensor_type;

use std::{collections::BTreeMap, fs::File, ops::Range, path::Path};

use memmap2::Mmap;
use mesh_core::ProbeError;

pub(crate) use block::{Block, GROUP, Group};
pub(crate) use packing::Packing;
use reader::Reader;
pub use tensor_type::TensorType;

/// How every GGUF starts.
pub(crate) const MAGIC: &[u8; 4] = b"GGUF";
/// Bytes before the metadata: the magic, a version and two counts.
const PREAMBLE_BYTES: u64 = 24;
/// Most metadata entries that are read.
const ENTRIES_MAX: u64 = 1 << 16;
/// Most tensors that are read. Experts are stacked, so that real files have some thousands.
const TENSORS_MAX: u64 = 1 << 16;
/// Longest key, in bytes.
const KEY_BYTES_MAX: u64 = 1 << 16;
/// Longest tensor name, in bytes.
const NAME_BYTES_MAX: u64 = 1 << 10;
/// Longest single text, in bytes; chat templates are the longest there are.
const TEXT_BYTES_MAX: u64 = 16 << 20;
/// Most dimensions of a tensor.
const DIMENSIONS_MAX: u32 = 4;
/// The key that says where tensor data is aligned.
const ALIGNMENT: &str = "general.alignment";
/// Where tensor data is aligned unless the file says otherwise, in bytes.
const ALIGNMENT_DEFAULT: u64 = 32;
/// Largest alignment that is believed, in bytes.
const ALIGNMENT_MAX: u64 = 1 << 20;

/// What is wrong with a header.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct Malformed(pub String);

/// A metadata value. Texts and arrays are places in the file.
#[derive(Clone, Debug, PartialEq)]
enum Value {
    Unsigned(u64),
    Signed(i64),
    Float(f64),
    Bool(bool),
    Text(Range<usize>),
    Array { kind: u32, len: usize, span: Range<usize> },
}

/// Where a tensor lies and what it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Its name.
    pub name: String,
    /// Sizes of its dimensions, the fastest first.
    pub shape: Vec<u64>,
    /// Its element type.
    pub kind: TensorType,
    /// First byte in the file.
    pub offset: u64,
    /// Bytes in the file; absent where the type is not known.
    pub bytes: Option<u64>,
}

impl Tensor {
    /// Number of elements.
    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Number of rows: runs of the fastest dimension.
    pub fn rows(&self) -> usize {
        self.shape[1..].iter().product::<u64>() as usize
    }
}

/// A GGUF, its header checked.
#[derive(Debug)]
pub struct Gguf<D> {
    data: D,
    entries: BTreeMap<String, Value>,
    alignment: u64,
    /// The tensors in the file's order; each lies inside the file.
    pub tensors: Vec<Tensor>,
}

impl Gguf<Mmap> {
    /// Maps a file and reads its header.
    pub fn open(path: &Path) -> Result<Self, ProbeError> {
        let io = |source| ProbeError::Io { path: path.to_owned(), source };
        let file = File::open(path).map_err(|source| match source.kind() {
            std::io::ErrorKind::NotFound => ProbeError::Missing { path: path.to_owned() },
            _ => io(source),
        })?;
        let malformed = |what: String| ProbeError::Malformed { path: path.to_owned(), what };
        // An empty file cannot be mapped.
        let bytes = file.metadata().map_err(io)?.len();
        if bytes < PREAMBLE_BYTES {
            return Err(malformed(format!("a GGUF header has at least {PREAMBLE_BYTES} bytes, the file has {bytes}")));
        }
        // SAFETY: the map is only read. Someone who truncates the file meanwhile ends the process; model files are
        // replaced by renaming, which leaves the mapped one alone.
        let map = unsafe { Mmap::map(&file) }.map_err(io)?;
        Self::parse(map).map_err(|Malformed(what)| malformed(what))
    }
}

impl<D: AsRef<[u8]>> Gguf<D> {
    /// Reads the header of a file's content.
    pub fn parse(data: D) -> Result<Self, Malformed> {
        let mut reader = Reader::new(data.as_ref());
        if reader.take(4)? != MAGIC {
            return Err(Malformed("not a GGUF file: it does not start with `GGUF`".into()));
        }
        match reader.u32()? {
            2 | 3 => {}
            version if version.swap_bytes() <= 3 && version != 0 => {
                return Err(Malformed("a big-endian GGUF; only little-endian ones are read".into()));
            }
            version => return Err(Malformed(format!("GGUF version {version}; versions 2 and 3 are read"))),
        }
        let tensor_count = reader.count("tensors", TENSORS_MAX, 24)?;
        let entry_count = reader.count("metadata entries", ENTRIES_MAX, 13)?;
        let mut entries = BTreeMap::new();
        for _ in 0..entry_count {
            let key = reader.name("a metadata key", KEY_BYTES_MAX)?;
            let value = value(&mut reader).map_err(|Malformed(what)| Malformed(format!("`{key}`: {what}")))?;
            if entries.insert(key.clone(), value).is_some() {
                return Err(Malformed(format!("`{key}` is there twice")));
            }
        }
        let alignment = match entries.get(ALIGNMENT) {
            None => ALIGNMENT_DEFAULT,
            Some(Value::Unsigned(bytes)) if bytes.is_power_of_two() && *bytes <= ALIGNMENT_MAX => *bytes,
            Some(_) => return Err(Malformed("`general.alignment` is not a power of two up to 1 MiB".into())),
        };
        let mut tensors = Vec::new();
        for _ in 0..tensor_count {
            tensors.push(tensor(&mut reader)?);
        }
        let base = (reader.position() as u64).next_multiple_of(alignment);
        let size = data.as_ref().len() as u64;
        for tensor in &mut tensors {
            place(tensor, base, alignment, size)?;
        }
        Ok(Self { data, entries, alignment, tensors })
    }

    /// The content of a tensor; absent where its type is not known.
    pub fn tensor_data(&self, tensor: &Tensor) -> Option<&[u8]> {
        let start = usize::try_from(tensor.offset).ok()?;
        let end = start.checked_add(usize::try_from(tensor.bytes?).ok()?)?;
        self.data.as_ref().get(start..end)
    }

    /// A text.
    pub fn text(&self, key: &str) -> Option<&str> {
        match self.entries.get(key)? {
            Value::Text(span) => std::str::from_utf8(self.data.as_ref().get(span.clone())?).ok(),
            _ => None,
        }
    }

    /// A whole number that is not negative.
    pub fn unsigned(&self, key: &str) -> Option<u64> {
        match self.entries.get(key)? {
            Value::Unsigned(number) => Some(*number),
            Value::Signed(number) => u64::try_from(*number).ok(),
            _ => None,
        }
    }

    /// A number.
    pub fn float(&self, key: &str) -> Option<f64> {
        match self.entries.get(key)? {
            Value::Unsigned(number) => Some(*number as f64),
            Value::Signed(number) => Some(*number as f64),
            Value::Float(number) => Some(*number),
            _ => None,
        }
    }

    /// A truth value.
    pub fn bool(&self, key: &str) -> Option<bool> {
        match self.entries.get(key)? {
            Value::Bool(value) => Some(*value),
            _ => None,
        }
    }

    /// An array's elements.
    pub fn array(&self, key: &str) -> Option<Array<'_>> {
        match self.entries.get(key)? {
            Value::Array { kind, len, span } => {
                Some(Array { kind: *kind, len: *len, bytes: self.data.as_ref().get(span.clone())? })
            }
            _ => None,
        }
    }

    /// All keys, sorted.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.entries.keys().map(String::as_str)
    }

    /// Where tensor data is aligned, in bytes: a power of two.
    pub fn alignment(&self) -> u64 {
        self.alignment
    }

    /// The metadata in the file's order: each key, and all of its entry (key, type and value) as stored.
    pub(crate) fn stored_entries(&self) -> Result<Vec<(String, &[u8])>, Malformed> {
        // The same walk as in `parse`; what it passes over need not be kept by everyone.
        let mut reader = Reader::new(self.data.as_ref());
        reader.take(PREAMBLE_BYTES)?;
        let mut stored = Vec::new();
        for _ in 0..self.entries.len() {
            let start = reader.position();
            let key = reader.name("a metadata key", KEY_BYTES_MAX)?;
            value(&mut reader)?;
            stored.push((key, reader.slice(start..reader.position())));
        }
        Ok(stored)
    }
}

/// An array of metadata, still in the file.
#[derive(Clone, Copy, Debug)]
pub struct Array<'a> {
    kind: u32,
    len: usize,
    bytes: &'a [u8],
}

impl<'a> Array<'a> {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.len
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The elements as 32-bit floats; none if they are not that.
    pub fn floats(self) -> impl Iterator<Item = f32> {
        let bytes = if self.kind == FLOAT32 { self.bytes } else { &[] };
        bytes.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))
    }

    /// The elements as bytes of text; none if they are not texts.
    pub fn texts(self) -> impl Iterator<Item = &'a [u8]> {
        let mut reader = Reader::new(self.bytes);
        let len = if self.kind == TEXT { self.len } else { 0 };
        (0..len).map_while(move |_| reader.text(TEXT_BYTES_MAX).ok().map(|span| &self.bytes[span]))
    }

    /// The elements as whole numbers, truth values as 0 and 1; none if they are neither. Negative ones end the iteration.
    pub fn unsigned(self) -> impl Iterator<Item = u64> {
        let mut reader = Reader::new(self.bytes);
        (0..self.len).map_while(move |_| match scalar(&mut reader, self.kind) {
            Ok(Some(Value::Unsigned(number))) => Some(number),
            Ok(Some(Value::Signed(number))) => u64::try_from(number).ok(),
            Ok(Some(Value::Bool(value))) => Some(value.into()),
            _ => None,
        })
    }
}

const FLOAT32: u32 = 6;
const TEXT: u32 = 8;
const ARRAY: u32 = 9;

/// Bytes of a scalar of that kind.
fn scalar_bytes(kind: u32) -> Option<u64> {
    match kind {
        0 | 1 | 7 => Some(1),
        2 | 3 => Some(2),
        4..=6 => Some(4),
        10..=12 => Some(8),
        _ => None,
    }
}

fn scalar(reader: &mut Reader<'_>, kind: u32) -> Result<Option<Value>, Malformed> {
    Ok(Some(match kind {
        0 => Value::Unsigned(reader.array::<1>()?[0].into()),
        1 => Value::Signed(i8::from_le_bytes(reader.array()?).into()),
        2 => Value::Unsigned(u16::from_le_bytes(reader.array()?).into()),
        3 => Value::Signed(i16::from_le_bytes(reader.array()?).into()),
        4 => Value::Unsigned(reader.u32()?.into()),
        5 => Value::Signed(i32::from_le_bytes(reader.array()?).into()),
        6 => Value::Float(f32::from_le_bytes(reader.array()?).into()),
        7 => match reader.array::<1>()?[0] {
            0 => Value::Bool(false),
            1 => Value::Bool(true),
            other => return Err(Malformed(format!("a truth value of {other}"))),
        },
        10 => Value::Unsigned(reader.u64()?),
        11 => Value::Signed(i64::from_le_bytes(reader.array()?)),
        12 => Value::Float(f64::from_le_bytes(reader.array()?)),
        _ => return Ok(None),
    }))
}

fn value(reader: &mut Reader<'_>) -> Result<Value, Malformed> {
    let kind = reader.u32()?;
    if let Some(value) = scalar(reader, kind)? {
        return Ok(value);
    }
    match kind {
        TEXT => {
            let span = reader.text(TEXT_BYTES_MAX)?;
            std::str::from_utf8(reader.slice(span.clone())).map_err(|_| Malformed("not UTF-8".into()))?;
            Ok(Value::Text(span))
        }
        ARRAY => {
            let kind = reader.u32()?;
            // An array is never walked by its claimed length alone: each element takes bytes from what is left.
            let each = match kind {
                TEXT => 8,
                ARRAY => return Err(Malformed("an array of arrays".into())),
                _ => scalar_bytes(kind).ok_or_else(|| Malformed(format!("an array of unknown type {kind}")))?,
            };
            let len = reader.count("array elements", u64::MAX, each)?;
            let start = reader.position();
            if kind == TEXT {
                for _ in 0..len {
                    reader.text(TEXT_BYTES_MAX)?;
                }
            } else {
                reader.take(len * each)?;
            }
            let len = usize::try_from(len).map_err(|_| Malformed("too many array elements".into()))?;
            Ok(Value::Array { kind, len, span: start..reader.position() })
        }
        _ => Err(Malformed(format!("unknown value type {kind}"))),
    }
}

/// A tensor's entry; its offset still counts from the start of the data.
fn tensor(reader: &mut Reader<'_>) -> Result<Tensor, Malformed> {
    let name = reader.name("a tensor name", NAME_BYTES_MAX)?;
    let dimensions = reader.u32()?;
    if dimensions == 0 || dimensions > DIMENSIONS_MAX {
        return Err(Malformed(format!("tensor `{name}` has {dimensions} dimensions; 1 to {DIMENSIONS_MAX} are read")));
    }
    let mut shape = Vec::new();
    for _ in 0..dimensions {
        shape.push(reader.u64()?);
    }
    let elements = shape.iter().try_fold(1u64, |product, size| product.checked_mul(*size));
    let kind = TensorType(reader.u32()?);
    let offset = reader.u64()?;
    let bytes = match (elements, kind.block()) {
        (None, _) | (Some(0), _) => None,
        (Some(elements), None) => Some((elements, None)),
        (Some(elements), Some((block, bytes))) if shape[0] % block == 0 => {
            (elements / block).checked_mul(bytes).map(|bytes| (elements, Some(bytes)))
        }
        _ => None,
    };
    match bytes {
        Some((_, bytes)) => Ok(Tensor { name, shape, kind, offset, bytes }),
        None => Err(Malformed(format!("tensor `{name}` of type {kind} cannot have the shape {shape:?}"))),
    }
}

/// Turns the offset into one from the start of the file and checks that the tensor lies inside.
fn place(tensor: &mut Tensor, base: u64, alignment: u64, size: u64) -> Result<(), Malformed> {
    let name = &tensor.name;
    if !tensor.offset.is_multiple_of(alignment) {
        return Err(Malformed(format!("tensor `{name}` is not aligned to {alignment} bytes")));
    }
    let start = base.checked_add(tensor.offset);
    let end = start.and_then(|start| start.checked_add(tensor.bytes.unwrap_or(0)));
    match (start, end) {
        (Some(start), Some(end)) if end <= size => {
            tensor.offset = start;
            Ok(())
        }
        (_, Some(end)) => Err(Malformed(format!(
            "tensor `{name}` ends at byte {end}, the file has {size}: {} bytes are missing",
            end - size
        ))),
        _ => Err(Malformed(format!("tensor `{name}` lies outside any file"))),
    }
}

#[cfg(test)]
mod tests;
