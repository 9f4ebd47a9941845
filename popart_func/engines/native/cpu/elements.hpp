// Elements of one lane in vector registers: what the kernels of that schedule need beside kernel.hpp and
// arithmetic.hpp. Vectors are those of GCC and Clang; intrinsics stand where these have no form of their own.
#if defined(__x86_64__)
#include <immintrin.h>
#endif

template <class T> struct VectorOf { typedef T Type __attribute__((vector_size(REGISTER))); };
template <class T> using Vector = typename VectorOf<T>::Type;
template <class T> constexpr int WIDTH = REGISTER / sizeof(T);

// How many sums of a product are under way at once: what the registers hold beside the factors.
#if defined(__AVX512F__) || defined(__ARM_NEON)
constexpr int SUMS = 24;
#else
constexpr int SUMS = 12;
#endif

#if defined(__x86_64__) && defined(__AVX__)
#define IN_REGISTER(x) __asm__("" : "+v"(x))  // else GCC loads a factor again for each row
#elif defined(__x86_64__)
#define IN_REGISTER(x) __asm__("" : "+x"(x))
#else
#define IN_REGISTER(x)
#endif

// GCC 12 takes a pointer at a known distance from aligned memory for aligned itself, where it vectorizes an outer loop: a
// load through it ends the process. This hides the distance.
template <class T> INLINE void forget_alignment(T*& pointer) { __asm__("" : "+r"(pointer)); }

// The first N elements of a vector; the others are zero.
template <int N, class T> INLINE Vector<T> load(const T* from) {
  Vector<T> vector;
  if constexpr (N >= WIDTH<T>) {
    memcpy(&vector, from, sizeof vector);
    return vector;
  }
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_maskz_loadu_ps((1u << N) - 1, from);
  else return (Vector<T>)_mm512_maskz_loadu_pd((1u << N) - 1, from);
#else
  vector = Vector<T>{};
  memcpy(&vector, from, N * sizeof(T));
  return vector;
#endif
}
template <int N, class T> INLINE void store(T* to, Vector<T> vector) {
  if constexpr (N >= WIDTH<T>) {
    memcpy(to, &vector, sizeof vector);
  } else {
#if defined(__AVX512F__)
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, (1u << N) - 1, (__m512)vector);
    else _mm512_mask_storeu_pd(to, (1u << N) - 1, (__m512d)vector);
#else
    memcpy(to, &vector, N * sizeof(T));
#endif
  }
}

// x · a + c, rounded as `multiply_add` does.
template <class T> INLINE Vector<T> multiply_add_all(T x, Vector<T> a, Vector<T> c) {
#ifdef FUSED
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_fmadd_ps(_mm512_set1_ps(x), (__m512)a, (__m512)c);
  else return (Vector<T>)_mm512_fmadd_pd(_mm512_set1_pd(x), (__m512d)a, (__m512d)c);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_fmadd_ps(_mm256_set1_ps(x), (__m256)a, (__m256)c);
  else return (Vector<T>)_mm256_fmadd_pd(_mm256_set1_pd(x), (__m256d)a, (__m256d)c);
#else
  for (int i = 0; i < WIDTH<T>; ++i) c[i] = multiply_add(x, a[i], c[i]);
  return c;
#endif
#else
  return c + x * a;
#endif
}
template <class T> INLINE Vector<T> multiply_add_all(Vector<T> x, Vector<T> a, Vector<T> c) {
#ifdef FUSED
#if defined(__AVX512F__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm512_fmadd_ps((__m512)x, (__m512)a, (__m512)c);
  else return (Vector<T>)_mm512_fmadd_pd((__m512d)x, (__m512d)a, (__m512d)c);
#elif defined(__AVX__)
  if constexpr (sizeof(T) == 4) return (Vector<T>)_mm256_fmadd_ps((__m256)x, (__m256)a, (__m256)c);
  else return (Vector<T>)_mm256_fmadd_pd((__m256d)x, (__m256d)a, (__m256d)c);
#else
  for (int i = 0; i < WIDTH<T>; ++i) c[i] = multiply_add(x[i], a[i], c[i]);
  return c;
#endif
#else
  return c + x * a;
#endif
}

// The elements of two vectors in turn: of their first halves, or of their second ones.
template <int HALF, class V, int... I> INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int W = sizeof...(I);
  return __builtin_shufflevector(a, b, (HALF * W / 2 + I / 2 + I % 2 * W)...);
}

