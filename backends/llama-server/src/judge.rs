//! Whether and how a model would be served: pure, from its profile and what the host reported.

use mesh_core::{
    Capabilities, Device, Fact, Host, Kept, Knob, ModelProfile, Need, Offer, OutputForm, PromptForm, Reason, Refusal,
    Verdict, WeightFormat,
};

use crate::{settings::QUEUE_DEFAULT, share::Share};

/// Context chosen where the model does not say how long its own is, in tokens.
const CONTEXT_UNKNOWN_TOKENS: u32 = 4096;
/// Longest context chosen where the size of its cache cannot be told, in tokens.
const CONTEXT_UNSIZED_TOKENS_MAX: u32 = 8192;
/// Shortest context that scarce memory reduces a choice to, in tokens. What does not fit even so is for the child to
/// refuse: it may have a device with memory of its own.
const CONTEXT_TOKENS_MIN: u32 = 2048;
/// Left for everything that is neither weights nor cache, in bytes.
pub(crate) const OVERHEAD_BYTES: u64 = 256 << 20;

/// What llama.cpp keeps of a window besides: as many tokens as it reads at a time.
const BATCH_TOKENS: u32 = 512;

/// The parameters that `/completion` honours.
pub(crate) const KNOBS: [Knob; 15] = [
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
    Knob::Logprobs,
    Knob::JsonSchema,
];

/// What engines of this backend accept, but for the numbers of one model.
pub(crate) fn capabilities(
    context_tokens_max: u32,
    requests_parallel_max: u32,
    requests_queued_max: u32,
) -> Capabilities {
    Capabilities {
        prompt: PromptForm::Text,
        output: OutputForm::Text,
        knobs: KNOBS.into(),
        context_tokens_max,
        requests_parallel_max,
        requests_queued_max,
        prefix_reuse: true,
        embeddings: false,
        vision: false,
    }
}

/// Judges a model. Settings are not known yet: this is what is chosen unasked, and a load that was told otherwise reports
/// what it really does.
pub(crate) fn judge(profile: &ModelProfile, host: &Host) -> Verdict {
    let device = match &host.device {
        Ok(device) => device,
        Err(why) => return Verdict::Refuse(Refusal::because(Reason::new(why.clone()))),
    };
    let format = &profile.format;
    if format.value != WeightFormat::Gguf {
        let text = format!("the weights are {}, and llama-server reads GGUF", format.value);
        return refuse(Reason::from_fact(text, &format.source), "take a GGUF of the model, or serve these with --mlx");
    }
    if let Some(architecture) = &profile.gguf_architecture
        && matches!(architecture.value.as_str(), "clip" | "mmproj")
    {
        let text = format!("`general.architecture` is `{}`: a vision projector, not a model", architecture.value);
        return refuse(Reason::from_fact(text, &architecture.source), "name the language model's GGUF instead");
    }
    if profile.weights.is_empty() {
        return refuse(Reason::new("the model has no weight file"), "check the model's directory");
    }
    Verdict::Serve(offer(profile, device))
}

fn refuse(reason: Reason, hint: &str) -> Verdict {
    Verdict::Refuse(Refusal::because(reason).hint(hint))
}

fn offer(profile: &ModelProfile, device: &Device) -> Offer {
    let mut reasons = vec![Reason::from_fact("the weights are GGUF", &profile.format.source)];
    match &profile.gguf_architecture {
        Some(architecture) => reasons.push(Reason::from_fact(
            format!("`general.architecture` is `{}`; llama.cpp has the last word on it", architecture.value),
            &architecture.source,
        )),
        None => reasons.push(Reason::new("`general.architecture` is not known; llama.cpp has the last word on it")),
    }
    let choice = choose_context(profile, device.memory_bytes, 1);
    reasons.extend(choice.reasons);
    let share = Share::choose(profile, device.memory_bytes, choice.tokens, None, None);
    let (tokens, slots, remembered) = (choice.tokens, share.slots, share.cache_bytes());
    reasons.extend(share.reasons);
    let memory_bytes = profile.kv_bytes_per_token().map(|kv_bytes| {
        let weights = profile.weight_bytes.value;
        let held = kv_bytes.saturating_mul(tokens.into()).saturating_mul(slots.into());
        let total = weights.saturating_add(held).saturating_add(remembered);
        reasons.push(Reason::new(format!(
            "memory: {weights} bytes of weights + {slots} × {tokens} tokens × {kv_bytes} bytes of 16-bit keys and values + \
             {remembered} bytes of remembered prompts = {total} bytes",
        )));
        total
    });
    let capabilities = capabilities(tokens, slots, QUEUE_DEFAULT);
    Offer { capabilities, device: device.clone(), memory_bytes, score: 100, reasons }
}

