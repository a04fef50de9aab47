// Products of tiles by tensor cores: scores of points, and weights times values.
namespace favorsharp {

// Products of this warp's rows with all columns. Both are given as rows of one or two planes of 16 bits; only the
// product of the second planes is left out.
template <class T, int ROW_PLANES, int COLUMN_PLANES>
DEVICE void multiply_planes(float (&sum)[LANE_COLUMNS][4], const u16 *rows, const u16 *columns, int D) {
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
    if (ROW_PLANES == 2) load_matrices(low, row + plane + k);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n += 2) {
      u32 b[4], c[4];
      load_matrices(b, column + n * 8 * pitch + k);
      if (COLUMN_PLANES == 2) load_matrices(c, column + plane + n * 8 * pitch + k);
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const u32 b_high[2] = {b[2 * i], b[2 * i + 1]}, b_low[2] = {c[2 * i], c[2 * i + 1]};
        if (ROW_PLANES == 2) mma(sum[n + i], low, b_high, T());
        if (COLUMN_PLANES == 2) mma(sum[n + i], high, b_low, T());
        mma(sum[n + i], high, b_high, T());
      }
    }
  }
}
// Products of centred points with each other, or with rows of a map; 22 bits are kept.
DEVICE void multiply_points(float (&sum)[LANE_COLUMNS][4], const u16 *rows, const u16 *columns, int D) {
  multiply_planes<half, 2, 2>(sum, rows, columns, D);
}
// Products of points with rows of a map, which are the columns,
template <class T> DEVICE void multiply_queries(float (&sum)[LANE_COLUMNS][4], const u16 *points, const u16 *map, int D) {
  if constexpr (AS_THEY_ARE<T>) multiply_planes<T, 1, 2>(sum, points, map, D);
  else multiply_points(sum, points, map, D);
}
// and of rows of a map with points, which are the columns.
template <class T> DEVICE void multiply_keys(float (&sum)[LANE_COLUMNS][4], const u16 *map, const u16 *points, int D) {
  if constexpr (AS_THEY_ARE<T>) multiply_planes<T, 2, 1>(sum, map, points, D);
  else multiply_points(sum, map, points, D);
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

// The sums of weights (16, 64) times the two columns behind the values: of weights, where these are (1, 0) as behind
// values; of weights times z, where they hold z. The weights are those of the products, with the same rounding errors,
// which so cancel in the quotient. Lanes of the first two columns hold the sums, others 0.
template <int P, int WIDTH>
DEVICE void multiply_last(float (&sum)[2], const LeftFactor<P> &weights, const u16 *values) {
  constexpr int pitch = WIDTH + 8, plane = TILE * pitch;
  const u16 *value = values + again(lane_of() * pitch + WIDTH);
  float product[4] = {0, 0, 0, 0};
#pragma unroll
  for (int k = 0; k < TILE / 16; k += 2) {
    u32 b[4], c[4];
    load_transposed(b, value + k * 16 * pitch);
    if (P == 2) load_transposed(c, value + plane + k * 16 * pitch);
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const u32(&a)[P][4] = weights.a[k + i];
      const u32 b_high[2] = {b[2 * i], b[2 * i + 1]};
      if (P == 2) {
        const u32 b_low[2] = {c[2 * i], c[2 * i + 1]};
        mma(product, a[P - 1], b_low, bfloat16());
        mma(product, a[P - 1], b_high, bfloat16());
        mma(product, a[0], b_low, bfloat16());
      }
      mma(product, a[0], b_high, bfloat16());
    }
  }
  sum[0] = product[0] + product[1], sum[1] = product[2] + product[3];
}

// Add weights (16, 64) times values (64, WIDTH), and the sums of weights, by ordinary additions.
template <int P, int WIDTH>
DEVICE void add_values(Reading<WIDTH> &to, const float (&weights)[LANE_COLUMNS][4], const u16 *values) {
  const LeftFactor<P> factor(weights);
  float sum[2];
  multiply_last<P, WIDTH>(sum, factor, values);
  to.den[0] += sum[0], to.den[1] += sum[1];
#pragma unroll
  for (int n = 0; n < WIDTH / 8; n += 2) {
    float product[2][4];
    multiply_values<P, WIDTH>(product, factor, values, n);
#pragma unroll
    for (int i = 0; i < 4; i++) to.num[n][i] += product[0][i], to.num[n + 1][i] += product[1][i];
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

}  // namespace favorsharp
