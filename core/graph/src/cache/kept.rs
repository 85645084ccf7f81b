//! What is kept of one sequence beyond its generation, in two parts: what belongs to each token and can be cut anywhere
//! (the keys and values of full attention), and what belongs to a point between tokens (windows and states).
//!
//! Parts are copies: they share no memory with the cache they were taken from.

use mlx_rs::{
    Array,
    error::Exception,
    ops::{self, indexing},
};

use super::{
    Cache, CacheKind, LayerCache, STEP_TOKENS,
    positions::{Positions, columns},
};

/// What layers of full attention keep of a run of tokens: arrays `[1, heads, tokens, …]`.
#[derive(Clone, Debug)]
pub struct Segment {
    /// How many tokens.
    pub tokens: usize,
    /// In the order of layers.
    pub arrays: Vec<Array>,
}

/// What layers with windows and states keep at a point.
#[derive(Clone, Debug)]
pub struct Point {
    /// In the order of layers.
    pub arrays: Vec<Array>,
}

/// How the caches of a model are built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blueprint(Vec<Plan>);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Plan {
    Full { buffers: usize },
    Window { window: i32, buffers: usize },
    State { states: usize },
    Shared,
}

/// Whether a sequence can be taken up again only where a [`Point`] was kept.
pub fn needs_points(layout: &[CacheKind]) -> bool {
    layout.iter().any(|kind| matches!(kind, CacheKind::Window(_) | CacheKind::State))
}

impl Segment {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        bytes(&self.arrays)
    }

    /// The first `at` tokens, and the rest; both evaluated copies.
    pub fn split(&self, at: usize) -> Result<(Self, Self), Exception> {
        let cut = |start: usize, stop: usize| {
            let arrays = self.arrays.iter().map(|array| copied(array, start as i32, stop as i32));
            let arrays = evaluated(arrays.collect::<Result<_, _>>()?)?;
            Ok::<_, Exception>(Self { tokens: stop - start, arrays })
        };
        let at = at.min(self.tokens);
        Ok((cut(0, at)?, cut(at, self.tokens)?))
    }
}

impl Point {
    /// Bytes held.
    pub fn bytes(&self) -> u64 {
        bytes(&self.arrays)
    }
}

impl Cache {
    /// What full attention keeps of the tokens `from..to` of a single sequence, as evaluated copies.
    pub fn segment(&self, from: i32, to: i32) -> Result<Segment, Exception> {
        let full = self.layers.iter().filter_map(|layer| match layer {
            LayerCache::Positions(positions) if positions.window.is_none() => Some(positions),
            _ => None,
        });
        let arrays = full.flat_map(|positions| positions.buffers.iter().map(|buffer| copied(buffer, from, to)));
        let arrays = evaluated(arrays.collect::<Result<_, _>>()?)?;
        Ok(Segment { tokens: (to - from).max(0) as usize, arrays })
    }

    /// What windows and states keep of a single sequence where it ends, as evaluated copies.
    pub fn point(&self) -> Result<Point, Exception> {
        let mut arrays = Vec::new();
        for layer in &self.layers {
            match layer {
                LayerCache::Positions(Positions { window: Some(window), buffers, first, length }) => {
                    let from = (*first).max(length + 1 - window);
                    for buffer in buffers {
                        arrays.push(copied(buffer, from - first, length - first)?);
                    }
                }
                // Replaced by each pass, never written into: no copy is needed.
                LayerCache::State(states) => arrays.extend(states.iter().flatten().cloned()),
                LayerCache::Positions(_) | LayerCache::Shared => {}
            }
        }
        Ok(Point { arrays: evaluated(arrays)? })
    }

    /// The cache of a single sequence of `length` tokens that is put together from `segments`, each with how many of its
    /// tokens count, and the point where they end.
    pub fn restore(
        blueprint: &Blueprint,
        segments: &[(&Segment, usize)],
        point: Option<&Point>,
        length: i32,
    ) -> Result<Self, Exception> {
        let mut points = point.map_or(&[][..], |point| &point.arrays[..]).iter();
        let mut next = || points.next().cloned().ok_or_else(|| Exception::custom("a kept point lacks an array"));
        let mut index = 0;
        let layers = blueprint.0.iter().map(|layer| {
            Ok(match *layer {
                Plan::Full { buffers } => {
                    let buffers = (0..buffers).map(|_| {
                        let runs = segments.iter().map(|(segment, count)| {
                            let array = segment.arrays.get(index);
                            let array = array.ok_or_else(|| Exception::custom("a kept segment lacks an array"))?;
                            columns(array, 0, *count as i32)
                        });
                        let runs = runs.collect::<Result<Vec<_>, Exception>>()?;
                        index += 1;
                        with_room(runs)
                    });
                    let buffers = buffers.collect::<Result<_, Exception>>()?;
                    LayerCache::Positions(Positions { window: None, buffers, first: 0, length })
                }
                Plan::Window { window, buffers } => {
                    let runs = (0..buffers).map(|_| next()).collect::<Result<Vec<_>, Exception>>()?;
                    let kept = runs.first().map_or(0, |run| run.dim(2));
                    let buffers = runs.into_iter().map(|run| with_room(vec![run])).collect::<Result<_, Exception>>()?;
                    LayerCache::Positions(Positions { window: Some(window), buffers, first: length - kept, length })
                }
                Plan::State { states } => {
                    LayerCache::State((0..states).map(|_| next().map(Some)).collect::<Result<_, Exception>>()?)
                }
                Plan::Shared => LayerCache::Shared,
            })
        });
        let layers = layers.collect::<Result<_, Exception>>()?;
        Ok(Self { layers, length, horizon: 0, rows: None })
    }

