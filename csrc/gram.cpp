// gram: K = G Gᵀ and v = G uᵀ in one pass over G.
//
// Columns are taken in chunks that stay in cache. Inside a chunk the products are summed in T (float for everything but
// float64 input, unless `float64`), across chunks in double, so the error of K stays that of one short chunk.

#include "common.h"

#define KERNEL_FILE "gram_kernel.h"
#include "simd.h"

namespace projgrad {
namespace {

template <class S, class T>
void gram_rows(const Matrix& G, const Matrix& u, double* K, double* v, const Tensor& like) {
  const int64_t n = G.rows, m = u.rows, p = G.columns, size = (n + m) * n;
  const int64_t longest = 8192 / static_cast<int64_t>(sizeof(T));  // four rows of a chunk fit into L1
  const int64_t chunk = std::clamp<int64_t>(p / 256 * 64, longest / 4, longest);
  const int64_t least = std::clamp<int64_t>(64 / std::max<int64_t>(1, n), 1, 4);  // chunks that are worth a thread
  const int64_t segments = segment_count(p, least * chunk, size * sizeof(double));
  Tensor partial = doubles(like, {segments, size});
  double* sums = partial.mutable_data_ptr<double>();
  std::fill(sums, sums + segments * size, 0.0);
  const int64_t chunks = (p + chunk - 1) / chunk;
  torch::stable::parallel_for(0, segments, 1, [&](int64_t first, int64_t last) {
    for (int64_t s = first; s < last; ++s) {
      const int64_t begin = chunks * s / segments * chunk, end = std::min(p, chunks * (s + 1) / segments * chunk);
      SIMD_DISPATCH(gram_segment<S, T>(G, u, begin, end, chunk, sums + s * size));
    }
  });
  for (int64_t s = 1; s < segments; ++s)
    for (int64_t k = 0; k < size; ++k) sums[k] += sums[s * size + k];
  for (int64_t first = 0; first < n; first += 16)  // a column of K is written a cache line at a time
    for (int64_t i = first; i < n; ++i)
      for (int64_t j = first; j < std::min(first + 16, i + 1); ++j) K[i * n + j] = K[j * n + i] = sums[i * n + j];
  for (int64_t i = 0; i < m; ++i)
    for (int64_t j = 0; j < n; ++j) v[j * m + i] = sums[(n + i) * n + j];
}

std::tuple<Tensor, Tensor> gram(Tensor G, Tensor u, bool float64) {
  STD_TORCH_CHECK(u.scalar_type() == G.scalar_type() && u.size(1) == G.size(1), "gram: u must match G (n, p)");
  const Matrix g(G), w(u);
  Tensor K = doubles(G, {g.rows, g.rows}), v = doubles(G, {g.rows, w.rows});
  double *k = K.mutable_data_ptr<double>(), *b = v.mutable_data_ptr<double>();
  dispatch(G.scalar_type(), [&](auto* type) {
    using S = std::remove_pointer_t<decltype(type)>;
    if constexpr (!std::is_same_v<S, double>) {
      if (!float64) return gram_rows<S, float>(g, w, k, b, G);
    }
    gram_rows<S, double>(g, w, k, b, G);
  });
  return {K, v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CPU, m) { m.impl("gram_pass", TORCH_BOX(&gram)); }

}  // namespace projgrad
