//! Decoding several rows on CUDA: what the kernels compute against plain operations, and how fast both are.
//!
//! `rows check SHAPE ROWS…` compares ragged batches on random weights of a shape, given by its index, with plain
//! operations, with an f32 reference, and with a row alone. `rows time kernels|plain ROWS…` measures steps of ragged
//! batches after 512 tokens on Qwen3-8B's shape. MLX compiles each kernel at first use, which takes seconds: ask for little
//! at a time.

use std::{error::Error, time::Instant};

use mesh_core::DeviceKind;
use mesh_graph::{
    AttentionSpec, Cache, CausalModel, Decoder, DecoderConfig, Frame, Layer, NormWeight, Placement, QkNorm, Rows,
    Scheme, Weights, ffi, ffi::Mode, memory,
};
use mlx_rs::{
    Array, Dtype,
    ops::{self, indexing},
    transforms,
};
use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

fn main() -> Result<()> {
    let device = ffi::device_facts();
    println!("{device:?}");
    let mut arguments = std::env::args().skip(1);
    let command: Vec<String> = arguments.by_ref().take(2).collect();
    let counts: Vec<usize> = arguments.map(|count| count.parse()).collect::<std::result::Result<_, _>>()?;
    match command.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["check", index] => check(device.kind, &shapes()[index.parse::<usize>()?], &counts),
        ["time", "kernels"] => time(device.kind, Computed::Kernels, &counts),
        ["time", "plain"] => time(device.kind, Computed::Plainly, &counts),
        _ => Err("rows check SHAPE ROWS… | rows time kernels|plain ROWS…".into()),
    }
}

struct Shape {
    name: &'static str,
    config: Value,
    group_size: i32,
    dtype: Dtype,
    normed_heads: bool,
}

#[derive(Clone, Copy, PartialEq)]
enum Computed {
    Kernels,
    Plainly,
    /// In f32, from unpacked weights.
    Reference,
}

fn shapes() -> Vec<Shape> {
    let config = |hidden: i32, inner: i32, heads: i32, kv_heads: i32, head_dim: i32, bias: bool| {
        json!({
            "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": 3, "num_attention_heads": heads,
            "num_key_value_heads": kv_heads, "head_dim": head_dim, "rms_norm_eps": 1e-6, "vocab_size": 4096,
            "tie_word_embeddings": !bias, "rope_theta": 1e6, "max_position_embeddings": 40_960, "attention_bias": bias,
        })
    };
    let bf16 = Dtype::Bfloat16;
    let shape = |name, config, group_size, dtype, normed_heads| Shape { name, config, group_size, dtype, normed_heads };
    vec![
        shape("qwen3-8b", config(4096, 12_288, 32, 8, 128, false), 64, bf16, true),
        shape("llama-1b", config(2048, 8192, 32, 8, 64, false), 64, bf16, false),
        shape("smollm2, groups of 32", config(576, 1536, 9, 3, 64, false), 32, bf16, false),
        shape("biased, groups of 128", config(1024, 3072, 16, 2, 128, true), 128, bf16, false),
        shape("f16", config(1024, 3072, 16, 8, 128, false), 64, Dtype::Float16, true),
        shape("wide heads", config(1024, 2048, 8, 1, 256, false), 64, bf16, true),
    ]
}

fn model(shape: &Shape, layers: Option<usize>, device: DeviceKind, computed: Computed) -> Result<Decoder> {
    let mut config = DecoderConfig::read(&shape.config)?;
    config.num_hidden_layers = layers.unwrap_or(config.num_hidden_layers);
    let reference = computed == Computed::Reference;
    let placement = Placement {
        kernels: computed == Computed::Kernels,
        dequantize: reference,
        floats: reference.then_some(Dtype::Float32),
        ..Placement::gpu(device)
    };
    let scheme = Scheme { group_size: shape.group_size, bits: 4, mode: Mode::Affine };
    let mut weights = Weights::random(7, shape.dtype, Some(scheme), placement)?;
    let qk_norm = match shape.normed_heads {
        true => QkNorm::PerHead(config.rms_norm_eps, NormWeight::Whole),
        false => QkNorm::None,
    };
    let attention = AttentionSpec { qk_norm, ..config.attention() };
    let layer = |weights: &mut Weights, name: &str, _| Layer::plain(weights, name, &config, attention.clone());
    let model = Decoder::new(&mut weights, &config, Frame::default(), layer)?;
    transforms::eval(&weights.finish()?)?;
    Ok(model)
}

