// The gradients of exp(u W^T + row + column). Features are computed again.
namespace favorsharp {

// A block processes a segment of the points of one head, one slice of features after the other. q, k, v and out are u,
// W, row and column. The gradients of u and row are written to dq and query_slopes, and those of W and column, side by
// side and for each segment, to map_sums.
template <class T, int W> KERNEL(GRADIENT_BOUNDS) exponential_features_gradients(ARGUMENT Gradients g) {
  typedef typename Computing<T>::type A;
  constexpr int C = GRADIENT_ROWS, M = (W == 64 ? 64 : 32) * 4 / (int)sizeof(A), P = W + 4, Q = M + 4;
  constexpr int EXPONENT = Planes<T>::EXPONENT, VALUE = Planes<T>::VALUE;
  SHARED_MEMORY(raw);
  A *point = (A *)raw, *rows = point + C * P, *slope = rows + M * P;
  const i64 head = blockIdx.x / g.segments, segment = blockIdx.x % g.segments;
  const int tid = threadIdx.x;
  i64 index[AXES];
  split_head(g, head, index);
  const View<const T> u = view<const T>(g.q, index), w = view<const T>(g.k, index), row = view<const T>(g.v, index);
  const View<const T> column = view<const T>(g.out, index), gradient = view<const T>(g.gradient, index);
  const View<const bool> none = {0, 0, 0};
  const i64 low = segment * g.span, high = min(g.num_queries, low + g.span);
  A *const du = (A *)g.dq + head * g.num_queries * g.d, *const drow = (A *)g.query_slopes + head * g.num_queries;
  for (i64 slice = 0; slice < g.slices; slice++) {
    Tile<A, M, W> of_rows;
    A of_column = 0;
    of_rows.clear();
    for (int i = tid; i < M * W; i += GRADIENT_THREADS) {
      const i64 j = slice * M + i / W, c = i % W;
      rows[i / W * P + c] = j < g.m && c < g.d ? widened(w.at(j, c)) : 0;
    }
    for (i64 start = low; start < high; start += C) {
      const int count = (int)min((i64)C, high - start);
      load_values<T, W>(point, u, g.d, start, count, none);
      __syncthreads();  // the points and W are there
      Tile<A, C, M> slopes;
      slopes.clear();
      slopes.template add_product<EXPONENT>(point, P, 1, rows, 1, P, W);
      slopes.each([&](int r, int c, A &value) {
        const i64 j = slice * M + c;
        const bool there = r < count && j < g.m;
        value = there ? exp_of(value + (widened(row.at(start + r, 0)) + widened(column.at(0, j)))) *
                            widened(gradient.at(start + r, j))
                      : A(0);
      });
      slopes.store(slope, Q);
      __syncthreads();  // the gradients of the exponents are there
      Tile<A, C, W> back;
      back.clear();
      back.template add_product<VALUE>(slope, Q, 1, rows, P, 1, M);
      back.each([&](int r, int c, A &value) {
        if (r >= count || c >= g.d) return;
        A *const place = du + (start + r) * g.d + c;
        *place = slice > 0 ? *place + value : value;
      });
      A total = 0;
      for (int j = tid & 3; j < M; j += 4) total += slope[(tid >> 2) * Q + j];
      total = quarter_sum(total);
      if ((tid & 3) == 0 && (tid >> 2) < count) {
        A *const place = drow + start + (tid >> 2);
        *place = slice > 0 ? *place + total : total;
      }
      of_rows.template add_product<VALUE, true>(slope, 1, Q, point, P, 1, C);
      if (tid < M) {
        A own = 0;
        for (int r = 0; r < C; r++) own += slope[r * Q + tid];
        of_column += own;
      }
      __syncthreads();  // the next points or features overwrite them
    }
    A *const to = (A *)g.map_sums + ((head * g.slices + slice) * g.segments + segment) * M * (W + 1);
    of_rows.each([&](int r, int c, A &value) { to[r * (W + 1) + c] = value; });
    if (tid < M) to[tid * (W + 1) + W] = of_column;
  }
}

}  // namespace favorsharp
