// The device code of gram_solve: pivoted Cholesky of C = D⁻¹ K D⁻¹ + damping I in double, without the square roots,
// C = Σ_k r_k r_kᵀ / d_k. Free of torch and of the CUDA runtime, so that the tests can run it on a CPU.
//
// Up to n = 128 what is left of C stays in registers, and a step costs one barrier: the threads that hold the pivot's
// row publish it in shared memory, as row k of the factor, and every warp finds the next pivot by itself.
#pragma once

#include <cstdint>

namespace projgrad {

template <class T>
struct Systems {
  const T *K, *b;   // [l, n, n], [l, n, m]
  T* x;             // [l, n, m]
  int64_t* rank;    // [l]
  double* pivot;    // [l]
  double* scratch;  // large systems: [l, scratch_size]
  int64_t l, n, m;
  double damping, rtol;
};

constexpr unsigned kAll = 0xffffffffu;
constexpr double kUsed = -__builtin_huge_val();  // what is left of a row that was a pivot

template <class T>
__device__ inline bool is_finite(T x) {
  return x - x == 0;
}

__device__ inline unsigned largest(unsigned value) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 800
  for (int step = 16; step; step /= 2) value = max(value, __shfl_xor_sync(kAll, value, step));
  return value;
#else
  return __reduce_max_sync(kAll, value);
#endif
}

// A candidate: the bits of a positive double, whose order is that of the numbers; 0 is none.
struct Pivot {
  unsigned long long bits = 0;
  unsigned index = 0;

  __device__ double value() const { return __longlong_as_double(static_cast<long long>(bits)); }
  __device__ void consider(double left, unsigned row, double rtol) {
    const auto other = static_cast<unsigned long long>(__double_as_longlong(left));
    if (left > rtol && other > bits) bits = other, index = row;
  }
};

// The best of the candidates of a warp, the lowest row among equals, on every lane.
__device__ inline Pivot best(Pivot mine) {
  const unsigned high = largest(static_cast<unsigned>(mine.bits >> 32));
  const unsigned low = largest(mine.bits >> 32 == high ? static_cast<unsigned>(mine.bits) : 0u);
  Pivot found;
  found.bits = static_cast<unsigned long long>(high) << 32 | low;
  found.index = ~largest(mine.bits == found.bits ? ~mine.index : 0u);
  return found;
}

// C in the registers of one warp, n ≤ N: lane i holds row i.
template <int SIZE>
struct WarpMatrix {
  static constexpr int N = SIZE, threads = 32, pitch = N + 2;  // rows of the factor at 16 bytes
  double c[N];

  __device__ static void sync() { __syncwarp(); }

  template <class T>
  __device__ bool load(const T* K, int n, const double* scale, int lane) {
    bool finite = true;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const double value = lane < n && j < n ? static_cast<double>(K[j * n + lane]) : 0.0;
      finite &= is_finite(value);
      c[j] = value * scale[j] * scale[lane % N];
    }
    return __all_sync(kAll, finite);
  }
  __device__ void publish(int p, double* row, int lane) const {
    if (lane != p) return;
#pragma unroll
    for (int j = 0; j < N; j += 2) *reinterpret_cast<double2*>(row + j) = make_double2(c[j], c[j + 1]);
  }
  __device__ void update(const double* row, double inverse, int lane) {
    const double mine = row[lane % N] * inverse;
#pragma unroll
    for (int j = 0; j < N; j += 2) {
      const double2 pair = *reinterpret_cast<const double2*>(row + j);
      c[j] -= mine * pair.x;
      c[j + 1] -= mine * pair.y;
    }
  }
};

// C in the registers of 16 x 16 threads, n ≤ N = 16 R: thread (i, j) holds rows i + 16 a and columns j + 16 b, b ≤ a.
template <int R>
struct BlockMatrix {
  static constexpr int N = 16 * R, threads = 256, pitch = N + 1;  // columns of the factor without bank conflicts
  double c[R][R];

  __device__ static void sync() { __syncthreads(); }

  template <class T>
  __device__ bool load(const T* K, int n, const double* scale, int thread) {
    bool finite = true;
    for (int k = thread; k < n * n; k += threads) finite &= is_finite(K[k]);
    const int i = thread / 16, j = thread % 16;
#pragma unroll
    for (int a = 0; a < R; ++a)
#pragma unroll
      for (int b = 0; b <= a; ++b) {
        const int row = i + 16 * a, column = j + 16 * b;
        const double value = row < n && column < n ? static_cast<double>(K[row * n + column]) : 0.0;
        c[a][b] = value * scale[row] * scale[column];
      }
    return __syncthreads_and(finite);
  }
  __device__ void publish(int p, double* row, int thread) const {
    const int i = thread / 16, j = thread % 16;
#pragma unroll
    for (int a = 0; a < R; ++a) {
      const int inside = p - 16 * a;  // not a == p / 16: the compiler would index registers by p, in local memory
      if (inside < 0 || inside >= 16) continue;
      if (i == inside)
#pragma unroll
        for (int b = 0; b <= a; ++b) row[j + 16 * b] = c[a][b];
      if (j == inside)
#pragma unroll
        for (int b = a + 1; b < R; ++b) row[i + 16 * b] = c[b][a];
    }
  }
  __device__ void update(const double* row, double inverse, int thread) {
    const int i = thread / 16, j = thread % 16;
    double right[R];
#pragma unroll
    for (int b = 0; b < R; ++b) right[b] = row[j + 16 * b];
#pragma unroll
    for (int a = 0; a < R; ++a) {
      const double left = row[i + 16 * a] * inverse;
#pragma unroll
      for (int b = 0; b <= a; ++b) c[a][b] -= left * right[b];
    }
  }
};

