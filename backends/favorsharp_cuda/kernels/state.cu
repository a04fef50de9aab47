// From keys to sums. `factors` computes the part of log features that depends only on the point, `absorb` the sums of
// each segment of the keys, and `scan` combines the sums of segments.
namespace favorsharp {

// The part of a point's factor that is a sum over its entries, of centred points: as `load_points` wants it,
struct Factor {
  const float *linear, beta;
  int D;
  DEVICE explicit Factor(const SideView &side) : linear(global(side.linear())), beta(side.beta()), D(side.D) {}
  DEVICE float operator()(int j, float z) const { return j < D ? (linear[j] - beta * z) * z : 0.0f; }
};
// and as `for_pieces` wants it, from points as they are. The sum of row r is written to sums[r].
template <class T> struct FactorOfRow {
  Columns<T> linear, middle;
  float root, beta, *sums;
  DEVICE FactorOfRow(const SideView &side, float *sums)
      : linear(global(side.linear()), side.D), middle(global(side.center()), side.D), root(side.root()), beta(side.beta()),
        sums(sums) {}
  DEVICE void operator()(int r, int j, int lanes, bool there, const u32 (&piece)[4]) const {
    float sum = 0;
#pragma unroll
    for (int i = 0; i < ITEMS<T>; i++) {
      const float z = root * item(piece, i, T()) - middle.at[i];
      sum += (linear.at[i] - beta * z) * z;
    }
    sum = sum_of_row(sum, lanes);
    if (j == 0) sums[r] = there ? sum : 0.0f;
  }
};

// Write the part of log features that depends only on the point to `out` (*b, n, 1), for each point of q. It is -inf
// for points that the mask hides.
template <class T> KERNEL(THREADS) factors(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d;
  u16 *points = (u16 *)raw, *rows = points + 2 * TILE * (D + 8);
  float *unscale = (float *)(rows + 2 * TILE * (D + 8)), *sums = unscale + TILE;
  const int head = blockIdx.x / (u32)p.segments;
  const i64 first = blockIdx.x % (u32)p.segments * TILE;
  int index[AXES];
  split_head(p, head, index);
  const SideView side = side_of<half>(p, p.query, index);
  const int count = (int)min(p.num_queries - first, (i64)TILE);
  float squares[2] = {0, 0};
  const View<const T> q = view<const T>(p.q, index);
  const bool whole = in_pieces<T>(p.q, p.d);
  if (p.has_dense) {
    load_points(q, whole, first, 0, count, (int)p.d, side.root(), side.center(), points, D, unscale, sums, Factor(side));
    const u16 *const dense = dense_of(p, p.query, index);
    for (int tile = 0; tile < (int)(p.plane_rows - p.m_pad) / TILE; tile++) {
      copy_tile(rows, dense, tile, D);
      commit_copies();
      wait_copies<0>();
      __syncthreads();
      float u[LANE_COLUMNS][4];
      multiply_points(u, points, rows, D);
      for (int h = 0; h < 2; h++) {
        const float back = unscale[row_of(h)] * side.dense_unscale();
        for (int n = 0; n < LANE_COLUMNS; n++)
          for (int i = 2 * h; i < 2 * h + 2; i++) squares[h] += (u[n][i] * back) * (u[n][i] * back);
      }
      __syncthreads();
    }
  } else {
    for_pieces(q, whole, first, 0, count, (int)p.d, D, FactorOfRow<T>(side, sums));
    __syncwarp();
  }
  split_head(p, again(head), index);  // computed again, because registers are scarce in the loop
  const View<const bool> mask = view<const bool>(p.mask, index);
  const View<float> out = view<float>(p.out, index);
  for (int h = 0; h < 2; h++) {
    const int r = row_of(h);
    const float sum = sums[r] - quad_sum(squares[h]) + side.offset();
    if (r < count && lane_of() % 4 == 0)
      out.at(first + r, 0) = mask.start && !mask.at(first + r, 0) ? -INFINITY_F : number_or_nan(sum);
  }
}

// Add the sums of a part of the keys to those in global memory, which are relative to `ref`. With `begins`, there are
// none yet.
template <int E> DEVICE void add_part(float *to, const Layout &at, int tile, const Reading<E> &part, float (&ref)[2], bool begins) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = tile * TILE + row_of(h);
    const float top = larger(ref[h], part.ref[h]), old = exp2_of(ref[h] - safe(top)), now = exp2_of(part.ref[h] - safe(top));
    ref[h] = top;
#pragma unroll
    for (int n = 0; n < E / 8; n++) {
      float4 *const place = (float4 *)(to + at.at(r, column_of(n, 0)));
      float4 sum = begins ? make_float4(0, 0, 0, 0) : *place;
      add_to(sum, old, part.num[n][2 * h] * now, part.num[n][2 * h + 1] * now);
      *place = sum;
    }
    const float den = quad_sum(part.den[h]) * now;
    if (lane_of() % 4 == 0) {
      float sum = begins ? 0.0f : to[at.z(r)] * old, low = begins ? 0.0f : to[at.z_low(r)] * old;
      add_to(sum, low, den);
      to[at.z(r)] = sum, to[at.z_low(r)] = low;
    }
  }
}

