//! A GGUF of quantized blocks into one of plain floats.
//!
//! llama.cpp multiplies quantized weights by activations that it rounds to 8 bits as well, and 16-bit weights by
//! activations of 16 bits. Small models do not survive the former; the latter is nearly exact. With 32-bit weights
//! nothing is rounded. Only the storage of the weights changes: each gets the value its block gives it, rounded at most
//! once to the nearest float of the wanted size.

use std::{
    borrow::Cow,
    fmt, fs,
    io::{self, BufWriter, Read, Seek, Write},
    ops::Range,
    path::Path,
};

use half::{f16, slice::HalfFloatSliceExt};
use memmap2::Mmap;
use mesh_core::{ProbeError, ProgressSink, Stage};
use serde::Deserialize;

use crate::{
    disk,
    error::ImportError,
    gguf::{Block, Gguf, MAGIC, Malformed, Packing, Tensor, TensorType},
};

/// Goes into the names of unpacked models, so that a changed unpacking is done again.
pub(crate) const VERSION: u32 = 1;

/// How files begin that are not unpacked whole yet.
pub(crate) const WORK: &str = ".unpack-";

/// The GGUF version that is written.
const GGUF_VERSION: u32 = 3;
/// The key that names the recipe a file was made by.
const FILE_TYPE: &str = "general.file_type";
/// The number of GGUF's unsigned 32-bit metadata values.
const UINT32: u32 = 4;
/// Values that are unpacked at a time, in whole blocks: 256 KiB of 32-bit floats.
const VALUES_AT_A_TIME: usize = 1 << 16;

/// The floats that weights are unpacked into.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Floats {
    /// 16 bits: quantized matrices; what is stored as floats already, and what is no matrix, stays as it is.
    F16,
    /// 32 bits: every quantized tensor, and those of 16-bit floats.
    F32,
}

impl Floats {
    fn kind(self) -> TensorType {
        match self {
            Self::F16 => TensorType::F16,
            Self::F32 => TensorType::F32,
        }
    }

    /// The number in `general.file_type` of files that are mostly (F16) or wholly (F32) of these.
    fn file_type(self) -> u32 {
        match self {
            Self::F16 => 1,
            Self::F32 => 0,
        }
    }

    fn bytes(self) -> u64 {
        match self {
            Self::F16 => 2,
            Self::F32 => 4,
        }
    }

    /// Whether a tensor that is packed so is to be unpacked.
    fn unpacks(self, packing: Packing, tensor: &Tensor) -> bool {
        match self {
            Self::F16 => matches!(packing, Packing::Blocks(_)) && tensor.shape.len() > 1,
            Self::F32 => packing != Packing::F32,
        }
    }
}

impl fmt::Display for Floats {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.kind().fmt(f)
    }
}

/// What an unpacking made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnpackReport {
    /// Tensors in the file.
    pub tensors: usize,
    /// Those whose type has changed.
    pub tensors_unpacked: usize,
    /// Size of the new file, in bytes.
    pub bytes: u64,
}

