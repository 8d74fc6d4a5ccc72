// gram_solve: many small Gram systems by equilibrated, diagonally pivoted Cholesky in double, parallel over systems.

#include "common.h"

#define KERNEL_FILE "gram_solve_kernel.h"
#include "simd.h"

namespace projgrad {
namespace {

std::tuple<Tensor, Tensor, Tensor> gram_solve(Tensor K, Tensor b, double damping, std::optional<double> rtol) {
  const int64_t systems = K.size(0), n = K.size(1), m = b.size(2);
  Tensor left = torch::stable::contiguous(K), right = torch::stable::contiguous(b);
  Tensor x = torch::stable::new_empty(right, std::vector<int64_t>{systems, n, m});
  Tensor rank = torch::stable::new_empty(K, std::vector<int64_t>{systems}, ScalarType::Long);
  Tensor pivot = torch::stable::new_empty(K, std::vector<int64_t>{systems}, ScalarType::Double);
  dispatch(K.scalar_type(), [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    if constexpr (std::is_floating_point_v<T>) {
      const double tolerance = rtol.value_or(8 * std::max<int64_t>(n, 1) * std::numeric_limits<T>::epsilon());
      const T *k = left.const_data_ptr<T>(), *rhs = right.const_data_ptr<T>();
      T* result = x.mutable_data_ptr<T>();
      int64_t* ranks = rank.mutable_data_ptr<int64_t>();
      double* pivots = pivot.mutable_data_ptr<double>();
      const int64_t grain = std::max<int64_t>(1, 20000 / std::max<int64_t>(1, n * n * n / 8));  // 20,000 flops or more
      torch::stable::parallel_for(0, systems, grain, [&](int64_t first, int64_t last) {
        SIMD_DISPATCH(solve_systems<T>(k, rhs, result, ranks, pivots, n, m, damping, tolerance, first, last));
      });
    } else {
      STD_TORCH_CHECK(false, "gram_solve: float32 or float64 expected");
    }
  });
  return {x, rank, pivot};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CPU, m) { m.impl("gram_solve", TORCH_BOX(&gram_solve)); }

}  // namespace projgrad
