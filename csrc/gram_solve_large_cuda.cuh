// gram_solve on CUDA for systems that leave the registers of one block. A right-looking Cholesky by panels of 32
// pivots, one launch a step: a block a system finds the pivots of a panel, then one block for every tile of 64 x 64
// takes the panel off what is left of C. A matrix is read and written once a panel, not once a pivot, and a few large
// systems use all multiprocessors. How many launches there are depends on n only, so nobody waits for a rank.
#pragma once

#include "gram_solve_cuda.cuh"

namespace projgrad {

constexpr int kPanel = 32, kTile = 64, kTileThreads = 256, kPanelThreads = 512;
constexpr int64_t kPanelShared = 8 * kPanel * 3 + 16 * 32, kTileShared = 8 * 2 * kPanel * kTile;
constexpr int64_t kSubstituteShared = 8 * kPanel * (kPanel + 2);

// Doubles of device memory for each system.
__host__ __device__ inline int64_t scratch_size(int64_t n, int64_t m) { return n * (n + 4 + 2 * m) + 3; }
// Tiles of the lower triangle.
__host__ __device__ inline int64_t tile_count(int64_t n) {
  const int64_t side = (n + kTile - 1) / kTile;
  return side * (side + 1) / 2;
}

// What is kept of one system between launches.
struct Large {
  double* matrix;                  // [n, n]: C in its lower triangle; row p is a row of the factor once p was a pivot
  double *scale, *left, *inverse;  // [n]
  int64_t* pivots;                 // [n]
  double *w, *x;                   // [m, n]: what the elimination left of b, and the solution
  double *finite, *first, *ended;  // flags, and the first pivot of the last panel

