//! What holds for every family, whatever its numbers are.

use std::collections::BTreeSet;

use conformance::shared::shared;
use mesh_graph::{Cache, CacheKind, CausalModel};
use serde_json::{Value, json};

use crate::{
    checkpoints::{names, profile, tolerance},
    models::{device, difference, family_of, joined, model, prompt, random_model, rows, run, run_one},
};

/// A token that takes part shows above this.
const TELLS: f32 = 1e-3;

/// Runs `check` on each golden, and collects what it finds wrong.
///
/// It is told what other orders of adding may change in a logit: as much as the golden allows.
pub fn for_each_golden(test: &str, check: impl Fn(&str, &mesh_core::ModelProfile, f32, &mut Vec<String>)) {
    let Some(root) = shared(test, "golden") else { return };
    let _device = device();
    let mut faults = Vec::new();
    for name in names(&root) {
        let root = root.join(&name);
        check(&name, &profile(&root), tolerance(&root), &mut faults);
    }
    assert!(faults.is_empty(), "{faults:#?}");
}

#[test]
fn later_tokens_change_nothing_earlier() {
    for_each_golden("later_tokens_change_nothing_earlier", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let before = run_one(&*model, &mut model.new_cache(), &ids);
        for at in [3, 11, ids.len() - 1] {
            let mut changed = ids.clone();
            changed[at] = (changed[at] + 1) % model.vocab_size();
            let after = run_one(&*model, &mut model.new_cache(), &changed);
            let earlier = difference(&rows(&before, 0, at), &rows(&after, 0, at));
            let own = difference(&rows(&before, at, at + 1), &rows(&after, at, at + 1));
            if earlier > same || own < TELLS {
                faults.push(format!("{name}: token {at} changes earlier rows by {earlier:.1e}, its own by {own:.1e}"));
            }
        }
    });
}

#[test]
fn a_ragged_batch_is_each_row_alone() {
    for_each_golden("a_ragged_batch_is_each_row_alone", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let whole = ids.len();
        // From the whole prompt to one token, and four more for each.
        let lengths = [whole, 9, 1, whole - 7];
        let alone: Vec<_> = lengths
            .iter()
            .map(|length| {
                let mut cache = model.new_cache();
                let mut parts = vec![run_one(&*model, &mut cache, &ids[whole - length..])];
                parts.extend(ids[..4].iter().map(|id| run_one(&*model, &mut cache, &[*id])));
                joined(&parts)
            })
            .collect();
        let padding = lengths.map(|length| (whole - length) as i32);
        let padded: Vec<Vec<u32>> =
            lengths.iter().map(|length| [&vec![0; whole - length], &ids[whole - length..]].concat()).collect();
        // At once, and in chunks of which the first are padding alone for some rows.
        for chunk in [whole, 5] {
            let mut cache = Cache::padded(&model.layout(), &padding);
            let mut parts: Vec<Vec<_>> = vec![Vec::new(); lengths.len()];
            for start in (0..whole).step_by(chunk) {
                let slices: Vec<&[u32]> = padded.iter().map(|row| &row[start..whole.min(start + chunk)]).collect();
                let logits = run(&*model, &mut cache, &slices);
                parts.iter_mut().zip(logits).for_each(|(parts, logits)| parts.push(logits));
            }
            for id in &ids[..4] {
                let logits = run(&*model, &mut cache, &[&[*id][..]; 4]);
                parts.iter_mut().zip(logits).for_each(|(parts, logits)| parts.push(logits));
            }
            for (row, parts) in parts.iter().enumerate() {
                let together = joined(parts);
                let real = rows(&together, whole - lengths[row], whole + 4);
                let found = difference(&real, &alone[row]);
                if found > same {
                    let length = lengths[row];
                    faults.push(format!("{name}: a row of {length}, in chunks of {chunk}, differs by {found:.1e}"));
                }
            }
        }
    });
}

