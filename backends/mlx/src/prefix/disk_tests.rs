//! Stores with files: restarts and damage. What a folder is to its company is in `folder_tests`.

use std::{
    fs,
    path::{Path, PathBuf},
};

use proptest::{collection::vec, prelude::*};
use tempfile::TempDir;

use super::{
    DiskSettings, Inserted, Limits, PrefixStore,
    fakes::{Mark, Run},
    tests::{asked, find, put},
};

pub(super) type Store = PrefixStore<Run, Mark>;

pub(super) fn settings(folder: &Path) -> DiskSettings {
    DiskSettings { folder: folder.into(), bytes_max: 1 << 20, files_max: 100, model: "weights, q4".into() }
}

pub(super) fn open(folder: &Path, needs_points: bool) -> Store {
    Store::with_disk(needs_points, Limits::of_bytes(1 << 20), settings(folder)).unwrap()
}

pub(super) fn flush(store: &mut Store) {
    while store.flush_some() {}
    store.tree.check();
}

/// All that is in the folder, by name.
pub(super) fn files(folder: &Path) -> Vec<PathBuf> {
    let models = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let mut files: Vec<_> =
        models.flat_map(|model| fs::read_dir(model).unwrap().map(|file| file.unwrap().path())).collect();
    files.sort();
    files
}

pub(super) fn bytes(folder: &Path) -> u64 {
    files(folder).iter().map(|file| fs::metadata(file).unwrap().len()).sum()
}

#[test]
fn a_restart_finds_everything() {
    for needs_points in [false, true] {
        let folder = TempDir::new().unwrap();
        let sequences: [&[u32]; 4] = [&[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 9], &[7]];
        let mut store = open(folder.path(), needs_points);
        for tokens in sequences {
            put(&mut store, tokens);
        }
        flush(&mut store);
        let mut store = open(folder.path(), needs_points);
        store.tree.check();
        assert_eq!(store.held(&[1, 2, 3]), 0);
        for tokens in sequences {
            assert_eq!(find(&mut store, &asked(tokens)), tokens.len());
            assert_eq!(store.held(tokens), tokens.len());
        }
        store.tree.check();
        assert!(!store.flush_some(), "nothing is new");
    }
}

#[test]
fn what_earlier_stores_left_is_thawed_as_far_as_there_is_room() {
    for needs_points in [false, true] {
        let folder = TempDir::new().unwrap();
        let sequences: [&[u32]; 4] = [&[1, 2, 3], &[1, 2, 3, 4, 5], &[1, 2, 9], &[7]];
        let mut store = open(folder.path(), needs_points);
        for tokens in sequences {
            put(&mut store, tokens);
        }
        flush(&mut store);
        let thaw = |store: &mut Store, room| {
            let (mut parts, mut more) = (0, true);
            while more {
                parts += usize::from(store.thaw_some(room, &mut more).is_some());
                store.tree.check();
            }
            parts
        };
        let mut all = open(folder.path(), needs_points);
        assert!(thaw(&mut all, u64::MAX) >= 4);
        assert!(sequences.iter().all(|tokens| all.held(tokens) == tokens.len()));
        assert!(!all.flush_some(), "nothing is new");
        // Files are no longer needed.
        files(folder.path()).iter().for_each(|file| fs::remove_file(file).unwrap());
        for tokens in sequences {
            assert_eq!(find(&mut all, &asked(tokens)), tokens.len());
        }
    }
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1, 2, 3]);
    put(&mut store, &[7, 8]);
    flush(&mut store);
    let mut some = open(folder.path(), false);
    let mut more = true;
    let room = some.bytes() + files(folder.path()).iter().map(|file| fs::metadata(file).unwrap().len()).max().unwrap();
    while more {
        some.thaw_some(room, &mut more);
    }
    assert_eq!((some.held(&[7, 8]), some.held(&[1, 2, 3])), (2, 0), "what was used last comes first");
    assert!(some.bytes() <= room);
    // A file that is no longer what it was costs what it held.
    let mut damaged = open(folder.path(), false);
    files(folder.path()).iter().for_each(|file| fs::write(file, b"").unwrap());
    more = true;
    while more {
        assert!(damaged.thaw_some(u64::MAX, &mut more).is_none());
    }
    assert_eq!((damaged.known(&asked(&[7, 8])), damaged.nodes()), (0, 0));
}

