// Arithmetic as PyTorch defines it, for CPUs and CUDA devices alike. It includes no header of the standard library.
// The target's kernel.hpp precedes it and defines INLINE, INF, NOT_A_NUMBER, the vector functions and perhaps FUSED.

enum : int32_t { BAD_INDEX = 1, BAD_DIVISOR = 2 };

template <class T> constexpr bool IS_FLOAT = false;
template <> constexpr bool IS_FLOAT<float> = true;
template <> constexpr bool IS_FLOAT<double> = true;
template <class T> constexpr bool IS_BOOL = false;
template <> constexpr bool IS_BOOL<bool> = true;
template <class T> struct Itself { using Type = T; };
template <class T> using Same = typename Itself<T>::Type;  // an operand that takes the type of another one

// The functions of the C library, for floats and doubles.
#define MATH_1(name)                                              \
  INLINE float math_##name(float x) { return name##f(x); }        \
  INLINE double math_##name(double x) { return name(x); }
#define MATH_2(name)                                                          \
  INLINE float math_##name(float x, float y) { return name##f(x, y); }        \
  INLINE double math_##name(double x, double y) { return name(x, y); }
MATH_1(sqrt) MATH_1(fabs) MATH_1(floor) MATH_1(ceil) MATH_1(trunc) MATH_1(nearbyint)
MATH_2(copysign) MATH_2(hypot) MATH_2(atan2) MATH_2(fmod) MATH_2(pow)
INLINE float math_fma(float x, float y, float z) { return fmaf(x, y, z); }
INLINE double math_fma(double x, double y, double z) { return fma(x, y, z); }

template <class T> INLINE T greatest_of() {
  if constexpr (IS_FLOAT<T>) return T(INF);
  else if constexpr (T(-1) < T(0)) return T(~(1ULL << (sizeof(T) * 8 - 1)));
  else return T(~0ULL);
}
template <class T> INLINE T lowest_of() {
  if constexpr (IS_FLOAT<T>) return T(-INF);
  else if constexpr (T(-1) < T(0)) return T(1ULL << (sizeof(T) * 8 - 1));
  else return T(0);
}

// Maxima and minima: if either operand is NaN, so is the result, except where the name says "skipping".
template <class T> INLINE T maximum(T a, Same<T> b) { return (a > b) | (a != a) ? a : b; }
template <class T> INLINE T minimum(T a, Same<T> b) { return (a < b) | (a != a) ? a : b; }
template <class T> INLINE T skipping_maximum(T a, Same<T> b) { return (a >= b) | (b != b) ? a : b; }
template <class T> INLINE T skipping_minimum(T a, Same<T> b) { return (a <= b) | (b != b) ? a : b; }
template <class T> INLINE bool better_max(T a, T b) { return (a > b) | ((a != a) & (b == b)); }
template <class T> INLINE bool better_min(T a, T b) { return (a < b) | ((a != a) & (b == b)); }

template <class T> INLINE T absolute(T a) {
  if constexpr (IS_FLOAT<T>) return math_fabs(a);
  else return a < 0 ? T(-a) : a;
}
template <class T> INLINE T sign(T a) { return T(T(a > 0) - T(a < 0)); }
template <class T> INLINE T invert(T a) {
  if constexpr (IS_BOOL<T>) return !a;
  else return T(~a);
}
template <class T> INLINE bool truth(T a) { return a != 0; }
template <class T> INLINE bool is_infinite(T a) {
  if constexpr (IS_FLOAT<T>) return math_fabs(a) == T(INF);
  else return false;
}
template <class T> INLINE bool has_sign(T a) {
  if constexpr (IS_FLOAT<T>) return math_copysign(T(1), a) < 0;
  else return a < 0;
}

#define ROUNDING(name, function)                   \
  template <class T> INLINE T name(T a) {          \
    if constexpr (IS_FLOAT<T>) return function(a); \
    else return a;                                 \
  }
ROUNDING(round_floor, math_floor)
ROUNDING(round_ceil, math_ceil)
ROUNDING(round_trunc, math_trunc)
ROUNDING(round_even, math_nearbyint)

