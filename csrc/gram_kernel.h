// The inner loops of gram, compiled once per instruction set (simd.h).

#include "vectors.h"

namespace projgrad::SIMD_NAME {
namespace {

// The sum of `bytes` of numbers, the upper half added to the lower one until one number is left.
template <class T, int64_t bytes = SIMD_BYTES>
T sum(const void* numbers) {
  if constexpr (bytes == sizeof(T)) {
    return *static_cast<const T*>(numbers);
  } else {
    typedef T Half __attribute__((vector_size(bytes / 2)));
    Half low, high;
    __builtin_memcpy(&low, numbers, sizeof low);
    __builtin_memcpy(&high, static_cast<const char*>(numbers) + bytes / 2, sizeof high);
    low += high;
    return sum<T, bytes / 2>(&low);
  }
}

// out[i][j] = a_i · b_j for a block of rows: every loaded vector is used I or J times. `ahead`: four rows to bring into
// L2 meanwhile, or null.
template <int I, int J, class T>
void dots(const T* const* a, const T* const* b, int64_t length, double* out, int64_t pitch, const T* const* ahead) {
  constexpr int64_t lanes = SIMD_BYTES / sizeof(T);
  Vector<T> acc[I][J] = {};
  int64_t k = 0;
  for (; k + lanes <= length; k += lanes) {
    if (ahead)
      for (int i = 0; i < 4; ++i) __builtin_prefetch(ahead[i] + k, 0, 2);
    Vector<T> x[I];
    for (int i = 0; i < I; ++i) x[i] = load(a[i] + k);
    for (int j = 0; j < J; ++j) {
      const auto y = load(b[j] + k);
      for (int i = 0; i < I; ++i) acc[i][j] += x[i] * y;
    }
  }
  for (int i = 0; i < I; ++i)
    for (int j = 0; j < J; ++j) {
      T tail = 0;
      for (int64_t last = k; last < length; ++last) tail += a[i][last] * b[j][last];
      out[i * pitch + j] = sum<T>(&acc[i][j]) + tail;
    }
}

template <class T, int I>
void dots_row(int64_t j, const T* const* a, const T* const* b, int64_t length, double* out, int64_t pitch,
              const T* const* ahead) {
  switch (j) {
    case 1: return dots<I, 1>(a, b, length, out, pitch, ahead);
    case 2: return dots<I, 2>(a, b, length, out, pitch, ahead);
    case 3: return dots<I, 3>(a, b, length, out, pitch, ahead);
    default: return dots<I, 4>(a, b, length, out, pitch, ahead);
  }
}

template <class T>
void dots_block(int64_t i, int64_t j, const T* const* a, const T* const* b, int64_t length, double* out, int64_t pitch,
                const T* const* ahead) {
  switch (i) {
    case 1: return dots_row<T, 1>(j, a, b, length, out, pitch, ahead);
    case 2: return dots_row<T, 2>(j, a, b, length, out, pitch, ahead);
    case 3: return dots_row<T, 3>(j, a, b, length, out, pitch, ahead);
    default: return dots_row<T, 4>(j, a, b, length, out, pitch, ahead);
  }
}

// Products of one chunk: the lower triangle of the n rows of G, then the m rows of u against them, [n + m, n], and the
// squared norms of the rows of u behind it, [m]. A panel of rows that fits into L2 meets all others before the next
// one.
template <class T>
void products(const T* const* all, int64_t n, int64_t m, int64_t length, double* out) {
  const int64_t panel = std::max<int64_t>(16, kHalfL2 / (static_cast<int64_t>(sizeof(T)) * length) / 4 * 4);
  for (int64_t first = 0; first < n; first += panel) {
    const int64_t last = std::min(first + panel, n);
    for (int64_t i = first; i < n + m;) {
      const int64_t rows = std::min<int64_t>(4, (i < n ? n : n + m) - i);  // rows of G or of u, not of both
      for (int64_t j = first; j < std::min(i + rows, last); j += 4) {
        const T* const* ahead =
            j == first && i + 8 <= n ? all + i + 4 : nullptr;  // the next block's rows are still in memory
        dots_block(rows, std::min<int64_t>(4, last - j), all + i, all + j, length, out + i * n + j, n, ahead);
      }
      i += rows;
    }
  }
  for (int64_t i = 0; i < m; ++i) dots<1, 1, T>(all + n + i, all + n + i, length, out + (n + m) * n + i, 1, nullptr);
}

// The power of two that brings the largest element of a row into [0.5, 1), or 0 for a row of zeros.
template <class T>
int exponent(const T* row, int64_t length) {
  T largest = 0;
  for (int64_t k = 0; k < length; ++k) largest = std::max(largest, std::abs(row[k]));
  int e = 0;
  if (largest > 0 && std::isfinite(largest)) std::frexp(largest, &e);
  return e;
}

// Adds K [n, n] (lower triangle) and v [m, n] of one segment of columns into `total` [n + m, n]. S is stored, T
// multiplied.
template <class S, class T>
void gram_segment(const Matrix& G, const Matrix& u, int64_t begin, int64_t end, int64_t chunk, double* total) {
  const int64_t n = G.rows, m = u.rows, all = n + m;
  std::unique_ptr<T[]> buffer(new T[all * chunk]);
  std::vector<const T*> pointers(all);
  std::vector<double> part(all * n + m);
  std::vector<int> shift(all);
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t length = std::min(chunk, end - start);
    rows<S>(G, start, length, buffer.get(), chunk, pointers.data());
    rows<S>(u, start, length, buffer.get() + n * chunk, chunk, pointers.data() + n);
    products(pointers.data(), n, m, length, part.data());
    // Squares of float32 lose digits below 1e-38 and overflow above 1e38: such chunks are done again on scaled rows.
    bool scaled = false;
    for (int64_t i = 0; i < all; ++i) {
      const double square = i < n ? part[i * n + i] : part[all * n + i - n];
      shift[i] = 0;
      constexpr bool narrow = std::is_same_v<T, float>;
      if (square >= (narrow ? 1e-24 : 1e-280) && square <= (narrow ? 1e30 : 1e280)) continue;
      shift[i] = exponent(pointers[i], length);
      scaled |= shift[i] != 0;
    }
    if (scaled) {
      for (int64_t i = 0; i < all; ++i) {
        if (shift[i] == 0) continue;
        T* copy = buffer.get() + i * chunk;
        for (int64_t k = 0; k < length; ++k) copy[k] = std::ldexp(pointers[i][k], -shift[i]);
        pointers[i] = copy;
      }
      products(pointers.data(), n, m, length, part.data());
      for (int64_t i = 0; i < all; ++i)
        for (int64_t j = 0; j < n; ++j) part[i * n + j] = std::ldexp(part[i * n + j], shift[i] + shift[j]);
    }
    for (int64_t i = 0; i < all; ++i)
      for (int64_t j = 0; j < (i < n ? i + 1 : n); ++j) total[i * n + j] += part[i * n + j];
  }
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
