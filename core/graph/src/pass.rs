//! One forward pass over a batch: where its tokens stand, and the masks that follow from it.
//!
//! Rows of a batch end at the same column. Shorter ones begin with padding, so that column `c` of row `b` is position
//! `c - padding[b]` of that row. Nothing of a row depends on its padding.

use std::{cell::RefCell, collections::HashMap};

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    fast::{self, ScaledDotProductAttentionMask as Mask},
    ops,
};

use crate::elementwise::{scalar, softcap};

/// What one pass computes, as far as its layers have to know.
#[derive(Debug)]
pub struct Pass {
    batch: i32,
    time: i32,
    offset: i32,
    horizons: Vec<i32>,
    padding: Option<Vec<i32>>,
    /// Made on first use, then shared by all layers: a mask by window and length.
    masks: RefCell<HashMap<(Option<i32>, i32), Array>>,
    /// Each row's position of the first column, `[batch]`; only where rows are padded.
    starts: Option<Array>,
    /// The same for rows without padding, made on first use.
    row_positions: RefCell<Option<Array>>,
}

/// One row of a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Row {
    /// Columns of padding before its first token.
    pub padding: i32,
    /// The length that it is known or expected to reach, in tokens.
    pub horizon: i32,
}

impl Pass {
    /// `rows` of `time` tokens each, after `offset` columns.
    pub(crate) fn new(rows: Vec<Row>, time: i32, offset: i32) -> Self {
        let batch = rows.len() as i32;
        let padding: Vec<i32> = rows.iter().map(|row| row.padding).collect();
        let padding = Some(padding).filter(|padding| padding.iter().any(|count| *count > 0));
        let starts = padding.as_ref().map(|padding| {
            let starts: Vec<i32> = padding.iter().map(|count| offset - count).collect();
            Array::from_slice(&starts, &[batch])
        });
        let horizons = rows.iter().map(|row| row.horizon.max(offset + time - row.padding)).collect();
        Self {
            batch,
            time,
            offset,
            horizons,
            padding,
            masks: RefCell::default(),
            starts,
            row_positions: RefCell::default(),
        }
    }

    /// Rows.
    pub fn batch(&self) -> i32 {
        self.batch
    }

    /// Tokens a row.
    pub fn time(&self) -> i32 {
        self.time
    }

    /// Columns before this pass.
    pub fn offset(&self) -> i32 {
        self.offset
    }

    /// The length that each row is known or expected to reach, in tokens; never less than it has after this pass. Rotary
    /// scalings that differ between short and long sequences go by it.
    pub fn horizons(&self) -> &[i32] {
        &self.horizons
    }

    /// Whether the pass has one token in all, and no padding before it.
    pub fn is_single(&self) -> bool {
        self.batch * self.time == 1 && self.starts.is_none()
    }

    /// The position of each row's first token, `[batch]`; `None` where it is [`offset`](Self::offset) for all.
    pub(crate) fn starts(&self) -> Option<&Array> {
        self.starts.as_ref()
    }

    /// The position of each row's first token, `[batch]`, also where it is the same for all.
    pub(crate) fn row_positions(&self) -> Array {
        let alike = || Array::from_slice(&vec![self.offset; self.batch as usize], &[self.batch]);
        self.starts.clone().unwrap_or_else(|| self.row_positions.borrow_mut().get_or_insert_with(alike).clone())
    }

    /// Positions in f32, `[batch or 1, 1, time, 1]`.
    pub fn positions(&self) -> Result<Array, Exception> {
        let from_zero = ops::arange::<_, f32>(0, self.time, None)?.reshape(&[1, 1, self.time, 1])?;
        match &self.starts {
            Some(starts) => from_zero.add(starts.as_dtype(Dtype::Float32)?.reshape(&[self.batch, 1, 1, 1])?),
            None => from_zero.add(Array::from_f32(self.offset as f32)),
        }
    }

    /// `x`, `[batch, time, …]`, with zeros in place of padding. What carries state from column to column passes through
    /// here, so that a padded row starts like a fresh one.
    pub fn without_padding(&self, x: &Array) -> Result<Array, Exception> {
        let Some(padding) = self.padding.as_ref().filter(|padding| padding.iter().any(|count| *count > self.offset))
        else {
            return Ok(x.clone());
        };
        let columns = ops::arange::<_, i32>(self.offset, self.offset + self.time, None)?.reshape(&[1, self.time])?;
        let padding = Array::from_slice(padding, &[self.batch, 1]);
        let mut shape = vec![self.batch, self.time];
        shape.resize(x.ndim(), 1);
        let real = columns.ge(&padding)?.reshape(&shape)?;
        ops::select(&real, x, scalar(0.0, x.dtype())?)
    }

