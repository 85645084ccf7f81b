//! What is kept of one sequence beyond its generation, in two parts: what belongs to each token and can be cut anywhere
//! (the keys and values of full attention), and what belongs to a point between tokens (windows and states).
//!
//! Parts are copies: they share no memory with the cache they were taken from. What layers keep alike is stacked in one
//! array: a model has dozens of layers and a conversation dozens of parts, and a device spends more time on starting so many
//! small copies than on copying.

use mlx_rs::{
    Array, Dtype,
    error::Exception,
    ops::{self, indexing},
};

use super::{
    Cache, CacheKind, LayerCache, STEP_TOKENS,
    positions::{Positions, columns},
};
use crate::ffi;

/// Most bytes of a sequence that is taken up as whole stacks. Its layers copy their parts out of these when they first
/// write, so that for a moment there is twice as much; beyond this size the copies take longer than their start anyway.
const STACKED_BYTES_MAX: u64 = 256 << 20;

/// What layers of full attention keep of a run of tokens: stacks `[buffers, heads, tokens, …]`.
#[derive(Clone, Debug)]
pub struct Segment {
    /// How many tokens.
    pub tokens: usize,
    /// A stack for each shape there is, in the order of the layers it comes first in.
    pub arrays: Vec<Array>,
}

/// What layers with windows and states keep at a point.
#[derive(Clone, Debug)]
pub struct Point {
    /// Stacks of windows, as in a [`Segment`], then states in the order of layers.
    pub arrays: Vec<Array>,
}

/// What buffers have in common that are kept in one stack.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Alike {
    window: Option<i32>,
    heads: i32,
    width: i32,
    dtype: Dtype,
}

/// Which stack a buffer is in, and where.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    stack: usize,
    at: i32,
}

/// The kinds of stacks, and how many buffers each has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Stacks(Vec<(Alike, i32)>);

impl Stacks {
    /// The place of the next buffer of this kind.
    fn place(&mut self, kind: Alike) -> Place {
        let stack = self.0.iter().position(|(other, _)| *other == kind).unwrap_or_else(|| {
            self.0.push((kind, 0));
            self.0.len() - 1
        });
        let at = self.0[stack].1;
        self.0[stack].1 += 1;
        Place { stack, at }
    }
}

/// Buffers on their way into stacks.
#[derive(Default)]
struct Stacking {
    stacks: Stacks,
    parts: Vec<Vec<Array>>,
}

impl Stacking {
    /// Columns of a buffer of the next layer.
    fn add(&mut self, buffer: &Array, window: Option<i32>, start: i32, stop: i32) -> Result<(), Exception> {
        let Place { stack, .. } = self.stacks.place(alike(buffer, window));
        self.parts.resize_with(self.stacks.0.len(), Vec::new);
        self.parts[stack].push(columns(buffer, start, stop)?);
        Ok(())
    }

    /// The stacks, each an array of its own.
    fn arrays(self) -> Result<Vec<Array>, Exception> {
        let stack = |parts: Vec<Array>| match &parts[..] {
            [only] => copied(only, 0, only.dim(2)),
            parts => ops::concatenate(parts, 0),
        };
        self.parts.into_iter().map(stack).collect()
    }
}

fn alike(buffer: &Array, window: Option<i32>) -> Alike {
    Alike { window, heads: buffer.dim(1), width: buffer.dim(3), dtype: buffer.dtype() }
}

/// Stacks on their way back into buffers with room for more.
struct Unstacking {
    /// The runs of each stack.
    runs: Vec<Vec<Array>>,
    /// All of a stack's runs in one, where that is how they are taken up.
    whole: Option<Vec<Array>>,
}

impl Unstacking {
    /// `runs` are a stack's parts along the tokens; `stacks` is how they have to be.
    fn new(runs: Vec<Vec<Array>>, stacks: &Stacks, stacked_bytes_max: u64) -> Result<Self, Exception> {
        let fit =
            |(run, (kind, count)): (&Array, &(Alike, i32))| alike(run, kind.window) == *kind && run.dim(0) == *count;
        let fits = runs.len() == stacks.0.len()
            && runs.iter().zip(&stacks.0).all(|(runs, stack)| runs.iter().all(|run| fit((run, stack))));
        if !fits {
            return Err(Exception::custom("what was kept is not of this model"));
        }
        let bytes: u64 = runs.iter().flatten().map(|run| run.nbytes() as u64).sum();
        let whole = (bytes <= stacked_bytes_max).then(|| runs.iter().map(|runs| with_room(runs.clone())).collect());
        Ok(Self { runs, whole: whole.transpose()? })
    }

    /// Tokens that a stack holds.
    fn tokens(&self, stack: usize) -> i32 {
        self.runs.get(stack).map_or(0, |runs| runs.iter().map(|run| run.dim(2)).sum())
    }

