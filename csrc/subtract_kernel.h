// The inner loops of subtract, compiled once per instruction set (simd.h).

#include "vectors.h"

namespace projgrad::SIMD_NAME {
namespace {

// out -= Σ_i c_i g_i over I rows. `length` is a multiple of kLanes here and below.
template <int I, class T>
void accumulate(const T* const* g, const double* c, int64_t length, double* out) {
  for (int64_t k = 0; k < length; k += kLanes) {
    Doubles sum = widen(out + k);
    for (int i = 0; i < I; ++i) sum -= c[i] * widen(g[i] + k);
    store(out + k, sum);
  }
}

// r_i += g_i · out over I rows, which are in cache; the columns behind them, next to be used, are brought there
// meanwhile.
template <int I, class T>
void dots(const T* const* g, const double* out, int64_t length, double* r, int64_t stride) {
  constexpr int64_t line = 64 / sizeof(T);
  Doubles sum[I] = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    if (k % line == 0)
      for (int i = 0; i < I; ++i) __builtin_prefetch(g[i] + length + k, 0, 2);
    const Doubles x = widen(out + k);
    for (int i = 0; i < I; ++i) sum[i] += widen(g[i] + k) * x;
  }
  for (int i = 0; i < I; ++i) r[i * stride] += total(sum[i]);
}

// Copies a row into doubles; returns its squared norm.
template <class T>
double copy_square(const T* row, int64_t length, double* exact) {
  Doubles sum = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    const Doubles x = widen(row + k);
    store(exact + k, x);
    sum += x * x;
  }
  return total(sum);
}

// Rounds a row to T; returns its squared norm before that.
template <class T>
double round_square(const double* exact, int64_t length, T* row) {
  Doubles sum = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    const Doubles x = load(exact + k);
    store(row + k, x);
    sum += x * x;
  }
  return total(sum);
}

// `row` where it may be read to the end of a vector, else a copy of it in `buffer` that ends in zeros.
template <class T>
const T* pad(const T* row, int64_t length, int64_t padded, T* buffer) {
  if (length == padded) return row;
  if (row != buffer) std::copy(row, row + length, buffer);
  std::fill(buffer + length, buffer + padded, T(0));
  return buffer;
}

// One segment of columns: writes out, adds r [n, m] and the squared norms [2, m] behind it to `sums`. c is [m, n].
template <class S, class T>
void subtract_segment(const Matrix& u, const Matrix& G, const double* c, int64_t begin, int64_t end, int64_t chunk,
                      S* result, double* sums) {
  const int64_t n = G.rows, m = u.rows;
  std::unique_ptr<T[]> buffer(new T[(n + 2) * chunk]);
  T *direction = buffer.get() + n * chunk, *rounded = direction + chunk;
  std::unique_ptr<double[]> exact(new double[chunk]);
  std::vector<const T*> g(n);
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t length = std::min(chunk, end - start), padded = (length + kLanes - 1) / kLanes * kLanes;
    rows<S>(G, start, length, buffer.get(), chunk, g.data());
    for (int64_t j = 0; j < n; ++j) g[j] = pad(g[j], length, padded, buffer.get() + j * chunk);
    for (int64_t d = 0; d < m; ++d) {
      const T* w = pad(row<S>(u, d, start, length, direction), length, padded, direction);
      sums[n * m + d] += copy_square(w, padded, exact.get());
      const double* weights = c + d * n;
      int64_t j = 0;
      for (; j + 8 <= n; j += 8) accumulate<8>(g.data() + j, weights + j, padded, exact.get());
      for (; j < n; ++j) accumulate<1>(g.data() + j, weights + j, padded, exact.get());
      for (j = 0; j + 8 <= n; j += 8) dots<8>(g.data() + j, exact.get(), padded, sums + j * m + d, m);
      for (; j < n; ++j) dots<1>(g.data() + j, exact.get(), padded, sums + j * m + d, m);
      sums[n * m + m + d] += round_square(exact.get(), padded, rounded);
      S* out = result + d * u.columns + start;
      for (int64_t k = 0; k < length; ++k) out[k] = static_cast<S>(rounded[k]);
    }
  }
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
