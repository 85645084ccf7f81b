use mesh_core::chat::{FunctionCall, ToolCall};
use proptest::{collection::vec, prelude::*};
use serde_json::json;

use super::*;
use crate::{
    policy::{Asked, Policy, choose},
    samples,
};

const fn node(index: u8) -> NodeId {
    NodeId([index; 32])
}

fn message(role: &str, content: &str) -> Message {
    Message { role: role.to_owned(), content: Some(content.to_owned()), ..Message::default() }
}

fn chat(messages: &[Message]) -> Subject {
    Subject::Chat(Chat { messages: messages.to_vec(), ..Chat::default() })
}

proptest! {
    #[test]
    fn a_longer_text_has_the_keys_of_its_beginning(text in ".{0,2000}", more in ".{0,4000}") {
        let (short, long) = (keys(&Subject::Text(text.clone())), keys(&Subject::Text(text.clone() + &more)));
        // All but the last of the shorter one are of lengths that do not depend on where it ends.
        prop_assert!(short.iter().rev().skip(1).all(|key| long.contains(key)));
        prop_assert!(short.is_sorted_by_key(|(_, tokens)| *tokens));
        prop_assert!(short.last().is_none_or(|(_, tokens)| u64::from(*tokens) == text.len() as u64 / BYTES_A_TOKEN));
    }

    #[test]
    fn tokens_have_the_keys_of_their_beginning(tokens in vec(any::<u32>(), 0..2000), more in vec(any::<u32>(), 0..2000)) {
        let short = keys(&Subject::Tokens(tokens.clone()));
        let long = keys(&Subject::Tokens([tokens.clone(), more].concat()));
        prop_assert!(short.iter().rev().skip(1).all(|key| long.contains(key)));
        prop_assert_eq!(short.last().map(|(_, count)| *count as usize), (tokens.len() >= TOKENS_MIN).then_some(tokens.len()));
    }

    #[test]
    fn the_next_turn_has_the_keys_of_this_one(turns in 1..150_usize, text in "[a-z ]{0,80}") {
        let messages: Vec<Message> = (0..turns + 2).map(|turn| message("user", &format!("{turn} {text}"))).collect();
        let (now, next) = (keys(&chat(&messages[..turns])), keys(&chat(&messages)));
        prop_assert!(next.contains(now.last().unwrap()));
        prop_assert!(next.len() <= FIRST_KEYS + LAST_KEYS);
    }
}

#[test]
fn other_conversations_have_other_keys() {
    let base = vec![message("system", "be brief"), message("user", "hello")];
    let last = |chat: Chat| keys(&Subject::Chat(chat)).last().unwrap().0;
    let mut called = base.clone();
    called[1].tool_calls.push(ToolCall {
        id: "1".to_owned(),
        kind: "function".to_owned(),
        function: FunctionCall { name: "f".to_owned(), arguments: json!({ "a": 1 }) },
    });
    let mut variants = vec![
        Chat { messages: base.clone(), ..Chat::default() },
        Chat { messages: base.clone(), tools: vec![json!({ "name": "f" })], ..Chat::default() },
        Chat { messages: called, ..Chat::default() },
        Chat { messages: vec![message("user", "hello")], ..Chat::default() },
        Chat { messages: vec![message("system", "be brie"), message("fuser", "hello")], ..Chat::default() },
        Chat { messages: vec![base[1].clone(), base[0].clone()], ..Chat::default() },
    ];
    variants.push(Chat { kwargs: json!({ "x": 1 }).as_object().unwrap().clone(), ..variants[0].clone() });
    let mut distinct: Vec<Key> = variants.into_iter().map(last).collect();
    let count = distinct.len();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), count);

    // Whether the reasoning is handed back or not.
    let mut with_reasoning = base.clone();
    with_reasoning[1].reasoning_content = Some("hm".to_owned());
    assert_eq!(keys(&chat(&with_reasoning)), keys(&chat(&base)));
}

#[test]
fn the_longest_prefix_counts_and_the_model_matters() {
    let mut affinity = Affinity::new(100);
    let long = "word ".repeat(400);
    let messages =
        [message("system", &long), message("user", &long), message("assistant", "yes"), message("user", "and?")];
    affinity.note(&keys(&chat(&messages[..1])), "a", node(1));
    affinity.note(&keys(&chat(&messages[..2])), "a", node(2));
    let found = affinity.find(&keys(&chat(&messages)), "a");
    assert!((490..520).contains(&found[&node(1)]) && (990..1020).contains(&found[&node(2)]), "{found:?}");
    assert!(affinity.find(&keys(&chat(&messages)), "b").is_empty());
    affinity.forget(node(2));
    assert_eq!(affinity.find(&keys(&chat(&messages)), "a").len(), 1);
    affinity.forget(node(1));
    assert!(affinity.is_empty());
}

#[test]
fn what_is_remembered_is_bounded() {
    let mut affinity = Affinity::new(10);
    let of = |index: u32| keys(&chat(&[message("user", &index.to_string())]));
    for index in 0..100 {
        affinity.note(&of(index), "a", node(1));
    }
    assert_eq!(affinity.len(), 10);
    assert!(affinity.find(&of(89), "a").is_empty());
    assert!(!affinity.find(&of(90), "a").is_empty());
    for index in 0..100 {
        affinity.note(&of(99), "a", node(index));
    }
    assert_eq!(affinity.find(&of(99), "a").into_keys().collect::<Vec<_>>(), [96, 97, 98, 99].map(node));
}

#[test]
fn a_conversation_stays_where_it_was_and_moves_when_that_dies() {
    let mut alive: Vec<u8> = (1..=5).collect();
    let mut affinity = Affinity::new(1000);
    let mut messages = vec![message("system", &"rule ".repeat(200))];
    let (mut asked_at, mut moves) = (None, 0);
    for turn in 0..12_u64 {
        messages.push(message("user", &format!("question {turn} {}", "word ".repeat(100))));
        if turn == 6 {
            let dead: NodeId = asked_at.unwrap();
            alive.retain(|index| node(*index) != dead);
            affinity.forget(dead);
        }
        let subject = chat(&messages);
        let keys = keys(&subject);
        let mut candidates: Vec<Candidate> = alive
            .iter()
            .map(|index| Candidate {
                node: node(*index),
                name: String::new(),
                offer: samples::offer("a"),
                round_trip: None,
                silent: std::time::Duration::ZERO,
                overdue: std::time::Duration::ZERO,
                connected: true,
                cached_tokens: 0,
            })
            .collect();
        affinity.mark(&mut candidates, &keys, "a");
        let asked = Asked { prompt_tokens: prompt_tokens(&subject), ..Asked::default() };
        // Another salt each time: only the prefix keeps it there.
        let chosen = choose(&candidates, &asked, &Policy::default(), turn).unwrap().node;
        moves += usize::from(asked_at.is_some_and(|before| before != chosen));
        assert!(turn == 6 || asked_at.is_none_or(|before| before == chosen), "turn {turn}");
        asked_at = Some(chosen);
        affinity.note(&keys, "a", chosen);
        messages.push(message("assistant", "answer"));
    }
    assert_eq!(moves, 1);
}
