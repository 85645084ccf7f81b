// Helpers for steps of several rows, one token each. T is a 16-bit float type, NT counts tiles of eight rows.
//
// A packed matrix meets the rows on tensor cores: its codes are one operand, as they lie in memory, and the rows the
// other. What is summed may come in any order, so the rows are stored in the order in which lanes find the codes
// ("fragment order"), and nothing is moved about on the way: blocks of 64 columns, in them tiles of eight rows, in
// them two halves of 32 lanes, and for each lane the eight values that meet one word of codes, n beside n + 4.

template <typename T>
__device__ __forceinline__ float2 mesh_pair(unsigned pair) {
  T* values = reinterpret_cast<T*>(&pair);
  return make_float2(static_cast<float>(values[0]), static_cast<float>(values[1]));
}

// Where column `k` of row `row` lies in fragment order. A lane reads two words of codes of each block: neighbours, but
// where groups are 32 wide, words that are four apart, so that what is summed has one scale.
template <int GROUP, int NT>
__device__ __forceinline__ int mesh_place(int row, int k) {
  const int word = k % 64 / 8, n = k % 8;
  const int lane = GROUP == 32 ? word % 4 : word / 2, half = GROUP == 32 ? word / 4 : word % 2;
  return (((k / 64 * NT + row / 8) * 2 + half) * 32 + row % 8 * 4 + lane) * 8 + n % 4 * 2 + n / 4;
}
