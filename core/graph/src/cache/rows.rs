//! Batches: rows of several caches put together, and taken out again.
//!
//! Rows of a batch end at the same column, shorter ones after padding. What a row holds is never changed by putting it
//! in company or taking it out; only where its columns stand.

use mlx_rs::{
    Array,
    error::Exception,
    ops::{self, indexing},
};

use super::{
    Cache, LayerCache, STEP_TOKENS,
    positions::{Positions, columns},
};
use crate::pass::Row;

impl Cache {
    /// One batch of all rows of `caches`, in order. None of them may be empty.
    pub fn merge(caches: &[Self]) -> Result<Self, Exception> {
        let length = caches.iter().map(|cache| cache.length).max().unwrap_or(0);
        let count = caches.first().map_or(0, |cache| cache.layers.len());
        let layers = (0..count).map(|layer| {
            let parts: Vec<(&LayerCache, i32)> =
                caches.iter().map(|cache| (&cache.layers[layer], length - cache.length)).collect();
            merge_layers(&parts, length)
        });
        let layers = layers.collect::<Result<_, _>>()?;
        let rows = caches.iter().flat_map(|cache| {
            let shift = length - cache.length;
            cache.rows().into_iter().map(move |row| Row { padding: row.padding + shift, ..row })
        });
        Ok(Self { layers, length, horizon: 0, rows: Some(rows.collect()) })
    }

    /// The rows `picked`, in that order. Columns that are padding for all of them go: all of them if one row is picked,
    /// which then is as it was alone, or else whole steps of the buffers.
    pub fn select(&self, picked: &[usize]) -> Result<Self, Exception> {
        let all = self.rows();
        let rows: Vec<Row> = picked.iter().filter_map(|row| all.get(*row).copied()).collect();
        if rows.len() != picked.len() || rows.is_empty() {
            return Err(Exception::custom("a row that a batch does not have was picked"));
        }
        let common = rows.iter().map(|row| row.padding).min().unwrap_or(0);
        let cut = if rows.len() == 1 { common } else { common / STEP_TOKENS * STEP_TOKENS };
        let picked: Vec<i32> = picked.iter().map(|row| *row as i32).collect();
        let picked = (picked.len() != all.len() || picked.iter().zip(0..).any(|(row, index)| *row != index))
            .then(|| Array::from_slice(&picked, &[picked.len() as i32]));
        let layers =
            self.layers.iter().map(|layer| select_layer(layer, picked.as_ref(), cut)).collect::<Result<_, _>>()?;
        let length = self.length - cut;
        match rows[..] {
            [Row { horizon, .. }] => Ok(Self { layers, length, horizon, rows: None }),
            _ => {
                let rows = rows.iter().map(|row| Row { padding: row.padding - cut, ..*row }).collect();
                Ok(Self { layers, length, horizon: 0, rows: Some(rows) })
            }
        }
    }

    /// Columns held of each row, padding left out.
    pub fn lengths(&self) -> Vec<i32> {
        self.rows().iter().map(|row| self.length - row.padding).collect()
    }

    fn rows(&self) -> Vec<Row> {
        let alike = || vec![Row { padding: 0, horizon: 0 }];
        let mut rows = self.rows.clone().unwrap_or_else(alike);
        for row in &mut rows {
            row.horizon = row.horizon.max(self.horizon);
        }
        rows
    }
}

/// `parts` are caches of one layer, each with the columns of padding that come before it.
fn merge_layers(parts: &[(&LayerCache, i32)], length: i32) -> Result<LayerCache, Exception> {
    match parts.first() {
        Some((LayerCache::Positions(first), _)) => {
            let window = first.window;
            let all = parts.iter().map(|(part, shift)| match part {
                LayerCache::Positions(positions) => Ok((positions, *shift)),
                _ => Err(unlike()),
            });
            merge_positions(&all.collect::<Result<Vec<_>, _>>()?, window, length).map(LayerCache::Positions)
        }
        Some((LayerCache::State(first), _)) => {
            let states = (0..first.len()).map(|index| {
                let all = parts.iter().map(|(part, _)| match part {
                    LayerCache::State(states) => states.get(index).and_then(Option::as_ref).ok_or_else(empty),
                    _ => Err(unlike()),
                });
                ops::concatenate(&all.collect::<Result<Vec<&Array>, _>>()?, 0).map(Some)
            });
            Ok(LayerCache::State(states.collect::<Result<_, _>>()?))
        }
        Some((LayerCache::Shared, _)) => Ok(LayerCache::Shared),
        None => Err(empty()),
    }
}

fn merge_positions(parts: &[(&Positions, i32)], window: Option<i32>, length: i32) -> Result<Positions, Exception> {
    let first = window.map_or(0, |window| (length + 1 - window).max(0));
    // Room for the next column at least.
    let room = (length - first + STEP_TOKENS) / STEP_TOKENS * STEP_TOKENS;
    let buffers = parts.first().map_or(0, |(part, _)| part.buffers.len());
    if buffers == 0 {
        return Err(empty());
    }
    let buffers = (0..buffers).map(|index| {
        let rows = parts.iter().map(|(part, shift)| {
            let buffer = part.buffers.get(index).ok_or_else(empty)?;
            let from = first.max(part.first + shift);
            let kept = columns(buffer, from - shift - part.first, part.length - part.first)?;
            let zeros = |time| ops::zeros_dtype(&[kept.dim(0), kept.dim(1), time, kept.dim(3)], kept.dtype());
            let mut run = Vec::with_capacity(3);
            if from > first {
                run.push(zeros(from - first)?);
            }
            run.push(kept.clone());
            run.push(zeros(room - (length - first))?);
            ops::concatenate(&run, 2)
        });
        ops::concatenate(&rows.collect::<Result<Vec<_>, Exception>>()?, 0)
    });
    Ok(Positions { window, buffers: buffers.collect::<Result<_, _>>()?, first, length })
}

fn select_layer(layer: &LayerCache, picked: Option<&Array>, cut: i32) -> Result<LayerCache, Exception> {
    let take = |array: &Array| picked.map_or_else(|| Ok(array.clone()), |rows| indexing::take_axis(array, rows, 0));
    Ok(match layer {
        LayerCache::Positions(positions) => {
            let first = positions.first.max(cut);
            let length = positions.length;
            let buffers = positions.buffers.iter().map(|buffer| {
                let rows = take(buffer)?;
                if first == positions.first {
                    return Ok(rows);
                }
                let kept = columns(&rows, first - positions.first, length - positions.first)?;
                let room = (length - first + STEP_TOKENS) / STEP_TOKENS * STEP_TOKENS - (length - first);
                let zeros = ops::zeros_dtype(&[kept.dim(0), kept.dim(1), room, kept.dim(3)], kept.dtype())?;
                ops::concatenate(&[kept, zeros], 2)
            });
            let buffers = buffers.collect::<Result<_, Exception>>()?;
            LayerCache::Positions(Positions { buffers, first: first - cut, length: length - cut, ..*positions })
        }
        LayerCache::State(states) => {
            let states = states.iter().map(|state| state.as_ref().map(take).transpose());
            LayerCache::State(states.collect::<Result<_, Exception>>()?)
        }
        LayerCache::Shared => LayerCache::Shared,
    })
}

fn unlike() -> Exception {
    Exception::custom("caches of different models cannot be put together")
}

fn empty() -> Exception {
    Exception::custom("an empty cache cannot be part of a batch")
}
