//! Building and running models of the goldens.

use std::{
    path::Path,
    sync::{Mutex, MutexGuard, PoisonError},
};

use mesh_core::{DeviceKind, ModelProfile, registry};
use mesh_graph::{Cache, CausalModel, GraphError, Placement, Rows, Weights, ffi, graph_families};
use mlx_rs::{Array, Dtype, ops};
use serde_json::Value;

/// MLX runs in one thread at a time.
pub fn device() -> MutexGuard<'static, ()> {
    static GATE: Mutex<()> = Mutex::new(());
    let gate = GATE.lock().unwrap_or_else(PoisonError::into_inner);
    ffi::use_device(DeviceKind::Cpu);
    gate
}

/// The id of the family that claims a model.
pub fn family_of(profile: &ModelProfile) -> &'static str {
    let families = registry::families().expect("families are unique");
    registry::family_of(families, profile).expect("a family").id()
}

/// The graph of `config`, from weights as they are.
pub fn graph(family: &str, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
    graph_families().expect("graphs are unique").get(family).expect("a graph").graph(config, weights)
}

/// A golden's weights.
pub fn weights(profile: &ModelProfile) -> Weights {
    Weights::open(&profile.weights, &profile.config, Placement::cpu(false)).expect("weights")
}

/// A golden's model.
pub fn model(profile: &ModelProfile) -> Box<dyn CausalModel> {
    let mut weights = weights(profile);
    let model = graph(family_of(profile), &profile.config, &mut weights).expect("a graph");
    weights.finish().expect("weights balance");
    model
}

/// A model of `config`'s shape with seeded random weights.
pub fn random_model(family: &str, config: &Value) -> Box<dyn CausalModel> {
    let mut weights = Weights::random(7, Dtype::Float32, None, Placement::cpu(false)).expect("weights");
    graph(family, config, &mut weights).expect("a graph")
}

/// A golden's prompt.
pub fn prompt(root: &Path) -> Vec<u32> {
    let mut tensors = Array::load_safetensors(root.join("reference.safetensors")).expect("a reference");
    let ids = tensors.remove("input_ids").expect("`input_ids`").as_dtype(Dtype::Uint32).expect("ids");
    ids.eval().expect("ids");
    ids.to_vec_exact::<u32>().expect("ids")
}

/// Logits of `rows`, each `[time, vocab]`, of one batch of equally long rows.
pub fn run(model: &dyn CausalModel, cache: &mut Cache, rows: &[&[u32]]) -> Vec<Array> {
    let time = rows[0].len() as i32;
    let flat: Vec<u32> = rows.concat();
    let tokens = Array::from_slice(&flat, &[rows.len() as i32, time]);
    let logits = model.forward(&tokens, cache, Rows::All).expect("logits");
    logits.eval().expect("logits");
    logits.unstack(0).expect("rows")
}

/// Logits of one sequence.
pub fn run_one(model: &dyn CausalModel, cache: &mut Cache, tokens: &[u32]) -> Array {
    run(model, cache, &[tokens]).remove(0)
}

/// Rows `start..stop` of `[time, vocab]`.
pub fn rows(logits: &Array, start: usize, stop: usize) -> Array {
    ffi::slice(logits, [start as i32, 0], [stop as i32, logits.dim(1)]).expect("rows")
}

/// One after the other, along time.
pub fn joined(parts: &[Array]) -> Array {
    ops::concatenate(parts, 0).expect("joined")
}

/// The largest absolute difference; infinite where a number is none.
pub fn difference(a: &Array, b: &Array) -> f32 {
    assert_eq!(a.shape(), b.shape());
    if a.size() == 0 {
        return 0.0;
    }
    let largest = a.subtract(b).and_then(|d| d.abs()).and_then(|d| d.max(None)).expect("a difference");
    let largest = largest.try_item_exact::<f32>().expect("a number");
    if largest.is_nan() { f32::INFINITY } else { largest }
}