// The fewest blocks of a multiprocessor, where the compiler spills registers if it chooses their number; 0 lets it choose.
#define ABSORB_BOUNDS THREADS, E == 96 ? 2 : E == 32 || (E == 64 && PLANES<T> == 1) ? 3 : 0

// The sums of 64 features over the keys of a segment. Rows of tiles are features, columns are keys. If there are no
// factors of keys, the map has no quadratic form, and factors are computed here.
template <class T, int E> KERNEL(ABSORB_BOUNDS) absorb(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d;
  u16 *rows = (u16 *)raw, *points = rows + 2 * TILE * (D + 8), *values = points + PLANES<T> * TILE * (D + 8);
  float *unscale = (float *)(values + PLANES<T> * TILE * (E + 8)), *bias = unscale + TILE;
  const int tiles = (int)p.m_pad / TILE, tile = (int)blockIdx.x % tiles, number = (int)blockIdx.x / tiles;
  const int segment = number % (int)p.segments;
  int index[AXES];
  split_head(p, number / (int)p.segments, index);
  const SideView side = side_of<T>(p, p.key, index);
  // the keys of the segment, which are counted in 32 bits; tiles.py checks that this is enough
  const i64 low = max((i64)segment * p.span - p.shift, (i64)0);
  const int count = (int)max(min((segment + 1) * (i64)p.span - p.shift, p.limit) - low, (i64)0);
  View<const T> k = view<const T>(p.k, index), v = view<const T>(p.v, index);
  k.start += low * k.row, v.start += low * v.row;
  const float *const factors = p.key_factors.start ? view<const float>(p.key_factors, index).start + low : nullptr;
  View<const bool> mask = view<const bool>(p.mask, index);
  mask.start += p.mask.start ? low * mask.row : 0;
  const auto hidden = [&](int i) {
    return factors ? factors[i] == -INFINITY_F : p.mask.start && !mask.start[i * mask.row];
  };
  copy_tile(rows, side.planes, tile, D);
  commit_copies();
  const bool whole_k = in_pieces<T>(p.k, p.d), whole_v = in_pieces<T>(p.v, p.e);
  float ref[2] = {-INFINITY_F, -INFINITY_F};
  Reading<E> part;
  part.start();
  wait_copies<0>();
  bool begins = true;
  for (int first = 0; first < count; first += TILE) {
    const int here = min(count - first, TILE);
    __syncthreads();
    if constexpr (AS_THEY_ARE<T>) {
      if (factors) {
        copy_points(k, whole_k, first, 0, here, (int)p.d, points, D);
      } else {
        copy_points(k, whole_k, first, 0, here, (int)p.d, points, D, FactorOfRow<T>(side, bias));
      }
    } else {
      load_points(k, whole_k, first, 0, here, (int)p.d, side.root(), side.center(), points, D, unscale, bias, Factor(side));
    }
    load_values<T, E>(v, whole_v, first, 0, here, 0, p.e, hidden, values, nullptr);
    __syncwarp();  // a warp finishes the factors of its own rows
    if (lane_of() < 16) {
      const int r = warp_of() * 16 + lane_of();
      if (r >= here) bias[r] = -INFINITY_F;
      else if (factors) bias[r] = factors[first + r];
      else bias[r] = hidden(first + r) ? -INFINITY_F : number_or_nan(bias[r] + side.offset());
    }
    __syncthreads();
    float log[LANE_COLUMNS][4], old[2];
    multiply_keys<T>(log, rows, points, D);
    const float back = side.unscale();
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = column_of(n, i % 2);
        if (!AS_THEY_ARE<T>) log[n][i] *= back * unscale[c];
        log[n][i] = bias[c] == -INFINITY_F ? bias[c] : log[n][i] + bias[c];
      }
    weigh(log, part.ref, old);
    part.scale(old);
    add_values<PLANES<T>, E>(part, log, values);
    if ((first + TILE) % PART == 0 && first + TILE < count) {
      add_part<E>(sums_of(p, again(number)), layout_of(p), again(tile), part, ref, begins);  // computed again, as
      part.start();                                                                         // registers are scarce
      begins = false;
    }
  }
  float *const to = sums_of(p, again(number));
  add_part<E>(to, layout_of(p), tile, part, ref, begins);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = tile * TILE + row_of(h);
    if (lane_of() % 4 == 0) to[layout_of(p).c(r)] = ref[h] + side.column()[r];
  }
}

