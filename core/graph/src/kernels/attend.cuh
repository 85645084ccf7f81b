// Attention of one token a row over keys and values as they lie in the cache.

// What a thread group has seen so far of the softmax of G heads, D / LANES values of each a lane.
template <int G>
struct mesh_seen {
  float most[G], total[G], acc[G][8];
};

template <int G>
__device__ __forceinline__ void mesh_merge(mesh_seen<G>& seen, int step) {
#pragma unroll
  for (int g = 0; g < G; ++g) {
    const float most = fmaxf(seen.most[g], __shfl_xor_sync(0xffffffffu, seen.most[g], step));
    const float by = exp2f(seen.most[g] - most);
    seen.most[g] = most;
    seen.total[g] *= by;
    seen.total[g] += __shfl_xor_sync(0xffffffffu, seen.total[g], step);
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      seen.acc[g][i] *= by;
      seen.acc[g][i] += __shfl_xor_sync(0xffffffffu, seen.acc[g][i], step);
    }
  }
}

template <typename T>
__device__ __forceinline__ void mesh_floats(uint4 packed, float (&to)[8]) {
  unsigned words[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 v = mesh_pair<T>(words[i]);
    to[i * 2] = v.x;
    to[i * 2 + 1] = v.y;
  }
}

// The G query heads `q` that share one head of keys and values, over its columns from `from` to `to`; rows of columns
// are `k_step` and `v_step` values apart. Hands each head's share to `finish(head, dimension, largest score, sum of
// weights, sum of weighted values)`, scores in powers of two.
template <typename T, int D, int G, int WARPS, typename Finish>
__device__ __forceinline__ void mesh_attend(
    const T* q, const T* k, const T* v, size_t k_step, size_t v_step, int from, int to, float scale, Finish finish) {
  constexpr int LANES = D / 8, KEYS = 32 / LANES, AHEAD = 4;
  __shared__ float most[WARPS][G], total[WARPS][G], acc[WARPS][G][D];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, part = lane % LANES, key = lane / LANES;
  float query[G][8];
  mesh_seen<G> seen;
#pragma unroll
  for (int g = 0; g < G; ++g) {
    mesh_floats<T>(*reinterpret_cast<const uint4*>(q + g * D + part * 8), query[g]);
    seen.most[g] = -1e30f;
    seen.total[g] = 0.0f;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      query[g][i] *= scale * 1.4426950408889634f;
      seen.acc[g][i] = 0.0f;
    }
  }
  for (int base = from + warp * KEYS * AHEAD; base < to; base += WARPS * KEYS * AHEAD) {
    uint4 keys[AHEAD], values[AHEAD];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      const size_t at = base + u * KEYS + key;
      const bool real = at < to;
      keys[u] = real ? __ldg(reinterpret_cast<const uint4*>(k + at * k_step + part * 8)) : uint4{};
      values[u] = real ? __ldg(reinterpret_cast<const uint4*>(v + at * v_step + part * 8)) : uint4{};
    }
    float score[AHEAD][G];
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      float x[8];
      mesh_floats<T>(keys[u], x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
        float dot = 0.0f;
#pragma unroll
        for (int i = 0; i < 8; ++i) dot = fmaf(query[g][i], x[i], dot);
#pragma unroll
        for (int step = 1; step < LANES; step *= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        score[u][g] = base + u * KEYS + key < to ? dot : -INFINITY;
      }
    }
#pragma unroll
    for (int g = 0; g < G; ++g) {
      float top = seen.most[g];
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) top = fmaxf(top, score[u][g]);
      const float by = exp2f(seen.most[g] - top);
      seen.most[g] = top;
      seen.total[g] *= by;
#pragma unroll
      for (int i = 0; i < 8; ++i) seen.acc[g][i] *= by;
#pragma unroll
      for (int u = 0; u < AHEAD; ++u) seen.total[g] += score[u][g] = exp2f(score[u][g] - top);
    }
#pragma unroll
    for (int u = 0; u < AHEAD; ++u) {
      float x[8];
      mesh_floats<T>(values[u], x);
#pragma unroll
      for (int g = 0; g < G; ++g) {
#pragma unroll
        for (int i = 0; i < 8; ++i) seen.acc[g][i] = fmaf(score[u][g], x[i], seen.acc[g][i]);
      }
    }
  }
#pragma unroll
  for (int step = LANES; step < 32; step *= 2) mesh_merge<G>(seen, step);
  if (key == 0) {
#pragma unroll
    for (int g = 0; g < G; ++g) {
      if (part == 0) {
        most[warp][g] = seen.most[g];
        total[warp][g] = seen.total[g];
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) acc[warp][g][part * 8 + i] = seen.acc[g][i];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < G * D; i += WARPS * 32) {
    const int g = i / D, d = i % D;
    float top = most[0][g], sum = 0.0f, value = 0.0f;
    for (int other = 1; other < WARPS; ++other) top = fmaxf(top, most[other][g]);
    for (int other = 0; other < WARPS; ++other) {
      const float by = exp2f(most[other][g] - top);
      sum = fmaf(by, total[other][g], sum);
      value = fmaf(by, acc[other][g][d], value);
    }
    finish(g, d, top, sum, value);
  }
}