// A shift by more than the width gives 0, or the sign bit everywhere.
template <class T> INLINE T shift_left(T a, T by) {
  constexpr T width = sizeof(T) * 8;
  return (by < 0) | (by >= width) ? T(0) : T(a << (by & (width - 1)));
}
template <class T> INLINE T shift_right(T a, T by) {
  constexpr T width = sizeof(T) * 8;
  return T(a >> ((by < 0) | (by >= width) ? T(width - 1) : by));
}

// PyTorch raises for an integer divisor of 0. A kernel notes it in `bad` and goes on with 1; the engine raises later.
template <class T> INLINE T checked_divisor(T b, int32_t& bad) {
  bad |= b == 0 ? int32_t(BAD_DIVISOR) : 0;
  return b == 0 ? T(1) : b;
}
template <class T> INLINE bool is_minus_one(T b) { return (T(-1) < T(0)) & (b == T(-1)); }
template <class T> INLINE T divide_trunc(T a, Same<T> b, int32_t& bad) {
  if constexpr (IS_FLOAT<T>) return math_trunc(a / b);
  else {
    b = checked_divisor(b, bad);
    return is_minus_one(b) ? T(0 - a) : T(a / b);
  }
}
template <class T> INLINE T modulo_c(T a, Same<T> b, int32_t& bad) {
  if constexpr (IS_FLOAT<T>) return math_fmod(a, b);
  else {
    b = checked_divisor(b, bad);
    return is_minus_one(b) ? T(0) : T(a % b);
  }
}
template <class T> INLINE T modulo_python(T a, Same<T> b, int32_t& bad) {
  T rest = modulo_c(a, b, bad);
  return (rest != 0) & ((b < 0) != (rest < 0)) ? T(rest + b) : rest;
}
template <class T> INLINE T divide_floor(T a, Same<T> b, int32_t& bad) {
  if constexpr (IS_FLOAT<T>) {
    if (b == 0) return a / b;
    T rest = math_fmod(a, b), quotient = (a - rest) / b;
    if ((rest != 0) & ((b < 0) != (rest < 0))) quotient -= 1;
    if (quotient == 0) return math_copysign(T(0), a / b);
    T floored = math_floor(quotient);
    return quotient - floored > T(0.5) ? floored + 1 : floored;
  } else {
    b = checked_divisor(b, bad);
    T quotient = is_minus_one(b) ? T(0 - a) : T(a / b);
    return !is_minus_one(b) & (T(quotient * b) != a) & ((a < 0) != (b < 0)) ? T(quotient - 1) : quotient;
  }
}
template <class T> INLINE T power(T a, Same<T> b) {
  if constexpr (IS_FLOAT<T>) return math_pow(a, b);
  else {
    if (b < 0) return a == 1 ? T(1) : a == T(-1) ? (b & 1 ? T(-1) : T(1)) : T(0);
    T result = 1;
    for (; b; b >>= 1, a = T(a * a)) result = b & 1 ? T(result * a) : result;
    return result;
  }
}
template <class T> INLINE T gelu(T x) { return x * T(0.5) * (1 + vector_erf(x * T(0.70710678118654752440))); }
template <class T> INLINE T gelu_tanh(T x) {
  T inner = T(0.79788456080286535588) * (x + T(0.044715) * x * x * x);
  return T(0.5) * x * (1 + vector_tanh(inner));
}

template <class T> INLINE T multiply_add(T a, Same<T> b, Same<T> c) {
#ifdef FUSED
  if constexpr (IS_FLOAT<T>) return math_fma(a, b, c);
#endif
  return T(c + T(a * b));
}

// An index; one out of range is noted in `bad` and replaced by 0, so that no foreign memory is touched.
INLINE int64_t checked_index(int64_t index, int64_t size, bool wraps, int32_t& bad) {
  index = wraps & (index < 0) ? index + size : index;
  bool outside = (index < 0) | (index >= size);
  bad |= outside ? int32_t(BAD_INDEX) : 0;
  return outside ? 0 : index;
}

