//! `mesh-llm verify`: a model directory against its own `reference.safetensors`.

use std::{path::Path, thread};

use mesh_core::{DeviceKind, ModelFamily, ModelProfile};
use mesh_graph::{CausalModel, GraphError, Rows, Weights, ffi, graph_families};
use mlx_rs::{
    Array, Dtype,
    ops::{self, indexing},
};
use serde::Serialize;

use crate::device::{gate, placement};

/// Tokens a chunk in the chunked check: divides no usual prompt length evenly.
const CHUNK_TOKENS: usize = 5;

/// In what the model is computed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Precision {
    /// As it would be served, but for half floats on a CPU: the largest difference of any logit counts.
    #[default]
    Exact,
    /// In bf16. One rounding may flip a choice and move a whole row, so the median over positions of each position's
    /// largest difference counts.
    Bf16,
}

/// How to compare.
#[derive(Clone, Copy, Debug)]
pub struct Comparison {
    /// Where to compute.
    pub device: DeviceKind,
    /// In what.
    pub precision: Precision,
    /// Whether kernels of our own are used where they apply.
    pub kernels: bool,
    /// What a difference may be at most.
    pub tolerance: f32,
}

/// One comparison.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Check {
    /// What was compared.
    pub name: String,
    /// Largest absolute difference of logits.
    pub max_abs_diff: f32,
    /// Median over positions of each one's largest difference.
    pub median_abs_diff: f32,
    /// What else was wrong, such as a greedy token that differs.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub fault: Option<String>,
    /// Whether it held.
    pub passed: bool,
}

/// What can go wrong before anything is compared.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// No family claims the model.
    #[error("no family claims this model")]
    NoFamily,
    /// The family refuses the config.
    #[error("{0}")]
    Refused(String),
    /// The reference is missing or incomplete.
    #[error("reference.safetensors: {0}")]
    Reference(String),
    /// The graph could not be built or run.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// The thread that computes panicked.
    #[error("the device thread panicked")]
    Panicked,
}

impl From<mlx_rs::error::Exception> for VerifyError {
    fn from(error: mlx_rs::error::Exception) -> Self {
        Self::Graph(error.into())
    }
}

/// Compares whole prefill, chunked prefill, token by token, and the greedy continuation with the reference in the
/// model's directory. On a CPU, quantized weights are checked both packed and unpacked. Blocks.
pub fn verify(
    profile: &ModelProfile,
    family: Option<&dyn ModelFamily>,
    comparison: Comparison,
) -> Result<Vec<Check>, VerifyError> {
    let family = family.ok_or(VerifyError::NoFamily)?;
    family.accept(profile).map_err(VerifyError::Refused)?;
    let id = family.id();
    thread::scope(|scope| {
        let run = || {
            let _gate = gate();
            ffi::use_device(comparison.device);
            let reference = Reference::open(&profile.root.join("reference.safetensors"))?;
            let quantized = profile.quantization.is_some();
            let mut checks = compare(profile, id, comparison, false, &reference)?;
            if quantized && comparison.device == DeviceKind::Cpu {
                checks.extend(compare(profile, id, comparison, true, &reference)?);
            }
            Ok(checks)
        };
        let thread = thread::Builder::new().name("mlx verify".into()).spawn_scoped(scope, run);
        thread.map_err(|_| VerifyError::Panicked)?.join().unwrap_or(Err(VerifyError::Panicked))
    })
}

struct Reference {
    input_ids: Vec<u32>,
    logits: Array,
    greedy: Vec<u32>,
    greedy_logits: Array,
}

impl Reference {
    fn open(path: &Path) -> Result<Self, VerifyError> {
        let mut tensors = Array::load_safetensors(path).map_err(|error| VerifyError::Reference(error.to_string()))?;
        let mut take = |name: &str| {
            tensors.remove(name).ok_or_else(|| VerifyError::Reference(format!("there is no tensor `{name}`")))
        };
        let ids = |array: Array| -> Result<Vec<u32>, VerifyError> {
            let array = array.as_dtype(Dtype::Uint32)?;
            array.eval()?;
            array.to_vec_exact::<u32>().map_err(|error| VerifyError::Reference(error.to_string()))
        };
        let this = Self {
            input_ids: ids(take("input_ids")?)?,
            greedy: ids(take("greedy")?)?,
            logits: take("logits")?,
            greedy_logits: take("greedy_logits")?,
        };
        match this.input_ids.is_empty() || this.greedy.is_empty() {
            true => Err(VerifyError::Reference("`input_ids` or `greedy` is empty".into())),
            false => Ok(this),
        }
    }
}

