//! What a profile says is kept of a sequence is what the graph keeps.

use conformance::shared::shared;
use mesh_backend_mlx::footprint;
use mesh_graph::Footprint;

use crate::{
    checkpoints::{names, profile},
    models::{device, model, prompt, run_one},
};

/// Windows of one length as one.
fn merged(footprint: Footprint) -> Footprint {
    let mut windows: Vec<(u32, u64)> = Vec::new();
    for (window, bytes) in footprint.windows {
        match windows.iter_mut().find(|(other, _)| *other == window) {
            Some((_, sum)) => *sum += bytes,
            None => windows.push((window, bytes)),
        }
    }
    Footprint { windows, ..footprint }
}

#[test]
fn headers_tell_what_sequences_take() {
    let Some(root) = shared("headers_tell_what_sequences_take", "golden") else { return };
    let _device = device();
    let mut wrong = Vec::new();
    for name in names(&root) {
        let profile = profile(&root.join(&name));
        let Some(told) = footprint(&profile, size_of::<f32>() as u64) else {
            wrong.push(format!("{name}: nothing is told"));
            continue;
        };
        let model = model(&profile);
        let mut cache = model.new_cache();
        run_one(&*model, &mut cache, &prompt(&root.join(&name)));
        let held = merged(cache.footprint());
        if merged(told.clone()) != held {
            wrong.push(format!("{name}: told {told:?}, held {held:?}"));
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}
