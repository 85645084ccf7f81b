//! The 4-bit product of several rows, with what stands after it in a layer.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    ffi::Packed,
    kernels::{
        Constant, Kernel, Launch, Recipe, Size,
        matvec::{Epilogue, columns, parts_of},
        rows::{HELPERS, WARPS, cut, tiles_of},
    },
    linear::Linear,
};

/// One to three matrices times rows in fragment order, in one launch.
#[derive(Debug)]
pub(super) struct Matmul {
    kernel: Kernel,
    constants: Vec<Array>,
}

/// Whether a packed matrix that the product of one row takes is one for several.
pub(super) fn supports(packed: &Packed, group_size: i32) -> bool {
    packed.group_size == group_size
        && columns(packed) % 64 == 0
        && columns(packed) % group_size == 0
        && packed.weight.dim(0) % 16 == 0
}

impl Matmul {
    /// For `parts` that share their input. `None` where the kernel does not support them.
    pub(super) fn new(
        parts: &[&Linear],
        epilogue: Epilogue,
        group_size: i32,
        dtype: Dtype,
    ) -> Result<Option<Self>, Exception> {
        match parts_of(parts, epilogue, dtype) {
            Some((packed, bias)) if packed.iter().all(|part| supports(part, group_size)) => {
                Self::packed(&packed, &bias, epilogue, dtype).map(Some)
            }
            _ => Ok(None),
        }
    }

    /// As [`Matmul::new`], for matrices known to be supported.
    pub(super) fn packed(
        packed: &[&Packed],
        bias: &[&Array],
        epilogue: Epilogue,
        dtype: Dtype,
    ) -> Result<Self, Exception> {
        let rows: Vec<i32> = packed.iter().map(|packed| packed.weight.dim(0)).collect();
        let (width, group_size) = (columns(packed[0]), packed[0].group_size);
        let paired = epilogue == Epilogue::SwiGlu;
        let total = if paired { rows[0] } else { rows.iter().sum() };

        let mut names = vec!["x".to_owned(), "stream".to_owned()];
        let mut constants = Vec::new();
        for (index, packed) in packed.iter().enumerate() {
            names.extend(["w", "s", "b"].map(|part| format!("{part}{index}")));
            constants.extend([packed.weight.clone(), packed.scales.clone()]);
            constants.extend(packed.biases.clone());
        }
        for (index, bias) in bias.iter().enumerate() {
            names.push(format!("bias{index}"));
            constants.push((*bias).clone());
        }
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let recipe = Recipe {
            name: "mesh_matmul",
            headers: &[HELPERS, include_str!("multiply.cuh")],
            body: &body(&rows, !bias.is_empty(), epilogue),
            inputs: &names,
            outputs: &["out"],
            contiguous: true,
        };
        let kernel = Kernel::new(&recipe, move |size| {
            let row_tiles = tiles_of(size.rows);
            let matrix_tiles = total / 16 * if paired { 2 } else { 1 };
            let cut = cut(matrix_tiles, width, row_tiles, paired);
            let shape = if paired { vec![row_tiles * 8, total] } else { vec![size.rows, 1, total] };
            Launch {
                outputs: vec![(shape, dtype)],
                constants: vec![
                    ("T", Constant::Type(dtype)),
                    ("K", Constant::Int(width)),
                    ("GROUP", Constant::Int(group_size)),
                    ("TILES", Constant::Int(cut.tiles)),
                    ("NT", Constant::Int(row_tiles)),
                    ("WARPS", Constant::Int(WARPS)),
                    ("CHUNK", Constant::Int(cut.chunk)),
                ],
                blocks: (matrix_tiles + cut.tiles - 1) / cut.tiles,
                threads_per_block: WARPS * 32,
            }
        })?;
        Ok(Self { kernel, constants })
    }

    /// `x` is in fragment order, `stream` the residual stream, `[rows, 1, hidden]`. The result is in fragment order after
    /// SwiGLU, or else `[rows, 1, …]`.
    pub(super) fn forward(&self, x: &Array, stream: &Array) -> Result<Array, Exception> {
        let mut inputs = vec![x, stream];
        inputs.extend(&self.constants);
        let [out] = self.kernel.apply(Size::rows(stream.dim(0)), &inputs)?;
        Ok(out)
    }
}