// One right-hand side in the registers of a warp: lane j holds rows j + 32 e of w, what is left of it, and entries
// j + 32 e, in the order of the pivots, of y, what the elimination made of it.
template <int E>
struct Column {
  double w[E], y[E];
  bool usable;

  template <class T>
  __device__ void load(const T* b, int64_t m, int n, const double* scale, int lane) {
    usable = true;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int i = lane + 32 * e;
      const T value = i < n ? b[i * m] : T(0);
      usable &= is_finite(value);
      w[e] = i < n ? static_cast<double>(value) * scale[i] : 0.0;
      y[e] = 0;
    }
    usable = __all_sync(kAll, usable);
  }
  __device__ static double entry(const double (&values)[E], int index) {
    double value = values[0];
#pragma unroll
    for (int e = 1; e < E; ++e)
      if (index >= 32 * e) value = values[e];
    return __shfl_sync(kAll, value, index % 32);
  }
  __device__ void eliminate(int k, int p, double inverse, const double (&row)[E], int lane) {
    const double top = entry(w, p), factor = top * inverse;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      if (k == lane + 32 * e) y[e] = top;
      w[e] -= row[e] * factor;
    }
  }
  // Turns y into the solution, in the order of the pivots.
  __device__ void substitute(int rank, const double* factor, int pitch, const int* pivots, const double* inverse,
                             int lane) {
#pragma unroll 4
    for (int k = rank - 1; k >= 0; --k) {
      const double value = entry(y, k) * inverse[k];
      const double* column = factor + pivots[k];
#pragma unroll
      for (int e = 0; e < E; ++e) {
        const int j = lane + 32 * e;
        if (j < k) y[e] -= column[j * pitch] * value;
        else if (j == k) y[e] = value;
      }
    }
  }
};

// One system by Matrix::threads threads; m right-hand sides are dealt out to their warps. Entries of C and of w in rows
// that were pivots already keep changing and mean nothing: they reach nothing but each other.
template <class T, class Matrix>
__device__ void solve_in_registers(const Systems<T>& s, int64_t system, double* shared) {
  constexpr int N = Matrix::N, E = (N + 31) / 32, pitch = Matrix::pitch, warps = Matrix::threads / 32;
  const int thread = threadIdx.x % Matrix::threads, lane = thread % 32, warp = thread / 32, n = static_cast<int>(s.n);
  const T *K = s.K + system * n * n, *b = s.b + system * n * s.m;
  double *factor = shared, *scale = factor + n * pitch, *inverse = scale + N;
  int* pivots = reinterpret_cast<int*>(inverse + N);

  double left[E];  // what the pivots have not explained yet of row lane + 32 e, in every warp
#pragma unroll
  for (int e = 0; e < E; ++e) {
    const int i = lane + 32 * e;
    const double square = i < n ? static_cast<double>(K[i * n + i]) : 0.0;
    left[e] = square > 0 ? 1 + s.damping : 0.0;
    if (warp == 0 && i < N) scale[i] = square > 0 ? rsqrt(square) : 0.0;
  }
  Matrix::sync();
  Matrix matrix;
  const bool finite = matrix.load(K, n, scale, thread);
  Column<E> column;
  if (warp < s.m) column.load(b + warp, s.m, n, scale, lane);

  int rank = 0;
  double smallest = 1 + s.damping;
  for (; finite && rank < n; ++rank) {
    Pivot mine;
#pragma unroll
    for (int e = 0; e < E; ++e) mine.consider(left[e], lane + 32 * e, s.rtol);
    const Pivot pivot = best(mine);
    if (!pivot.bits) break;
    const int p = static_cast<int>(pivot.index);
    double* row = factor + rank * pitch;
    matrix.publish(p, row, thread);
    const double value = pivot.value(), over = 1 / value;
    if (thread == 0) pivots[rank] = p, inverse[rank] = over;
    if (value < smallest) smallest = value;
    Matrix::sync();
    double r[E];
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int i = lane + 32 * e;
      r[e] = i < N ? row[i] : 0.0;
      left[e] = i == p ? kUsed : left[e] - r[e] * r[e] * over;
    }
    matrix.update(row, over, thread);
    if (warp < s.m) column.eliminate(rank, p, over, r, lane);
  }

  for (int64_t d = warp; d < s.m; d += warps) {
    if (d != warp) {
      column.load(b + d, s.m, n, scale, lane);
      for (int k = 0; k < rank; ++k) {
        double r[E];
#pragma unroll
        for (int e = 0; e < E; ++e) r[e] = lane + 32 * e < N ? factor[k * pitch + lane + 32 * e] : 0.0;
        column.eliminate(k, pivots[k], inverse[k], r, lane);
      }
    }
    column.substitute(rank, factor, pitch, pivots, inverse, lane);
    const T nan = static_cast<T>(__longlong_as_double(0x7ff8000000000000LL));
    T* x = s.x + system * n * s.m + d;
    const bool good = finite && column.usable;
#pragma unroll
    for (int e = 0; e < E; ++e) {
      const int i = lane + 32 * e;
      if (i < rank) x[pivots[i] * s.m] = good ? static_cast<T>(column.y[e] * scale[pivots[i]]) : nan;
      if (i < n && left[e] > kUsed) x[i * s.m] = good ? T(0) : nan;
    }
  }
  if (thread == 0) s.rank[system] = rank, s.pivot[system] = smallest;
}

template <class Matrix>
constexpr int64_t shared_bytes(int64_t n) {
  return 8 * (n * Matrix::pitch + 2 * Matrix::N) + 4 * Matrix::N;
}

}  // namespace projgrad
