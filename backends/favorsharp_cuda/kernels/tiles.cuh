// Building blocks of the tensor-core kernels. A block has four warps and works on tiles of 64 rows by 64 columns. A
// warp holds 16 rows. Of every eight columns, a lane holds two in row lane / 4 and two in row lane / 4 + 8.
//
// All kernels repeat the step of flash attention: compute log weights, a running maximum `ref` of each row, weights,
// and weights times values. Logarithms are to base 2, and -inf where there is nothing.
namespace favorsharp {

constexpr int LANE_COLUMNS = TILE / 8;
constexpr float LN_2 = 0.6931471805599453f;

// The number of planes of bfloat16 for weights, sums and values. The second plane holds what the first leaves.
template <class T> constexpr int PLANES = 2;
template <> constexpr int PLANES<bfloat16> = 1;

DEVICE int warp_of() { return threadIdx.x / 32; }
DEVICE int lane_of() { return threadIdx.x % 32; }
DEVICE int row_of(int half) { return warp_of() * 16 + lane_of() / 4 + 8 * half; }
DEVICE int column_of(int n, int i) { return n * 8 + lane_of() % 4 * 2 + i; }

DEVICE float safe(float ref) { return ref == -INFINITY_F ? 0.0f : ref; }
DEVICE float number_or_nan(float x) { return x - x == 0 ? x : x - x; }
DEVICE float quad_max(float x) {
  x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, 1));
  return larger(x, __shfl_xor_sync(WHOLE_WARP, x, 2));
}
DEVICE float quad_sum(float x) {
  x += __shfl_xor_sync(WHOLE_WARP, x, 1);
  return x + __shfl_xor_sync(WHOLE_WARP, x, 2);
}

// The constants of one side of a map, in float32: 8 scalars, center, linear and near_center (D each), column (m_pad).
struct SideView {
  const float *start;
  const u16 *planes;  // float16, two planes of plane_rows rows: of the map (m_pad), then of the quadratic form
  int D;
  DEVICE float root() const { return start[0]; }
  DEVICE float offset() const { return start[1]; }
  DEVICE float beta() const { return start[2]; }
  DEVICE float unscale() const { return start[3]; }        // undoes the scaling of the rows of the map
  DEVICE float dense_unscale() const { return start[4]; }  // undoes that of the rows of the quadratic form
  DEVICE float near_unscale() const { return start[5]; }   // converts exact scores to base 2
  DEVICE const float *center() const { return start + 8; }
  DEVICE const float *linear() const { return center() + D; }
  DEVICE const float *near_center() const { return linear() + D; }
  DEVICE const float *column() const { return near_center() + D; }
};
DEVICE SideView side_of(const Problem &p, const Side &side, const int (&index)[AXES]) {
  const i64 map = along(index, p.map_axis);
  return {(const float *)side.header + map * p.header_size,
          (const u16 *)side.planes + map * 2 * p.plane_rows * p.padded_d, (int)p.padded_d};
}

// ---- loading --------------------------------------------------------------------------------------------------------

// Rows are read in pieces of 16 bytes, several of which a thread has in flight before it waits for the first. Where the
// rows of an array do not allow loads of 16 bytes, a piece is read entry by entry.

constexpr int IN_FLIGHT = 4;
template <class T> constexpr int ITEMS = 16 / (int)sizeof(T);  // entries of a piece

// Whether all rows of an array with so many columns are whole pieces.
template <class T> DEVICE bool in_pieces(const Array &x, i64 columns) {
  i64 steps = x.row | columns;
#pragma unroll
  for (int a = 0; a < AXES; a++) steps |= x.axis[a];
  return x.column == 1 && (x.start | steps * (i64)sizeof(T)) % 16 == 0;
}

DEVICE u32 bits_of(float x) { return __float_as_uint(x); }
DEVICE u32 bits_of(half x) { return x.bits; }
DEVICE u32 bits_of(bfloat16 x) { return x.bits; }
DEVICE float item(const u32 (&piece)[4], int i, float) { return __uint_as_float(piece[i]); }
template <class T> DEVICE float item(const u32 (&piece)[4], int i, T) {
  return to_float(T{(u16)(piece[i / 2] >> 16 * (i % 2))});
}