    /// How caches of this model are built, told by one that holds something.
    pub fn blueprint(&self) -> Blueprint {
        let layers = self.layers.iter().map(|layer| match layer {
            LayerCache::Positions(Positions { window: None, buffers, .. }) => Plan::Full { buffers: buffers.len() },
            LayerCache::Positions(Positions { window: Some(window), buffers, .. }) => {
                Plan::Window { window: *window, buffers: buffers.len() }
            }
            LayerCache::State(states) => Plan::State { states: states.len() },
            LayerCache::Shared => Plan::Shared,
        });
        Blueprint(layers.collect())
    }

    /// What sequences of this model take in memory, told by a cache that holds one.
    pub fn footprint(&self) -> Footprint {
        let mut footprint = Footprint::default();
        for layer in &self.layers {
            match layer {
                LayerCache::Positions(positions) => {
                    let column = positions.buffers.iter().map(|buffer| {
                        buffer.nbytes() as u64
                            / u64::from(buffer.dim(0).max(1).unsigned_abs())
                            / u64::from(buffer.dim(2).max(1).unsigned_abs())
                    });
                    let column = column.sum();
                    match positions.window {
                        None => footprint.token_bytes += column,
                        Some(window) => footprint.windows.push((window.max(1) as u32, column)),
                    }
                }
                LayerCache::State(states) => {
                    footprint.state_bytes += states.iter().flatten().map(|state| state.nbytes() as u64).sum::<u64>();
                }
                LayerCache::Shared => {}
            }
        }
        footprint
    }
}

/// What a sequence takes in memory, by its length.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Footprint {
    /// Of each token, in layers of full attention.
    pub token_bytes: u64,
    /// Of layers with windows: how many tokens they see, and what each takes.
    pub windows: Vec<(u32, u64)>,
    /// Of states, whatever the length.
    pub state_bytes: u64,
}

impl Footprint {
    /// Bytes of a [`Point`] after so many tokens.
    pub fn point_bytes(&self, tokens: u64) -> u64 {
        let windows = self.windows.iter().map(|(window, bytes)| tokens.min(u64::from(*window)) * bytes);
        windows.sum::<u64>() + self.state_bytes
    }

    /// Bytes that a sequence of so many tokens takes, with the room its buffers have.
    pub fn bytes(&self, tokens: u64) -> u64 {
        let step = STEP_TOKENS as u64;
        let room = |tokens: u64| (tokens / step + 1) * step;
        // A window's buffer is made anew when it is full, from what the window reaches.
        let windows = self.windows.iter().map(|(window, bytes)| room(tokens.min(u64::from(*window) + step)) * bytes);
        room(tokens) * self.token_bytes + windows.sum::<u64>() + self.state_bytes
    }
}

fn bytes(arrays: &[Array]) -> u64 {
    arrays.iter().map(|array| array.nbytes() as u64).sum()
}

/// Columns of `array`. Picked rather than sliced: a slice would keep the whole buffer in memory.
fn copied(array: &Array, start: i32, stop: i32) -> Result<Array, Exception> {
    indexing::take_axis(array, ops::arange::<_, i32>(start, stop, None)?, 2)
}

fn evaluated(arrays: Vec<Array>) -> Result<Vec<Array>, Exception> {
    mlx_rs::transforms::eval(&arrays)?;
    Ok(arrays)
}

/// One buffer of all `runs`, with room for more.
fn with_room(mut runs: Vec<Array>) -> Result<Array, Exception> {
    let held: i32 = runs.iter().map(|run| run.dim(2)).sum();
    let Some(last) = runs.last() else { return Err(Exception::custom("nothing was kept")) };
    let room = (held + STEP_TOKENS) / STEP_TOKENS * STEP_TOKENS - held;
    let zeros = ops::zeros_dtype(&[last.dim(0), last.dim(1), room, last.dim(3)], last.dtype())?;
    runs.push(zeros);
    ops::concatenate(&runs, 2)
}
