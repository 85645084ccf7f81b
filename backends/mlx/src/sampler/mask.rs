//! The tokens that may come next, one bit each.

use std::num::NonZeroUsize;

use lru::LruCache;
use mesh_graph::{elementwise::scalar, ffi};
use mlx_rs::{Array, error::Exception, ops};

/// Bits of a word.
const BITS: usize = u32::BITS as usize;
/// Most masks that are kept on the device: at 150,000 tokens, 11 MB there and on the host together.
const KEPT_MAX: NonZeroUsize = NonZeroUsize::new(64).unwrap();

/// Tokens that may come next: bit `i % 32` of word `i / 32` for token `i`.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Mask {
    words: Vec<u32>,
    vocab_size: u32,
}

impl Mask {
    /// What `fill` sets of a vocabulary, of which nothing is set before.
    pub fn filled<E>(vocab_size: u32, fill: impl FnOnce(&mut [u32]) -> Result<(), E>) -> Result<Self, E> {
        let mut words = vec![0; (vocab_size as usize).div_ceil(BITS)];
        fill(&mut words)?;
        // A grammar may know nothing of where the vocabulary ends.
        if let (Some(last), rest @ 1..) = (words.last_mut(), vocab_size as usize % BITS) {
            *last &= u32::MAX >> (BITS - rest);
        }
        Ok(Self { words, vocab_size })
    }

    /// Takes tokens out; answers those that were in.
    pub fn take(&mut self, ids: &[u32]) -> Vec<u32> {
        let taken = ids.iter().copied().filter(|id| {
            let bit = 1 << (*id as usize % BITS);
            let Some(word) = self.words.get_mut(*id as usize / BITS) else { return false };
            let was_in = *word & bit != 0;
            *word &= !bit;
            was_in
        });
        taken.collect()
    }

    /// Puts tokens of the vocabulary in.
    pub fn put(&mut self, ids: &[u32]) {
        for id in ids.iter().filter(|id| **id < self.vocab_size) {
            self.words[*id as usize / BITS] |= 1 << (*id as usize % BITS);
        }
    }

    /// Whether no token may come.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }

    /// One truth a token, `[1, 1, vocab]`. Bits go to the device, a 32nd of what truths would take on the way.
    fn expanded(&self) -> Result<Array, Exception> {
        let words = Array::from_slice(&self.words, &[self.words.len() as i32, 1]);
        let bits: Vec<u32> = (0..BITS).map(|bit| 1 << bit).collect();
        let set = ffi::bitwise_and(&words, &Array::from_slice(&bits, &[1, BITS as i32]))?;
        let allowed = set.ne(Array::from_slice(&[0_u32], &[1]))?.reshape(&[1, 1, (self.words.len() * BITS) as i32])?;
        ffi::slice(&allowed, [0, 0, 0], [1, 1, self.vocab_size as i32])
    }
}

/// Masks that the device has. Grammars come back to the same places, and what the host writes to memory that the device read
/// before is slow on its way: of a step of 4 ms of eight rows, 0.4.
#[derive(Debug)]
pub struct Masks {
    /// One truth a token, `[1, 1, vocab]`.
    kept: LruCache<Mask, Array>,
}

impl Default for Masks {
    fn default() -> Self {
        Self { kept: LruCache::new(KEPT_MAX) }
    }
}

impl Masks {
    /// `logits`, `[rows, 1, vocab]`, without what the rows' masks do not allow. Rows without a mask stay as they are.
    pub fn applied(&mut self, logits: &Array, masks: &[Option<&Mask>]) -> Result<Array, Exception> {
        let vocab = logits.dim(2);
        let rows = masks.iter().map(|mask| match mask {
            Some(mask) if mask.vocab_size == vocab as u32 => self.on_device(mask),
            Some(_) => Err(Exception::custom("a mask is of another vocabulary")),
            None => ops::ones::<bool>(&[1, 1, vocab]),
        });
        let rows = rows.collect::<Result<Vec<_>, Exception>>()?;
        let allowed = match &rows[..] {
            [one] => one.clone(),
            several => ops::concatenate(several, 0)?,
        };
        ops::select(&allowed, logits, scalar(f32::NEG_INFINITY, logits.dtype())?)
    }

    fn on_device(&mut self, mask: &Mask) -> Result<Array, Exception> {
        if let Some(array) = self.kept.get(mask) {
            return Ok(array.clone());
        }
        let array = mask.expanded()?;
        self.kept.put(mask.clone(), array.clone());
        Ok(array)
    }
}