#[test]
fn a_trimmed_cache_replays_or_says_it_cannot() {
    for_each_golden("a_trimmed_cache_replays_or_says_it_cannot", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        // More than the buffers' step, so that windows have let go of positions.
        let ids: Vec<u32> = ids.iter().copied().cycle().take(300).collect();
        let layout = model.layout();
        let mut cache = model.new_cache();
        let parts: Vec<_> = ids.chunks(100).map(|chunk| run_one(&*model, &mut cache, chunk)).collect();
        let logits = joined(&parts);
        for keep in [299, 290, 200, 3] {
            let mut trimmed = cache.clone();
            let possible = trimmed.can_trim(keep as i32);
            let result = trimmed.trim(keep as i32);
            assert_eq!(possible, result.is_ok(), "{name}: `can_trim` keeps its word");
            let has = |kind: fn(&CacheKind) -> bool| layout.iter().any(kind);
            let states = has(|kind| *kind == CacheKind::State);
            let windows = has(|kind| matches!(kind, CacheKind::Window(window) if *window < 290));
            let expected = match keep {
                _ if states => Some(false),
                3 if windows => Some(false),
                _ if windows => None,
                _ => Some(true),
            };
            if expected.is_some_and(|expected| expected != possible) {
                faults.push(format!("{name}: trimming to {keep} is possible: {possible}"));
            }
            // What could not be trimmed has to be as it was, and goes on from its end.
            let from = if possible { keep } else { ids.len() };
            assert_eq!(trimmed.len() as usize, from, "{name}");
            let replayed = run_one(&*model, &mut trimmed, &[&ids[from..], &ids[..2]].concat());
            let found = difference(&rows(&replayed, 0, ids.len() - from), &rows(&logits, from, ids.len()));
            let fresh = run_one(&*model, &mut cache.clone(), &ids[..2]);
            let after = difference(&rows(&replayed, ids.len() - from, ids.len() - from + 2), &fresh);
            if found > same || after > same {
                faults.push(format!("{name}: after a trim to {keep}, replay differs by {found:.1e} and {after:.1e}"));
            }
        }
        let mut emptied = cache.clone();
        emptied.trim(0).expect("everything can be forgotten");
        let found = difference(&run_one(&*model, &mut emptied, &ids[..100]), &rows(&logits, 0, 100));
        if found > same {
            faults.push(format!("{name}: an emptied cache differs from a new one by {found:.1e}"));
        }
    });
}

#[test]
fn a_restored_snapshot_goes_on_as_before() {
    for_each_golden("a_restored_snapshot_goes_on_as_before", |name, profile, same, faults| {
        let (model, ids) = (model(profile), prompt(&profile.root));
        let mut cache = model.new_cache();
        run_one(&*model, &mut cache, &ids[..13]);
        let snapshot = cache.clone();
        let first = run_one(&*model, &mut cache, &ids[13..]);
        // Another way from the same point, step by step, must not write into what the snapshot holds.
        let mut other = snapshot.clone();
        for id in &ids[..5] {
            run_one(&*model, &mut other, &[*id]);
        }
        let again = run_one(&*model, &mut snapshot.clone(), &ids[13..]);
        let found = difference(&first, &again);
        if found > same {
            faults.push(format!("{name}: differs by {found:.1e}"));
        }
    });
}

