//! `/v1/models`. What is not known is left out.

use std::collections::BTreeSet;

use mesh_core::{
    Capabilities, Knob,
    node::{NodeOffer, Reasoning},
};
use schemars::JsonSchema;
use serde::Serialize;

/// One model of `/v1/models`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct Model {
    pub id: String,
    /// `model`.
    pub object: &'static str,
    /// Seconds since 1970 at which it became ready; 0 if it is not.
    pub created: u64,
    pub owned_by: &'static str,
    /// `cold`, `loading`, `ready`, `unloading`, `failed` or `stopped`.
    pub status: &'static str,
    /// The backend that serves it, or did last.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backend: Option<String>,
    /// Longest prompt and answer together, in tokens.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub context_length: Option<u32>,
    /// Whether it stays in memory whatever comes.
    pub pinned: bool,
    /// Memory that is set aside for it, in bytes.
    pub reserved_bytes: u64,
    /// How its weights are stored: `safetensors` or `gguf`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<String>,
    /// The prevailing quantization; absent for plain floats too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Number of parameters.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<u64>,
    /// Size of the weight files, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub weight_bytes: Option<u64>,
    /// The family that claims it.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub family: Option<String>,
    /// Other machines on which it is ready; `model@node` asks for it on one of them.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub nodes: Vec<ModelNode>,
    pub capabilities: ModelCapabilities,
}

/// A machine on which a model is ready.
#[derive(Clone, Debug, Serialize, JsonSchema)]
#[allow(missing_docs)]
pub struct ModelNode {
    /// The machine's name.
    pub name: String,
    pub backend: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub quantization: Option<String>,
    /// Longest prompt and answer together, in tokens.
    pub context_length: u32,
    /// Requests that it computes.
    pub running: u32,
    /// Requests in line there.
    pub waiting: u32,
    /// Requests that it computes at the same time.
    pub parallel: u32,
}

impl From<&NodeOffer> for ModelNode {
    fn from(NodeOffer { node, offer }: &NodeOffer) -> Self {
        Self {
            name: node.clone(),
            backend: offer.backend.clone(),
            quantization: offer.quantization.clone(),
            context_length: offer.capabilities.context_tokens_max,
            running: offer.load.running,
            waiting: offer.load.waiting,
            parallel: offer.capabilities.requests_parallel_max,
        }
    }
}

/// What may be asked of a model.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, JsonSchema)]
pub struct ModelCapabilities {
    /// Whether it takes conversations.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub chat: Option<bool>,
    /// Whether it calls tools.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub tools: Option<bool>,
    /// How its reasoning is switched.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reasoning: Option<ReasoningSwitch>,
    /// Whether it gives embeddings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub embeddings: Option<bool>,
    /// Whether it understands images.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub vision: Option<bool>,
    /// Request parameters that are honoured, beside those that are honoured of any model.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub parameters: Option<BTreeSet<&'static str>>,
    /// What answers can be held to.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub grammars: Option<BTreeSet<&'static str>>,
}

/// How reasoning is switched.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ReasoningSwitch {
    /// Not at all.
    None,
    /// On and off.
    Switch,
    /// In levels.
    Effort,
}

impl From<Reasoning> for ReasoningSwitch {
    fn from(reasoning: Reasoning) -> Self {
        match reasoning {
            Reasoning::None => Self::None,
            Reasoning::Switch => Self::Switch,
            Reasoning::Effort => Self::Effort,
        }
    }
}

impl ModelCapabilities {
    /// Adds what a backend promises.
    pub fn with(mut self, promised: &Capabilities) -> Self {
        let grammar = |knob: &Knob| match knob {
            Knob::JsonSchema => Some("json_schema"),
            Knob::Regex => Some("regex"),
            Knob::Lark => Some("lark"),
            _ => None,
        };
        self.embeddings = Some(promised.embeddings);
        self.vision = Some(promised.vision);
        self.parameters = Some(promised.knobs.iter().map(|knob| knob.field()).collect());
        self.grammars = Some(promised.knobs.iter().filter_map(grammar).collect());
        self
    }
}

/// `/v1/models`.
#[derive(Clone, Debug, Serialize, JsonSchema)]
pub struct ModelList {
    /// `list`.
    pub object: &'static str,
    /// The models.
    pub data: Vec<Model>,
}
