//! Embeddings, against what the references say of the states behind them.

use std::{collections::BTreeMap, path::Path};

use conformance::shared::shared;
use mesh_core::{DeviceKind, Embed, EngineHandle, Pooling, Prompt};
use mesh_graph::ffi;
use mlx_rs::{Array, Dtype};
use serde_json::json;

use super::{load, profile, reference};

/// A tensor of a file, in f32.
pub fn tensor(file: &Path, name: &str) -> Vec<f32> {
    tensors(file).remove(name).expect("a tensor")
}

fn tensors(file: &Path) -> BTreeMap<String, Vec<f32>> {
    ffi::use_device(DeviceKind::Cpu);
    let tensors = Array::load_safetensors(file).expect("tensors").into_iter();
    let read = tensors.map(|(name, tensor)| {
        let tensor = tensor.as_dtype(Dtype::Float32).expect("numbers");
        tensor.eval().expect("evaluated");
        (name, tensor.to_vec_exact::<f32>().expect("numbers"))
    });
    read.collect()
}

/// Vectors are what the head makes the reference's logits of, pooled; in chunks, in company and in any order.
#[tokio::test]
async fn vectors_are_the_states_before_the_head() {
    // Those whose head is a matrix, and at most caps what that gives.
    for name in ["llama", "qwen3", "gemma3_text", "gemma4_e", "qwen3_next", "deepseek_v3", "lfm2", "mistral_window"] {
        let Some(root) = shared("vectors_are_the_states_before_the_head", &format!("golden/{name}")) else { return };
        let (prompt, _) = reference(&root);
        let mut logits = tensor(&root.join("reference.safetensors"), "logits");
        let config = profile(&root).config;
        let part = if config["text_config"].is_object() { &config["text_config"] } else { &config };
        if let Some(cap) = part["final_logit_softcapping"].as_f64() {
            logits.iter_mut().for_each(|logit| *logit = (cap * (f64::from(*logit) / cap).atanh()) as f32);
        }
        let mut weights = tensors(&root.join("model.safetensors"));
        let mut head = |ending: &str| {
            let name = weights.keys().find(|name| name.ends_with(ending)).cloned();
            name.and_then(|name| weights.remove(&name))
        };
        let head = head("lm_head.weight").or_else(|| head("embed_tokens.weight")).expect("a head");
        let inputs = [&prompt[..], &prompt[..1], &prompt[..9], &prompt[3..], &prompt[..24]];
        let ask = async |engine: &EngineHandle, inputs: &[&[u32]], pooling| {
            let inputs = inputs.iter().map(|input| Prompt::Tokens(input.to_vec())).collect();
            engine.embed(Embed { id: "test".into(), inputs, pooling }).await.expect("vectors").vectors
        };
        for pooling in [Pooling::Mean, Pooling::Last] {
            let mut whole: Option<Vec<Vec<f32>>> = None;
            for chunk in [2048, 40, 5, 1] {
                let engine = load(&root, json!({ "device": "cpu", "prefill_chunk_tokens": chunk })).await;
                let found = ask(&engine, &inputs, pooling).await;
                for vector in &found {
                    let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
                    assert!((length - 1.0).abs() < 1e-5, "{name}: {length}");
                }
                for (at, input) in inputs.iter().enumerate() {
                    let alone = ask(&engine, &[input], pooling).await;
                    assert!(apart(&alone[0], &found[at]) < 1e-4, "{name}: input {at}, alone, in chunks of {chunk}");
                }
                if let Some(whole) = &whole {
                    let worst = found.iter().zip(whole).map(|(a, b)| apart(a, b)).fold(0.0, f32::max);
                    assert!(worst < 1e-4, "{name} in chunks of {chunk}: {worst}");
                }
                whole.get_or_insert(found);
            }
            let vector = &whole.expect("vectors")[0];
            // The head is linear: what it makes of pooled states is its pooled logits, but for the length.
            let made: Vec<f32> =
                head.chunks(vector.len()).map(|row| row.iter().zip(vector).map(|(a, b)| a * b).sum()).collect();
            let pooled: Vec<f32> = match pooling {
                Pooling::Last => logits[logits.len() - 512..].to_vec(),
                Pooling::Mean => (0..512).map(|id| logits.iter().skip(id).step_by(512).sum()).collect(),
            };
            let unit = |vector: &[f32]| {
                let length = vector.iter().map(|value| value * value).sum::<f32>().sqrt();
                vector.iter().map(|value| value / length).collect::<Vec<_>>()
            };
            let worst = apart(&unit(&made), &unit(&pooled));
            assert!(worst < 1e-3, "{name}, {pooling:?}: {worst} from the reference");
        }
    }
}

/// The largest difference.
fn apart(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
