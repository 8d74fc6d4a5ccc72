// subtract: out = u - cᵀ G, and r = G outᵀ while the chunk of G is still in cache. All sums in double: the pass waits
// for memory, so they are free.

#include "common.h"

#define KERNEL_FILE "subtract_kernel.h"
#include "simd.h"

namespace projgrad {
namespace {

template <class S>
void subtract_rows(const Matrix& u, const Matrix& G, const double* c, S* out, double* r, double* squares,
                   const Tensor& like) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  const int64_t n = G.rows, m = u.rows, p = u.columns, size = n * m + 2 * m;
  const int64_t chunk =
      std::clamp<int64_t>((int64_t(256) << 10) / sizeof(T) / std::max<int64_t>(1, n) / 64 * 64, 64, 1024);
  const int64_t segments = segment_count(p, 4 * chunk, size * sizeof(double));
  const int64_t chunks = (p + chunk - 1) / chunk;
  std::vector<double> weights(m * n);  // [m, n]
  for (int64_t j = 0; j < n; ++j)
    for (int64_t d = 0; d < m; ++d) weights[d * n + j] = c[j * m + d];
  Tensor partial = doubles(like, {segments, size});
  double* sums = partial.mutable_data_ptr<double>();
  std::fill(sums, sums + segments * size, 0.0);
  torch::stable::parallel_for(0, segments, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = chunks * s / segments * chunk, end = std::min(p, chunks * (s + 1) / segments * chunk);
      SIMD_DISPATCH(subtract_segment<S, T>(u, G, weights.data(), begin, end, chunk, out, sums + s * size));
    }
  });
  for (int64_t s = 1; s < segments; ++s)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[s * size + k];
  std::copy(sums, sums + n * m, r);
  std::copy(sums + n * m, sums + size, squares);
}

std::tuple<Tensor, Tensor, Tensor> subtract(Tensor u, Tensor G, Tensor c) {
  STD_TORCH_CHECK(u.scalar_type() == G.scalar_type() && u.size(1) == G.size(1), "subtract: u must match G (n, p)");
  STD_TORCH_CHECK(c.scalar_type() == ScalarType::Double && c.size(0) == G.size(0) && c.size(1) == u.size(0),
                  "subtract: c must be float64 (n, m)");
  const Matrix w(u), g(G);
  Tensor out = torch::stable::new_empty(u, std::vector<int64_t>{w.rows, w.columns});
  Tensor r = doubles(u, {g.rows, w.rows}), squares = doubles(u, {2, w.rows});
  Tensor weights = torch::stable::contiguous(c);
  dispatch(u.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    subtract_rows<S>(w, g, weights.const_data_ptr<double>(), static_cast<S*>(out.mutable_data_ptr()),
                     r.mutable_data_ptr<double>(), squares.mutable_data_ptr<double>(), u);
  });
  return {out, r, squares};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CPU, m) { m.impl("subtract", TORCH_BOX(&subtract)); }

}  // namespace projgrad
