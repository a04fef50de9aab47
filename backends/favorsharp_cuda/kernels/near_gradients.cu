// Gradients through keys that are scored exactly: those of a window, or the recent keys of a state. As in
// attention_gradients.cu, one side reads the other. The readers of a tile are in one block of the window, so that all
// read the same neighbours.
namespace favorsharp {

template <class T, int W> KERNEL(GRADIENT_BOUNDS) near_gradients(ARGUMENT Gradients g) {
  typedef typename Computing<T>::type A;
  constexpr int C = GRADIENT_ROWS, P = W + 4, PAIR = C + 4;
  constexpr int EXPONENT = Planes<T>::EXPONENT, VALUE = Planes<T>::VALUE;
  SHARED_MEMORY(raw);
  A *mine = (A *)raw, *theirs = mine + C * P, *read = theirs + C * P, *taken = read + C * P;
  A *weight = taken + C * P, *slope = weight + C * PAIR;
  A *factor_mine = slope + C * PAIR, *factor_theirs = factor_mine + C;
  A *last_mine = factor_theirs + C, *last_theirs = last_mine + C, *half_mine = last_theirs + C;
  A *half_theirs = half_mine + C;
  const bool keys_read = g.keys_read;
  const i64 all = keys_read ? g.num_keys : g.num_queries, others = keys_read ? g.num_queries : g.num_keys;
  const i64 w = g.window, per_block = (w + C - 1) / C, blocks = (all + w - 1) / w;
  const i64 head = blockIdx.x / (blocks * per_block), tile = blockIdx.x % (blocks * per_block);
  const i64 block = tile / per_block, start = block * w + tile % per_block * C;
  const int count = (int)min((i64)C, min(all, (block + 1) * w) - start);
  if (count <= 0) return;
  const int tid = threadIdx.x, quarter = tid & 3, row = tid >> 2;
  i64 index[AXES];
  split_head(g, head, index);
  const View<const T> q = view<const T>(g.q, index), k = view<const T>(g.k, index), v = view<const T>(g.v, index);
  const View<const T> gradient = view<const T>(g.gradient, index);
  const View<const bool> mask = view<const bool>(g.mask, index), none = {0, 0, 0};
  const PlainSide<A> side = {(const A *)g.query + along(index, g.map_axis) * g.constants, g.d, g.m};

  auto load = [&](bool keys, A *point, A *value, A *factor, A *last, i64 first, int size) {
    const View<const bool> visible = keys ? mask : none;
    load_points<T, W>(point, keys ? k : q, g.d, first, size, side.alpha(), side.near_center(), visible);
    load_values<T, W>(value, keys ? v : gradient, g.e, first, size, visible);
    const A *factors = (const A *)(keys ? g.key_near : g.query_near) + head * (keys ? g.num_keys : g.num_queries) + first;
    const A *lasts = (const A *)g.query_last + head * g.num_queries + first;
    if (tid < C) {
      factor[tid] = tid < size ? factors[tid] : -infinity<A>();
      last[tid] = tid >= size ? A(0) : keys ? A(factor[tid] != -infinity<A>()) : g.measuring ? A(0) : lasts[tid];
    }
  };
  auto halve = [&](const A *point, A *half) {  // half of the squared norms
    A sum = 0;
    for (int c = quarter; c < W; c += 4) sum += point[row * P + c] * point[row * P + c];
    sum = quarter_sum(sum);
    if (quarter == 0) half[row] = sum / 2;
  };

  load(keys_read, mine, read, factor_mine, last_mine, start, count);
  i64 low = keys_read && g.causal ? start : (block - NEIGHBOURS) * w, high = (block + 1 + NEIGHBOURS) * w;
  if (!keys_read && g.causal) high = start + count;
  low = low < 0 ? 0 : low, high = high < others ? high : others;
  for (i64 part = low; part < high; part += PART) {  // sums of a part are added to global memory
    const i64 stop = min(high, part + PART);
    Tile<A, C, W> of_points, of_values;
    of_points.clear(), of_values.clear();
    A total = 0, weights = 0;  // sums over the other side: of the gradients of scores, and of weights
    for (i64 first = part; first < stop; first += C) {
      const int size = (int)min((i64)C, stop - first);
      load(!keys_read, theirs, taken, factor_theirs, last_theirs, first, size);
      __syncthreads();  // both tiles are loaded
      if (g.gaussian) {
        halve(mine, half_mine);
        halve(theirs, half_theirs);
      }
      Tile<A, C, C> scores, products;
      scores.clear(), products.clear();
      scores.template add_product<EXPONENT>(mine, P, 1, theirs, 1, P, W);
      products.template add_product<VALUE>(read, P, 1, taken, 1, P, W);
      if (g.gaussian) __syncthreads();  // the norms are there
      scores.each([&](int r, int c, A &value) {
        const i64 reader = start + r, other = first + c;
        const bool seen = !g.causal || (keys_read ? other >= reader : other <= reader);
        value += factor_mine[r] + factor_theirs[c];
        if (g.gaussian) value -= half_mine[r] + half_theirs[c];
        value = seen ? exp_of(value) : A(0);
      });
      scores.store(weight, PAIR);
      products.each([&](int r, int c, A &value) { value += last_mine[r] * last_theirs[c]; });
#pragma unroll
      for (int r = 0; r < products.ROWS; r++)
#pragma unroll
        for (int c = 0; c < products.COLUMNS; c++)
#pragma unroll
          for (int i = 0; i < 4; i++) products.x[r][c][i] *= scores.x[r][c][i];
      products.store(slope, PAIR);
      __syncthreads();  // the weights and the gradients of scores are there
      if (!g.measuring) of_points.template add_product<VALUE, true>(slope, PAIR, 1, theirs, P, 1, C);
      if (keys_read) of_values.template add_product<VALUE, true>(weight, PAIR, 1, taken, P, 1, C);
      if (g.gaussian || g.measuring) {
        A own_total = 0, own_weights = 0;
        for (int c = quarter; c < C; c += 4) own_total += slope[row * PAIR + c], own_weights += weight[row * PAIR + c];
        total += own_total, weights += own_weights;
      }
      __syncthreads();  // the next tile overwrites them
    }
    if (g.measuring) {
      total = quarter_sum(total), weights = quarter_sum(weights);
      if (quarter != 0 || row >= count) continue;
      ((A *)g.query_last)[head * all + start + row] -= total;
      ((A *)g.query_weights)[head * all + start + row] += weights;
      continue;
    }
    if (g.gaussian) {  // scores contain -|x|^2 / 2 of the reader's point x, whose gradient is -x
      total = quarter_sum(total);
      if (quarter == 0) half_mine[row] = total;
      __syncthreads();  // the sums of all rows are there
      of_points.each([&](int r, int c, A &value) { value -= half_mine[r] * mine[r * P + c]; });
    }
    const i64 line = head * all + start;
    A *points_to = (A *)(keys_read ? g.dk : g.dq) + line * g.d, *values_to = (A *)g.dv + line * g.e;
    of_points.each([&](int r, int c, A &value) {
      if (r < count && c < g.d) points_to[r * g.d + c] += value;
    });
    if (keys_read)
      of_values.each([&](int r, int c, A &value) {
        if (r < count && c < g.e) values_to[r * g.e + c] += value;
      });
  }
}

}  // namespace favorsharp
