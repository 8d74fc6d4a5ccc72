// Runs CUDA device code on the CPU: every thread of a block is a fiber of its own, barriers wait for all of them, and
// shuffles exchange what the lanes of a warp really hold. Warps, and lanes between two exchanges, run one after another
// in an order that changes all the time, so that a missing barrier shows as a wrong result. A barrier that some thread
// never reaches, or lanes that meet in different instructions, end the run with an error instead of a hang.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <memory>
#include <numeric>
#include <stdexcept>
#include <string>
#include <vector>

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline

struct Index {
  unsigned x = 0;
};

struct alignas(16) double2 {
  double x, y;
};

inline double2 make_double2(double x, double y) { return {x, y}; }

namespace emulator {

constexpr size_t kStack = 64 << 10;

// What threads wait for together: the warp's or the block's meeting point.
struct Meeting {
  const char* name = nullptr;
  int members = 0, arrived = 0;
  int64_t generation = 0;
  std::vector<uint64_t> given, all;  // values brought along, and those of the last meeting
};

struct Thread {
  ucontext_t first;
  jmp_buf here;
  std::unique_ptr<char[]> stack;
  bool started = false, done = false;
  Meeting* waits = nullptr;
  int64_t until = 0;
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Meeting> warps;
  Meeting all;
  std::function<void()> body;
  std::string error;
  jmp_buf scheduler;
  int current = 0;
};

inline Block* block = nullptr;
inline Index thread_index, block_index, block_size;

inline void yield() {
  if (!_setjmp(block->threads[block->current].here)) _longjmp(block->scheduler, 1);
}

// Brings `value` to a meeting and returns when everybody is there; their values are then in `all`.
inline void meet(Meeting& meeting, const char* name, int seat, uint64_t value) {
  if (meeting.arrived == 0) meeting.name = name;
  if (std::strcmp(meeting.name, name)) {
    block->error = std::string(meeting.name) + " met " + name;
    while (true) yield();
  }
  meeting.given[seat] = value;
  Thread& thread = block->threads[block->current];
  thread.until = meeting.generation + 1;
  if (++meeting.arrived == meeting.members) {
    meeting.all = meeting.given;
    meeting.arrived = 0;
    ++meeting.generation;
    return;
  }
  thread.waits = &meeting;
  yield();
}

template <class T>
const std::vector<uint64_t>& exchange(const char* name, T value) {
  static_assert(sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  Meeting& warp = block->warps[block->current / 32];
  meet(warp, name, block->current % 32, bits);
  return warp.all;
}

template <class T>
T unpacked(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline void enter() {
  block->body();
  block->threads[block->current].done = true;
  while (true) yield();
}

// Runs a thread until it waits; false if it cannot run.
inline bool resume(int t) {
  Thread& thread = block->threads[t];
  if (thread.done || (thread.waits && thread.waits->generation < thread.until)) return false;
  thread.waits = nullptr;
  block->current = t;
  thread_index.x = t;
  if (!_setjmp(block->scheduler)) {
    if (thread.started) _longjmp(thread.here, 1);
    thread.started = true;
    setcontext(&thread.first);
  }
  return true;
}

// One block of `threads` threads; returns what went wrong, or an empty string.
inline std::string run(unsigned index, int threads, std::function<void()> body) {
  Block now;
  now.threads.resize(threads);
  now.warps.resize((threads + 31) / 32);
  now.body = std::move(body);
  auto open = [](Meeting& meeting, int members) {
    meeting.members = members;
    meeting.given.resize(members);
  };
  for (size_t w = 0; w < now.warps.size(); ++w) open(now.warps[w], std::min(32, threads - 32 * static_cast<int>(w)));
  open(now.all, threads);
  block = &now;
  block_index.x = index;
  block_size.x = threads;
  for (Thread& thread : now.threads) {
    thread.stack.reset(new char[kStack]);
    getcontext(&thread.first);
    thread.first.uc_stack.ss_sp = thread.stack.get();
    thread.first.uc_stack.ss_size = kStack;
    thread.first.uc_link = nullptr;
    makecontext(&thread.first, enter, 0);
  }
  const int warps = static_cast<int>(now.warps.size());
  std::vector<int> order(warps);
  std::iota(order.begin(), order.end(), 0);
  uint64_t random = 12345 + index;
  for (bool moved = true; moved && now.error.empty();) {
    moved = false;
    for (int w = warps - 1; w > 0; --w) {
      random = random * 6364136223846793005ull + 1442695040888963407ull;
      std::swap(order[w], order[(random >> 33) % (w + 1)]);
    }
    for (int w : order) {
      const int first = 32 * w, last = std::min(threads, first + 32);
      for (bool alive = true; alive;) {
        alive = false;
        random = random * 6364136223846793005ull + 1442695040888963407ull;
        const bool down = random >> 40 & 1;
        const int shift = random >> 45 & 31;  // any lane may come first
        for (int lane = 0; lane < 32; ++lane) {
          const int t = first + ((down ? 31 - lane : lane) + shift) % 32;
          if (t < last && resume(t)) alive = moved = true;
        }
      }
    }
  }
  block = nullptr;
  if (now.error.empty() && !std::all_of(now.threads.begin(), now.threads.end(), [](auto& t) { return t.done; }))
    now.error = "threads wait for others that never come";
  return now.error;
}

}  // namespace emulator

#define threadIdx (emulator::thread_index)
#define blockIdx (emulator::block_index)
#define blockDim (emulator::block_size)

inline void __syncthreads() { emulator::meet(emulator::block->all, "__syncthreads", emulator::block->current, 0); }

inline int __syncthreads_and(int predicate) {
  auto& all = emulator::block->all;
  emulator::meet(all, "__syncthreads_and", emulator::block->current, predicate != 0);
  return std::all_of(all.all.begin(), all.all.end(), [](uint64_t v) { return v != 0; });
}

inline void __syncwarp() { emulator::exchange("__syncwarp", 0); }

template <class T>
T __shfl_sync(unsigned, T value, int lane) {
  return emulator::unpacked<T>(emulator::exchange("__shfl_sync", value)[lane % 32]);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  const int lane = emulator::block->current % 32;
  return emulator::unpacked<T>(emulator::exchange("__shfl_xor_sync", value)[lane ^ mask]);
}

inline unsigned __reduce_max_sync(unsigned, unsigned value) {
  const auto& all = emulator::exchange("__reduce_max_sync", value);
  return static_cast<unsigned>(*std::max_element(all.begin(), all.end()));
}

inline int __all_sync(unsigned, int predicate) {
  const auto& all = emulator::exchange("__all_sync", predicate != 0);
  return std::all_of(all.begin(), all.end(), [](uint64_t v) { return v != 0; });
}

inline long long __double_as_longlong(double x) {
  long long bits;
  std::memcpy(&bits, &x, sizeof x);
  return bits;
}

inline double __longlong_as_double(long long x) { return emulator::unpacked<double>(static_cast<uint64_t>(x)); }

inline float __uint_as_float(unsigned x) { return emulator::unpacked<float>(x); }

struct __half {
  unsigned short bits;
};

inline __half __ushort_as_half(unsigned short bits) { return {bits}; }

inline float __half2float(__half x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                     : exponent     ? std::ldexp(1024.0f + fraction, exponent - 25)
                                    : std::ldexp(static_cast<float>(fraction), -24);
  return x.bits >> 15 ? -size : size;
}

inline double rsqrt(double x) { return 1 / std::sqrt(x); }

template <class T>
T max(T x, T y) {
  return std::max(x, y);
}
