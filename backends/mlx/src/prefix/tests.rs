//! The store against a list of sequences.

use std::collections::{BTreeMap, BTreeSet};

use proptest::{collection::vec, prelude::*};

use super::{
    Evicted, Hit, Inserted, Limits, PrefixStore,
    fakes::{MARK_BYTES, Mark, Run, TOKEN_BYTES},
    lru::PINS_MAX,
    tree::{NODE_BYTES, ROOT},
};

type Store = PrefixStore<Run, Mark>;

fn store(needs_points: bool) -> Store {
    Store::new(needs_points, Limits::of_bytes(1 << 20))
}

pub(super) fn put(store: &mut Store, tokens: &[u32]) -> Inserted {
    let held = store.held(tokens);
    store.insert(tokens, held, Run(tokens[held..].to_vec()), Some(Mark(tokens.to_vec()))).unwrap()
}

/// What a hit has, put together; fails if it is anything but the beginning of the prompt.
fn prove(hit: &Hit<'_, Run, Mark>, prompt: &[u32], needs_points: bool) {
    let whole: Vec<u32> = hit.segments.iter().flat_map(|(run, used)| &run.0[..*used]).copied().collect();
    assert_eq!(whole, prompt[..hit.tokens]);
    let (_, before_last) = hit.segments.split_last().map_or((None, &[][..]), |(last, rest)| (Some(last), rest));
    assert!(before_last.iter().all(|(run, used)| run.0.len() == *used));
    let point = hit.point.map(|point| &point.0[..]);
    assert_eq!(point, Some(&prompt[..hit.tokens]).filter(|_| needs_points && hit.tokens > 0));
}

pub(super) fn find(store: &mut Store, prompt: &[u32]) -> usize {
    let known = store.known(prompt);
    let needs_points = store.tree.needs_points;
    let hit = store.lookup(prompt);
    prove(&hit, prompt, needs_points);
    assert_eq!(hit.tokens, known);
    known
}

/// One token more, which a lookup wants to be there.
pub(super) fn asked(tokens: &[u32]) -> Vec<u32> {
    [tokens, &[u32::MAX]].concat()
}

#[test]
fn an_empty_store_knows_nothing_and_takes_anything() {
    for needs_points in [false, true] {
        let mut store = store(needs_points);
        assert_eq!(find(&mut store, &[]), 0);
        assert_eq!(find(&mut store, &[1, 2]), 0);
        assert_eq!(put(&mut store, &[]), Inserted::Held);
        assert!(!store.pin(&[]).unwrap() && !store.pin(&[1]).unwrap() && !store.drop_point(&[]));
        assert_eq!(store.evict(0), Evicted::default());
        assert_eq!((store.bytes(), store.nodes()), (0, 0));
    }
}

#[test]
fn a_prompt_is_never_known_to_its_last_token() {
    let mut store = store(false);
    put(&mut store, &[1, 2, 3]);
    assert_eq!(find(&mut store, &[1, 2, 3]), 2);
    assert_eq!(find(&mut store, &[1, 2, 3, 4]), 3);
    assert_eq!(find(&mut store, &[1]), 0);
}

#[test]
fn segments_are_found_in_the_middle_of_an_edge_but_points_only_at_its_end() {
    for (needs_points, expected) in [(false, 3), (true, 0)] {
        let mut store = store(needs_points);
        put(&mut store, &[1, 2, 3, 4]);
        assert_eq!(find(&mut store, &[1, 2, 3, 9, 9]), expected);
        assert_eq!(find(&mut store, &[1, 2, 3, 4, 9]), 4);
    }
}

#[test]
fn a_message_boundary_survives_that_the_rest_is_rewritten() {
    let mut store = store(true);
    put(&mut store, &[1, 2, 3]);
    put(&mut store, &[1, 2, 3, 4, 5, 6]);
    // The chunk's end is not worth a snapshot once the message's end has one.
    assert_eq!(
        store.insert(&[1, 2, 3, 4, 5, 6, 7], 6, Run(vec![7]), Some(Mark(vec![1, 2, 3, 4, 5, 6, 7]))),
        Ok(Inserted::Stored(1))
    );
    assert!(store.drop_point(&[1, 2, 3, 4, 5, 6]) && !store.drop_point(&[1, 2, 3, 4, 5, 6]));
    assert!(!store.drop_point(&[1, 2]) && !store.drop_point(&[9]) && !store.drop_point(&[1, 2, 3, 9]));
    assert_eq!(find(&mut store, &[1, 2, 3, 5, 6, 7]), 3);
    assert_eq!(find(&mut store, &[1, 2, 3, 4, 5, 6, 9, 9]), 3);
    assert_eq!(find(&mut store, &asked(&[1, 2, 3, 4, 5, 6, 7])), 7);
    store.tree.check();
}