/// Rows of one batch may stand on both sides of the length at which longrope changes.
#[test]
fn rows_on_both_sides_of_a_length_limit_are_each_alone() {
    let Some(root) = shared("rows_on_both_sides_of_a_length_limit", "golden/phi3_longrope") else { return };
    let _device = device();
    let mut profile = profile(&root);
    profile.config["original_max_position_embeddings"] = json!(12);
    let (model, ids) = (model(&profile), prompt(&root));
    assert_eq!(model.length_limit(), Some(12));
    let (long, short) = (&ids[..], &ids[..9]);
    let padded = [&vec![0; long.len() - short.len()][..], short].concat();
    let mut cache = Cache::padded(&model.layout(), &[0, (long.len() - short.len()) as i32]);
    let together = run(&*model, &mut cache, &[long, &padded]);
    let alone = |ids: &[u32]| run_one(&*model, &mut model.new_cache(), ids);
    assert!(difference(&together[0], &alone(long)) < 2e-4);
    assert!(difference(&rows(&together[1], long.len() - short.len(), long.len()), &alone(short)) < 2e-4);
    // The limit shows: told of a long sequence, the short one is computed differently.
    let mut told = model.new_cache();
    told.expect(long.len() as i32);
    assert!(difference(&run_one(&*model, &mut told, short), &alone(short)) > TELLS);
}

/// Which layers have experts may be said by a list, as newer configs do, and means the same.
#[test]
fn layers_with_experts_may_be_listed() {
    let Some(root) = shared("layers_with_experts_may_be_listed", "golden/glm4_moe_lite") else { return };
    let _device = device();
    let mut listed = profile(&root);
    let config = listed.config.as_object_mut().expect("an object");
    config.remove("first_k_dense_replace").expect("what the list replaces");
    config.insert("mlp_layer_types".into(), json!(["dense", "sparse", "sparse"]));
    let (counted, listed) = (model(&profile(&root)), model(&listed));
    let ids = prompt(&root);
    let logits = |model: &dyn CausalModel| run_one(model, &mut model.new_cache(), &ids);
    assert_eq!(difference(&logits(&*counted), &logits(&*listed)), 0.0);
}

/// The part of a config that describes the language model.
fn text_config(config: &mut Value) -> &mut Value {
    match config.get("text_config").is_some() {
        true => &mut config["text_config"],
        false => config,
    }
}

/// With two layers that see eight positions each, a position is reached by itself and the fourteen before, and by no
/// other.
#[test]
fn windows_bite() {
    let Some(root) = shared("windows_bite", "golden") else { return };
    let _device = device();
    const WINDOW: i32 = 8;
    let reach = 2 * (WINDOW as usize - 1);
    let (mut windowed, mut bitten) = (BTreeSet::new(), BTreeSet::new());
    for name in names(&root) {
        let profile = profile(&root.join(&name));
        let family = family_of(&profile);
        let has_window = |layout: &[CacheKind]| layout.iter().any(|kind| matches!(kind, CacheKind::Window(_)));
        if has_window(&model(&profile).layout()) {
            windowed.insert(family);
        }
        let mut config = profile.config.clone();
        let text = text_config(&mut config);
        if text["sliding_window"].is_null() || text["use_sliding_window"] == json!(false) {
            continue;
        }
        text["num_hidden_layers"] = json!(2);
        text["sliding_window"] = json!(WINDOW);
        if text["layer_types"].is_array() {
            text["layer_types"] = json!(["sliding_attention", "sliding_attention"]);
        }
        text["num_kv_shared_layers"] = json!(0);
        let model = random_model(family, &config);
        let ids = prompt(&profile.root);
        let last = ids.len() - 1;
        let logits = |ids: &[u32]| rows(&run_one(&*model, &mut model.new_cache(), ids), last, last + 1);
        let before = logits(&ids);
        let changed_at = |at: usize| {
            let mut changed = ids.clone();
            changed[at] = (changed[at] + 1) % model.vocab_size();
            difference(&before, &logits(&changed))
        };
        let (beyond, within) = (changed_at(last - reach - 1), changed_at(last - reach));
        assert!(beyond == 0.0, "{name}: a token beyond the window changes logits by {beyond:.1e}");
        assert!(within > 0.0, "{name}: the last token within the window changes nothing");
        bitten.insert(family);
    }
    assert!(windowed.is_subset(&bitten), "families with windows: {windowed:?}, tested: {bitten:?}");
    assert!(windowed.len() >= 5, "{windowed:?}");
}
