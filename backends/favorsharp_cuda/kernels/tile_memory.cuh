// Loads tiles of points, values and constants of maps into shared memory, and stores results.
namespace favorsharp {

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

// Convert each of the two bfloat16 numbers in a word.
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

}  // namespace favorsharp
