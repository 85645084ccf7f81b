//! From the fused q, k, v of one token to heads: norm, rotation, and the layout that attention reads.

use mlx_rs::{Array, Dtype, error::Exception};

use crate::{
    attention::AttentionSpec,
    kernels::{Constant, Kernel, Output, Recipe},
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
        let mut names = vec!["qkv", "offset", "angles"];
        if norms.is_some() {
            names.extend(["q_norm", "k_norm"]);
        }
        let (q, kv) = ([1, spec.heads, 1, spec.head_dim], [1, spec.kv_heads, 1, spec.head_dim]);
        let eps = norms.map_or(0.0, |(norm, _)| norm.eps());
        let kernel = Kernel::new(&Recipe {
            name: "mesh_heads",
            header: "",
            body: &body(norms.is_some(), eps),
            inputs: &names,
            outputs: &[
                Output { name: "q", shape: &q, dtype },
                Output { name: "k", shape: &kv, dtype },
                Output { name: "v", shape: &kv, dtype },
            ],
            constants: &[
                ("T", Constant::Type(dtype)),
                ("HEADS", Constant::Int(spec.heads)),
                ("KV_HEADS", Constant::Int(spec.kv_heads)),
                ("D", Constant::Int(spec.head_dim)),
                ("NORM", Constant::Bool(norms.is_some())),
            ],
            blocks: spec.heads + 2 * spec.kv_heads,
            threads_per_block: 32,
        })?;
        let norms = norms.map_or_else(Vec::new, |(q, k)| vec![q.weight().clone(), k.weight().clone()]);
        let angles = Array::from_slice(&angles, &[angles.len() as i32]);
        Ok(Some(Self { kernel, norms, angles }))
    }

    /// `qkv` is `[1, 1, (heads + 2 · kv_heads) · head_dim]`, `offset` the position as one i32. Returns q, k and v as
    /// `[1, heads, 1, head_dim]`.
    pub(super) fn forward(&self, qkv: &Array, offset: &Array) -> Result<[Array; 3], Exception> {
        let mut inputs = vec![qkv, offset, &self.angles];
        inputs.extend(&self.norms);
        self.kernel
            .apply(&inputs)?
            .try_into()
            .map_err(|_| Exception::custom("the kernel made another number of arrays"))
    }
}

fn body(normed: bool, eps: f32) -> String {
    let weight = if normed { "(head < HEADS ? q_norm : k_norm)" } else { "static_cast<const T*>(nullptr)" };
    format!(
        "const int head = blockIdx.x, lane = threadIdx.x;
const T* from = qkv + head * D;
if (head >= HEADS + KV_HEADS) {{
  T* to = v + (head - HEADS - KV_HEADS) * D;
  for (int i = lane; i < D; i += 32) to[i] = from[i];
  return;
}}
T* to = head < HEADS ? q + head * D : k + (head - HEADS) * D;
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
const float position = static_cast<float>(offset[0]);
for (int i = lane; i < D / 2; i += 32) {{
  float a = static_cast<float>(from[i]), b = static_cast<float>(from[i + D / 2]);
  if (NORM) {{
    a = static_cast<float>(static_cast<T>(a * scale)) * static_cast<float>(weight[i]);
    b = static_cast<float>(static_cast<T>(b * scale)) * static_cast<float>(weight[i + D / 2]);
    a = static_cast<float>(static_cast<T>(a));
    b = static_cast<float>(static_cast<T>(b));
  }}
  float sine, cosine;
  sincosf(position * angles[i], &sine, &cosine);
  to[i] = static_cast<T>(a * cosine - b * sine);
  to[i + D / 2] = static_cast<T>(a * sine + b * cosine);
}}
"
    )
}
