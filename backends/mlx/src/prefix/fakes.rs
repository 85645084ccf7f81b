//! Payloads that say what they are of, so that a test sees at once when a wrong one is handed out.

use safetensors::Dtype;

use super::{NamedTensor, Payload, Segment};

/// The tokens themselves, at some bytes each.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Run(pub Vec<u32>);

/// All tokens before the point.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mark(pub Vec<u32>);

pub const TOKEN_BYTES: u64 = 100;
pub const MARK_BYTES: u64 = 1000;

fn tensor(tokens: &[u32]) -> Vec<NamedTensor> {
    let bytes = tokens.iter().flat_map(|token| token.to_le_bytes()).collect();
    vec![NamedTensor { name: "fake".into(), dtype: Dtype::U32, shape: vec![tokens.len()], bytes }]
}

fn tokens(count: usize, tensors: Vec<NamedTensor>) -> Result<Vec<u32>, String> {
    let [tensor] = &tensors[..] else { return Err(format!("{} tensors", tensors.len())) };
    let tokens: Vec<u32> =
        tensor.bytes.chunks_exact(4).map(|four| u32::from_le_bytes(four.try_into().unwrap_or_default())).collect();
    if tensor.name != "fake" || tokens.len() != count {
        return Err(format!("{} of {count} tokens in {}", tokens.len(), tensor.name));
    }
    Ok(tokens)
}

impl Payload for Run {
    type Error = String;

    fn bytes(&self) -> u64 {
        self.0.len() as u64 * TOKEN_BYTES
    }

    fn tensors(&self) -> Result<Vec<NamedTensor>, String> {
        Ok(tensor(&self.0))
    }

    fn from_tensors(count: usize, tensors: Vec<NamedTensor>) -> Result<Self, String> {
        tokens(count, tensors).map(Self)
    }
}

impl Segment for Run {
    fn tokens(&self) -> usize {
        self.0.len()
    }

    fn split(&self, at: usize) -> Result<(Self, Self), String> {
        assert!(0 < at && at < self.0.len(), "a cut at an end");
        let (first, second) = self.0.split_at(at);
        Ok((Self(first.to_vec()), Self(second.to_vec())))
    }
}

impl Payload for Mark {
    type Error = String;

    fn bytes(&self) -> u64 {
        MARK_BYTES
    }

    fn tensors(&self) -> Result<Vec<NamedTensor>, String> {
        Ok(tensor(&self.0))
    }

    fn from_tensors(count: usize, tensors: Vec<NamedTensor>) -> Result<Self, String> {
        tokens(count, tensors).map(Self)
    }
}
