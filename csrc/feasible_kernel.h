// The inner loop of feasible, compiled once per instruction set (simd.h).

#include "vectors.h"

namespace projgrad::SIMD_NAME {
namespace {

// A chunk that may be read to the end of a vector, zeros behind it: as it is, or converted into `buffer`.
template <class S, class T>
const T* readable(const S* source, int64_t length, int64_t padded, T* buffer) {
  if constexpr (std::is_same_v<S, T>) {
    if (length == padded) return source;
  }
  for (int64_t k = 0; k < length; ++k) buffer[k] = static_cast<T>(source[k]);
  std::fill(buffer + length, buffer + padded, T(0));
  return buffer;
}

// At most 1024 coordinates: writes what is kept of d and adds to the six sums. root = 1 / √n.
template <class S, class R>
void feasible_chunk(const S* d, const S* u, const R* total, const R* squares, int64_t length, double root, double bound,
                    double slack, double floor, S* out, double* sums) {
  using T = std::conditional_t<std::is_same_v<S, double>, double, float>;
  using W = std::conditional_t<std::is_same_v<R, double>, double, float>;
  constexpr int64_t size = 1024;
  T change[size], forget[size], kept[size];
  W first[size], second[size];
  const int64_t padded = (length + kLanes - 1) / kLanes * kLanes;
  const T *x_data = readable(d, length, padded, change), *w_data = readable(u, length, padded, forget);
  const W *sum_data = readable(total, length, padded, first), *square_data = readable(squares, length, padded, second);
  const Doubles zero = {}, one = zero + 1, nan = zero + std::numeric_limits<double>::quiet_NaN();
  Doubles moved = {}, count = {}, before = {}, after = {}, along = {}, across = {};
  for (int64_t k = 0; k < padded; k += kLanes) {
    const Doubles x = widen(x_data + k), w = widen(w_data + k), sum = widen(sum_data + k),
                  square = widen(square_data + k);
    const Doubles r = sum * root, variance = square - r * r;
    const Doubles spread =
        (variance > 0 ? variance : zero) + slack * square + (((sum != 0) | (square != 0)) ? zero + floor : zero);
    const Doubles gain = (x > 0 ? -r : r) * (r < 0 ? -r : r), harm = x > 0 ? w : -w;
    const auto keep = (x != 0) & (harm <= 0) & (gain >= bound * spread);
    const auto finite = (x - x) + (w - w) + (sum - sum) + (square - square) == 0;
    const Doubles y = finite ? (keep ? x : zero) : nan;
    store(kept + k, y);
    moved += x != 0 ? one : zero;
    count += keep ? one : zero;
    before += x * x;
    after += y * y;
    along += y * w;
    across += y * sum;
  }
  for (int64_t k = 0; k < length; ++k) out[k] = static_cast<S>(kept[k]);
  const Doubles all[] = {moved, count, before, after, along, across};
  for (int64_t s = 0; s < 6; ++s)
    for (int64_t k = 0; k < kLanes; ++k) sums[s] += all[s][k];
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