fn compare(
    profile: &ModelProfile,
    family: &str,
    comparison: Comparison,
    dequantize: bool,
    reference: &Reference,
) -> Result<Vec<Check>, VerifyError> {
    let family = graph_families().ok().and_then(|all| all.get(family).ok()).ok_or(VerifyError::NoFamily)?;
    let mut placement = placement(comparison.device, dequantize);
    placement.kernels &= comparison.kernels;
    if comparison.precision == Precision::Bf16 {
        placement.floats = Some(Dtype::Bfloat16);
    }
    let mut weights = Weights::open(&profile.weights, &profile.config, placement)?;
    let model = family.graph(&profile.config, &mut weights)?;
    weights.finish()?;
    let model = &*model;

    let suffix = if dequantize { " (unpacked)" } else { "" };
    let ids = &reference.input_ids;
    let mut checks = Vec::new();
    for (name, chunk) in [("whole prefill", ids.len()), ("chunked prefill", CHUNK_TOKENS), ("token by token", 1)] {
        let logits = logits(model, ids, chunk)?;
        checks.push(check(format!("{name}{suffix}"), &logits, &reference.logits, comparison, None)?);
    }
    let (logits, chosen) = continuation(model, ids, &reference.greedy)?;
    // In half floats a near tie may fall the other way.
    let exact = comparison.precision == Precision::Exact;
    let differs = chosen.iter().zip(&reference.greedy).position(|(own, theirs)| exact && own != theirs);
    let fault = differs.map(|at| format!("token {at} is {}, not {}", chosen[at], reference.greedy[at]));
    checks.push(check(format!("greedy continuation{suffix}"), &logits, &reference.greedy_logits, comparison, fault)?);
    Ok(checks)
}

/// Logits of every position, `[time, vocab]`, computed `chunk` tokens at a time.
fn logits(model: &dyn CausalModel, ids: &[u32], chunk: usize) -> Result<Array, VerifyError> {
    let mut cache = model.new_cache();
    cache.expect(ids.len() as i32);
    let mut rows = Vec::new();
    for chunk in ids.chunks(chunk) {
        let tokens = Array::from_slice(chunk, &[1, chunk.len() as i32]);
        rows.push(model.forward(&tokens, &mut cache, Rows::All)?);
    }
    Ok(ops::concatenate(&rows, 1)?.squeeze_axes(&[0])?)
}

/// The rows whose argmax continues `ids` and then each of `fed`, and those argmaxes.
fn continuation(model: &dyn CausalModel, ids: &[u32], fed: &[u32]) -> Result<(Array, Vec<u32>), VerifyError> {
    let mut cache = model.new_cache();
    let prompt = Array::from_slice(ids, &[1, ids.len() as i32]);
    let mut rows = vec![model.forward(&prompt, &mut cache, Rows::Last)?];
    for id in &fed[..fed.len() - 1] {
        rows.push(model.forward(&Array::from_slice(&[*id], &[1, 1]), &mut cache, Rows::Last)?);
    }
    let logits = ops::concatenate(&rows, 1)?.squeeze_axes(&[0])?;
    let chosen = indexing::argmax_axis(&logits, -1, false)?;
    chosen.eval()?;
    let chosen = chosen.to_vec_exact::<u32>().map_err(|error| VerifyError::Reference(error.to_string()))?;
    Ok((logits, chosen))
}

fn check(
    name: String,
    logits: &Array,
    reference: &Array,
    comparison: Comparison,
    fault: Option<String>,
) -> Result<Check, VerifyError> {
    if logits.shape() != reference.shape() {
        let fault = format!("logits have shape {:?}, the reference {:?}", logits.shape(), reference.shape());
        let infinite = f32::INFINITY;
        let fault = Some(fault);
        return Ok(Check { name, max_abs_diff: infinite, median_abs_diff: infinite, fault, passed: false });
    }
    let differences = logits.as_dtype(Dtype::Float32)?.subtract(reference)?.abs()?;
    let by_position = differences.max_axis(-1, None)?;
    by_position.eval()?;
    let mut by_position =
        by_position.to_vec_exact::<f32>().map_err(|error| VerifyError::Reference(error.to_string()))?;
    // NaN sorts last, so that it is the maximum, which then fails.
    by_position.sort_by(f32::total_cmp);
    let max_abs_diff = by_position.last().copied().unwrap_or(f32::INFINITY);
    let median_abs_diff = by_position.get(by_position.len() / 2).copied().unwrap_or(f32::INFINITY);
    let counts = match comparison.precision {
        Precision::Exact => max_abs_diff,
        Precision::Bf16 => median_abs_diff,
    };
    let passed = counts <= comparison.tolerance && max_abs_diff.is_finite() && fault.is_none();
    Ok(Check { name, max_abs_diff, median_abs_diff, fault, passed })
}
