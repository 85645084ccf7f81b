//! GGUF groups of 32 into MLX affine groups of 32: in both a value is `code * scale + bias`, so values stay exact.

use crate::gguf::GROUP;

/// Packs a group's codes as one little-endian bit string: `bits` words of 32 bits, appended to `out`.
pub(super) fn pack(codes: &[u8; GROUP], bits: usize, out: &mut Vec<u8>) {
    let (mut word, mut filled) = (0u64, 0);
    for code in codes {
        word |= u64::from(*code) << filled;
        filled += bits;
        while filled >= 8 {
            out.push(word as u8);
            word >>= 8;
            filled -= 8;
        }
    }
}