#[test]
fn an_edge_that_is_split_after_it_was_written_keeps_its_file() {
    for needs_points in [false, true] {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path(), needs_points);
        put(&mut store, &[1, 2, 3, 4, 5, 6]);
        put(&mut store, &[1, 2, 3, 4, 5, 6, 7]);
        flush(&mut store);
        put(&mut store, &[1, 2, 3, 8]);
        put(&mut store, &[1, 9]);
        flush(&mut store);
        assert_eq!(files(folder.path()).len(), 4);
        let mut store = open(folder.path(), needs_points);
        for tokens in [&[1, 2, 3, 4, 5, 6, 7][..], &[1, 2, 3, 8], &[1, 9], &[1, 2, 3, 4, 5, 6]] {
            assert_eq!(find(&mut store, &asked(tokens)), tokens.len());
            store.tree.check();
        }
    }
}

#[test]
fn a_point_written_later_is_found_at_the_end_of_an_edge_that_was_split() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), true);
    store.insert(&[1, 2, 3], 0, Run(vec![1, 2, 3]), None).unwrap();
    flush(&mut store);
    store.insert(&[1, 2, 3], 3, Run(vec![]), Some(Mark(vec![1, 2, 3]))).unwrap();
    flush(&mut store);
    put(&mut store, &[1, 9]);
    flush(&mut store);
    let all = files(folder.path());
    assert_eq!(all.len(), 3);
    // Whichever of the two is read first.
    for last_used in all {
        let opened = fs::File::options().write(true).open(last_used).unwrap();
        opened.set_modified(std::time::SystemTime::now()).unwrap();
        let mut store = open(folder.path(), true);
        assert_eq!((find(&mut store, &[1, 2, 3, 4]), find(&mut store, &[1, 9, 9])), (3, 2));
        store.tree.check();
    }
}

#[test]
fn a_restart_takes_the_last_used_if_it_cannot_take_all() {
    let cases = [
        (10, Limits { bytes_max: 1 << 20, nodes_max: 8 }, "two files make up to eight nodes"),
        (10, Limits { bytes_max: 1200, nodes_max: 999 }, "two cold nodes fill half of it"),
        (1000, Limits { bytes_max: 32_000, nodes_max: 999 }, "two files' tokens fill a quarter of it"),
    ];
    for (length, limits, why) in cases {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path(), false);
        for first in 0..20 {
            put(&mut store, &vec![first; length]);
        }
        find(&mut store, &vec![3; length + 1]);
        flush(&mut store);
        let store = Store::with_disk(false, limits, settings(folder.path())).unwrap();
        store.tree.check();
        let known = |first: &u32| store.known(&vec![*first; length + 1]) > 0;
        assert_eq!((0..20).filter(known).collect::<Vec<_>>(), [3, 19], "{why}");
        assert_eq!(files(folder.path()).len(), 20);
    }
}

#[test]
fn times_that_others_set_do_not_confuse() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1]);
    put(&mut store, &[1, 2]);
    flush(&mut store);
    let set = |file: &Path, time| fs::File::options().write(true).open(file).unwrap().set_modified(time).unwrap();
    let late = std::time::SystemTime::now() + std::time::Duration::from_secs(1 << 30);
    for (first, second) in [(std::time::UNIX_EPOCH, late), (late, std::time::UNIX_EPOCH)] {
        set(&files(folder.path())[0], first);
        set(&files(folder.path())[1], second);
        let mut store = open(folder.path(), false);
        store.tree.check();
        assert_eq!(find(&mut store, &[1, 2, 3]), 2);
        put(&mut store, &[3]);
        store.tree.check();
    }
}

#[test]
fn a_point_that_comes_later_is_written_too() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), true);
    store.insert(&[1, 2], 0, Run(vec![1, 2]), None).unwrap();
    flush(&mut store);
    store.insert(&[1, 2], 2, Run(vec![]), Some(Mark(vec![1, 2]))).unwrap();
    flush(&mut store);
    let mut store = open(folder.path(), true);
    assert_eq!(find(&mut store, &[1, 2, 3]), 2);
    // Dropped in memory alone: the file is as it was.
    assert!(store.drop_point(&[1, 2]));
    assert_eq!(find(&mut store, &[1, 2, 3]), 0);
}

#[test]
fn what_leaves_memory_is_loaded_when_it_is_asked_for() {
    for needs_points in [false, true] {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path(), needs_points);
        let sequences = (0..20_u32).map(|first| vec![first, 1, 2, 3, 4, 5, 6, 7, 8, 9]).collect::<Vec<_>>();
        for tokens in &sequences {
            put(&mut store, &tokens[..5]);
            put(&mut store, tokens);
        }
        let evicted = store.evict(15_000);
        assert!(store.bytes() <= 15_000 && evicted.segments > 20);
        store.tree.check();
        for tokens in &sequences {
            assert_eq!(find(&mut store, &asked(tokens)), 10);
            store.evict(15_000);
            store.tree.check();
        }
        // There is no room for the nodes alone.
        store.evict(300);
        assert!(store.bytes() <= 300);
        store.tree.check();
        let mut store = open(folder.path(), needs_points);
        assert!(sequences.iter().all(|tokens| find(&mut store, &asked(tokens)) == 10));
    }
}

