//! What a folder is to its company: budgets, other models, other processes, permissions.

use std::{fs, io, path::Path};

use tempfile::TempDir;

use super::{
    DiskSettings, Limits,
    disk_tests::{Store, bytes, files, flush, open, settings},
    tests::{find, put},
};

fn bounded(folder: &Path, bytes_max: u64, files_max: usize) -> Store {
    let settings = DiskSettings { bytes_max, files_max, ..settings(folder) };
    Store::with_disk(false, Limits::of_bytes(1 << 20), settings).unwrap()
}

#[test]
fn a_use_in_memory_keeps_the_file() {
    let folder = TempDir::new().unwrap();
    let mut store = bounded(folder.path(), 1 << 20, 2);
    for first in 0..2 {
        put(&mut store, &[first]);
    }
    flush(&mut store);
    find(&mut store, &[0, 0]);
    put(&mut store, &[2]);
    flush(&mut store);
    let store = bounded(folder.path(), 1 << 20, 2);
    assert_eq!([0, 1, 2].map(|first| store.known(&[first, 0])), [1, 0, 1]);
}

#[test]
fn files_are_as_old_as_their_last_use_not_as_their_writing() {
    let folder = TempDir::new().unwrap();
    let mut store = bounded(folder.path(), 1 << 20, 3);
    for first in 0..3 {
        put(&mut store, &[first]);
    }
    // The last used is written first.
    flush(&mut store);
    put(&mut store, &[3]);
    flush(&mut store);
    let store = bounded(folder.path(), 1 << 20, 3);
    assert_eq!([0, 1, 2, 3].map(|first| store.known(&[first, 0])), [0, 1, 1, 1]);
}

#[test]
fn what_had_to_give_way_is_not_known_any_more() {
    let folder = TempDir::new().unwrap();
    let mut store = bounded(folder.path(), 1 << 20, 1);
    put(&mut store, &[1]);
    flush(&mut store);
    let mut store = bounded(folder.path(), 1 << 20, 1);
    assert_eq!((store.known(&[1, 0]), store.held(&[1])), (1, 0));
    put(&mut store, &[2]);
    flush(&mut store);
    assert_eq!((store.known(&[1, 0]), store.known(&[2, 0])), (0, 1));
}

#[test]
fn a_file_may_take_its_own_place() {
    let folder = TempDir::new().unwrap();
    let (mut one, mut two) = (bounded(folder.path(), 1 << 20, 1), bounded(folder.path(), 1 << 20, 1));
    for store in [&mut one, &mut two] {
        put(store, &[1, 2]);
        flush(store);
        assert_eq!(store.tree.unwritten(0), None);
    }
    two.evict(two.bytes() - 1);
    assert_eq!(two.held(&[1, 2]), 0);
    assert_eq!(find(&mut two, &[1, 2, 3]), 2);
}

#[test]
fn a_file_that_was_cut_off_is_written_once_more() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1, 2]);
    flush(&mut store);
    fs::write(&files(folder.path())[0], "x").unwrap();
    store.evict(store.bytes() - 1);
    assert_eq!(store.held(&[1, 2]), 0);
    assert_eq!(find(&mut store, &[1, 2, 3]), 2);
}

#[test]
fn a_file_under_another_name_is_not_believed() {
    let folder = TempDir::new().unwrap();
    let mut store = open(folder.path(), false);
    put(&mut store, &[1, 2]);
    flush(&mut store);
    let file = files(folder.path()).remove(0);
    let name = file.file_name().unwrap().to_str().unwrap().to_owned();
    let others = [name.replace(".safe", "-point.safe"), name.replacen("00000000", "00000001", 1)];
    for other in others {
        let other = file.with_file_name(other);
        fs::copy(&file, &other).unwrap();
        let store = open(folder.path(), false);
        assert!(!other.exists() && file.exists());
        assert_eq!((store.known(&[1, 2, 3]), store.nodes()), (2, 1));
    }
}

#[test]
fn the_folder_keeps_its_budget_and_leaves_go_first() {
    for by_count in [false, true] {
        let folder = TempDir::new().unwrap();
        let mut limits = settings(folder.path());
        (limits.bytes_max, limits.files_max) = if by_count { (1 << 20, 5) } else { (4000, 100) };
        let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), limits.clone()).unwrap();
        for last in 0..20 {
            put(&mut store, &[1]);
            put(&mut store, &[1, 2, last]);
            flush(&mut store);
            assert!(bytes(folder.path()) <= limits.bytes_max && files(folder.path()).len() <= limits.files_max);
        }
        assert!(files(folder.path()).len() >= 3);
        let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), limits).unwrap();
        // The first file has what all the others continue.
        assert_eq!([19, 1, 0].map(|last| find(&mut store, &[1, 2, last, 0])), [3, 2, 3]);
    }
}