/// What a sequence of so many tokens takes, with keys and values in 16-bit floats.
pub(crate) fn need(profile: &ModelProfile, host: &Host, context_tokens: u32) -> Option<Need> {
    if host.device.is_err() || profile.format.value != WeightFormat::Gguf {
        return None;
    }
    let cache_bytes = match &profile.kept {
        Some(Fact { value: kept, .. }) => {
            let windows = kept.windows.iter().map(|(window, values)| (window.saturating_add(BATCH_TOKENS), *values));
            Kept { windows: windows.collect(), ..kept.clone() }.bytes(context_tokens.into(), 2)
        }
        None => profile.kv_bytes_per_token()?.saturating_mul(context_tokens.into()),
    };
    let weights_bytes = profile.weight_bytes.value;
    let device_bytes = weights_bytes.saturating_add(cache_bytes).saturating_add(OVERHEAD_BYTES);
    Some(Need { weights_bytes, cache_bytes, workspace_bytes: OVERHEAD_BYTES, device_bytes })
}

/// A context and how it came about.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Choice {
    /// The context, in tokens.
    pub tokens: u32,
    /// What decided it.
    pub reasons: Vec<Reason>,
}

/// The context to use where the user asked for none: the model's own, unless memory is short of it. `available_bytes` is
/// what weights and cache may take together.
pub(crate) fn choose_context(profile: &ModelProfile, available_bytes: Option<u64>, parallel: u32) -> Choice {
    let Some(own) = &profile.context_tokens_max else {
        let text = format!("context: {CONTEXT_UNKNOWN_TOKENS} tokens, as the model names none");
        return Choice { tokens: CONTEXT_UNKNOWN_TOKENS, reasons: vec![Reason::new(text)] };
    };
    let whole = |tokens| Choice {
        tokens,
        reasons: vec![Reason::from_fact(format!("context: {tokens} tokens, the model's own"), &own.source)],
    };
    let per_token = |bytes: u64| bytes.saturating_mul(parallel.into());
    let Some(kv_bytes) = profile.kv_bytes_per_token().filter(|bytes| *bytes > 0).map(per_token) else {
        if own.value <= CONTEXT_UNSIZED_TOKENS_MAX {
            return whole(own.value);
        }
        let text = format!(
            "context: {CONTEXT_UNSIZED_TOKENS_MAX} of the model's {} tokens, as the size of its cache cannot be told; \
             --ctx asks for more",
            own.value
        );
        return Choice { tokens: CONTEXT_UNSIZED_TOKENS_MAX, reasons: vec![Reason::from_fact(text, &own.source)] };
    };
    let Some(available) = available_bytes else { return whole(own.value) };
    let room = available.saturating_sub(profile.weight_bytes.value).saturating_sub(OVERHEAD_BYTES);
    // llama.cpp rounds contexts to 256.
    let fits = u32::try_from(room / kv_bytes / 256 * 256).unwrap_or(u32::MAX);
    if fits >= own.value {
        return whole(own.value);
    }
    let tokens = fits.max(CONTEXT_TOKENS_MIN).min(own.value);
    let text = format!(
        "context: {tokens} of the model's {} tokens, as a token takes {kv_bytes} bytes and beside {} bytes of weights \
         {room} of {available} bytes are free; --ctx asks for more",
        own.value, profile.weight_bytes.value
    );
    Choice { tokens, reasons: vec![Reason::from_fact(text, &own.source)] }
}

#[cfg(test)]
mod tests {
    use super::*;
    use mesh_core::{DeviceKind, Source};
    use proptest::prelude::*;

    fn fact<T>(value: T) -> Option<Fact<T>> {
        Some(Fact::new(value, Source::file("m.gguf")))
    }

    fn profile(context: u32, weights: u64) -> ModelProfile {
        ModelProfile {
            layers: fact(10),
            kv_heads: fact(2),
            head_dim: fact(64),
            context_tokens_max: fact(context),
            weight_bytes: fact(weights).unwrap(),
            ..crate::fixture::profile("m", "/m.gguf".into(), "llama")
        }
    }

    fn host(memory_bytes: Option<u64>) -> Host {
        let device = Device { kind: DeviceKind::External, name: "llama-server".into(), memory_bytes };
        Host::new(Ok(device), vec![])
    }

    fn texts(reasons: &[Reason]) -> String {
        reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("\n")
    }

