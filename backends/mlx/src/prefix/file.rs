//! One file of the disk tier: a run of tokens, its segment, and perhaps the point at its end, as safetensors.
//!
//! The header's `sha256` is that of the whole file with zeros in its own place, so no byte can change unnoticed. It is
//! verified whenever payloads are read; a header alone is read at start, where the file's name vouches for the tokens:
//! it is the hash of all tokens up to the run's end ([`Chain`]).

use std::{
    collections::{HashMap, HashSet},
    io::{self, Read, Seek, SeekFrom, Write},
};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};
use sha2::{Digest, Sha256};

use super::payload::NamedTensor;

/// What files are written as. Another format has another name.
pub(super) const FORMAT: &str = "mesh-llm-prefix-2";

/// Tokens of a run.
pub(super) const RUN_TOKENS_MAX: usize = 1 << 20;

const HEADER_BYTES_MAX: u64 = 1 << 20;
const TOKENS: &str = "tokens";
const SEGMENT: &str = "segment.";
const POINT: &str = "point.";
const CHECKSUM_KEY: &[u8] = b"\"sha256\":\"";
const NO_CHECKSUM: [u8; 64] = [b'0'; 64];

pub(super) type Hash = [u8; 32];

/// The hash of a model and the tokens so far. It does not depend on how the tokens were cut into runs, so that files
/// stay where they belong when an edge above them is split.
#[derive(Clone)]
pub(super) struct Chain(Sha256);

impl Chain {
    /// Before the first token.
    pub fn new(model: &str) -> Self {
        let mut hash = Sha256::new();
        hash.update(FORMAT);
        hash.update((model.len() as u64).to_le_bytes());
        hash.update(model);
        Self(hash)
    }

    pub fn extend(&mut self, tokens: &[u32]) {
        self.0.update(bytes_of(tokens));
    }

    pub fn hash(&self) -> Hash {
        self.0.clone().finalize().into()
    }
}

/// What a file says of itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Head {
    /// How many tokens come before the run.
    pub start: usize,
    /// Their chain's hash.
    pub parent: Hash,
    /// The run.
    pub tokens: Vec<u32>,
    /// Whether there is a point.
    pub pointed: bool,
}

/// A file's payloads, verified.
pub(super) struct Content {
    pub segment: Vec<NamedTensor>,
    pub point: Option<Vec<NamedTensor>>,
}

#[derive(Debug, thiserror::Error)]
pub(super) enum FileError {
    #[error(transparent)]
    Io(#[from] io::Error),
    /// It is not, or no longer, what was written.
    #[error("{0}")]
    Unfit(&'static str),
}

impl FileError {
    /// What ends too early is unfit, and not the disk's fault.
    fn reading(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::UnexpectedEof => Self::Unfit("it is cut off"),
            _ => Self::Io(error),
        }
    }
}

/// A file about to be written.
pub(super) struct Draft {
    header: Vec<u8>,
    data: Vec<Vec<u8>>,
}

impl Draft {
    pub fn new(
        model: &str,
        head: &Head,
        segment: Vec<NamedTensor>,
        point: Option<Vec<NamedTensor>>,
    ) -> Result<Self, FileError> {
        let tokens = NamedTensor {
            name: TOKENS.into(),
            dtype: Dtype::U32,
            shape: vec![head.tokens.len()],
            bytes: bytes_of(&head.tokens),
        };
        let prefixed = |prefix: &'static str| {
            move |tensor: NamedTensor| NamedTensor { name: format!("{prefix}{}", tensor.name), ..tensor }
        };
        let segment = segment.into_iter().map(prefixed(SEGMENT));
        let point = point.into_iter().flatten().map(prefixed(POINT));
        let (mut infos, mut data, mut end) = (Vec::new(), Vec::new(), 0);
        for tensor in std::iter::once(tokens).chain(segment).chain(point) {
            let begin = end;
            end += tensor.bytes.len();
            let info = TensorInfo { dtype: tensor.dtype, shape: tensor.shape, data_offsets: (begin, end) };
            infos.push((tensor.name, info));
            data.push(tensor.bytes);
        }
        if infos.iter().map(|(name, _)| name).collect::<HashSet<_>>().len() < infos.len() {
            return Err(FileError::Unfit("two of its tensors have one name"));
        }
        let notes = [
            ("format", FORMAT.to_owned()),
            ("model", model.to_owned()),
            ("start", head.start.to_string()),
            ("parent", hex(&head.parent)),
            ("point", head.pointed.to_string()),
            ("sha256", String::from_utf8_lossy(&NO_CHECKSUM).into_owned()),
        ];
        let notes: HashMap<String, String> = notes.into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
        let metadata = Metadata::new(Some(notes), infos)
            .map_err(|_| FileError::Unfit("a tensor's bytes are not as many as its shape says"))?;
        let mut text = serde_json::to_vec(&metadata).map_err(io::Error::from)?;
        text.resize(text.len().next_multiple_of(8), b' ');
        if text.len() as u64 > HEADER_BYTES_MAX {
            return Err(FileError::Unfit("its header is too long"));
        }
        let header = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        Ok(Self { header, data })
    }

