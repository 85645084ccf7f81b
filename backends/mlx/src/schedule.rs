//! What the engine does next: pure, from a view of what waits, is being read and is being written.
//!
//! - Writing and reading take turns: one token for everybody who writes, then one chunk of one prompt. So nobody who
//!   writes waits for more than a chunk, and prompts are read however many write.
//! - Every second chunk goes to the prompt that has waited longest, so that none starves; the others to the one that has
//!   had the least, so that a short prompt does not wait for a long one that came before.
//! - Texts that are turned into vectors take turns with prompts, chunk by chunk.
//! - A prompt is let in if everything that runs, and it, fit the memory. What grows beyond that sends the youngest back
//!   to wait; what it has written stays written.
//! - Rows are put into one batch if their lengths are near enough that padding does not waste more than they use.

use mesh_graph::Footprint;

/// Names a sequence; later ones came later.
pub type Id = u64;

/// Bounds that hold for an engine's whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Sequences that are read or written at the same time.
    pub parallel_max: u32,
    /// Prompt tokens computed at a time.
    pub chunk_tokens: u32,
    /// The same while others wait for their next token or their first.
    pub chunk_tokens_in_company: u32,
    /// Bytes for everything that sequences keep, what is remembered of earlier ones included.
    pub memory_bytes: u64,
    /// Bytes of that for what is remembered.
    pub remembered_bytes_max: u64,
}

/// A sequence that has no place yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waiting {
    /// Which.
    pub id: Id,
    /// Tokens it will hold once it is read.
    pub tokens: u32,
}

/// A sequence whose prompt is being read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Which.
    pub id: Id,
    /// Chunks it has had.
    pub turns: u32,
    /// Tokens it will hold once it is read.
    pub tokens: u32,
}

/// Sequences that write together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Writing {
    /// Which, with the tokens that each holds.
    pub rows: Vec<(Id, u32)>,
    /// False while its reader does not read.
    pub ready: bool,
}

/// Texts that are turned into vectors, the next few of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Embedding {
    /// Bytes they take, padding included.
    pub bytes: u64,
    /// Whether they have had a chunk.
    pub begun: bool,
}

/// Everything a decision depends on.
#[derive(Clone, Debug)]
pub struct View<'a> {
    /// In the order in which they are to be let in.
    pub waiting: &'a [Waiting],
    /// In any order.
    pub reading: &'a [Reading],
    /// In any order.
    pub writing: &'a [Writing],
    /// If there are any.
    pub embedding: Option<Embedding>,
    /// Whether the last step was one of writing.
    pub wrote_last: bool,
    /// Whether the last chunk was of texts that are turned into vectors.
    pub embedded_last: bool,
    /// Chunks read so far, by anybody.
    pub chunks: u64,
    /// Bytes that can be used now: never more than the limit, less while other programs hold memory.
    pub memory_bytes: u64,
}

/// What to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Give the first that waits a place.
    Admit(Id),
    /// Take a place away; it waits again, first of all.
    Preempt(Id),
    /// Read so many tokens of a prompt, or up to its end.
    Read {
        /// Whose.
        id: Id,
        /// How many at most.
        tokens: u32,
    },
    /// Go on with the texts that are turned into vectors, by so many tokens at most.
    Embed {
        /// In all rows together.
        tokens: u32,
    },
    /// Write one token of everybody who is ready.
    Write,
    /// Nothing can be done before something arrives or is read.
    Wait,
}

/// Decides.
pub fn next(view: &View<'_>, limits: &Limits, footprint: &Footprint) -> Step {
    let running = view.reading.len() + view.writing.iter().map(|group| group.rows.len()).sum::<usize>();
    let used = used_bytes(view, footprint, 1);
    if used > view.memory_bytes
        && running > 1
        && let Some(id) = youngest(view)
    {
        return Step::Preempt(id);
    }
    if let Some(first) = view.waiting.first()
        && running < limits.parallel_max as usize
        // Alone it is let in whatever the prediction says: its length was checked when it came.
        && (running == 0 && may_be_alone(view) || fits(view, first.tokens, footprint))
    {
        return Step::Admit(first.id);
    }
    let can_write = view.writing.iter().any(|group| group.ready);
    // Alone they go on whatever the prediction says, too.
    let can_embed = view.embedding.is_some() && (running == 0 || used <= view.memory_bytes);
    if can_write && (!view.wrote_last || (view.reading.is_empty() && !can_embed)) {
        return Step::Write;
    }
    let everybody = running + view.waiting.len() + usize::from(view.embedding.is_some());
    let tokens = if everybody <= 1 { limits.chunk_tokens } else { limits.chunk_tokens_in_company };
    if can_embed && (view.reading.is_empty() || !view.embedded_last) {
        return Step::Embed { tokens };
    }
    match whose_turn(view) {
        Some(id) => Step::Read { id, tokens },
        None => Step::Wait,
    }
}

