//! Names that resemble one that is not there.

/// How alike two names have to be; 1 is the same.
const ENOUGH: f64 = 0.8;
/// Most names that are offered.
const OFFERED_MAX: usize = 3;

/// The names that resemble `name`, best first.
pub(crate) fn near<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Vec<String> {
    let name = name.to_lowercase();
    let score = |other: &'a str| (strsim::jaro_winkler(&name, &other.to_lowercase()), other);
    let mut scored: Vec<(f64, &str)> = known.into_iter().map(score).filter(|(score, _)| *score >= ENOUGH).collect();
    scored.sort_by(|a, b| b.0.total_cmp(&a.0).then(a.1.cmp(b.1)));
    scored.dedup_by(|a, b| a.1 == b.1);
    scored.into_iter().take(OFFERED_MAX).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::near;

    #[test]
    fn the_best_comes_first_and_strangers_not_at_all() {
        let known = ["Qwen3-4B-MLX", "Qwen3-0.6B-MLX", "GLM-4-9B-0414-MLX"];
        assert_eq!(near("qwen3-4b-mxl", known)[0], "Qwen3-4B-MLX");
        assert!(near("zzzz", known).is_empty());
    }

    proptest! {
        #[test]
        fn a_slip_of_a_finger_is_found(at in 0usize..11, known in "[a-z]{12}") {
            let mut slipped: Vec<char> = known.chars().collect();
            slipped.swap(at, at + 1);
            let slipped: String = slipped.into_iter().collect();
            prop_assert_eq!(near(&slipped, [known.as_str()]), [known.clone()]);
        }

        #[test]
        fn never_more_than_a_few(name in "\\PC{0,20}", known in proptest::collection::vec("[a-c]{1,4}", 0..20)) {
            prop_assert!(near(&name, known.iter().map(String::as_str)).len() <= super::OFFERED_MAX);
        }
    }
}