// Shift the entries of a piece to the front by one, and put another one behind them.
DEVICE void append(u32 (&piece)[4], u32 bits, float) {
  piece[0] = piece[1], piece[1] = piece[2], piece[2] = piece[3], piece[3] = bits;
}
template <class T> DEVICE void append(u32 (&piece)[4], u32 bits, T) {
#pragma unroll
  for (int i = 0; i < 3; i++) piece[i] = piece[i] >> 16 | piece[i + 1] << 16;
  piece[3] = piece[3] >> 16 | bits << 16;
}

// A piece of an array, or none.
struct Place {
  bool there;
  i64 row;
  int column;
};

// Load one piece after the other from where `place` says. Entries from `end` on, and pieces that are not there, are 0.
template <class T, int COUNT, class Where>
DEVICE void load_pieces(u32 (&pieces)[COUNT][4], const View<const T> &x, bool whole, int end, Where place) {
#pragma unroll
  for (int n = 0; n < COUNT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) pieces[n][i] = 0;
  if (whole) {
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      const Place at = place(n);
      if (!at.there || at.column >= end) continue;
      const uint4 piece = load_16(x.start + at.row * x.row + at.column);  // columns are next to each other
      pieces[n][0] = piece.x, pieces[n][1] = piece.y, pieces[n][2] = piece.z, pieces[n][3] = piece.w;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < ITEMS<T>; i++) {
      u32 next[COUNT];
#pragma unroll
      for (int n = 0; n < COUNT; n++) {
        const Place at = place(n);
        next[n] = at.there && at.column + i < end ? bits_of(x.at(at.row, at.column + i)) : 0;
      }
#pragma unroll
      for (int n = 0; n < COUNT; n++) append(pieces[n], next[n], T());
    }
  }
}

// Store 2, 4 or 8 neighbouring halves in shared memory at once.
DEVICE void put_words(u16 *to, const u32 (&words)[1]) { *(u32 *)to = words[0]; }
DEVICE void put_words(u16 *to, const u32 (&words)[2]) { *(uint2 *)to = make_uint2(words[0], words[1]); }
DEVICE void put_words(u16 *to, const u32 (&words)[4]) { store_16(to, make_uint4(words[0], words[1], words[2], words[3])); }

