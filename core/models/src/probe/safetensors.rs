//! Safetensors headers: names and sizes, and whether the file is whole.
//!
//! The crate's own reader keeps each header three times over, in tables that grow to several times its size. This one
//! keeps what a profile needs, and stops at the first tensor too many.

use std::{collections::BTreeMap, fmt, fs::File, path::Path};

use memmap2::MmapOptions;
use mesh_core::ProbeError;
use safetensors::Dtype;
use serde::{
    Deserialize, Deserializer,
    de::{Error, IgnoredAny, MapAccess, SeqAccess, Visitor},
};

use super::{malformed, missing_or};

/// Longest header, in bytes. A shard of the largest published models has less than 2 MB.
const HEADER_BYTES_MAX: u64 = 32 << 20;
/// Most tensors of a model. Kimi K2 has 140,000.
const TENSORS_MAX: usize = 1 << 18;
/// Longest name of a tensor, in bytes.
const NAME_BYTES_MAX: usize = 512;
/// All names together, in bytes.
const NAMES_BYTES_MAX: usize = 32 << 20;
/// Most dimensions of a tensor.
const DIMENSIONS_MAX: usize = 8;
/// Bytes before the header, which hold its length.
const LENGTH_BYTES: u64 = 8;

/// A tensor's type and size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub dtype: Dtype,
    /// Number of elements.
    pub elements: u64,
    /// Elements of the last dimension.
    pub columns: u64,
    /// Bytes in the file.
    pub bytes: u64,
}

/// The tensors of all shards.
#[derive(Debug, Default)]
pub(super) struct Tensors {
    pub entries: BTreeMap<String, Entry>,
    names_bytes: usize,
}

/// Reads the header, adds its tensors, and checks that the file ends where the last tensor does.
pub(super) fn read_header(path: &Path, tensors: &mut Tensors) -> Result<(), ProbeError> {
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(|source| missing_or(path, source))?;
    let size = file.metadata().map_err(io)?.len();
    if size < LENGTH_BYTES {
        return Err(malformed(path, format!("the file has {size} bytes; a safetensors file has at least 8")));
    }
    let mut length = [0; LENGTH_BYTES as usize];
    std::io::Read::read_exact(&mut file, &mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(malformed(path, format!("claims a header of {length} bytes; at most {HEADER_BYTES_MAX} are read")));
    }
    let data = LENGTH_BYTES + length;
    if data > size {
        return Err(malformed(path, format!("cut off: the header ends at byte {data}, the file has {size}")));
    }
    // SAFETY: the map is only read, and dropped at the end of this function. Model files are replaced by renaming.
    let map = unsafe { MmapOptions::new().len(data as usize).map(&file) }.map_err(io)?;
    let mut spans = Vec::new();
    let mut reader = serde_json::Deserializer::from_slice(&map[LENGTH_BYTES as usize..]);
    let header = Header { tensors, spans: &mut spans };
    let read = serde::de::DeserializeSeed::deserialize(header, &mut reader).and_then(|()| reader.end());
    read.map_err(|error| malformed(path, format!("the header is not one of safetensors: {error}")))?;
    spans.sort_unstable();
    let mut end = 0;
    for (start, stop) in spans {
        if start != end {
            let what = if start < end { "tensors overlap" } else { "there is a hole between tensors" };
            return Err(malformed(path, format!("the header is not one of safetensors: {what} at byte {start}")));
        }
        end = stop;
    }
    let expected = end.saturating_add(data);
    if expected != size {
        let what = if size < expected { "cut off" } else { "too long" };
        return Err(malformed(path, format!("{what}: {expected} bytes expected, the file has {size}")));
    }
    Ok(())
}

/// Where a header's tensors go.
struct Header<'a> {
    tensors: &'a mut Tensors,
    spans: &'a mut Vec<(u64, u64)>,
}

impl<'de> serde::de::DeserializeSeed<'de> for Header<'_> {
    type Value = ();

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<(), D::Error> {
        deserializer.deserialize_map(self)
    }
}

impl<'de> Visitor<'de> for Header<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a table of tensors")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<(), A::Error> {
        while let Some(name) = map.next_key::<String>()? {
            if name == "__metadata__" {
                map.next_value::<IgnoredAny>()?;
                continue;
            }
            let shown = || name.chars().take(100).collect::<String>();
            let Tensors { entries, names_bytes } = &mut *self.tensors;
            *names_bytes += name.len();
            if entries.len() >= TENSORS_MAX || *names_bytes > NAMES_BYTES_MAX {
                return Err(A::Error::custom(format!(
                    "more than {TENSORS_MAX} tensors, or {NAMES_BYTES_MAX} bytes of their names, are not read"
                )));
            }
            if name.len() > NAME_BYTES_MAX {
                let length = name.len();
                return Err(A::Error::custom(format!("a name of {length} bytes; at most {NAME_BYTES_MAX} are read")));
            }
            let Info { dtype, shape, data_offsets: (start, stop) } = map.next_value()?;
            let bits = shape.elements.checked_mul(dtype.bitsize() as u64);
            let bytes = bits.filter(|bits| bits.is_multiple_of(8)).map(|bits| bits / 8);
            if bytes.is_none_or(|bytes| stop.checked_sub(start) != Some(bytes)) {
                return Err(A::Error::custom(format!("tensor `{}` is not as long as its shape says", shown())));
            }
            self.spans.push((start, stop));
            let entry =
                Entry { dtype, elements: shape.elements, columns: shape.columns, bytes: bytes.unwrap_or_default() };
            let shown = shown();
            if entries.insert(name, entry).is_some() {
                return Err(A::Error::custom(format!("tensor `{shown}` is there twice")));
            }
        }
        Ok(())
    }
}

#[derive(Deserialize)]
struct Info {
    dtype: Dtype,
    shape: Shape,
    data_offsets: (u64, u64),
}

/// Of a shape, what is needed here.
struct Shape {
    elements: u64,
    columns: u64,
}

impl<'de> Deserialize<'de> for Shape {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Sizes;
        impl<'de> Visitor<'de> for Sizes {
            type Value = Shape;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a shape")
            }

            fn visit_seq<A: SeqAccess<'de>>(self, mut sizes: A) -> Result<Shape, A::Error> {
                let (mut shape, mut dimensions) = (Shape { elements: 1, columns: 1 }, 0);
                while let Some(size) = sizes.next_element::<u64>()? {
                    dimensions += 1;
                    let elements = shape.elements.checked_mul(size).filter(|_| dimensions <= DIMENSIONS_MAX);
                    let Some(elements) = elements else {
                        return Err(A::Error::custom("a shape that no tensor has"));
                    };
                    shape = Shape { elements, columns: size };
                }
                Ok(shape)
            }
        }
        deserializer.deserialize_seq(Sizes)
    }
}