/// Whether nobody else holds memory: texts that are turned into vectors hold none between two lots of them, and where
/// these and a sequence do not fit together, they take turns.
fn may_be_alone(view: &View<'_>) -> bool {
    view.embedding.is_none_or(|embedding| !embedding.begun && view.embedded_last)
}

/// Tokens that everybody is to be able to write after somebody was let in, before anybody is sent back for it.
const HEADROOM_TOKENS: u32 = 256;

/// Whether one more sequence of so many tokens would fit, with headroom for all.
fn fits(view: &View<'_>, tokens: u32, footprint: &Footprint) -> bool {
    let used = used_bytes(view, footprint, HEADROOM_TOKENS);
    used.saturating_add(footprint.bytes(u64::from(tokens) + u64::from(HEADROOM_TOKENS))) <= view.memory_bytes
}

/// Bytes that running sequences take once each has so many tokens more, padding included.
pub fn used_bytes(view: &View<'_>, footprint: &Footprint, more_tokens: u32) -> u64 {
    let bytes = |tokens: u32| footprint.bytes(u64::from(tokens) + u64::from(more_tokens));
    let reading = view.reading.iter().map(|one| bytes(one.tokens));
    let writing = view.writing.iter().map(|group| {
        let longest = group.rows.iter().map(|(_, tokens)| *tokens).max().unwrap_or(0);
        bytes(longest).saturating_mul(group.rows.len() as u64)
    });
    let embedding = view.embedding.map_or(0, |embedding| embedding.bytes);
    reading.chain(writing).fold(embedding, u64::saturating_add)
}

/// The last that came: it has had the least done for it.
fn youngest(view: &View<'_>) -> Option<Id> {
    let reading = view.reading.iter().map(|one| one.id);
    let writing = view.writing.iter().flat_map(|group| group.rows.iter().map(|(id, _)| *id));
    reading.chain(writing).max()
}

fn whose_turn(view: &View<'_>) -> Option<Id> {
    let oldest = view.reading.iter().min_by_key(|one| one.id);
    let least = view.reading.iter().min_by_key(|one| (one.turns, one.id));
    if view.chunks.is_multiple_of(2) { least } else { oldest }.map(|one| one.id)
}

/// Columns by which any two rows of a batch may differ, however short they are.
const SLACK_TOKENS: u32 = 1024;

/// Whether rows of these lengths may stand in one batch: padded to the longest, none takes more than twice its own.
pub fn fit_together(shortest: u32, longest: u32) -> bool {
    longest <= shortest.saturating_mul(2).max(shortest.saturating_add(SLACK_TOKENS))
}

