// One Gram system, compiled once per instruction set (simd.h).

#include "vectors.h"

namespace projgrad::SIMD_NAME {
namespace {

// row -= Σ_q c_q factor_q on I vectors that stay in registers.
template <int I>
void reduce(const double* factor, int64_t pitch, const double* c, int64_t k, double* row) {
  Doubles acc[I];
  for (int i = 0; i < I; ++i) acc[i] = load(row + i * kLanes);
  for (int64_t q = 0; q < k; ++q)
    for (int i = 0; i < I; ++i) acc[i] -= c[q] * load(factor + q * pitch + i * kLanes);
  __builtin_memcpy(row, acc, sizeof acc);
}

// Left-looking pivoted Cholesky of C = D⁻¹ K D⁻¹ + damping I. Only the pivot's column of K is read, and what is found
// to be dependent is never computed: rank r costs n r² multiply-adds. Returns the rank, and in `smallest` the smallest
// pivot that was used.
template <class T>
int64_t solve(const T* K, const T* b, T* x, int64_t n, int64_t m, double damping, double rtol, double* scratch,
              int64_t pitch, double* smallest) {
  double *factor = scratch, *scale = factor + n * pitch, *left = scale + pitch, *c = left + pitch, *w = c + pitch,
         *y = w + pitch, *z = y + pitch;
  std::vector<int64_t> pivots;
  pivots.reserve(n);
  bool finite = true;
  for (int64_t k = 0; k < n * n; ++k) finite &= std::abs(K[k]) <= std::numeric_limits<T>::max();
  for (int64_t i = 0; i < pitch; ++i) {
    const double square = i < n ? static_cast<double>(K[i * n + i]) : 0.0;
    scale[i] = square > 0 ? 1 / std::sqrt(square) : 0.0;
    left[i] = square > 0 ? 1 + damping : 0.0;
  }
  *smallest = 1 + damping;
  for (int64_t k = 0; finite && k < n; ++k) {
    const int64_t p = std::max_element(left, left + n) - left;
    if (!(left[p] > rtol)) break;
    *smallest = std::min(*smallest, left[p]);
    const double root = std::sqrt(left[p]);
    double* row = factor + k * pitch;
    for (int64_t i = 0; i < n; ++i) row[i] = static_cast<double>(K[p * n + i]) * scale[i] * scale[p];
    std::fill(row + n, row + pitch, 0.0);
    for (int64_t q = 0; q < k; ++q) c[q] = factor[q * pitch + p];
    int64_t i = 0;
    for (; i + 8 * kLanes <= pitch; i += 8 * kLanes) reduce<8>(factor + i, pitch, c, k, row + i);
    for (; i < pitch; i += kLanes) reduce<1>(factor + i, pitch, c, k, row + i);
    for (i = 0; i < n; ++i) {
      row[i] = left[i] == -std::numeric_limits<double>::infinity() ? 0.0 : row[i] / root;
      left[i] -= row[i] * row[i];
    }
    row[p] = root;
    left[p] = -std::numeric_limits<double>::infinity();
    pivots.push_back(p);
  }
  const int64_t rank = pivots.size();
  for (int64_t d = 0; d < m; ++d) {
    bool usable = finite;
    for (int64_t i = 0; i < n; ++i) {
      usable &= std::abs(b[i * m + d]) <= std::numeric_limits<T>::max();
      w[i] = static_cast<double>(b[i * m + d]) * scale[i];
    }
    std::fill(z, z + pitch, 0.0);
    for (int64_t k = 0; k < rank; ++k) {
      const double* row = factor + k * pitch;
      y[k] = w[pivots[k]] / row[pivots[k]];
      for (int64_t i = 0; i < n; ++i) w[i] -= y[k] * row[i];
    }
    for (int64_t k = rank - 1; k >= 0; --k) {
      const double* row = factor + k * pitch;
      Doubles sum = {};
      for (int64_t i = 0; i < pitch; i += kLanes) sum += load(row + i) * load(z + i);
      z[pivots[k]] = (y[k] - total(sum)) / row[pivots[k]];
    }
    for (int64_t i = 0; i < n; ++i)
      x[i * m + d] = usable ? static_cast<T>(z[i] * scale[i]) : std::numeric_limits<T>::quiet_NaN();
  }
  return rank;
}

template <class T>
void solve_systems(const T* K, const T* b, T* x, int64_t* rank, double* pivot, int64_t n, int64_t m, double damping,
                   double rtol, int64_t first, int64_t last) {
  const int64_t pitch = (n + kLanes - 1) / kLanes * kLanes;
  std::unique_ptr<double[]> scratch(new double[(n + 6) * pitch]);
  for (int64_t s = first; s < last; ++s)
    rank[s] = solve(K + s * n * n, b + s * n * m, x + s * n * m, n, m, damping, rtol, scratch.get(), pitch, pivot + s);
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