    /// The length of the file.
    pub fn bytes(&self) -> u64 {
        self.header.len() as u64 + self.data.iter().map(|data| data.len() as u64).sum::<u64>()
    }

    /// Writes the file, the checksum last.
    pub fn write(&self, mut to: impl Write + Seek) -> Result<(), FileError> {
        let place = checksum_place(&self.header).ok_or(FileError::Unfit("its header has no checksum"))?;
        let mut hash = Sha256::new();
        for part in std::iter::once(&self.header).chain(&self.data) {
            hash.update(part);
            to.write_all(part)?;
        }
        to.seek(SeekFrom::Start(place as u64))?;
        to.write_all(hex(&hash.finalize()).as_bytes())?;
        Ok(to.flush()?)
    }
}

/// The header, as it is in a file of `length` bytes.
struct Header {
    bytes: Vec<u8>,
    metadata: Metadata,
}

impl Header {
    fn read(mut from: impl Read, length: u64) -> Result<Self, FileError> {
        let mut count = [0; 8];
        from.read_exact(&mut count).map_err(FileError::reading)?;
        let text_bytes = u64::from_le_bytes(count);
        if text_bytes > HEADER_BYTES_MAX || text_bytes + 8 > length {
            return Err(FileError::Unfit("its header is longer than it can be"));
        }
        let mut bytes = vec![0; text_bytes as usize + 8];
        bytes[..8].copy_from_slice(&count);
        from.read_exact(&mut bytes[8..]).map_err(FileError::reading)?;
        let metadata: Metadata =
            serde_json::from_slice(&bytes[8..]).map_err(|_| FileError::Unfit("its header is no safetensors header"))?;
        if bytes.len() as u64 + metadata.data_len() as u64 != length {
            return Err(FileError::Unfit("it is not as long as its header says"));
        }
        Ok(Self { bytes, metadata })
    }

    fn note(&self, key: &str) -> Option<&str> {
        self.metadata.metadata().as_ref()?.get(key).map(String::as_str)
    }

    /// How many tokens the run has, which the data begin with.
    fn run_tokens(&self) -> Option<usize> {
        let info = self.metadata.info(TOKENS)?;
        let &[count] = &info.shape[..] else { return None };
        let fits = info.dtype == Dtype::U32 && info.data_offsets.0 == 0 && (1..=RUN_TOKENS_MAX).contains(&count);
        fits.then_some(count)
    }
}

/// Reads the head of a file of `length` bytes; fails if it is not of this format and model, or has more tokens than
/// `tokens_max`.
pub(super) fn read_head(mut from: impl Read, length: u64, model: &str) -> Result<Head, FileError> {
    let header = Header::read(&mut from, length)?;
    if header.note("format") != Some(FORMAT) || header.note("model") != Some(model) {
        return Err(FileError::Unfit("it is of another format or model"));
    }
    let count = header.run_tokens().ok_or(FileError::Unfit("it has no tokens"))?;
    let start = header.note("start").and_then(|start| start.parse().ok());
    let parent = header.note("parent").and_then(unhex);
    let pointed = header.note("point").and_then(|point| point.parse().ok());
    let (Some(start), Some(parent), Some(pointed)) = (start, parent, pointed) else {
        return Err(FileError::Unfit("its header lacks something"));
    };
    let mut bytes = vec![0; count * 4];
    from.read_exact(&mut bytes).map_err(FileError::reading)?;
    let tokens = bytes.chunks_exact(4).map(|four| u32::from_le_bytes([four[0], four[1], four[2], four[3]])).collect();
    Ok(Head { start, parent, tokens, pointed })
}