#[test]
fn what_was_used_last_is_kept_whatever_is_written_last() {
    let folder = TempDir::new().unwrap();
    let limits = DiskSettings { files_max: 2, ..settings(folder.path()) };
    let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), limits.clone()).unwrap();
    for first in 0..6 {
        put(&mut store, &[first]);
    }
    find(&mut store, &[2, 0]);
    flush(&mut store);
    let reopened = Store::with_disk(false, Limits::of_bytes(1 << 20), limits).unwrap();
    assert_eq!((0..6).map(|first| reopened.known(&[first, 0])).collect::<Vec<_>>(), [0, 0, 1, 0, 0, 1]);
    // Evicted, what found no room is lost, and that is all.
    store.evict(0);
    store.tree.check();
    assert_eq!(files(folder.path()).len(), 2);
}

#[test]
fn what_is_too_long_for_the_folder_is_not_written_and_stops_nothing() {
    let folder = TempDir::new().unwrap();
    let limits = DiskSettings { bytes_max: 1500, ..settings(folder.path()) };
    let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), limits.clone()).unwrap();
    put(&mut store, &[1]);
    put(&mut store, &[2; 1000]);
    flush(&mut store);
    // The other is.
    assert!(bytes(folder.path()) <= 1500 && files(folder.path()).len() == 1);
    store.evict(0);
    assert_eq!(store.bytes(), 0);
    let none = DiskSettings { bytes_max: 0, files_max: 0, ..limits };
    let mut store = Store::with_disk(false, Limits::of_bytes(1 << 20), none).unwrap();
    put(&mut store, &[3]);
    flush(&mut store);
    store.evict(0);
    assert_eq!(store.bytes(), 0);
}

#[test]
fn files_may_vanish_at_any_time() {
    for needs_points in [false, true] {
        let folder = TempDir::new().unwrap();
        let mut store = open(folder.path(), needs_points);
        put(&mut store, &[1, 2]);
        put(&mut store, &[1, 2, 3]);
        flush(&mut store);
        let mut cold = open(folder.path(), needs_points);
        for file in files(folder.path()) {
            fs::remove_file(file).unwrap();
        }
        assert_eq!(cold.known(&[1, 2, 3, 4]), 3);
        assert_eq!(cold.lookup(&[1, 2, 3, 4]).tokens, 0);
        assert_eq!(cold.nodes(), 0);
        // What is in memory is written once more when it has to leave.
        store.evict(store.bytes() - 50);
        store.tree.check();
        assert_eq!(files(folder.path()).len(), 1);
        assert_eq!(find(&mut store, &[1, 2, 3, 4]), 3);
        fs::remove_dir_all(folder.path()).unwrap();
        assert_eq!(find(&mut store, &[1, 2, 3, 4]), 3);
        put(&mut store, &[5]);
        assert!(!store.flush_some());
        store.evict(0);
        assert_eq!(store.bytes(), 0);
    }
}

#[test]
fn two_processes_share_a_folder() {
    let folder = TempDir::new().unwrap();
    let (mut one, mut two) = (open(folder.path(), true), open(folder.path(), true));
    put(&mut one, &[1, 2]);
    put(&mut two, &[1, 2]);
    put(&mut two, &[1, 2, 3]);
    put(&mut one, &[1, 4]);
    while one.flush_some() | two.flush_some() {}
    let mut both = open(folder.path(), true);
    assert_eq!([&[1, 2, 3, 0][..], &[1, 4, 0], &[1, 2, 0]].map(|prompt| find(&mut both, prompt)), [3, 2, 2]);
    both.tree.check();
}

#[cfg(unix)]
#[test]
fn nobody_else_may_read_them() {
    use std::os::unix::fs::PermissionsExt;

    let folder = TempDir::new().unwrap();
    let inner = folder.path().join("made/for/it");
    let mut store = open(&inner, false);
    put(&mut store, &[1, 2]);
    flush(&mut store);
    let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
    let file = files(&inner).remove(0);
    assert_eq!([inner.as_path(), file.parent().unwrap(), &file].map(mode), [0o700, 0o700, 0o600]);
}

#[test]
fn a_folder_that_cannot_be_made_is_said() {
    let folder = TempDir::new().unwrap();
    let taken = folder.path().join("taken");
    fs::write(&taken, "").unwrap();
    let opened = Store::with_disk(false, Limits::of_bytes(1), settings(&taken));
    assert!(opened.err().is_some_and(|error: io::Error| !error.to_string().is_empty()));
}
