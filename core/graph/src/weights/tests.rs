use std::{collections::HashMap, path::PathBuf};

use mlx_rs::{Array, Dtype, ops, random};
use safetensors::tensor::{Dtype as Stored, TensorView};
use serde_json::{Value, json};

use super::{Matrix, Placement, Weights};
use crate::ffi::{self, Mode, Packed};

/// A file of tensors, given as type, shape and bytes.
fn file(folder: &tempfile::TempDir, tensors: &[(&str, Stored, &[usize], Vec<u8>)]) -> PathBuf {
    let path = folder.path().join("model.safetensors");
    let views: HashMap<String, TensorView<'_>> = tensors
        .iter()
        .map(|(name, stored, shape, bytes)| {
            ((*name).to_owned(), TensorView::new(*stored, shape.to_vec(), bytes).expect("a tensor"))
        })
        .collect();
    safetensors::serialize_to_file(views, None, &path).expect("a file");
    path
}

fn floats(values: &[f32]) -> Vec<u8> {
    values.iter().flat_map(|value| value.to_le_bytes()).collect()
}

fn open(path: PathBuf, config: &Value) -> Weights {
    Weights::open(&[path], config, Placement::cpu(false)).expect("weights")
}

/// E4M3 by its definition: no infinities, one NaN.
fn e4m3(code: u8) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let (exponent, mantissa) = (i32::from(code >> 3 & 15), f32::from(code & 7));
    sign * match exponent {
        0 => mantissa / 8.0 * 2.0_f32.powi(-6),
        _ => (1.0 + mantissa / 8.0) * 2.0_f32.powi(exponent - 7),
    }
}

fn values(array: &Array) -> Vec<f32> {
    let array = array.as_dtype(Dtype::Float32).and_then(|array| array.contiguous()).expect("floats");
    array.eval().expect("floats");
    array.to_vec_exact::<f32>().expect("floats")
}

/// Codes that run through all of E4M3 but its NaNs.
fn codes(count: usize) -> Vec<u8> {
    (0..=255_u8).filter(|code| code & 0x7f != 0x7f).cycle().take(count).collect()
}

fn fp8() -> Value {
    json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": [2, 3], "fmt": "e4m3" } })
}

#[test]
fn fp8_blocks_are_unpacked() {
    let folder = tempfile::tempdir().expect("a folder");
    // Neither side is a multiple of its block.
    let (rows, columns) = (5, 7);
    let codes = codes(rows * columns);
    let scales: Vec<f32> = (0..9).map(|block| 0.25 * (1.0 + block as f32)).collect();
    let path = file(
        &folder,
        &[
            ("a.weight", Stored::F8_E4M3, &[rows, columns], codes.clone()),
            ("a.weight_scale_inv", Stored::F32, &[3, 3], floats(&scales)),
        ],
    );
    let mut weights = open(path, &fp8());
    let Matrix::Plain(plain) = weights.take_matrix("a", 5, 7).expect("a matrix") else { panic!("still packed") };
    let expected: Vec<f32> =
        (0..rows * columns).map(|at| e4m3(codes[at]) * scales[at / columns / 2 * 3 + at % columns / 3]).collect();
    assert_eq!(values(&plain), expected);
    weights.finish().expect("nothing is left");
}

#[test]
fn fp8_experts_are_unpacked_and_stacked() {
    let folder = tempfile::tempdir().expect("a folder");
    let codes = codes(12);
    let of = |expert: usize| {
        let name: &'static str = ["m.experts.0.up", "m.experts.1.up"][expert];
        (format!("{name}.weight"), format!("{name}.weight_scale_inv"))
    };
    let (names, more) = (of(0), of(1));
    let path = file(
        &folder,
        &[
            (&names.0, Stored::F8_E4M3, &[2, 3], codes[..6].to_vec()),
            (&names.1, Stored::F32, &[1, 1], floats(&[2.0])),
            (&more.0, Stored::F8_E4M3, &[2, 3], codes[6..].to_vec()),
            (&more.1, Stored::F32, &[1, 1], floats(&[-1.0])),
        ],
    );
    let mut weights = open(path, &fp8());
    let Matrix::Plain(stack) = weights.take_experts("m", "up", 2, 2, 3).expect("experts") else { panic!("packed") };
    let expected: Vec<f32> = (0..12).map(|at| e4m3(codes[at]) * [2.0, -1.0][at / 6]).collect();
    assert_eq!(values(&stack), expected);
    weights.finish().expect("nothing is left");
}