// Load 64 points as rows of two planes of float16, root x - center. Each row is scaled by a power of two, so that its
// largest entry is between 2^12 and 2^13 and 22 bits of it are kept. Rows outside low .. high are zero. Each warp
// writes its own rows and, if `sums` is given, the sum of term(column, entry) over each. `whole` says whether x may be
// read in pieces. The center has D entries, zeros from d on.
template <class T, class Term>
DEVICE void load_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, float root,
                        const float *center, u16 *planes, int D, float *unscale, float *sums, Term term) {
  constexpr int N = ITEMS<T>;
  const int pitch = D + 8;
  int shift = 1;  // of the number of lanes that share a row, a power of two: no thread divides
  while (N << shift < D) shift++;
  const int lanes = 1 << shift, rows = 32 >> shift;
  const int own = warp_of() * 16 + (lane_of() >> shift), j = (lane_of() & lanes - 1) * N;
  float middle[N];
#pragma unroll
  for (int i = 0; i < N; i++) middle[i] = j < D ? center[j + i] : 0.0f;
#pragma unroll 1
  for (int begin = 0; begin < 16; begin += IN_FLIGHT * rows) {
    u32 pieces[IN_FLIGHT][4];
    load_pieces(pieces, x, whole, d, [&](int n) {
      const int at = begin + n * rows, r = own + at;
      return Place{at < 16 && r >= low && r < high, first + r, j};
    });
#pragma unroll
    for (int n = 0; n < IN_FLIGHT; n++) {
      const int r = own + begin + n * rows;
      if (begin + n * rows >= 16) continue;  // all lanes alike
      const bool there = r >= low && r < high;
      float z[N], top = 0;
#pragma unroll
      for (int i = 0; i < N; i++) {
        z[i] = root * item(pieces[n], i, T()) - middle[i];
        top = larger(top, fabsf(z[i]));
      }
      for (int bit = lanes / 2; bit; bit >>= 1) top = larger(top, __shfl_xor_sync(WHOLE_WARP, top, bit));
      const int exponent = max((int)(__float_as_uint(top) >> 23), 13);
      const float scale = there ? __uint_as_float((u32)(266 - exponent) << 23) : 0.0f;
      u32 high_part[N / 2], low_part[N / 2];
#pragma unroll
      for (int i = 0; i < N; i += 2) {
        const float a = z[i] * scale, b = z[i + 1] * scale;
        const u32 both = high_part[i / 2] = to_halves(a, b);
        low_part[i / 2] = to_halves(a - to_float(half{(u16)both}), b - to_float(half{(u16)(both >> 16)}));
      }
      if (j < D) {
        put_words(planes + r * pitch + j, high_part);
        put_words(planes + (TILE + r) * pitch + j, low_part);
      }
      if (j == 0) unscale[r] = __uint_as_float((u32)(exponent - 12) << 23);
      if (sums) {
        float sum = 0;
#pragma unroll
        for (int i = 0; i < N; i++) sum += term(j + i, z[i]);
        for (int bit = lanes / 2; bit; bit >>= 1) sum += __shfl_xor_sync(WHOLE_WARP, sum, bit);
        if (j == 0) sums[r] = there ? sum : 0.0f;
      }
    }
  }
}
// The same without sums,
template <class T>
DEVICE void load_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, float root,
                        const float *center, u16 *planes, int D, float *unscale) {
  load_points(x, whole, first, low, high, d, root, center, planes, D, unscale, nullptr, [](int, float) { return 0.0f; });
}
// and with the squared norms of the rows.
template <class T>
DEVICE void load_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, float root,
                        const float *center, u16 *planes, int D, float *unscale, float *squares) {
  load_points(x, whole, first, low, high, d, root, center, planes, D, unscale, squares,
              [](int, float z) { return z * z; });
}

template <int P> DEVICE void put_planes(u16 *planes, int distance, float x) {
  const bfloat16 high = to_bfloat16(x);
  planes[0] = high.bits;
  if (P == 2) planes[distance] = to_bfloat16(x - to_float(high)).bits;
}

// Each of two numbers of bfloat16 in a word.
DEVICE float float_of_low(u32 word) { return __uint_as_float(word << 16); }
DEVICE float float_of_high(u32 word) { return __uint_as_float(word & 0xffff0000u); }
// The same for neighbouring numbers, whose places begin at a multiple of their bytes.
template <int P, int N> DEVICE void put_pieces(u16 *planes, int distance, const float (&x)[N]) {
  u32 high[N / 2], low[N / 2];
#pragma unroll
  for (int i = 0; i < N; i += 2) {
    const u32 both = high[i / 2] = to_bfloat16s(x[i], x[i + 1]);
    low[i / 2] = to_bfloat16s(x[i] - float_of_low(both), x[i + 1] - float_of_high(both));
  }
  put_words(planes, high);
  if (P == 2) put_words(planes + distance, low);
}

// A word with ones where one of two bfloat16 in a word is not finite.
DEVICE u32 not_finite(u32 word) {
  return ((word & 0x7f80u) == 0x7f80u ? 0xffffu : 0) | ((word & 0x7f800000u) == 0x7f800000u ? 0xffff0000u : 0);
}

// Mark a key. The addition is atomic, because several threads may mark the same key.
DEVICE void mark(float *x) { atomicAdd(x, 1.0f); }

