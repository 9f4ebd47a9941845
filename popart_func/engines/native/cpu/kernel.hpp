// The beginning of every kernel for a CPU: vector registers and functions, and blocks of lanes.
// arithmetic.hpp follows. The including source defines BLOCK, the number of lanes in a block, which may depend on
// REGISTER, the bytes of a vector register.
#include <fenv.h>
#include <pthread.h>

#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <utility>

// Two passes keep GCC 12 from vectorizing, so they are turned off. forwprop turns pairs of shifts into rotations; GCC
// can't vectorize rotations of signed numbers, and threefry's random bits take eight times as long. pre moves
// conversions into the branches of a conditional, which then mixes comparisons of floats and of doubles; normal numbers
// take three times as long.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC optimize("no-tree-forwprop", "no-tree-pre")
#endif

#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int L = BLOCK;

#define ALIGNED alignas(64)
#define INLINE static inline
#define NOINLINE __attribute__((noinline))
#define LANES _Pragma("omp simd") for (int l = 0; l < L; ++l)

// glibc has vector versions of these functions, exact to 4 ulp. The compiler uses them in loops over lanes.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && __GLIBC_PREREQ(2, 35)
#define VECTOR(name)                                                             \
  extern "C" __attribute__((simd("notinbranch"))) double name(double) noexcept;  \
  extern "C" __attribute__((simd("notinbranch"))) float name##f(float) noexcept; \
  INLINE float vector_##name(float x) { return name##f(x); }                     \
  INLINE double vector_##name(double x) { return name(x); }
#else
#define VECTOR(name)                                           \
  INLINE float vector_##name(float x) { return std::name(x); } \
  INLINE double vector_##name(double x) { return std::name(x); }
#endif
VECTOR(exp) VECTOR(exp2) VECTOR(expm1) VECTOR(log) VECTOR(log2) VECTOR(log10) VECTOR(log1p)
VECTOR(sin) VECTOR(cos) VECTOR(tan) VECTOR(asin) VECTOR(acos) VECTOR(atan)
VECTOR(sinh) VECTOR(cosh) VECTOR(tanh) VECTOR(asinh) VECTOR(acosh) VECTOR(atanh) VECTOR(erf) VECTOR(erfc)

#define INF std::numeric_limits<double>::infinity()
#define NOT_A_NUMBER std::numeric_limits<double>::quiet_NaN()

// Sums of products round once per term where the hardware can. All other products are rounded before they are added.
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
#define FUSED
#endif

// Copies lanes of a tensor [lanes, N] to a block [N, L] and back. Places beyond the last lane repeat it.
template <int N, class T> static NOINLINE void load_lanes(T (*block)[L], const T* from, int64_t stride, int valid) {
  if (N == 1 && stride == 1 && valid == L) {
    for (int l = 0; l < L; ++l) block[0][l] = from[l];
    return;
  }
  for (int l = 0; l < L; ++l) {
    const T* lane = from + (l < valid ? l : valid - 1) * stride;
    for (int i = 0; i < N; ++i) block[i][l] = lane[i];
  }
}
template <int N, class T> static NOINLINE void store_lanes(T* to, const T (*block)[L], int valid) {
  if (N == 1 && valid == L) {
    for (int l = 0; l < L; ++l) to[l] = block[0][l];
    return;
  }
  for (int l = 0; l < valid; ++l)
    for (int i = 0; i < N; ++i) to[l * N + i] = block[i][l];
}
template <int N, class T> static inline void copy_block(T (*to)[L], const T (*from)[L]) {
  for (int i = 0; i < N; ++i) LANES to[i][l] = from[i][l];
}

// Copies N elements that lie together.
template <int N, class T> static inline void copy(T* to, const T* from) { memcpy(to, from, N * sizeof(T)); }

// The argument of a kernel.
struct KernelArguments {
  const void* const* inputs;      // carry, xs, hparams, constants
  const int64_t* lane_strides;    // of each input, in elements
  const int64_t* time_strides;
  void* const* outputs;           // carry [lanes, ...], ys [steps, lanes, ...]
  int64_t lanes, steps;
};

// A bit of errors, beside those of arithmetic.hpp.
enum : int32_t { NO_MEMORY = 4 };
