//! Quantizations among GGUF files: what their names say, and which of them a machine takes.

/// What a GGUF's stem says of its quantization.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Quant {
    /// Such as `Q4_K_M`, as it is spelled.
    pub name: String,
    /// The rest of the stem, which quantizations of one model have in common.
    pub rest: String,
}

/// Reads a stem, without its directory: that is often named after the quantization, too.
pub(crate) fn read(stem: &str) -> Option<Quant> {
    let base = stem.rsplit('/').next().unwrap_or(stem);
    let wordy = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut found = None;
    for (start, _) in base.char_indices() {
        let before = base[..start].chars().next_back();
        if before.is_some_and(|c| c.is_ascii_alphanumeric()) {
            continue;
        }
        let end = base[start..].find(|c| !wordy(c)).map_or(base.len(), |length| start + length);
        if is_quant(&base[start..end]) {
            found = Some((start, end));
        }
    }
    let (start, end) = found?;
    let lower = |text: &str| text.to_lowercase();
    let before = lower(&base[..start]);
    // `UD-Q4_K_XL` is a quantization of its own.
    let before = before.strip_suffix("ud-").unwrap_or(&before);
    let separators = ['-', '.', '_'];
    let rest = format!("{}/{}", before.trim_end_matches(separators), lower(&base[end..]).trim_matches(separators));
    Some(Quant { name: base[start..end].to_owned(), rest })
}

fn is_quant(word: &str) -> bool {
    let word = word.to_lowercase();
    if ["f16", "f32", "bf16", "fp16", "fp32", "mxfp4", "mxfp4_moe"].contains(&word.as_str()) {
        return true;
    }
    let mut parts = word.split('_');
    let first = parts.next().unwrap_or_default();
    let digits = first.strip_prefix("iq").or_else(|| first.strip_prefix("tq")).or_else(|| first.strip_prefix('q'));
    let number = digits.is_some_and(|digits| digits.len() == 1 && digits.as_bytes()[0].is_ascii_digit());
    number && parts.all(|part| (1..=3).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_alphanumeric()))
}

/// What a machine has for a model, in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Room {
    /// Memory for weights and context.
    pub memory_bytes: u64,
    /// How much of it the context takes.
    pub context_bytes: u64,
    /// How long a context that is, in tokens.
    pub context_tokens: u64,
}

impl Room {
    /// All that could be wished for: tells whether room would decide.
    pub(crate) const BOUNDLESS: Self = Self { memory_bytes: u64::MAX, context_bytes: 0, context_tokens: 0 };

    /// Whether weights of so many bytes fit beside the context.
    pub fn fits(&self, weights: u64) -> bool {
        weights.checked_add(self.context_bytes).is_some_and(|needed| needed <= self.memory_bytes)
    }
}

/// The largest that fits, by its place in `sizes`; of equal ones the first.
pub(crate) fn largest_fitting(sizes: &[u64], room: Room) -> Option<usize> {
    let fitting = sizes.iter().enumerate().filter(|(_, bytes)| room.fits(**bytes));
    fitting.max_by_key(|(at, bytes)| (**bytes, std::cmp::Reverse(*at))).map(|(at, _)| at)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_of_quantizations_are_read() {
        for (stem, name, rest) in [
            ("Qwen3-4B-Q4_K_M", "Q4_K_M", "qwen3-4b/"),
            ("Qwen3-4B-UD-Q4_K_XL", "Q4_K_XL", "qwen3-4b/"),
            ("Q8_0/Qwen3-4B-Q8_0", "Q8_0", "qwen3-4b/"),
            ("qwen3-4b.IQ2_XXS", "IQ2_XXS", "qwen3-4b/"),
            ("qwen3-4b_q5_k_s", "q5_k_s", "qwen3-4b/"),
            ("x-BF16", "BF16", "x/"),
            ("x-q4_0-it", "q4_0", "x/it"),
            ("gpt-oss-20b-MXFP4", "MXFP4", "gpt-oss-20b/"),
        ] {
            assert_eq!(read(stem), Some(Quant { name: name.into(), rest: rest.into() }), "{stem}");
        }
        for stem in ["Qwen3-4B", "model", "q", "x-Q44", "x-Q4_imatrix", ""] {
            assert_eq!(read(stem), None, "{stem}");
        }
    }

    proptest! {
        #[test]
        fn the_largest_that_fits_is_chosen(sizes in proptest::collection::vec(0u64..100, 0..8), memory in 0u64..120, context in 0u64..40) {
            let room = Room { memory_bytes: memory, context_bytes: context, context_tokens: 0 };
            match largest_fitting(&sizes, room) {
                Some(at) => {
                    prop_assert!(sizes[at] + context <= memory);
                    prop_assert!(sizes.iter().all(|bytes| *bytes <= sizes[at] || bytes + context > memory));
                }
                None => prop_assert!(sizes.iter().all(|bytes| bytes + context > memory)),
            }
        }

        #[test]
        fn any_stem_is_read_or_not(stem in "\\PC{0,30}") {
            if let Some(quant) = read(&stem) {
                prop_assert!(stem.contains(&quant.name));
            }
        }
    }
}