// Load E columns, from column e_first on, of the values of 64 keys as planes of bfloat16, (64, E + 8). Rows outside
// low .. high are zero, as are columns from e on and hidden keys, as `hides` says. Returns whether this thread has
// loaded a value that is not finite. With `odd_keys` (64), such values are replaced by 0 and their keys are marked.
// `whole` says whether v may be read in pieces.
template <class T, int E, class Hidden>
DEVICE bool load_values(const View<const T> &v, bool whole, i64 first, int low, int high, int e_first, i64 e,
                        Hidden hides, u16 *planes, float *odd_keys) {
  constexpr int N = ITEMS<T>, WIDTH = E / N, EACH = TILE * WIDTH / THREADS;
  constexpr int COUNT = EACH % IN_FLIGHT == 0 ? IN_FLIGHT : EACH % 3 == 0 ? 3 : EACH;
  bool odd = false;
  if (odd_keys) {
    if (threadIdx.x < TILE) odd_keys[threadIdx.x] = 0;
    __syncthreads();
  }
#pragma unroll 1
  for (int begin = threadIdx.x; begin < TILE * WIDTH; begin += COUNT * THREADS) {
    u32 pieces[COUNT][4];
    bool hidden[COUNT];
    load_pieces(pieces, v, whole, (int)e, [&](int n) {
      const int t = begin + n * THREADS, r = t / WIDTH;
      return Place{r >= low && r < high, first + r, e_first + t % WIDTH * N};
    });
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      const int r = (begin + n * THREADS) / WIDTH;
      hidden[n] = r < low || r >= high || hides((int)first + r);
    }
#pragma unroll
    for (int n = 0; n < COUNT; n++) {
      const int t = begin + n * THREADS, r = t / WIDTH;
      if constexpr (PLANES<T> == 1) {  // the entries as they are
#pragma unroll
        for (int i = 0; i < 4; i++) {
          u32 &word = pieces[n][i];
          if (hidden[n]) word = 0;
          const u32 odd_entries = not_finite(word);
          odd |= odd_entries != 0;
          if (odd_keys && odd_entries) mark(odd_keys + r), word &= ~odd_entries;
        }
        put_words(planes + r * (E + 8) + t % WIDTH * N, pieces[n]);
        continue;
      }
      float x[N];
#pragma unroll
      for (int i = 0; i < N; i++) {
        x[i] = hidden[n] ? 0.0f : item(pieces[n], i, T());
        if (x[i] - x[i] == 0) continue;
        odd = true;
        if (odd_keys) mark(odd_keys + r), x[i] = 0;
      }
      put_pieces<PLANES<T>>(planes + r * (E + 8) + t % WIDTH * N, TILE * (E + 8), x);
    }
  }
  return odd;
}

// Copy 64 rows of a matrix with `width` columns of halves to rows of width + 8, asynchronously.
DEVICE void copy_rows(u16 *to, const u16 *from, int width) {
  int shift = 1;  // of the number of threads that share a row, a power of two: no thread divides
  while (8 << shift < width) shift++;
  const int column = (threadIdx.x & (1 << shift) - 1) * 8, step = THREADS >> shift;
  int row = threadIdx.x >> shift;
  to += row * (width + 8) + column, from += row * width + column;
#pragma unroll 1  // one address at a time: no thread waits for a copy here, and registers are scarce
  for (; row < TILE && column < width; row += step, to += step * (width + 8), from += step * width)
    copy_async(to, from, true);
}
// Copy 64 rows of both planes of a side, asynchronously.
DEVICE void copy_side(u16 *to, const SideView &side, i64 first, i64 plane_rows) {
  copy_rows(to, side.planes + first * side.D, side.D);
  copy_rows(to + TILE * (side.D + 8), side.planes + (plane_rows + first) * side.D, side.D);
}

// ---- storing --------------------------------------------------------------------------------------------------------

DEVICE u32 word_of(float low, float high, half) { return to_halves(low, high); }
DEVICE u32 word_of(float low, float high, bfloat16) { return to_bfloat16s(low, high); }

// Write neighbouring entries of a row as one piece.
DEVICE void store_piece(float *to, const float (&x)[4]) {
  store_16(to, make_uint4(bits_of(x[0]), bits_of(x[1]), bits_of(x[2]), bits_of(x[3])));
}
template <class T> DEVICE void store_piece(T *to, const float (&x)[8]) {
  store_16(to, make_uint4(word_of(x[0], x[1], T()), word_of(x[2], x[3], T()), word_of(x[4], x[5], T()),
                          word_of(x[6], x[7], T())));
}

