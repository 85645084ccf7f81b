//! What a model keeps between passes, as data: keys and values (of all positions, or of a window), latents, and states
//! of recurrences and convolutions.
//!
//! A cache is cloned to take a snapshot and assigned to restore one: arrays are shared until one side writes. Rows of
//! several caches are put together into a batch, and taken out of it again ([`Cache::merge`], [`Cache::select`]); what is
//! worth keeping of one sequence is taken out in parts that a tree of prefixes can hold ([`kept`]).

pub mod kept;
mod positions;
mod rows;

use mlx_rs::{Array, error::Exception};

use crate::pass::{Pass, Row};

pub use positions::Positions;

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
    /// Absent for one sequence, or several that are alike.
    rows: Option<Vec<Row>>,
}

impl Cache {
    /// Empty, for one sequence or for several of equal length.
    pub fn new(layout: &[CacheKind]) -> Self {
        Self { layers: layout.iter().map(LayerCache::new).collect(), length: 0, horizon: 0, rows: None }
    }

    /// Empty, for rows that begin with so many columns of padding.
    pub fn padded(layout: &[CacheKind], padding: &[i32]) -> Self {
        let rows = padding.iter().map(|padding| Row { padding: *padding, horizon: 0 }).collect();
        Self { rows: Some(rows), ..Self::new(layout) }
    }

    /// Rows held; caches that were not told have one.
    pub fn batch(&self) -> usize {
        self.rows.as_ref().map_or(1, Vec::len)
    }

    /// Columns of padding before each row.
    pub fn padding(&self) -> Vec<i32> {
        self.rows.as_ref().map_or_else(|| vec![0], |rows| rows.iter().map(|row| row.padding).collect())
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
        let alike = || vec![Row { padding: 0, horizon: 0 }; tokens.dim(0).max(0) as usize];
        let mut rows = self.rows.clone().unwrap_or_else(alike);
        for row in &mut rows {
            row.horizon = row.horizon.max(self.horizon);
        }
        Pass::new(rows, tokens.dim(1), self.length)
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
