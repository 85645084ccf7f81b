//! Safetensors headers: names and sizes, and whether the file is whole.

use std::{collections::BTreeMap, fs::File, io::Read, path::Path};

use mesh_core::ProbeError;
use safetensors::{Dtype, tensor::Metadata};

use super::{malformed, missing_or};

/// Longest header, in bytes; the format's own limit.
const HEADER_BYTES_MAX: u64 = 100_000_000;

/// A tensor's type and shape.
pub(super) type Tensors = BTreeMap<String, (Dtype, Vec<usize>)>;

/// Reads the header, adds its tensors, and checks that the file ends where the last tensor does.
pub(super) fn read_header(path: &Path, tensors: &mut Tensors) -> Result<(), ProbeError> {
    let io = |source| ProbeError::Io { path: path.to_owned(), source };
    let mut file = File::open(path).map_err(|source| missing_or(path, source))?;
    let size = file.metadata().map_err(io)?.len();
    let mut length = [0; 8];
    if size < 8 {
        return Err(malformed(path, format!("the file has {size} bytes; a safetensors file has at least 8")));
    }
    file.read_exact(&mut length).map_err(io)?;
    let length = u64::from_le_bytes(length);
    if length > HEADER_BYTES_MAX {
        return Err(malformed(path, format!("claims a header of {length} bytes; at most {HEADER_BYTES_MAX} are read")));
    }
    if length > size - 8 {
        let expected = length + 8;
        return Err(malformed(path, format!("cut off: the header ends at byte {expected}, the file has {size}")));
    }
    let mut header = vec![0; length as usize];
    file.read_exact(&mut header).map_err(io)?;
    let metadata: Metadata = serde_json::from_slice(&header)
        .map_err(|error| malformed(path, format!("the header is not one of safetensors: {error}")))?;
    let expected = (metadata.data_len() as u64).saturating_add(8 + length);
    if expected != size {
        let what = if size < expected { "cut off" } else { "too long" };
        return Err(malformed(path, format!("{what}: {expected} bytes expected, the file has {size}")));
    }
    for (name, info) in metadata.tensors() {
        tensors.insert(name, (info.dtype, info.shape.clone()));
    }
    Ok(())
}

/// Number of parameters, codes counted as the values they stand for. `groups` gives the group size of a module by
/// name.
pub(super) fn parameters(tensors: &Tensors, group_size: impl Fn(&str) -> u64) -> u64 {
    let count = |shape: &[usize]| shape.iter().fold(1u64, |product, size| product.saturating_mul(*size as u64));
    let mut total = 0u64;
    for (name, (_, shape)) in tensors {
        let quantized = |module: &str| tensors.contains_key(&format!("{module}.scales"));
        // One scale stands for one group, however many bits its codes have.
        let elements = if let Some(module) = name.strip_suffix(".scales") {
            count(shape).saturating_mul(group_size(module))
        } else if name.strip_suffix(".biases").or(name.strip_suffix(".weight")).is_some_and(quantized) {
            0
        } else if name.ends_with("_scales") && tensors.contains_key(&name.replace("_scales", "_blocks")) {
            count(shape).saturating_mul(32)
        } else if name.ends_with("_scale_inv")
            || (name.ends_with("_blocks") && tensors.contains_key(&name.replace("_blocks", "_scales")))
        {
            0
        } else {
            count(shape)
        };
        total = total.saturating_add(elements);
    }
    total
}