    /// What each query may see of `length` columns that end with this pass: `[1 or batch, 1, time, length]`, true where
    /// it may look.
    fn mask(&self, window: Option<i32>, length: i32) -> Result<Array, Exception> {
        let mut masks = self.masks.borrow_mut();
        if let Some(mask) = masks.get(&(window, length)) {
            return Ok(mask.clone());
        }
        let end = self.offset + self.time;
        let queries = ops::arange::<_, i32>(self.offset, end, None)?.reshape(&[1, 1, self.time, 1])?;
        let keys = ops::arange::<_, i32>(end - length, end, None)?.reshape(&[1, 1, 1, length])?;
        let mut mask = keys.le(&queries)?;
        if let Some(window) = window {
            mask = mask.logical_and(keys.gt(queries.subtract(Array::from_int(window))?)?)?;
        }
        if let Some(padding) = &self.padding {
            let real = keys.ge(Array::from_slice(padding, &[self.batch, 1, 1, 1]))?;
            // Padding looks at itself: a query that sees nothing would be divided by zero, and poison its values.
            mask = mask.logical_and(real)?.logical_or(keys.eq(&queries)?)?;
        }
        masks.insert((window, length), mask.clone());
        Ok(mask)
    }

    /// The same where it cannot be said by [`Mask::Causal`] or by nothing at all.
    fn mask_of(&self, window: Option<i32>, length: i32) -> Result<Seen, Exception> {
        let window = window.filter(|window| *window < length);
        if self.padding.is_some() || (window.is_some() && self.time > 1) {
            return Ok(Seen::Masked(self.mask(window, length)?));
        }
        Ok(if self.time == 1 { Seen::All } else { Seen::Causal })
    }

    /// Causal attention of `q` (`[batch, heads, time, head_dim]`) over `k` and `v` (`[batch, kv_heads, length, …]`),
    /// whose last columns are the queries' own. Of one query's window, `k` and `v` hold no more than the window.
    pub fn attend(&self, q: &Array, k: &Array, v: &Array, how: &Attend<'_>) -> Result<Array, Exception> {
        if let Some(cap) = how.softcap {
            return self.attend_capped(q, k, v, how.scale, cap, how.window);
        }
        // MLX's fused kernels keep scores and weights in f32, and begin at heads of this size; below, it would round both
        // to half floats.
        const FUSED_FROM: i32 = 64;
        let dtype = q.dtype();
        if q.dim(-1) < FUSED_FROM && dtype != Dtype::Float32 {
            let [q, k, v] = [q.as_dtype(Dtype::Float32)?, k.as_dtype(Dtype::Float32)?, v.as_dtype(Dtype::Float32)?];
            return self.attend(&q, &k, &v, how)?.as_dtype(dtype);
        }
        let sinks = how.sinks.map(|sinks| sinks.as_dtype(dtype)).transpose()?;
        let sinks = sinks.as_ref();
        match &self.mask_of(how.window, k.dim(2))? {
            Seen::All => fast::scaled_dot_product_attention(q, k, v, how.scale, None, sinks),
            Seen::Causal => fast::scaled_dot_product_attention(q, k, v, how.scale, Mask::Causal, sinks),
            Seen::Masked(mask) => fast::scaled_dot_product_attention(q, k, v, how.scale, mask, sinks),
        }
    }

    /// Attention in plain operations, for scores that are capped before the softmax.
    fn attend_capped(
        &self,
        q: &Array,
        k: &Array,
        v: &Array,
        scale: f32,
        cap: f32,
        window: Option<i32>,
    ) -> Result<Array, Exception> {
        let (heads, kv_heads, length) = (q.dim(1), k.dim(1), k.dim(2));
        let grouped = [self.batch, kv_heads, heads / kv_heads, self.time, q.dim(3)];
        let q = q.multiply(scalar(scale, q.dtype())?)?.reshape(&grouped)?;
        let (k, v) = (k.expand_dims(2)?, v.expand_dims(2)?);
        let scores = softcap(&ops::matmul(&q, k.swap_axes(-1, -2)?)?, cap)?;
        let scores = match self.mask_of(window, length)? {
            Seen::All => scores,
            _ => {
                let mask = self.mask(window.filter(|window| *window < length), length)?.expand_dims(1)?;
                ops::select(&mask, &scores, scalar(f32::NEG_INFINITY, scores.dtype())?)?
            }
        };
        let weights = ops::softmax_axis(&scores, -1, true)?;
        ops::matmul(&weights, &v)?.reshape(&[self.batch, heads, self.time, v.dim(-1)])
    }
}

enum Seen {
    All,
    Causal,
    Masked(Array),
}

/// How scores become weights.
#[derive(Clone, Copy, Debug)]
pub struct Attend<'a> {
    /// Multiplies the scores.
    pub scale: f32,
    /// Positions a query sees, itself included, where limited.
    pub window: Option<i32>,
    /// `cap · tanh(score / cap)`, where capped.
    pub softcap: Option<f32>,
    /// A learned score for each head that takes weight and gives nothing.
    pub sinks: Option<&'a Array>,
}