    #[test]
    fn a_gguf_is_served_with_the_arithmetic_shown() {
        let Verdict::Serve(offer) = judge(&profile(4096, 1000), &host(Some(1 << 40))) else { panic!("refused") };
        assert_eq!(offer.capabilities.context_tokens_max, 4096);
        assert_eq!(offer.capabilities.requests_parallel_max, 4);
        assert_eq!(offer.memory_bytes, Some(1000 + (4 + 4) * 4096 * 5120));
        assert_eq!((offer.score, offer.device.kind), (100, DeviceKind::External));
        let text = texts(&offer.reasons);
        for part in ["`general.architecture` is `llama`", "4 × 4096 tokens × 5120 bytes", "= 167773160 bytes"] {
            assert!(text.contains(part), "{text}");
        }
    }

    #[test]
    fn what_a_context_needs_follows_from_what_is_kept() {
        let host = host(Some(1 << 40));
        let plain = need(&profile(4096, 1000), &host, 100).unwrap();
        assert_eq!((plain.weights_bytes, plain.cache_bytes), (1000, 100 * 5120));
        assert_eq!(plain.device_bytes, 1000 + 100 * 5120 + OVERHEAD_BYTES);
        let kept = Kept { token_values: 10, windows: vec![(64, 3)], state_values: 7 };
        let model = ModelProfile { kept: fact(kept), ..profile(4096, 1000) };
        assert_eq!(need(&model, &host, 100).unwrap().cache_bytes, 2 * (100 * 10 + 100 * 3) + 4 * 7);
        assert_eq!(need(&model, &host, 4096).unwrap().cache_bytes, 2 * (4096 * 10 + (64 + 512) * 3) + 4 * 7);
        assert_eq!(model.kv_bytes_per_token(), Some(2 * 13));
        let nowhere = Host::new(Err("no llama-server".into()), vec![]);
        assert_eq!(need(&model, &nowhere, 100), None);
    }

    #[test]
    fn an_architecture_nobody_knows_is_left_to_llama_cpp() {
        let model = ModelProfile { gguf_architecture: fact("novel".into()), ..profile(4096, 1) };
        let Verdict::Serve(offer) = judge(&model, &host(None)) else { panic!("refused") };
        assert!(texts(&offer.reasons).contains("`novel`"));
    }

    #[test]
    fn refusals_have_a_reason_and_a_hint() {
        let safetensors = ModelProfile { format: fact(WeightFormat::Safetensors).unwrap(), ..profile(1, 1) };
        let projector = ModelProfile { gguf_architecture: fact("clip".into()), ..profile(1, 1) };
        for (model, word) in [(safetensors, "safetensors"), (projector, "projector")] {
            let Verdict::Refuse(refusal) = judge(&model, &host(None)) else { panic!("{word} was served") };
            assert!(refusal.to_string().contains(word) && refusal.hint.is_some(), "{refusal}");
        }
        let nowhere = Host::new(Err("no llama-server".into()), vec![]);
        assert!(matches!(judge(&profile(1, 1), &nowhere), Verdict::Refuse(_)));
    }

    #[test]
    fn scarce_memory_shortens_the_context_and_says_so() {
        let model = profile(131_072, 1 << 30);
        let choice = choose_context(&model, Some((1 << 30) + OVERHEAD_BYTES + 10_000 * 5120), 1);
        assert_eq!(choice.tokens, 9984);
        assert!(texts(&choice.reasons).contains("9984 of the model's 131072 tokens"));
        assert_eq!(choose_context(&model, Some(0), 1).tokens, CONTEXT_TOKENS_MIN);
        assert_eq!(choose_context(&model, None, 1).tokens, 131_072);
    }

    #[test]
    fn what_is_not_known_is_bounded_and_said() {
        let unsized_cache = ModelProfile { head_dim: None, ..profile(131_072, 1) };
        let choice = choose_context(&unsized_cache, Some(1 << 40), 1);
        assert_eq!(choice.tokens, 8192);
        assert!(texts(&choice.reasons).contains("cannot be told"));
        let silent = ModelProfile { context_tokens_max: None, ..profile(1, 1) };
        assert_eq!(choose_context(&silent, None, 1).tokens, 4096);
    }

    proptest! {
        #[test]
        fn a_choice_never_exceeds_the_model_and_fits_where_it_can(
            own in 1u32..1_000_000, weights in 0u64..1 << 40, available in 0u64..1 << 42,
        ) {
            let choice = choose_context(&profile(own, weights), Some(available), 1);
            prop_assert!(choice.tokens >= 1 && choice.tokens <= own);
            let needed = weights + OVERHEAD_BYTES + u64::from(choice.tokens) * 5120;
            prop_assert!(needed <= available || choice.tokens <= CONTEXT_TOKENS_MIN);
        }
    }
}