// Transposes a block of ROWS x COLUMNS elements, at most WIDTH each.
template <int ROWS, int COLUMNS, class T> INLINE void transpose_block(const T* from, int from_row, T* to, int to_row) {
  constexpr int W = WIDTH<T>;
  using All = std::make_integer_sequence<int, W>;
  Vector<T> a[W], b[W];
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i) a[i] = i < ROWS ? load<COLUMNS>(from + i * from_row) : Vector<T>{};
#pragma GCC unroll 4
  for (int size = 1; size < W; size *= 2) {
#pragma GCC unroll 8
    for (int i = 0; i < W / 2; ++i) {
      b[2 * i] = interleave<0>(a[i], a[i + W / 2], All{});
      b[2 * i + 1] = interleave<1>(a[i], a[i + W / 2], All{});
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) a[i] = b[i];
  }
#pragma GCC unroll 16
  for (int i = 0; i < COLUMNS; ++i) store<ROWS>(to + i * to_row, a[i]);
}

// to[j][i] = from[i][j], ROWS x COLUMNS; rows of `from` are contiguous.
template <int ROWS, int COLUMNS, int FROM_ROW, int TO_ROW, class T> static void transpose(const T* from, T* to) {
  constexpr int W = WIDTH<T>, R = ROWS % W, C = COLUMNS % W;
  for (int i = 0; i < ROWS - R; i += W) {
    for (int j = 0; j < COLUMNS - C; j += W)
      transpose_block<W, W>(from + i * FROM_ROW + j, FROM_ROW, to + j * TO_ROW + i, TO_ROW);
    if constexpr (C != 0)
      transpose_block<W, C>(from + i * FROM_ROW + COLUMNS - C, FROM_ROW, to + (COLUMNS - C) * TO_ROW + i, TO_ROW);
  }
  if constexpr (R != 0) {
    from += (ROWS - R) * FROM_ROW, to += ROWS - R;
    for (int j = 0; j < COLUMNS - C; j += W) transpose_block<R, W>(from + j, FROM_ROW, to + j * TO_ROW, TO_ROW);
    if constexpr (C != 0) transpose_block<R, C>(from + COLUMNS - C, FROM_ROW, to + (COLUMNS - C) * TO_ROW, TO_ROW);
  }
}

// Copies a matrix [ROWS, COLUMNS] of any strides to rows that are contiguous, TO_ROW apart.
template <int ROWS, int COLUMNS, int ROW, int COLUMN, int TO_ROW, class T> static void pack(const T* from, T* to) {
  if constexpr (ROW == 1) {
    transpose<COLUMNS, ROWS, COLUMN, TO_ROW>(from, to);
  } else if constexpr (COLUMN == 1) {
    for (int i = 0; i < ROWS; ++i) memcpy(to + i * TO_ROW, from + i * ROW, COLUMNS * sizeof(T));
  } else {
    for (int i = 0; i < ROWS; ++i)
      for (int j = 0; j < COLUMNS; ++j) to[i * TO_ROW + j] = from[i * ROW + j * COLUMN];
  }
}

// One tile of a product: R rows and V vectors of columns, of the last of which LAST elements count. Either the columns
// of C lie together (CN = 1), or its rows do (CM = 1). MORE: the sums go on from what is in C.
template <int R, int V, int LAST, int K, int AM, int AK, int BK, int CM, int CN, bool MORE, class T>
INLINE void tile(const T* a, const T* b, T* c) {
  constexpr int W = WIDTH<T>;
  static_assert(CN == 1 || (CM == 1 && !MORE), "elements of C lie together, where sums go on along its columns");
  Vector<T> sums[R][V];
#pragma GCC unroll 32
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int v = 0; v < V - 1; ++v) sums[r][v] = MORE ? load<W>(c + r * CM + v * W) : Vector<T>{};
    sums[r][V - 1] = MORE ? load<LAST>(c + r * CM + (V - 1) * W) : Vector<T>{};
  }
#pragma GCC unroll 1
  for (int k = 0; k < K; ++k) {
    Vector<T> right[V];
#pragma GCC unroll 8
    for (int v = 0; v < V - 1; ++v) {
      right[v] = load<W>(b + k * BK + v * W);
      if constexpr (R > 1) IN_REGISTER(right[v]);
    }
    right[V - 1] = load<LAST>(b + k * BK + (V - 1) * W);
    if constexpr (R > 1) IN_REGISTER(right[V - 1]);
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
      const T left = a[r * AM + k * AK];
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sums[r][v] = multiply_add_all<T>(left, right[v], sums[r][v]);
    }
  }
  if constexpr (CN == 1) {
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
      for (int v = 0; v < V - 1; ++v) store<W>(c + r * CM + v * W, sums[r][v]);
      store<LAST>(c + r * CM + (V - 1) * W, sums[r][V - 1]);
    }
  } else {
    ALIGNED T block[R * V * W];
#pragma GCC unroll 32
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) store<W>(block + (r * V + v) * W, sums[r][v]);
    transpose<R, (V - 1) * W + LAST, V * W, CN>(block, c);
  }
}