#[test]
fn a_path_that_memory_has_no_room_for_is_taken_as_far_as_it_has() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    let tokens: Vec<u32> = (0..1000).collect();
    for length in (50..=1000).step_by(50) {
        put(&mut store, &tokens[..length]);
    }
    flush(&mut store);
    let mut store = open(folder.path(), false);
    store.tree.limits.bytes_max = bytes(folder.path()) - 1;
    assert_eq!(find(&mut store, &asked(&tokens)), 950);
}

#[test]
fn a_file_that_has_many_parts_is_loaded_once() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    let tokens: Vec<u32> = (0..1000).collect();
    put(&mut store, &tokens);
    flush(&mut store);
    for length in (50..1000).step_by(50) {
        put(&mut store, &asked(&tokens[..length]));
    }
    flush(&mut store);
    let whole = files(folder.path()).iter().map(|file| fs::metadata(file).unwrap().len()).max().unwrap();
    let mut store = open(folder.path(), false);
    store.tree.limits.bytes_max = whole;
    assert_eq!(find(&mut store, &asked(&tokens)), 1000);
    store.tree.check();
}

#[test]
fn no_damaged_byte_goes_unnoticed() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), true);
    put(&mut store, &[1, 2, 3]);
    flush(&mut store);
    let file = files(folder.path()).remove(0);
    let whole = fs::read(&file).unwrap();
    // A file whose parent is unknown is left alone: its parent may be on its way.
    let parent = whole.windows(10).position(|window| window == b"\"parent\":\"").unwrap() + 10;
    let refused = |damaged: &[u8], place: usize, how: &str| {
        fs::write(&file, damaged).unwrap();
        assert_eq!(open(folder.path(), true).lookup(&[1, 2, 3, 4]).tokens, 0, "{how} {place}");
        assert!(!file.exists() || (parent..parent + 64).contains(&place), "{how} {place}");
    };
    for place in 0..whole.len() {
        for mask in [1, 0x20, 0x80] {
            let mut damaged = whole.clone();
            damaged[place] ^= mask;
            refused(&damaged, place, "a byte's bit at");
        }
        refused(&whole[..place], whole.len(), "cut off");
    }
    refused(&[&whole[..], b"x"].concat(), whole.len(), "a byte more");
    // A header that claims everything, in few bytes.
    refused(&u64::MAX.to_le_bytes(), 0, "an endless header");
    let claim = br#"{"tokens":{"dtype":"U32","shape":[4611686018427387904],"data_offsets":[0,18446744073709551615]}}"#;
    refused(&[&(claim.len() as u64).to_le_bytes()[..], claim].concat(), 0, "endless tokens");
    fs::write(&file, &whole).unwrap();
    assert_eq!(find(&mut open(folder.path(), true), &[1, 2, 3, 4]), 3);
}

#[test]
fn damage_costs_what_comes_after_it_and_no_more() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1]);
    put(&mut store, &[1, 2]);
    put(&mut store, &[1, 2, 3]);
    flush(&mut store);
    let second = files(folder.path()).remove(1);
    let mut store = open(folder.path(), false);
    let mut bytes = fs::read(&second).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(&second, &bytes).unwrap();
    assert_eq!(store.known(&[1, 2, 3, 4]), 3);
    assert_eq!(store.lookup(&[1, 2, 3, 4]).tokens, 1);
    store.tree.check();
    // It is computed again, and what continued it is found again at the next start.
    assert_eq!(put(&mut store, &[1, 2]), Inserted::Stored(1));
    flush(&mut store);
    assert_eq!(find(&mut open(folder.path(), false), &[1, 2, 3, 4]), 3);
}

