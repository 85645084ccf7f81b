//! Sequences that write together: one forward pass a step, whatever their lengths.

use mesh_core::TokenLogprob;
use mesh_graph::Cache;
use mlx_rs::{
    Array,
    error::Exception,
    ops::{self, indexing},
    transforms,
};

use crate::{
    sampler::{Drawn, Likely},
    schedule::Id,
};

/// A batch. Every row's cache holds all tokens before the one in `current`.
pub struct Group {
    /// Who stands in which row.
    pub rows: Vec<Id>,
    /// What is held of them.
    pub cache: Cache,
    /// The token that each row is fed next, `[rows, 1]`; it may not be computed yet.
    pub current: Array,
    /// Whether a row's token was drawn and not read yet; otherwise it is the last that is known of the row.
    pub unread: Vec<bool>,
    /// How likely a row's drawn token was, where that is reported.
    likely: Vec<Option<Likely>>,
}

/// A token that was drawn and read.
#[derive(Clone, Debug, PartialEq)]
pub struct Written {
    /// Which.
    pub id: u32,
    /// How likely it was, where that is reported.
    pub logprob: Option<Box<TokenLogprob>>,
}

impl Group {
    /// One sequence, about to be fed its last known token.
    pub fn new(id: Id, cache: Cache, token: u32) -> Self {
        let current = Array::from_slice(&[token], &[1, 1]);
        Self { rows: vec![id], cache, current, unread: vec![false], likely: vec![None] }
    }

    /// Has every row fed next what was drawn for it.
    pub fn feed(&mut self, drawn: Drawn) {
        self.current = drawn.tokens;
        self.likely = drawn.likely;
        self.unread.fill(true);
    }

    /// The lengths of the shortest and the longest row, in tokens held, and how many there are.
    pub fn extent(&self) -> (u32, u32, usize) {
        let lengths = self.cache.lengths();
        let least = lengths.iter().min().copied().unwrap_or(0);
        let most = lengths.iter().max().copied().unwrap_or(0);
        (least as u32, most as u32, self.rows.len())
    }

    /// Has the device compute the drawn tokens before anything that is submitted later.
    pub fn submit(&self) -> Result<(), Exception> {
        transforms::async_eval(self.drawn())
    }

    /// Submits the first quarter of a pass that was put together: what its first layers leave behind. Less would be over
    /// before the rest comes, and what is submitted before a token is read delays those who wait for it.
    pub fn submit_part(&self) -> Result<(), Exception> {
        let held = self.cache.arrays().count();
        match self.cache.arrays().nth(held / 4) {
            Some(held) => transforms::async_eval([held]),
            None => Ok(()),
        }
    }

    fn drawn(&self) -> impl Iterator<Item = &Array> {
        std::iter::once(&self.current).chain(self.likely.iter().flatten().map(Likely::array))
    }

    /// Reads the drawn tokens: waits for the device. Rows whose token is known already get `None`.
    pub fn read(&mut self) -> Result<Vec<Option<Written>>, Exception> {
        if !self.unread.contains(&true) {
            return Ok(vec![None; self.rows.len()]);
        }
        transforms::eval(self.drawn())?;
        let ids = self.current.to_vec_exact::<u32>().map_err(|error| Exception::custom(error.to_string()))?;
        let read = ids.into_iter().zip(&self.unread).zip(&self.likely).map(|((id, unread), likely)| {
            let written = || {
                let logprob = likely.as_ref().map(|likely| likely.read(id).map(Box::new)).transpose()?;
                Ok(Written { id, logprob })
            };
            unread.then(written).transpose()
        });
        let read = read.collect::<Result<_, Exception>>()?;
        self.unread.fill(false);
        self.likely.fill(None);
        Ok(read)
    }

    /// The rows that `keep` names by their index, in order; `None` if there are none.
    pub fn only(self, keep: &[usize]) -> Result<Option<Self>, Exception> {
        if keep.len() == self.rows.len() {
            return Ok(Some(self));
        }
        if keep.is_empty() {
            return Ok(None);
        }
        self.picked(keep).map(Some)
    }

    /// A group of the rows `picked`, which stay here too.
    pub fn picked(&self, picked: &[usize]) -> Result<Self, Exception> {
        let indices: Vec<i32> = picked.iter().map(|row| *row as i32).collect();
        let current = indexing::take_axis(&self.current, Array::from_slice(&indices, &[indices.len() as i32]), 0)?;
        Ok(Self {
            rows: picked.iter().map(|row| self.rows[*row]).collect(),
            cache: self.cache.select(picked)?,
            current,
            unread: picked.iter().map(|row| self.unread[*row]).collect(),
            likely: picked.iter().map(|row| self.likely[*row].clone()).collect(),
        })
    }

    /// One group of both.
    pub fn join(self, other: Self) -> Result<Self, Exception> {
        let cache = Cache::merge(&[self.cache, other.cache])?;
        let current = ops::concatenate(&[self.current, other.current], 0)?;
        let rows = [self.rows, other.rows].concat();
        let unread = [self.unread, other.unread].concat();
        let likely = [self.likely, other.likely].concat();
        Ok(Self { rows, cache, current, unread, likely })
    }
}
