//! CBOR with bounds: self-describing, so that what a newer node adds an older one skips, and exact about floats.

use serde::{Serialize, de::DeserializeOwned};

/// Containers within containers that are read.
const DEPTH_MAX: usize = 96;

/// Bytes that are not what they should be.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// More of them than are read.
    #[error("{bytes} bytes, and {max} are the most")]
    TooLarge {
        /// How many.
        bytes: usize,
        /// How many may be.
        max: usize,
    },
    /// They do not read as what is expected.
    #[error("not readable: {what}")]
    Malformed {
        /// Why.
        what: String,
    },
}

/// The bytes of a value.
pub fn encode(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    // Writing to memory does not fail, and none of the types refuses to be written.
    ciborium::into_writer(value, &mut bytes).ok();
    bytes
}

/// The value of bytes. What stands after it is an error.
pub fn decode<T: DeserializeOwned>(mut bytes: &[u8], bytes_max: usize) -> Result<T, CodecError> {
    if bytes.len() > bytes_max {
        return Err(CodecError::TooLarge { bytes: bytes.len(), max: bytes_max });
    }
    let malformed = |what: String| CodecError::Malformed { what };
    let value = ciborium::de::from_reader_with_recursion_limit(&mut bytes, DEPTH_MAX)
        .map_err(|error| malformed(error.to_string()))?;
    match bytes.is_empty() {
        true => Ok(value),
        false => Err(malformed(format!("{} bytes too many", bytes.len()))),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn values_come_back_as_they_were() {
        let value = json!({ "b": [1, -2, 0.1, null, true], "a": { "ü": "x" }, "n": u64::MAX });
        assert_eq!(decode::<Value>(&encode(&value), 1 << 10), Ok(value));
        assert_eq!(decode::<f32>(&encode(&f32::NEG_INFINITY), 16), Ok(f32::NEG_INFINITY));
        assert!(matches!(decode::<Value>(&[0; 9], 8), Err(CodecError::TooLarge { bytes: 9, max: 8 })));
        assert!(decode::<u8>(&[1, 1], 8).is_err(), "what stands after a value is no part of it");
        let deep: Vec<u8> = std::iter::repeat_n(0x81, 1000).chain([0]).collect();
        assert!(decode::<Value>(&deep, 1 << 12).is_err());
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            decode::<Value>(&bytes, 1 << 10).ok();
            decode::<Vec<String>>(&bytes, 1 << 10).ok();
        }
    }
}