#[test]
fn fp8_scales_that_do_not_fit_are_named() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(
        &folder,
        &[
            ("a.weight", Stored::F8_E4M3, &[4, 3], codes(12)),
            ("a.weight_scale_inv", Stored::F32, &[1, 1], floats(&[1.0])),
        ],
    );
    let error = open(path, &fp8()).take_matrix("a", 4, 3).expect_err("a misfit").to_string();
    assert!(error.contains("`a.weight_scale_inv` has shape [1, 1], not [2, 1]"), "{error}");
}

#[test]
fn fp8_with_one_scale_is_unpacked() {
    let folder = tempfile::tempdir().expect("a folder");
    let codes = codes(12);
    let path = file(
        &folder,
        &[
            ("a.weight", Stored::F8_E4M3, &[4, 3], codes.clone()),
            ("a.weight_scale_inv", Stored::F32, &[], floats(&[0.5])),
            ("a.activation_scale", Stored::F32, &[], floats(&[3.0])),
        ],
    );
    let config = json!({ "quantization_config": { "quant_method": "fp8", "weight_block_size": null } });
    let mut weights = open(path, &config);
    let Matrix::Plain(plain) = weights.take_matrix("a", 4, 3).expect("a matrix") else { panic!("still packed") };
    assert_eq!(values(&plain), codes.iter().map(|code| 0.5 * e4m3(*code)).collect::<Vec<_>>());
    weights.finish().expect("nothing is left");
}

/// Codes without a scale, or without a word in config.json, are not taken for numbers.
#[test]
fn codes_are_not_floats() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(&folder, &[("a.weight", Stored::F8_E4M3, &[4, 3], codes(12))]);
    let error = open(path.clone(), &fp8()).take_matrix("a", 4, 3).expect_err("no scale").to_string();
    assert!(error.contains("`a.weight_scale_inv` of shape [2, 1] is missing"), "{error}");
    let error = open(path, &Value::Null).take_matrix("a", 4, 3).expect_err("codes").to_string();
    assert!(error.contains("`a.weight` holds Uint8, not floats"), "{error}");
}

/// Every mode: a product with packed weights is a product with what they unpack to, and the loader keeps both.
#[test]
fn modes_agree_with_their_unpacked_values() {
    random::seed(3).expect("a seed");
    let (out, inner) = (8, 64);
    let x = random::normal::<f32>(&[3, inner], None, None, None).expect("x");
    for (mode, group_size, bits) in [
        (Mode::Affine, 32, 2),
        (Mode::Affine, 32, 3),
        (Mode::Affine, 64, 4),
        (Mode::Affine, 32, 5),
        (Mode::Affine, 32, 6),
        (Mode::Affine, 64, 8),
        (Mode::Mxfp4, 32, 4),
        (Mode::Mxfp8, 32, 8),
        (Mode::Nvfp4, 16, 4),
    ] {
        // Bytes under 0x70: no code of an 8-bit float may be NaN.
        let bytes = random::randint::<_, u8>(0, 0x70, &[out, inner * bits / 8], None).expect("codes");
        let words = bytes.view_dtype(Dtype::Uint32).expect("words");
        let groups = [out, inner / group_size];
        let (scales, biases) = match mode {
            Mode::Affine => {
                let scales = random::uniform::<_, f32>(0.1, 0.5, &groups, None).expect("scales");
                (scales.clone(), Some(scales.multiply(Array::from_f32(-3.0)).expect("biases")))
            }
            // Powers of two around one, or floats of 8 bits around it.
            Mode::Mxfp4 | Mode::Mxfp8 => (random::randint::<_, u8>(120, 130, &groups, None).expect("scales"), None),
            Mode::Nvfp4 => (random::randint::<_, u8>(40, 70, &groups, None).expect("scales"), None),
        };
        let packed = Packed { weight: words, scales, biases, group_size, bits, mode };
        let plain = ffi::dequantize(&packed).and_then(|plain| plain.as_dtype(Dtype::Float32)).expect("plain");
        let expected = ops::matmul(&x, plain.t()).expect("a product");
        let found = ffi::quantized_matmul(&x, &packed).expect("a product");
        let largest = values(&expected.abs().expect("sizes")).into_iter().fold(0.0, f32::max);
        let apart = values(&expected.subtract(&found).expect("a difference"));
        let apart = apart.into_iter().map(f32::abs).fold(0.0, f32::max);
        assert!(largest > 1.0 && apart < 1e-5 * largest.max(1.0), "{mode:?} of {bits} bits: {apart} of {largest}");
    }
}

