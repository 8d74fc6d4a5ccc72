// The device code of gram_few: K = g gᵀ and v = g uᵀ of l matrices g [n, p] with few rows, n ≤ 8, of 16-bit numbers.
// Free of torch and of the CUDA runtime, so that the tests can run it on a CPU.
//
// The direction u is one row more. A thread keeps the products of all M = n + m rows in registers, M (M + 1) / 2 sums,
// so that every number is read once. Products of two 16-bit numbers are exact in float32; a thread adds up at most 128
// of them there, everything after that in float64. Which numbers a block adds, and in which order, depends on the
// problem alone.
#pragma once

#include <cstdint>

namespace projgrad {

struct FewRows {
  const uint16_t *g, *u;  // [l, n, p] and [l, m, p], m ≤ 1; rows at 16 bytes, p a multiple of 8
  double *part, *K, *v;   // [l, M (M + 1) / 2, slices], [l, n, n], [l, n, m]
  int64_t l, n, p, m;
  int64_t g_layer, g_row, u_layer;  // strides
  int64_t slices, rounds;           // of a layer; of a slice: a thread takes eight columns in every round
};

constexpr int kFewRows = 8;  // without u
constexpr int kFewThreads = 256, kFewWarps = kFewThreads / 32;
constexpr int kFewColumns = 128;  // of a thread, at most
// Blocks that all layers together aim at, 8 for each of 128 multiprocessors. There are fewer where a thread would have
// less than two rounds, and more where it would have more than kFewColumns.
constexpr int64_t kFewBlocks = 1024;
constexpr unsigned kWarp = 0xffffffffu;
// The smallest square of a row in one slice that float32 gives. Products below 2^-126 are rounded to multiples of
// 2^-149, by 2^-150 at most. A slice has up to 2^15 of them, so a square of 2^-95 or more, and every product of two
// such rows, keeps a relative 2^-40.
constexpr float kSafeSquare = 0x1p-95f;

// Blocks that share a multiprocessor, which bounds their registers. With 16 bytes of every row on their way to a
// thread, 32 to 86 KB are on their way to a multiprocessor.
__host__ __device__ constexpr int few_blocks(int rows) { return rows == 1 ? 8 : rows <= 5 ? 4 : rows <= 7 ? 3 : 2; }

inline void cut_into_slices(FewRows& f) {
  const int64_t eights = f.p / 8, fair = (f.l * eights - 1) / (kFewBlocks * kFewThreads) + 1;
  f.rounds = fair < 2 ? 2 : fair > kFewColumns / 8 ? kFewColumns / 8 : fair;
  f.slices = (eights + f.rounds * kFewThreads - 1) / (f.rounds * kFewThreads);
}

struct alignas(16) EightNumbers {
  unsigned words[4];
};

struct BFloat16Pair {
  __device__ static float low(unsigned word) { return __uint_as_float(word << 16); }
  __device__ static float high(unsigned word) { return __uint_as_float(word & 0xffff0000u); }
};

struct HalfPair {
  __device__ static float low(unsigned word) { return __half2float(__ushort_as_half(word & 0xffffu)); }
  __device__ static float high(unsigned word) { return __half2float(__ushort_as_half(word >> 16)); }
};

// Adds COUNT numbers over the lanes of a warp into out [COUNT]. In every step a lane gives away half of its numbers and
// gets its partner's share of the others: about COUNT exchanges a lane in all, not 5 COUNT. Where COUNT is odd a lane
// gets a zero too much; only the first `left` numbers are written.
template <int COUNT, int STEP, class T>
__device__ void add_lanes(const T (&x)[COUNT], int lane, int left, double* out) {
  if constexpr (STEP == 0) {
#pragma unroll
    for (int k = 0; k < COUNT; ++k)
      if (k < left) out[k] = x[k];
  } else {
    constexpr int HALF = (COUNT + 1) / 2;
    const bool upper = lane & STEP;
    double sums[HALF];
#pragma unroll
    for (int k = 0; k < HALF; ++k) {
      const T low = x[k], high = k + HALF < COUNT ? x[(k + HALF) % COUNT] : T(0);
      sums[k] = static_cast<double>(upper ? high : low) + __shfl_xor_sync(kWarp, upper ? low : high, STEP);
    }
    if (upper) left -= HALF, out += HALF;
    add_lanes<HALF, STEP / 2>(sums, lane, left < HALF ? left : HALF, out);
  }
}

// Number k of COUNT, added over the block, on thread k.
template <int COUNT, class T>
__device__ double add_threads(const T (&x)[COUNT], double* shared) {
  const int thread = threadIdx.x;
  __syncthreads();  // what shared memory held has been read
  add_lanes<COUNT, 16>(x, thread % 32, COUNT, shared + thread / 32 * COUNT);
  __syncthreads();
  double total = 0;
  if (thread < COUNT)
    for (int w = 0; w < kFewWarps; ++w) total += shared[w * COUNT + thread];
  return total;
}

// Adds the products of M rows in one slice of the columns of one layer. In shared memory: sums, kFewWarps M (M + 1) / 2
// of them, and a mask for every warp.
template <class Pair, int M>
__device__ void add_slice(const FewRows& f, int64_t block, double* shared, unsigned* masks) {
  constexpr int V = M * (M + 1) / 2;
  const int64_t layer = block / f.slices, slice = block % f.slices, begin = slice * f.rounds * kFewThreads * 8;
  const int64_t columns = f.p - begin < f.rounds * kFewThreads * 8 ? f.p - begin : f.rounds * kFewThreads * 8;
  const int thread = threadIdx.x, end = static_cast<int>(columns / 8);
  const uint16_t* g = f.g + layer * f.g_layer + begin;
  const uint16_t* last = f.n < M ? f.u + layer * f.u_layer + begin : g + (M - 1) * f.g_row;
  auto load = [&](int i, int at) {
    return reinterpret_cast<const EightNumbers*>(i == M - 1 ? last : g + i * f.g_row)[at];
  };

  float sums[V] = {};
  unsigned bits[M] = {};
#pragma unroll 1
  for (int at = thread; at < end; at += kFewThreads) {
    EightNumbers x[M];
#pragma unroll
    for (int i = 0; i < M; ++i) x[i] = load(i, at);
#pragma unroll
    for (int w = 0; w < 4; ++w) {
      float low[M], high[M];
#pragma unroll
      for (int i = 0; i < M; ++i) {
        const unsigned word = x[i].words[w];
        bits[i] |= word & 0x7fff7fffu;  // without the signs
        low[i] = Pair::low(word), high[i] = Pair::high(word);
      }
#pragma unroll
      for (int i = 0; i < M; ++i)
#pragma unroll
        for (int j = 0; j <= i; ++j) {
          sums[i * (i + 1) / 2 + j] += low[i] * low[j];
          sums[i * (i + 1) / 2 + j] += high[i] * high[j];
        }
    }
  }

  unsigned mask = 0;  // of the rows that are not zero
#pragma unroll
  for (int i = 0; i < M; ++i) mask |= static_cast<unsigned>(bits[i] != 0) << i;
  for (int step = 16; step; step /= 2) mask |= __shfl_xor_sync(kWarp, mask, step);
  if (thread % 32 == 0) masks[thread / 32] = mask;
  const double total = add_threads<V>(sums, shared);
  for (int w = 0; w < kFewWarps; ++w) mask |= masks[w];
  bool good = true;
#pragma unroll
  for (int i = 0; i < M; ++i)  // thread i (i + 3) / 2 has the square of row i; infinity and NaN are not good
    if (thread == i * (i + 3) / 2 && mask >> i & 1) good = total >= kSafeSquare && total - total == 0;
  double* part = f.part + layer * V * f.slices + slice;
  if (__syncthreads_and(good)) {
    if (thread < V) part[thread * f.slices] = total;
    return;
  }
  // The square of a row is out of range: once more in float64, row by row.
#pragma unroll 1
  for (int i = 0; i < M; ++i) {
    double products[M] = {};
#pragma unroll 1
    for (int at = thread; at < end; at += kFewThreads) {
      const EightNumbers x = load(i, at);
#pragma unroll
      for (int j = 0; j < M; ++j) {
        if (j > i) continue;
        const EightNumbers y = load(j, at);
#pragma unroll
        for (int w = 0; w < 4; ++w) {
          products[j] += static_cast<double>(Pair::low(x.words[w])) * Pair::low(y.words[w]);
          products[j] += static_cast<double>(Pair::high(x.words[w])) * Pair::high(y.words[w]);
        }
      }
    }
    const double sum = add_threads<M>(products, shared);
    if (thread <= i) part[(i * (i + 1) / 2 + thread) * f.slices] = sum;
  }
}

// Adds the slices of one product of two rows and writes it to K or v: one warp.
__device__ inline void add_slices(const FewRows& f, int64_t index) {
  const int64_t rows = f.n + f.m, size = rows * (rows + 1) / 2, layer = index / size;
  const double* part = f.part + index * f.slices;
  double total = 0;
#pragma unroll 8
  for (int64_t s = threadIdx.x; s < f.slices; s += 32) total += part[s];
  for (int step = 16; step; step /= 2) total += __shfl_xor_sync(kWarp, total, step);
  if (threadIdx.x != 0) return;
  int64_t i = 0, j = index % size;
  while (j > i) j -= ++i;
  if (i < f.n) f.K[(layer * f.n + i) * f.n + j] = f.K[(layer * f.n + j) * f.n + i] = total;
  else if (j < f.n) f.v[layer * f.n + j] = total;  // not the square of u
}

}  // namespace projgrad
