//! The mixture of experts of Qwen: a softmax router, dense layers where the config says so, and in some families a shared
//! expert with a gate.

use serde::Deserialize;

use crate::{
    config::DecoderConfig,
    decoder::FeedForward,
    model::GraphError,
    moe::MoeSpec,
    router::{RouterSpec, Score},
    weights::Weights,
};

/// Its settings, under the checkpoints' names.
#[derive(Clone, Debug, Deserialize)]
pub struct QwenMoeConfig {
    num_experts: i32,
    num_experts_per_tok: i32,
    moe_intermediate_size: i32,
    #[serde(default)]
    norm_topk_prob: bool,
    decoder_sparse_step: Option<usize>,
    #[serde(default)]
    mlp_only_layers: Vec<usize>,
    shared_expert_intermediate_size: Option<i32>,
}

impl QwenMoeConfig {
    /// Reads the settings; what cannot be computed is an error that names it.
    pub fn read(config: &DecoderConfig) -> Result<Self, GraphError> {
        let this: Self = config.own()?;
        this.spec()?;
        Ok(this)
    }

    fn spec(&self) -> Result<MoeSpec, GraphError> {
        let router = RouterSpec::new(self.num_experts, self.num_experts_per_tok, Score::Softmax)?;
        let router = RouterSpec { normalize: self.norm_topk_prob, ..router };
        // Qwen 3 Coder says zero.
        let shared = self.shared_expert_intermediate_size.filter(|size| *size != 0);
        Ok(MoeSpec {
            shared: shared.map(|inner| ("shared_expert", inner)),
            shared_gate: shared.map(|_| "shared_expert_gate"),
            ..MoeSpec::new(router, self.moe_intermediate_size)
        })
    }

    /// What stands at `{name}` in layer `index`: one MLP, or the mixture.
    pub fn feed_forward(
        &self,
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        index: usize,
    ) -> Result<FeedForward, GraphError> {
        let step = self.decoder_sparse_step.unwrap_or(1).max(1);
        let sparse = !self.mlp_only_layers.contains(&index) && (index + 1).is_multiple_of(step);
        let moe = if sparse { Some(self.spec()?) } else { None };
        FeedForward::take(weights, name, config, moe)
    }
}
