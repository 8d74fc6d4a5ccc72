// Vectors of SIMD_BYTES for the kernel files. Compiled once per instruction set with them (simd.h), hence no guard.

namespace projgrad::SIMD_NAME {
namespace {

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(SIMD_BYTES)));
};
template <class T>
using Vector = typename VectorOf<T>::type;
using Doubles = Vector<double>;

constexpr int64_t kLanes = SIMD_BYTES / sizeof(double);

template <class T>
Vector<T> load(const T* p) {
  Vector<T> v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}

// kLanes elements of T as doubles, and back.
template <class T>
Doubles widen(const T* p) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  Narrow v;
  __builtin_memcpy(&v, p, sizeof v);
  return __builtin_convertvector(v, Doubles);
}

template <class T>
void store(T* p, Doubles v) {
  typedef T Narrow __attribute__((vector_size(kLanes * sizeof(T))));
  const Narrow rounded = __builtin_convertvector(v, Narrow);
  __builtin_memcpy(p, &rounded, sizeof rounded);
}

inline double total(Doubles v) {
  double sum = 0;
  for (int64_t k = 0; k < kLanes; ++k) sum += v[k];
  return sum;
}

}  // namespace
}  // namespace projgrad::SIMD_NAME