// The number of rows of a tile: one that divides them all, if it leaves few registers unused.
constexpr int tall(int rows, int most) {
  int size = 1;
  for (int i = 1; i <= most; ++i)
    if (rows % i == 0) size = i;
  return size * 2 <= most ? (rows < most ? rows : most) : size;
}
constexpr int wide(int rows, int vectors) {
  if (rows == 1) return vectors < 8 ? vectors : 8;
  for (int size = SUMS / 6; size > 1; --size)
    if (vectors % size == 0) return size;
  return vectors < SUMS / 6 ? vectors : SUMS / 6;
}

template <int M, int V, int LAST, int K, int AM, int AK, int BK, int CM, int CN, bool MORE, class T>
static void column_of_tiles(const T* a, const T* b, T* c) {
  constexpr int R = tall(M, SUMS / V > 1 ? SUMS / V : 1);
  for (int m = 0; m < M - M % R; m += R) tile<R, V, LAST, K, AM, AK, BK, CM, CN, MORE>(a + m * AM, b, c + m * CM);
  if constexpr (M % R != 0) {
    constexpr int m = M - M % R;
    tile<M % R, V, LAST, K, AM, AK, BK, CM, CN, MORE>(a + m * AM, b, c + m * CM);
  }
}

// C[m, n] = Σ_k A[m, k] B[k, n], k in order, columns in registers: B has contiguous rows.
template <int M, int N, int K, int AM, int AK, int BK, int CM, int CN, class T>
static void tiled(const T* a, const T* b, T* c) {
  constexpr int W = WIDTH<T>, V = wide(M, (N + W - 1) / W), REST = N % (V * W);
  for (int n = 0; n < N - REST; n += V * W) column_of_tiles<M, V, W, K, AM, AK, BK, CM, CN, false>(a, b + n, c + n * CN);
  if constexpr (REST != 0) {
    constexpr int LAST = REST % W ? REST % W : W;
    column_of_tiles<M, (REST + W - 1) / W, LAST, K, AM, AK, BK, CM, CN, false>(a, b + N - REST, c + (N - REST) * CN);
  }
}

// How many rows of a panel of B, V vectors wide, fill half of the first-level cache.
template <class T, int V> constexpr int PANEL = 16384 / (V * REGISTER);

// Adds a panel's part to some columns of C. The panel is packed, and then stays in the first-level cache while all rows
// of A meet it. Where it is, rows of B that lie a multiple of 1024 bytes apart would compete for a few places there.
template <int M, int V, int LAST, int K, int AM, int AK, int BK, int BN, int CM, bool MORE, class T>
static void one_panel(const T* a, const T* b, T* c, T* room) {
  pack<K, (V - 1) * WIDTH<T> + LAST, BK, BN, V * WIDTH<T>>(b, room);
  column_of_tiles<M, V, LAST, K, AM, AK, V * WIDTH<T>, CM, 1, MORE>(a, room, c);
}
template <int M, int V, int LAST, int K, int AM, int AK, int BK, int BN, int CM, class T>
static void panels(const T* a, const T* b, T* c, T* room) {
  constexpr int P = K < PANEL<T, V> ? K : PANEL<T, V>;
  one_panel<M, V, LAST, P, AM, AK, BK, BN, CM, false>(a, b, c, room);
  for (int k = P; k <= K - P; k += P)
    one_panel<M, V, LAST, P, AM, AK, BK, BN, CM, true>(a + k * AK, b + k * BK, c, room);
  if constexpr (K % P != 0)
    one_panel<M, V, LAST, K % P, AM, AK, BK, BN, CM, true>(a + (K - K % P) * AK, b + (K - K % P) * BK, c, room);
}

// As `tiled`, for a large B of any strides.
template <int M, int N, int K, int AM, int AK, int BK, int BN, class T>
static void by_panels(const T* a, const T* b, T* c, T* room) {
  constexpr int W = WIDTH<T>, V = wide(M, (N + W - 1) / W), REST = N % (V * W);
  for (int n = 0; n < N - REST; n += V * W)
    panels<M, V, W, K, AM, AK, BK, BN, N>(a, b + n * BN, c + n, room);
  if constexpr (REST != 0) {
    constexpr int LAST = REST % W ? REST % W : W, n = N - REST;
    panels<M, (REST + W - 1) / W, LAST, K, AM, AK, BK, BN, N>(a, b + n * BN, c + n, room);
  }
}

