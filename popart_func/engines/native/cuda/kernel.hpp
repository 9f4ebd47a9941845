// The beginning of every kernel for a CUDA device: one thread of a block of THREADS runs a lane or, where the source
// defines TEAM, the whole block does. arithmetic.hpp follows. NVRTC compiles it, and has no headers.
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
#define FUSED  // every device has fused multiply-add

#define VECTOR(name)                                             \
  INLINE float vector_##name(float x) { return name##f(x); }     \
  INLINE double vector_##name(double x) { return name(x); }
VECTOR(exp) VECTOR(exp2) VECTOR(expm1) VECTOR(log) VECTOR(log2) VECTOR(log10) VECTOR(log1p)
VECTOR(sin) VECTOR(cos) VECTOR(tan) VECTOR(asin) VECTOR(acos) VECTOR(atan)
VECTOR(sinh) VECTOR(cosh) VECTOR(tanh) VECTOR(asinh) VECTOR(acosh) VECTOR(atanh) VECTOR(erf) VECTOR(erfc)

#define INF __longlong_as_double(0x7ff0000000000000LL)
#define NOT_A_NUMBER __longlong_as_double(0x7ff8000000000000LL)

extern __shared__ __align__(16) char shared_memory[];

// A thread's elements in shared memory: vectors of 16 bytes, with the next thread's vector beside each. So the compiler
// can join accesses to neighbouring elements into one of a vector, and neighbouring threads never use the same bank.
template <class T> struct Column {
  T* at;
  static constexpr int W = 16 / sizeof(T);
  INLINE T* operator[](unsigned i) const { return at + i / W * W * THREADS + i % W; }
};

// A team's elements in shared memory. Every 33rd place is left free, so that neither neighbouring elements nor the
// elements of a matrix' column are in the same bank.
template <class T> struct Skewed {
  T* at;
  INLINE T* operator[](unsigned i) const { return at + i + i / 32; }
};

// A part of a lane's elements, from one of them on: of an array or an input, or of shared memory.
template <class Memory> struct Part {
  Memory whole;
  unsigned start;
  INLINE auto operator[](unsigned i) const { return whole[start + i]; }
};
template <class T> INLINE T* part(T* whole, int64_t start) { return whole + start; }
template <class T> INLINE Part<Column<T>> part(Column<T> whole, int64_t start) { return {whole, unsigned(start)}; }
template <class T> INLINE Part<Skewed<T>> part(Skewed<T> whole, int64_t start) { return {whole, unsigned(start)}; }
template <class Memory> INLINE Part<Memory> part(Part<Memory> whole, int64_t start) {
  return {whole.whole, whole.start + unsigned(start)};
}

// Stands between loop nests in a thread's kernel. Without it the compiler keeps everything that it has read from shared
// memory in registers, of which there are too few.
#define FENCE asm volatile("" ::: "memory")

#ifdef TEAM
INLINE void meet() {
  if constexpr (THREADS == 32) __syncwarp();
  else __syncthreads();
}
#define MEMBER int(threadIdx.x)
#define MEET meet()
#define UNROLL
#else
#define TEAM 1
#define MEMBER 0
#define UNROLL _Pragma("unroll (N <= 168 ? N : 4)")  // what may lie in registers must be unrolled
#endif

// Copies a lane of a tensor [lanes, N] to a block [N, 1] and back.
template <int N, class Block, class T>
INLINE void load_lanes(Block&& block, const T* from, int64_t, int) {
  UNROLL for (int i = MEMBER; i < N; i += TEAM) block[i][0] = from[i];
}
template <int N, class Block, class T> INLINE void store_lanes(T* to, Block&& block, int) {
  UNROLL for (int i = MEMBER; i < N; i += TEAM) to[i] = block[i][0];
}
template <int N, class To, class From> INLINE void copy_block(To&& to, From&& from) {
  UNROLL for (int i = MEMBER; i < N; i += TEAM) to[i][0] = from[i][0];
}

// Fetches an input of the next time step while this one computes.
INLINE void prefetch(const void* address) {
#ifdef __CUDACC__
  asm volatile("prefetch.global.L1 [%0];" ::"l"(address));
#endif
}
