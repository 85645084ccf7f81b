// A packed 4-bit matrix times rows in fragment order, on tensor cores.

template <typename T>
struct mesh_half;
template <>
struct mesh_half<__nv_bfloat16> {
  static constexpr unsigned codes = 0x43004300u, ones = 0x3f803f80u;
  static constexpr float offset = 128.0f;
};
template <>
struct mesh_half<__half> {
  static constexpr unsigned codes = 0x64006400u, ones = 0x3c003c00u;
  static constexpr float offset = 1024.0f;
};

__device__ __forceinline__ void mesh_product(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ __forceinline__ void mesh_product(
    float (&d)[4], unsigned a0, unsigned a1, unsigned a2, unsigned a3, unsigned b0, unsigned b1, __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},{%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

template <typename T, int N>
struct alignas(sizeof(T) * N) mesh_several {
  T v[N];
};

// Sixteen rows of a packed matrix, as one lane sees them: from row `lane / 4` on; the other it reads is eight further.
template <typename T>
struct mesh_tile {
  const unsigned* w;
  const T *s, *b;
};
template <typename T, int K, int GROUP>
__device__ __forceinline__ mesh_tile<T> mesh_tile_at(const unsigned* w, const T* s, const T* b, int row) {
  const size_t at = row + threadIdx.x % 32 / 4;
  return {w + at * (K / 8), s + at * (K / GROUP), b + at * (K / GROUP)};
}

// What a lane has read of CHUNK blocks of 64 columns.
template <typename T, int GROUP, int TILES, int CHUNK>
struct mesh_read {
  static constexpr int SCALES = CHUNK * 64 >= GROUP ? CHUNK * 64 / GROUP : 1;
  uint2 w[TILES][2][CHUNK];
  mesh_several<T, SCALES> s[TILES][2], b[TILES][2];
};

template <typename T, int K, int GROUP, int TILES, int CHUNK>
__device__ __forceinline__ void
mesh_fetch(const mesh_tile<T> (&tiles)[TILES], int chunk, mesh_read<T, GROUP, TILES, CHUNK>& to) {
  using Scales = mesh_several<T, mesh_read<T, GROUP, TILES, CHUNK>::SCALES>;
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int m = 0; m < TILES; ++m) {
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const unsigned* w = tiles[m].w + r * K + chunk * CHUNK * 8;
#pragma unroll
      for (int c = 0; c < CHUNK; ++c) {
        to.w[m][r][c] = GROUP == 32 ? make_uint2(__ldcs(w + c * 8 + t), __ldcs(w + c * 8 + 4 + t))
                                    : __ldcs(reinterpret_cast<const uint2*>(w + c * 8 + 2 * t));
      }
      const int at = r * 8 * (K / GROUP) + chunk * CHUNK * 64 / GROUP;
      to.s[m][r] = *reinterpret_cast<const Scales*>(tiles[m].s + at);
      to.b[m][r] = *reinterpret_cast<const Scales*>(tiles[m].b + at);
    }
  }
}

