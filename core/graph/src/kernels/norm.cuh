// Rows normalized into fragment order.

// One row of x, normalized, to its place in fragment order. For a block of threads.
template <typename T, int K, int GROUP, int NT>
__device__ __forceinline__ void mesh_norm_row(const T* x, const T* weight, float eps, int row, T* out) {
  __shared__ float partial[32];
  const uint4* from = reinterpret_cast<const uint4*>(x);
  float sum = 0.0f;
  for (int part = threadIdx.x; part < K / 8; part += blockDim.x) {
    uint4 packed = from[part];
    unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
    for (int i = 0; i < 4; ++i) {
      float2 v = mesh_pair<T>(words[i]);
      sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
    }
  }
  for (int step = 16; step > 0; step >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, step);
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = 0.0f;
  for (int i = 0; i < blockDim.x / 32; ++i) sum += partial[i];
  const float scale = rsqrtf(sum / K + eps);
  for (int part = threadIdx.x; part < K / 8; part += blockDim.x) {
    uint4 packed = from[part], gain = reinterpret_cast<const uint4*>(weight)[part], moved;
    T *values = reinterpret_cast<T*>(&packed), *by = reinterpret_cast<T*>(&gain), *to = reinterpret_cast<T*>(&moved);
#pragma unroll
    for (int n = 0; n < 8; ++n) {
      T normalized = static_cast<T>(static_cast<float>(values[n]) * scale);
      to[n % 4 * 2 + n / 4] = static_cast<T>(static_cast<float>(normalized) * static_cast<float>(by[n]));
    }
    *reinterpret_cast<uint4*>(out + mesh_place<GROUP, NT>(row, part * 8)) = moved;
  }
}
