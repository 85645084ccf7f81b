//! Memory, predicted: what a model, its sequences and its work take, against what the device has. Pure, but for looking
//! at what is free.

use mesh_core::{DeviceKind, LoadError};
use mesh_graph::{Footprint, ffi, memory};
use serde_json::Value;

use crate::host;

/// Of a device's memory, what is planned with; the rest is for what nobody counts.
pub const USABLE_PERCENT: u64 = 90;

/// Sizes that decide how much a forward pass takes beside what it keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Sizes {
    /// Width of the stream.
    pub hidden: u64,
    /// Width within an MLP, of all experts that a token goes to.
    pub intermediate: u64,
    /// Query heads.
    pub heads: u64,
    /// Entries in the vocabulary.
    pub vocab: u64,
    /// Bytes of an activation.
    pub float_bytes: u64,
    /// Whether attention computes all scores of a chunk at once, as it does on a CPU.
    pub scores: bool,
}

impl Sizes {
    /// From config.json, as far as it says; guesses on the high side otherwise.
    pub fn read(config: &Value, vocab_size: u32, device: DeviceKind) -> Self {
        let part = if config["text_config"].is_object() { &config["text_config"] } else { config };
        let number = |key: &str| part[key].as_u64().filter(|value| *value > 0);
        let hidden = number("hidden_size").unwrap_or(4096);
        let dense = number("intermediate_size").unwrap_or(hidden * 4);
        let experts = number("moe_intermediate_size").zip(number("num_experts_per_tok")).map_or(0, |(a, b)| a * b);
        Self {
            hidden,
            intermediate: dense.max(experts),
            heads: number("num_attention_heads").unwrap_or(32),
            vocab: u64::from(vocab_size),
            float_bytes: if device == DeviceKind::Cpu { 4 } else { 2 },
            scores: device == DeviceKind::Cpu,
        }
    }

    /// Bytes that reading a chunk takes beside caches, at most: the stream and what a layer makes of it, and scores.
    pub fn chunk_bytes(&self, chunk_tokens: u64, context_tokens: u64) -> u64 {
        let stream = chunk_tokens * (8 * self.hidden + 4 * self.intermediate) * self.float_bytes;
        stream + if self.scores { 2 * 4 * self.heads * chunk_tokens * context_tokens } else { 0 }
    }

    /// Bytes that choosing tokens takes: logits and what is made of them, in f32.
    pub fn choice_bytes(&self, rows: u64) -> u64 {
        rows * self.vocab * 4 * 8
    }

    /// Bytes that a forward pass takes beside caches, with chunks of so many tokens at most in a context of so many.
    pub fn workspace_bytes(&self, chunk_tokens: u32, context_tokens: u64, parallel: u32) -> u64 {
        let most = u32::try_from(context_tokens).map_or(chunk_tokens, |context| chunk_tokens.min(context));
        let chunk = self.chunk_within(most, context_tokens, CHUNK_BYTES_MAX);
        self.chunk_bytes(chunk.into(), context_tokens) + self.choice_bytes(parallel.into())
    }

    /// The longest chunk up to `most` tokens that takes no more than `bytes_max`, of a sequence of so many tokens.
    pub fn chunk_within(&self, most: u32, tokens: u64, bytes_max: u64) -> u32 {
        let each = self.chunk_bytes(1, tokens).max(1);
        u32::try_from(bytes_max / each).unwrap_or(u32::MAX).clamp(16, most.max(16)).min(most)
    }
}

/// What a load plans with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Plan {
    /// The context to serve, in tokens.
    pub context_tokens: u32,
    /// Bytes for what sequences keep, remembered ones included.
    pub sequences_bytes: u64,
    /// Bytes for a forward pass.
    pub workspace_bytes: u64,
    /// The arithmetic, for people.
    pub reason: String,
}

