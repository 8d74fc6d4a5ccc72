// Shared by the CPU kernels: strided views of any supported dtype, vectors of any width, and the partition of work.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <tuple>
#include <vector>

#include "cpu.h"

namespace projgrad {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// A matrix of any strides; the element type is the template argument of the code that reads it.
struct Matrix {
  const void* data;
  int64_t rows, columns, row_stride, column_stride;

  explicit Matrix(const Tensor& t)
      : data(t.const_data_ptr()), rows(t.size(0)), columns(t.size(1)), row_stride(t.stride(0)),
        column_stride(t.stride(1)) {}
};

// Calls f with a null pointer of the element type of a floating tensor.
template <class F>
void dispatch(ScalarType type, const F& f) {
  switch (type) {
    case ScalarType::Float: return f(static_cast<float*>(nullptr));
    case ScalarType::Double: return f(static_cast<double*>(nullptr));
    case ScalarType::BFloat16: return f(static_cast<c10::BFloat16*>(nullptr));
    case ScalarType::Half: return f(static_cast<c10::Half*>(nullptr));
    default: STD_TORCH_CHECK(false, "projgrad: float32, float64, bfloat16 or float16 expected");
  }
}

inline Tensor doubles(const Tensor& like, std::initializer_list<int64_t> shape) {
  return torch::stable::new_empty(like, std::vector<int64_t>(shape), ScalarType::Double);
}

constexpr int64_t kHalfL2 = int64_t(512) << 10;  // bytes, of a common L2

// Columns are cut into segments, one unit of parallel work each, of `least` columns or more. Their number depends on
// the problem alone, never on the number of threads, so the same input gives the same bits on any machine with the same
// vector width. The partial sums, `bytes` a segment, stay below 8 MiB together unless two segments need more.
inline int64_t segment_count(int64_t columns, int64_t least, int64_t bytes) {
  const int64_t fit = std::max<int64_t>(2, (int64_t(8) << 20) / std::max<int64_t>(1, bytes));
  return std::clamp<int64_t>(columns / least, 1, std::min<int64_t>(64, fit));
}

// One contiguous row of `length` elements as T: the row itself where it is that already, else converted into `buffer`.
template <class S, class T>
const T* row(const Matrix& m, int64_t index, int64_t start, int64_t length, T* buffer) {
  const S* source = static_cast<const S*>(m.data) + index * m.row_stride + start * m.column_stride;
  if constexpr (std::is_same_v<S, T>) {
    if (m.column_stride == 1) return source;
  }
  for (int64_t k = 0; k < length; ++k) buffer[k] = static_cast<T>(source[k * m.column_stride]);
  return buffer;
}

// Rows of a chunk as T, in `pointers`. Columns that lie apart (transposed storage) are read in the order of memory, a
// cache line of neighbouring rows at a time.
template <class S, class T>
void rows(const Matrix& m, int64_t start, int64_t length, T* buffer, int64_t pitch, const T** pointers) {
  if (m.column_stride == 1 || m.row_stride != 1) {
    for (int64_t j = 0; j < m.rows; ++j) pointers[j] = row<S>(m, j, start, length, buffer + j * pitch);
    return;
  }
  const S* source = static_cast<const S*>(m.data) + start * m.column_stride;
  for (int64_t j = 0; j < m.rows; j += 16) {
    const int64_t end = std::min(j + 16, m.rows);
    for (int64_t k = 0; k < length; ++k)
      for (int64_t i = j; i < end; ++i) buffer[i * pitch + k] = static_cast<T>(source[k * m.column_stride + i]);
  }
  for (int64_t j = 0; j < m.rows; ++j) pointers[j] = buffer + j * pitch;
}

}  // namespace projgrad
