// What the tensor-core kernels are made of. A block is four warps and works on tiles of 64 rows by 64 columns; a warp has
// 16 of the rows, and a lane of it, of every eight columns, two in row lane / 4 and two in row lane / 4 + 8.
//
// Everything is the step of flash attention: log weights, their running maximum `ref` for each row, weights, and weights
// times values. Logarithms are of base 2, and -inf where there is nothing.
namespace favorsharp {

constexpr int TILE = 64, THREADS = 128, LANE_COLUMNS = TILE / 8;
constexpr float LN_2 = 0.6931471805599453f;

// Planes of bfloat16 for weights, sums and values: their high part, and what that leaves.
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

// A side's constants, float32: scalars, then center, linear and near_center (D each), column (m_pad).
struct SideView {
  const float *start;
  const u16 *planes;  // float16, two planes of plane_rows rows: rows (m_pad), then those of the quadratic form
  int D;
  DEVICE float root() const { return start[0]; }
  DEVICE float offset() const { return start[1]; }
  DEVICE float beta() const { return start[2]; }
  DEVICE float unscale() const { return start[3]; }        // of the rows
  DEVICE float dense_unscale() const { return start[4]; }  // of the quadratic form's
  DEVICE float near_unscale() const { return start[5]; }   // of exact scores
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

// 64 points as rows of two planes of float16, root x - center, each scaled by a power of two to 2^12 .. 2^13 so that 22
// bits of its largest entries are kept. Zeros but in rows low .. high. Rows of a warp are written by it, and their squared
// norms too, where wanted.
template <class T>
DEVICE void load_points(const View<const T> &x, i64 first, int low, int high, int d, float root, const float *center,
                        u16 *planes, int D, float *unscale, float *squares = nullptr) {
  const int lane = lane_of(), pitch = D + 8;
#pragma unroll 1
  for (int r = warp_of() * 16; r < warp_of() * 16 + 16; r++) {
    float z[4], top = 0;
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int j = lane + 32 * i;
      z[i] = r >= low && r < high && j < d ? root * widened(x.at(first + r, j)) - center[j] : 0.0f;
      top = larger(top, fabsf(z[i]));
    }
    const int exponent = max((int)(__float_as_uint(warp_max(top)) >> 23), 13);
    const float scale = __uint_as_float((u32)(266 - exponent) << 23);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const int j = lane + 32 * i;
      if (j < D) {
        const half high = to_half(z[i] * scale);
        planes[r * pitch + j] = high.bits;
        planes[(TILE + r) * pitch + j] = to_half(z[i] * scale - to_float(high)).bits;
      }
    }
    if (lane == 0) unscale[r] = __uint_as_float((u32)(exponent - 12) << 23);
    if (squares) {
      const float sum = warp_sum(z[0] * z[0] + z[1] * z[1] + z[2] * z[2] + z[3] * z[3]);
      if (lane == 0) squares[r] = sum;
    }
  }
}

template <int P> DEVICE void put_planes(u16 *planes, int distance, float x) {
  const bfloat16 high = to_bfloat16(x);
  planes[0] = high.bits;
  if (P == 2) planes[distance] = to_bfloat16(x - to_float(high)).bits;
}

// Several threads may say the same of one key.
DEVICE void mark(float *x) { atomicAdd(x, 1.0f); }

// Columns e_first .. e of the values of 64 keys as planes of bfloat16, (64, E + 8); zeros but in rows low .. high, and for
// hidden keys, whose factor is -inf. Whether one of this thread's is not finite; with `odd_keys` (64), those have 0 in its
// place and their keys are marked.
template <class T, int E>
DEVICE bool load_values(const View<const T> &v, i64 first, int low, int high, i64 e_first, i64 e, const float *factors,
                        u16 *planes, float *odd_keys) {
  bool odd = false;
  if (odd_keys) {
    if (threadIdx.x < TILE) odd_keys[threadIdx.x] = 0;
    __syncthreads();
  }
#pragma unroll 1
  for (int t = threadIdx.x; t < TILE * E; t += THREADS) {
    const int r = t / E, j = t % E;
    float x = 0;
    if (r >= low && r < high && e_first + j < e && factors[first + r] != -INFINITY_F) x = widened(v.at(first + r, e_first + j));
    if (x - x != 0) {
      odd = true;
      if (odd_keys) mark(odd_keys + r), x = 0;
    }
    put_planes<PLANES<T>>(planes + r * (E + 8) + j, TILE * (E + 8), x);
  }
  return odd;
}