fn body(rows: &[i32], has_bias: bool, epilogue: Epilogue) -> String {
    let paired = epilogue == Epilogue::SwiGlu;
    let total: i32 = if paired { rows[0] } else { rows.iter().sum() };
    let start = |index: usize| rows[..index].iter().sum::<i32>();
    let tile = |index: usize, row: String| format!("mesh_tile_at<T, K, GROUP>(w{index}, s{index}, b{index}, {row})");
    let chosen = if paired {
        format!("m % 2 ? {} : {}", tile(1, "row".into()), tile(0, "row".into()))
    } else {
        let last = rows.len() - 1;
        (0..last).rev().fold(tile(last, format!("row - {}", start(last))), |otherwise, index| {
            let own = tile(index, format!("row - {}", start(index)));
            format!("row < {} ? {own} : {otherwise}", start(index + 1))
        })
    };
    // Tiles past the last compute it once more, and are not written.
    let (at, each) = if paired { ("(m / 2)", "TILES / 2") } else { ("m", "TILES") };
    let mut body = format!(
        "const int first = blockIdx.x * ({each}), batch = stream_shape[0];
mesh_tile<T> tiles[TILES];
#pragma unroll
for (int m = 0; m < TILES; ++m) {{
  const int row = min((first + {at}) * 16, {total} - 16);
  tiles[m] = {chosen};
}}
float acc[TILES][NT][4] = {{}};
mesh_multiply<T, K, GROUP, TILES, NT, WARPS, CHUNK>(reinterpret_cast<const uint4*>(x), tiles, acc);
"
    );
    if paired {
        body.push_str(&format!(
            "mesh_collect<TILES, NT, WARPS, 2>(acc, [&](int m, int in_tile, int n, const float (&value)[2]) {{
  const int row = (first + m / 2) * 16 + in_tile;
  if (row >= {total} || n >= batch) return;
  out[mesh_place<GROUP, NT>(n, row)] = static_cast<T>(value[0] / (1.0f + __expf(-value[0])) * value[1]);
}});
"
        ));
        return body;
    }
    let bias = if has_bias {
        let last = rows.len() - 1;
        let of = |index: usize| format!("bias{index}[row - {}]", start(index));
        let chosen =
            (0..last).rev().fold(of(last), |otherwise, i| format!("row < {} ? {} : {otherwise}", start(i + 1), of(i)));
        format!(" + static_cast<float>({chosen})")
    } else {
        String::new()
    };
    let residual = if epilogue == Epilogue::Residual { " + static_cast<float>(stream[at])" } else { "" };
    body.push_str(&format!(
        "mesh_collect<TILES, NT, WARPS, 1>(acc, [&](int m, int in_tile, int n, const float (&value)[1]) {{
  const int row = (first + m) * 16 + in_tile;
  if (row >= {total} || n >= batch) return;
  const size_t at = static_cast<size_t>(n) * {total} + row;
  out[at] = static_cast<T>(value[0]{bias}{residual});
}});
"
    ));
    body
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_matrix_is_read_from_its_own_first_row() {
        let text = body(&[4096, 1024, 1024], true, Epilogue::Plain);
        let chosen = "row < 4096 ? mesh_tile_at<T, K, GROUP>(w0, s0, b0, row - 0) : row < 5120 ? \
                      mesh_tile_at<T, K, GROUP>(w1, s1, b1, row - 4096) : \
                      mesh_tile_at<T, K, GROUP>(w2, s2, b2, row - 5120)";
        assert!(text.contains(chosen), "{text}");
        assert!(text.contains("row < 4096 ? bias0[row - 0] : row < 5120 ? bias1[row - 4096] : bias2[row - 5120]"));
        assert!(text.contains("min((first + m) * 16, 6144 - 16)"));
    }

    #[test]
    fn gates_and_what_they_multiply_alternate() {
        let text = body(&[12_288, 12_288], false, Epilogue::SwiGlu);
        assert!(text.contains("m % 2 ? mesh_tile_at<T, K, GROUP>(w1, s1, b1, row) : mesh_tile_at<T, K, GROUP>(w0, s0"));
        assert!(text.contains("min((first + (m / 2)) * 16, 12288 - 16)"));
    }
}
