//! Rows normalized into the order in which the products read them.

use mlx_rs::{Array, error::Exception};

use crate::{
    kernels::{
        Constant, Kernel, Launch, Recipe, Size,
        rows::{HELPERS, tiles_of},
    },
    norm::RmsNorm,
};

/// A norm before products of several rows.
#[derive(Debug)]
pub(super) struct RowsNorm {
    kernel: Kernel,
    weight: Array,
}

impl RowsNorm {
    /// Over a width that is a multiple of 64, for products of matrices in groups of `group_size`.
    pub(super) fn new(norm: &RmsNorm, group_size: i32) -> Result<Self, Exception> {
        let weight = norm.weight().clone();
        let (width, dtype) = (weight.dim(0), weight.dtype());
        let body = format!(
            "mesh_norm_row<T, K, GROUP, NT>(x + static_cast<size_t>(blockIdx.x) * K, weight, {:e}f, blockIdx.x, out);",
            norm.eps()
        );
        let recipe = Recipe {
            name: "mesh_norm",
            headers: &[HELPERS, include_str!("norm.cuh")],
            body: &body,
            inputs: &["x", "weight"],
            outputs: &["out"],
            contiguous: true,
        };
        let kernel = Kernel::new(&recipe, move |size| {
            let tiles = tiles_of(size.rows);
            Launch {
                outputs: vec![(vec![tiles * 8, width], dtype)],
                constants: vec![
                    ("T", Constant::Type(dtype)),
                    ("K", Constant::Int(width)),
                    ("GROUP", Constant::Int(group_size)),
                    ("NT", Constant::Int(tiles)),
                ],
                blocks: size.rows,
                threads_per_block: 256,
            }
        })?;
        Ok(Self { kernel, weight })
    }

    /// `[rows, 1, width]` to fragment order.
    pub(super) fn forward(&self, x: &Array) -> Result<Array, Exception> {
        let [out] = self.kernel.apply(Size::rows(x.dim(0)), &[x, &self.weight])?;
        Ok(out)
    }
}
