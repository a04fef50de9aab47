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

// Load pieces that lie `step` items apart, the first one at `from`, if `there(n)`. A piece has `items` entries, the rest
// is 0, as are pieces that are not there. `whole` says whether pieces may be read at once; else `column` is the distance
// of their entries.
template <class T, int COUNT, class There>
DEVICE void load_pieces(u32 (&pieces)[COUNT][4], const T *from, i64 step, i64 column, bool whole, int items, There there) {
#pragma unroll
  for (int n = 0; n < COUNT; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) pieces[n][i] = 0;
  if (whole) {
#pragma unroll
    for (int n = 0; n < COUNT; n++, from += step) {
      if (!there(n) || items <= 0) continue;
      const uint4 piece = load_16(from);
      pieces[n][0] = piece.x, pieces[n][1] = piece.y, pieces[n][2] = piece.z, pieces[n][3] = piece.w;
    }
  } else {
#pragma unroll 1
    for (int i = 0; i < ITEMS<T>; i++) {
      u32 next[COUNT];
#pragma unroll
      for (int n = 0; n < COUNT; n++) next[n] = there(n) && i < items ? bits_of(from[n * step + i * column]) : 0;
#pragma unroll
      for (int n = 0; n < COUNT; n++) append(pieces[n], next[n], T());
    }
  }
}

// Store 2, 4 or 8 neighbouring halves in shared memory at once.
DEVICE void put_words(u16 *to, const u32 (&words)[1]) { *(u32 *)to = words[0]; }
DEVICE void put_words(u16 *to, const u32 (&words)[2]) { *(uint2 *)to = make_uint2(words[0], words[1]); }
DEVICE void put_words(u16 *to, const u32 (&words)[4]) { store_16(to, make_uint4(words[0], words[1], words[2], words[3])); }

// Go through the pieces of this warp's 16 rows of a tile, use(row, column, lanes, there, piece). Lanes of one row are
// neighbours, and their number is a power of two, so that no thread divides. Rows outside low .. high are not there, and
// zero, as are entries from column d on. D is the size of a row in shared memory; lanes may lie behind it.
template <class T, class Use>
DEVICE void for_pieces(const View<const T> &x, bool whole, i64 first, int low, int high, int d, int D, Use use) {
  constexpr int N = ITEMS<T>;
  int shift = 1;
  while (N << shift < D) shift++;
  const int lanes = 1 << shift, rows = 32 >> shift;
  const int own = warp_of() * 16 + (lane_of() >> shift), j = (lane_of() & lanes - 1) * N;
  const i64 step = rows * x.row;
  const T *from = x.start + ((first + own) * x.row + j * x.column);
#pragma unroll 1
  for (int begin = 0; begin < 16; begin += IN_FLIGHT * rows, from += IN_FLIGHT * step) {
    u32 pieces[IN_FLIGHT][4];
    load_pieces(pieces, from, step, x.column, whole, d - j, [&](int n) {
      const int at = begin + n * rows, r = own + at;
      return at < 16 && r >= low && r < high;
    });
#pragma unroll
    for (int n = 0; n < IN_FLIGHT; n++) {
      const int r = own + begin + n * rows;
      if (begin + n * rows < 16) use(r, j, lanes, r >= low && r < high, pieces[n]);  // all lanes alike
    }
  }
}

// The largest number, and the sum, over the lanes of a row.
DEVICE float largest_of_row(float x, int lanes) {
#pragma unroll
  for (int bit = 16; bit; bit >>= 1)
    if (bit < lanes) x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, bit));
  return x;
}
DEVICE float sum_of_row(float x, int lanes) {
#pragma unroll
  for (int bit = 16; bit; bit >>= 1)
    if (bit < lanes) x += __shfl_xor_sync(WHOLE_WARP, x, bit);
  return x;
}

// What a lane holds of a vector with D entries, if it holds the entries at the same places of points: 0 behind it.
template <class T> struct Columns {
  float at[ITEMS<T>];
  DEVICE Columns(const float *vector, int D) {
    int lanes = 2;
    while (ITEMS<T> * lanes < D) lanes *= 2;
    const int j = (lane_of() & lanes - 1) * ITEMS<T>;
#pragma unroll
    for (int i = 0; i < ITEMS<T>; i++) at[i] = j < D ? vector[j + i] : 0.0f;
  }
};

// Load 64 points as they are, in one plane. `use` sees the pieces.
template <class T, class Use>
DEVICE void copy_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, u16 *points, int D,
                        Use use) {
  for_pieces(x, whole, first, low, high, d, D, [&](int r, int j, int lanes, bool there, const u32(&piece)[4]) {
    if (j < D) put_words(points + r * (D + 8) + j, piece);
    use(r, j, lanes, there, piece);
  });
}
template <class T>
DEVICE void copy_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, u16 *points, int D) {
  copy_points(x, whole, first, low, high, d, points, D, [](int, int, int, bool, const u32(&)[4]) {});
}

// Load 64 points as rows of two planes of float16, root x - center. Each row is scaled by a power of two, so that its
// largest entry is between 2^12 and 2^13 and 22 bits of it are kept. Rows outside low .. high are zero. Each warp
// writes its own rows and, if `sums` is given, the sum of term(column, entry) over each. `whole` says whether x may be
// read in pieces. The center has D entries, zeros from d on.
template <class T, class Term>
DEVICE void load_points(const View<const T> &x, bool whole, i64 first, int low, int high, int d, float root,
                        const float *center, u16 *planes, int D, float *unscale, float *sums, Term term) {
  constexpr int N = ITEMS<T>;
  const int pitch = D + 8;
  const Columns<T> middle(center, D);
  for_pieces(x, whole, first, low, high, d, D, [&](int r, int j, int lanes, bool there, const u32(&piece)[4]) {
    float z[N], top = 0;
#pragma unroll
    for (int i = 0; i < N; i++) {
      z[i] = root * item(piece, i, T()) - middle.at[i];
      top = larger(top, fabsf(z[i]));
    }
    top = largest_of_row(top, lanes);
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
    if (!sums) return;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < N; i++) sum += term(j + i, z[i]);
    sum = sum_of_row(sum, lanes);
    if (j == 0) sums[r] = there ? sum : 0.0f;
  });
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

