//! K-quants: blocks of 256 values whose scales are small integers times one or two f16 numbers of the block.
//!
//! Codes lie by significance: two or four bits of values that are 32 or 64 apart share a byte.

use super::block::{GROUP, Group, half_at};

/// Values of a block.
pub(super) const ELEMENTS: usize = 256;

/// Where the codes of a Q4_K begin, and the fifth bits of a Q5_K.
const CODES_AT: usize = 16;

/// Group `part` (of 8) of a Q4_K: two f16 numbers, 12 bytes of 6-bit scales and biases, 128 of codes.
pub(super) fn q4(block: &[u8], part: usize) -> Group {
    let codes = &block[CODES_AT + part / 2 * GROUP..];
    affine(block, part, |i| nibble(codes[i], part))
}

/// Group `part` (of 8) of a Q5_K: as Q4_K, with 32 bytes before the codes that hold fifth bits, bit `part` of byte `i`
/// for value `i`.
pub(super) fn q5(block: &[u8], part: usize) -> Group {
    let (fifth, codes) = (&block[CODES_AT..], &block[CODES_AT + GROUP + part / 2 * GROUP..]);
    affine(block, part, |i| nibble(codes[i], part) | (((fifth[i] >> part) & 1) << 4))
}

fn nibble(byte: u8, part: usize) -> u8 {
    if part.is_multiple_of(2) { byte & 15 } else { byte >> 4 }
}

/// The scale and the bias of a group; a bias is stored by what it takes away.
fn affine(block: &[u8], part: usize, code: impl Fn(usize) -> u8) -> Group {
    let packed = &block[4..16];
    // The first four scales and biases have bytes of their own, whose two high bits are those of the last four.
    let (scale, bias) = match part {
        0..4 => (packed[part] & 63, packed[part + 4] & 63),
        _ => {
            let low = packed[part + 4];
            ((low & 15) | (packed[part - 4] >> 6 << 4), (low >> 4) | (packed[part] >> 6 << 4))
        }
    };
    Group {
        codes: std::array::from_fn(code),
        scale: half_at(block, 0) * f32::from(scale),
        bias: -(half_at(block, 2) * f32::from(bias)),
    }
}

/// Q2_K: 16 bytes with a scale (low half) and a bias (high half) for 16 values each, 64 of codes, two f16 numbers.
pub(super) fn q2_values(block: &[u8], out: &mut Vec<f32>) {
    let (scale, bias) = (half_at(block, 80), half_at(block, 82));
    out.extend((0..ELEMENTS).map(|i| {
        let (code, packed) = (two_bits(&block[16..80], i), block[i / 16]);
        scale * f32::from(packed & 15) * f32::from(code) - bias * f32::from(packed >> 4)
    }));
}

/// Q3_K: 32 bytes of third bits, 64 of codes, 12 of 6-bit scales, an f16 number.
pub(super) fn q3_values(block: &[u8], out: &mut Vec<f32>) {
    let (packed, whole) = (&block[96..108], half_at(block, 108));
    let scales: [f32; 16] = std::array::from_fn(|part| {
        let low = (packed[part % 8] >> (part / 8 * 4)) & 15;
        let high = (packed[8 + part % 4] >> (part / 4 * 2)) & 3;
        whole * f32::from((low | high << 4) as i8 - 32)
    });
    out.extend((0..ELEMENTS).map(|i| {
        let third = (block[i % 32] >> (i / 32)) & 1;
        let code = two_bits(&block[32..96], i) | third << 2;
        scales[i / 16] * f32::from(code as i8 - 4)
    }));
}

/// Q6_K: 128 bytes of low bits, 64 of high bits, 16 signed scales, an f16 number.
pub(super) fn q6_values(block: &[u8], out: &mut Vec<f32>) {
    let whole = half_at(block, 208);
    let scales: [f32; 16] = std::array::from_fn(|part| whole * f32::from(block[192 + part] as i8));
    out.extend((0..ELEMENTS).map(|i| {
        let (half, within) = (i / 128, i % 128);
        let low = nibble(block[half * 64 + within % 64], within / 64);
        let code = low | two_bits(&block[128..192], i) << 4;
        scales[i / 16] * f32::from(code as i8 - 32)
    }));
}

/// Two bits of value `i`: of each 128 values, 32 bytes hold those that are 32 apart, the first in the lowest bits.
fn two_bits(bytes: &[u8], i: usize) -> u8 {
    (bytes[i / 128 * 32 + i % 32] >> (i % 128 / 32 * 2)) & 3
}