/// Two groups that may become one, given each one's shortest and longest row and how many rows it has; `None` where none
/// are near enough. Rows in one batch are at most `rows_max`, and padding takes at most `spare_bytes`.
pub fn joinable(
    groups: &[(u32, u32, usize)],
    rows_max: usize,
    spare_bytes: u64,
    footprint: &Footprint,
) -> Option<(usize, usize)> {
    let bytes = |longest: u32, rows: usize| footprint.bytes(u64::from(longest) + 1).saturating_mul(rows as u64);
    let pairs = (0..groups.len()).flat_map(|a| (a + 1..groups.len()).map(move |b| (a, b)));
    pairs
        .filter(|(a, b)| {
            let ((shortest_a, longest_a, rows_a), (shortest_b, longest_b, rows_b)) = (groups[*a], groups[*b]);
            let apart = bytes(longest_a, rows_a).saturating_add(bytes(longest_b, rows_b));
            let together = bytes(longest_a.max(longest_b), rows_a + rows_b);
            rows_a + rows_b <= rows_max
                && fit_together(shortest_a.min(shortest_b), longest_a.max(longest_b))
                && together.saturating_sub(apart) <= spare_bytes
        })
        // The nearest first, so that unlike lengths do not fill the room of like ones.
        .min_by_key(|(a, b)| groups[*a].1.abs_diff(groups[*b].1))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMITS: Limits = Limits {
        parallel_max: 4,
        chunk_tokens: 2048,
        chunk_tokens_in_company: 512,
        memory_bytes: 1 << 40,
        remembered_bytes_max: 0,
    };

    /// One byte a token, in steps of 256.
    fn footprint() -> Footprint {
        Footprint { token_bytes: 1, ..Footprint::default() }
    }

    fn view<'a>(waiting: &'a [Waiting], reading: &'a [Reading], writing: &'a [Writing]) -> View<'a> {
        let (embedding, wrote_last, embedded_last) = (None, false, false);
        let memory_bytes = LIMITS.memory_bytes;
        View { waiting, reading, writing, embedding, wrote_last, embedded_last, chunks: 0, memory_bytes }
    }

    fn reading(id: Id, turns: u32) -> Reading {
        Reading { id, turns, tokens: 1000 }
    }

    fn writing(ids: &[Id]) -> Writing {
        Writing { rows: ids.iter().map(|id| (*id, 1000)).collect(), ready: true }
    }

    fn decide(view: &View<'_>) -> Step {
        next(view, &LIMITS, &footprint())
    }

    #[test]
    fn nothing_to_do_is_waited_for() {
        assert_eq!(decide(&view(&[], &[], &[])), Step::Wait);
        let parked = Writing { ready: false, ..writing(&[1]) };
        assert_eq!(decide(&view(&[], &[], &[parked])), Step::Wait);
    }

    #[test]
    fn places_go_in_order_and_are_bounded() {
        let waiting = [Waiting { id: 5, tokens: 10 }, Waiting { id: 6, tokens: 10 }];
        assert_eq!(decide(&view(&waiting, &[reading(1, 0)], &[writing(&[2, 3])])), Step::Admit(5));
        assert_ne!(decide(&view(&waiting, &[reading(1, 0)], &[writing(&[2, 3, 4])])), Step::Admit(5));
    }

    #[test]
    fn who_does_not_fit_waits_and_alone_everybody_fits() {
        let waiting = [Waiting { id: 5, tokens: 600 }];
        let writing = [writing(&[1])];
        // 1000 tokens and 600, each with 256 more, in steps of 256.
        let tight = View { memory_bytes: 1280 + 1024 - 1, ..view(&waiting, &[], &writing) };
        assert_eq!(decide(&tight), Step::Write);
        assert_eq!(decide(&View { memory_bytes: 1280 + 1024, ..tight.clone() }), Step::Admit(5));
        assert_eq!(decide(&View { writing: &[], memory_bytes: 0, ..tight }), Step::Admit(5));
    }

    #[test]
    fn what_outgrows_the_memory_sends_the_youngest_back() {
        let (reading, writing) = ([reading(7, 1)], [writing(&[1, 2])]);
        let tight = View { memory_bytes: 3 * 1024 - 1, ..view(&[], &reading, &writing) };
        assert_eq!(decide(&tight), Step::Preempt(7));
        let alone = View { reading: &[], writing: &[super::tests::writing(&[1])], memory_bytes: 0, ..tight };
        assert_eq!(decide(&alone), Step::Write);
    }

    #[test]
    fn reading_and_writing_take_turns() {
        let (reading, writing) = ([reading(2, 0)], [writing(&[1])]);
        let both = view(&[], &reading, &writing);
        assert_eq!(decide(&both), Step::Write);
        assert_eq!(decide(&View { wrote_last: true, ..both.clone() }), Step::Read { id: 2, tokens: 512 });
        assert_eq!(decide(&View { wrote_last: true, reading: &[], ..both.clone() }), Step::Write);
        assert_eq!(decide(&View { writing: &[], ..both }), Step::Read { id: 2, tokens: 2048 });
    }

    #[test]
    fn a_short_prompt_waits_for_one_chunk_and_a_long_one_is_not_forgotten() {
        // 1 is long; 2 and 3 came later.
        let all = [reading(1, 5), reading(2, 0), reading(3, 0)];
        let at = |chunks| decide(&View { chunks, ..view(&[], &all, &[]) });
        assert_eq!(at(0), Step::Read { id: 2, tokens: 512 });
        assert_eq!(at(1), Step::Read { id: 1, tokens: 512 });
    }

    #[test]
    fn vectors_take_turns_with_prompts_and_with_writing() {
        let (prompts, groups) = ([reading(2, 0)], [writing(&[1])]);
        let embedding = Some(Embedding { bytes: 1000, begun: false });
        let all = View { embedding, ..view(&[], &prompts, &groups) };
        assert_eq!(decide(&all), Step::Write);
        let wrote = View { wrote_last: true, ..all };
        assert_eq!(decide(&wrote), Step::Embed { tokens: 512 });
        assert_eq!(decide(&View { embedded_last: true, ..wrote.clone() }), Step::Read { id: 2, tokens: 512 });
        assert_eq!(
            decide(&View { embedding, wrote_last: true, ..view(&[], &[], &groups) }),
            Step::Embed { tokens: 512 }
        );
        assert_eq!(decide(&View { embedding, ..view(&[], &[], &[]) }), Step::Embed { tokens: 2048 });
    }

    #[test]
    fn vectors_wait_for_memory_and_nobody_starves_for_them() {
        let (groups, waiting) = ([writing(&[1])], [Waiting { id: 5, tokens: 1000 }]);
        let embedding = Some(Embedding { bytes: 3000, begun: false });
        let tight = View { embedding, memory_bytes: 4000, wrote_last: true, ..view(&waiting, &[], &groups) };
        assert_eq!(decide(&tight), Step::Write, "one that runs alone runs on");
        let two = [writing(&[1, 2])];
        assert_eq!(decide(&View { writing: &two, ..tight.clone() }), Step::Preempt(2));
        let alone = View { writing: &[], ..tight };
        assert_eq!(decide(&alone), Step::Embed { tokens: 512 });
        let begun = Some(Embedding { bytes: 3000, begun: true });
        assert_eq!(
            decide(&View { embedding: begun, embedded_last: true, ..alone.clone() }),
            Step::Embed { tokens: 512 }
        );
        assert_eq!(decide(&View { embedded_last: true, ..alone }), Step::Admit(5), "between two lots");
    }

    #[test]
    fn groups_are_of_like_lengths() {
        assert!(fit_together(1, 1025) && !fit_together(1, 1026));
        assert!(fit_together(5000, 10_000) && !fit_together(5000, 10_001));
        let join = |groups: &[_], rows_max, spare_bytes| joinable(groups, rows_max, spare_bytes, &footprint());
        assert_eq!(join(&[(100, 100, 1), (16_000, 16_000, 1), (200, 300, 3)], 32, u64::MAX), Some((0, 2)));
        assert_eq!(join(&[(100, 100, 1), (200, 300, 3)], 3, u64::MAX), None);
        assert_eq!(join(&[(100, 100, 1)], 32, u64::MAX), None);
        // The shorter row is padded from one step of 256 to two.
        assert_eq!(join(&[(100, 100, 1), (200, 300, 3)], 32, 255), None);
        assert_eq!(join(&[(100, 100, 1), (200, 300, 3)], 32, 256), Some((0, 1)));
    }

    proptest! {
        /// Whoever reads gets on, however many others come: every second chunk is for the oldest.
        #[test]
        fn nobody_starves(others in 1u64..20, chunks in 0u64..100) {
            let all: Vec<_> = (0..=others).map(|id| reading(id, if id == 0 { 1000 } else { 0 })).collect();
            let turns = [chunks, chunks + 1].map(|chunks| decide(&View { chunks, ..view(&[], &all, &[]) }));
            let oldest = |step: &Step| matches!(step, Step::Read { id: 0, .. });
            prop_assert!(turns.iter().any(oldest));
        }

        /// A decision is always one that can be performed, and what runs never exceeds the memory for long.
        #[test]
        fn decisions_can_be_performed(
            waiting in prop::collection::vec(1u32..5000, 0..4),
            read in prop::collection::vec((0u32..9, 1u32..5000), 0..4),
            written in prop::collection::vec((prop::collection::vec(1u32..5000, 1..4), any::<bool>()), 0..3),
            memory_bytes in 0u64..20_000, wrote_last: bool, embedded_last: bool, chunks in 0u64..4,
            embedding in prop::option::of((0u64..10_000, any::<bool>())),
        ) {
            let embedding = embedding.map(|(bytes, begun)| Embedding { bytes, begun });
            let mut ids = 0..;
            let mut id = || ids.next().unwrap();
            let reading: Vec<_> = read.iter().map(|(turns, tokens)| Reading { id: id(), turns: *turns, tokens: *tokens }).collect();
            let writing: Vec<_> = written
                .iter()
                .map(|(rows, ready)| Writing { rows: rows.iter().map(|tokens| (id(), *tokens)).collect(), ready: *ready })
                .collect();
            let waiting: Vec<_> = waiting.iter().map(|tokens| Waiting { id: id(), tokens: *tokens }).collect();
            let (waiting, reading, writing) = (&waiting[..], &reading[..], &writing[..]);
            let view =
                View { waiting, reading, writing, embedding, wrote_last, embedded_last, chunks, memory_bytes };
            let running = reading.len() + written.iter().map(|(rows, _)| rows.len()).sum::<usize>();
            let used = used_bytes(&view, &footprint(), 1);
            match decide(&view) {
                Step::Admit(id) => {
                    prop_assert_eq!(id, waiting[0].id);
                    prop_assert!(running == 0 || used + footprint().bytes(waiting[0].tokens.into()) <= memory_bytes);
                }
                Step::Preempt(_) => prop_assert!(used > memory_bytes && running > 1),
                Step::Read { id, .. } => prop_assert!(reading.iter().any(|one| one.id == id)),
                Step::Embed { .. } => {
                    prop_assert!(embedding.is_some() && (running == 0 || used <= memory_bytes));
                }
                Step::Write => prop_assert!(writing.iter().any(|group| group.ready)),
                Step::Wait => prop_assert!(reading.is_empty() && !writing.iter().any(|group| group.ready)),
            }
        }
    }
}
