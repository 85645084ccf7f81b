//! CBOR in and out. What comes in may be anything.

use std::{fmt, marker::PhantomData};

use serde::{
    Deserialize, Deserializer, Serialize,
    de::{self, DeserializeOwned, SeqAccess},
};

use super::AdvertError;

/// Maps and lists within one another. Adverts need six; what is passed over may have some more.
const DEPTH_MAX: usize = 16;

/// The longest complaint about a malformed message, in characters: it may quote the message.
const COMPLAINT_CHARS_MAX: usize = 200;

pub(super) fn encode(value: &impl Serialize) -> Vec<u8> {
    let mut bytes = Vec::new();
    ciborium::into_writer(value, &mut bytes).expect("memory takes everything, and the types have a form in CBOR");
    bytes
}

pub(super) fn decode<T: DeserializeOwned>(bytes: &[u8], max: usize) -> Result<T, AdvertError> {
    if bytes.len() > max {
        return Err(AdvertError::Long { bytes: bytes.len(), max });
    }
    let mut rest = bytes;
    let value = ciborium::de::from_reader_with_recursion_limit(&mut rest, DEPTH_MAX).map_err(|error| {
        let complaint = match error {
            ciborium::de::Error::Io(_) => "it ends too early".to_owned(),
            ciborium::de::Error::Syntax(at) => format!("no CBOR at byte {at}"),
            ciborium::de::Error::Semantic(_, what) => what.chars().take(COMPLAINT_CHARS_MAX).collect(),
            ciborium::de::Error::RecursionLimitExceeded => format!("nested deeper than {DEPTH_MAX}"),
        };
        AdvertError::Malformed(complaint)
    })?;
    match rest.len() {
        0 => Ok(value),
        more => Err(AdvertError::Malformed(format!("{more} bytes after its end"))),
    }
}

/// A list of at most `MAX`. Memory is taken as elements come: how many the sender says there are counts for nothing.
pub(super) fn bounded<'de, D, T, const MAX: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Visitor<T, const MAX: usize>(PhantomData<T>);

    impl<'de, T: Deserialize<'de>, const MAX: usize> de::Visitor<'de> for Visitor<T, MAX> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "at most {MAX}")
        }

        fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let mut found = Vec::new();
            while let Some(element) = list.next_element()? {
                if found.len() == MAX {
                    return Err(de::Error::invalid_length(MAX + 1, &self));
                }
                found.push(element);
            }
            Ok(found)
        }
    }

    deserializer.deserialize_seq(Visitor::<T, MAX>(PhantomData))
}
