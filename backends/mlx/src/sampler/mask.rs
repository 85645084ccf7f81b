//! The tokens that may come next, one bit each.

use mesh_graph::{elementwise::scalar, ffi};
use mlx_rs::{Array, error::Exception, ops};

/// Bits of a word.
const BITS: usize = u32::BITS as usize;

/// Tokens that may come next: bit `i % 32` of word `i / 32` for token `i`.
#[derive(Clone, Debug, PartialEq, Eq)]
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

    /// The same without some tokens.
    pub fn without(&self, ids: &[u32]) -> Self {
        let mut words = self.words.clone();
        for id in ids.iter().map(|id| *id as usize) {
            if let Some(word) = words.get_mut(id / BITS) {
                *word &= !(1 << (id % BITS));
            }
        }
        Self { words, ..*self }
    }

    /// Whether no token may come.
    pub fn is_empty(&self) -> bool {
        self.words.iter().all(|word| *word == 0)
    }
}

/// `logits`, `[rows, 1, vocab]`, without what the rows' masks do not allow. Rows without a mask stay as they are.
///
/// Bits go to the device, and become one truth a token there: a 32nd of what that takes on the way.
pub fn masked(logits: &Array, masks: &[Option<&Mask>]) -> Result<Array, Exception> {
    let (rows, vocab) = (logits.dim(0), logits.dim(2));
    let width = (vocab as usize).div_ceil(BITS);
    let mut words = Vec::with_capacity(masks.len() * width);
    for mask in masks {
        match mask {
            Some(mask) if mask.vocab_size == vocab as u32 => words.extend_from_slice(&mask.words),
            Some(_) => return Err(Exception::custom("a mask is of another vocabulary")),
            None => words.resize(words.len() + width, u32::MAX),
        }
    }
    let words = Array::from_slice(&words, &[rows, width as i32, 1]);
    let bits: Vec<u32> = (0..BITS).map(|bit| 1 << bit).collect();
    let set = ffi::bitwise_and(&words, &Array::from_slice(&bits, &[1, 1, BITS as i32]))?;
    let allowed = set.ne(Array::from_slice(&[0_u32], &[1]))?.reshape(&[rows, 1, (width * BITS) as i32])?;
    let allowed = ffi::slice(&allowed, [0, 0, 0], [rows, 1, vocab])?;
    ops::select(&allowed, logits, scalar(f32::NEG_INFINITY, logits.dtype())?)
}