// Adds to acc this warp's share of the columns of TILES tiles times the rows x. acc[m][n] holds rows `lane / 4` and
// eight further of tile m, by rows `lane % 4 * 2` and the next of x's tile n.
//
// A code q becomes the float 128 + q (1024 + q in f16) by placing its bits into that float's mantissa. Sums over a
// group are taken of those, and of x alone; the offset is taken back with the group's bias.
template <typename T, int K, int GROUP, int TILES, int NT, int WARPS, int CHUNK>
__device__ __forceinline__ void
mesh_multiply(const uint4* x, const mesh_tile<T> (&tiles)[TILES], float (&acc)[TILES][NT][4]) {
  using Half = mesh_half<T>;
  constexpr int CHUNKS = K / 64 / CHUNK, RUNS = GROUP == 32 ? 2 : 1;
  const int lane = threadIdx.x % 32;
  int chunk = threadIdx.x / 32;
  if (chunk >= CHUNKS) return;
  mesh_read<T, GROUP, TILES, CHUNK> now, next;
  mesh_fetch<T, K, GROUP, TILES, CHUNK>(tiles, chunk, now);
  for (; chunk < CHUNKS; chunk += WARPS) {
    if (chunk + WARPS < CHUNKS) mesh_fetch<T, K, GROUP, TILES, CHUNK>(tiles, chunk + WARPS, next);
#pragma unroll
    for (int c = 0; c < CHUNK; ++c) {
      uint4 xs[NT][2];
      float sum[RUNS][NT][4] = {};
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const uint4 v = xs[n][h] = __ldg(x + (((chunk * CHUNK + c) * NT + n) * 2 + h) * 32 + lane);
          float(&to)[4] = sum[RUNS == 2 ? h : 0][n];
          mesh_product(to, Half::ones, Half::ones, Half::ones, Half::ones, v.x, v.y, T());
          mesh_product(to, Half::ones, Half::ones, Half::ones, Half::ones, v.z, v.w, T());
        }
      }
#pragma unroll
      for (int m = 0; m < TILES; ++m) {
        float dot[NT][4] = {};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          const unsigned low = h ? now.w[m][0][c].y : now.w[m][0][c].x, high = h ? now.w[m][1][c].y : now.w[m][1][c].x;
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            unsigned a[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
              a[i] = ((i % 2 ? high : low) >> (step * 8 + i / 2 * 4)) & 0x000f000fu | Half::codes;
            }
#pragma unroll
            for (int n = 0; n < NT; ++n) {
              const uint4 v = xs[n][h];
              mesh_product(dot[n], a[0], a[1], a[2], a[3], step ? v.z : v.x, step ? v.w : v.y, T());
            }
          }
          if (RUNS == 2 || h == 1) {
            const int group = RUNS == 2 ? c * 2 + h : c * 64 / GROUP;
            const float(&x_sum)[NT][4] = sum[RUNS == 2 ? h : 0];
#pragma unroll
            for (int r = 0; r < 2; ++r) {
              const float s = static_cast<float>(now.s[m][r].v[group]);
              const float b = fmaf(-Half::offset, s, static_cast<float>(now.b[m][r].v[group]));
#pragma unroll
              for (int n = 0; n < NT; ++n) {
                float(&to)[4] = acc[m][n];
                to[r * 2] += fmaf(s, dot[n][r * 2], b * x_sum[n][0]);
                to[r * 2 + 1] += fmaf(s, dot[n][r * 2 + 1], b * x_sum[n][1]);
                dot[n][r * 2] = dot[n][r * 2 + 1] = 0.0f;
              }
            }
          }
        }
      }
    }
    now = next;
  }
}

// Sums what the warps of a block have of PARTS tiles at a time, and hands each value to `finish(first tile, row of the
// tile, row of x, values)`.
template <int TILES, int NT, int WARPS, int PARTS, typename Finish>
__device__ __forceinline__ void mesh_collect(const float (&acc)[TILES][NT][4], Finish finish) {
  // Rows of 20 keep a warp's writes off each other's banks.
  __shared__ float sums[WARPS][PARTS][NT * 8 * 20];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
#pragma unroll
  for (int m = 0; m < TILES; m += PARTS) {
    if (m > 0) __syncthreads();
#pragma unroll
    for (int p = 0; p < PARTS; ++p) {
#pragma unroll
      for (int n = 0; n < NT; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          sums[warp][p][(n * 8 + lane % 4 * 2 + i % 2) * 20 + lane / 4 + i / 2 * 8] = acc[m + p][n][i];
        }
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < NT * 128; i += WARPS * 32) {
      float value[PARTS] = {};
#pragma unroll
      for (int p = 0; p < PARTS; ++p) {
#pragma unroll
        for (int other = 0; other < WARPS; ++other) value[p] += sums[other][p][i / 16 * 20 + i % 16];
      }
      finish(m, i % 16, i / 16, value);
    }
  }
}
