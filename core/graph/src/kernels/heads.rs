//! From the fused q, k, v of one token a row to heads: norm, rotation, and the layout that attention reads.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::AttentionSpec,
    kernels::{Constant, Kernel, Launch, Recipe, Size},
    norm::RmsNorm,
    rope::Rope,
};

/// One launch in place of up to seven operations.
#[derive(Debug)]
pub(super) struct Heads {
    kernel: Kernel,
    norms: Vec<Array>,
    angles: Array,
}

impl Heads {
    /// `None` where the rotation is of a kind the kernel does not know.
    pub(super) fn new(
        spec: &AttentionSpec,
        norms: Option<(&RmsNorm, &RmsNorm)>,
        rope: &Rope,
        dtype: Dtype,
    ) -> Result<Option<Self>, Exception> {
        let whole = spec.rope.as_ref().is_some_and(|rope| !rope.traditional && rope.dims == spec.head_dim);
        let Some(angles) = rope.angles_per_position().filter(|_| whole && spec.head_dim % 2 == 0) else {
            return Ok(None);
        };
        let mut names = vec!["qkv", "position", "angles"];
        if norms.is_some() {
            names.extend(["q_norm", "k_norm"]);
        }
        let eps = norms.map_or(0.0, |(norm, _)| norm.eps());
        let recipe = Recipe {
            name: "mesh_heads",
            headers: &[],
            body: &body(norms.is_some(), eps),
            inputs: &names,
            outputs: &["q", "k", "v"],
            contiguous: true,
        };
        let (heads, kv_heads, head_dim, normed) = (spec.heads, spec.kv_heads, spec.head_dim, norms.is_some());
        let kernel = Kernel::new(&recipe, move |size| {
            let of = |heads| (vec![size.rows, heads, 1, head_dim], dtype);
            Launch {
                outputs: vec![of(heads), of(kv_heads), of(kv_heads)],
                constants: vec![
                    ("T", Constant::Type(dtype)),
                    ("HEADS", Constant::Int(heads)),
                    ("KV_HEADS", Constant::Int(kv_heads)),
                    ("D", Constant::Int(head_dim)),
                    ("NORM", Constant::Bool(normed)),
                ],
                blocks: size.rows * (heads + 2 * kv_heads),
                threads_per_block: 32,
            }
        })?;
        let norms = norms.map_or_else(Vec::new, |(q, k)| vec![q.weight().clone(), k.weight().clone()]);
        let angles = Array::from_slice(&angles, &[angles.len() as i32]);
        Ok(Some(Self { kernel, norms, angles }))
    }

    /// `qkv` is `[rows, 1, (heads + 2 · kv_heads) · head_dim]`, `position` each row's own in i32. Returns q, k and v as
    /// `[rows, heads, 1, head_dim]`.
    pub(super) fn forward(&self, qkv: &Array, position: &Array) -> Result<[Array; 3], Exception> {
        let mut inputs = vec![qkv, position, &self.angles];
        inputs.extend(&self.norms);
        self.kernel.apply(Size::rows(qkv.dim(0)), &inputs)
    }
}

fn body(normed: bool, eps: f32) -> String {
    let weight = if normed { "(head < HEADS ? q_norm : k_norm)" } else { "static_cast<const T*>(nullptr)" };
    format!(
        "constexpr int ALL = HEADS + 2 * KV_HEADS;
const int row = blockIdx.x / ALL, head = blockIdx.x % ALL, lane = threadIdx.x;
const T* from = qkv + static_cast<size_t>(blockIdx.x) * D;
if (head >= HEADS + KV_HEADS) {{
  T* to = v + (row * KV_HEADS + head - HEADS - KV_HEADS) * D;
  for (int i = lane; i < D; i += 32) to[i] = from[i];
  return;
}}
T* to = head < HEADS ? q + (row * HEADS + head) * D : k + (row * KV_HEADS + head - HEADS) * D;
const T* weight = {weight};
float scale = 1.0f;
if (NORM) {{
  float sum = 0.0f;
  for (int i = lane; i < D; i += 32) {{
    float value = static_cast<float>(from[i]);
    sum = fmaf(value, value, sum);
  }}
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  scale = rsqrtf(sum / D + {eps:e}f);
}}
const float turns = static_cast<float>(position[row]);
for (int i = lane; i < D / 2; i += 32) {{
  float a = static_cast<float>(from[i]), b = static_cast<float>(from[i + D / 2]);
  if (NORM) {{
    a = static_cast<float>(static_cast<T>(a * scale)) * static_cast<float>(weight[i]);
    b = static_cast<float>(static_cast<T>(b * scale)) * static_cast<float>(weight[i + D / 2]);
    a = static_cast<float>(static_cast<T>(a));
    b = static_cast<float>(static_cast<T>(b));
  }}
  float sine, cosine;
  sincosf(turns * angles[i], &sine, &cosine);
  to[i] = static_cast<T>(a * cosine - b * sine);
  to[i + D / 2] = static_cast<T>(a * sine + b * cosine);
}}
"
    )
}