// Scale a sum and its low part by `mine`; add another sum and its low part, scaled by `theirs`.
DEVICE void join(float &sum, float &low, float mine, float other, float other_low, float theirs) {
  sum *= mine, low *= mine;
  add_to(sum, low, theirs * other);
  add_to(sum, low, theirs * other_low);
}

#define SCAN_BOUNDS THREADS, 8  // eight blocks a multiprocessor: 64 registers a thread

// Combine the sums of a head's segments, starting from a state if there is one. A warp processes one feature.
KERNEL(SCAN_BOUNDS) scan(ARGUMENT Problem p) {
  const i64 groups = p.m_pad / (THREADS / 32), head = blockIdx.x / groups;
  const int r = (int)(blockIdx.x % groups) * (THREADS / 32) + warp_of();
  const int E = (int)p.padded_e, lane = lane_of();
  int index[AXES];
  split_head(p, head, index);
  const Layout layout = layout_of(p);
  float sum[4] = {0, 0, 0, 0}, low[4] = {0, 0, 0, 0}, z = 0, z_low = 0, c = -INFINITY_F;
  if (p.kv_in.start && r < p.m) {
    const View<const float> kv = view<const float>(p.kv_in, index);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (lane + 32 * i < p.e) sum[i] = kv.at(r, lane + 32 * i);
    z = view<const float>(p.z_in, index).at(0, r);
    c = view<const float>(p.c_in, index).at(0, r) * 1.4426950408889634f;
    if (p.kv_low_in.start) {
      const View<const float> kv_low = view<const float>(p.kv_low_in, index);
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (lane + 32 * i < p.e) low[i] = kv_low.at(r, lane + 32 * i);
      z_low = view<const float>(p.z_low_in, index).at(0, r);
    }
  }
  for (i64 s = 0; s < p.segments; s++) {
    float *at = sums_of(p, head * p.segments + (p.reverse ? p.segments - 1 - s : s));
    float *z_at = at + layout.z(r), *z_low_at = at + layout.z_low(r), *c_at = at + layout.c(r);
    const bool empty = p.flags & EMPTY;  // the segment contains no sums yet
    const float other_c = empty ? -INFINITY_F : *c_at, top = larger(c, other_c);
    const float mine = exp2_of(c - safe(top)), theirs = exp2_of(other_c - safe(top));
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (lane + 32 * i < E) {
        float *const place = at + layout.at(r, lane + 32 * i);
        const float other = empty ? 0.0f : place[0], other_low = empty ? 0.0f : place[Layout::LOW];
        if (p.flags & BEFORE) place[0] = sum[i], place[Layout::LOW] = low[i];
        join(sum[i], low[i], mine, other, other_low, theirs);
      }
    const float other_z = empty ? 0.0f : *z_at, other_z_low = empty ? 0.0f : *z_low_at;
    __syncwarp();
    if (p.flags & BEFORE && lane == 0) *z_at = z, *z_low_at = z_low, *c_at = c;
    join(z, z_low, mine, other_z, other_z_low, theirs);
    c = top;
  }
  if (p.flags & TOTALS) {
    float *to = totals_of(p, head);
    const int distance = (int)p.m_pad * (E + 8);
    u16 *planes = (u16 *)(to + p.m_pad) + r * (E + 8);
    if (lane == 0) to[r] = c, put_z<2>(planes + E, distance, z);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (lane + 32 * i < E) put_planes<2>(planes + lane + 32 * i, distance, sum[i]);
  }
  if (p.flags & STATE && r < p.m) {
    const View<float> kv = view<float>(p.kv_out, index), kv_low = view<float>(p.kv_low_out, index);
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (lane + 32 * i < p.e) kv.at(r, lane + 32 * i) = sum[i], kv_low.at(r, lane + 32 * i) = low[i];
    if (lane == 0) {
      view<float>(p.z_low_out, index).at(0, r) = z_low;
      view<float>(p.z_out, index).at(0, r) = z;
      view<float>(p.c_out, index).at(0, r) = c * LN_2;
    }
  }
}

}  // namespace favorsharp
