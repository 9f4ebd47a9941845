// What every emitted kernel starts with: lanes, arithmetic with PyTorch's meaning, and blocks of lanes on threads.
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <thread>
#include <type_traits>
#include <vector>

// One block of lanes fills REGISTERS vector registers with numbers of the widest floating-point type.
#if defined(__AVX512F__)
constexpr int REGISTER = 64;
#elif defined(__AVX__)
constexpr int REGISTER = 32;
#else
constexpr int REGISTER = 16;
#endif
constexpr int L = REGISTERS * REGISTER / WIDEST;

#define LANES _Pragma("omp simd") for (int l = 0; l < L; ++l)

enum : int32_t { BAD_INDEX = 1, BAD_DIVISOR = 2 };

// glibc has vector forms of these, of at most 4 ulp; they are used where a loop over lanes calls them.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && defined(__GLIBC__) && __GLIBC_PREREQ(2, 35)
#define VECTOR(name)                                                                   \
  extern "C" __attribute__((simd("notinbranch"))) double name(double) noexcept;        \
  extern "C" __attribute__((simd("notinbranch"))) float name##f(float) noexcept;       \
  static inline float vector_##name(float x) { return name##f(x); }                    \
  static inline double vector_##name(double x) { return name(x); }
#else
#define VECTOR(name)                                                                   \
  static inline float vector_##name(float x) { return std::name(x); }                  \
  static inline double vector_##name(double x) { return std::name(x); }
#endif
VECTOR(exp) VECTOR(exp2) VECTOR(expm1) VECTOR(log) VECTOR(log2) VECTOR(log10) VECTOR(log1p)
VECTOR(sin) VECTOR(cos) VECTOR(tan) VECTOR(asin) VECTOR(acos) VECTOR(atan)
VECTOR(sinh) VECTOR(cosh) VECTOR(tanh) VECTOR(asinh) VECTOR(acosh) VECTOR(atanh) VECTOR(erf) VECTOR(erfc)

template <class T> constexpr T LOWEST_OF = std::numeric_limits<T>::has_infinity ? -std::numeric_limits<T>::infinity()
                                                                                : std::numeric_limits<T>::lowest();
template <class T> constexpr T GREATEST_OF = std::numeric_limits<T>::has_infinity ? std::numeric_limits<T>::infinity()
                                                                                  : std::numeric_limits<T>::max();
constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

template <class T> using Same = typename std::enable_if<true, T>::type;  // an operand that follows the other's type

// NaN wins.
template <class T> static inline T maximum(T a, Same<T> b) { return (a > b) | (a != a) ? a : b; }
template <class T> static inline T minimum(T a, Same<T> b) { return (a < b) | (a != a) ? a : b; }
template <class T> static inline T skipping_maximum(T a, Same<T> b) { return (a >= b) | (b != b) ? a : b; }
template <class T> static inline T skipping_minimum(T a, Same<T> b) { return (a <= b) | (b != b) ? a : b; }
template <class T> static inline bool better_max(T a, T b) { return (a > b) | ((a != a) & (b == b)); }
template <class T> static inline bool better_min(T a, T b) { return (a < b) | ((a != a) & (b == b)); }

template <class T> static inline T absolute(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(a);
  else return a < 0 ? T(-a) : a;
}
template <class T> static inline T sign(T a) { return T(T(a > 0) - T(a < 0)); }
template <class T> static inline T invert(T a) {
  if constexpr (std::is_same_v<T, bool>) return !a;
  else return T(~a);
}
template <class T> static inline bool truth(T a) { return a != 0; }
template <class T> static inline bool is_infinite(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::fabs(a) == std::numeric_limits<T>::infinity();
  else return false;
}
template <class T> static inline bool has_sign(T a) {
  if constexpr (std::is_floating_point_v<T>) return std::signbit(a);
  else return a < 0;
}

#define ROUNDING(name, function)                                        \
  template <class T> static inline T name(T a) {                        \
    if constexpr (std::is_floating_point_v<T>) return function(a);      \
    else return a;                                                      \
  }
ROUNDING(round_floor, std::floor)
ROUNDING(round_ceil, std::ceil)
ROUNDING(round_trunc, std::trunc)
ROUNDING(round_even, std::nearbyint)

// A shift beyond the width gives 0, or the sign.
template <class T> static inline T shift_left(T a, T by) {
  constexpr T width = sizeof(T) * 8;
  return (by < 0) | (by >= width) ? T(0) : T(a << (by & (width - 1)));
}
template <class T> static inline T shift_right(T a, T by) {
  constexpr T width = sizeof(T) * 8;
  return T(a >> ((by < 0) | (by >= width) ? T(width - 1) : by));
}

