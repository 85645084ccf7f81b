//! Would MLX serve a model, and how? Pure.

use std::collections::BTreeSet;

use mesh_core::{
    Capabilities, Device, DeviceKind, Fact, Host, Knob, ModelFamily, ModelProfile, Need, Offer, OutputForm, PromptForm,
    Reason, Refusal, Verdict, WeightFormat,
};
use mesh_graph::{Footprint, QuantizationTable};

use crate::{
    host::SLOW,
    memory::{Sizes, USABLE_PERCENT},
    settings::Settings,
};

/// Context where neither the model nor the user names one, in tokens.
pub const CONTEXT_TOKENS_DEFAULT: u32 = 4096;

/// Requests that wait, unless the settings say otherwise; what an offer promises.
pub const QUEUE_REQUESTS_MAX: u32 = 32;

/// Judges a model.
pub fn judge(profile: &ModelProfile, family: Option<&dyn ModelFamily>, host: &Host) -> Verdict {
    let device = match &host.device {
        Ok(device) => device,
        Err(why) => return refuse(Reason::new(why)),
    };
    if profile.format.value != WeightFormat::Safetensors {
        let reason = Reason::from_fact("the weights are GGUF, and MLX reads safetensors", &profile.format.source);
        return Verdict::Refuse(Refusal::because(reason).hint("leave out --mlx: llama-server reads GGUF"));
    }
    let Some(family) = family else { return Verdict::Refuse(nobody_claims(profile)) };
    if profile.config.is_null() {
        let reason = Reason::new(format!(
            "the weights look like {}, but there is no config.json to say how many heads they have and how positions are encoded",
            family.title()
        ));
        return Verdict::Refuse(Refusal::because(reason).hint("put the model's config.json beside its weights"));
    }
    if let Err(error) = QuantizationTable::read(&profile.config) {
        return refuse(Reason::new(error.to_string()));
    }
    if let Err(what) = family.accept(profile) {
        return refuse(Reason::new(what));
    }
    if profile.tokenizer.is_none() {
        let reason = Reason::new("there is no tokenizer.json");
        return Verdict::Refuse(Refusal::because(reason).hint("put the model's tokenizer.json beside its weights"));
    }
    let mut reasons = vec![match &profile.model_type {
        Some(fact) => {
            Reason::from_fact(format!("`model_type` is `{}`, of the family {}", fact.value, family.id()), &fact.source)
        }
        None => Reason::new(format!("the family is {}", family.id())),
    }];
    if device.kind == DeviceKind::Cpu {
        reasons.push(Reason::new(SLOW));
    }
    if profile.vision.as_ref().is_some_and(|fact| fact.value) {
        reasons.push(Reason::new("only the text part is served: vision is left out"));
    }
    let residency = residency(profile, device);
    reasons.push(Reason::new(residency.reason));
    let context = profile.context_tokens_max.as_ref().map_or(CONTEXT_TOKENS_DEFAULT, |fact| fact.value);
    let memory_bytes = memory_bytes(profile, device, residency.bytes, context);
    Verdict::Serve(Offer {
        capabilities: capabilities(context, Settings::default().parallel(device.kind)),
        device: device.clone(),
        memory_bytes,
        score: if device.kind == DeviceKind::Cpu { 10 } else { 100 },
        reasons,
    })
}

/// With how much memory a plan serves the whole context, in bytes, where that can be told.
fn memory_bytes(profile: &ModelProfile, device: &Device, weights_bytes: u64, context_tokens: u32) -> Option<u64> {
    Some(needed(profile, device, weights_bytes, context_tokens)?.device_bytes)
}

/// What a sequence of so many tokens takes, by the arithmetic of [`crate::memory::plan`].
pub fn need(profile: &ModelProfile, host: &Host, context_tokens: u32) -> Option<Need> {
    let device = host.device.as_ref().ok().filter(|_| profile.format.value == WeightFormat::Safetensors)?;
    needed(profile, device, residency(profile, device).bytes, context_tokens)
}

