//! Keys and values kept between steps.

use mlx_rs::{Array, error::Exception, ops};

use crate::ffi;

/// Buffers grow by this many positions.
pub const STEP_TOKENS: i32 = 256;

/// One layer's keys and values, in buffers of the dtype of the first ones written.
#[derive(Debug, Default)]
pub struct LayerCache {
    buffers: Option<(Array, Array)>,
    length: i32,
}

impl LayerCache {
    /// Positions held.
    pub fn len(&self) -> i32 {
        self.length
    }

    /// True if no position is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Appends `keys` and `values`, `[batch, kv_heads, time, head_dim]` each, and returns views of all held.
    pub fn update(&mut self, keys: &Array, values: &Array) -> Result<(Array, Array), Exception> {
        let time = keys.dim(2);
        let end = self.length + time;
        let (mut k, mut v) = match self.buffers.take() {
            Some((k, v)) if end <= k.dim(2) => (k, v),
            held => {
                let missing = end - held.as_ref().map_or(0, |(k, _)| k.dim(2));
                let extra = (missing + STEP_TOKENS - 1) / STEP_TOKENS * STEP_TOKENS;
                let grow = |held: Option<Array>, like: &Array| -> Result<Array, Exception> {
                    let shape = [like.dim(0), like.dim(1), extra, like.dim(3)];
                    let zeros = ops::zeros_dtype(&shape, like.dtype())?;
                    held.map_or(Ok(zeros.clone()), |held| ops::concatenate(&[held, zeros], 2))
                };
                let (k, v) = held.map_or((None, None), |(k, v)| (Some(k), Some(v)));
                (grow(k, keys)?, grow(v, values)?)
            }
        };
        let write = |buffer: &Array, new: &Array| {
            ffi::slice_update(buffer, new, [0, 0, self.length, 0], [new.dim(0), new.dim(1), end, new.dim(3)])
        };
        k = write(&k, keys)?;
        v = write(&v, values)?;
        self.length = end;
        let views = (self.view(&k)?, self.view(&v)?);
        self.buffers = Some((k, v));
        Ok(views)
    }

    fn view(&self, buffer: &Array) -> Result<Array, Exception> {
        if buffer.dim(2) == self.length {
            return Ok(buffer.clone());
        }
        ffi::slice(buffer, [0, 0, 0, 0], [buffer.dim(0), buffer.dim(1), self.length, buffer.dim(3)])
    }

    /// Forgets all but the first `length` positions. What was written stays until it is overwritten.
    pub fn trim(&mut self, length: i32) {
        self.length = self.length.min(length.max(0));
    }

    /// The buffers, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.buffers.iter().flat_map(|(k, v)| [k, v])
    }
}