#[test]
fn an_insertion_says_what_it_could_not_do() {
    let mut store = store(false);
    put(&mut store, &[1, 2]);
    assert_eq!(store.insert(&[1, 2, 3, 4], 3, Run(vec![4]), None), Ok(Inserted::Missing(2)));
    assert_eq!(store.insert(&[1, 2, 3], 2, Run(vec![3, 4]), None), Ok(Inserted::Mismatched));
    assert_eq!(store.insert(&[1, 2, 3], 4, Run(vec![]), None), Ok(Inserted::Mismatched));
    assert_eq!(store.insert(&[1, 2], 1, Run(vec![2]), None), Ok(Inserted::Held));
    assert_eq!(store.insert(&[1, 2, 3], 1, Run(vec![2, 3]), None), Ok(Inserted::Stored(1)));
    assert_eq!(store.insert(&[1, 9], 0, Run(vec![1, 9]), None), Ok(Inserted::Stored(1)));
    assert_eq!(find(&mut store, &[1, 9, 9]), 2);
    store.tree.check();
}

#[test]
fn what_was_not_used_for_longest_goes_first() {
    let mut store = store(false);
    for first in 1..=3 {
        put(&mut store, &[first, 7, 7]);
    }
    find(&mut store, &[1, 7, 7, 0]);
    let each = store.bytes() / 3;
    assert_eq!(store.evict(2 * each), Evicted { segments: 1, points: 0, bytes: each });
    assert_eq!([1, 2, 3].map(|first| store.known(&[first, 7, 7, 0])), [3, 0, 3]);
    store.evict(each);
    assert_eq!([1, 2, 3].map(|first| store.known(&[first, 7, 7, 0])), [3, 0, 0]);
}

#[test]
fn asking_what_is_known_is_no_use_of_it() {
    let mut store = store(false);
    put(&mut store, &[1, 1]);
    put(&mut store, &[2, 2]);
    assert_eq!((store.known(&[1, 1, 0]), store.held(&[1, 1])), (2, 2));
    store.evict(store.bytes() - 1);
    assert_eq!((store.known(&[1, 1, 0]), store.held(&[1, 1])), (0, 0));
}

#[test]
fn a_point_within_the_tree_goes_alone_when_it_is_oldest() {
    let mut store = store(true);
    put(&mut store, &[1]);
    put(&mut store, &[1, 2]);
    put(&mut store, &[1, 2, 3]);
    assert_eq!(store.evict(store.bytes() - 1), Evicted { segments: 0, points: 1, bytes: MARK_BYTES });
    assert_eq!(find(&mut store, &[1, 9]), 0);
    // Resuming makes a point young: the leaf is older than it now.
    assert_eq!(find(&mut store, &[1, 2, 9]), 2);
    assert_eq!(store.evict(store.bytes() - 1).segments, 1);
    assert_eq!(find(&mut store, &[1, 2, 3, 9]), 2);
    store.tree.check();
}

#[test]
fn pinned_paths_go_last_with_their_points() {
    let mut store = store(true);
    put(&mut store, &[1, 2]);
    put(&mut store, &[1, 2, 3]);
    assert_eq!(store.pin(&[1, 2]), Ok(true));
    for first in 5..9 {
        put(&mut store, &[first]);
    }
    let pinned = 2 * TOKEN_BYTES + 2 * 4 + MARK_BYTES + NODE_BYTES;
    assert_eq!(store.tree.pinned_bytes(), pinned);
    store.evict(pinned + TOKEN_BYTES + 4 + MARK_BYTES + NODE_BYTES);
    assert!((5..8).all(|first| store.known(&[first, 0]) == 0));
    assert_eq!((find(&mut store, &[1, 2, 3, 0]), find(&mut store, &[8, 0])), (2, 1));
    store.evict(pinned);
    assert_eq!((find(&mut store, &[1, 2, 3, 0]), find(&mut store, &[8, 0])), (2, 0));
    assert_eq!(store.evict(0).segments, 1);
    assert_eq!((store.bytes(), store.tree.pinned_bytes()), (0, 0));
}

#[test]
fn a_node_that_becomes_a_leaf_goes_with_its_point() {
    let mut store = store(true);
    put(&mut store, &[1]);
    put(&mut store, &[1, 2]);
    assert_eq!(store.pin(&[1]), Ok(true));
    let bytes = store.bytes();
    assert_eq!(store.evict(0), Evicted { segments: 2, points: 0, bytes });
}