/// Reads all of a file of `length` bytes and verifies its checksum.
pub(super) fn read_content(mut from: impl Read, length: u64) -> Result<Content, FileError> {
    let Header { mut bytes, metadata } = Header::read(&mut from, length)?;
    let place = checksum_place(&bytes).ok_or(FileError::Unfit("its header has no checksum"))?;
    let mut claimed = NO_CHECKSUM;
    bytes
        .get_mut(place..place + claimed.len())
        .ok_or(FileError::Unfit("its header is cut off"))?
        .swap_with_slice(&mut claimed);
    let mut hash = Sha256::new();
    hash.update(&bytes);
    let (mut segment, mut point) = (Vec::new(), Vec::new());
    let pointed =
        metadata.metadata().as_ref().and_then(|notes| notes.get("point")).is_some_and(|point| point == "true");
    for name in metadata.offset_keys() {
        let Some(info) = metadata.info(&name) else { continue };
        // No longer than the file, which the header was compared with.
        let mut bytes = vec![0; info.data_offsets.1 - info.data_offsets.0];
        from.read_exact(&mut bytes).map_err(FileError::reading)?;
        hash.update(&bytes);
        let tensor =
            |name: &str| NamedTensor { name: name.into(), dtype: info.dtype, shape: info.shape.clone(), bytes };
        if let Some(name) = name.strip_prefix(SEGMENT) {
            segment.push(tensor(name));
        } else if let Some(name) = name.strip_prefix(POINT) {
            point.push(tensor(name));
        }
    }
    if hex(&hash.finalize()).as_bytes() != claimed {
        return Err(FileError::Unfit("its checksum does not hold"));
    }
    Ok(Content { segment, point: Some(point).filter(|_| pointed) })
}

/// Where in a header the checksum is. What is quoted elsewhere in it has its quotes escaped.
fn checksum_place(header: &[u8]) -> Option<usize> {
    let key = header.windows(CHECKSUM_KEY.len()).position(|window| window == CHECKSUM_KEY)?;
    Some(key + CHECKSUM_KEY.len())
}

fn bytes_of(tokens: &[u32]) -> Vec<u8> {
    tokens.iter().flat_map(|token| token.to_le_bytes()).collect()
}

pub(super) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub(super) fn unhex(text: &str) -> Option<Hash> {
    let digits: Vec<u8> =
        text.bytes().map(|digit| (digit as char).to_digit(16).map(|digit| digit as u8)).collect::<Option<_>>()?;
    let bytes: Vec<u8> = digits.chunks_exact(2).map(|pair| pair[0] << 4 | pair[1]).collect();
    bytes.try_into().ok().filter(|_| digits.len() == 64)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensor(name: &str, count: usize) -> NamedTensor {
        NamedTensor { name: name.into(), dtype: Dtype::BF16, shape: vec![count, 1], bytes: vec![7; 4] }
    }

    fn write(model: &str, segment: Vec<NamedTensor>, point: Option<Vec<NamedTensor>>) -> Result<Vec<u8>, FileError> {
        let head = Head { start: 5, parent: [3; 32], tokens: vec![1, 2], pointed: point.is_some() };
        let draft = Draft::new(model, &head, segment, point)?;
        let mut bytes = io::Cursor::new(Vec::new());
        draft.write(&mut bytes)?;
        assert_eq!(draft.bytes(), bytes.get_ref().len() as u64);
        let read = read_head(&bytes.get_ref()[..], draft.bytes(), model)?;
        assert_eq!(read, head);
        Ok(bytes.into_inner())
    }

    #[test]
    fn tensors_come_back_in_their_order_with_their_names() {
        let segment = vec![tensor("z", 2), tensor("a", 2), tensor("tokens", 2), tensor("point.a", 2)];
        for point in [None, Some(vec![]), Some(vec![tensor("z", 2), tensor("a", 2)])] {
            // A model's name that looks like a checksum's place.
            let bytes = write("\"sha256\":\"", segment.clone(), point.clone()).unwrap();
            let content = read_content(&bytes[..], bytes.len() as u64).unwrap();
            assert_eq!((content.segment, content.point), (segment.clone(), point));
            // Others can read it too.
            assert!(safetensors::SafeTensors::deserialize(&bytes).is_ok());
        }
    }

    #[test]
    fn what_makes_no_file_is_refused() {
        assert!(write("", vec![tensor("a", 2), tensor("a", 2)], None).is_err(), "one name");
        assert!(write("", vec![tensor("a", 3)], None).is_err(), "too few bytes");
        assert!(write(&"m".repeat(2 << 20), vec![], None).is_err(), "a header that no reader takes");
        assert!(write("", vec![], None).is_ok());
    }

    #[test]
    fn a_chain_knows_its_tokens_and_not_their_cuts() {
        let chain = |model: &str, runs: &[&[u32]]| {
            let mut chain = Chain::new(model);
            runs.iter().for_each(|run| chain.extend(run));
            chain.hash()
        };
        assert_eq!(chain("m", &[&[1, 2], &[3]]), chain("m", &[&[1], &[2, 3]]));
        assert_ne!(chain("m", &[&[1, 2]]), chain("m", &[&[2, 1]]));
        assert_ne!(chain("m", &[]), chain("n", &[]));
    }
}