/// Tokens that are noise, but always the same.
fn tokens(seed: u32, count: usize, vocab: u32) -> Vec<u32> {
    let mut state = seed.wrapping_mul(2_654_435_761).wrapping_add(12_345);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) % vocab
    };
    (0..count).map(|_| next()).collect()
}

const PROMPT: usize = 70;
const STEPS: usize = 4;

/// Logits of the decoded steps, `[rows, steps, vocab]` in f32; `rows` hold `PROMPT + STEPS` tokens each, of which the
/// first are padding.
fn logits(model: &Decoder, rows: &[Vec<u32>], padding: &[i32]) -> Result<Array> {
    let mut cache = match padding.iter().all(|count| *count == 0) {
        true => model.new_cache(),
        false => Cache::padded(&model.layout(), padding),
    };
    let columns = |from: usize, to: usize| {
        let picked: Vec<u32> = rows.iter().flat_map(|row| row[from..to].to_vec()).collect();
        Array::from_slice(&picked, &[rows.len() as i32, (to - from) as i32])
    };
    model.forward(&columns(0, PROMPT), &mut cache, Rows::Last)?;
    transforms::eval(cache.arrays())?;
    let steps = (PROMPT..PROMPT + STEPS).map(|at| model.forward(&columns(at, at + 1), &mut cache, Rows::Last));
    let steps = steps.collect::<std::result::Result<Vec<_>, _>>()?;
    let all = ops::concatenate(&steps, 1)?.as_dtype(Dtype::Float32)?;
    all.eval()?;
    Ok(all)
}

/// The largest absolute difference, and the root of the mean square.
fn difference(a: &Array, b: &Array) -> Result<(f32, f32)> {
    let difference = a.subtract(b)?;
    let largest = difference.abs()?.max(None)?;
    let square = difference.multiply(&difference)?.mean(None)?.sqrt()?;
    Ok((largest.try_item_exact::<f32>()?, square.try_item_exact::<f32>()?))
}

fn check(device: DeviceKind, shape: &Shape, counts: &[usize]) -> Result<()> {
    let vocab = 4096;
    let build = |computed| model(shape, None, device, computed);
    let (kernels, plain, reference) =
        (build(Computed::Kernels)?, build(Computed::Plainly)?, build(Computed::Reference)?);
    for count in counts.iter().copied() {
        let rows: Vec<Vec<u32>> = (0..count as u32).map(|row| tokens(row, PROMPT + STEPS, vocab)).collect();
        let padding: Vec<i32> = (0..count as i32).map(|row| row * 37 % 69 + i32::from(count == 1)).collect();
        let own = logits(&kernels, &rows, &padding)?;
        let exact = logits(&reference, &rows, &padding)?;
        let (most, mean) = difference(&own, &exact)?;
        // Products of eight rows and more take MLX most of a minute to compile.
        let plainly = match count {
            ..8 => difference(&logits(&plain, &rows, &padding)?, &exact)?,
            _ => (f32::NAN, f32::NAN),
        };

        // Another neighbourhood, and other padding.
        let mut others: Vec<Vec<u32>> =
            (0..count as u32).map(|row| tokens(row + 1000, PROMPT + STEPS, vocab)).collect();
        let kept = count / 2;
        let real = padding[kept] as usize;
        others[kept][real..].copy_from_slice(&rows[kept][real..]);
        let row = |all: &Array| indexing::take_axis(all, Array::from_slice(&[kept as i32], &[1]), 0);
        let (moved, _) = difference(&row(&own)?, &row(&logits(&kernels, &others, &padding)?)?)?;

        // Alone: the prompt without its padding.
        let alone = {
            let mut cache = kernels.new_cache();
            let of = |from: usize, to: usize| Array::from_slice(&rows[kept][from..to], &[1, (to - from) as i32]);
            kernels.forward(&of(real, PROMPT), &mut cache, Rows::Last)?;
            let steps = (PROMPT..PROMPT + STEPS).map(|at| kernels.forward(&of(at, at + 1), &mut cache, Rows::Last));
            let steps = steps.collect::<std::result::Result<Vec<_>, _>>()?;
            ops::concatenate(&steps, 1)?.as_dtype(Dtype::Float32)?
        };
        let (alone, _) = difference(&row(&own)?, &alone)?;
        let spread = exact.multiply(&exact)?.mean(None)?.sqrt()?.try_item_exact::<f32>()?;
        println!(
            "{}, {count} rows: from f32 {most:.4} (rms {mean:.5}), plain {:.4} ({:.5}); other \
             neighbours {moved:e}; alone {alone:.4}; logits' rms {spread:.2}",
            shape.name, plainly.0, plainly.1
        );
    }
    Ok(())
}