#[test]
fn pins_hold_half_of_the_budget_and_the_oldest_give_way() {
    let each = 2 * (TOKEN_BYTES + 4) + NODE_BYTES;
    let mut store = Store::new(false, Limits::of_bytes(4 * each));
    for first in 1..=3 {
        put(&mut store, &[first, 0]);
        assert_eq!(store.pin(&[first, 0]), Ok(true));
    }
    store.evict(2 * each);
    assert_eq!([1, 2, 3].map(|first| store.known(&[first, 0, 0])), [0, 2, 2]);
    // Pinned again is pinned last.
    assert_eq!(store.pin(&[2, 0]), Ok(true));
    put(&mut store, &[4, 0]);
    assert_eq!(store.pin(&[4, 0]), Ok(true));
    store.evict(2 * each + 1);
    assert_eq!([2, 3, 4].map(|first| store.known(&[first, 0, 0])), [2, 0, 2]);
    put(&mut store, &[6; 20]);
    assert_eq!(store.pin(&[6; 20]), Ok(false));
    store.tree.check();
}

#[test]
fn there_are_only_so_many_pins() {
    let mut store = store(false);
    for first in 0..2 * PINS_MAX as u32 {
        put(&mut store, &[first]);
        assert_eq!(store.pin(&[first]), Ok(true));
        store.tree.check();
    }
}

#[test]
fn there_are_only_so_many_nodes() {
    let mut store = Store::new(false, Limits { bytes_max: 1 << 20, nodes_max: 8 });
    for first in 0..50 {
        put(&mut store, &[first, 1]);
        put(&mut store, &[first, 2]);
        assert_eq!((store.known(&[first, 1, 0]), store.known(&[first, 2, 0])), (2, 2));
        store.tree.check();
    }
    // A single path as long as the tree is large: its end gives way, and that is said.
    let mut store = Store::new(false, Limits { bytes_max: 1 << 20, nodes_max: 8 });
    let mut refused = 0;
    for length in 1..50 {
        let tokens: Vec<u32> = (0..length).collect();
        let held = store.held(&tokens);
        match store.insert(&tokens, held, Run(tokens[held..].to_vec()), None).unwrap() {
            Inserted::Missing(_) => refused += 1,
            other => assert_ne!(other, Inserted::Mismatched),
        }
        store.tree.check();
    }
    assert!(refused > 0);
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Vec<u32>),
    Lookup(Vec<u32>),
    Drop(Vec<u32>),
    Pin(Vec<u32>),
    Evict(u64),
}

fn op(evictions: bool) -> impl Strategy<Value = Op> {
    // Few different tokens, so that sequences share beginnings.
    let tokens = || vec(0..3_u32, 0..10);
    prop_oneof![
        6 => tokens().prop_map(Op::Insert),
        4 => tokens().prop_map(Op::Lookup),
        1 => tokens().prop_map(Op::Drop),
        1 => tokens().prop_map(Op::Pin),
        u32::from(evictions) * 2 => (0..12_000_u64).prop_map(Op::Evict),
    ]
}

/// Which sequences were inserted, and after which there are points.
#[derive(Default)]
struct Naive {
    sequences: Vec<Vec<u32>>,
    points: BTreeSet<Vec<u32>>,
}

impl Naive {
    fn known(&self, prompt: &[u32], needs_points: bool) -> usize {
        let prompt = &prompt[..prompt.len().saturating_sub(1)];
        if needs_points {
            return (1..=prompt.len()).rev().find(|length| self.points.contains(&prompt[..*length])).unwrap_or(0);
        }
        let common = |sequence: &Vec<u32>| sequence.iter().zip(prompt).take_while(|(a, b)| a == b).count();
        self.sequences.iter().map(common).max().unwrap_or(0)
    }
}

/// What a store could evict alone: the tokens up to it and whether it is a point within the tree, with whether it is
/// pinned and when it was last used.
type Parts = BTreeMap<(Vec<u32>, bool), (bool, u64)>;

fn nodes(store: &Store, leaves_only: bool) -> Parts {
    let nodes = store.tree.iter().filter(|(_, node)| !leaves_only || node.children.is_empty());
    nodes.map(|(id, node)| ((store.tree.tokens_to(id), false), (node.pins > 0, node.used))).collect()
}

fn inner_points(store: &Store) -> Parts {
    let nodes = store.tree.iter().filter(|(_, node)| node.point.is_some() && !node.children.is_empty());
    nodes.map(|(id, node)| ((store.tree.tokens_to(id), true), (store.tree.is_pin(id), node.point_used))).collect()
}