  template <class T>
  __device__ Large(const Systems<T>& s, int64_t system) {
    matrix = s.scratch + system * scratch_size(s.n, s.m);
    scale = matrix + s.n * s.n, left = scale + s.n, inverse = left + s.n;
    pivots = reinterpret_cast<int64_t*>(inverse + s.n);
    w = inverse + 2 * s.n, x = w + s.m * s.n;
    finite = x + s.m * s.n, first = finite + 1, ended = finite + 2;
  }
};

// Step 1, a block a system.
template <class T>
__device__ void begin_large(const Systems<T>& s, int64_t system) {
  const Large a(s, system);
  const int64_t n = s.n, m = s.m;
  for (int64_t i = threadIdx.x; i < n; i += blockDim.x) {
    const double square = static_cast<double>(s.K[(system * n + i) * n + i]);
    const double scale = square > 0 ? rsqrt(square) : 0.0;
    a.left[i] = square > 0 ? 1 + s.damping : 0.0;
    a.scale[i] = scale;
#pragma unroll 1
    for (int64_t d = 0; d < m; ++d) {
      a.w[d * n + i] = static_cast<double>(s.b[(system * n + i) * m + d]) * scale;
      a.x[d * n + i] = 0;
    }
  }
  if (threadIdx.x == 0) s.rank[system] = 0, s.pivot[system] = 1 + s.damping, *a.finite = 1, *a.first = *a.ended = 0;
}

// Row and column of a tile of the lower triangle, counted row by row.
__device__ inline void corner(int64_t tile, int64_t& row, int64_t& column) {
  int64_t i = 0;
  while (tile > i) tile -= ++i;
  row = i * kTile, column = tile * kTile;
}

// Step 2, a block a tile: C = D⁻¹ K D⁻¹, and whether all of K is finite.
template <class T>
__device__ void scale_tile(const Systems<T>& s, int64_t system, int64_t tile) {
  const Large a(s, system);
  const int64_t n = s.n;
  const T* K = s.K + system * n * n;
  int64_t row, column;
  corner(tile, row, column);
  bool finite = true;
  for (int k = threadIdx.x; k < kTile * kTile; k += blockDim.x) {
    const int64_t i = row + k / kTile, j = column + k % kTile;
    if (i >= n || j >= n) continue;
    finite &= is_finite(K[i * n + j]) && is_finite(K[j * n + i]);
    a.matrix[i * n + j] = static_cast<double>(K[i * n + j]) * a.scale[i] * a.scale[j];
  }
  if (!finite) *a.finite = 0;
}

// Step 3, a block a system: up to kPanel pivots, their rows of the factor, and what they leave of b.
template <class T>
__device__ void eliminate_panel(const Systems<T>& s, int64_t system, double* shared) {
  const Large a(s, system);
  const int64_t n = s.n, first = s.rank[system];
  const int threads = blockDim.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = threads / 32;
  double *weight = shared, *over = shared + kPanel;                 // of the pivots of this panel
  int64_t* rows = reinterpret_cast<int64_t*>(shared + 2 * kPanel);  // where their rows of the factor begin
  Pivot* found = reinterpret_cast<Pivot*>(shared + 3 * kPanel);     // a warp each
  const bool stop = *a.finite == 0 || *a.ended != 0;
  double smallest = s.pivot[system];
  Pivot mine;
  for (int64_t i = thread; i < n; i += threads) mine.consider(a.left[i], static_cast<unsigned>(i), s.rtol);
  int count = 0;
  for (; !stop && count < kPanel && first + count < n; ++count) {
    mine = best(mine);
    if (lane == 0) found[warp] = mine;
    __syncthreads();
    const Pivot pivot = best(lane < warps ? found[lane] : Pivot());
    if (!pivot.bits) break;
    const int64_t p = pivot.index;
    const double value = pivot.value(), inverse = 1 / value;
    if (value < smallest) smallest = value;
    if (thread < count) weight[thread] = a.matrix[rows[thread] + p] * over[thread];
    __syncthreads();
    if (thread == 0) {
      rows[count] = p * n, over[count] = inverse;
      a.pivots[first + count] = p, a.inverse[first + count] = inverse;
    }
    mine = Pivot();
    for (int64_t i = thread; i < n; i += threads) {
      double r = 0;
      if (i != p && a.left[i] != kUsed) {
        r = i < p ? a.matrix[p * n + i] : a.matrix[i * n + p];
        double even = 0, odd = 0;  // two chains: one alone would wait for each of its products
#pragma unroll 4
        for (int q = 0; q + 2 <= count; q += 2) {
          even += a.matrix[rows[q] + i] * weight[q];
          odd += a.matrix[rows[q + 1] + i] * weight[q + 1];
        }
        if (count % 2) even += a.matrix[rows[count - 1] + i] * weight[count - 1];
        r -= even + odd;
        a.left[i] -= r * r * inverse;
        for (int64_t d = 0; d < s.m; ++d) a.w[d * n + i] -= r * (a.w[d * n + p] * inverse);
      } else if (i == p) {
        a.left[i] = kUsed;
      }
      a.matrix[p * n + i] = r;
      mine.consider(a.left[i], static_cast<unsigned>(i), s.rtol);
    }
  }
  __syncthreads();  // all have read the rank
  if (thread == 0) {
    s.rank[system] = first + count, s.pivot[system] = smallest;
    *a.first = static_cast<double>(first);
    if (count < kPanel) *a.ended = 1;
  }
}

// Step 4, a block of kTileThreads a tile: takes the last panel off the rows that were no pivots yet.
template <class T>
__device__ void update_tile(const Systems<T>& s, int64_t system, int64_t tile, double* shared) {
  const Large a(s, system);
  const int64_t n = s.n, first = static_cast<int64_t>(*a.first);
  if (*a.ended != 0 || s.rank[system] != first + kPanel) return;
  int64_t row, column;
  corner(tile, row, column);
  double *above = shared, *beside = shared + kPanel * kTile;
  for (int k = threadIdx.x; k < kPanel * kTile; k += kTileThreads) {
    const int64_t q = first + k / kTile, i = row + k % kTile, j = column + k % kTile;
    const double* factor = a.matrix + a.pivots[q] * n;
    beside[k] = i < n ? factor[i] * a.inverse[q] : 0.0;
    above[k] = j < n ? factor[j] : 0.0;
  }
  __syncthreads();
  const int y = threadIdx.x / 16, x = threadIdx.x % 16;
  double sum[4][4] = {};
#pragma unroll 4
  for (int q = 0; q < kPanel; ++q) {
    double right[4];
#pragma unroll
    for (int e = 0; e < 4; ++e) right[e] = above[q * kTile + x + 16 * e];
#pragma unroll
    for (int f = 0; f < 4; ++f) {
      const double left = beside[q * kTile + y + 16 * f];
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[f][e] += left * right[e];
    }
  }
#pragma unroll
  for (int f = 0; f < 4; ++f)
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int64_t i = row + y + 16 * f, j = column + x + 16 * e;
      if (i < n && j <= i && a.left[i] != kUsed) a.matrix[i * n + j] -= sum[f][e];
    }
}

