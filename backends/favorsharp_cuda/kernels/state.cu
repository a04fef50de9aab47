// From keys to sums. `factors` computes the part of log features that depends only on the point, `absorb` the sums of
// each segment of the keys, and `scan` combines the sums of segments.
namespace favorsharp {

// Write the part of log features that depends only on the point to `out` (*b, n, 1), for each point of q. It is -inf
// for points that the mask hides.
template <class T> KERNEL(THREADS) factors(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d;
  u16 *points = (u16 *)raw, *rows = points + 2 * TILE * (D + 8);
  float *unscale = (float *)(rows + 2 * TILE * (D + 8));
  const int head = blockIdx.x / (u32)p.segments;
  const i64 first = blockIdx.x % (u32)p.segments * TILE;
  int index[AXES];
  split_head(p, head, index);
  const SideView side = side_of(p, p.query, index);
  const int count = (int)min(p.num_queries - first, (i64)TILE);
  float squares[2] = {0, 0};
  if (p.has_dense) {
    load_points(view<const T>(p.q, index), in_pieces<T>(p.q, p.d), first, 0, count, (int)p.d, side.root(), side.center(),
                points, D, unscale);
    for (i64 r = p.m_pad; r < p.plane_rows; r += TILE) {
      copy_side(rows, side, r, p.plane_rows);
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
  }
  split_head(p, again(head), index);  // computed again, as registers are scarce in the loop
  const View<const T> x = view<const T>(p.q, index);
  const View<const bool> mask = view<const bool>(p.mask, index);
  const View<float> out = view<float>(p.out, index);
  for (int h = 0; h < 2; h++) {
    const int r = row_of(h);
    float sum = -squares[h];
    if (r < count)
      for (int j = lane_of() % 4; j < p.d; j += 4) {
        const float z = side.root() * widened(x.at(first + r, j)) - side.center()[j];
        sum += side.linear()[j] * z - side.beta() * z * z;
      }
    sum = quad_sum(sum) + side.offset();
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

// The sums of 64 features over the keys of a segment. Rows of tiles are features, columns are keys.
template <class T, int E> KERNEL(THREADS) absorb(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d;
  u16 *rows = (u16 *)raw, *points = rows + 2 * TILE * (D + 8), *values = points + 2 * TILE * (D + 8);
  float *unscale = (float *)(values + PLANES<T> * TILE * (E + 8)), *bias = unscale + TILE;
  const i64 tiles = p.m_pad / TILE, tile = blockIdx.x % tiles, number = blockIdx.x / tiles;
  const i64 segment = number % p.segments;
  int index[AXES];
  split_head(p, number / p.segments, index);
  const View<const T> k = view<const T>(p.k, index), v = view<const T>(p.v, index);
  const float *factors = view<const float>(p.key_factors, index).start;
  const SideView side = side_of(p, p.key, index);
  copy_side(rows, side, tile * TILE, p.plane_rows);
  commit_copies();
  const i64 low = max(segment * p.span - p.shift, (i64)0), high = min((segment + 1) * p.span - p.shift, p.limit);
  float *const to = sums_of(p, number);
  float ref[2] = {-INFINITY_F, -INFINITY_F};
  Reading<E> part;
  part.start();
  wait_copies<0>();
  bool begins = true;
  for (i64 first = low; first < high; first += TILE) {
    const int count = (int)min(high - first, (i64)TILE);
    __syncthreads();
    load_points(k, in_pieces<T>(p.k, p.d), first, 0, count, (int)p.d, side.root(), side.center(), points, D, unscale);
    load_values<T, E>(v, in_pieces<T>(p.v, p.e), first, 0, count, 0, p.e, factors, values, nullptr);
    if (threadIdx.x < TILE) bias[threadIdx.x] = (int)threadIdx.x < count ? factors[first + threadIdx.x] : -INFINITY_F;
    __syncthreads();
    float log[LANE_COLUMNS][4], old[2];
    multiply_points(log, rows, points, D);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int c = column_of(n, i % 2);
        log[n][i] = bias[c] == -INFINITY_F ? bias[c] : log[n][i] * (side.unscale() * unscale[c]) + bias[c];
      }
    weigh(log, part.ref, old);
    round_to_planes<PLANES<T>>(log);
    part.scale(old);
    add_weights(part.den, log);
    add_values<PLANES<T>, E>(part.num, log, values);
    if (first + TILE - low == PART * ((first + TILE - low) / PART) && first + TILE < high) {
      add_part<E>(to, layout_of(p), (int)tile, part, ref, begins);
      part.start();
      begins = false;
    }
  }
  add_part<E>(to, layout_of(p), (int)tile, part, ref, begins);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = (int)tile * TILE + row_of(h);
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
    u16 *planes = (u16 *)(to + 2 * p.m_pad) + r * E;
    if (lane == 0) to[r] = c, to[p.m_pad + r] = z;
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (lane + 32 * i < E) put_planes<2>(planes + lane + 32 * i, (int)p.m_pad * E, sum[i]);
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
