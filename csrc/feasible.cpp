// feasible: mean, variance, test and mask of every coordinate in one pass, with the sums that a step reports.

#include "common.h"

#define KERNEL_FILE "feasible_kernel.h"
#include "simd.h"

namespace projgrad {
namespace {

constexpr int64_t kSums = 6, kChunk = 1024;

std::tuple<Tensor, Tensor> feasible(Tensor d, Tensor u, Tensor total, Tensor squares, int64_t n, double bound,
                                    double slack, double floor) {
  const int64_t p = d.numel();
  for (const Tensor* x : {&d, &u, &total, &squares})
    STD_TORCH_CHECK(x->dim() == 1 && x->numel() == p, "feasible: d, u, total and squares must be (p,)");
  STD_TORCH_CHECK(u.scalar_type() == d.scalar_type() && squares.scalar_type() == total.scalar_type(),
                  "feasible: u must have the dtype of d and squares that of total");
  d = torch::stable::contiguous(d), u = torch::stable::contiguous(u);
  total = torch::stable::contiguous(total), squares = torch::stable::contiguous(squares);
  Tensor out = torch::stable::new_empty(d, std::vector<int64_t>{p});
  const int64_t segments = segment_count(p, 4 * kChunk, kSums * sizeof(double)), chunks = (p + kChunk - 1) / kChunk;
  const double root = 1 / std::sqrt(static_cast<double>(n));
  std::vector<double> partial(segments * kSums, 0.0);
  dispatch(d.scalar_type(), [&](auto* first) {
    dispatch(total.scalar_type(), [&](auto* second) {
      using S = std::remove_pointer_t<decltype(first)>;
      using R = std::remove_pointer_t<decltype(second)>;
      const S *proposed = static_cast<const S*>(d.const_data_ptr()),
              *forget = static_cast<const S*>(u.const_data_ptr());
      const R* sum = static_cast<const R*>(total.const_data_ptr());
      const R* square = static_cast<const R*>(squares.const_data_ptr());
      S* result = static_cast<S*>(out.mutable_data_ptr());
      torch::stable::parallel_for(0, segments, 1, [&](int64_t from, int64_t to) {
        for (int64_t s = from; s < to; ++s) {
          const int64_t begin = chunks * s / segments * kChunk, end = std::min(p, chunks * (s + 1) / segments * kChunk);
          for (int64_t start = begin; start < end; start += kChunk)
            SIMD_DISPATCH(feasible_chunk<S, R>(proposed + start, forget + start, sum + start, square + start,
                                               std::min(kChunk, end - start), root, bound, slack, floor, result + start,
                                               partial.data() + s * kSums));
        }
      });
    });
  });
  Tensor sums = doubles(d, {kSums});
  double* to = sums.mutable_data_ptr<double>();
  std::fill(to, to + kSums, 0.0);
  for (int64_t s = 0; s < segments; ++s)
    for (int64_t k = 0; k < kSums; ++k) to[k] += partial[s * kSums + k];
  return {out, sums};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CPU, m) { m.impl("feasible_pass", TORCH_BOX(&feasible)); }

}  // namespace projgrad
