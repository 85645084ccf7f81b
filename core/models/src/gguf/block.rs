//! The block types of GGUF, taken apart.
//!
//! In most types a value is `code * scale + bias` with one scale and one bias for 32 values; the types with one number
//! have an implied bias of `-scale` times the middle code. Products of an f16 scale and an integer of up to 8 bits are
//! exact in f32, and so are these scales and biases. Q2_K, Q3_K and Q6_K have a scale for 16 values.

use half::f16;

use super::{TensorType, k_block};

/// Values that share a scale in an affine block.
pub(crate) const GROUP: usize = 32;

/// A block type of that kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
    Q2K,
    Q3K,
    Q4K,
    Q5K,
    Q6K,
}

/// Values with their scale and bias.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub codes: [u8; GROUP],
    pub scale: f32,
    pub bias: f32,
}

impl Group {
    /// The values, in order.
    pub fn values(&self) -> [f32; GROUP] {
        self.codes.map(|code| f32::from(code) * self.scale + self.bias)
    }
}

impl Block {
    /// Every kind that is known.
    pub const NAMES: &'static [&'static str] =
        &["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"];

    pub fn of(kind: TensorType) -> Option<Self> {
        Some(match kind {
            TensorType::Q4_0 => Self::Q4_0,
            TensorType::Q4_1 => Self::Q4_1,
            TensorType::Q5_0 => Self::Q5_0,
            TensorType::Q5_1 => Self::Q5_1,
            TensorType::Q8_0 => Self::Q8_0,
            TensorType::Q2_K => Self::Q2K,
            TensorType::Q3_K => Self::Q3K,
            TensorType::Q4_K => Self::Q4K,
            TensorType::Q5_K => Self::Q5K,
            TensorType::Q6_K => Self::Q6K,
            _ => return None,
        })
    }

    /// Bits of a code of an affine group; absent for the types whose scales are for fewer than [`GROUP`] values.
    pub fn affine_bits(self) -> Option<usize> {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q4K => Some(4),
            Self::Q5_0 | Self::Q5_1 | Self::Q5K => Some(5),
            Self::Q8_0 => Some(8),
            Self::Q2K | Self::Q3K | Self::Q6K => None,
        }
    }

    /// Bits of the codes of affine groups that it is quantized to where it has none of its own: two more than it has, or
    /// three, so that little is lost.
    pub fn bits_anew(self) -> usize {
        match self {
            Self::Q2K => 5,
            Self::Q3K => 6,
            _ => 8,
        }
    }

    /// Bytes of a block.
    pub fn bytes(self) -> usize {
        match self {
            Self::Q4_0 => 18,
            Self::Q4_1 => 20,
            Self::Q5_0 => 22,
            Self::Q5_1 => 24,
            Self::Q8_0 => 34,
            Self::Q2K => 84,
            Self::Q3K => 110,
            Self::Q4K => 144,
            Self::Q5K => 176,
            Self::Q6K => 210,
        }
    }

    /// Values of a block.
    pub fn elements(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => GROUP,
            Self::Q2K | Self::Q3K | Self::Q4K | Self::Q5K | Self::Q6K => k_block::ELEMENTS,
        }
    }

    /// Hands the groups of an affine block to `each`, in order; the other types have none. `block` has
    /// [`Self::bytes`] bytes.
    pub fn groups(self, block: &[u8], mut each: impl FnMut(&Group)) {
        match self {
            Self::Q4_0 | Self::Q4_1 | Self::Q5_0 | Self::Q5_1 | Self::Q8_0 => each(&self.group(block)),
            Self::Q4K => (0..8).for_each(|part| each(&k_block::q4(block, part))),
            Self::Q5K => (0..8).for_each(|part| each(&k_block::q5(block, part))),
            Self::Q2K | Self::Q3K | Self::Q6K => {}
        }
    }

    /// Appends a block's values, in order. `block` has [`Self::bytes`] bytes.
    pub fn values(self, block: &[u8], out: &mut Vec<f32>) {
        match self {
            Self::Q2K => k_block::q2_values(block, out),
            Self::Q3K => k_block::q3_values(block, out),
            Self::Q6K => k_block::q6_values(block, out),
            _ => self.groups(block, |group| out.extend(group.values())),
        }
    }

    /// A block of 32 values.
    fn group(self, block: &[u8]) -> Group {
        let scale = half_at(block, 0);
        let mut codes = [0; GROUP];
        // The first 16 values lie in the low halves of the bytes, the others in the high ones; fifth bits lie together.
        let mut nibbles = |codes_at: usize, fifth: u32| {
            for i in 0..GROUP / 2 {
                let byte = block[codes_at + i];
                codes[i] = (byte & 15) | (((fifth >> i) & 1) << 4) as u8;
                codes[i + 16] = (byte >> 4) | (((fifth >> (i + 16)) & 1) << 4) as u8;
            }
        };
        let fifth_at = |at: usize| u32::from_le_bytes([block[at], block[at + 1], block[at + 2], block[at + 3]]);
        let bias = match self {
            Self::Q4_0 => {
                nibbles(2, 0);
                -8.0 * scale
            }
            Self::Q4_1 => {
                nibbles(4, 0);
                half_at(block, 2)
            }
            Self::Q5_0 => {
                nibbles(6, fifth_at(2));
                -16.0 * scale
            }
            Self::Q5_1 => {
                nibbles(8, fifth_at(4));
                half_at(block, 2)
            }
            _ => {
                for (code, byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte.wrapping_add(128); // from -128..=127 to 0..=255
                }
                -128.0 * scale
            }
        };
        Group { codes, scale, bias }
    }
}

/// The 16-bit float at a byte.
pub(super) fn half_at(block: &[u8], at: usize) -> f32 {
    f16::from_le_bytes([block[at], block[at + 1]]).to_f32()
}
