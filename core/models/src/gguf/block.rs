//! The block types of GGUF that are 32 codes with a scale, taken apart.
//!
//! A value is `code * scale + bias`; the types with one number have an implied bias of `-scale` times the middle code.
//! Products of an f16 scale and an 8-bit code, and these biases, are exact in f32.

use half::f16;

use super::TensorType;

/// Values that share a scale.
pub(crate) const GROUP: usize = 32;

/// A block type of that kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Block {
    Q4_0,
    Q4_1,
    Q5_0,
    Q5_1,
    Q8_0,
}

/// A block taken apart.
pub(crate) struct Group {
    pub codes: [u8; GROUP],
    pub scale: f32,
    pub bias: f32,
}

impl Block {
    pub const NAMES: &'static [&'static str] = &["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"];

    pub fn of(kind: TensorType) -> Option<Self> {
        match kind {
            TensorType::Q4_0 => Some(Self::Q4_0),
            TensorType::Q4_1 => Some(Self::Q4_1),
            TensorType::Q5_0 => Some(Self::Q5_0),
            TensorType::Q5_1 => Some(Self::Q5_1),
            TensorType::Q8_0 => Some(Self::Q8_0),
            _ => None,
        }
    }

    /// Bits of a code.
    pub fn bits(self) -> usize {
        match self {
            Self::Q4_0 | Self::Q4_1 => 4,
            Self::Q5_0 | Self::Q5_1 => 5,
            Self::Q8_0 => 8,
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
        }
    }

    /// Takes a block apart; `block` has [`Self::bytes`] bytes.
    pub fn read(self, block: &[u8]) -> Group {
        let half_at = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
        let scale = half_at(0);
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
                half_at(2)
            }
            Self::Q5_0 => {
                nibbles(6, fifth_at(2));
                -16.0 * scale
            }
            Self::Q5_1 => {
                nibbles(8, fifth_at(4));
                half_at(2)
            }
            Self::Q8_0 => {
                for (code, byte) in codes.iter_mut().zip(&block[2..]) {
                    *code = byte.wrapping_add(128); // from -128..=127 to 0..=255
                }
                -128.0 * scale
            }
        };
        Group { codes, scale, bias }
    }
}

impl Group {
    /// The values, in order.
    pub fn values(&self) -> [f32; GROUP] {
        self.codes.map(|code| f32::from(code) * self.scale + self.bias)
    }
}