fn needed(profile: &ModelProfile, device: &Device, weights_bytes: u64, context_tokens: u32) -> Option<Need> {
    let defaults = Settings::default();
    let vocab_size = profile.vocab_size.as_ref().map_or(0, |fact| fact.value);
    let sizes = Sizes::read(&profile.config, vocab_size, device.kind);
    let parallel = defaults.parallel(device.kind);
    let workspace_bytes = sizes.workspace_bytes(defaults.prefill_chunk_tokens, context_tokens.into(), parallel);
    let cache_bytes = footprint(profile, sizes.float_bytes)?.bytes(context_tokens.into());
    let needed = weights_bytes.saturating_add(workspace_bytes).saturating_add(cache_bytes);
    let device_bytes = (needed / USABLE_PERCENT).saturating_add(1).saturating_mul(100);
    Some(Need { weights_bytes, cache_bytes, workspace_bytes, device_bytes })
}

/// What a sequence takes, where activations are of so many bytes: keys and values are of their type.
pub fn footprint(profile: &ModelProfile, float_bytes: u64) -> Option<Footprint> {
    let Some(Fact { value: kept, .. }) = &profile.kept else {
        // Counts two bytes each.
        let token_bytes = profile.kv_bytes_per_token()? / 2 * float_bytes;
        return Some(Footprint { token_bytes, ..Footprint::default() });
    };
    let windows = kept.windows.iter().map(|(window, values)| (*window, values.saturating_mul(float_bytes)));
    Some(Footprint {
        token_bytes: kept.token_values.saturating_mul(float_bytes),
        windows: windows.collect(),
        state_bytes: kept.state_values.saturating_mul(4),
    })
}

/// What the engine accepts, whatever the model.
pub fn capabilities(context_tokens_max: u32, requests_parallel_max: u32) -> Capabilities {
    Capabilities {
        prompt: PromptForm::Tokens,
        output: OutputForm::Tokens,
        knobs: BTreeSet::from([
            Knob::Temperature,
            Knob::TopP,
            Knob::TopK,
            Knob::MinP,
            Knob::TypicalP,
            Knob::Xtc,
            Knob::Dry,
            Knob::Seed,
            Knob::RepetitionPenalty,
            Knob::PresencePenalty,
            Knob::FrequencyPenalty,
            Knob::LogitBias,
            Knob::IgnoreEos,
            Knob::MinTokens,
            Knob::Logprobs,
            Knob::JsonSchema,
            Knob::Regex,
            Knob::Lark,
        ]),
        context_tokens_max,
        requests_parallel_max,
        requests_queued_max: QUEUE_REQUESTS_MAX,
        prefix_reuse: true,
        embeddings: true,
        vision: false,
    }
}

/// How the weights will lie in memory.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Residency {
    /// Whether quantized matrices are unpacked at load.
    pub dequantize: bool,
    /// What they will take, in bytes.
    pub bytes: u64,
    /// Why, for people.
    pub reason: String,
}

