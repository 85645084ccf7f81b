//! How memory is shared between requests that are computed at the same time and prompts that are remembered.

use mesh_core::{ModelProfile, Reason};

use crate::judge::OVERHEAD_BYTES;

/// Most slots that are chosen unasked. More are seldom busy at once on one machine, and each waits for the others.
const SLOTS_MAX: u32 = 4;
/// Least and most that is worth giving to remembered prompts, in MiB.
const CACHE_MIB: (u64, u64) = (64, 8192);
/// For remembered prompts where what they take cannot be told, in MiB.
const CACHE_UNSIZED_MIB: u32 = 512;
const MIB: u64 = 1 << 20;

/// Who gets how much.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Share {
    /// Requests computed at the same time, each with a whole context.
    pub slots: u32,
    /// For prompts that no slot holds any more, in MiB; 0 forgets them.
    pub cache_mib: u32,
    /// What decided it.
    pub reasons: Vec<Reason>,
}

impl Share {
    /// Slots and a cache for contexts of `context_tokens`. `available_bytes` is what everything may take together; `slots`
    /// and `cache_mib` are those asked for.
    ///
    /// The first slot may have all there is. Further ones share half of what it leaves, and remembered prompts have half of
    /// the rest, up to as much as all slots hold.
    pub fn choose(
        profile: &ModelProfile,
        available_bytes: Option<u64>,
        context_tokens: u32,
        slots: Option<u32>,
        cache_mib: Option<u32>,
    ) -> Self {
        let per_slot = profile.kv_bytes_per_token().map(|bytes| bytes.saturating_mul(context_tokens.into()));
        let (Some(per_slot), Some(available)) = (per_slot.filter(|bytes| *bytes > 0), available_bytes) else {
            let text = match slots {
                Some(slots) => format!("slots: {slots}, as asked for"),
                None => {
                    "slots: 1, as what a slot takes, or what there is, cannot be told; --max-parallel sets more".into()
                }
            };
            let cache_mib = cache_mib.unwrap_or(CACHE_UNSIZED_MIB);
            return Self { slots: slots.unwrap_or(1), cache_mib, reasons: vec![Reason::new(text)] };
        };
        let room = available.saturating_sub(profile.weight_bytes.value).saturating_sub(OVERHEAD_BYTES);
        let spare = room.saturating_sub(per_slot);
        let further = u32::try_from(spare / 2 / per_slot).unwrap_or(u32::MAX).min(SLOTS_MAX - 1);
        let (slots, text) = match slots {
            Some(slots) => (slots, format!("slots: {slots}, as asked for")),
            None => {
                let text = format!(
                    "slots: 1 + {further} of at most {}, each with {per_slot} bytes for its context, out of half of the \
                     {spare} bytes that one leaves; --max-parallel sets another number",
                    SLOTS_MAX - 1
                );
                (1 + further, text)
            }
        };
        let held = per_slot.saturating_mul(slots.into());
        let cache_mib = cache_mib.unwrap_or_else(|| {
            let half = room.saturating_sub(held) / 2 / MIB;
            u32::try_from((held / MIB).clamp(CACHE_MIB.0, CACHE_MIB.1).min(half)).unwrap_or(u32::MAX)
        });
        let remembered = format!("remembered prompts: up to {cache_mib} MiB");
        Self { slots, cache_mib, reasons: vec![Reason::new(text), Reason::new(remembered)] }
    }

    /// What remembered prompts may take, in bytes.
    pub fn cache_bytes(&self) -> u64 {
        u64::from(self.cache_mib) * MIB
    }
}

#[cfg(test)]
mod tests {
    use mesh_core::{Fact, Source};
    use proptest::prelude::*;

    use super::*;

    const TOKEN_BYTES: u64 = 5120;

    fn profile(weights: u64) -> ModelProfile {
        fn fact<T>(value: T) -> Option<Fact<T>> {
            Some(Fact::new(value, Source::file("m.gguf")))
        }
        ModelProfile {
            layers: fact(10),
            kv_heads: fact(2),
            head_dim: fact(64),
            weight_bytes: Fact::new(weights, Source::file("m.gguf")),
            ..crate::fixture::profile("m", "/m.gguf".into(), "llama")
        }
    }

    fn chosen(contexts: u64) -> Share {
        let available = 1000 + OVERHEAD_BYTES + contexts * 4096 * TOKEN_BYTES;
        Share::choose(&profile(1000), Some(available), 4096, None, None)
    }

    #[test]
    fn slots_come_with_memory() {
        let slots: Vec<_> = [0, 1, 2, 3, 4, 5, 6, 7, 100].map(|contexts| chosen(contexts).slots).into();
        assert_eq!(slots, [1, 1, 1, 2, 2, 3, 3, 4, 4]);
        let share = chosen(100);
        assert_eq!(share.cache_mib, 80, "as much as four slots of 4096 tokens hold");
        let text = share.reasons.iter().map(Reason::to_string).collect::<Vec<_>>().join("\n");
        assert!(text.contains("1 + 3 of at most 3") && text.contains("80 MiB"), "{text}");
        assert_eq!(chosen(1).cache_mib, 0);
    }

    #[test]
    fn what_is_asked_for_is_given() {
        let share = Share::choose(&profile(1), Some(0), 4096, Some(7), Some(3));
        assert_eq!((share.slots, share.cache_mib), (7, 3));
        let blind = Share::choose(&profile(1), None, 4096, None, None);
        assert_eq!((blind.slots, blind.cache_mib), (1, CACHE_UNSIZED_MIB));
    }

    proptest! {
        #[test]
        fn what_is_chosen_fits_beside_the_weights(
            weights in 0u64..1 << 40, available in 0u64..1 << 42, context in 1u32..1_000_000,
        ) {
            let share = Share::choose(&profile(weights), Some(available), context, None, None);
            prop_assert!((1..=SLOTS_MAX).contains(&share.slots));
            let slots = u64::from(share.slots) * u64::from(context) * TOKEN_BYTES;
            let needed = weights + OVERHEAD_BYTES + slots + share.cache_bytes();
            prop_assert!(needed <= available || share.slots == 1 && share.cache_mib == 0);
        }
    }
}
