// Queries read the sums of all keys. Rows of tiles are queries, columns are features.
namespace favorsharp {

// Copy the rows of the map and the sums of 64 features to a stage of shared memory, asynchronously.
template <int P, int E>
DEVICE void copy_stage(const Problem &p, u16 *stage, const SideView &side, const float *totals, int tile) {
  const int D = side.D;
  copy_tile(stage, side.planes, tile, D);
  u16 *sums = stage + 2 * TILE * (D + 8);
  const u16 *planes = (const u16 *)(totals + p.m_pad) + (i64)tile * TILE * (E + 8);
#pragma unroll
  for (int i = 0; i < P; i++) copy_plane<E + 8>(sums + i * TILE * (E + 8), planes + i * p.m_pad * (E + 8));
  commit_copies();
}

template <class T, int E> KERNEL(THREADS) read(ARGUMENT Problem p) {
  constexpr int P = PLANES<T>;
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d, stage_size = 2 * TILE * (D + 8) + P * TILE * (E + 8);
  u16 *points = (u16 *)raw, *stages = points + P * TILE * (D + 8);
  float *unscale = (float *)(stages + p.stages * stage_size);
  const int head = blockIdx.x / (u32)p.segments, tiles = (int)p.m_pad / TILE;
  const i64 first = blockIdx.x % (u32)p.segments * TILE;
  const int count = (int)min(p.num_queries - first, (i64)TILE);
  int index[AXES];
  split_head(p, head, index);
  const SideView side = side_of<T>(p, p.query, index);
  const float *totals = totals_of(p, along(index, p.key_axis)), *c = totals;
  copy_stage<P, E>(p, stages, side, totals, 0);
  const View<const T> q = view<const T>(p.q, index);
  const bool whole = in_pieces<T>(p.q, p.d);
  float back[2] = {1, 1};
  if constexpr (AS_THEY_ARE<T>) {
    copy_points(q, whole, first, 0, count, (int)p.d, points, D);
  } else {
    load_points(q, whole, first, 0, count, (int)p.d, side.root(), side.center(), points, D, unscale);
    __syncwarp();
    back[0] = unscale[row_of(0)] * side.unscale(), back[1] = unscale[row_of(1)] * side.unscale();
  }
  Reading<E> reading;
  reading.start();
  for (int tile = 0; tile < tiles; tile++) {
    u16 *stage = stages + (p.stages == 2 ? tile % 2 * stage_size : 0);
    if (p.stages == 2 && tile + 1 < tiles) {
      copy_stage<P, E>(p, stages + (tile + 1) % 2 * stage_size, side, totals, tile + 1);
      wait_copies<1>();
    } else {
      wait_copies<0>();
    }
    __syncthreads();
    float log[LANE_COLUMNS][4], old[2];
    multiply_queries<T>(log, points, stage, D);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int j = tile * TILE + column_of(n, i);
        const float bias = side.column()[j] + c[j];
        if (!AS_THEY_ARE<T>) log[n][i] *= back[0], log[n][i + 2] *= back[1];
        log[n][i] += bias, log[n][i + 2] += bias;
      }
    weigh(log, reading.ref, old);
    reading.scale(old);
    add_values<P, E>(reading, log, stage + 2 * TILE * (D + 8));
    __syncthreads();
    if (p.stages == 1 && tile + 1 < tiles) copy_stage<P, E>(p, stages, side, totals, tile + 1);
  }
  split_head(p, again(head), index);  // computed again, because registers are scarce in the loop
  const View<T> out = view<T>(p.out, index);
  const float *factors = view<const float>(p.query_factors, index).start;
  const View<float> stats = view<float>(p.stats, index);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row_of(h);
    const float den = quad_sum(reading.den[h]);
    const float ref = reading.ref[h] + (factors && r < count ? factors[first + r] : 0.0f);
    const float by = p.normalised ? (den == 0 ? 0.0f : 1.0f / den) : exp2_of(ref);
    store_row<T, E / 8>(out, in_pieces<T>(p.out, p.e), r < count, first + r, 0, p.e,
                        [&](int n, int i) { return reading.num[n][2 * h + i] * by; });
    if (r < count && stats.start && lane_of() % 4 == 0) stats.at(first + r, 0) = by, stats.at(first + r, 1) = safe(ref) * LN_2;
  }
}

}  // namespace favorsharp