// Integer division raises in PyTorch for a divisor of 0; here it raises when the run is over.
template <class T> static inline T checked_divisor(T b, int32_t& bad) {
  bad |= b == 0 ? int32_t(BAD_DIVISOR) : 0;
  return b == 0 ? T(1) : b;
}
template <class T> static inline T divide_trunc(T a, Same<T> b, int32_t& bad) {
  if constexpr (std::is_floating_point_v<T>) return std::trunc(a / b);
  else {
    b = checked_divisor(b, bad);
    return b == T(-1) ? T(0 - a) : T(a / b);
  }
}
template <class T> static inline T modulo_c(T a, Same<T> b, int32_t& bad) {
  if constexpr (std::is_floating_point_v<T>) return std::fmod(a, b);
  else {
    b = checked_divisor(b, bad);
    return b == T(-1) ? T(0) : T(a % b);
  }
}
template <class T> static inline T modulo_python(T a, Same<T> b, int32_t& bad) {
  T rest = modulo_c(a, b, bad);
  return (rest != 0) & ((b < 0) != (rest < 0)) ? T(rest + b) : rest;
}
template <class T> static inline T divide_floor(T a, Same<T> b, int32_t& bad) {
  if constexpr (std::is_floating_point_v<T>) {
    if (b == 0) return a / b;
    T rest = std::fmod(a, b), quotient = (a - rest) / b;
    if ((rest != 0) & ((b < 0) != (rest < 0))) quotient -= 1;
    if (quotient == 0) return std::copysign(T(0), a / b);
    T floored = std::floor(quotient);
    return quotient - floored > T(0.5) ? floored + 1 : floored;
  } else {
    b = checked_divisor(b, bad);
    T quotient = b == T(-1) ? T(0 - a) : T(a / b);
    return (b != T(-1)) & (T(quotient * b) != a) & ((a < 0) != (b < 0)) ? T(quotient - 1) : quotient;
  }
}
template <class T> static inline T power(T a, Same<T> b) {
  if constexpr (std::is_floating_point_v<T>) return std::pow(a, b);
  else {
    if (b < 0) return a == 1 ? T(1) : a == T(-1) ? (b & 1 ? T(-1) : T(1)) : T(0);
    T result = 1;
    for (; b; b >>= 1, a = T(a * a)) result = b & 1 ? T(result * a) : result;
    return result;
  }
}
template <class T> static inline T gelu(T x) { return x * T(0.5) * (1 + vector_erf(x * T(0.70710678118654752440))); }
template <class T> static inline T gelu_tanh(T x) {
  T inner = T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
  return T(0.5) * x * (1 + vector_tanh(inner));
}

// One rounding where the hardware has it, in sums of products only: elsewhere a product is rounded before it is added.
template <class T> static inline T multiply_add(T a, Same<T> b, Same<T> c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
  if constexpr (std::is_floating_point_v<T>) return std::fma(a, b, c);
#endif
  return T(c + T(a * b));
}

// An index, and a note where it lies outside.
static inline int64_t checked_index(int64_t index, int64_t size, bool wraps, int32_t& bad) {
  index = wraps & (index < 0) ? index + size : index;
  bool outside = (index < 0) | (index >= size);
  bad |= outside ? int32_t(BAD_INDEX) : 0;
  return outside ? 0 : index;
}

// Lanes of a tensor [lanes, N] as a block [N, L]; lanes beyond the last repeat it.
template <int N, class T> static inline void load_lanes(T (*block)[L], const T* from, int64_t stride, int valid) {
  if (N == 1 && stride == 1 && valid == L) {
    for (int l = 0; l < L; ++l) block[0][l] = from[l];
    return;
  }
  for (int l = 0; l < L; ++l) {
    const T* lane = from + (l < valid ? l : valid - 1) * stride;
    for (int i = 0; i < N; ++i) block[i][l] = lane[i];
  }
}
template <int N, class T> static inline void store_lanes(T* to, const T (*block)[L], int valid) {
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

struct Run {
  const void* const* inputs;      // carry, xs, hparams, constants
  const int64_t* lane_strides;    // of each input, in elements
  const int64_t* time_strides;
  void* const* outputs;           // carry [lanes, ...], ys [steps, lanes, ...]
  int64_t lanes, steps;
};

// Calls work(block, first lane, lanes in it) for each block of lanes. What was bad in any lane comes back.
template <class Block, class Work> static int32_t for_each_block(int64_t lanes, int threads, Work work) {
  const int64_t blocks = (lanes + L - 1) / L;
  std::atomic<int64_t> next{0};
  std::atomic<int32_t> bad{0};
  auto worker = [&] {
    const auto block = std::make_unique<Block>();
    for (int64_t i; (i = next++) < blocks;) {
      const int64_t first = i * L;
      work(*block, first, int(lanes - first < L ? lanes - first : L));
      for (int l = 0; l < L; ++l) bad |= block->bad[l];
    }
  };
  std::vector<std::thread> others;
  for (int i = 1; i < threads && i < blocks; ++i) others.emplace_back(worker);
  worker();
  for (auto& thread : others) thread.join();
  return bad;
}
