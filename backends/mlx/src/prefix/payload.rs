//! What the tree keeps of tokens, as it sees it: something with a size that can be cut, and written as tensors.

use std::fmt::Display;

use safetensors::Dtype;

/// A tensor on its way to a file or back.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedTensor {
    /// Unique within its payload.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its elements, row by row, little-endian: as many as `shape` says.
    pub bytes: Vec<u8>,
}

/// Something that the tree holds, and that files can hold.
pub trait Payload: Sized {
    /// Why it could not be read or made.
    type Error: Display;

    /// What it occupies. The same at each call.
    fn bytes(&self) -> u64;

    /// Its tensors, to be written.
    fn tensors(&self) -> Result<Vec<NamedTensor>, Self::Error>;

    /// The payload of these tensors, in the order they were given in. `tokens` is how many tokens a segment is for, or
    /// how many come before a point. The tensors come from a file whose checksum holds; their number and shapes are
    /// still to be checked.
    fn from_tensors(tokens: usize, tensors: Vec<NamedTensor>) -> Result<Self, Self::Error>;
}

/// What is kept of each token of a run, and of it alone: keys and values of layers that see all positions.
pub trait Segment: Payload {
    /// For how many tokens.
    fn tokens(&self) -> usize;

    /// The parts before and from token `at`, which is neither 0 nor [`tokens`](Self::tokens). Neither part may keep the
    /// whole alive: the tree counts their bytes and lets go of `self`.
    fn split(&self, at: usize) -> Result<(Self, Self), Self::Error>;
}