const STEPS_TIMED: usize = 160;

fn time(device: DeviceKind, computed: Computed, counts: &[usize]) -> Result<()> {
    let mut shape = shapes().swap_remove(0);
    let vocab = 151_936;
    shape.config["vocab_size"] = json!(vocab);
    shape.config["tie_word_embeddings"] = json!(false);
    let model = model(&shape, Some(36), device, computed)?;
    let name = if computed == Computed::Kernels { "kernels" } else { "plain" };
    for count in counts.iter().copied() {
        let padding: Vec<i32> = (0..count as i32).map(|row| row * 5 % 160).collect();
        let mut cache = match count {
            1 => model.new_cache(),
            _ => Cache::padded(&model.layout(), &padding),
        };
        for at in (0..512).step_by(128) {
            let part: Vec<u32> = (0..count as u32).flat_map(|row| tokens(row + at * 100, 128, vocab as u32)).collect();
            model.forward(&Array::from_slice(&part, &[count as i32, 128]), &mut cache, Rows::Last)?;
            transforms::eval(cache.arrays())?;
            memory::clear_cache();
        }
        let mut ahead = Array::from_slice(&vec![7_u32; count], &[count as i32, 1]);
        let (mut took, mut building, mut submitting) = (Vec::new(), Vec::new(), Vec::new());
        let begun = Instant::now();
        for _ in 0..STEPS_TIMED {
            let started = Instant::now();
            let logits = model.forward(&ahead, &mut cache, Rows::Last)?;
            let next = indexing::argmax_axis(&logits, -1, false)?;
            building.push(started.elapsed().as_secs_f64() * 1e3);
            transforms::async_eval([&next])?;
            submitting.push(started.elapsed().as_secs_f64() * 1e3);
            ahead.eval()?;
            ahead = next;
            took.push(started.elapsed().as_secs_f64() * 1e3);
        }
        ahead.eval()?;
        let all = begun.elapsed().as_secs_f64();
        // The first steps compile, and reach the clock's speed.
        let settled = |of: &[f64]| {
            let mut of = of[STEPS_TIMED / 4..].to_vec();
            of.sort_by(f64::total_cmp);
            (of.iter().sum::<f64>() / of.len() as f64, of[of.len() / 2])
        };
        let ((mean, median), (_, building), (_, submitted)) =
            (settled(&took), settled(&building), settled(&submitting));
        println!(
            "{name}, {count} rows: {mean:.2} ms a step (median {median:.2}), {:.0} tok/s; building {building:.2} ms, \
             submitting {:.2} ms, waiting {:.2} ms; first step {:.1} s of {all:.1}",
            count as f64 / mean * 1e3,
            submitted - building,
            median - submitted,
            took[0] / 1e3,
        );
    }
    Ok(())
}
