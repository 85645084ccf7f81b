//! CBOR with bounds: self-describing, so that what a newer node adds an older one skips, and exact about floats.

use serde::{Serialize, de::DeserializeOwned};

/// Containers within containers that are read.
const DEPTH_MAX: usize = 96;
/// Lists, maps, texts and the like in a message. A single byte of one can take 200 bytes of memory, where it is JSON.
const VALUES_MAX: usize = 1 << 19;
/// Numbers in a message: as many as fit into the vectors of an answer.
const NUMBERS_MAX: usize = 1 << 23;

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
    /// They hold more than is kept in memory.
    #[error("more than {max} {what}")]
    TooMany {
        /// Of what.
        what: &'static str,
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
    let (values, numbers) = counted(bytes).ok_or_else(|| malformed("it is cut off".into()))?;
    for (what, found, max) in [("values", values, VALUES_MAX), ("numbers", numbers, NUMBERS_MAX)] {
        if found > max {
            return Err(CodecError::TooMany { what, max });
        }
    }
    let value = ciborium::de::from_reader_with_recursion_limit(&mut bytes, DEPTH_MAX)
        .map_err(|error| malformed(error.to_string()))?;
    match bytes.is_empty() {
        true => Ok(value),
        false => Err(malformed(format!("{} bytes too many", bytes.len()))),
    }
}

/// The values and the numbers in a message, before any of it takes memory; `None` if something in it claims to be longer than
/// what is left, for which a reader would make room. Of what is no CBOR it counts something, and the reader says so.
fn counted(bytes: &[u8]) -> Option<(usize, usize)> {
    let (mut values, mut numbers, mut rest) = (0, 0, bytes);
    while let Some((head, after)) = rest.split_first() {
        let (major, short) = (head >> 5, head & 0x1f);
        let bytes = if let 24..=27 = short { 1 << (short - 24) } else { 0 };
        let (argument, after) = after.split_at_checked(bytes)?;
        let argument = match bytes {
            0 => short.into(),
            _ => argument.iter().fold(0u64, |number, byte| number << 8 | u64::from(*byte)),
        };
        rest = after;
        // The length of others is not said.
        if short < 28 {
            let length = usize::try_from(argument).ok();
            match major {
                2 | 3 => rest = rest.get(length?..)?,
                4 if length? > rest.len() => return None,
                5 if length? > rest.len() / 2 => return None,
                _ => {}
            }
        }
        match (major, short) {
            (0 | 1, _) | (7, 25..=27) => numbers += 1,
            _ => values += 1,
        }
    }
    Some((values, numbers))
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

    /// A list of so many of the same.
    fn list(count: u32, of: &[u8]) -> Vec<u8> {
        let head = [&[0x9a][..], &count.to_be_bytes()].concat();
        [head, of.repeat(count as usize)].concat()
    }

    #[test]
    fn what_takes_much_memory_for_little_is_counted_before_it_is_read() {
        let nested = json!({ "text": "a text", "list": [[], {}, null, 1.5], "long": "x".repeat(300), "n": -7 });
        assert_eq!(counted(&encode(&nested)), Some((11, 2)));
        let vectors = vec![vec![0.1f32; 10]; 3];
        assert_eq!(counted(&encode(&vectors)), Some((4, 30)));
        let (max, bytes_max) = (VALUES_MAX as u32, 1 << 24);
        for value in [&[0xf6][..], &[0x80], &[0xa0], &[0x60], &[0x81, 0x01], &[0xa1, 0x60, 0xf6]] {
            let refused = decode::<Value>(&list(max, value), bytes_max);
            assert_eq!(refused, Err(CodecError::TooMany { what: "values", max: VALUES_MAX }), "{value:x?}");
        }
        // What claims to be long is no longer than what is there.
        for claim in [&[0x99, 0x80, 0x01, 0][..], &[0xb9, 0x80, 0x01, 0], &[0x79, 0x80, 0x01, 0], &[0x9b, 255, 255]] {
            assert_eq!(counted(claim), None, "{claim:x?}");
            assert!(matches!(decode::<Vec<u32>>(claim, bytes_max), Err(CodecError::Malformed { .. })));
        }
        let refused = decode::<Vec<u8>>(&list(NUMBERS_MAX as u32 + 1, &[1]), bytes_max);
        assert_eq!(refused, Err(CodecError::TooMany { what: "numbers", max: NUMBERS_MAX }));
        assert_eq!(decode::<Vec<u8>>(&list(1 << 20, &[1]), bytes_max).map(|all| all.len()), Ok(1 << 20));
    }

    proptest! {
        #[test]
        fn nothing_that_is_read_escapes_the_count(values in proptest::collection::vec("[a-zé]{0,300}", 0..20)) {
            let bytes = encode(&values);
            prop_assert_eq!(counted(&bytes), Some((values.len() + 1, 0)));
            // Nothing is missing but whole values.
            for cut in 0..bytes.len() {
                let read = decode::<Vec<String>>(&bytes[..cut], 1 << 20);
                prop_assert!(read.is_err());
            }
        }

        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            decode::<Value>(&bytes, 1 << 10).ok();
            decode::<Vec<String>>(&bytes, 1 << 10).ok();
        }
    }
}