/// What is asked of a plan.
#[derive(Clone, Debug)]
pub struct Question<'a> {
    /// Names the model.
    pub model: &'a str,
    /// Bytes of the device that can be used, weights included; `None` where nobody knows.
    pub device_bytes: Option<u64>,
    /// Bytes of the weights.
    pub weights_bytes: u64,
    /// What sequences take.
    pub footprint: &'a Footprint,
    /// What passes take.
    pub sizes: &'a Sizes,
    /// Requests at a time.
    pub parallel_max: u32,
    /// Prompt tokens at a time, at most.
    pub chunk_tokens: u32,
    /// The model's own context, or what the user asked for, in tokens.
    pub context_tokens: u32,
    /// Whether it was asked for: then it is served or refused, never shortened.
    pub asked: bool,
    /// Bytes for sequences, where the user limits them.
    pub sequences_bytes_max: Option<u64>,
}

/// Where the device does not say what it has, sequences may take this much.
const SEQUENCES_BYTES_DEFAULT: u64 = 8 << 30;

/// Plans the memory of a model: a single sequence of the whole context has to fit beside weights and workspace.
pub fn plan(question: &Question<'_>) -> Result<Plan, LoadError> {
    let Question { footprint, sizes, weights_bytes, context_tokens, .. } = *question;
    // Chunks get shorter as sequences get longer, so that scores stay within this.
    let workspace = |context: u64| sizes.workspace_bytes(question.chunk_tokens, context, question.parallel_max);
    let Some(device_bytes) = question.device_bytes else {
        let sequences_bytes = SEQUENCES_BYTES_DEFAULT.max(footprint.bytes(context_tokens.into()));
        let sequences_bytes = question.sequences_bytes_max.unwrap_or(sequences_bytes);
        let workspace_bytes = workspace(context_tokens.into());
        let reason =
            format!("the device does not say what memory it has; {} MiB are taken for sequences", mib(sequences_bytes));
        return Ok(Plan { context_tokens, sequences_bytes, workspace_bytes, reason });
    };
    let usable = device_bytes / 100 * USABLE_PERCENT;
    let needed = |context: u64| weights_bytes + workspace(context) + footprint.bytes(context);
    let most = question.sequences_bytes_max.unwrap_or(u64::MAX);
    let fits = |context: u32| needed(context.into()) <= usable && footprint.bytes(context.into()) <= most;
    let served = if fits(context_tokens) {
        context_tokens
    } else {
        // The longest that fits, by halving.
        let (mut low, mut high) = (0, context_tokens);
        while high - low > 1 {
            let middle = low + (high - low) / 2;
            if fits(middle) { low = middle } else { high = middle }
        }
        low
    };
    const CONTEXT_TOKENS_MIN: u32 = 256;
    if (question.asked && served < context_tokens) || served < CONTEXT_TOKENS_MIN.min(context_tokens) {
        let least = if question.asked { context_tokens } else { CONTEXT_TOKENS_MIN.min(context_tokens) };
        return Err(LoadError::Memory {
            model: question.model.to_owned(),
            needed_bytes: needed(least.into()),
            available_bytes: usable,
        });
    }
    let workspace_bytes = workspace(served.into());
    let sequences_bytes = usable.saturating_sub(weights_bytes + workspace_bytes).min(most);
    let reason = format!(
        "memory: {} MiB usable of {} − {} of weights − {} for a pass = {} MiB for sequences; one of {served} tokens takes {} MiB",
        mib(usable),
        mib(device_bytes),
        mib(weights_bytes),
        mib(workspace_bytes),
        mib(sequences_bytes),
        mib(footprint.bytes(served.into())),
    );
    let reason = match served < context_tokens {
        true => format!("{reason}; the model's own context of {context_tokens} tokens does not fit"),
        false => reason,
    };
    Ok(Plan { context_tokens: served, sequences_bytes, workspace_bytes, reason })
}

/// Bytes that a chunk may take beside caches.
pub const CHUNK_BYTES_MAX: u64 = 1 << 30;

fn mib(bytes: u64) -> u64 {
    bytes.div_ceil(1 << 20)
}

/// Tells what memory is free at this moment, where the device says so.
#[derive(Clone, Copy, Debug)]
pub struct FreeMemory {
    /// The device.
    pub kind: DeviceKind,
    /// What a pass takes, which has to stay free.
    pub workspace_bytes: u64,
}

