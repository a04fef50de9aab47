// What the backward kernels are made of: products of tiles in shared memory, and the problem they work on.
//
// A block has four warps. Tiles lie in shared memory in the type that is computed in, rows a pitch apart; a product of
// two of them, either transposed at will, is held by the warps in the fragments of mma.m16n8k16. A product of floats is
// made of products of bfloat16: each factor is cut into PLANES parts of eight bits, and the products of parts that
// matter are summed in float. Two planes leave errors of 2^-17, three those of float itself. Doubles are multiplied one
// by one, in the same fragments.
namespace favorsharp {

constexpr int GRADIENT_THREADS = 128;
#define GRADIENT_BOUNDS GRADIENT_THREADS, 2  // two blocks a processor: all 255 registers of a thread may be used
constexpr int GRADIENT_ROWS = 32;  // points worked on at once
constexpr i64 PIECE = 2048;        // points at most whose sums are added up without low parts (gradients.py)

// Planes of the products in exponents, of those whose differences are small (sums, and what is read of them), and of
// others.
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

// R x N numbers, spread over the fragments of a block's warps.
template <class A, int R, int N> struct Tile {
  static constexpr int DOWN = R >= 32 ? 2 : 1, ACROSS = 4 / DOWN;  // warps
  static constexpr int ROWS = R / 16 / DOWN, COLUMNS = N / 8 / ACROSS;
  static_assert(ROWS * 16 * DOWN == R && COLUMNS * 8 * ACROSS == N, "a tile is made of whole fragments");
  A x[ROWS][COLUMNS][4];

  DEVICE static int lane() { return threadIdx.x & 31; }
  DEVICE static int first_row() { return (int)(threadIdx.x >> 5) / ACROSS * ROWS * 16 + (lane() >> 2); }
  DEVICE static int first_column() { return (int)(threadIdx.x >> 5) % ACROSS * COLUMNS * 8; }

  // visit(row, column, number) of all that this thread holds
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

  // Add a (R x inner) times b (inner x N), whose items are steps apart along their rows and along their columns. For sums
  // over many points the additions are ROUNDED: tensor cores cut what they add, and these errors, all of one sign, add up.
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

// What the backward kernels take, built by gradients.py: the same fields in the same order, all of eight bytes. Arrays
// made on the way are of the type computed in, and whole; they have an entry for each head of the batch.
struct Gradients {
  Array q, k, v, mask, out, stats, gradient;  // stats: 1 / total and the reference of every query
  Array target;                               // the result of gradient_points and sum_members
  Array given_kv, given_z, given_c;           // sums that readers find before any point of the other side has come
  i64 shape[AXES];                            // of the batch
  i64 map_axis[AXES];                         // the number of a head's map is the sum of index * map_axis
  i64 member[AXES];                           // how many heads along each axis are summed for one of target's
  i64 query, key, constants;                  // a map's two sides (PlainSide), and their items
  i64 m, d, e, slices, slice;                 // features in slices of so many
  i64 width, value_width;                     // what a sweep pads points and values to
  i64 gaussian, has_dense;
  i64 num_queries, num_keys, window, causal;
  i64 of_factors;                             // whether queries' factors have gradients: those of weights alone add up to 0
  i64 segments, span;                         // of readers: how many, and the points of one
  i64 state_segments, state_span;             // of what is taken; as the readers' where these have an order
  i64 keys_read, backwards, added;            // which side reads, from which end, and whether to what is there already
  i64 only_states;                            // whether a sweep leaves what segments hold, for the scan, and nobody reads
  i64 measuring;                              // whether queries read for dout.out and the sums of weights alone
  i64 heads, targets;                         // of the batch, of target
  i64 query_factor, query_near, query_last;   // (heads, n): the query's part of log features and near scores, -dout.out
  i64 query_weights;                          // (heads, n): where queries measure, the sums of their weights
  i64 key_factor, key_near;                   // (heads, s): the key's part, -inf where it is hidden
  i64 dq, dk, dv, query_slopes, key_slopes;   // (heads, n, d), (heads, s, d), (heads, s, e), (heads, n), (heads, s)
  i64 states, map_sums, factor_sums;
  i64 total_kv, total_z, total_c;             // (heads, m, e), (heads, m): the sums after all points, where wanted
  i64 largest, largest_at;                    // of features: the largest weights of segments, and which keys have them
  i64 of_largest, before;                     // (heads, m): see gradient_largest
  i64 from, to, outer, inner;                 // of sum_segments
  i64 num_rows, num_columns;                  // of sum_members: what it takes of each head, and in which steps
  i64 row_step, column_step, head_step;
};

DEVICE void split_head(const Gradients &g, i64 head, i64 (&index)[AXES]) {
#pragma unroll
  for (int a = AXES - 1; a >= 0; a--) {
    index[a] = head % g.shape[a];
    head /= g.shape[a];
  }
}

template <class A> DEVICE A quarter_sum(A x) {  // over four neighbouring threads
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

template <class A> DEVICE A limited(A x) { return x == -infinity<A>() ? A(0) : x; }

// Rows alpha x - center of points start .. start + count; zeros for other rows, hidden points and further columns.
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
// Rows of values.
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
