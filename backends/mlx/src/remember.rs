//! What the engine remembers of sequences, in terms of caches: the prefix store over what the graph crate keeps.

use std::borrow::Cow;

use mesh_graph::{Blueprint, Cache, Point, Segment, ffi, memory};
use mlx_rs::{Array, Dtype, error::Exception};

use crate::prefix::{self, DiskSettings, Limits, NamedTensor, Payload, PrefixStore};

/// Prefixes of one model.
pub struct Remembered {
    store: PrefixStore<Segment, Point>,
    blueprint: Blueprint,
    files: bool,
    /// Whether sequences can be taken up only where a point was kept.
    pub needs_points: bool,
}

/// Marks tokens of sequences that are computed as longer than the model's length limit: what is kept of them is of no
/// use to shorter ones. No vocabulary reaches so far.
const LONG: u32 = 1 << 31;

impl Remembered {
    /// Of a model whose caches are built like this: nothing yet, or what earlier engines left in `files`. Files that cannot
    /// be used are done without.
    pub fn new(blueprint: Blueprint, needs_points: bool, bytes_max: u64, files: Option<DiskSettings>) -> Self {
        let limits = Limits::of_bytes(bytes_max);
        let store = files.and_then(|files| {
            let folder = files.folder.clone();
            PrefixStore::with_disk(needs_points, limits, files)
                .inspect_err(|error| tracing::warn!("{}: prefixes are not kept in files: {error}", folder.display()))
                .ok()
        });
        let files = store.is_some();
        let store = store.unwrap_or_else(|| PrefixStore::new(needs_points, limits));
        Self { store, blueprint, files, needs_points }
    }

    /// Whether files are kept.
    pub fn has_files(&self) -> bool {
        self.files
    }

    /// Writes a little of what no file has yet; answers whether there is more.
    pub fn save_some(&mut self) -> bool {
        let more = self.store.flush_some();
        forget_shared_buffers();
        more
    }

    /// Brings a little of what only files have to memory, as long as no more than `bytes_max` are held; answers whether there
    /// may be more.
    pub fn thaw_some(&mut self, bytes_max: u64) -> bool {
        let mut more = false;
        let Some((segment, point)) = self.store.thaw_some(bytes_max, &mut more) else { return more };
        // To the device's own memory now, and not when they are needed.
        let arrays = segment.arrays.iter().chain(point.iter().flat_map(|point| &point.arrays));
        if let Err(error) = mlx_rs::transforms::eval(arrays) {
            tracing::warn!("a prefix from a file did not reach the device: {}", error.what());
            return false;
        }
        forget_shared_buffers();
        more
    }

    /// How many tokens of a prompt need not be computed.
    pub fn known(&self, prompt: &[u32], long: bool) -> usize {
        self.store.known(&key(prompt, long))
    }

    /// The cache of the longest known prefix of a prompt; `None` if nothing is known.
    pub fn recall(&mut self, prompt: &[u32], long: bool) -> Result<Option<Cache>, Exception> {
        let hit = self.store.lookup(&key(prompt, long));
        if hit.tokens == 0 {
            return Ok(None);
        }
        let cache = Cache::restore(&self.blueprint, &hit.segments, hit.point, hit.tokens as i32)?;
        mlx_rs::transforms::eval(cache.arrays())?;
        Ok(Some(cache))
    }

    /// Remembers the single sequence in `cache`, whose tokens these are, and where it ends if it can be taken up only
    /// there; answers whether it is. What is remembered may take `room_bytes` in all: what does not fit is not even copied.
    pub fn keep(&mut self, tokens: &[u32], long: bool, cache: &Cache, room_bytes: u64) -> Result<bool, Exception> {
        let key = key(tokens, long);
        let footprint = cache.footprint();
        let whole = footprint.token_bytes.saturating_mul(tokens.len() as u64);
        let point = if self.needs_points { footprint.point_bytes(tokens.len() as u64) } else { 0 };
        if whole.saturating_add(point) > room_bytes {
            return Ok(false);
        }
        let new = |held: usize| footprint.token_bytes * (tokens.len() - held) as u64 + point;
        self.evict(room_bytes.saturating_sub(new(self.store.held(&key))));
        let held = self.store.held(&key);
        let point = if self.needs_points { Some(cache.point()?) } else { None };
        if held == tokens.len() && point.is_none() {
            return Ok(true);
        }
        let segment = cache.segment(held as i32, tokens.len() as i32)?;
        self.store.insert(&key, held, segment, point).map(|_| true)
    }

