// Gradients of attention through features.
//
// A query i reads a key j with weight p = exp(lq_i + lk_j - r_i), summed over features; r_i is the logarithm of its
// total. With G_i = (dout_i, -dout_i.out_i) and V_j = (v_j, 1), the gradient of the logarithm of a weight is p G_i.V_j.
// So one sweep serves both directions. Tiles of one side (keys with V, or queries with G) are added to sums, which have
// a row for each feature and are relative to the largest log feature so far. The other side reads these sums. The
// gradient of a reader's log features is weight * (sums.value). If keys read, what they read is the gradient of v.
// Features are computed again, one slice of them at a time. The numbers r_i never change, so slices are independent.
//
// The gradients of a query's weights add up to 0. If out is rounded to 16 bits, they do not quite: dout.out has a
// rounding error, which all features share, and the total is a sum of rounded weights. So for these dtypes a sweep with
// G = (dout, 0) runs first. Its sums are dout.out in float and the sum of the weights; weights and dout.out are then
// divided by the latter.
namespace favorsharp {

constexpr float LARGEST_EXPONENT = 40;  // of a hidden pair's weight; if it is exceeded, a causal tile is cut

// The sums of a segment and a slice of m features, as one array: the largest log features of the segment; those of all
// segments before; the sums of the last entries of values; the sums of the other entries.
struct State {
  int m, width;
  DEVICE int scanned() const { return m; }
  DEVICE int last() const { return 2 * m; }
  DEVICE int sums() const { return 3 * m; }
  DEVICE int size() const { return m * (3 + width); }
};

// One block's part of a sweep: the tiles in shared memory, for points of width W, values of width V, and M features at
// a time, and the steps of the sweep.
template <class T, int W, int V, int M> struct Sweep {
  typedef typename Computing<T>::type A;
  static constexpr int C = GRADIENT_ROWS, P = W + 4, VALUES = V + 4, Q = M + 4, PAIR = C + 4;
  static constexpr bool NARROW = sizeof(T) == 2;
  static constexpr int EXPONENT = Planes<T>::EXPONENT, SUM = Planes<T>::SUM, VALUE = Planes<T>::VALUE;
  // columns that are processed at once, limited by registers
  static constexpr int PART = W == 128 ? 64 : W, VALUE_PART = V == 128 ? 64 : V;

  const Gradients &g;
  const i64 head;
  const bool keys_read;
  View<const T> my_points, their_points, my_values, their_values;
  View<const bool> my_mask, their_mask;
  PlainSide<A> my_side, their_side;
  A *point, *taken, *read, *mine, *theirs, *feature, *weight, *slope, *pair, *product, *sums;
  A *top, *next, *last, *my_column, *their_column, *factor_taken, *last_taken, *factor_read, *last_read;
  int *cut;
  i64 slice;
  int turn;
  A *map_sums;  // sums for the gradients of the map, (M, W + 1), in global memory

  DEVICE Sweep(const Gradients &g, i64 head, unsigned char *raw)
      : g(g), head(head), keys_read(g.keys_read != 0), slice(0), turn(0), map_sums(nullptr) {
    i64 index[AXES];
    split_head(g, head, index);
    const View<const T> q = view<const T>(g.q, index), k = view<const T>(g.k, index);
    const View<const T> gradient = view<const T>(g.gradient, index), v = view<const T>(g.v, index);
    const View<const bool> mask = view<const bool>(g.mask, index), none = {0, 0, 0};
    const i64 map = along(index, g.map_axis) * g.constants;
    const PlainSide<A> query = {(const A *)g.query + map, g.d, g.m}, key = {(const A *)g.key + map, g.d, g.m};
    my_points = keys_read ? k : q, their_points = keys_read ? q : k;
    my_values = keys_read ? v : gradient, their_values = keys_read ? gradient : v;
    my_mask = keys_read ? mask : none, their_mask = keys_read ? none : mask;
    my_side = keys_read ? key : query, their_side = keys_read ? query : key;
    A *room = (A *)raw;
    auto take = [&](int items) {
      A *start = room;
      room += items;
      return start;
    };
    point = take(C * P), taken = take(C * VALUES), read = take(C * VALUES);
    mine = take(W * Q), theirs = take(W * Q);
    feature = take(C * Q), weight = take(C * Q), slope = take(C * Q), pair = take(C * PAIR), product = take(C * PAIR);
    sums = take(M * VALUES), top = take(M), next = take(M), last = take(M), my_column = take(M), their_column = take(M);
    factor_taken = take(C), last_taken = take(C), factor_read = take(C), last_read = take(C);
    cut = (int *)take(2);
  }

  DEVICE i64 readers() const { return keys_read ? g.num_keys : g.num_queries; }
  DEVICE i64 others() const { return keys_read ? g.num_queries : g.num_keys; }

  DEVICE void load_map(A *rows, A *column, const PlainSide<A> &side) {
    for (int i = threadIdx.x; i < W * M; i += GRADIENT_THREADS) {
      const int c = i / M, j = i % M;
      const i64 feature = slice * M + j;
      rows[c * Q + j] = c < g.d && feature < g.m ? side.rows()[c * g.m + feature] : 0;
    }
    for (int j = threadIdx.x; j < M; j += GRADIENT_THREADS)
      column[j] = slice * M + j < g.m ? side.column()[slice * M + j] : -infinity<A>();
  }

  // Load the factors of points of one side (the part of log features that depends only on the point), and the last
  // entries of their values.
  DEVICE void load_factors(bool keys, i64 start, int count, A *factor, A *last) {
    const A *factors = (const A *)(keys ? g.key_factor : g.query_factor) + head * (keys ? g.num_keys : g.num_queries);
    const A *lasts = (const A *)g.query_last + head * g.num_queries;
    const int r = threadIdx.x;
    if (r >= C) return;
    factor[r] = r < count ? factors[start + r] : -infinity<A>();
    last[r] = r >= count ? A(0) : keys ? A(factor[r] != -infinity<A>()) : g.measuring ? A(0) : lasts[start + r];
  }

  // Compute the log features of the points in shared memory.
  DEVICE void log_features(Tile<A, C, M> &log, const A *rows, const A *column, const A *factor) {
    log.clear();
    log.template add_product<EXPONENT>(point, P, 1, rows, Q, 1, W);
    log.each([&](int r, int c, A &value) { value += column[c] + factor[r]; });
  }

  // Process a tile of points: it enters the sums, or reads them, or (a causal tile) both. Returns false if a causal
  // tile has to be cut.
  DEVICE bool step(bool taking, i64 take_start, int take_count, bool reading, i64 start, int count, bool added) {
    const int tid = threadIdx.x;
    if (taking) {
      load_points<T, W>(point, their_points, g.d, take_start, take_count, their_side.alpha(), their_side.center(),
                        their_mask);
      load_values<T, V>(taken, their_values, g.e, take_start, take_count, their_mask);
      load_factors(!keys_read, take_start, take_count, factor_taken, last_taken);
      __syncthreads();  // points and factors are there
      Tile<A, C, M> log;
      log_features(log, theirs, their_column, factor_taken);
      log.store(feature, Q);
      __syncthreads();  // log features are there
      for (int j = tid; j < M; j += GRADIENT_THREADS) {
        A largest = top[j];
        for (int r = 0; r < C; r++) largest = larger(largest, feature[r * Q + j]);
        next[j] = largest;
      }
    }
    if (reading) {
      load_points<T, W>(point, my_points, g.d, start, count, my_side.alpha(), my_side.center(), my_mask);
      load_values<T, V>(read, my_values, g.e, start, count, my_mask);
      load_factors(keys_read, start, count, factor_read, last_read);
    }
    if (tid == 0) cut[turn] = 0;
    __syncthreads();  // the readers' points and the new tops are there
    if (reading) {
      const A *reference = taking ? next : top;
      Tile<A, C, M> log;
      log_features(log, mine, my_column, factor_read);
      log.each([&](int r, int c, A &value) {
        value += reference[c];
        if (taking && r < count && value > A(LARGEST_EXPONENT)) cut[turn] = 1;
        value = exp_of(value);
      });
      log.store(weight, Q);
      __syncthreads();  // the readers' weights are there, and whether one is too large
      turn ^= 1;
      if (taking && count > 1 && cut[turn ^ 1]) return false;
    }
    if (taking) {
      for (int i = tid; i < C * M; i += GRADIENT_THREADS) {
        const int r = i / M, j = i % M;
        feature[r * Q + j] = exp_of(feature[r * Q + j] - limited(next[j]));
      }
      for (int i = tid; i < M * V; i += GRADIENT_THREADS) {
        const int j = i / V;
        if (next[j] > top[j]) sums[j * VALUES + i % V] *= exp_of(top[j] - next[j]);
      }
      for (int j = tid; j < M; j += GRADIENT_THREADS)
        if (next[j] > top[j]) last[j] *= exp_of(top[j] - next[j]);
      __syncthreads();  // features and sums are relative to the new tops
      A *old = top;
      top = next, next = old;
    }
    if (reading) give(taking, start, count, added);
    if (taking) {
#pragma unroll 1
      for (int part = 0; part < V; part += VALUE_PART) {
        Tile<A, M, VALUE_PART> own;  // starts from zero and is then added to the sums
        own.clear();
        own.template add_product<SUM>(feature, 1, Q, taken + part, VALUES, 1, C);
        own.add(sums + part, VALUES);
      }
      for (int j = tid; j < M; j += GRADIENT_THREADS) {
        A own = 0;
        for (int r = 0; r < C; r++) own += feature[r * Q + j] * last_taken[r];
        last[j] += own;
      }
    }
    __syncthreads();  // everything has been used, and the next tile may overwrite it
    return true;
  }

  // Compute the gradients of a tile of readers.
  DEVICE void give(bool pairwise, i64 start, int count, bool added) {
    const int tid = threadIdx.x;
    Tile<A, C, M> slopes;
    slopes.clear();
    slopes.template add_product<SUM>(read, VALUES, 1, sums, 1, VALUES, V);
    slopes.each([&](int r, int c, A &value) { value += last_read[r] * last[c]; });
    if (pairwise) {
      Tile<A, C, C> pairs;
      pairs.clear();
      pairs.template add_product<VALUE>(read, VALUES, 1, taken, 1, VALUES, V);
      pairs.each([&](int r, int c, A &value) { value = seen(r, c) ? value + last_read[r] * last_taken[c] : A(0); });
      pairs.store(pair, PAIR);
      if (keys_read) {
        pairs.clear();
        pairs.template add_product<VALUE>(weight, Q, 1, feature, 1, Q, M);
        pairs.each([&](int r, int c, A &value) { value = seen(r, c) ? value : A(0); });
        pairs.store(product, PAIR);
      }
      __syncthreads();  // the pairs of the tile are there
      slopes.template add_product<SUM>(pair, PAIR, 1, feature, Q, 1, C);
    }
    slopes.each([&](int r, int c, A &value) { value *= weight[r * Q + c]; });
    slopes.store(slope, Q);
    if (keys_read) {
#pragma unroll 1
      for (int part = 0; part < V; part += VALUE_PART) {
        Tile<A, C, VALUE_PART> values;
        values.clear();
        values.template add_product<VALUE>(weight, Q, 1, sums + part, VALUES, 1, M);
        if (pairwise) values.template add_product<VALUE>(product, PAIR, 1, taken + part, VALUES, 1, C);
        add_rows(values, (A *)g.dv + (head * g.num_keys + start) * g.e, g.e, part, count, added);
      }
    }
    __syncthreads();  // the gradients of log features are there
    const i64 line = head * readers() + start;
    A total = 0;
    for (int j = tid & 3; j < M; j += 4) total += slope[(tid >> 2) * Q + j];
    total = quarter_sum(total);
    if ((tid & 3) == 0 && (tid >> 2) < count) {
      A *place = (A *)(NARROW && g.measuring ? g.query_last : keys_read ? g.key_slopes : g.query_slopes) + line + (tid >> 2);
      if (NARROW && g.measuring) total = -total;
      *place = added ? *place + total : total;
    }
    if (NARROW && g.measuring) {
      weigh(pairwise, line, count, added);
      return;
    }
#pragma unroll 1
    for (int part = 0; part < W; part += PART) {
      Tile<A, C, PART> rows;
      rows.clear();
      rows.template add_product<VALUE>(slope, Q, 1, mine + part * Q, 1, Q, M);
      add_rows(rows, (A *)(keys_read ? g.dk : g.dq) + line * g.d, g.d, part, count, added);
    }
    if (map_sums) {
#pragma unroll 1
      for (int part = 0; part < W; part += PART) {
        Tile<A, M, PART> of_rows;
        of_rows.clear();
        of_rows.template add_product<VALUE>(slope, 1, Q, point + part, P, 1, C);
        of_rows.add(map_sums + part, W + 1);
      }
      if (tid < M) {
        A sum = 0;
        for (int r = 0; r < C; r++) sum += slope[r * Q + tid];
        map_sums[tid * (W + 1) + W] += sum;
      }
    }
  }

  // Add up the weights of each query of a tile.
  DEVICE void weigh(bool pairwise, i64 line, int count, bool added) {
    const int row = threadIdx.x >> 2, quarter = threadIdx.x & 3;
    A total = 0;
    for (int j = quarter; j < M; j += 4) total += weight[row * Q + j] * last[j];
    if (pairwise) {
      Tile<A, C, C> pairs;
      pairs.clear();
      pairs.template add_product<SUM>(weight, Q, 1, feature, 1, Q, M);
      pairs.each([&](int r, int c, A &value) { value = seen(r, c) ? value : A(0); });
      pairs.store(product, PAIR);
      __syncthreads();  // the weights of pairs are there
      for (int c = quarter; c < C; c += 4) total += product[row * PAIR + c];
    }
    total = quarter_sum(total);
    if (quarter != 0 || row >= count) return;
    A *const place = (A *)g.query_weights + line + row;
    *place = added ? *place + total : total;
  }

  // Whether, in a causal tile, the reader in row r sees (or, if keys read, is seen by) the point in row c.
  DEVICE bool seen(int r, int c) const { return keys_read ? c >= r : c <= r; }

  template <int N> DEVICE void add_rows(Tile<A, C, N> &tile, A *to, i64 size, int part, int count, bool added) {
    tile.each([&](int r, int c, A &value) {
      if (r >= count || part + c >= size) return;
      A *const place = to + r * size + part + c;
      *place = added ? *place + value : value;
    });
  }

  DEVICE A *state(i64 segment) const {
    return (A *)g.states + ((head * g.slices + slice) * g.state_segments + segment) * State{M, V}.size();
  }
  DEVICE void load_state(i64 segment) {
    const bool empty = g.only_states != 0;
    const A *from = state(segment);
    for (int i = threadIdx.x; i < M * V; i += GRADIENT_THREADS)
      sums[i / V * VALUES + i % V] = empty ? A(0) : from[State{M, V}.sums() + i];
    for (int j = threadIdx.x; j < M; j += GRADIENT_THREADS) {
      last[j] = empty ? A(0) : from[State{M, V}.last() + j];
      top[j] = empty ? -infinity<A>() : from[State{M, V}.scanned() + j];
    }
  }
  DEVICE void store_state(i64 segment) {
    A *to = state(segment);
    for (int i = threadIdx.x; i < M * V; i += GRADIENT_THREADS)
      to[State{M, V}.sums() + i] = sums[i / V * VALUES + i % V];
    for (int j = threadIdx.x; j < M; j += GRADIENT_THREADS) to[State{M, V}.last() + j] = last[j], to[j] = top[j];
  }
  DEVICE void begin_map(i64 segment) {
    if (!g.map_sums || g.only_states) return;
    map_sums = (A *)g.map_sums + ((head * g.slices + slice) * g.segments + segment) * M * (W + 1);
    if (g.added) return;
    Tile<A, M, PART> none;
    none.clear();
    for (int part = 0; part < W; part += PART) none.store(map_sums + part, W + 1);
    if (threadIdx.x < M) map_sums[threadIdx.x * (W + 1) + W] = 0;
  }

  // The largest weight of each feature among readers, and the reader that has it. They are in global memory, because
  // registers are scarce.
  DEVICE i64 feature_of(i64 segment) const { return ((head * g.slices + slice) * g.segments + segment) * M + threadIdx.x; }
  DEVICE void begin_largest(i64 segment) {
    if (!g.largest || g.only_states || threadIdx.x >= M) return;
    ((A *)g.largest)[feature_of(segment)] = 0;
    ((i64 *)g.largest_at)[feature_of(segment)] = -1;
  }
  DEVICE void find_largest(i64 segment, i64 start, int count) {
    if (!g.largest || threadIdx.x >= M) return;
    A *const found = (A *)g.largest + feature_of(segment);
    for (int r = 0; r < count; r++)
      if (weight[r * Q + threadIdx.x] > *found) {
        *found = weight[r * Q + threadIdx.x];
        ((i64 *)g.largest_at)[feature_of(segment)] = start + r;
      }
  }
};

// A block processes a segment of readers, one slice after the other. With only_states it computes the sums of one slice
// over a segment of the other side instead: the points that enter the sums between the segment's first reader and its
// last.
template <class T, int W, int V, int M> KERNEL(GRADIENT_BOUNDS) gradient_sweep(ARGUMENT Gradients g) {
  typedef Sweep<T, W, V, M> S;
  SHARED_MEMORY(raw);
  const bool only_states = g.only_states != 0, backwards = g.backwards != 0;
  const i64 segments = only_states ? g.state_segments : g.segments, segment = blockIdx.x % segments;
  const i64 parts = only_states ? g.slices : 1, part = blockIdx.x / segments % parts;
  S s(g, blockIdx.x / segments / parts, raw);
  const i64 w = g.window, shift = (backwards ? RECENT_BLOCKS : -RECENT_BLOCKS) * w;
  const i64 low = only_states ? max((i64)0, segment * g.state_span + shift) : segment * g.span;
  const i64 high = only_states ? min(s.others(), segment * g.state_span + shift + g.state_span)
                               : min(s.readers(), low + g.span);
  const bool pairwise = g.causal && w == 0 && !only_states, whole = !g.causal && w == 0;
  const i64 block = w > 0 && !only_states ? w : high - low, blocks = high > low ? (high - low + block - 1) / block : 0;
  for (s.slice = part; s.slice < (only_states ? part + 1 : g.slices); s.slice++) {
    s.load_map(s.theirs, s.their_column, s.their_side);
    if (!only_states) s.load_map(s.mine, s.my_column, s.my_side);
    s.load_state(whole && !only_states ? 0 : segment);
    s.begin_map(segment);
    s.begin_largest(segment);
    i64 number = 0, take = 0, take_stop = 0, start = 0, stop = 0;
    int size = S::C;
    while (true) {
      if (take >= take_stop && start >= stop) {  // the next block of the window, or all
        if (number == blocks) break;
        const i64 begin = low + (backwards ? blocks - 1 - number : number) * block;
        number++;
        start = begin, stop = min(high, begin + block);
        if (only_states || pairwise) take = start, take_stop = stop;
        else if (w > 0) take = max((i64)0, begin + shift), take_stop = min(s.others(), begin + shift + w);
        if (only_states) start = stop;
        continue;
      }
      const bool taking = take < take_stop, reading = pairwise || !taking;
      const int count = (int)min((i64)size, taking ? take_stop - take : stop - start);
      const bool from_the_end = pairwise && backwards;
      const i64 take_at = from_the_end ? take_stop - count : take, at = from_the_end ? stop - count : start;
      if (!s.step(taking, take_at, count, reading, at, count, g.added || s.slice > 0)) {
        size = max(1, count / 4);
        continue;
      }
      if (reading) s.find_largest(segment, at, count);
      if (from_the_end) {
        take_stop -= count, stop -= count;
        if ((high - stop) % S::C == 0) size = S::C;
      } else {
        if (taking) take += count;
        if (reading) start += count;
        if (pairwise && (start - low) % S::C == 0) size = S::C;
      }
    }
    if (only_states) s.store_state(segment);
  }
}

// Divide what queries have measured by the sums of their weights, so that the weights add up to 1 from here on. One
// thread for each query.
template <class A> KERNEL(GRADIENT_BOUNDS) gradient_normalise(ARGUMENT Gradients g) {
  const i64 query = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x;
  if (query >= g.heads * g.num_queries) return;
  const A sum = ((const A *)g.query_weights)[query];
  if (!(sum > 0)) return;  // the query sees nothing, or the sum is NaN
  ((A *)g.query_last)[query] /= sum;
  ((A *)g.query_factor)[query] -= log_of(sum);
  ((A *)g.query_near)[query] -= log_of(sum);
}

// Replace the sums of each segment by the sums of all segments before it (after it, if backwards). If readers see all
// points, the first segment receives the sums of all segments instead. All start from the given sums. One thread for
// each number.
template <class A> KERNEL(GRADIENT_BOUNDS) gradient_scan(ARGUMENT Gradients g) {
  const State at = {(int)g.slice, (int)g.value_width};
  const int numbers = at.size() - at.last();
  const i64 thread = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x;
  if (thread >= g.heads * g.slices * numbers) return;
  const int number = at.last() + (int)(thread % numbers);
  const bool is_last = number < at.sums();
  const int feature = is_last ? number - at.last() : (number - at.sums()) / at.width;
  A *const states = (A *)g.states + thread / numbers * g.state_segments * at.size();
  A sum = 0, low = 0, top = -infinity<A>();
  const i64 head = thread / numbers / g.slices, row = thread / numbers % g.slices * g.slice + feature;
  const i64 column = is_last ? 0 : (number - at.sums()) % at.width;
  const bool there = row < g.m && (is_last || column < g.e);
  if (g.given_kv.start && there) {
    i64 index[AXES];
    split_head(g, head, index);
    sum = is_last ? view<const A>(g.given_z, index).at(0, row) : view<const A>(g.given_kv, index).at(row, column);
    top = view<const A>(g.given_c, index).at(0, row);
  }
  const bool whole = !g.causal && g.window == 0;
  for (i64 t = 0; t < g.state_segments; t++) {
    A *const state = states + (g.backwards ? g.state_segments - 1 - t : t) * at.size();
    const A own = state[feature], value = state[number], largest = larger(top, own);
    if (!whole) {
      state[number] = sum;
      if (is_last) state[at.scanned() + feature] = top;
    }
    const A scale = exp_of(top - limited(largest));
    sum *= scale, low *= scale;
    add_to(sum, low, value * exp_of(own - limited(largest)));
    top = largest;
  }
  if (whole) {
    states[number] = sum;
    if (is_last) states[at.scanned() + feature] = top;
  }
  if (!g.total_kv || !there) return;
  if (is_last) ((A *)g.total_z)[head * g.m + row] = sum, ((A *)g.total_c)[head * g.m + row] = top;
  else ((A *)g.total_kv)[(head * g.m + row) * g.e + column] = sum;
}

// For each feature, add the gradient of the largest log feature, to which sums are relative, to the key that has it,
// and set `of_largest`, which holds the gradient, to 0. Nothing changes if the earlier sums, whose weight is `before`,
// have the largest log feature. One block for each head; its warps share the keys.
template <class T> KERNEL(GRADIENT_BOUNDS) gradient_largest(ARGUMENT Gradients g) {
  typedef typename Computing<T>::type A;
  const i64 head = blockIdx.x, warps = GRADIENT_THREADS / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  i64 index[AXES];
  split_head(g, head, index);
  const View<const T> k = view<const T>(g.k, index);
  const PlainSide<A> side = {(const A *)g.key + along(index, g.map_axis) * g.constants, g.d, g.m};
  for (i64 feature = 0; feature < g.m; feature++) {
    const i64 first = (head * g.slices + feature / g.slice) * g.segments * g.slice + feature % g.slice;
    A largest = ((const A *)g.before)[head * g.m + feature];
    i64 key = -1;
    for (i64 t = 0; t < g.segments; t++) {
      const A own = ((const A *)g.largest)[first + t * g.slice];
      if (own > largest) largest = own, key = ((const i64 *)g.largest_at)[first + t * g.slice];
    }
    if (key < 0 || key % warps != warp) continue;
    A *const place = (A *)g.of_largest + head * g.m + feature;
    const A slope = *place;
    __syncwarp();  // all lanes have read it
    const i64 line = head * g.num_keys + key;
    A *const to = (A *)g.dk + line * g.d;
    A *const of_map = g.map_sums ? (A *)g.map_sums + first * (g.width + 1) : nullptr;
    for (i64 c = lane; c < g.d; c += 32) {
      to[c] += slope * side.rows()[c * g.m + feature];
      if (of_map) of_map[c] += slope * (side.alpha() * widened(k.at(key, c)) - side.center()[c]);
    }
    if (lane == 0) {
      *place = 0;
      ((A *)g.key_slopes)[line] += slope;
      if (of_map) of_map[g.width] += slope;
    }
  }
}

}  // namespace favorsharp