/// Unpacks `gguf` into the new file `out`. Blocks; holds less than a megabyte of weights in memory.
///
/// Legacy blocks (Q4_0, Q4_1, Q5_0, Q5_1, Q8_0) and K-quants become `floats`. Other tensors, the metadata but for
/// `general.file_type`, and every order stay as they are. `out` appears whole, by a rename.
///
/// # Errors
///
/// A file that is cut off or malformed, other quantized types such as IQ4_NL, values beyond what `floats` hold, and an
/// `out` that exists. Nothing is left behind.
pub fn unpack_gguf(
    gguf: &Path,
    out: &Path,
    floats: Floats,
    progress: &ProgressSink,
) -> Result<UnpackReport, ImportError> {
    if out.exists() {
        return Err(ImportError::Exists { path: out.to_owned() });
    }
    let malformed = |what| ProbeError::Malformed { path: gguf.to_owned(), what };
    let file = Gguf::open(gguf)?;
    let outputs = plan(&file, floats)?;
    // Tensors that share bytes could make a small file into a boundless one.
    let mut spans: Vec<_> = outputs.iter().map(|output| output.span()).collect();
    spans.sort_unstable_by_key(|span| span.start);
    if !spans.is_sorted_by(|one, next| one.end <= next.start) {
        return Err(malformed("its tensors overlap".to_owned()).into());
    }
    let metadata = metadata(&file, floats).map_err(|Malformed(what)| malformed(what))?;

    let parent = match out.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    };
    let bytes = outputs.iter().map(|output| output.bytes()).sum();
    disk::check(&out.to_string_lossy(), bytes, disk::free(parent), parent)?;
    fs::create_dir_all(parent).map_err(ImportError::io(parent))?;
    let work = tempfile::Builder::new().prefix(WORK).tempfile_in(parent).map_err(ImportError::io(parent))?;
    let mut writer = BufWriter::new(work.as_file());
    let written = |result: io::Result<()>| result.map_err(ImportError::io(out));
    written(write_header(&mut writer, &metadata, &outputs, file.alignment()))?;
    written(align(&mut writer, file.alignment()))?;
    let stage = Stage::Import { what: gguf.file_name().unwrap_or_default().to_string_lossy().into_owned() };
    let total = outputs.len() as u64;
    for (done, output) in (0..).zip(&outputs) {
        progress.report(&stage, done, Some(total));
        output.write(&mut writer).map_err(|error| match error {
            WriteError::Range => {
                ImportError::Range { tensor: output.tensor.name.clone(), kind: output.kind().to_string() }
            }
            WriteError::Io(source) => ImportError::Io { path: out.to_owned(), source },
        })?;
        written(align(&mut writer, file.alignment()))?;
    }
    written(writer.flush())?;
    drop(writer);
    // The file is trusted by its name from now on, so it has to be on disk before it has that name.
    written(work.as_file().sync_all())?;
    let bytes = work.as_file().metadata().map_err(ImportError::io(out))?.len();
    // Someone who was faster has written the same, and where open files cannot be replaced theirs stays.
    work.persist(out).map_err(|error| match out.exists() {
        true => ImportError::Exists { path: out.to_owned() },
        false => ImportError::Io { path: out.to_owned(), source: error.error },
    })?;
    progress.report(&stage, total, Some(total));
    let tensors_unpacked = outputs.iter().filter(|output| output.unpack.is_some()).count();
    Ok(UnpackReport { tensors: outputs.len(), tensors_unpacked, bytes })
}

/// A tensor to be written.
struct Output<'a> {
    tensor: &'a Tensor,
    content: &'a [u8],
    /// How to unpack it; `None` copies it.
    unpack: Option<(Packing, Floats)>,
}

fn plan(gguf: &Gguf<Mmap>, floats: Floats) -> Result<Vec<Output<'_>>, ImportError> {
    let output = |tensor| {
        let refused = || {
            let (name, kind) = (Tensor::clone(tensor).name, tensor.kind.to_string());
            ImportError::Packed { tensor: name, kind, known: Block::NAMES.to_vec() }
        };
        let content = gguf.tensor_data(tensor).ok_or_else(refused)?;
        let packing = Packing::of(tensor.kind);
        let plain = tensor.kind.block().is_some_and(|(elements, _)| elements == 1);
        if packing.is_none() && !plain {
            return Err(refused());
        }
        let packing = packing.filter(|packing| floats.unpacks(*packing, tensor));
        Ok(Output { tensor, content, unpack: packing.map(|packing| (packing, floats)) })
    };
    gguf.tensors.iter().map(output).collect()
}

enum WriteError {
    Range,
    Io(io::Error),
}

impl From<io::Error> for WriteError {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

impl Output<'_> {
    /// The bytes of the source that it is made of.
    fn span(&self) -> Range<u64> {
        self.tensor.offset..self.tensor.offset + self.content.len() as u64
    }

    fn kind(&self) -> TensorType {
        self.unpack.map_or(self.tensor.kind, |(_, floats)| floats.kind())
    }

