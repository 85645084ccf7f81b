//! A message cannot make its reader take more memory than a small multiple of its own length, whatever it says.

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::{
        Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
};

use mesh_peers::advert::{Advert, News, Pulse, Snapshot};

/// Counts what is held.
struct Counting;

static HELD: AtomicUsize = AtomicUsize::new(0);
static MOST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: the system's allocator does everything.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let held = HELD.fetch_add(layout.size(), Relaxed) + layout.size();
        MOST.fetch_max(held, Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, place: *mut u8, layout: Layout) {
        HELD.fetch_sub(layout.size(), Relaxed);
        unsafe { System.dealloc(place, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Most bytes held at once while `read` runs.
fn most(read: impl FnOnce()) -> usize {
    static ALONE: Mutex<()> = Mutex::new(());
    let _alone = ALONE.lock();
    let before = HELD.load(Relaxed);
    MOST.store(before, Relaxed);
    read();
    MOST.load(Relaxed).saturating_sub(before)
}

fn within(what: &str, bytes: &[u8]) {
    let most = most(|| {
        _ = Advert::decode(bytes);
        _ = Pulse::decode(bytes);
        _ = News::decode(bytes);
        _ = Snapshot::decode(bytes);
    });
    // 4096 are what the decoder itself needs, and there are complaints.
    assert!(most <= 16 * bytes.len() + 8192, "{what}: {most} bytes for {}", bytes.len());
}

/// A header of CBOR: major type and a number of eight bytes.
fn header(kind: u8, number: u64) -> Vec<u8> {
    [&[kind << 5 | 27][..], &number.to_be_bytes()].concat()
}

fn text(text: &str) -> Vec<u8> {
    [&header(3, text.len() as u64), text.as_bytes()].concat()
}

// One test, for another one's memory would be counted too.
#[test]
fn claims_cost_nothing() {
    let advert: Vec<u8> = {
        let fields = [("version", 1), ("incarnation", 5), ("sequence", 5), ("lease_ms", 5000)];
        let fields = fields.iter().flat_map(|(name, value)| [text(name), header(0, *value)].concat());
        [text("node"), header(2, 32), vec![7; 32], text("name"), text("n")].concat().into_iter().chain(fields).collect()
    };
    for claim in [1 << 12, 1 << 20, 1 << 40, u64::MAX - 1, u64::MAX] {
        for kind in 2..=5 {
            let claimed = header(kind, claim);
            within("alone", &claimed);
            for field in ["offers", "loads", "held", "name", "node", "advert", "unknown"] {
                let start = header(5, claim);
                within(field, &[&start[..], &text(field), &claimed].concat());
                let filled = vec![0xa0; 4000];
                within(field, &[&start[..], &text(field), &claimed, &filled].concat());
                within(field, &[&header(5, 8)[..], &advert, &text(field), &claimed, &filled].concat());
            }
        }
        for kind in [4, 5] {
            let deep: Vec<u8> = (0..2000).flat_map(|_| header(kind, claim)).collect();
            within("deep", &deep);
        }
    }
    // Lists and texts of unknown length, tags of tags.
    for byte in [0x5f, 0x7f, 0x9f, 0xbf, 0xc1, 0xc2, 0xd8] {
        within("the same", &vec![byte; 30_000]);
        within("the same in a field", &[&header(5, 8)[..], &advert, &text("unknown"), &vec![byte; 20_000]].concat());
    }
    let empty_loads: Vec<u8> =
        [header(5, 3), text("loads"), vec![0x9f]].concat().into_iter().chain([0x82, 0, 0xa0].repeat(5000)).collect();
    within("loads", &empty_loads);

    let more = most(|| drop(vec![0_u8; 100_000]));
    assert!(more >= 100_000, "the count counts");
}
