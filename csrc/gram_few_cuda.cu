// gram_few on CUDA: the Gram matrices of l matrices with few rows of 16-bit numbers in one launch, and one more that
// adds the sums of their slices.

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <limits>
#include <tuple>
#include <vector>

#include "gram_few_cuda.cuh"

namespace projgrad {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

template <class Pair, int M>
__global__ void __launch_bounds__(kFewThreads, few_blocks(M)) gram_few_kernel(FewRows f) {
  __shared__ double sums[kFewWarps * M * (M + 1) / 2];
  __shared__ unsigned masks[kFewWarps];
  add_slice<Pair, M>(f, blockIdx.x, sums, masks);
}

__global__ void __launch_bounds__(32) gram_few_total_kernel(FewRows f) { add_slices(f, blockIdx.x); }

template <class Pair, int M = kFewRows + 1>
void launch(const FewRows& f, int64_t rows, cudaStream_t stream) {
  if constexpr (M > 1)
    if (rows < M) return launch<Pair, M - 1>(f, rows, stream);
  gram_few_kernel<Pair, M><<<static_cast<unsigned>(f.l * f.slices), kFewThreads, 0, stream>>>(f);
}

// Rows one after another, and all of them at 16 bytes; t [l, r, p].
Tensor aligned(const Tensor& t) {
  auto fits = [](const Tensor& t) {
    return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0 && t.stride(2) == 1 &&
           (t.size(0) == 1 || t.stride(0) % 8 == 0) && (t.size(1) == 1 || t.stride(1) % 8 == 0);
  };
  if (fits(t)) return t;
  const Tensor rows = torch::stable::contiguous(t);
  return fits(rows) ? rows : torch::stable::clone(rows);
}

std::tuple<Tensor, Tensor> gram_few(Tensor g, Tensor u) {
  const int64_t l = g.size(0), n = g.size(1), p = g.size(2), m = u.size(1);
  const torch::stable::accelerator::DeviceGuard guard(g.get_device_index());
  const ScalarType type = g.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Half, "gram_few: bfloat16 or float16 expected");
  STD_TORCH_CHECK(u.scalar_type() == type && u.size(0) == l && u.size(2) == p, "gram_few: g and u do not match");
  STD_TORCH_CHECK(n <= kFewRows && m <= 1, "gram_few: more than ", kFewRows, " rows or more than one direction");
  STD_TORCH_CHECK(p % 8 == 0, "gram_few: columns in eights expected");
  auto doubles = [&](std::vector<int64_t> shape) { return torch::stable::new_empty(g, shape, ScalarType::Double); };
  Tensor K = doubles({l, n, n}), v = doubles({l, n, m});
  if (l == 0 || n == 0) return {K, v};
  const Tensor rows = aligned(g), direction = m ? aligned(u) : u;
  FewRows f{};
  f.g = static_cast<const uint16_t*>(rows.const_data_ptr());
  f.u = m ? static_cast<const uint16_t*>(direction.const_data_ptr()) : nullptr;
  f.K = K.mutable_data_ptr<double>();
  f.v = v.mutable_data_ptr<double>();
  f.l = l, f.n = n, f.p = p, f.m = m;
  f.g_layer = rows.stride(0), f.g_row = rows.stride(1), f.u_layer = direction.stride(0);
  cut_into_slices(f);
  const int64_t size = (n + m) * (n + m + 1) / 2;
  STD_TORCH_CHECK(l * f.slices <= std::numeric_limits<int>::max() && l * size <= std::numeric_limits<int>::max(),
                  "gram_few: more than 2^31 - 1 blocks");
  Tensor part = doubles({l, size, f.slices});
  f.part = part.mutable_data_ptr<double>();
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(g.get_device_index(), &current));
  const auto stream = static_cast<cudaStream_t>(current);
  if (p > 0 && type == ScalarType::BFloat16) launch<BFloat16Pair>(f, n + m, stream);
  else if (p > 0) launch<HalfPair>(f, n + m, stream);
  gram_few_total_kernel<<<static_cast<unsigned>(l * size), 32, 0, stream>>>(f);
  const cudaError_t error = cudaGetLastError();
  STD_TORCH_CHECK(error == cudaSuccess, "gram_few: ", cudaGetErrorString(error));
  return {K, v};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(projgrad, CUDA, m) { m.impl("gram_few", TORCH_BOX(&gram_few)); }

}  // namespace projgrad