    fn buffer(&self, Place { stack, at }: Place) -> Result<Array, Exception> {
        let row = |array: &Array| ffi::slice(array, [at, 0, 0, 0], [at + 1, array.dim(1), array.dim(2), array.dim(3)]);
        match &self.whole {
            Some(whole) => row(&whole[stack]),
            None => with_room(self.runs[stack].iter().map(row).collect::<Result<_, _>>()?),
        }
    }
}

/// How the caches of a model are built.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blueprint {
    layers: Vec<Plan>,
    full: Stacks,
    windows: Stacks,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Plan {
    Full(Vec<Place>),
    Window(i32, Vec<Place>),
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
        let mut stacking = Stacking::default();
        for layer in &self.layers {
            if let LayerCache::Positions(Positions { window: None, buffers, .. }) = layer {
                for buffer in buffers {
                    stacking.add(buffer, None, from, to)?;
                }
            }
        }
        let arrays = evaluated(stacking.arrays()?)?;
        Ok(Segment { tokens: (to - from).max(0) as usize, arrays })
    }

    /// What windows and states keep of a single sequence where it ends, as evaluated copies.
    pub fn point(&self) -> Result<Point, Exception> {
        let (mut stacking, mut kept_states) = (Stacking::default(), Vec::new());
        for layer in &self.layers {
            match layer {
                LayerCache::Positions(Positions { window: Some(window), buffers, first, length }) => {
                    let from = (*first).max(length + 1 - window);
                    for buffer in buffers {
                        stacking.add(buffer, Some(*window), from - first, length - first)?;
                    }
                }
                // Replaced by each pass, never written into: no copy is needed.
                LayerCache::State(states) => kept_states.extend(states.iter().flatten().cloned()),
                LayerCache::Positions(_) | LayerCache::Shared => {}
            }
        }
        let mut arrays = stacking.arrays()?;
        arrays.extend(kept_states);
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
        Self::restore_by(blueprint, segments, point, length, STACKED_BYTES_MAX)
    }

    fn restore_by(
        blueprint: &Blueprint,
        segments: &[(&Segment, usize)],
        point: Option<&Point>,
        length: i32,
        stacked_bytes_max: u64,
    ) -> Result<Self, Exception> {
        let lacks = |what: &str| Exception::custom(format!("a kept {what} lacks an array"));
        let runs = (0..blueprint.full.0.len()).map(|stack| {
            let runs = segments.iter().map(|(segment, count)| {
                let array = segment.arrays.get(stack).ok_or_else(|| lacks("segment"))?;
                columns(array, 0, *count as i32)
            });
            runs.collect::<Result<Vec<_>, Exception>>()
        });
        let full = Unstacking::new(runs.collect::<Result<_, _>>()?, &blueprint.full, stacked_bytes_max)?;
        let kept = point.map_or(&[][..], |point| &point.arrays[..]);
        let (windows, states) = kept.split_at_checked(blueprint.windows.0.len()).ok_or_else(|| lacks("point"))?;
        let windows = windows.iter().map(|window| vec![window.clone()]).collect();
        let windows = Unstacking::new(windows, &blueprint.windows, stacked_bytes_max)?;
        let mut states = states.iter();
        let mut next = || states.next().cloned().ok_or_else(|| lacks("point"));
        let layers = blueprint.layers.iter().map(|layer| {
            Ok(match layer {
                Plan::Full(places) => {
                    let buffers = places.iter().map(|place| full.buffer(*place)).collect::<Result<_, Exception>>()?;
                    LayerCache::Positions(Positions { window: None, buffers, first: 0, length })
                }
                Plan::Window(window, places) => {
                    let kept = places.first().map_or(0, |place| windows.tokens(place.stack));
                    let buffers =
                        places.iter().map(|place| windows.buffer(*place)).collect::<Result<_, Exception>>()?;
                    LayerCache::Positions(Positions { window: Some(*window), buffers, first: length - kept, length })
                }
                Plan::State { states } => {
                    LayerCache::State((0..*states).map(|_| next().map(Some)).collect::<Result<_, Exception>>()?)
                }
                Plan::Shared => LayerCache::Shared,
            })
        });
        let layers = layers.collect::<Result<_, Exception>>()?;
        Ok(Self { layers, length, horizon: 0, rows: None })
    }

    /// How caches of this model are built, told by one that holds something.
    pub fn blueprint(&self) -> Blueprint {
        let (mut full, mut windows) = (Stacks::default(), Stacks::default());
        let layers = self.layers.iter().map(|layer| match layer {
            LayerCache::Positions(Positions { window: None, buffers, .. }) => {
                Plan::Full(buffers.iter().map(|buffer| full.place(alike(buffer, None))).collect())
            }
            LayerCache::Positions(Positions { window: Some(window), buffers, .. }) => {
                let window = *window;
                Plan::Window(window, buffers.iter().map(|buffer| windows.place(alike(buffer, Some(window)))).collect())
            }
            LayerCache::State(states) => Plan::State { states: states.len() },
            LayerCache::Shared => Plan::Shared,
        });
        let layers = layers.collect();
        Blueprint { layers, full, windows }
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::CacheKind;

    const LENGTH: i32 = 40;
    const WINDOW: i32 = 8;

    fn values(shape: &[i32], from: f32) -> Array {
        let count = shape.iter().product::<i32>() as usize;
        Array::from_slice(&(0..count).map(|index| from + index as f32).collect::<Vec<_>>(), shape)
    }

    /// Layers of every kind, keys and values of several widths.
    fn cache() -> Cache {
        let layout = [
            CacheKind::Full,
            CacheKind::Window(WINDOW),
            CacheKind::Full,
            CacheKind::State,
            CacheKind::Window(WINDOW),
            CacheKind::Shared,
        ];
        let mut cache = Cache::new(&layout);
        for (layer, kept) in cache.layers().iter_mut().enumerate() {
            let base = 1e4 * layer as f32;
            match kept {
                LayerCache::Positions(positions) => {
                    let width = if layer == 2 { 3 } else { 2 };
                    let (keys, new) = (values(&[1, 2, LENGTH, 4], base), values(&[1, 2, LENGTH, width], base + 5e3));
                    positions.update([&keys, &new]).unwrap();
                }
                LayerCache::State(states) => {
                    *states = vec![Some(values(&[1, 5], base)), Some(values(&[1, 2, 2], base))]
                }
                LayerCache::Shared => {}
            }
        }
        cache.length = LENGTH;
        cache
    }

    /// What the next token's queries would see of each layer.
    fn seen(cache: &Cache) -> Vec<Vec<f32>> {
        let all = cache.layers.iter().flat_map(|layer| match layer {
            LayerCache::Positions(positions) => {
                let from = positions.window.map_or(0, |window| positions.length + 1 - window) - positions.first;
                let to = positions.length - positions.first;
                positions.buffers.iter().map(|buffer| copied(buffer, from, to).unwrap()).collect::<Vec<_>>()
            }
            other => other.arrays().cloned().collect(),
        });
        all.map(|array| array.flatten(None, None).unwrap().to_vec_exact::<f32>().unwrap()).collect()
    }

    #[test]
    fn what_is_taken_up_is_what_was_kept_as_whole_stacks_or_part_by_part() {
        let cache = cache();
        let point = cache.point().unwrap();
        let parts = [cache.segment(0, 7).unwrap(), cache.segment(7, 30).unwrap(), cache.segment(30, LENGTH).unwrap()];
        // Keys of both, values of each.
        assert_eq!(
            parts[0].arrays.iter().map(|array| array.shape().to_vec()).collect::<Vec<_>>(),
            [vec![2, 2, 7, 4], vec![1, 2, 7, 2], vec![1, 2, 7, 3]]
        );
        let (longer, _) = cache.segment(7, LENGTH).unwrap().split(25).unwrap();
        let segments = [(&parts[0], 7), (&longer, 23), (&parts[2], 10)];
        for stacked_bytes_max in [0, u64::MAX] {
            let restored =
                Cache::restore_by(&cache.blueprint(), &segments, Some(&point), LENGTH, stacked_bytes_max).unwrap();
            assert_eq!(seen(&restored), seen(&cache));
            assert_eq!((restored.blueprint(), restored.len()), (cache.blueprint(), LENGTH));
            // One's next token is nothing to the other.
            let (mut one, other) = (restored.clone(), restored);
            for layer in one.layers() {
                if let LayerCache::Positions(positions) = layer {
                    let width = positions.buffers[1].dim(3);
                    positions.update([&values(&[1, 2, 1, 4], -9.0), &values(&[1, 2, 1, width], -9.0)]).unwrap();
                }
            }
            assert_eq!(seen(&other), seen(&cache));
        }
    }

    #[test]
    fn what_another_model_kept_is_refused() {
        let cache = cache();
        let (blueprint, point) = (cache.blueprint(), cache.point().unwrap());
        let mut segment = cache.segment(0, LENGTH).unwrap();
        let error = |segment: &Segment, point: Option<&Point>| {
            Cache::restore(&blueprint, &[(segment, LENGTH as usize)], point, LENGTH).unwrap_err().what().to_owned()
        };
        assert!(error(&segment, None).contains("a kept point lacks an array"));
        segment.arrays[0] = columns(&segment.arrays[1], 0, LENGTH).unwrap();
        assert!(error(&segment, Some(&point)).contains("not of this model"));
        segment.arrays.clear();
        assert!(error(&segment, Some(&point)).contains("a kept segment lacks an array"));
    }
}
