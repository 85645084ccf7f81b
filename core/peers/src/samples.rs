//! What tests are about.

use std::{collections::BTreeSet, sync::Arc};

use mesh_core::{
    Capabilities, OutputForm, PromptForm,
    node::{Load, ModelOffer, Reasoning},
};

pub fn offer(name: &str) -> Arc<ModelOffer> {
    Arc::new(ModelOffer {
        name: name.to_owned(),
        reference: None,
        revision: None,
        hash: None,
        backend: "mlx".to_owned(),
        format: None,
        quantization: None,
        parameters: None,
        weight_bytes: None,
        family: None,
        dialect: None,
        capabilities: Capabilities {
            prompt: PromptForm::Chat,
            output: OutputForm::Parts,
            knobs: BTreeSet::new(),
            context_tokens_max: 4096,
            requests_parallel_max: 4,
            requests_queued_max: 16,
            prefix_reuse: true,
            embeddings: false,
            vision: false,
        },
        chat: true,
        tools: false,
        reasoning: Reasoning::None,
        since: 0,
        load: Load::default(),
    })
}
