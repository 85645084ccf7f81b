//! The 4-bit matrix-vector product, with what stands before and after it in a layer.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    ffi::{Mode, Packed},
    kernels::{Constant, Kernel, Launch, Recipe, Size},
    linear::Linear,
    norm::RmsNorm,
};

/// What the product does with its rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Epilogue {
    /// Writes them one after the other.
    Plain,
    /// Adds the residual stream.
    Residual,
    /// Two matrices of equal size, gate and up: `silu(gate) · up`.
    SwiGlu,
}

/// One to three matrices times one vector, in one launch.
#[derive(Debug)]
pub(super) struct Matvec {
    kernel: Kernel,
    norm: Option<Array>,
    constants: Vec<Array>,
}

const WARPS_PER_BLOCK: i32 = 8;

/// Above this many columns, the staged vector would not fit a block's 48 KiB of shared memory.
const COLUMNS_MAX: i32 = 16_384;

/// Whether a packed matrix is one that the kernel multiplies, in activations of `dtype`.
pub(super) fn supports(packed: &Packed, dtype: Dtype) -> bool {
    let columns = columns(packed);
    packed.mode == Mode::Affine
        && packed.bits == 4
        && matches!(packed.group_size, 32 | 64 | 128)
        && matches!(dtype, Dtype::Bfloat16 | Dtype::Float16)
        && packed.scales.dtype() == dtype
        && columns % 32 == 0
        && columns <= COLUMNS_MAX
}

/// Columns of a packed matrix.
pub(super) fn columns(packed: &Packed) -> i32 {
    packed.weight.dim(-1) * 32 / packed.bits
}

/// The matrices and biases of `parts` that share their input; `None` where a kernel does not support them.
pub(super) fn parts_of<'a>(
    parts: &[&'a Linear],
    epilogue: Epilogue,
    dtype: Dtype,
) -> Option<(Vec<&'a Packed>, Vec<&'a Array>)> {
    let packed = parts.iter().map(|part| part.packed()).collect::<Option<Vec<&Packed>>>()?;
    let bias: Vec<&Array> = parts.iter().filter_map(|part| part.bias()).collect();
    let has_bias = !bias.is_empty();
    let alike = packed.iter().all(|part| supports(part, dtype) && part.group_size == packed[0].group_size);
    let placed = !has_bias || (bias.len() == parts.len() && epilogue != Epilogue::SwiGlu);
    (alike && placed).then_some((packed, bias))
}

impl Matvec {
    /// For `parts` that share their input. `None` where the kernel does not support them.
    pub(super) fn new(
        parts: &[&Linear],
        norm: Option<&RmsNorm>,
        epilogue: Epilogue,
        dtype: Dtype,
    ) -> Result<Option<Self>, Exception> {
        let Some((packed, bias)) = parts_of(parts, epilogue, dtype) else { return Ok(None) };
        Self::packed(&packed, &bias, norm, epilogue, dtype).map(Some)
    }

