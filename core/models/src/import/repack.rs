//! GGUF groups of 32 into MLX affine groups of 32: in both a value is `code * scale + bias`, so values stay exact. Blocks with
//! other groups are quantized anew.

use crate::gguf::{GROUP, Group};

/// Values as a group with codes of so many bits, up to 8: the least is code 0 and the greatest the highest code.
pub(super) fn quantized(values: &[f32; GROUP], bits: usize) -> Group {
    let (least, greatest) = values
        .iter()
        .fold((f32::INFINITY, f32::NEG_INFINITY), |(least, greatest), value| (least.min(*value), greatest.max(*value)));
    let top = ((1u32 << bits) - 1) as f32;
    let scale = (greatest - least) / top;
    let code = |value: f32| if scale > 0.0 { ((value - least) / scale).round().clamp(0.0, top) as u8 } else { 0 };
    Group { codes: values.map(code), scale, bias: least }
}

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
