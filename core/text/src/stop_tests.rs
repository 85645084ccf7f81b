use proptest::prelude::*;

use super::{StopFilter, StopOutput};

fn run<'a>(stops: &[&str], pieces: impl IntoIterator<Item = &'a str>) -> StopOutput {
    let mut filter = StopFilter::new(stops.iter().map(|stop| (*stop).to_owned()).collect());
    let mut whole = StopOutput::default();
    for piece in pieces {
        let output = filter.push(piece);
        assert!(whole.stopped.is_none() || output == StopOutput::default(), "nothing comes after a stop");
        whole.text.push_str(&output.text);
        whole.stopped = whole.stopped.or(output.stopped);
    }
    whole.text.push_str(&filter.finish());
    whole
}

fn outcome(text: &str, stopped: Option<&str>) -> StopOutput {
    StopOutput { text: text.into(), stopped: stopped.map(Into::into) }
}

#[test]
fn the_stop_that_is_complete_first_wins() {
    assert_eq!(run(&["\n\n", "User:"], ["Hi\nUser: x\n\n"]), outcome("Hi\n", Some("User:")));
    assert_eq!(run(&["bc", "abcd"], ["xabcd"]), outcome("xa", Some("bc")));
    assert_eq!(run(&["c", "abc"], ["xabc"]), outcome("x", Some("abc")), "of those that end together the longest");
    assert_eq!(run(&["ab"], ["aab"]), outcome("a", Some("ab")));
    assert_eq!(run(&["END"], ["the EN", "D is near"]), outcome("the ", Some("END")));
}

#[test]
fn what_is_no_stop_comes_out() {
    assert_eq!(run(&["END"], ["the EN"]), outcome("the EN", None));
    assert_eq!(run(&[""], ["x"]), outcome("x", None));
    assert_eq!(run(&[], ["x"]), outcome("x", None));
    assert_eq!(run(&["ééx"], ["aéé", "é"]), outcome("aééé", None));
}

#[test]
fn only_what_could_begin_a_stop_is_held() {
    let mut filter = StopFilter::new(vec!["<end>".into()]);
    assert_eq!(filter.push("a <"), outcome("a ", None));
    assert_eq!(filter.push("b"), outcome("<b", None));
    assert_eq!(filter.push("<en"), outcome("", None));
    assert_eq!(filter.finish(), "<en");
}

/// The definition, by trying every end.
fn specified(stops: &[String], text: &str) -> StopOutput {
    for end in (0..=text.len()).filter(|end| text.is_char_boundary(*end)) {
        let here = stops.iter().filter(|stop| !stop.is_empty() && text[..end].ends_with(stop.as_str()));
        if let Some(stop) = here.max_by_key(|stop| stop.len()) {
            return outcome(&text[..end - stop.len()], Some(stop));
        }
    }
    outcome(text, None)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 3000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_outcome_does_not_depend_on_the_cuts(
        stops in prop::collection::vec("[abé]{0,4}", 0..4),
        pieces in prop::collection::vec("[abéc]{0,5}", 0..8),
    ) {
        let borrowed: Vec<&str> = stops.iter().map(String::as_str).collect();
        let got = run(&borrowed, pieces.iter().map(String::as_str));
        prop_assert_eq!(got, specified(&stops, &pieces.concat()));
    }
}
