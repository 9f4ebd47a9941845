// What every kernel for a CUDA device starts with: one thread runs one lane. arithmetic.hpp follows.
// NVRTC compiles it, and has no headers.
#ifdef __CUDACC_RTC__
using int8_t = signed char;
using uint8_t = unsigned char;
using int16_t = short;
using int32_t = int;
using int64_t = long long;
#else
#include <cstdint>
#endif

constexpr int L = 1;
#define ALIGNED
#define INLINE __device__ __forceinline__
#define LANES for (int l = 0; l < L; ++l)
#define FUSED  // every device has it

#define VECTOR(name)                                             \
  INLINE float vector_##name(float x) { return name##f(x); }     \
  INLINE double vector_##name(double x) { return name(x); }
VECTOR(exp) VECTOR(exp2) VECTOR(expm1) VECTOR(log) VECTOR(log2) VECTOR(log10) VECTOR(log1p)
VECTOR(sin) VECTOR(cos) VECTOR(tan) VECTOR(asin) VECTOR(acos) VECTOR(atan)
VECTOR(sinh) VECTOR(cosh) VECTOR(tanh) VECTOR(asinh) VECTOR(acosh) VECTOR(atanh) VECTOR(erf) VECTOR(erfc)

#define INF __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000LL)

// The elements of one thread in shared memory, THREADS apart: neighbouring threads never meet in a bank. They are
// volatile, or else the compiler keeps what it has read in registers, of which there are too few, and spills.
template <class T> struct Column {
  volatile T* at;
  __device__ __forceinline__ volatile T* operator[](int i) const { return at + i * THREADS; }
};

// A lane of a tensor [lanes, N] as a block [N, 1]; loops over what may lie in registers must be unrolled.
#define UNROLL _Pragma("unroll (N <= 32 ? N : 4)")
template <int N, class Block, class T>
INLINE void load_lanes(Block&& block, const T* from, int64_t, int) {
  UNROLL for (int i = 0; i < N; ++i) block[i][0] = from[i];
}
template <int N, class Block, class T> INLINE void store_lanes(T* to, Block&& block, int) {
  UNROLL for (int i = 0; i < N; ++i) to[i] = block[i][0];
}
template <int N, class To, class From> INLINE void copy_block(To&& to, From&& from) {
  UNROLL for (int i = 0; i < N; ++i) to[i][0] = from[i][0];
}

// Fetches what the next time step reads, while this one computes.
INLINE void prefetch(const void* address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
#endif
}