    /// As [`Matvec::new`], for matrices known to be supported.
    pub(super) fn packed(
        packed: &[&Packed],
        bias: &[&Array],
        norm: Option<&RmsNorm>,
        epilogue: Epilogue,
        dtype: Dtype,
    ) -> Result<Self, Exception> {
        let rows: Vec<i32> = packed.iter().map(|packed| packed.weight.dim(0)).collect();
        let columns = columns(packed[0]);
        let total = if epilogue == Epilogue::SwiGlu { rows[0] } else { rows.iter().sum() };
        // Few rows a warp where there are few rows, so that every multiprocessor has work.
        let wanted = if epilogue == Epilogue::SwiGlu { total / 4096 } else { total / 2048 };
        let rows_per_warp = [4, 2, 1]
            .into_iter()
            .find(|n| *n <= wanted.max(1) && rows.iter().all(|rows| rows % n == 0))
            .unwrap_or(1)
            .min(if epilogue == Epilogue::SwiGlu { 2 } else { 4 });

        let mut names = vec!["x".to_owned()];
        let mut constants = Vec::new();
        names.extend(norm.map(|_| "norm".to_owned()));
        for (index, packed) in packed.iter().enumerate() {
            names.extend(["w", "s", "b"].map(|part| format!("{part}{index}")));
            constants.extend([packed.weight.clone(), packed.scales.clone()]);
            constants.extend(packed.biases.clone());
        }
        for (index, bias) in bias.iter().enumerate() {
            names.push(format!("bias{index}"));
            constants.push((*bias).clone());
        }
        if epilogue == Epilogue::Residual {
            names.push("residual".into());
        }
        let body = body(&rows, norm.map(RmsNorm::eps), !bias.is_empty(), epilogue);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let recipe = Recipe {
            name: "mesh_matvec",
            headers: &[include_str!("matvec.cuh")],
            body: &body,
            inputs: &names,
            outputs: &["out"],
            contiguous: true,
        };
        let (group_size, normed) = (packed[0].group_size, norm.is_some());
        let kernel = Kernel::new(&recipe, move |_| Launch {
            outputs: vec![(vec![1, 1, total], dtype)],
            constants: vec![
                ("T", Constant::Type(dtype)),
                ("K", Constant::Int(columns)),
                ("GROUP", Constant::Int(group_size)),
                ("ROWS", Constant::Int(rows_per_warp)),
                ("NORM", Constant::Bool(normed)),
            ],
            blocks: (total + rows_per_warp * WARPS_PER_BLOCK - 1) / (rows_per_warp * WARPS_PER_BLOCK),
            threads_per_block: WARPS_PER_BLOCK * 32,
        })?;
        Ok(Self { kernel, norm: norm.map(|norm| norm.weight().clone()), constants })
    }

    /// `x` is `[1, 1, columns]`, and so the result `[1, 1, rows]`.
    pub(super) fn forward(&self, x: &Array, residual: Option<&Array>) -> Result<Array, Exception> {
        let mut inputs = vec![x];
        inputs.extend(&self.norm);
        inputs.extend(&self.constants);
        inputs.extend(residual);
        let [out] = self.kernel.apply(Size::SINGLE, &inputs)?;
        Ok(out)
    }
}

fn body(rows: &[i32], eps: Option<f32>, has_bias: bool, epilogue: Epilogue) -> String {
    let (norm, eps) = match eps {
        Some(eps) => ("norm", format!("{eps:e}f")),
        None => ("nullptr", "0.0f".into()),
    };
    let total: i32 = if epilogue == Epilogue::SwiGlu { rows[0] } else { rows.iter().sum() };
    let mut body = format!(
        "__shared__ uint4 staged[(K + 1023) / 1024 * 128];
__shared__ float partial[32];
mesh_stage<T, K, NORM>(x, {norm}, {eps}, staged, partial);
const int lane = threadIdx.x % 32;
const int row = (blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32) * ROWS;
if (row >= {total}) return;
float acc[ROWS] = {{}};
"
    );
    if epilogue == Epilogue::SwiGlu {
        body.push_str(
            "float up[ROWS] = {};
mesh_dot<T, K, GROUP, ROWS>(staged, w0, s0, b0, row, lane, acc);
mesh_dot<T, K, GROUP, ROWS>(staged, w1, s1, b1, row, lane, up);
for (int r = 0; r < ROWS; ++r) {
  float gate = mesh_warp_sum(acc[r]), value = mesh_warp_sum(up[r]);
  if (lane == 0) out[row + r] = static_cast<T>(gate / (1.0f + __expf(-gate)) * value);
}
",
        );
        return body;
    }
    let mut start = 0;
    for (index, rows) in rows.iter().enumerate() {
        let end = start + rows;
        let bias =
            if has_bias { format!(" + static_cast<float>(bias{index}[row - {start} + r])") } else { String::new() };
        let residual = match epilogue {
            Epilogue::Residual => " + static_cast<float>(residual[row + r])",
            _ => "",
        };
        body.push_str(&format!(
            "if (row >= {start} && row < {end}) {{
  mesh_dot<T, K, GROUP, ROWS>(staged, w{index}, s{index}, b{index}, row - {start}, lane, acc);
  for (int r = 0; r < ROWS; ++r) {{
    float value = mesh_warp_sum(acc[r]);
    if (lane == 0) out[row + r] = static_cast<T>(value{bias}{residual});
  }}
}}
"
        ));
        start = end;
    }
    body
}
