//! What kernels for several rows share: which batches they take, and how the work is cut.

use crate::pass::Pass;

/// Device code that all of them read.
pub(super) const HELPERS: &str = include_str!("rows.cuh");

/// More rows than this go through plain operations, which are made for many.
pub(super) const ROWS_MAX: i32 = 32;

/// Whether the kernels for several rows compute a pass: one token for each. A row that was left alone behind its padding
/// counts too.
pub(super) fn takes(pass: &Pass) -> bool {
    pass.time() == 1 && pass.batch() <= ROWS_MAX
}

/// Tiles of eight that hold so many rows: 1, 2 or 4, each of which is a kernel to compile.
pub(super) fn tiles_of(rows: i32) -> i32 {
    match rows {
        ..=8 => 1,
        9..=16 => 2,
        _ => 4,
    }
}

/// How a product is cut.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Cut {
    /// Tiles of 16 matrix rows that a block computes.
    pub tiles: i32,
    /// Blocks of 64 columns that a warp reads at once.
    pub chunk: i32,
}

/// A block's warps share its columns.
pub(super) const WARPS: i32 = 8;

/// The cut that was fastest on an H100 for `matrix_tiles` tiles of 16 rows by `columns`, and rows in so many tiles of
/// eight. `paired` tiles are a gate and what it multiplies, and stay in one block.
pub(super) fn cut(matrix_tiles: i32, columns: i32, row_tiles: i32, paired: bool) -> Cut {
    // What one block for each multiprocessor computes with two tiles each.
    const FEW: i32 = 264;
    let few = matrix_tiles <= FEW;
    let (tiles, chunk) = match (row_tiles, few) {
        (1, _) if paired => (2, 2),
        (1, _) => (1, 2),
        (2, true) => (2, 2),
        (2, false) => (2, 1),
        (_, true) => (2, 2),
        (_, false) if matrix_tiles < 2 * FEW => (2, 2),
        (_, false) => (4, 1),
    };
    // Every chunk is whole, and there are enough for all warps.
    let blocks = columns / 64;
    let chunk = if blocks % chunk == 0 && blocks / chunk >= WARPS { chunk } else { 1 };
    Cut { tiles, chunk }
}

/// Into how many parts the columns of a row's cache are cut: attention of few rows over long ones would otherwise leave
/// most of the device idle. `groups` are the blocks without a cut.
pub(super) fn parts(groups: i32, length: i32) -> i32 {
    const BLOCKS: i32 = 132;
    const COLUMNS_MIN: i32 = 512;
    (BLOCKS / groups.max(1)).min(length / COLUMNS_MIN).clamp(1, 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_of_rows_has_its_tiles() {
        for rows in 1..=ROWS_MAX {
            assert!(tiles_of(rows) * 8 >= rows);
        }
        assert_eq!([1, 8, 9, 16, 17, 32].map(tiles_of), [1, 1, 2, 2, 4, 4]);
    }

    #[test]
    fn chunks_are_whole() {
        for columns in (64..=16_384).step_by(64) {
            for row_tiles in [1, 2, 4] {
                for (matrix_tiles, paired) in [(36, false), (256, false), (1536, true), (9496, false)] {
                    let cut = cut(matrix_tiles, columns, row_tiles, paired);
                    assert_eq!(columns / 64 % cut.chunk, 0, "{columns} {cut:?}");
                    assert!(!paired || cut.tiles % 2 == 0);
                }
            }
        }
    }

    #[test]
    fn long_caches_of_few_rows_are_cut() {
        assert_eq!(parts(8, 300), 1);
        assert_eq!(parts(16, 8192), 8);
        assert_eq!(parts(256, 8192), 1);
    }
}