    fn bytes(&self) -> u64 {
        match self.unpack {
            Some((_, floats)) => floats.bytes() * self.tensor.elements(),
            None => self.content.len() as u64,
        }
    }

    fn write(&self, out: &mut impl Write) -> Result<(), WriteError> {
        let Some((packing, floats)) = self.unpack else { return Ok(out.write_all(self.content)?) };
        let runs = VALUES_AT_A_TIME / packing.elements();
        let mut values = Vec::with_capacity(VALUES_AT_A_TIME);
        let mut halves = vec![f16::ZERO; if floats == Floats::F16 { VALUES_AT_A_TIME } else { 0 }];
        let mut bytes = Vec::with_capacity(VALUES_AT_A_TIME * floats.bytes() as usize);
        // Rows are whole blocks, so a matrix is a run of blocks.
        for stored in self.content.chunks(runs * packing.bytes()) {
            values.clear();
            packing.values(stored, &mut values);
            bytes.clear();
            let finite = match floats {
                Floats::F16 => {
                    let halves = &mut halves[..values.len()];
                    halves.convert_from_f32_slice(&values);
                    bytes.extend(halves.iter().flat_map(|half| half.to_le_bytes()));
                    halves.iter().all(|half| half.is_finite())
                }
                Floats::F32 => {
                    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
                    values.iter().all(|value| value.is_finite())
                }
            };
            if !finite {
                return Err(WriteError::Range);
            }
            out.write_all(&bytes)?;
        }
        Ok(())
    }
}

/// The metadata as stored, but for the entry that says what the file is made of.
fn metadata(gguf: &Gguf<Mmap>, floats: Floats) -> Result<Vec<Cow<'_, [u8]>>, Malformed> {
    let key = FILE_TYPE.as_bytes();
    let number = floats.file_type().to_le_bytes();
    let file_type = [&(key.len() as u64).to_le_bytes(), key, &UINT32.to_le_bytes(), &number].concat();
    let stored = gguf.stored_entries()?;
    let said = stored.iter().any(|(key, _)| key == FILE_TYPE);
    let entries = stored
        .into_iter()
        .map(|(key, entry)| if key == FILE_TYPE { Cow::Owned(file_type.clone()) } else { Cow::Borrowed(entry) });
    let mut entries: Vec<_> = entries.collect();
    if !said {
        entries.push(Cow::Owned(file_type));
    }
    Ok(entries)
}

/// Everything before the first tensor's content, without what aligns that.
fn write_header(
    out: &mut impl Write,
    metadata: &[Cow<'_, [u8]>],
    outputs: &[Output<'_>],
    alignment: u64,
) -> io::Result<()> {
    out.write_all(MAGIC)?;
    out.write_all(&GGUF_VERSION.to_le_bytes())?;
    out.write_all(&(outputs.len() as u64).to_le_bytes())?;
    out.write_all(&(metadata.len() as u64).to_le_bytes())?;
    for entry in metadata {
        out.write_all(entry)?;
    }
    let mut offset = 0u64;
    for output in outputs {
        let Tensor { name, shape, .. } = output.tensor;
        out.write_all(&(name.len() as u64).to_le_bytes())?;
        out.write_all(name.as_bytes())?;
        out.write_all(&(shape.len() as u32).to_le_bytes())?;
        for size in shape {
            out.write_all(&size.to_le_bytes())?;
        }
        out.write_all(&output.kind().0.to_le_bytes())?;
        out.write_all(&offset.to_le_bytes())?;
        offset += output.bytes().next_multiple_of(alignment);
    }
    Ok(())
}

/// Fills up to the next multiple of `alignment`.
fn align<W: Write + Seek>(out: &mut W, alignment: u64) -> io::Result<()> {
    let position = out.stream_position()?;
    io::copy(&mut io::repeat(0).take(position.next_multiple_of(alignment) - position), out)?;
    Ok(())
}

#[cfg(test)]
mod tests;