/// Evicts, and verifies that nothing went before something older, and nothing that could have stayed.
fn evict(store: &mut Store, bytes_max: u64) {
    store.tree.limit_pins();
    let (before, points, bytes) = (nodes(store, false), inner_points(store), store.bytes());
    let evicted = store.evict(bytes_max);
    let (after, points_after) = (nodes(store, false), inner_points(store));
    assert!(store.bytes() <= bytes_max);
    assert_eq!(evicted.bytes, bytes - store.bytes());
    assert_eq!(evicted.segments, before.len() - after.len());
    // A point that is gone from a node which is still there went alone, unless it is no inner one any more.
    let alone = |(tokens, _): &(Vec<u32>, bool)| {
        let path = store.tree.walk(ROOT, tokens);
        let reached: usize = path.iter().map(|(_, used)| used).sum();
        reached == tokens.len() && store.tree.node(path[path.len() - 1].0).point.is_none()
    };
    let points_gone = points.iter().filter(|(key, _)| alone(key));
    let gone = before.iter().filter(|(key, _)| !after.contains_key(*key)).chain(points_gone);
    let gone: Vec<_> = gone.map(|(_, key)| *key).collect();
    let left = nodes(store, true).into_values().chain(points_after.into_values()).min();
    if let (Some(gone), Some(left)) = (gone.iter().max(), left) {
        assert!(*gone <= left, "{gone:?} went before {left:?}");
    }
    let most = before.keys().map(|(tokens, _)| NODE_BYTES + tokens.len() as u64 * (TOKEN_BYTES + 4) + MARK_BYTES).max();
    assert!(gone.is_empty() || store.bytes() + most.unwrap_or(0) > bytes_max);
}

fn run(ops: Vec<Op>, needs_points: bool, forgets: bool) {
    let mut store = Store::new(needs_points, Limits::of_bytes(10_000));
    let mut naive = Naive::default();
    for op in ops {
        match op {
            Op::Insert(tokens) => {
                // Sometimes with what is held already, as the engine has it after a resumption from further up.
                let held = store.held(&tokens);
                let from = if tokens.len() % 2 == 0 { held } else { held / 2 };
                let answer = store.insert(&tokens, from, Run(tokens[from..].to_vec()), Some(Mark(tokens.clone())));
                assert_eq!(
                    answer,
                    Ok(if held < tokens.len() { Inserted::Stored(tokens.len() - held) } else { Inserted::Held })
                );
                assert_eq!(store.known(&asked(&tokens)), tokens.len());
                assert!(store.tree.pinned_bytes() <= store.tree.limits.bytes_max / 2);
                naive.points.insert(tokens.clone());
                naive.sequences.push(tokens);
            }
            Op::Lookup(prompt) => {
                let (found, expected) = (find(&mut store, &prompt), naive.known(&prompt, needs_points));
                assert!(found == expected || (forgets && found < expected), "{found} of {expected}");
            }
            Op::Drop(tokens) => {
                let there = store.drop_point(&tokens);
                assert!(!there || needs_points);
                naive.points.remove(&tokens);
            }
            Op::Pin(tokens) => {
                let pinned = store.pin(&tokens).unwrap();
                assert!(!pinned || store.held(&tokens) == tokens.len());
                assert!(!pinned || store.tree.pinned_bytes() <= store.tree.limits.bytes_max / 2);
            }
            Op::Evict(bytes_max) => evict(&mut store, bytes_max),
        }
        store.tree.check();
    }
    store.evict(0);
    assert_eq!((store.bytes(), store.nodes(), store.tree.node(ROOT).children.len()), (0, 0, 0));
}

proptest! {
    #[test]
    fn lookups_find_what_was_inserted(ops in vec(op(false), 0..60), needs_points: bool) {
        run(ops, needs_points, false);
    }

    #[test]
    fn evictions_go_by_age_and_leave_the_rest_true(ops in vec(op(true), 0..120), needs_points: bool) {
        run(ops, needs_points, true);
    }

    /// Sequences that share nothing are a list, sorted by use.
    #[test]
    fn unrelated_sequences_are_evicted_as_a_list_would(
        uses in vec(0..8_u32, 0..40), pinned in vec(0..8_u32, 0..2), left in 0..8_usize,
    ) {
        let mut store = store(false);
        let mut list: Vec<u32> = Vec::new();
        for first in uses {
            put(&mut store, &[first, 0]);
            list.retain(|known| *known != first);
            list.push(first);
        }
        list.sort_by_key(|first| pinned.contains(first));
        for first in &pinned {
            store.pin(&[*first, 0]).unwrap();
        }
        let each = 2 * (TOKEN_BYTES + 4) + NODE_BYTES;
        store.evict(left as u64 * each);
        let survivors = list.split_off(list.len().saturating_sub(left));
        prop_assert!(list.iter().all(|first| store.known(&[*first, 0, 0]) == 0));
        prop_assert!(survivors.iter().all(|first| store.known(&[*first, 0, 0]) == 2));
    }
}