template <class T> INLINE T sum_of(Vector<T> vector) {
#pragma GCC unroll 4
  for (int size = WIDTH<T> / 2; size; size /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < size; ++i) vector[i] += vector[i + size];
  return vector[0];
}
#if defined(__AVX512F__)
template <> float sum_of<float>(Vector<float> vector) { return _mm512_reduce_add_ps((__m512)vector); }
template <> double sum_of<double>(Vector<double> vector) { return _mm512_reduce_add_pd((__m512d)vector); }
#endif

// R dot products of length K, with the elements in registers: each is summed in WIDTH parts, which are added at last.
template <int R, int K, int BN, class T> INLINE void dots(const T* a, const T* b, T* c) {
  constexpr int W = WIDTH<T>;
  Vector<T> sums[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) sums[r] = Vector<T>{};
  for (int k = 0; k < K - K % W; k += W) {
    const Vector<T> left = load<W>(a + k);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = multiply_add_all<T>(left, load<W>(b + r * BN + k), sums[r]);
  }
  if constexpr (K % W != 0) {
    const Vector<T> left = load<K % W>(a + K - K % W);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) sums[r] = multiply_add_all<T>(left, load<K % W>(b + r * BN + K - K % W), sums[r]);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) c[r] = sum_of<T>(sums[r]);
}

template <class T, int N> constexpr int whole_vectors() { return (N + WIDTH<T> - 1) / WIDTH<T> * WIDTH<T>; }

// C = A · B with C contiguous, [M, N], and A and B of any strides: (AM, AK) and (BK, BN), that of a single element
// being 0. `room` holds what is packed: K rows of as many whole vectors as the longer of M and N fills.
template <int M, int N, int K, int AM, int AK, int BK, int BN, class T>
static void multiply(const T* a, const T* b, T* c, T* room) {
  constexpr int W = WIDTH<T>;
  if constexpr (!IS_FLOAT<T>) {
    for (int m = 0; m < M; ++m)
      for (int n = 0; n < N; ++n) {
        T sum = 0;
        for (int k = 0; k < K; ++k) sum = multiply_add(a[m * AM + k * AK], b[k * BK + n * BN], sum);
        c[m * N + n] = sum;
      }
  } else if constexpr (M > 1 && N == 1) {
    multiply<1, M, K, 0, BK, AK, AM>(b, a, c, room);  // of one column as of one row: it is contiguous, too
  } else if constexpr (M == 1 && BN != 1 && BK == 1) {
    if constexpr (AK != 1) {
      for (int k = 0; k < K; ++k) room[k] = a[k * AK];
      a = room;
    }
    constexpr int R = N < 8 ? N : 8;
    for (int n = 0; n < N - N % R; n += R) dots<R, K, BN>(a, b + n * BN, c + n);
    if constexpr (N % R != 0) dots<N % R, K, BN>(a, b + (N - N % R) * BN, c + N - N % R);
  } else if constexpr (M == 1 && BN != 1) {
    for (int n = 0; n < N; ++n) {
      T sum = 0;
      for (int k = 0; k < K; ++k) sum = multiply_add(a[k * AK], b[k * BK + n * BN], sum);
      c[n] = sum;
    }
  } else if constexpr (N <= W / 4 && M >= 2 * N && (AM == 1 || AK == 1)) {  // few columns: the rows fill registers
    if constexpr (AM == 1) {
      tiled<N, M, K, BN, BK, AK, 1, N>(b, a, c);
    } else {
      pack<K, M, AK, AM, whole_vectors<T, M>()>(a, room);
      tiled<N, M, K, BN, BK, whole_vectors<T, M>(), 1, N>(b, room, c);
    }
  } else if constexpr (BN != 1 && AK == 1 && M >= W && long(N) * K > long(M) * (K + 3 * N)) {
    // To transpose A and C is less work than to transpose B.
    pack<K, M, AK, AM, whole_vectors<T, M>()>(a, room);
    tiled<N, M, K, BN, BK, whole_vectors<T, M>(), 1, N>(b, room, c);
  } else if constexpr (M >= W && K > PANEL<T, 4> && K * N * sizeof(T) > 32768) {
    by_panels<M, N, K, AM, AK, BK, BN>(a, b, c, room);
  } else if constexpr (BN == 1) {
    tiled<M, N, K, AM, AK, BK, N, 1>(a, b, c);
  } else {
    pack<K, N, BK, BN, whole_vectors<T, N>()>(b, room);
    tiled<M, N, K, AM, AK, whole_vectors<T, N>(), N, 1>(a, room, c);
  }
}
