//! What a model keeps between passes, as data: keys and values (of all positions, or of a window), latents, and states
//! of recurrences and convolutions.
//!
//! A cache is cloned to take a snapshot and assigned to restore one: arrays are shared until one side writes.

use mlx_rs::{Array, error::Exception, ops};

use crate::{ffi, pass::Pass};

/// Buffers grow by this many positions.
pub const STEP_TOKENS: i32 = 256;

/// What a layer keeps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CacheKind {
    /// Every position: keys and values, or latents.
    Full,
    /// The last positions: what a query that sees so many needs. Also called rotating.
    Window(i32),
    /// A state of fixed size: of a recurrence, a convolution, or both.
    State,
    /// Nothing of its own: it reads what an earlier layer keeps.
    Shared,
}

/// A trim that was asked for cannot be done: the positions to go back to are gone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("what was kept of {held} tokens does not reach back to {wanted}")]
pub struct CannotTrim {
    /// Tokens held.
    pub held: i32,
    /// Tokens that should have been left.
    pub wanted: i32,
}

/// Everything that a model keeps of a batch of sequences.
#[derive(Clone, Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
    length: i32,
    horizon: i32,
    padding: Option<Vec<i32>>,
}

impl Cache {
    /// Empty, for one sequence or for several of equal length.
    pub fn new(layout: &[CacheKind]) -> Self {
        Self { layers: layout.iter().map(LayerCache::new).collect(), length: 0, horizon: 0, padding: None }
    }

    /// Empty, for rows that begin with so many columns of padding.
    pub fn padded(layout: &[CacheKind], padding: &[i32]) -> Self {
        Self { padding: Some(padding.to_vec()), ..Self::new(layout) }
    }

    /// Columns held.
    pub fn len(&self) -> i32 {
        self.length
    }

    /// True if nothing is held.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Says how long the sequence is known to become, in tokens, before its first pass; see [`Pass::horizons`].
    pub fn expect(&mut self, length: i32) {
        self.horizon = self.horizon.max(length);
    }

    /// What layers have to know of a pass over `tokens`, `[batch, time]`.
    pub fn begin(&self, tokens: &Array) -> Pass {
        Pass::new(tokens.dim(0), tokens.dim(1), self.length, self.horizon, self.padding.as_deref())
    }

    /// The layers' caches.
    pub fn layers(&mut self) -> &mut [LayerCache] {
        &mut self.layers
    }

    /// Counts the tokens of a pass that every layer has seen.
    pub fn advance(&mut self, pass: &Pass) {
        self.length += pass.time();
    }

    /// Whether [`trim`](Self::trim) would succeed.
    pub fn can_trim(&self, length: i32) -> bool {
        length == 0 || self.layers.iter().all(|layer| layer.can_trim(self.length, length.min(self.length)))
    }

    /// Forgets all but the first `length` columns. On an error nothing has changed.
    pub fn trim(&mut self, length: i32) -> Result<(), CannotTrim> {
        let length = length.clamp(0, self.length);
        if !self.can_trim(length) {
            return Err(CannotTrim { held: self.length, wanted: length });
        }
        for layer in &mut self.layers {
            layer.trim(length);
        }
        self.length = length;
        Ok(())
    }

    /// All arrays held, for evaluation.
    pub fn arrays(&self) -> impl Iterator<Item = &Array> {
        self.layers.iter().flat_map(LayerCache::arrays)
    }
}

/// What one layer keeps.
#[derive(Clone, Debug)]
pub enum LayerCache {
    /// Keys and values, or latents.
    Positions(Positions),
    /// States of fixed size, in the layer's own order.
    State(Vec<Option<Array>>),
    /// Nothing.
    Shared,
}

impl LayerCache {
    fn new(kind: &CacheKind) -> Self {
        match *kind {
            CacheKind::Full => Self::Positions(Positions::new(None)),
            CacheKind::Window(window) => Self::Positions(Positions::new(Some(window))),
            CacheKind::State => Self::State(Vec::new()),
            CacheKind::Shared => Self::Shared,
        }
    }

    /// The positions kept; an error if the layer keeps something else.
    pub fn positions(&mut self) -> Result<&mut Positions, Exception> {
        match self {
            Self::Positions(positions) => Ok(positions),
            _ => Err(Exception::custom("an attention layer was given a cache without positions")),
        }
    }

    /// `count` states, absent at first; an error if the layer keeps something else.
    pub fn states(&mut self, count: usize) -> Result<&mut [Option<Array>], Exception> {
        match self {
            Self::State(states) => {
                states.resize(count, None);
                Ok(states)
            }
            _ => Err(Exception::custom("a recurrent layer was given a cache without state")),
        }
    }

    fn can_trim(&self, held: i32, length: i32) -> bool {
        match self {
            Self::Positions(positions) => positions.can_trim(length),
            Self::State(_) => length == held,
            Self::Shared => true,
        }
    }

    /// Only after `can_trim`.
    fn trim(&mut self, length: i32) {
        match self {
            Self::Positions(positions) => positions.trim(length),
            Self::State(states) if length == 0 => states.clear(),
            Self::State(_) | Self::Shared => {}
        }
    }

    fn arrays(&self) -> impl Iterator<Item = &Array> {
        let (positions, states): (&[Array], &[Option<Array>]) = match self {
            Self::Positions(positions) => (&positions.buffers, &[]),
            Self::State(states) => (&[], states),
            Self::Shared => (&[], &[]),
        };
        positions.iter().chain(states.iter().flatten())
    }
}

/// Values of positions in buffers that grow by [`STEP_TOKENS`], of the dtype of the first ones written. With a window,
/// only the last positions are kept; what is kept stays in order.
#[derive(Clone, Debug)]
pub struct Positions {
    window: Option<i32>,
    buffers: Vec<Array>,
    /// The column that the buffers begin with.
    first: i32,
    length: i32,
}

impl Positions {
    fn new(window: Option<i32>) -> Self {
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

    fn can_trim(&self, length: i32) -> bool {
        length >= self.length || self.window.is_none_or(|window| self.first == 0 || length - self.first >= window - 1)
    }

    /// What was written stays until it is overwritten.
    fn trim(&mut self, length: i32) {
        if length == 0 {
            self.first = 0;
        }
        self.length = self.length.min(length);
    }
}

fn columns(x: &Array, start: i32, stop: i32) -> Result<Array, Exception> {
    if start == 0 && stop == x.dim(2) {
        return Ok(x.clone());
    }
    ffi::slice(x, [0, 0, start, 0], [x.dim(0), x.dim(1), stop, x.dim(3)])
}