#[test]
fn a_writer_that_dies_leaves_nothing_that_looks_whole() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1, 2, 3]);
    flush(&mut store);
    let file = files(folder.path()).remove(0);
    let whole = fs::read(&file).unwrap();
    // Under its other name, whatever it holds.
    let part = file.with_file_name("1-1.part");
    fs::rename(&file, &part).unwrap();
    assert_eq!(find(&mut open(folder.path(), false), &[1, 2, 3, 4]), 0);
    assert!(part.exists(), "its writer may be at work");
    fs::File::options().write(true).open(&part).unwrap().set_modified(std::time::UNIX_EPOCH).unwrap();
    open(folder.path(), false);
    assert!(!part.exists(), "its writer is gone");
    // Complete but for its checksum.
    let place = whole.windows(10).position(|window| window == b"\"sha256\":\"").unwrap() + 10;
    let mut unsealed = whole.clone();
    unsealed[place..place + 64].fill(b'0');
    fs::write(&file, &unsealed).unwrap();
    assert_eq!(open(folder.path(), false).lookup(&[1, 2, 3, 4]).tokens, 0);
}

#[test]
fn other_models_and_strangers_are_left_alone() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1, 2, 3]);
    flush(&mut store);
    let file = files(folder.path()).remove(0);
    let stranger = file.with_file_name("notes.txt");
    fs::write(&stranger, "mine").unwrap();
    let other = DiskSettings { model: "weights, q8".into(), ..settings(folder.path()) };
    let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), other).unwrap();
    assert_eq!(find(&mut store, &[1, 2, 3, 4]), 0);
    put(&mut store, &[1, 2, 3]);
    flush(&mut store);
    assert_eq!(files(folder.path()).len(), 3);
    // A file of one model among another's is not believed.
    let theirs = files(folder.path()).into_iter().find(|path| path.parent() != file.parent()).unwrap();
    fs::copy(&theirs, &file).unwrap();
    assert_eq!(find(&mut open(folder.path(), false), &[1, 2, 3, 4]), 0);
    assert!(theirs.exists() && stranger.exists() && !file.exists());
}

#[derive(Clone, Debug)]
enum Op {
    Insert(Vec<u32>),
    Lookup(Vec<u32>),
    Pin(Vec<u32>),
    Evict(u64),
    Flush,
    Restart,
    Damage(usize),
}

fn op() -> impl Strategy<Value = Op> {
    let tokens = || vec(0..3_u32, 0..8);
    prop_oneof![
        6 => tokens().prop_map(Op::Insert),
        5 => tokens().prop_map(Op::Lookup),
        1 => tokens().prop_map(Op::Pin),
        2 => (0..8_000_u64).prop_map(Op::Evict),
        2 => Just(Op::Flush),
        1 => Just(Op::Restart),
        1 => (0..50_usize).prop_map(Op::Damage),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn whatever_happens_nothing_untrue_is_found(
        ops in vec(op(), 0..60), needs_points: bool, files_max in 3..40_usize,
    ) {
        let folder = TempDir::new().unwrap();
        let limits = DiskSettings { files_max, ..settings(folder.path()) };
        let reopen = || Store::with_disk(needs_points, Limits::of_bytes(20_000), limits.clone()).unwrap();
        let mut store = reopen();
        for op in ops {
            match op {
                Op::Insert(tokens) => {
                    put(&mut store, &tokens);
                    prop_assert_eq!(store.held(&tokens), tokens.len());
                }
                // It proves what it finds.
                Op::Lookup(prompt) => drop(store.lookup(&prompt).tokens == find(&mut store, &prompt)),
                Op::Pin(tokens) => drop(store.pin(&tokens).unwrap()),
                Op::Evict(bytes_max) => {
                    store.evict(bytes_max);
                    prop_assert!(store.bytes() <= bytes_max);
                }
                Op::Flush => flush(&mut store),
                Op::Restart => store = reopen(),
                Op::Damage(which) => {
                    let files = files(folder.path());
                    if let Some(file) = files.get(which % files.len().max(1)) {
                        let bytes = fs::read(file).unwrap();
                        fs::write(file, &bytes[..bytes.len() * (which % 7) / 7]).unwrap();
                    }
                }
            }
            store.tree.check();
            prop_assert!(files(folder.path()).len() <= files_max);
        }
    }

    #[test]
    fn a_restart_changes_nothing(
        sequences in vec(vec(0..3_u32, 1..10), 0..20), cuts in vec(0..20_usize, 0..4), needs_points: bool,
    ) {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path(), needs_points);
        for (index, tokens) in sequences.iter().enumerate() {
            put(&mut store, tokens);
            // Written before and after later ones split it.
            if cuts.contains(&index) {
                flush(&mut store);
            }
        }
        flush(&mut store);
        let mut again = open(folder.path(), needs_points);
        again.tree.check();
        for tokens in &sequences {
            for length in 0..=tokens.len() {
                let prompt = asked(&tokens[..length]);
                let known = store.known(&prompt);
                prop_assert_eq!(find(&mut again, &prompt), known);
            }
        }
        again.tree.check();
    }
}