// Two lanes whose numbers differ in `bit` swap words: the lower one its second, the upper one its first.
DEVICE void swap_words(u32 &first, u32 &second, int bit) {
  const bool upper = lane_of() & bit;
  const u32 got = __shfl_xor_sync(WHOLE_WARP, upper ? first : second, bit);
  if (upper) first = got;
  else second = got;
}

// What the lanes of a quad hold of a row, as in `column_of`, becomes pieces: this lane's piece begins at the column that
// is returned. Four times eight columns of 16 bits,
template <class T> DEVICE int gather_piece(u32 (&piece)[4], const float (&x)[4][2], T) {
#pragma unroll
  for (int n = 0; n < 4; n++) piece[n] = word_of(x[n][0], x[n][1], T());
  swap_words(piece[0], piece[1], 1), swap_words(piece[2], piece[3], 1);
  swap_words(piece[0], piece[2], 2), swap_words(piece[1], piece[3], 2);
  return lane_of() % 4 * 8;
}
// or two times eight columns of floats.
DEVICE int gather_piece(u32 (&piece)[4], const float (&x)[2][2], float) {
#pragma unroll
  for (int n = 0; n < 4; n++) piece[n] = __float_as_uint(x[n / 2][n % 2]);
  swap_words(piece[0], piece[2], 1), swap_words(piece[1], piece[3], 1);
  return lane_of() % 2 * 8 + lane_of() % 4 / 2 * 4;
}

// Write COUNT times eight columns of this lane's row, from column `first` on and below `end`, unless the row is not
// there. `item(n, i)` is what the lane holds, as in `column_of`. `whole` says whether `out` may be written in pieces.
template <class T, int COUNT, class Item>
DEVICE void store_row(const View<T> &out, bool whole, bool there, i64 row, i64 first, i64 end, Item item) {
  constexpr int GROUP = ITEMS<T> / 2;
  if (whole) {
#pragma unroll
    for (int group = 0; group < COUNT; group += GROUP) {
      float x[GROUP][2];
#pragma unroll
      for (int n = 0; n < GROUP; n++) x[n][0] = item(group + n, 0), x[n][1] = item(group + n, 1);
      u32 piece[4];
      const i64 column = first + group * 8 + gather_piece(piece, x, T());
      if (there && column < end) store_16(&out.at(row, column), make_uint4(piece[0], piece[1], piece[2], piece[3]));
    }
  } else if (there) {
#pragma unroll
    for (int n = 0; n < COUNT; n++)
#pragma unroll
      for (int i = 0; i < 2; i++)
        if (first + column_of(n, i) < end) put(&out.at(row, first + column_of(n, i)), item(n, i));
  }
}

// ---- products -------------------------------------------------------------------------------------------------------

// Products of this warp's rows with all columns. Both are given as rows of two planes of float16; three products of
// planes keep 22 bits.
DEVICE void multiply_points(float (&sum)[LANE_COLUMNS][4], const u16 *rows, const u16 *columns, int D) {
  const int lane = lane_of(), pitch = D + 8, plane = TILE * pitch;
  const u16 *row = rows + (warp_of() * 16 + lane % 16) * pitch + lane / 16 * 8;
  const u16 *column = columns + (lane % 8 + lane / 16 * 8) * pitch + lane / 8 % 2 * 8;
#pragma unroll
  for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) sum[n][i] = 0;
#pragma unroll 1
  for (int k = 0; k < D; k += 16) {
    u32 high[4], low[4];
    load_matrices(high, row + k);
    load_matrices(low, row + plane + k);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n += 2) {
      u32 b[4], c[4];
      load_matrices(b, column + n * 8 * pitch + k);
      load_matrices(c, column + plane + n * 8 * pitch + k);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 b_high[2] = {b[2 * i], b[2 * i + 1]}, b_low[2] = {c[2 * i], c[2 * i + 1]};
        mma(sum[n + i], low, b_high, half());
        mma(sum[n + i], high, b_low, half());
        mma(sum[n + i], high, b_high, half());
      }
    }
  }
}

