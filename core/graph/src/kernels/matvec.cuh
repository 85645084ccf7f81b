// Helpers of the 4-bit matrix-vector product. T is a 16-bit float type.

template <typename T>
__device__ __forceinline__ float2 mesh_unpack(unsigned pair);
template <>
__device__ __forceinline__ float2 mesh_unpack<__nv_bfloat16>(unsigned pair) {
  return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xffff0000u));
}
template <>
__device__ __forceinline__ float2 mesh_unpack<__half>(unsigned pair) {
  return __half22float2(*reinterpret_cast<__half2*>(&pair));
}

__device__ __forceinline__ float mesh_warp_sum(float value) {
#pragma unroll
  for (int step = 16; step > 0; step >>= 1) {
    value += __shfl_xor_sync(0xffffffffu, value, step);
  }
  return value;
}

// Brings the K values of x into shared memory, normalized if NORM. A lane later reads its 32 values as four uint4 that
// lie 32 uint4 apart, so that a warp's reads meet no bank twice.
template <typename T, int K, bool NORM>
__device__ __forceinline__ void mesh_stage(const T* x, const T* weight, float eps, uint4* staged, float* partial) {
  constexpr int PARTS = K / 8;
  const uint4* from = reinterpret_cast<const uint4*>(x);
  float scale = 1.0f;
  if (NORM) {
    float sum = 0.0f;
    for (int part = threadIdx.x; part < PARTS; part += blockDim.x) {
      uint4 packed = from[part];
      unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 v = mesh_unpack<T>(words[i]);
        sum = fmaf(v.x, v.x, fmaf(v.y, v.y, sum));
      }
    }
    sum = mesh_warp_sum(sum);
    if (threadIdx.x % 32 == 0) {
      partial[threadIdx.x / 32] = sum;
    }
    __syncthreads();
    sum = 0.0f;
    for (int i = 0; i < blockDim.x / 32; ++i) {
      sum += partial[i];
    }
    scale = rsqrtf(sum / K + eps);
  }
  for (int part = threadIdx.x; part < PARTS; part += blockDim.x) {
    uint4 packed = from[part];
    if (NORM) {
      T* values = reinterpret_cast<T*>(&packed);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        T normalized = static_cast<T>(static_cast<float>(values[i]) * scale);
        values[i] = static_cast<T>(static_cast<float>(normalized) * static_cast<float>(weight[part * 8 + i]));
      }
    }
    int chunk = part / 128, lane = part % 128 / 4, quarter = part % 4;
    staged[chunk * 128 + quarter * 32 + lane] = packed;
  }
  __syncthreads();
}

// Adds to acc[r] this lane's share of row `row + r` of a packed [rows, K] matrix times the staged x.
//
// A code q becomes the float 128 + q by placing its bits into 128's mantissa, which costs no conversion; the 128 is
// taken back with the group's bias.
template <typename T, int K, int GROUP, int ROWS>
__device__ __forceinline__ void
mesh_dot(const uint4* staged, const unsigned* w, const T* s, const T* b, int row, int lane, float* acc) {
#pragma unroll 2
  for (int chunk = 0; chunk < (K + 1023) / 1024; ++chunk) {
    const int at = chunk * 1024 + lane * 32;
    if (K % 1024 != 0 && at >= K) {
      break;
    }
    uint4 codes[ROWS];
    float scale[ROWS], bias[ROWS];
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      codes[r] = __ldcs(reinterpret_cast<const uint4*>(w + static_cast<size_t>(row + r) * (K / 8) + at / 8));
      scale[r] = static_cast<float>(s[(row + r) * (K / GROUP) + at / GROUP]);
      bias[r] = static_cast<float>(b[(row + r) * (K / GROUP) + at / GROUP]);
    }
    float x[32], sum = 0.0f;
#pragma unroll
    for (int quarter = 0; quarter < 4; ++quarter) {
      uint4 packed = staged[chunk * 128 + quarter * 32 + lane];
      unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float2 v = mesh_unpack<T>(words[i]);
        x[quarter * 8 + i * 2] = v.x;
        x[quarter * 8 + i * 2 + 1] = v.y;
        sum += v.x + v.y;
      }
    }
#pragma unroll
    for (int r = 0; r < ROWS; ++r) {
      unsigned words[4] = {codes[r].x, codes[r].y, codes[r].z, codes[r].w};
      float dot = 0.0f;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
#pragma unroll
        for (int n = 0; n < 8; ++n) {
          unsigned moved = n <= 4 ? words[i] << (16 - 4 * n) : words[i] >> (4 * n - 16);
          dot = fmaf(__uint_as_float((moved & 0x000f0000u) | 0x43000000u), x[i * 8 + n], dot);
        }
      }
      acc[r] += fmaf(scale[r], dot, fmaf(-128.0f, scale[r], bias[r]) * sum);
    }
  }
}
