//! What cannot be computed is refused with the fact; what is missing or left over is named.

use conformance::shared::shared;
use mesh_core::{ModelProfile, registry};
use mlx_rs::Array;
use serde_json::{Value, json};

use crate::{
    checkpoints::{names, profile},
    models::{device, family_of, graph, weights},
};

fn accepts(profile: &ModelProfile, config: Value) -> Result<(), String> {
    let families = registry::families().expect("families are unique");
    let family = registry::family_of(families, profile).expect("a family");
    family.accept(&ModelProfile { config, ..profile.clone() })
}

/// Sets `key` in the language model's part of a config.
fn with(config: &Value, key: &str, value: Value) -> Value {
    let mut config = config.clone();
    match config.get("text_config").is_some() {
        true => config["text_config"][key] = value,
        false => config[key] = value,
    }
    config
}

#[test]
fn unknown_settings_are_named() {
    let Some(root) = shared("unknown_settings_are_named", "golden") else { return };
    for name in names(&root) {
        let profile = profile(&root.join(&name));
        let config = &profile.config;
        accepts(&profile, config.clone()).unwrap_or_else(|error| panic!("{name}: {error}"));
        let foo = json!({ "rope_type": "foo", "factor": 2.0 });
        let by_layer = json!({ "full_attention": foo, "sliding_attention": foo });
        for parameters in [foo, by_layer] {
            let error = accepts(&profile, with(config, "rope_parameters", parameters)).expect_err(&name);
            assert!(error.contains("`rope_type` `foo`"), "{name}: {error}");
        }
        let error = accepts(&profile, with(config, "hidden_act", json!("foo"))).expect_err(&name);
        assert!(error.contains("`hidden_act` `foo`"), "{name}: {error}");
        let error = accepts(&profile, with(config, "num_key_value_heads", json!(3))).expect_err(&name);
        assert!(error.contains("`num_key_value_heads` 3"), "{name}: {error}");
        let error = accepts(&profile, with(config, "hidden_size", json!("wide"))).expect_err(&name);
        assert!(error.contains("wide"), "{name}: {error}");
    }
}

/// Taking away any one tensor is an error that names it, with the shape it should have.
#[test]
fn a_missing_tensor_is_named() {
    let Some(root) = shared("a_missing_tensor_is_named", "golden") else { return };
    let _device = device();
    for name in names(&root).into_iter().filter(|name| !name.contains("-q") && !name.contains("-mx")) {
        let profile = profile(&root.join(&name));
        let family = family_of(&profile);
        let tensors = Array::load_safetensors(&profile.weights[0]).expect("weights");
        let mut all: Vec<_> = tensors.iter().map(|(name, array)| (name.clone(), array.shape().to_vec())).collect();
        all.sort();
        for (tensor, shape) in &all {
            let mut weights = weights(&profile);
            weights.drop_tensor(tensor);
            let error = match graph(family, &profile.config, &mut weights) {
                Ok(_) => panic!("{name}: `{tensor}` is not missed"),
                Err(error) => error.to_string(),
            };
            assert!(error.contains(tensor.as_str()), "{name}, without `{tensor}`: {error}");
            // Of a stack that is missing whole, the parts are asked for.
            let stack = tensor.contains(".experts.") && !tensor.contains(".experts.0.");
            assert!(stack || error.contains(&format!("{shape:?}")), "{name}, `{tensor}` {shape:?}: {error}");
        }
    }
}

/// Tensors of layers that the config does not have are listed.
#[test]
fn tensors_left_over_are_listed() {
    let Some(root) = shared("tensors_left_over_are_listed", "golden") else { return };
    let _device = device();
    for name in names(&root) {
        let profile = profile(&root.join(&name));
        let mut config = profile.config.clone();
        let text = match config.get("text_config").is_some() {
            true => &mut config["text_config"],
            false => &mut config,
        };
        let layers = text["num_hidden_layers"].as_u64().expect("layers") as usize;
        // One layer behind the last is known as the one that predicts a second token.
        text["num_hidden_layers"] = json!(layers - 2);
        for list in ["layer_types", "no_rope_layers"] {
            if let Some(list) = text.get_mut(list).and_then(Value::as_array_mut) {
                list.truncate(layers - 2);
            }
        }
        text["num_kv_shared_layers"] = json!(0);
        let mut weights = weights(&profile);
        let error = match graph(family_of(&profile), &config, &mut weights) {
            Ok(_) => weights.finish().expect_err(&name).to_string(),
            // One table for all layers, which the config no longer has.
            Err(error) => {
                assert!(error.to_string().contains("per_layer") && name == "gemma4_e", "{name}: {error}");
                continue;
            }
        };
        let left = [layers - 2, layers - 1].map(|layer| format!("layers.{layer}."));
        let listed = left.iter().any(|left| error.contains(left));
        assert!(error.contains("does not use") && listed, "{name}: {error}");
    }
}

/// Settings that no model has are refused or fail to load; none panics, hangs or takes the memory it names.
#[test]
fn hostile_settings_do_no_harm() {
    let Some(root) = shared("hostile_settings_do_no_harm", "golden") else { return };
    let _device = device();
    let hostile =
        [json!(u64::MAX), json!(4e9), json!(1 << 20), json!(-1), json!(0), json!(null), json!("x"), json!([])];
    let mut accepted = 0;
    for name in names(&root).into_iter().filter(|name| !name.contains('-')) {
        let profile = profile(&root.join(&name));
        let family = family_of(&profile);
        let config = &profile.config;
        let text = config.get("text_config").unwrap_or(config).as_object().expect("an object");
        let mut settings: Vec<Vec<&str>> = text.keys().map(|key| vec![key.as_str()]).collect();
        for (key, value) in text {
            let inner = value.as_object().into_iter().flat_map(|inner| inner.keys());
            settings.extend(inner.map(|inner| vec![key.as_str(), inner.as_str()]));
        }
        for path in &settings {
            for value in &hostile {
                let changed = match path[..] {
                    [key] => with(config, key, value.clone()),
                    [key, inner] => {
                        let mut whole = text[key].clone();
                        whole[inner] = value.clone();
                        with(config, key, whole)
                    }
                    _ => continue,
                };
                if accepts(&profile, changed.clone()).is_ok() {
                    accepted += 1;
                    // Weights of other shapes are an error; what is left must be a model.
                    let _ = graph(family, &changed, &mut weights(&profile));
                }
            }
        }
    }
    assert!(accepted > 0, "settings that do not matter are accepted");
}
