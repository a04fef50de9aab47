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
// Whether points enter products as they are, next to planes of bfloat16 of the map. Other points are centred and split.
template <class T> constexpr bool AS_THEY_ARE = PLANES<T> == 1;

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

// The constants of one side of a map, in float32: 8 scalars, center, linear and near_center (D each); column (m_pad) for
// centred points, and for points as they are.
struct SideView {
  const float *start;
  const u16 *planes;  // tiles of 64 rows of the map, two planes of (64, D + 8) each, as they are in shared memory
  int D, columns;     // where the column of the map lies
  DEVICE float root() const { return start[0]; }
  DEVICE float offset() const { return start[1]; }
  DEVICE float beta() const { return start[2]; }
  DEVICE float unscale() const { return start[3]; }        // undoes the scaling of the rows of the map
  DEVICE float dense_unscale() const { return start[4]; }  // undoes that of the rows of the quadratic form
  DEVICE float near_unscale() const { return start[5]; }   // converts exact scores to base 2
  DEVICE const float *center() const { return start + 8; }
  DEVICE const float *linear() const { return center() + D; }
  DEVICE const float *near_center() const { return linear() + D; }
  DEVICE const float *column() const { return start + columns; }
};
// The number of halves in two planes of `rows` rows of points or of a map.
DEVICE i64 halves_of(i64 rows, int D) { return 2 * rows * (D + 8); }
template <class T> DEVICE int columns_of(const Problem &p) {
  return 8 + 3 * (int)p.padded_d + (AS_THEY_ARE<T> ? (int)p.m_pad : 0);
}
template <class T> DEVICE SideView side_of(const Problem &p, const Side &side, const int (&index)[AXES]) {
  const i64 map = along(index, p.map_axis);
  const int D = (int)p.padded_d;
  const u16 *planes = AS_THEY_ARE<T> ? (const u16 *)side.rows + map * halves_of(p.m_pad, D)
                                     : (const u16 *)side.planes + map * halves_of(p.plane_rows, D);
  return {(const float *)side.header + map * p.header_size, planes, D, columns_of<T>(p)};
}
// The tiles of the quadratic form, for centred points.
DEVICE const u16 *dense_of(const Problem &p, const Side &side, const int (&index)[AXES]) {
  const int D = (int)p.padded_d;
  return (const u16 *)side.planes + along(index, p.map_axis) * halves_of(p.plane_rows, D) + halves_of(p.m_pad, D);
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
// The sums of all keys of a head, as `read` takes them: c in float32 (m_pad), then S and z as two planes of bfloat16
// (m_pad, E + 8), as in shared memory (`put_total`).
DEVICE float *totals_of(const Problem &p, i64 key_head) {
  return (float *)p.totals + key_head * p.m_pad * (1 + p.padded_e + 8);
}

}  // namespace favorsharp