// 16 columns of weights as fragments of a left factor, for each plane.
template <int P> DEVICE void fragments(u32 (&a)[P][4], const float (&x)[4], const float (&y)[4]) {
  const float w[8] = {x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const u32 both = a[0][i] = to_bfloat16s(w[2 * i], w[2 * i + 1]);
    if (P == 2) a[P - 1][i] = to_bfloat16s(w[2 * i] - float_of_low(both), w[2 * i + 1] - float_of_high(both));
  }
}

// Round weights to what their planes can hold. Sums of weights then have the same rounding errors as sums of weights
// times values, and the errors cancel in the quotient.
template <int P> DEVICE void round_to_planes(float (&x)[LANE_COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float high = to_float(to_bfloat16(x[n][i]));
      x[n][i] = P == 1 ? high : high + to_float(to_bfloat16(x[n][i] - high));
    }
}

// The weights of a tile as the left factor of products.
template <int P> struct LeftFactor {
  u32 a[TILE / 16][P][4];
  DEVICE explicit LeftFactor(const float (&weights)[LANE_COLUMNS][4]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) fragments<P>(a[k], weights[2 * k], weights[2 * k + 1]);
  }
};

// 16 columns, from column 8 n on, of weights (16, 64) times values (64, WIDTH), which are planes of bfloat16 with rows
// of WIDTH + 8. The product starts from zero: tensor cores truncate what they add to an accumulator, and in longer sums
// these errors, which all have the same sign, would add up.
template <int P, int WIDTH>
DEVICE void multiply_values(float (&product)[2][4], const LeftFactor<P> &weights, const u16 *values, int n) {
  constexpr int pitch = WIDTH + 8, plane = TILE * pitch;
  // `again` lets the compiler compute this offset for each product, which saves registers
  const u16 *value = values + again(lane_of() % 16 * pitch + lane_of() / 16 * 8) + n * 8;
#pragma unroll
  for (int i = 0; i < 4; i++) product[0][i] = product[1][i] = 0;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    const u32(&a)[P][4] = weights.a[k];
    u32 b[4], c[4];
    load_transposed(b, value + k * 16 * pitch);
    if (P == 2) load_transposed(c, value + plane + k * 16 * pitch);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32 b_high[2] = {b[2 * i], b[2 * i + 1]};
      if (P == 2) {
        const u32 b_low[2] = {c[2 * i], c[2 * i + 1]};
        mma(product[i], a[P - 1], b_low, bfloat16());
        mma(product[i], a[P - 1], b_high, bfloat16());
        mma(product[i], a[0], b_low, bfloat16());
      }
      mma(product[i], a[0], b_high, bfloat16());
    }
  }
}

// sum (16, WIDTH) += weights (16, 64) values (64, WIDTH), where the product is added by an ordinary addition
template <int P, int WIDTH>
DEVICE void add_values(float (&sum)[WIDTH / 8][4], const float (&weights)[LANE_COLUMNS][4], const u16 *values) {
  const LeftFactor<P> factor(weights);
#pragma unroll
  for (int n = 0; n < WIDTH / 8; n += 2) {
    float product[2][4];
    multiply_values<P, WIDTH>(product, factor, values, n);
#pragma unroll
    for (int i = 0; i < 4; i++) sum[n][i] += product[0][i], sum[n + 1][i] += product[1][i];
  }
}

// The same, but the tensor cores add to the sum. This takes fewer registers; it is used for sums whose errors cancel.
template <int P, int WIDTH>
DEVICE void accumulate_values(float (&sum)[WIDTH / 8][4], const float (&weights)[LANE_COLUMNS][4], const u16 *values) {
  constexpr int pitch = WIDTH + 8, plane = TILE * pitch;
  const u16 *value = values + lane_of() % 16 * pitch + lane_of() / 16 * 8;
#pragma unroll
  for (int k = 0; k < TILE / 16; k++) {
    u32 a[P][4];
    fragments<P>(a, weights[2 * k], weights[2 * k + 1]);
#pragma unroll
    for (int n = 0; n < WIDTH / 8; n += 2) {
      u32 b[4], c[4];
      load_transposed(b, value + k * 16 * pitch + n * 8);
      if (P == 2) load_transposed(c, value + plane + k * 16 * pitch + n * 8);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 b_high[2] = {b[2 * i], b[2 * i + 1]};
        if (P == 2) {
          const u32 b_low[2] = {c[2 * i], c[2 * i + 1]};
          mma(sum[n + i], a[P - 1], b_low, bfloat16());
          mma(sum[n + i], a[P - 1], b_high, bfloat16());
          mma(sum[n + i], a[0], b_low, bfloat16());
        }
        mma(sum[n + i], a[0], b_high, bfloat16());
      }
    }
  }
}