#[test]
fn rows_are_split_and_reordered() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(
        &folder,
        &[
            ("qkv.weight", Stored::F32, &[4, 1], floats(&[0.0, 1.0, 2.0, 3.0])),
            ("qkv.bias", Stored::F32, &[4], floats(&[10.0, 11.0, 12.0, 13.0])),
        ],
    );
    let opened = || open(path.clone(), &Value::Null);
    let mut weights = opened();
    weights.split_rows("qkv", 1, &[("q", 1), ("k", 3)]).expect("split");
    assert_eq!(values(&weights.take("k.weight", &[3, 1]).expect("k")), [1.0, 2.0, 3.0]);
    assert_eq!(values(&weights.take("k.bias", &[3]).expect("k")), [11.0, 12.0, 13.0]);
    let mut weights = opened();
    weights.split_alternating_rows("qkv", 2, "even", "odd").expect("split");
    assert_eq!(values(&weights.take("odd.weight", &[2, 1]).expect("odd")), [1.0, 3.0]);
    let mut weights = opened();
    weights.reorder_rows("qkv", &[3, 2, 1, 0]).expect("reordered");
    assert_eq!(values(&weights.take("qkv.bias", &[4]).expect("bias")), [13.0, 12.0, 11.0, 10.0]);
    let error = opened().split_rows("qkv", 1, &[("q", 1), ("k", 4)]).expect_err("too many").to_string();
    assert!(error.contains("`qkv.weight` has shape [4, 1], not 5 rows"), "{error}");
    let error = opened().split_rows("gate_up", 3, &[("gate", 1), ("up", 1)]).expect_err("missing").to_string();
    assert!(error.contains("`gate_up.weight` of shape [2, 3] is missing"), "{error}");
}

/// A few floats of another type become what most are, but for those that are computed with in f32.
#[test]
fn floats_have_one_type() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(
        &folder,
        &[
            ("a.weight", Stored::BF16, &[4, 8], vec![0; 64]),
            ("norm.weight", Stored::F32, &[8], floats(&[1.0; 8])),
            ("A_log", Stored::F32, &[1], floats(&[0.1])),
        ],
    );
    let placement = Placement { floats: None, ..Placement::cpu(false) };
    let mut weights = Weights::open(&[path], &Value::Null, placement).expect("weights");
    assert_eq!(weights.take("norm.weight", &[8]).expect("a norm").dtype(), Dtype::Bfloat16);
    let exact = weights.take_f32("A_log", &[1]).expect("a rate");
    assert_eq!(values(&exact), [0.1], "never rounded on the way");
}

#[test]
fn stacks_published_the_other_way_round_are_turned() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = file(
        &folder,
        &[
            ("up", Stored::F32, &[1, 2, 3], floats(&[1.0, 2.0, 3.0, 4.0, 5.0, 6.0])),
            ("up_bias", Stored::F32, &[1, 3], floats(&[7.0, 8.0, 9.0])),
        ],
    );
    let mut weights = open(path, &Value::Null);
    weights.turn_stack("up").expect("turned");
    let Matrix::Plain(stack) = weights.take_stack("up", 1, 3, 2).expect("a stack") else { panic!("packed") };
    assert_eq!(values(&stack), [1.0, 4.0, 2.0, 5.0, 3.0, 6.0]);
    assert_eq!(values(&weights.take("up.bias", &[1, 3]).expect("its bias")), [7.0, 8.0, 9.0]);
    weights.finish().expect("nothing is left");
}