impl FreeMemory {
    /// What sequences may hold together now: `limit`, or less while other programs hold memory. `held` is what they hold.
    pub fn limit(&self, limit: u64, held: u64) -> u64 {
        let free = match self.kind {
            DeviceKind::Cpu => host::available_memory_bytes(),
            DeviceKind::Cuda => ffi::device_facts().free_bytes.map(|free| free + memory::cached_bytes()),
            _ => None,
        };
        limit_now(limit, held, free, self.workspace_bytes)
    }
}

fn limit_now(limit: u64, held: u64, free: Option<u64>, workspace: u64) -> u64 {
    let Some(free) = free else { return limit };
    let usable = (free / 100 * USABLE_PERCENT).saturating_sub(workspace);
    limit.min(held.saturating_add(usable))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn sizes(scores: bool) -> Sizes {
        let config = json!({ "hidden_size": 100, "intermediate_size": 200, "num_attention_heads": 10 });
        let device = if scores { DeviceKind::Cpu } else { DeviceKind::Cuda };
        Sizes::read(&config, 1000, device)
    }

    fn question<'a>(footprint: &'a Footprint, sizes: &'a Sizes, device_bytes: u64) -> Question<'a> {
        Question {
            model: "m",
            device_bytes: Some(device_bytes),
            weights_bytes: 1 << 20,
            footprint,
            sizes,
            parallel_max: 2,
            chunk_tokens: 64,
            context_tokens: 10_000,
            asked: false,
            sequences_bytes_max: None,
        }
    }

    #[test]
    fn a_context_that_fits_is_served_whole_and_the_arithmetic_is_said() {
        let footprint = Footprint { token_bytes: 1000, ..Footprint::default() };
        let plan = plan(&question(&footprint, &sizes(false), 100 << 20)).unwrap();
        assert_eq!(plan.context_tokens, 10_000);
        assert!(plan.reason.contains("90 MiB usable of 100 − 1 of weights"), "{}", plan.reason);
    }

    #[test]
    fn a_context_that_does_not_fit_is_shortened_or_refused_with_both_numbers() {
        let footprint = Footprint { token_bytes: 1000, ..Footprint::default() };
        let sizes = sizes(false);
        let short = question(&footprint, &sizes, 8 << 20);
        let served = plan(&short).unwrap();
        assert!(served.context_tokens > 2000 && served.context_tokens < 8000, "{served:?}");
        assert!(served.reason.contains("10000 tokens does not fit"), "{}", served.reason);
        let asked = plan(&Question { asked: true, ..short.clone() }).unwrap_err();
        let LoadError::Memory { needed_bytes, available_bytes, .. } = asked else { panic!("{asked}") };
        assert!(needed_bytes > available_bytes);
        assert!(matches!(plan(&Question { device_bytes: Some(1 << 20), ..short }), Err(LoadError::Memory { .. })));
    }

    #[test]
    fn scores_shorten_chunks() {
        let sizes = sizes(true);
        assert_eq!(sizes.chunk_within(2048, 100, 1 << 30), 2048);
        let chunk = sizes.chunk_within(2048, 100_000, 1 << 30);
        assert!(chunk < 2048 && sizes.chunk_bytes(chunk.into(), 100_000) <= 1 << 30, "{chunk}");
    }

    #[test]
    fn less_is_let_in_while_others_hold_memory() {
        assert_eq!(limit_now(1000, 100, None, 0), 1000);
        assert_eq!(limit_now(1000, 100, Some(10_000), 0), 1000);
        assert_eq!(limit_now(1000, 100, Some(500), 50), 500);
        assert_eq!(limit_now(1000, 100, Some(0), 50), 100);
    }

    proptest! {
        #[test]
        fn what_is_planned_fits(token in 1u64..5000, device in 1u64 << 20..1 << 30, context in 1u32..100_000, scores: bool) {
            let footprint = Footprint { token_bytes: token, ..Footprint::default() };
            let sizes = sizes(scores);
            let question = Question { context_tokens: context, ..question(&footprint, &sizes, device) };
            if let Ok(plan) = plan(&question) {
                prop_assert!(plan.context_tokens >= 1 && plan.context_tokens <= context);
                prop_assert!(footprint.bytes(plan.context_tokens.into()) <= plan.sequences_bytes);
                prop_assert!(plan.sequences_bytes + plan.workspace_bytes + question.weights_bytes <= device);
            }
        }
    }
}
