//! How a tensor's values are stored, where they can be had as floats.

use half::{bf16, f16};

use super::{Block, TensorType};

/// A type whose values this crate can read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Packing {
    F32,
    F16,
    BF16,
    Blocks(Block),
}

impl Packing {
    pub fn of(kind: TensorType) -> Option<Self> {
        match kind {
            TensorType::F32 => Some(Self::F32),
            TensorType::F16 => Some(Self::F16),
            TensorType::BF16 => Some(Self::BF16),
            _ => Block::of(kind).map(Self::Blocks),
        }
    }

    /// Bytes of the smallest run that has values of its own.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::F16 | Self::BF16 => 2,
            Self::Blocks(block) => block.bytes(),
        }
    }

    /// Values of such a run.
    pub fn elements(self) -> usize {
        match self {
            Self::F32 | Self::F16 | Self::BF16 => 1,
            Self::Blocks(block) => block.elements(),
        }
    }

    /// Appends the values of whole runs, in order.
    pub fn values(self, stored: &[u8], out: &mut Vec<f32>) {
        match self {
            Self::F32 => out.extend(stored.as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes))),
            Self::F16 => out.extend(stored.as_chunks().0.iter().map(|bytes| f16::from_le_bytes(*bytes).to_f32())),
            Self::BF16 => out.extend(stored.as_chunks().0.iter().map(|bytes| bf16::from_le_bytes(*bytes).to_f32())),
            Self::Blocks(block) => stored.chunks_exact(block.bytes()).for_each(|stored| block.values(stored, out)),
        }
    }
}
