//! Attention of one token a row, over the cache as it lies: each row begins at its own column, no mask is made, and
//! nothing is copied.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::AttentionSpec,
    kernels::{
        Constant, Kernel, Launch, Recipe, Size,
        rows::{HELPERS, parts, tiles_of},
    },
};

/// One launch, or two where the columns of a row are cut into parts.
#[derive(Debug)]
pub(super) struct RowsAttention {
    whole: Kernel,
    part: Kernel,
    join: Kernel,
    kv_heads: i32,
}

const HEADER: &str = include_str!("attend.cuh");

impl RowsAttention {
    /// For a product of matrices in groups of `group_size` to read. `None` where the kernel does not know such heads.
    pub(super) fn new(spec: &AttentionSpec, group_size: i32, dtype: Dtype) -> Result<Option<Self>, Exception> {
        let (heads, kv_heads, head_dim) = (spec.heads, spec.kv_heads, spec.head_dim);
        let group = heads / kv_heads.max(1);
        // A lane holds eight dimensions of each head of a group.
        let known = matches!(head_dim, 64 | 128 | 256) && (1..=8).contains(&group) && heads % kv_heads == 0;
        if !known || heads * head_dim % 64 != 0 {
            return Ok(None);
        }
        // What each warp has seen of every head has to fit a block's 48 KiB of shared memory.
        let warps = if group * head_dim > 1024 { 4 } else { 8 };
        let constants = move |size: Size| {
            vec![
                ("T", Constant::Type(dtype)),
                ("HEADS", Constant::Int(heads)),
                ("KV_HEADS", Constant::Int(kv_heads)),
                ("D", Constant::Int(head_dim)),
                ("WARPS", Constant::Int(warps)),
                ("GROUP", Constant::Int(group_size)),
                ("NT", Constant::Int(tiles_of(size.rows))),
            ]
        };
        let launch = move |size: Size, outputs: Vec<(Vec<i32>, Dtype)>| Launch {
            outputs,
            constants: constants(size),
            blocks: size.rows * kv_heads * size.parts,
            threads_per_block: warps * 32,
        };
        let ordered = move |size: Size| (vec![tiles_of(size.rows) * 8, heads * head_dim], dtype);
        let inputs = ["q", "k", "v", "position"];
        let recipe = |name, body, outputs| Recipe {
            name,
            headers: &[HELPERS, HEADER],
            body,
            inputs: &inputs,
            outputs,
            // Keys and values are views.
            contiguous: false,
        };
        let (whole, part) = (body(spec.scale, false), body(spec.scale, true));
        let whole =
            Kernel::new(&recipe("mesh_attend", &whole, &["out"]), move |size| launch(size, vec![ordered(size)]))?;
        let part = Kernel::new(&recipe("mesh_attend_part", &part, &["seen", "weight"]), move |size| {
            let of = |inner| (vec![size.rows, heads, size.parts, inner], Dtype::Float32);
            launch(size, vec![of(head_dim), of(2)])
        })?;
        let recipe = Recipe {
            name: "mesh_attend_join",
            headers: &[HELPERS],
            body: JOIN,
            inputs: &["seen", "weight"],
            outputs: &["out"],
            contiguous: true,
        };
        let join = Kernel::new(&recipe, move |size| Launch {
            outputs: vec![ordered(size)],
            constants: constants(size),
            blocks: size.rows * heads,
            threads_per_block: head_dim,
        })?;
        Ok(Some(Self { whole, part, join, kv_heads }))
    }

    /// `q` is `[rows, heads, 1, head_dim]`, `k` and `v` are `[rows, kv_heads, length, head_dim]`, and `position` is each
    /// row's own. The result is in fragment order.
    pub(super) fn forward(&self, q: &Array, k: &Array, v: &Array, position: &Array) -> Result<Array, Exception> {
        let rows = q.dim(0);
        let size = Size { rows, parts: parts(rows * self.kv_heads, k.dim(2)) };
        if size.parts == 1 {
            let [out] = self.whole.apply(size, &[q, k, v, position])?;
            return Ok(out);
        }
        let [seen, weight] = self.part.apply(size, &[q, k, v, position])?;
        let [out] = self.join.apply(Size::rows(rows), &[&seen, &weight])?;
        Ok(out)
    }
}

fn body(scale: f32, parts: bool) -> String {
    let finish = if parts {
        "const size_t at = (static_cast<size_t>(row) * HEADS + head * G + g) * parts + part;
  seen[at * D + d] = value;
  if (d == 0) {
    weight[at * 2] = top;
    weight[at * 2 + 1] = sum;
  }"
    } else {
        "out[mesh_place<GROUP, NT>(row, (head * G + g) * D + d)] = static_cast<T>(value / sum);"
    };
    format!(
        "constexpr int G = HEADS / KV_HEADS;
const int parts = gridDim.x / (position_shape[0] * KV_HEADS), part = blockIdx.x % parts;
const int head = blockIdx.x / parts % KV_HEADS, row = blockIdx.x / parts / KV_HEADS;
const int length = k_shape[2], first = length - min(position[row] + 1, length);
const int each = (length - first + parts - 1) / parts;
const int from = min(first + part * each, length), to = min(from + each, length);
mesh_attend<T, D, G, WARPS>(
    q + (static_cast<size_t>(row) * HEADS + head * G) * D,
    k + row * k_strides[0] + head * k_strides[1], v + row * v_strides[0] + head * v_strides[1],
    k_strides[2], v_strides[2], from, to, {scale:e}f,
    [&](int g, int d, float top, float sum, float value) {{
  {finish}
}});
"
    )
}

const JOIN: &str = "const int parts = seen_shape[2], row = blockIdx.x / HEADS, d = threadIdx.x;
const float* own = weight + static_cast<size_t>(blockIdx.x) * parts * 2;
float top = own[0], sum = 0.0f, value = 0.0f;
for (int part = 1; part < parts; ++part) top = fmaxf(top, own[part * 2]);
for (int part = 0; part < parts; ++part) {
  const float by = exp2f(own[part * 2] - top);
  sum = fmaf(by, own[part * 2 + 1], sum);
  value = fmaf(by, seen[(static_cast<size_t>(blockIdx.x) * parts + part) * D + d], value);
}
out[mesh_place<GROUP, NT>(row, blockIdx.x % HEADS * D + d)] = static_cast<T>(value / sum);
";
