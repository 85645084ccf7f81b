//! What is kept of a sequence, from the settings of config.json: which layers see everything, a window, or carry a state,
//! and how much each keeps. The tests of the families compare it with what their graphs keep.

use std::collections::BTreeSet;

use mesh_core::Kept;
use serde_json::Value;

/// Most layers that are believed.
pub(super) const LAYERS_MAX: u64 = 1 << 12;

/// What a layer is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Kind {
    Full,
    Window(u32),
    Delta,
    Conv,
}

/// What `settings`, the language model's part of config.json, say; `None` where they do not say it in a form that is known.
pub(super) fn kept(settings: &Value) -> Option<Kept> {
    let settings = Settings(settings);
    let layers = settings.number("num_hidden_layers").filter(|layers| *layers <= LAYERS_MAX)?;
    let kinds = settings.kinds(layers as usize)?;
    let shared = settings.number("num_kv_shared_layers").unwrap_or(0).min(layers);
    let mut kept = Kept::default();
    for kind in &kinds[..(layers - shared) as usize] {
        match kind {
            Kind::Full => kept.add(None, settings.attention_values(true)?),
            Kind::Window(window) => kept.add(Some(*window), settings.attention_values(false)?),
            Kind::Delta => kept.state_values = kept.state_values.checked_add(settings.delta_values()?)?,
            Kind::Conv => {
                let inputs = settings.number("conv_L_cache")?.checked_sub(1)?;
                kept.state_values =
                    kept.state_values.checked_add(inputs.checked_mul(settings.number("hidden_size")?)?)?;
            }
        }
    }
    Some(kept)
}

struct Settings<'a>(&'a Value);

impl Settings<'_> {
    fn number(&self, key: &str) -> Option<u64> {
        self.0.get(key)?.as_u64().filter(|number| *number <= u32::MAX.into())
    }

    fn window(&self) -> Option<u32> {
        let window = self.number("sliding_window").filter(|window| *window > 0)?;
        u32::try_from(window).ok()
    }

    fn model_type(&self) -> &str {
        self.0["model_type"].as_str().unwrap_or_default()
    }

    /// What each layer is.
    fn kinds(&self, layers: usize) -> Option<Vec<Kind>> {
        let indices =
            |value: &Value| -> Option<BTreeSet<u64>> { value.as_array()?.iter().map(Value::as_u64).collect() };
        let every = |layer: u64, period: u64| (layer + 1).is_multiple_of(period.max(1));
        let all = 0..layers as u64;
        if let Some(types) = self.0["layer_types"].as_array() {
            let kind = |name: &Value| match name.as_str()? {
                "full_attention" => Some(Kind::Full),
                "sliding_attention" => Some(Kind::Window(self.window().or_else(|| self.window_default())?)),
                "linear_attention" => Some(Kind::Delta),
                "conv" => Some(Kind::Conv),
                _ => None,
            };
            let kinds: Vec<Kind> = types.iter().map(kind).collect::<Option<_>>()?;
            return (kinds.len() == layers).then_some(kinds);
        }
        let linear = &self.0["linear_attn_config"];
        if linear.is_object() {
            let delta = indices(&linear["kda_layers"])?; // counted from one
            return Some(
                all.map(|layer| if delta.contains(&(layer + 1)) { Kind::Delta } else { Kind::Full }).collect(),
            );
        }
        if let Some(full) = indices(&self.0["full_attn_idxs"]) {
            return Some(all.map(|layer| if full.contains(&layer) { Kind::Full } else { Kind::Conv }).collect());
        }
        if self.number("linear_num_value_heads").is_some() {
            let period = self.number("full_attention_interval").unwrap_or(4);
            return Some(all.map(|layer| if every(layer, period) { Kind::Full } else { Kind::Delta }).collect());
        }
        let stated = self.number("sliding_window_pattern").or_else(|| self.number("_sliding_window_pattern"));
        let period = stated.or(match self.model_type() {
            "gemma2" | "gpt_oss" => Some(2),
            "gemma3" | "gemma3_text" | "gemma4" | "gemma4_text" => Some(6),
            _ => None,
        });
        if let (Some(period), Some(window)) = (period, self.window().or_else(|| self.window_default())) {
            let kind = |layer| if every(layer, period) { Kind::Full } else { Kind::Window(window) };
            return Some(all.map(kind).collect());
        }
        // Qwen's configs name a window and switch it off.
        let everywhere = ["mistral", "ministral3", "mixtral", "phi3"].contains(&self.model_type());
        let window = self.window().filter(|_| everywhere && self.0["use_sliding_window"].is_null());
        Some(vec![window.map_or(Kind::Full, Kind::Window); layers])
    }

    /// What the reference implementations take where a config does not say.
    fn window_default(&self) -> Option<u32> {
        match self.model_type() {
            "gemma2" | "gemma3" | "gemma3_text" => Some(4096),
            "gemma4" | "gemma4_text" => Some(512),
            "gpt_oss" => Some(128),
            _ => None,
        }
    }

    /// Values that an attention layer keeps of a token.
    fn attention_values(&self, full: bool) -> Option<u64> {
        // Latent attention keeps the latent and the part of the key that rotates.
        if let Some(latent) = self.number("kv_lora_rank") {
            return latent.checked_add(self.number("qk_rope_head_dim")?);
        }
        let heads = self.number("num_attention_heads")?;
        let mut kv_heads = self.number("num_key_value_heads").unwrap_or(heads);
        let mut head_dim = match self.number("head_dim") {
            Some(size) => size,
            None => self.number("hidden_size")?.checked_div(heads)?,
        };
        if self.model_type().starts_with("gemma4") && full {
            head_dim = self.number("global_head_dim").unwrap_or(512);
            if self.0["attention_k_eq_v"] == true {
                kv_heads = self.number("num_global_key_value_heads").unwrap_or(kv_heads);
            }
        }
        kv_heads.checked_mul(head_dim)?.checked_mul(2)
    }

    /// Values of the states of a layer with the delta rule: its matrix, and the inputs of its convolutions.
    fn delta_values(&self) -> Option<u64> {
        let linear = Settings(&self.0["linear_attn_config"]);
        if let (Some(heads), Some(size)) = (linear.number("num_heads"), linear.number("head_dim")) {
            let width = heads.checked_mul(size)?;
            let inputs = linear.number("short_conv_kernel_size")?.checked_sub(1)?.checked_mul(3)?.checked_mul(width)?;
            return width.checked_mul(size)?.checked_add(inputs);
        }
        let (key_heads, key) = (self.number("linear_num_key_heads")?, self.number("linear_key_head_dim")?);
        let (value_heads, value) = (self.number("linear_num_value_heads")?, self.number("linear_value_head_dim")?);
        let (keys, values) = (key_heads.checked_mul(key)?, value_heads.checked_mul(value)?);
        let channels = keys.checked_mul(2)?.checked_add(values)?;
        let inputs = self.number("linear_conv_kernel_dim")?.checked_sub(1)?.checked_mul(channels)?;
        values.checked_mul(key)?.checked_add(inputs)
    }
}
