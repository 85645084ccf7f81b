//! SmolLM 3: Llama that leaves rotary positions out of every fourth layer.

use mesh_core::{Claims, Conventions, ModelFamily, ModelProfile, Thinking};
use mesh_graph::{
    AttentionSpec, CausalModel, Decoder, DecoderConfig, Frame, GraphError, GraphFamily, Layer, Weights, accepted,
};
use serde::Deserialize;
use serde_json::{Value, json};

/// The family.
pub struct SmolLm3;
mesh_graph::register_family!(&SmolLm3);

impl ModelFamily for SmolLm3 {
    fn id(&self) -> &'static str {
        "smollm3"
    }

    fn title(&self) -> &'static str {
        "SmolLM 3"
    }

    fn claims(&self) -> Claims {
        Claims { model_types: &["smollm3"], architectures: &["SmolLM3ForCausalLM"], gguf_architectures: &["smollm3"] }
    }

    fn accept(&self, profile: &ModelProfile) -> Result<(), String> {
        accepted(read(&profile.config))
    }

    fn conventions(&self) -> Conventions {
        Conventions { fallback_template: None, thinking: Thinking::Variable("enable_thinking"), dialect: "hermes" }
    }
}

#[derive(Deserialize)]
struct Own {
    /// One number a layer; zero leaves positions out.
    no_rope_layers: Option<Vec<u8>>,
    no_rope_layer_interval: Option<usize>,
}

fn read(config: &Value) -> Result<(DecoderConfig, Vec<bool>), GraphError> {
    let config = DecoderConfig::read_or(config, &json!({ "rope_theta": 2e6 }))?;
    let own: Own = config.own()?;
    let layers = config.num_hidden_layers;
    let interval = own.no_rope_layer_interval.unwrap_or(4).max(1);
    let rotated = match own.no_rope_layers {
        Some(list) if list.len() == layers => list.into_iter().map(|rotated| rotated != 0).collect(),
        Some(list) => {
            let what = format!("`no_rope_layers` lists {} layers, not {layers}", list.len());
            return Err(GraphError::Config(what));
        }
        None => (0..layers).map(|index| !(index + 1).is_multiple_of(interval)).collect(),
    };
    Ok((config, rotated))
}

impl GraphFamily for SmolLm3 {
    fn graph(&self, config: &Value, weights: &mut Weights) -> Result<Box<dyn CausalModel>, GraphError> {
        let (config, rotated) = read(config)?;
        let attention = config.attention();
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let rope = attention.rope.clone().filter(|_| rotated[index]);
            Layer::plain(weights, name, &config, AttentionSpec { rope, ..attention.clone() })
        };
        Ok(Box::new(Decoder::new(weights, &config, Frame::default(), layer)?))
    }
}
