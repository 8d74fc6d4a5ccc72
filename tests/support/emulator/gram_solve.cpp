// gram_solve's device code as functions of a shared library: what gram_solve_cuda.cu launches, block after block.

#include <limits>

#include "cuda.h"
#include "gram_solve_large_cuda.cuh"

namespace {

using projgrad::Step;

thread_local std::string error;

// Shared memory as a GPU leaves it: garbage at the beginning of every block, and a guard behind it.
struct Shared {
  std::vector<double2> memory;
  int64_t bytes;
  explicit Shared(int64_t bytes) : memory(bytes / 16 + 9), bytes(bytes) {
    std::memset(memory.data(), 0xff, memory.size() * 16);  // NaN
  }
  double* data() { return &memory[0].x; }
  void check() const {
    const auto* end = reinterpret_cast<const unsigned char*>(memory.data());
    for (size_t k = bytes; k < memory.size() * 16; ++k)
      if (end[k] != 0xff) error = "shared memory written past its end";
  }
};

template <class T, class Matrix>
void registers(const projgrad::Systems<T>& s, int together) {
  const int64_t bytes = (projgrad::shared_bytes<Matrix>(s.n) + 15) / 16 * 16;
  for (int64_t first = 0; first < s.l && error.empty(); first += together) {
    Shared shared(bytes * together);
    error = emulator::run(first / together, Matrix::threads * together, [&] {
      const int group = threadIdx.x / Matrix::threads;
      if (first + group < s.l)
        projgrad::solve_in_registers<T, Matrix>(s, first + group, shared.data() + group * bytes / 8);
    });
    shared.check();
  }
}

template <class T>
void solve(projgrad::Systems<T> s, int threads) {
  error.clear();
  if (threads == 0) {
    if (s.n <= 16) return registers<T, projgrad::WarpMatrix<16>>(s, 4);
    if (s.n <= 32) return registers<T, projgrad::WarpMatrix<32>>(s, 1);
    if (s.n <= 64) return registers<T, projgrad::BlockMatrix<4>>(s, 1);
    if (s.n <= 96) return registers<T, projgrad::BlockMatrix<6>>(s, 1);
    if (s.n <= 128) return registers<T, projgrad::BlockMatrix<8>>(s, 1);
    threads = projgrad::panel_threads(s.n);
  }
  std::vector<double> scratch(s.l * projgrad::scratch_size(s.n, s.m), std::numeric_limits<double>::quiet_NaN());
  s.scratch = scratch.data();
  projgrad::in_steps(s.l, s.n, s.m, threads, [&](Step step, int64_t blocks, int threads, int64_t bytes) {
    for (int64_t block = blocks - 1; block >= 0 && error.empty(); --block) {
      Shared shared(bytes);
      error = emulator::run(block, threads, [&] {
        if (step == Step::begin) projgrad::run_step<Step::begin>(s, block, shared.data());
        if (step == Step::scale) projgrad::run_step<Step::scale>(s, block, shared.data());
        if (step == Step::panel) projgrad::run_step<Step::panel>(s, block, shared.data());
        if (step == Step::update) projgrad::run_step<Step::update>(s, block, shared.data());
        if (step == Step::substitute) projgrad::run_step<Step::substitute>(s, block, shared.data());
      });
      shared.check();
    }
  });
}

}  // namespace

// threads: 0 as gram_solve_cuda.cu decides; otherwise the way of large systems, with that many.
#define ENTRY(NAME, T)                                                                                          \
  extern "C" const char* NAME(const T* K, const T* b, T* x, int64_t* rank, double* pivot, int64_t l, int64_t n, \
                              int64_t m, double damping, double rtol, int threads) {                            \
    solve<T>({K, b, x, rank, pivot, nullptr, l, n, m, damping, rtol}, threads);                                 \
    return error.c_str();                                                                                       \
  }

ENTRY(solve_float, float)
ENTRY(solve_double, double)
