//! Keys and values, or latents, of positions.

use mlx_rs::{Array, error::Exception, ops};

use super::STEP_TOKENS;
use crate::ffi;

/// Values of positions in buffers that grow by [`STEP_TOKENS`], of the dtype of the first ones written. With a window,
/// only the last positions are kept; what is kept stays in order.
#[derive(Clone, Debug)]
pub struct Positions {
    pub(super) window: Option<i32>,
    pub(super) buffers: Vec<Array>,
    /// The column that the buffers begin with.
    pub(super) first: i32,
    pub(super) length: i32,
}

impl Positions {
    pub(super) fn new(window: Option<i32>) -> Self {
        Self { window, buffers: Vec::new(), first: 0, length: 0 }
    }

    /// Columns seen so far.
    pub fn len(&self) -> i32 {
        self.length
    }

    /// True if no position was seen.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends `new`, each `[batch, heads, time, …]`, and returns views of what the queries of these positions may see:
    /// all, or what the window reaches.
    pub fn update<const N: usize>(&mut self, new: [&Array; N]) -> Result<[Array; N], Exception> {
        let time = new.first().map_or(0, |array| array.dim(2));
        let end = self.length + time;
        let reach = self.window.map_or(self.first, |window| self.first.max(self.length + 1 - window));
        let capacity = self.buffers.first().map_or(0, |buffer| buffer.dim(2));
        if end - self.first > capacity {
            self.grow(new, reach, end)?;
        }
        let mut buffers = std::mem::take(&mut self.buffers);
        if buffers.len() != N {
            return Err(Exception::custom("a layer's cache holds another number of arrays"));
        }
        let mut views = Vec::with_capacity(N);
        for (buffer, new) in buffers.iter_mut().zip(new) {
            let (start, stop) =
                ([0, 0, self.length - self.first, 0], [new.dim(0), new.dim(1), end - self.first, new.dim(3)]);
            *buffer = ffi::slice_update(buffer, new, start, stop)?;
            views.push(columns(buffer, reach - self.first, end - self.first)?);
        }
        self.buffers = buffers;
        self.length = end;
        views.try_into().map_err(|_| Exception::custom("a layer's cache holds another number of arrays"))
    }

    /// New buffers with room up to `end`, and what was kept from `reach` on.
    fn grow<const N: usize>(&mut self, new: [&Array; N], reach: i32, end: i32) -> Result<(), Exception> {
        let first = if self.window.is_some() { reach } else { self.first };
        let kept = self.length - first;
        let room = (end - first + STEP_TOKENS - 1) / STEP_TOKENS * STEP_TOKENS;
        let held = std::mem::take(&mut self.buffers);
        for (index, new) in new.into_iter().enumerate() {
            let zeros = ops::zeros_dtype(&[new.dim(0), new.dim(1), room - kept, new.dim(3)], new.dtype())?;
            let buffer = match held.get(index) {
                Some(held) if kept > 0 => {
                    let kept = columns(held, first - self.first, self.length - self.first)?;
                    ops::concatenate(&[kept, zeros], 2)?
                }
                _ => zeros,
            };
            self.buffers.push(buffer);
        }
        self.first = first;
        Ok(())
    }

    pub(super) fn can_trim(&self, length: i32) -> bool {
        length >= self.length || self.window.is_none_or(|window| self.first == 0 || length - self.first >= window - 1)
    }

    /// What was written stays until it is overwritten.
    pub(super) fn trim(&mut self, length: i32) {
        if length == 0 {
            self.first = 0;
        }
        self.length = self.length.min(length);
    }
}

pub(super) fn columns(x: &Array, start: i32, stop: i32) -> Result<Array, Exception> {
    if start == 0 && stop == x.dim(2) {
        return Ok(x.clone());
    }
    ffi::slice(x, [0, 0, start, 0], [x.dim(0), x.dim(1), stop, x.dim(3)])
}
