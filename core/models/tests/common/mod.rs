//! What tests of the crate from outside share: an allocator that counts, and writers of headers.
#![allow(dead_code)]

use std::{
    alloc::{GlobalAlloc, Layout, System},
    sync::atomic::{AtomicUsize, Ordering},
};

/// Remembers the most bytes that were in use, and the largest piece.
struct Counting;

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);
static LARGEST: AtomicUsize = AtomicUsize::new(0);

// SAFETY: everything is handed to the system's allocator unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        let now = NOW.fetch_add(layout.size(), Ordering::Relaxed) + layout.size();
        PEAK.fetch_max(now, Ordering::Relaxed);
        LARGEST.fetch_max(layout.size(), Ordering::Relaxed);
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        NOW.fetch_sub(layout.size(), Ordering::Relaxed);
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What something took, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Cost {
    /// At once, at most.
    pub peak: usize,
    /// The largest piece.
    pub largest: usize,
}

/// Does something and says what it took. What others allocate at the same time counts: one test a binary.
pub fn cost_of<T>(work: impl FnOnce() -> T) -> (T, Cost) {
    let before = NOW.load(Ordering::Relaxed);
    PEAK.store(before, Ordering::Relaxed);
    LARGEST.store(0, Ordering::Relaxed);
    let result = work();
    (result, Cost { peak: PEAK.load(Ordering::Relaxed) - before, largest: LARGEST.load(Ordering::Relaxed) })
}

/// The header of a safetensors file with these tensors of 16-bit floats, its length before it, and the bytes of data that
/// it promises.
pub fn safetensors(tensors: &[(String, Vec<u64>)]) -> (Vec<u8>, u64) {
    let mut end = 0;
    let entries = tensors.iter().map(|(name, shape)| {
        let start = end;
        end += 2 * shape.iter().product::<u64>();
        format!("\"{name}\":{{\"dtype\":\"BF16\",\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}")
    });
    let json = format!("{{{}}}", entries.collect::<Vec<_>>().join(","));
    ([&(json.len() as u64).to_le_bytes()[..], json.as_bytes()].concat(), end)
}

fn text(value: &str) -> Vec<u8> {
    [&(value.len() as u64).to_le_bytes()[..], value.as_bytes()].concat()
}

/// Metadata of a GGUF.
#[derive(Default)]
pub struct Entries(pub Vec<Vec<u8>>);

impl Entries {
    /// A text.
    pub fn text(mut self, key: &str, value: &str) -> Self {
        self.0.push([text(key), 8u32.to_le_bytes().to_vec(), text(value)].concat());
        self
    }

    /// A number.
    pub fn number(mut self, key: &str, value: u32) -> Self {
        self.0.push([text(key), 4u32.to_le_bytes().to_vec(), value.to_le_bytes().to_vec()].concat());
        self
    }

    /// Texts.
    pub fn texts(mut self, key: &str, values: impl Iterator<Item = String>) -> Self {
        let values: Vec<Vec<u8>> = values.map(|value| text(&value)).collect();
        let head = [9u32.to_le_bytes(), 8u32.to_le_bytes()].concat();
        self.0.push([text(key), head, (values.len() as u64).to_le_bytes().to_vec(), values.concat()].concat());
        self
    }
}

/// The header of a GGUF with these tensors, each of type number and a shape whose fastest dimension is the first, and
/// the length of the whole file.
pub fn gguf(entries: &Entries, tensors: &[(String, Vec<u64>, u32)]) -> (Vec<u8>, u64) {
    let mut out = b"GGUF\x03\0\0\0".to_vec();
    out.extend((tensors.len() as u64).to_le_bytes());
    out.extend((entries.0.len() as u64).to_le_bytes());
    entries.0.iter().for_each(|entry| out.extend(entry));
    let mut offset = 0u64;
    for (name, shape, kind) in tensors {
        out.extend(text(name));
        out.extend((shape.len() as u32).to_le_bytes());
        shape.iter().for_each(|size| out.extend(size.to_le_bytes()));
        out.extend(kind.to_le_bytes());
        out.extend(offset.to_le_bytes());
        let elements: u64 = shape.iter().product();
        let bytes = match kind {
            0 => elements * 4,
            12 => elements / 256 * 144,
            14 => elements / 256 * 210,
            other => panic!("no test has type {other}"),
        };
        offset += bytes.next_multiple_of(32);
    }
    let base = out.len().next_multiple_of(32) as u64;
    (out, base + offset)
}