// Write z behind a row of sums (64, E + 8), to the two columns that `multiply_last` reads: three parts of 8 bits, of which
// one plane holds two.
template <int P> DEVICE void put_z(u16 *behind, int distance, float z) {
  const u32 high = to_bfloat16(z).bits;
  const float rest = z - float_of_low(high);
  const u32 middle = to_bfloat16(rest).bits;
  store_16(behind, make_uint4(high | middle << 16, 0, 0, 0));
  if (P == 2) store_16(behind + distance, make_uint4(to_bfloat16(rest - float_of_low(middle)).bits, 0, 0, 0));
}

// A word with ones where one of two bfloat16 in a word is not finite: the exponent has only ones, so adding 1 to it
// carries into the sign.
DEVICE u32 not_finite(u32 word) { return ((word & 0x7f807f80u) + 0x00800080u) & 0x80008000u; }
DEVICE u32 whole_entries(u32 signs) { return (signs >> 15) * 0xffffu; }

// Mark a key. The addition is atomic, because several threads may mark the same key.
DEVICE void mark(float *x) { atomicAdd(x, 1.0f); }

// Load E columns, from column e_first on, of the values of 64 keys as planes of bfloat16, (64, E + 8). Rows outside
// low .. high are zero, as are columns from e on and hidden keys, as `hides` says. Returns whether this thread has
// loaded a value that is not finite. With `odd_keys` (64), such values are replaced by 0 and their keys are marked.
// `whole` says whether v may be read in pieces.
template <class T, int E, class Hidden>
DEVICE bool load_values(const View<const T> &v, bool whole, i64 first, int low, int high, int e_first, i64 e,
                        Hidden hides, u16 *planes, float *odd_keys) {
  constexpr int N = ITEMS<T>;
  const int own = warp_of() * 16 + lane_of() % 16;  // lanes of the second half do the same again
  const u32 hidden_rows = __ballot_sync(WHOLE_WARP, own < low || own >= high || hides((int)first + own));
  bool odd = false;
  u32 odd_bits = 0;
  if (threadIdx.x < TILE) {  // behind the values: 1 and 0, so that products with weights also give the sums of weights
    u16 *const behind = planes + threadIdx.x * (E + 8) + E;
    store_16(behind, make_uint4(to_bfloat16(1.0f).bits, 0, 0, 0));
    if (PLANES<T> == 2) store_16(behind + TILE * (E + 8), make_uint4(0, 0, 0, 0));
  }
  if (odd_keys) {
    if (threadIdx.x < TILE) odd_keys[threadIdx.x] = 0;
    __syncthreads();
  }
  const View<const T> columns = {v.start + e_first * v.column, v.row, v.column};
  const int count = min((int)e - e_first, E);
  for_pieces(columns, whole, first, low, high, count, E, [&](int r, int j, int, bool, const u32(&piece)[4]) {
    if (j >= E) return;
    const bool hidden = hidden_rows >> (r % 16) & 1;
    u16 *const to = planes + r * (E + 8) + j;
    if constexpr (PLANES<T> == 1) {  // the entries as they are
      u32 words[4];
#pragma unroll
      for (int i = 0; i < 4; i++) {
        words[i] = hidden ? 0 : piece[i];
        const u32 signs = not_finite(words[i]);
        odd_bits |= signs;
        if (odd_keys && signs) mark(odd_keys + r), words[i] &= ~whole_entries(signs);
      }
      put_words(to, words);
      return;
    }
    float x[N];
#pragma unroll
    for (int i = 0; i < N; i++) {
      x[i] = hidden ? 0.0f : item(piece, i, T());
      if (x[i] - x[i] == 0) continue;
      odd = true;
      if (odd_keys) mark(odd_keys + r), x[i] = 0;
    }
    put_pieces<PLANES<T>>(to, TILE * (E + 8), x);
  });
  return odd || odd_bits;
}

// Copy both planes of a tile of a map to shared memory, asynchronously. Each thread copies D / 8 + 1 pieces, and D / 8 is
// even.
DEVICE void copy_tile(u16 *to, const u16 *planes, int tile, int D) {
  const int own = threadIdx.x * 8;
  const u16 *from = planes + (tile * (int)halves_of(TILE, D) + own);
  to += own;
  copy_async(to, from, true);
#pragma unroll 1  // few addresses: no thread waits for a copy here, and registers are scarce
  for (int i = 0; i < D; i += 16) {
    to += 16 * THREADS, from += 16 * THREADS;
    copy_async(to - 8 * THREADS, from - 8 * THREADS, true);
    copy_async(to, from, true);
  }
}
// Copy a plane of sums (64, WIDTH).
template <int WIDTH> DEVICE void copy_plane(u16 *to, const u16 *from) {
  const int own = threadIdx.x * 8;
#pragma unroll
  for (int i = 0; i < TILE * WIDTH; i += 8 * THREADS)
    if (i + own < TILE * WIDTH) copy_async(to + own + i, from + own + i, true);
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
