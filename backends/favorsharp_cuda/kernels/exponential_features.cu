// exp(u W^T + row + column): a block loads 64 points and goes through all features, 64 at a time.
namespace favorsharp {

template <class T> KERNEL(THREADS) features(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d, points_size = 2 * TILE * (D + 8);
  u16 *points = (u16 *)raw, *weights = points + points_size;
  float *unscale = (float *)(weights + points_size), *weights_unscale = unscale + TILE, *center = unscale + 2 * TILE;
  const i64 head = blockIdx.x / p.segments, first = blockIdx.x % p.segments * TILE;
  int index[AXES];
  split_head(p, head, index);
  const View<const T> u = view<const T>(p.q, index), w = view<const T>(p.k, index);
  const View<const T> row = view<const T>(p.v, index), column = view<const T>(p.mask, index);
  const View<T> out = view<T>(p.out, index);
  const int count = (int)min(p.num_queries - first, (i64)TILE);
  for (int j = threadIdx.x; j < D; j += THREADS) center[j] = 0;
  __syncthreads();
  load_points(u, in_pieces<T>(p.q, p.d), first, 0, count, (int)p.d, 1.0f, center, points, D, unscale);
  __syncwarp();
  float back[2], own[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int r = row_of(h);
    back[h] = unscale[r];
    own[h] = r < count ? widened(row.at(first + r, 0)) : 0.0f;
  }
#pragma unroll 1
  for (i64 j = 0; j < p.m; j += TILE) {
    const int features = (int)min(p.m - j, (i64)TILE);
    __syncthreads();
    load_points(w, in_pieces<T>(p.k, p.d), j, 0, features, (int)p.d, 1.0f, center, weights, D, weights_unscale);
    __syncthreads();
    float log[LANE_COLUMNS][4];
    multiply_points(log, points, weights, D);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 2; i++) {
        const int c = column_of(n, i);
        const float bias = c < features ? widened(column.at(0, j + c)) : 0.0f, scale = weights_unscale[c];
#pragma unroll
        for (int h = 0; h < 2; h++)
          log[n][2 * h + i] = exp_of(log[n][2 * h + i] * (back[h] * scale) + (own[h] + bias));
      }
#pragma unroll
    for (int h = 0; h < 2; h++)
      store_row<T, LANE_COLUMNS>(out, in_pieces<T>(p.out, p.m), row_of(h) < count, first + row_of(h), j, p.m,
                                 [&](int n, int i) { return log[n][2 * h + i]; });
  }
}

}  // namespace favorsharp