    /// Forgets that a sequence could be taken up after exactly these tokens.
    pub fn drop_point(&mut self, tokens: &[u32], long: bool) {
        self.store.drop_point(&key(tokens, long));
    }

    /// Has a prefix evicted last.
    pub fn pin(&mut self, tokens: &[u32], long: bool) -> Result<(), Exception> {
        self.store.pin(&key(tokens, long)).map(|_| ())
    }

    /// Forgets what was not used for longest until no more than these bytes are held.
    pub fn evict(&mut self, bytes_max: u64) {
        if self.store.bytes() <= bytes_max {
            return;
        }
        let evicted = self.store.evict(bytes_max);
        if self.files {
            forget_shared_buffers();
        }
        tracing::debug!(?evicted, bytes_max, held_bytes = self.store.bytes(), "prefixes forgotten");
    }

    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        self.store.bytes()
    }
}

/// What went through the host has left buffers behind that host and device share: slow ones to compute with.
fn forget_shared_buffers() {
    memory::clear_cache();
}

fn key(tokens: &[u32], long: bool) -> Cow<'_, [u32]> {
    if long { tokens.iter().map(|token| token | LONG).collect() } else { tokens.into() }
}

impl Payload for Segment {
    type Error = Exception;

    fn bytes(&self) -> u64 {
        Self::bytes(self)
    }

    fn tensors(&self) -> Result<Vec<NamedTensor>, Exception> {
        self.arrays.iter().enumerate().map(named).collect()
    }

    fn from_tensors(tokens: usize, tensors: Vec<NamedTensor>) -> Result<Self, Exception> {
        let arrays = tensors.iter().map(array).collect::<Result<Vec<_>, _>>()?;
        match arrays.iter().all(|array| array.ndim() == 4 && array.dim(2) as usize == tokens) {
            true => Ok(Self { tokens, arrays }),
            false => Err(Exception::custom("a kept segment is not of its tokens")),
        }
    }
}

impl prefix::Segment for Segment {
    fn tokens(&self) -> usize {
        self.tokens
    }

    fn split(&self, at: usize) -> Result<(Self, Self), Exception> {
        Self::split(self, at)
    }
}

impl Payload for Point {
    type Error = Exception;

    fn bytes(&self) -> u64 {
        Self::bytes(self)
    }

    fn tensors(&self) -> Result<Vec<NamedTensor>, Exception> {
        self.arrays.iter().enumerate().map(named).collect()
    }

    fn from_tensors(_: usize, tensors: Vec<NamedTensor>) -> Result<Self, Exception> {
        Ok(Self { arrays: tensors.iter().map(array).collect::<Result<_, _>>()? })
    }
}

const DTYPES: [(Dtype, safetensors::Dtype); 5] = [
    (Dtype::Float32, safetensors::Dtype::F32),
    (Dtype::Float16, safetensors::Dtype::F16),
    (Dtype::Bfloat16, safetensors::Dtype::BF16),
    (Dtype::Int32, safetensors::Dtype::I32),
    (Dtype::Uint32, safetensors::Dtype::U32),
];

fn named((index, array): (usize, &Array)) -> Result<NamedTensor, Exception> {
    let dtype = DTYPES.iter().find(|(own, _)| *own == array.dtype());
    let (_, dtype) = dtype.ok_or_else(|| Exception::custom(format!("{:?} is not kept in files", array.dtype())))?;
    let shape = array.shape().iter().map(|dim| *dim as usize).collect();
    Ok(NamedTensor { name: index.to_string(), dtype: *dtype, shape, bytes: ffi::to_bytes(array)? })
}

fn array(tensor: &NamedTensor) -> Result<Array, Exception> {
    let wrong = || Exception::custom(format!("tensor {} of a kept prefix has no such shape", tensor.name));
    let (dtype, _) = DTYPES.iter().find(|(_, theirs)| *theirs == tensor.dtype).ok_or_else(wrong)?;
    let shape = tensor.shape.iter().map(|dim| i32::try_from(*dim)).collect::<Result<Vec<_>, _>>();
    let array = ffi::from_bytes(&tensor.bytes, &shape.map_err(|_| wrong())?, *dtype).ok_or_else(wrong)?;
    // What came from the host may stay in its memory; what is computed is in the device's.
    mlx_rs::ops::select(Array::from_bool(true), &array, &array)
}
