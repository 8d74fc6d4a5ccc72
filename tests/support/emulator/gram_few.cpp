// gram_few's device code as functions of a shared library: what gram_few_cuda.cu launches, block after block.

#include "cuda.h"
#include "gram_few_cuda.cuh"

namespace {

using projgrad::FewRows;

thread_local std::string error;

template <class Pair, int M = projgrad::kFewRows + 1>
void slices(const FewRows& f) {
  if constexpr (M > 1)
    if (f.n + f.m < M) return slices<Pair, M - 1>(f);
  constexpr int size = projgrad::kFewWarps * M * (M + 1) / 2, guard = 16;
  for (int64_t block = f.l * f.slices - 1; block >= 0 && error.empty(); --block) {
    std::vector<double> shared(size + guard, NAN);  // garbage, as a GPU leaves it, and a guard behind
    std::vector<unsigned> masks(projgrad::kFewWarps, 0xaaaaaaaa);
    error = emulator::run(block, projgrad::kFewThreads,
                          [&] { projgrad::add_slice<Pair, M>(f, block, shared.data(), masks.data()); });
    for (int k = size; k < size + guard; ++k)
      if (!std::isnan(shared[k])) error = "shared memory written past its end";
  }
}

}  // namespace

// u: [l, m, p] with m of 0 or 1; everything contiguous.
extern "C" const char* gram_few(const uint16_t* g, const uint16_t* u, double* K, double* v, int64_t l, int64_t n,
                                int64_t p, int64_t m, int half) {
  error.clear();
  FewRows f{g, u, nullptr, K, v, l, n, p, m, n * p, p, m * p};
  projgrad::cut_into_slices(f);
  const int64_t size = (n + m) * (n + m + 1) / 2;
  std::vector<double> part(l * size * f.slices, NAN);
  f.part = part.data();
  if (half) slices<projgrad::HalfPair>(f);
  else slices<projgrad::BFloat16Pair>(f);
  for (int64_t index = l * size - 1; index >= 0 && error.empty(); --index)
    error = emulator::run(index, 32, [&] { projgrad::add_slices(f, index); });
  return error.c_str();
}
