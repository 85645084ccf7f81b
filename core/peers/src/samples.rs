//! What tests are about.

use std::sync::Arc;

use mesh_core::{Capabilities, OutputForm, PromptForm, node::ModelOffer};

pub fn offer(name: &str) -> Arc<ModelOffer> {
    let capabilities = Capabilities {
        requests_parallel_max: 4,
        requests_queued_max: 16,
        prefix_reuse: true,
        ..Capabilities::new(PromptForm::Chat, OutputForm::Parts, 4096)
    };
    Arc::new(ModelOffer { chat: true, ..ModelOffer::new(name, "mlx", capabilities) })
}