// Step 5, a block a right-hand side: back substitution, panel by panel from the last.
template <class T>
__device__ void substitute_large(const Systems<T>& s, int64_t system, int64_t d, double* shared) {
  const Large a(s, system);
  const int64_t n = s.n, m = s.m;
  const int threads = blockDim.x, thread = threadIdx.x, lane = thread % 32, warp = thread / 32, warps = threads / 32;
  const double* w = a.w + d * n;
  double *x = a.x + d * n, *y = shared, *triangle = shared + kPanel;
  bool good = *a.finite != 0;
  for (int64_t i = thread; i < n; i += threads) good &= is_finite(s.b[(system * n + i) * m + d]);
  good = __syncthreads_and(good);
  for (int64_t last = s.rank[system]; last > 0;) {
    const int64_t first = last > kPanel ? last - kPanel : 0;
    const int count = static_cast<int>(last - first);
    for (int q = warp; q < count; q += warps) {
      const double* row = a.matrix + a.pivots[first + q] * n;
      double sum = 0;
#pragma unroll 4
      for (int64_t i = lane; i < n; i += 32) sum += row[i] * x[i];
      for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(kAll, sum, step);
      if (lane == 0) y[q] = w[a.pivots[first + q]] - sum;
      if (lane < count) triangle[q * (kPanel + 1) + lane] = row[a.pivots[first + lane]];
    }
    __syncthreads();
    if (warp == 0) {
      double mine = lane < count ? y[lane] : 0.0;
      const double over = lane < count ? a.inverse[first + lane] : 0.0;
      for (int k = count - 1; k >= 0; --k) {
        const double value = __shfl_sync(kAll, mine * over, k);
        if (lane < k) mine -= triangle[lane * (kPanel + 1) + k] * value;
        if (lane == k) mine = value;
      }
      if (lane < count) x[a.pivots[first + lane]] = mine;
    }
    __syncthreads();
    last = first;
  }
  const T nan = static_cast<T>(__longlong_as_double(0x7ff8000000000000LL));
  for (int64_t i = thread; i < n; i += threads)
    s.x[(system * n + i) * m + d] = good ? static_cast<T>(x[i] * a.scale[i]) : nan;
}

// Threads of a block that searches n rows for a pivot: as few warps as have one each.
__host__ __device__ inline int panel_threads(int64_t n) {
  return n < kPanelThreads ? static_cast<int>((n > 32 ? n + 31 : 63) / 32 * 32) : kPanelThreads;
}

// All steps in order: launch(step, blocks, threads, shared) is what runs one.
enum class Step { begin, scale, panel, update, substitute };
template <class Launch>
void in_steps(int64_t l, int64_t n, int64_t m, int threads, const Launch& launch) {
  const int64_t tiles = tile_count(n);
  launch(Step::begin, l, threads, 0);
  launch(Step::scale, l * tiles, kTileThreads, 0);
  for (int64_t done = 0; done < n; done += kPanel) {
    launch(Step::panel, l, threads, kPanelShared);
    if (done + kPanel < n) launch(Step::update, l * tiles, kTileThreads, kTileShared);
  }
  if (m) launch(Step::substitute, l * m, threads, kSubstituteShared);
}

template <Step STEP, class T>
__device__ void run_step(const Systems<T>& s, unsigned block, double* shared) {  // 64-bit division would be a call
  const unsigned tiles = static_cast<unsigned>(tile_count(s.n)), m = static_cast<unsigned>(s.m);
  if constexpr (STEP == Step::begin) begin_large(s, block);
  if constexpr (STEP == Step::scale) scale_tile(s, block / tiles, block % tiles);
  if constexpr (STEP == Step::panel) eliminate_panel(s, block, shared);
  if constexpr (STEP == Step::update) update_tile(s, block / tiles, block % tiles, shared);
  if constexpr (STEP == Step::substitute) substitute_large(s, block / m, block % m, shared);
}

}  // namespace projgrad