/// Decides how the weights will lie in memory. On a CPU, MLX's packed kernels are scalar, while plain f32 goes to BLAS:
/// twice as fast in decode and ten times in prefill, at the cost of memory. So small models are unpacked there.
pub fn residency(profile: &ModelProfile, device: &Device) -> Residency {
    let stored = profile.weight_bytes.value;
    if profile.quantization.as_ref().is_some_and(|fact| fact.value.mode == "fp8") {
        // One byte each becomes two, or on a CPU four.
        let (floats, factor) = if device.kind == DeviceKind::Cpu { ("f32", 4) } else { ("bf16", 2) };
        let bytes = stored.saturating_mul(factor);
        let reason = format!("8-bit floats are unpacked to {floats}, up to {} MiB", mib(bytes));
        return Residency { dequantize: false, bytes, reason };
    }
    if device.kind != DeviceKind::Cpu {
        return Residency {
            dequantize: false,
            bytes: stored,
            reason: format!("weights take {} MiB as stored", mib(stored)),
        };
    }
    let bits = match profile.quantization.as_ref().map(|fact| fact.value.bits) {
        // Scales and biases are stored too, so this errs on the high side.
        Some(bits) => bits.unwrap_or(4).max(1),
        None => {
            // Stored as 16-bit floats as a rule, and computed in f32.
            let bytes = stored.saturating_mul(2);
            return Residency {
                dequantize: false,
                bytes,
                reason: format!("weights take up to {} MiB as f32", mib(bytes)),
            };
        }
    };
    let plain = stored.saturating_mul(32) / u64::from(bits);
    if device.memory_bytes.is_some_and(|available| plain <= available / 2) {
        let reason = format!("quantized weights are unpacked to f32, up to {} MiB: faster on a CPU", mib(plain));
        return Residency { dequantize: true, bytes: plain, reason };
    }
    Residency { dequantize: false, bytes: stored, reason: format!("weights take {} MiB as stored", mib(stored)) }
}

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

fn refuse(reason: Reason) -> Verdict {
    Verdict::Refuse(Refusal::because(reason))
}

fn nobody_claims(profile: &ModelProfile) -> Refusal {
    let reason = match (&profile.model_type, &profile.architectures) {
        (Some(fact), _) => Reason::from_fact(format!("no family claims `model_type` `{}`", fact.value), &fact.source),
        (None, Some(fact)) => {
            Reason::from_fact(format!("no family claims the architecture `{}`", fact.value.join(", ")), &fact.source)
        }
        (None, None) => Reason::new("there is no config.json, and no family is recognised by its tensors"),
    };
    Refusal::because(reason).hint("if a GGUF of this model exists, llama-server can serve that: --gguf")
}

#[cfg(test)]
mod tests {
    use mesh_core::Source;
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;
    use crate::memory::{Question, plan};

    fn fact<T>(value: T) -> Option<Fact<T>> {
        Some(Fact::new(value, Source::file("config.json")))
    }

    proptest! {
        /// What a server sets aside by the offer is what the load's own arithmetic needs.
        #[test]
        fn what_is_offered_suffices(
            weights_bytes in 1u64..1 << 36, context_tokens in 1u32..200_000, layers in 1u32..100, vocab in 100u32..300_000,
            cpu: bool,
        ) {
            let kind = if cpu { DeviceKind::Cpu } else { DeviceKind::Cuda };
            let device = Device { kind, name: String::new(), memory_bytes: None };
            let format = Fact::new(WeightFormat::Safetensors, Source::file("model.safetensors"));
            let profile = ModelProfile {
                layers: fact(layers),
                kv_heads: fact(8),
                head_dim: fact(128),
                vocab_size: fact(vocab),
                config: json!({ "hidden_size": 4096, "intermediate_size": 12288, "num_attention_heads": 32 }),
                ..ModelProfile::of_files("m".into(), "".into(), vec![], format, weights_bytes)
            };
            let sizes = Sizes::read(&profile.config, vocab, kind);
            let token_bytes = profile.kv_bytes_per_token().unwrap() / 2 * sizes.float_bytes;
            let footprint = Footprint { token_bytes, ..Footprint::default() };
            let settings = Settings::default();
            let planned = plan(&Question {
                model: "m",
                device_bytes: memory_bytes(&profile, &device, weights_bytes, context_tokens),
                weights_bytes,
                footprint: &footprint,
                sizes: &sizes,
                parallel_max: settings.parallel(kind),
                chunk_tokens: settings.prefill_chunk_tokens,
                context_tokens,
                asked: true,
                sequences_bytes_max: None,
            });
            prop_assert_eq!(planned.unwrap().context_tokens, context_tokens);
        }
    }
}