// 64 rows of a matrix of `width` halves, by asynchronous copies, to rows of width + 8
DEVICE void copy_rows(u16 *to, const u16 *from, int width) {
  const int pieces = width / 8;
#pragma unroll 1  // an address in flight, not four: nobody waits for a copy here, and registers are scarce
  for (int t = threadIdx.x; t < TILE * pieces; t += THREADS)
    copy_async(to + t / pieces * (width + 8) + t % pieces * 8, from + (i64)t * 8, true);
}
// 64 rows of both planes of a side
DEVICE void copy_side(u16 *to, const SideView &side, i64 first, i64 plane_rows) {
  copy_rows(to, side.planes + first * side.D, side.D);
  copy_rows(to + TILE * (side.D + 8), side.planes + (plane_rows + first) * side.D, side.D);
}

// ---- products -------------------------------------------------------------------------------------------------------

// Rows of this warp times columns, both given as rows of planes of float16: three products, 22 bits.
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

// Fragments of 16 columns of weights as a left factor, in planes.
template <int P> DEVICE void fragments(u32 (&a)[P][4], const float (&x)[4], const float (&y)[4]) {
  const float w[8] = {x[0], x[1], x[2], x[3], y[0], y[1], y[2], y[3]};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const bfloat16 low = to_bfloat16(w[2 * i]), high = to_bfloat16(w[2 * i + 1]);
    a[0][i] = pack(low.bits, high.bits);
    if (P == 2)
      a[P - 1][i] = pack(to_bfloat16(w[2 * i] - to_float(low)).bits, to_bfloat16(w[2 * i + 1] - to_float(high)).bits);
  }
}

// Weights as their planes have them: sums of weights made of these have no error that sums of weights times values lack.
template <int P> DEVICE void round_to_planes(float (&x)[LANE_COLUMNS][4]) {
#pragma unroll
  for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      const float high = to_float(to_bfloat16(x[n][i]));
      x[n][i] = P == 1 ? high : high + to_float(to_bfloat16(x[n][i] - high));
    }
}

// The weights of a tile as a left factor.
template <int P> struct LeftFactor {
  u32 a[TILE / 16][P][4];
  DEVICE explicit LeftFactor(const float (&weights)[LANE_COLUMNS][4]) {
#pragma unroll
    for (int k = 0; k < TILE / 16; k++) fragments<P>(a[k], weights[2 * k], weights[2 * k + 1]);
  }
};

// 16 columns, from 8 n, of weights (16, 64) times values (64, WIDTH), as planes of bfloat16 with rows of WIDTH + 8. The sums
// begin at zero: tensor cores cut what they add, and in longer sums these errors, all of one sign, would add up.
template <int P, int WIDTH>
DEVICE void multiply_values(float (&product)[2][4], const LeftFactor<P> &weights, const u16 *values, int n) {
  constexpr int pitch = WIDTH + 8, plane = TILE * pitch;
  const u16 *value = values + again(lane_of() % 16 * pitch + lane_of() / 16 * 8) + n * 8;  // not kept: registers are scarce
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

// sum (16, WIDTH) += weights (16, 64) values (64, WIDTH), by an ordinary addition
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

// The same within the tensor cores, for sums whose errors cancel: it takes fewer registers.
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
// The same of weights times a number of each column.
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

// ---- sums relative to a reference -------------------------------------------------------------------------------------

// What 16 rows have read: sum of weights times values, sum of weights (of this lane's columns), largest log weight.
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

// Log weights become weights under a reference that rises to the largest; `old` is what earlier sums are to be scaled by.
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

// Where sums lie in global memory, float32: S (m_pad, E), each two entries of a row before their low parts; z, c and the low
// parts of z (m_pad each).
struct Layout {
  static constexpr int LOW = 2;  // how far a low part lies behind its entry
  int m_pad, E;
  DEVICE int at(int row, int column) const { return row * 2 * E + column / 2 * 4 + column % 2; }
  DEVICE int z(int row) const { return m_pad * 2 * E + row; }
  DEVICE int c(int row) const { return m_pad * (2 * E + 1) + row; }
  DEVICE int z_low(int row) const { return m_pad * (2 * E + 2) + row; }
  DEVICE int size() const { return m_pad * (2 * E + 3); }
};
// Add to an entry of S and the next; `place` has them and their low parts.
DEVICE void add_to(float4 &place, float old, float x, float y) {
  place.x *= old, place.y *= old, place.z *= old, place.w *= old;
  add_to(place.x, place.z, x);
  add_to(place.y, place.w, y);
}
DEVICE Layout layout_of(const Problem &p) { return {(int)p.m_pad, (int)p.padded_e}; }
// Those of a segment.
DEVICE float *sums_of(const Problem &p, i64 number) { return (float *)p.sums + number * layout_of(p).size(); }
// All sums of a head as `read` takes them: c and z, float32 (m_pad each), then S as two planes of bfloat16 (m_pad, E).
DEVICE float *totals_of(const Problem &p, i64 key_head) {
  return (float *)p.totals + key_head * p.m_pad * (2 + p.padded_e);
}

}  // namespace favorsharp
