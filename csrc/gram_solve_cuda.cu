// gram_solve on CUDA: l Gram systems in one launch. A warp each for n ≤ 32, a block each above, as long as the factor
// fits into shared memory: n ≤ 128 on data-centre GPUs (132 KiB), n ≤ 97 where a block gets 99 KiB. Larger ones go in
// steps. The square is kept, not its triangle: its rows are also what the threads tell each other, so nothing is
// copied, and the registers that hold the matrix, not shared memory, limit how many systems a multiprocessor takes.

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <optional>
#include <tuple>
#include <type_traits>
#include <vector>

#include "gram_solve_large_cuda.cuh"

namespace projgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class T, class Matrix>
__global__ void __launch_bounds__(256) gram_solve_kernel(Systems<T> s, int64_t bytes) {
  extern __shared__ __align__(16) char memory[];
  const int group = threadIdx.x / Matrix::threads;
  const int64_t system = static_cast<int64_t>(blockIdx.x) * (blockDim.x / Matrix::threads) + group;
  if (system < s.l) solve_in_registers<T, Matrix>(s, system, reinterpret_cast<double*>(memory + group * bytes));
}

template <class T, Step STEP>
__global__ void __launch_bounds__(kPanelThreads) gram_solve_large_kernel(Systems<T> s) {
  extern __shared__ __align__(16) char memory[];
  run_step<STEP>(s, blockIdx.x, reinterpret_cast<double*>(memory));
}

template <class T>
void launch_large(const Systems<T>& s, cudaStream_t stream) {
  in_steps(s.l, s.n, s.m, panel_threads(s.n), [&](Step step, int64_t blocks, int threads, int64_t bytes) {
    const auto kernel = step == Step::begin    ? gram_solve_large_kernel<T, Step::begin>
                        : step == Step::scale  ? gram_solve_large_kernel<T, Step::scale>
                        : step == Step::panel  ? gram_solve_large_kernel<T, Step::panel>
                        : step == Step::update ? gram_solve_large_kernel<T, Step::update>
                                               : gram_solve_large_kernel<T, Step::substitute>;
    kernel<<<static_cast<unsigned>(blocks), threads, bytes, stream>>>(s);
  });
}

void check(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "gram_solve: ", cudaGetErrorString(error)); }

// One launch of the kernel for this size of matrix; false where its factor does not fit into shared memory.
template <class Matrix, class T>
bool launch(const Systems<T>& s, int device, cudaStream_t stream) {
  const int64_t bytes = (shared_bytes<Matrix>(s.n) + 15) / 16 * 16;
  const auto kernel = gram_solve_kernel<T, Matrix>;
  if (bytes > 48 * 1024) {
    int most = 0;
    check(cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
    if (bytes > most) return false;
    check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
  }
  // Few systems spread over the multiprocessors; many go four to a block. What they compute is the same.
  const int64_t together = Matrix::threads == 32 && s.l > 1024 ? 4 : 1;
  const auto blocks = static_cast<unsigned>((s.l + together - 1) / together);
  kernel<<<blocks, Matrix::threads * together, bytes * together, stream>>>(s, bytes);
  return true;
}

template <class T>
bool launch_small(const Systems<T>& s, int device, cudaStream_t stream) {
  if (s.n <= 16) return launch<WarpMatrix<16>>(s, device, stream);
  if (s.n <= 32) return launch<WarpMatrix<32>>(s, device, stream);
  if (s.n <= 64) return launch<BlockMatrix<4>>(s, device, stream);
  if (s.n <= 96) return launch<BlockMatrix<6>>(s, device, stream);
  return s.n <= 128 && launch<BlockMatrix<8>>(s, device, stream);
}

template <class T>
void solve(const Tensor& K, const Tensor& b, Tensor& x, Tensor& rank, Tensor& pivot, double damping,
           std::optional<double> rtol) {
  const int64_t l = K.size(0), n = K.size(1), m = b.size(2);
  const double tolerance = rtol.value_or(8 * (n > 1 ? n : 1) * static_cast<double>(std::numeric_limits<T>::epsilon()));
  Systems<T> s{K.const_data_ptr<T>(),
               b.const_data_ptr<T>(),
               x.mutable_data_ptr<T>(),
               rank.mutable_data_ptr<int64_t>(),
               pivot.mutable_data_ptr<double>(),
               nullptr,
               l,
               n,
               m,
               damping,
               tolerance};
  const int device = K.get_device_index();
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (!launch_small(s, device, stream)) {
    Tensor scratch = torch::stable::new_empty(K, std::vector<int64_t>{l, scratch_size(n, m)}, ScalarType::Double);
    s.scratch = scratch.mutable_data_ptr<double>();
    launch_large(s, stream);
  }
  check(cudaGetLastError());
}

std::tuple<Tensor, Tensor, Tensor> gram_solve(Tensor K, Tensor b, double damping, std::optional<double> rtol) {
  const int64_t l = K.size(0);
  const torch::stable::accelerator::DeviceGuard guard(K.get_device_index());
  const Tensor left = torch::stable::contiguous(K), right = torch::stable::contiguous(b);
  Tensor x = torch::stable::new_empty(right, std::vector<int64_t>{l, K.size(1), b.size(2)});
  Tensor rank = torch::stable::new_empty(K, std::vector<int64_t>{l}, ScalarType::Long);
  Tensor pivot = torch::stable::new_empty(K, std::vector<int64_t>{l}, ScalarType::Double);
  const ScalarType type = K.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double, "gram_solve: float32 or float64 expected");
  STD_TORCH_CHECK(l <= std::numeric_limits<int>::max(), "gram_solve: more than 2^31 - 1 systems");
  if (l == 0) return {x, rank, pivot};
  if (type == ScalarType::Float) solve<float>(left, right, x, rank, pivot, damping, rtol);
  else solve<double>(left, right, x, rank, pivot, damping, rtol);
  return {x, rank, pivot};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CUDA, m) { m.impl("gram_solve", TORCH_BOX(&gram_solve)); }

}  // namespace projgrad
