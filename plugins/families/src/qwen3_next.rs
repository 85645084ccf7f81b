//! Qwen 3 Next: Gated DeltaNet in most layers, gated attention in every fourth, and Qwen's experts beside a shared one.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    CausalModel, DeltaDecoderConfig, DeltaNetConfig, GraphError, GraphFamily, QwenMoeConfig, Weights, accepted,
};
use serde_json::Value;

/// The family.
pub struct Qwen3Next;
mesh_graph::register_family!(&Qwen3Next);

impl ModelFamily for Qwen3Next {
    fn id(&self) -> &'static str {
        "qwen3_next"
    }

    fn title(&self) -> &'static str {
        "Qwen 3 Next"
    }

    fn claims(&self) -> Claims {
        Claims {
            model_types: &["qwen3_next"],
            architectures: &["Qwen3NextForCausalLM"],
            gguf_architectures: &["qwen3next"],
        }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "hermes" }
    }
}

/// Multi-token prediction.
const LEFT_OUT: &[&str] = &["mtp."];

fn read(config: &Value) -> Result<(DeltaDecoderConfig, QwenMoeConfig), GraphError> {
    let config = DeltaDecoderConfig::read(config)?;
    let moe = QwenMoeConfig::read(&config.decoder)?;
    Ok((config, moe))
}

/// Projections come fused, in runs that belong to one key head: its query, its key, then the values and the gates that it
/// serves; and likewise for what gives b and a.
fn unfuse(weights: &mut Weights, name: &str, hidden: i32, net: &DeltaNetConfig) -> Result<(), GraphError> {
    let heads = net.linear_num_key_heads;
    let run = net.linear_num_value_heads / heads;
    let (key, values) = (net.linear_key_head_dim, run * net.linear_value_head_dim);
    let [qkvz, qkv, z] = ["in_proj_qkvz", "in_proj_qkv", "in_proj_z"].map(|part| format!("{name}.{part}"));
    weights.reorder_rows(&qkvz, &gathered(heads, &[key, key, values, values]))?;
    weights.split_rows(&qkvz, hidden, &[(&qkv, heads * (2 * key + values)), (&z, heads * values)])?;
    let [ba, b, a] = ["in_proj_ba", "in_proj_b", "in_proj_a"].map(|part| format!("{name}.{part}"));
    weights.reorder_rows(&ba, &gathered(heads, &[run, run]))?;
    weights.split_rows(&ba, hidden, &[(&b, heads * run), (&a, heads * run)])
}

/// Rows of `heads` runs, each made of parts of these sizes, so that the first parts of all come first.
fn gathered(heads: i32, parts: &[i32]) -> Vec<i32> {
    let run: i32 = parts.iter().sum();
    let mut start = 0;
    let mut rows = Vec::new();
    for part in parts {
        rows.extend((0..heads).flat_map(|head| head * run + start..head * run + start + part));
        start += part;
    }
    rows
}

impl GraphFamily for Qwen3Next {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, moe) = read(config)?;
        weights.leave_out(LEFT_OUT);
        for index in 0..config.decoder.num_hidden_layers {
            if config.is_linear(index)? {
                let name = format!("model.layers.{index}.linear_attn");
                unfuse(weights, &name, config.decoder.hidden_size, &config.net)?;
            }
        }
        let mlp = |weights: &mut Weights, name: &str, index| moe.feed_forward(weights, name, &config.decoder, index);
        Ok(Box::new(config.decoder(weights, mlp)?))
    }
}
