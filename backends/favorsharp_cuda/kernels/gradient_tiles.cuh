// Building blocks of the backward kernels: products of tiles in shared memory.
//
// A block has four warps. Tiles are in shared memory, in the type that is computed in; the distance between their rows
// is the pitch. The warps hold the product of two tiles, each of which may be transposed, in the fragments of
// mma.m16n8k16. A product of floats is made of products of bfloat16: each factor is split into PLANES parts of eight
// bits, and those products of parts that matter are added in float. Two planes leave errors of 2^-17, three planes
// those of float itself. Doubles are multiplied one by one, in the same fragments.
namespace favorsharp {

#define GRADIENT_BOUNDS GRADIENT_THREADS, 2  // two blocks a multiprocessor: a thread may use all 255 registers

// The number of planes for products in exponents, for sums and what is read from them (these products nearly cancel),
// and for other products.
template <class T> struct Planes {
  static constexpr int EXPONENT = 2, SUM = 2, VALUE = 2;
};
template <> struct Planes<float> {
  static constexpr int EXPONENT = 3, SUM = 3, VALUE = 3;
};
template <> struct Planes<bfloat16> {
  static constexpr int EXPONENT = 2, SUM = 2, VALUE = 1;
};

template <int PLANES> DEVICE void split(float x, float y, u32 (&part)[PLANES]) {
#pragma unroll
  for (int p = 0; p < PLANES; p++) {
    part[p] = pack(to_bfloat16(x).bits, to_bfloat16(y).bits);
    x -= __uint_as_float(part[p] << 16);
    y -= __uint_as_float(part[p] & 0xFFFF0000u);
  }
}

// R x N numbers, distributed over the fragments of a block's warps.
template <class A, int R, int N> struct Tile {
  static constexpr int DOWN = R >= 32 ? 2 : 1, ACROSS = 4 / DOWN;  // number of warps
  static constexpr int ROWS = R / 16 / DOWN, COLUMNS = N / 8 / ACROSS;
  static_assert(ROWS * 16 * DOWN == R && COLUMNS * 8 * ACROSS == N, "a tile is made of whole fragments");
  A x[ROWS][COLUMNS][4];

  DEVICE static int lane() { return threadIdx.x & 31; }
  DEVICE static int first_row() { return (int)(threadIdx.x >> 5) / ACROSS * ROWS * 16 + (lane() >> 2); }
  DEVICE static int first_column() { return (int)(threadIdx.x >> 5) % ACROSS * COLUMNS * 8; }

  // Call visit(row, column, number) for each number that this thread holds.
  template <class Visit> DEVICE void each(Visit visit) {
    const int row = first_row(), column = first_column() + (lane() & 3) * 2;
#pragma unroll
    for (int r = 0; r < ROWS; r++)
#pragma unroll
      for (int c = 0; c < COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) visit(row + r * 16 + (i >> 1) * 8, column + c * 8 + (i & 1), x[r][c][i]);
  }
  DEVICE void clear() {
    each([](int, int, A &value) { value = 0; });
  }
  DEVICE void store(A *to, int pitch) {
    each([&](int r, int c, A &value) { to[r * pitch + c] = value; });
  }
  DEVICE void add(A *to, int pitch) {
    each([&](int r, int c, A &value) { to[r * pitch + c] += value; });
  }

  // Add a (R x inner) times b (inner x N), which have the given strides. For sums over many points, ROUNDED makes each
  // step start from zero and adds it by an ordinary addition: tensor cores truncate what they add to an accumulator,
  // and these errors, which all have the same sign, would add up.
  template <int PLANES, bool ROUNDED = false>
  DEVICE void add_product(const float *a, int a_row, int a_inner, const float *b, int b_inner, int b_column, int inner) {
    const int pair = (lane() & 3) * 2;
    a += first_row() * a_row + pair * a_inner;
    b += (first_column() + (lane() >> 2)) * b_column + pair * b_inner;
#pragma unroll 1
    for (int k = 0; k < inner; k += 16, a += 16 * a_inner, b += 16 * b_inner) {
      u32 left[ROWS][4][PLANES];
#pragma unroll
      for (int r = 0; r < ROWS; r++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const float *from = a + (r * 16 + (i & 1) * 8) * a_row + (i >> 1) * 8 * a_inner;
          split<PLANES>(from[0], from[a_inner], left[r][i]);
        }
#pragma unroll
      for (int c = 0; c < COLUMNS; c++) {
        u32 right[2][PLANES];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const float *from = b + c * 8 * b_column + i * 8 * b_inner;
          split<PLANES>(from[0], from[b_inner], right[i]);
        }
#pragma unroll
        for (int r = 0; r < ROWS; r++) {
          float own[4] = {0, 0, 0, 0}, (&sum)[4] = ROUNDED ? own : x[r][c];
#pragma unroll
          for (int order = PLANES - 1; order >= 0; order--)  // small terms first
#pragma unroll
            for (int p = 0; p <= order; p++) {
              const u32 first[4] = {left[r][0][p], left[r][1][p], left[r][2][p], left[r][3][p]};
              const u32 second[2] = {right[0][order - p], right[1][order - p]};
              mma(sum, first, second, bfloat16());
            }
          if (ROUNDED)
#pragma unroll
            for (int i = 0; i < 4; i++) x[r][c][i] += own[i];
        }
      }
    }
  }
  template <int PLANES, bool ROUNDED = false>
  DEVICE void add_product(const double *a, int a_row, int a_inner, const double *b, int b_inner, int b_column,
                          int inner) {
#pragma unroll 1
    for (int k = 0; k < inner; k++)
      each([&](int r, int c, A &value) { value += a[r * a_row + k * a_inner] * b[k * b_inner + c * b_column]; });
  }
};

DEVICE void split_head(const Gradients &g, i64 head, i64 (&index)[AXES]) {
#pragma unroll
  for (int a = AXES - 1; a >= 0; a--) {
    index[a] = head % g.shape[a];
    head /= g.shape[a];
  }
}

template <class A> DEVICE A quarter_sum(A x) {  // sum over four neighbouring threads
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

template <class A> DEVICE A limited(A x) { return x == -infinity<A>() ? A(0) : x; }

// Load points start .. start + count as rows alpha x - center. Other rows, hidden points and further columns are zero.
template <class T, int W>
DEVICE void load_points(typename Computing<T>::type *to, const View<const T> &x, i64 d, i64 start, int count,
                        typename Computing<T>::type alpha, const typename Computing<T>::type *center,
                        const View<const bool> &mask) {
  for (int i = threadIdx.x; i < GRADIENT_ROWS * W; i += GRADIENT_THREADS) {
    const int r = i / W, c = i % W;
    const bool there = r < count && c < d && (!mask.start || mask.at(start + r, 0));
    to[r * (W + 4) + c] = there ? alpha * widened(x.at(start + r, c)) - center[c] : 0;
  }
}
// Load the values of these points as rows, with zeros in the same places.
template <class T, int W>
DEVICE void load_values(typename Computing<T>::type *to, const View<const T> &x, i64 e, i64 start, int count,
                        const View<const bool> &mask) {
  for (int i = threadIdx.x; i < GRADIENT_ROWS * W; i += GRADIENT_THREADS) {
    const int r = i / W, c = i % W;
    const bool there = r < count && c < e && (!mask.start || mask.at(start + r, 0));
    to[r * (W + 4) + c] = there ? widened(x.at(start + r, c)) : 0;
  }
}

}  // namespace favorsharp
