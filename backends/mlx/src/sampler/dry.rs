//! "Don't repeat yourself": what tokens lose because they would go on with a repetition. On the host, which has the text.
//!
//! As llama.cpp does it: the end of the text is looked for earlier on, as long a piece of it as there is; whatever token
//! came next there would make the repetition one longer. A piece never reaches across a breaker.

use std::collections::{BTreeMap, HashSet};

use mesh_core::Dry;

/// How a row is kept from repeating itself.
#[derive(Clone, Debug)]
pub struct Repetition {
    multiplier: f32,
    base: f32,
    allowed_length: usize,
    last_n: usize,
    breakers: HashSet<u32>,
}

impl Repetition {
    /// `None` where nothing would ever be lost.
    pub fn new(dry: &Dry) -> Option<Self> {
        let last_n = dry.last_n.map_or(usize::MAX, |last_n| last_n as usize);
        (dry.multiplier > 0.0 && dry.base >= 1.0 && last_n > 0).then(|| Self {
            multiplier: dry.multiplier,
            base: dry.base,
            allowed_length: dry.allowed_length as usize,
            last_n,
            breakers: dry.breaker_ids.iter().copied().collect(),
        })
    }

    /// What tokens lose of their logits after `text`, each once.
    pub fn losses(&self, text: &[u32]) -> Vec<(u32, f32)> {
        let text = &text[text.len().saturating_sub(self.last_n)..];
        let since_breaker = text.iter().rev().take_while(|id| !self.breakers.contains(id)).count();
        if text.len() <= self.allowed_length || since_breaker < self.allowed_length {
            return Vec::new();
        }
        let mut longest = BTreeMap::new();
        for (back, length) in suffix_matches(text).into_iter().enumerate().skip(1) {
            let (length, next) = (length.min(since_breaker), text[text.len() - back]);
            if length >= self.allowed_length && !self.breakers.contains(&next) {
                let known = longest.entry(next).or_insert(length);
                *known = length.max(*known);
            }
        }
        longest.into_iter().map(|(id, length)| (id, self.loss(length))).collect()
    }

    fn loss(&self, length: usize) -> f32 {
        let beyond = (length - self.allowed_length).min(i32::MAX as usize) as i32;
        let loss = f64::from(self.multiplier) * f64::from(self.base).powi(beyond);
        // Twice as much would still be finite: infinities that meet are not numbers.
        loss.min(f64::from(f32::MAX) / 2.0) as f32
    }
}

/// For each number of tokens that the text is gone back by: how many of its last ones stand there as well, at the end of
/// what is left. In linear time: the Z function of the text read backwards.
fn suffix_matches(text: &[u32]) -> Vec<usize> {
    let at = |back: usize| text[text.len() - 1 - back];
    let mut matches = vec![0; text.len()];
    // The match that reaches furthest: where it begins and ends.
    let (mut from, mut to) = (0, 0);
    for back in 1..text.len() {
        let mut length = if back < to { matches[back - from].min(to - back) } else { 0 };
        while back + length < text.len() && at(length) == at(back + length) {
            length += 1;
        }
        if back + length > to {
            (from, to) = (back, back + length);
        }
        matches[back] = length;
    }
    matches
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn dry(allowed_length: u32, breaker_ids: &[u32]) -> Dry {
        Dry {
            multiplier: 0.5,
            base: 2.0,
            allowed_length,
            last_n: None,
            sequence_breakers: Vec::new(),
            breaker_ids: breaker_ids.to_vec(),
        }
    }

    fn losses(dry: &Dry, text: &[u32]) -> Vec<(u32, f32)> {
        Repetition::new(dry).map_or(Vec::new(), |repetition| repetition.losses(text))
    }

    #[test]
    fn what_would_go_on_with_a_repetition_loses() {
        // 1 2 3 came before, and 4 after it; 3 alone came before 5 as well.
        let text = [1, 2, 3, 4, 3, 5, 1, 2, 3];
        assert_eq!(losses(&dry(2, &[]), &text), [(4, 1.0)]);
        assert_eq!(losses(&dry(1, &[]), &text), [(4, 2.0), (5, 0.5)]);
        assert_eq!(losses(&dry(3, &[]), &text), [(4, 0.5)]);
        assert_eq!(losses(&dry(4, &[]), &text), []);
        // The longest counts, not the last.
        assert_eq!(losses(&dry(1, &[]), &[1, 2, 9, 7, 2, 9, 1, 2]), [(9, 1.0)]);
    }

    #[test]
    fn nothing_is_repeated_across_a_breaker_and_breakers_lose_nothing() {
        let text = [1, 2, 3, 4, 1, 2, 3];
        assert_eq!(losses(&dry(1, &[1]), &text), [(4, 1.0)], "two tokens since the breaker");
        assert_eq!(losses(&dry(3, &[1]), &text), []);
        assert_eq!(losses(&dry(1, &[3]), &text), [], "it ends with one");
        assert_eq!(losses(&dry(1, &[4]), &text), [], "the next is one");
    }

    #[test]
    fn only_so_many_tokens_are_looked_at() {
        let text = [1, 2, 3, 4, 1, 2, 3];
        let short = |last_n| Dry { last_n: Some(last_n), ..dry(1, &[]) };
        assert_eq!(losses(&short(7), &text), [(4, 2.0)]);
        assert_eq!(losses(&short(5), &text), [(4, 0.5)]);
        assert_eq!(losses(&short(4), &text), []);
        assert_eq!(losses(&short(0), &text), []);
    }

    #[test]
    fn losses_stay_finite() {
        let long = Dry { base: 10.0, ..dry(1, &[]) };
        let [(5, loss)] = losses(&long, &[5; 500])[..] else { panic!("one token") };
        assert!(loss.is_finite() && loss > 1e38);
    }

    proptest! {
        /// The quick way finds what looking everywhere finds.
        #[test]
        fn the_longest_match_is_found(
            text in prop::collection::vec(0u32..3, 0..40), allowed_length in 0u32..4, last_n in prop::option::of(0u32..50),
        ) {
            // Two breaks.
            let dry = Dry { last_n, ..dry(allowed_length, &[2]) };
            let found: BTreeMap<u32, f32> = losses(&dry, &text).into_iter().collect();
            let seen = &text[text.len().saturating_sub(last_n.map_or(usize::MAX, |last_n| last_n as usize))..];
            let mut expected = BTreeMap::new();
            for end in 1..seen.len() {
                let length = (0..=end)
                    .take_while(|length| {
                        let own = &seen[seen.len() - length..];
                        !own.contains(&2) && seen[end - length..end] == *own
                    })
                    .last()
                    .unwrap_or(0) as u32;
                if length >= allowed_length && seen[end] != 2 && seen.len() > allowed_length as usize {
                    let loss = 0.5 * 2f32.powi((length - allowed_length) as i32);
                    let most = expected.entry(seen[end]).or_insert(loss);
                    *most = loss.max(*most);
                }
            }
            prop_assert_eq!(found, expected);
        }
    }
}
