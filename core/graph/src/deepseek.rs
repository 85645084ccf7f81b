//! DeepSeek-V3, as several families have taken it over: latent attention, and a mixture of experts with sigmoid scores, a
//! correction bias, groups, shared experts, and dense layers at the start.

use serde::Deserialize;
use serde_json::Value;

use crate::{
    config::DecoderConfig,
    decoder::{Decoder, FeedForward, Frame, Layer, NormNames},
    mla::{LatentAttention, LatentSpec},
    model::GraphError,
    moe::MoeSpec,
    router::{Groups, RouterSpec, Score},
    weights::Weights,
};

/// Its settings, under the checkpoints' names.
#[derive(Clone, Debug, Deserialize)]
pub struct DeepseekMoeConfig {
    #[serde(alias = "num_experts")]
    n_routed_experts: i32,
    #[serde(alias = "num_experts_per_token")]
    num_experts_per_tok: i32,
    moe_intermediate_size: i32,
    #[serde(alias = "num_shared_experts")]
    n_shared_experts: Option<i32>,
    #[serde(default, alias = "moe_renormalize")]
    norm_topk_prob: bool,
    #[serde(default = "one")]
    routed_scaling_factor: f32,
    #[serde(alias = "num_expert_group")]
    n_group: Option<i32>,
    topk_group: Option<i32>,
    #[serde(default)]
    first_k_dense_replace: usize,
    moe_layer_freq: Option<usize>,
    /// `dense` or `sparse` for each layer; in place of the two before.
    mlp_layer_types: Option<Vec<String>>,
    #[serde(alias = "moe_router_activation_func")]
    scoring_func: Option<String>,
    topk_method: Option<String>,
}

fn one() -> f32 {
    1.0
}

impl DeepseekMoeConfig {
    /// Reads the settings; what is not computed here is an error that names it.
    pub fn read(config: &DecoderConfig) -> Result<Self, GraphError> {
        let this: Self = config.own()?;
        let known = [("scoring_func", &this.scoring_func, "sigmoid"), ("topk_method", &this.topk_method, "noaux_tc")];
        for (name, value, supported) in known {
            if let Some(value) = value.as_ref().filter(|value| *value != supported) {
                return Err(GraphError::Config(format!("`{name}` `{value}` is not supported")));
            }
        }
        this.spec()?;
        (0..config.num_hidden_layers).try_for_each(|index| this.is_sparse(index).map(drop))?;
        Ok(this)
    }

    fn is_sparse(&self, index: usize) -> Result<bool, GraphError> {
        let Some(types) = &self.mlp_layer_types else {
            let step = self.moe_layer_freq.unwrap_or(1).max(1);
            return Ok(index >= self.first_k_dense_replace && index.is_multiple_of(step));
        };
        match types.get(index).map(String::as_str) {
            Some("sparse") => Ok(true),
            Some("dense") => Ok(false),
            other => {
                let what = format!("`mlp_layer_types` has {other:?} for layer {index}, which is not supported");
                Err(GraphError::Config(what))
            }
        }
    }

    fn spec(&self) -> Result<MoeSpec, GraphError> {
        let router = RouterSpec {
            normalize: self.norm_topk_prob,
            groups: self.n_group.zip(self.topk_group).map(|(count, chosen)| Groups { count, chosen }),
            scaling_factor: self.routed_scaling_factor,
            ..RouterSpec::new(self.n_routed_experts, self.num_experts_per_tok, Score::Sigmoid)?
        };
        router.check()?;
        let shared = self.n_shared_experts.filter(|count| *count > 0);
        Ok(MoeSpec {
            correction_bias: Some("gate.e_score_correction_bias"),
            shared: shared.map(|count| ("shared_experts", count.saturating_mul(self.moe_intermediate_size))),
            ..MoeSpec::new(router, self.moe_intermediate_size)
        })
    }

    /// Leaves out the layer behind the last, which predicts a second token.
    pub fn leave_out_prediction(weights: &mut Weights, config: &DecoderConfig) {
        weights.leave_out(&[&format!("model.layers.{}.", config.num_hidden_layers)]);
    }

    /// What stands at `{name}` in layer `index`: one MLP, or the mixture.
    pub fn feed_forward(
        &self,
        weights: &mut Weights,
        name: &str,
        config: &DecoderConfig,
        index: usize,
    ) -> Result<FeedForward, GraphError> {
        let moe = if self.is_sparse(index)? { Some(self.spec()?) } else { None };
        FeedForward::take(weights, name, config, moe)
    }
}

/// All of a model that is DeepSeek-V3's graph in some sizes.
#[derive(Clone, Debug)]
pub struct DeepseekConfig {
    decoder: DecoderConfig,
    attention: LatentSpec,
    moe: DeepseekMoeConfig,
}

impl DeepseekConfig {
    /// Reads config.json.
    pub fn read(config: &Value) -> Result<Self, GraphError> {
        let decoder = DecoderConfig::read(config)?;
        let (attention, moe) = (LatentSpec::read(&decoder)?, DeepseekMoeConfig::read(&decoder)?);
        Ok(Self { decoder, attention, moe })
    }

    /// Builds the decoder.
    pub fn decoder(&self, weights: &mut Weights) -> Result<Decoder, GraphError> {
        let config = &self.decoder;
        DeepseekMoeConfig::leave_out_prediction(weights, config);
        let layer = |weights: &mut Weights, name: &str, index: usize| {
            let attention = LatentAttention::new(weights, &format!("{name}.self_attn"), self.attention.clone())?;
            let mlp = self.moe.feed_forward(weights, &format!("{name}.mlp"), config, index)?;
            Layer::new(weights, name, config, NormNames::PRE, attention, mlp)
        };
        Decoder::new(weights, config, Frame::default(), layer)
    }
}
