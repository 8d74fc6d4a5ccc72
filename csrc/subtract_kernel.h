// The inner loops of subtract, compiled once per instruction set (simd.h).

namespace projgrad::SIMD_NAME {
namespace {

constexpr int64_t kLanes = SIMD_BYTES / sizeof(double);
typedef double Wide __attribute__((vector_size(SIMD_BYTES)));

// A vector of elements of T as doubles.
template <class T>
Wide widen(const T* p) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  Narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Wide);
}

inline void store(double* p, Wide v) { __builtin_memcpy(p, &v, sizeof v); }

inline double total(Wide v) {
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += v[k];
  return sum;
}

// out -= Σ_i c_i g_i over I rows. `length` is a multiple of kLanes.
template <int I, class T>
void accumulate(const T* const* g, const double* c, int64_t length, double* out) {
  for (int64_t k = 0; k < length; k += kLanes) {
    Wide sum = widen(out + k);
    for (int i = 0; i < I; ++i) sum -= c[i] * widen(g[i] + k);
    store(out + k, sum);
  }
}

// r_i += g_i · out over I rows.
template <int I, class T>
void dots(const T* const* g, const double* out, int64_t length, double* r, int64_t stride) {
  Wide sum[I] = {};
  for (int64_t k = 0; k < length; k += kLanes) {
    const Wide x = widen(out + k);
    for (int i = 0; i < I; ++i) sum[i] += widen(g[i] + k) * x;
  }
  for (int i = 0; i < I; ++i) r[i * stride] += total(sum[i]);
}

// One segment of columns: writes out, adds r [n, m] and the squared norms [2, m] behind it to `sums`.
template <class S, class T>
void subtract_segment(const Matrix& u, const Matrix& G, const double* c, int64_t begin, int64_t end, int64_t chunk,
                      S* result, double* sums) {
  const int64_t n = G.rows, m = u.rows;
  std::unique_ptr<T[]> buffer(new T[n * chunk]());
  std::unique_ptr<double[]> exact(new double[chunk]);
  std::vector<const T*> g(n);
  for (int64_t start = begin; start < end; start += chunk) {
    const int64_t length = std::min(chunk, end - start), padded = (length + kLanes - 1) / kLanes * kLanes;
    rows<S>(G, start, length, buffer.get(), chunk, g.data());
    if (padded != length) {  // the last columns of all: rows may end in memory that is not ours to read
      for (int64_t j = 0; j < n; ++j) {
        T* copy = buffer.get() + j * chunk;
        if (g[j] != copy) std::copy(g[j], g[j] + length, copy);
        std::fill(copy + length, copy + padded, T(0));
        g[j] = copy;
      }
    }
    for (int64_t d = 0; d < m; ++d) {
      const S* w = static_cast<const S*>(u.data) + d * u.row_stride + start * u.column_stride;
      double before = 0, after = 0;
      for (int64_t k = 0; k < length; ++k) {
        exact[k] = static_cast<double>(static_cast<T>(w[k * u.column_stride]));
        before += exact[k] * exact[k];
      }
      std::fill(exact.get() + length, exact.get() + padded, 0.0);
      const double* weights = c + d * n;  // c is [m, n] here
      int64_t j = 0;
      for (; j + 4 <= n; j += 4) accumulate<4>(g.data() + j, weights + j, padded, exact.get());
      for (; j < n; ++j) accumulate<1>(g.data() + j, weights + j, padded, exact.get());
      for (j = 0; j + 4 <= n; j += 4) dots<4>(g.data() + j, exact.get(), padded, sums + j * m + d, m);
      for (; j < n; ++j) dots<1>(g.data() + j, exact.get(), padded, sums + j * m + d, m);
      for (int64_t k = 0; k < length; ++k) {
        after += exact[k] * exact[k];
        result[d * u.columns + start + k] = static_cast<S>(static_cast<T>(exact[k]));
      }
      sums[n * m + d] += before;
      sums[n * m + m + d] += after;
    }
  }
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