// Add the weights of a tile to the sums of this lane's columns.
DEVICE void add_weights(float (&sum)[2], const float (&weights)[LANE_COLUMNS][4]) {
  float own[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) own[i / 2] += weights[n][i];
  sum[0] += own[0], sum[1] += own[1];
}
// The same for weights times a number for each column.
template <class Share> DEVICE void add_weights(float (&sum)[2], const float (&weights)[LANE_COLUMNS][4], Share share) {
  float own[2] = {0, 0};
#pragma unroll
  for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const float x = share(column_of(n, i));
      own[0] += weights[n][i] * x, own[1] += weights[n][i + 2] * x;
    }
  sum[0] += own[0], sum[1] += own[1];
}

// ---- sums relative to a reference -----------------------------------------------------------------------------------

// What 16 rows have read so far: the sum of weights times values, the sum of weights over this lane's columns, and the
// largest log weight, to which both are relative.
template <int E> struct Reading {
  float num[E / 8][4], den[2], ref[2];

  DEVICE void start() {
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) num[n][i] = 0;
    den[0] = den[1] = 0;
    ref[0] = ref[1] = -INFINITY_F;
  }
  DEVICE void scale(const float (&by)[2]) {
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) num[n][i] *= by[i / 2];
    den[0] *= by[0];
    den[1] *= by[1];
  }
};

// Turn log weights into weights relative to a reference, which rises to the largest log weight. `old` receives the
// factor by which earlier sums have to be scaled.
DEVICE void weigh(float (&log)[LANE_COLUMNS][4], float (&ref)[2], float (&old)[2]) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float top = ref[h];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++) top = larger(top, larger(log[n][2 * h], log[n][2 * h + 1]));
    top = quad_max(top);
    old[h] = exp2_of(ref[h] - safe(top));
    ref[h] = top;
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++) {
      log[n][2 * h] = exp2_of(log[n][2 * h] - safe(top));
      log[n][2 * h + 1] = exp2_of(log[n][2 * h + 1] - safe(top));
    }
  }
}

// The layout of sums in global memory, float32: S (m_pad, E), where every two entries of a row are followed by their
// low parts; then z, c and the low parts of z (m_pad each).
struct Layout {
  static constexpr int LOW = 2;  // how far a low part lies behind its entry
  int m_pad, E;
  DEVICE int at(int row, int column) const { return row * 2 * E + column / 2 * 4 + column % 2; }
  DEVICE int z(int row) const { return m_pad * 2 * E + row; }
  DEVICE int c(int row) const { return m_pad * (2 * E + 1) + row; }
  DEVICE int z_low(int row) const { return m_pad * (2 * E + 2) + row; }
  DEVICE int size() const { return m_pad * (2 * E + 3); }
};
// Scale an entry of S and the next one by `old`, and add x and y to them. `place` holds both and their low parts.
DEVICE void add_to(float4 &place, float old, float x, float y) {
  place.x *= old, place.y *= old, place.z *= old, place.w *= old;
  add_to(place.x, place.z, x);
  add_to(place.y, place.w, y);
}
DEVICE Layout layout_of(const Problem &p) { return {(int)p.m_pad, (int)p.padded_e}; }
// The sums of a segment. The segments of all heads are numbered one after the other.
DEVICE float *sums_of(const Problem &p, i64 number) { return (float *)p.sums + number * layout_of(p).size(); }
// The sums of all keys of a head, as `read` takes them: c and z in float32 (m_pad each), then S as two planes of
// bfloat16 (m_pad, E).
DEVICE float *totals_of(const Problem &p, i64 key_head) {
  return (float *)p.totals + key_head * p.m_pad * (2 + p.padded_e);
}

}  // namespace favorsharp
