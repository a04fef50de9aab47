// Causal attention, and one direction of bidirectional attention with a window. A block walks along the positions of a
// segment (walk.cuh) and writes what its rows have read.
namespace favorsharp {

#define WALK_BOUNDS THREADS, 2  // two blocks a multiprocessor, which fit into shared memory: 255 registers a thread

template <class T, int E> KERNEL(WALK_BOUNDS) walk(ARGUMENT Problem p) {
  typedef Walk<T, E> W;
  SHARED_MEMORY(raw);
  const int parts = (int)p.padded_e / E, part = (int)blockIdx.x % parts;
  const int number = (int)blockIdx.x / parts, segment = number % (int)p.segments;
  const Layout layout = {(int)p.m_pad, E}, given = layout_of(p);
  int index[AXES];
  split_head(p, number / (int)p.segments, index);
  float *const state = (float *)p.scratch + (i64)blockIdx.x * 2 * layout.size();
  W s = {p, (u16 *)raw, 0};
  if (threadIdx.x == 0) {
    const Array *const arrays[] = {&p.q, &p.k, &p.v, &p.key_factors, &p.query_factors, &p.out, &p.partial_sums, &p.stats,
                                   &p.kv_out, &p.z_out, &p.c_out, &p.kv_low_out, &p.z_low_out};
    const int items[] = {sizeof(T), sizeof(T), sizeof(T), 4, 4, sizeof(T), 4, 4, 4, 4, 4, 4, 4};
#pragma unroll
    for (int i = 0; i < (int)Start::QUERY; i++)
      s.starts()[i] = arrays[i]->start ? arrays[i]->start + along(index, arrays[i]->axis) * items[i] : 0;
    const SideView query = side_of<T>(p, p.query, index), key = side_of<T>(p, p.key, index);
    s.starts(Start::QUERY)[0] = (i64)query.start, s.starts(Start::QUERY)[1] = (i64)query.planes;
    s.starts(Start::KEY)[0] = (i64)key.start, s.starts(Start::KEY)[1] = (i64)key.planes;
    // positions fit into 32 bits, which tiles.py checks; offsets computed from them need 64
    const int w = (int)p.window, length = w == 0 || w >= TILE ? TILE : TILE / w * w, begin = segment * (int)p.span;
    const int kept[] = {(int)p.shift, (int)p.limit, (int)p.first_query, begin, (int)min(begin + p.span, p.num_keys),
                        length, w >= TILE ? w : length, w, part * E};
#pragma unroll
    for (int i = 0; i < 9; i++) s.kept()[i] = kept[i];
    s.scratch()[0] = (i64)state;
  }

  // the sums to start from
  const float *before = p.sums ? sums_of(p, along(index, p.key_axis) * p.segments + segment) : nullptr;
  for (i64 t = threadIdx.x; t < p.m_pad * E; t += THREADS) {
    const int r = (int)t / E, to = layout.at(r, (int)t % E), from = given.at(r, part * E + (int)t % E);
    state[to] = before ? before[from] : 0.0f;
    state[to + Layout::LOW] = before ? before[from + Layout::LOW] : 0.0f;
  }
  for (int r = threadIdx.x; r < p.m_pad; r += THREADS) {
    state[layout.z(r)] = before ? before[given.z(r)] : 0.0f;
    state[layout.c(r)] = before ? before[given.c(r)] : -INFINITY_F;
    state[layout.z_low(r)] = before ? before[given.z_low(r)] : 0.0f;
  }
  __syncthreads();  // the sums and the addresses of arrays are there

  const int units = s.end() > s.begin() ? (s.end() - s.begin() + s.unit() - 1) / s.unit() : 0;
  for (int u = 0; u < units; u++) {
    const int unit_start = s.begin() + (p.reverse ? units - 1 - u : u) * s.unit();
    const int unit_end = min(unit_start + s.unit(), s.end());
    const bool whole_blocks = s.window() >= TILE;  // then a tile is within one block, and all its rows read the same sums
    int entering = max(unit_start - s.shift(), 0);
    const int last_entering = min(unit_start - s.shift() + s.window(), s.limit()), block = whole_blocks ? 1 : s.block_length();
    const int all = (unit_end - unit_start + block - 1) / block * block;  // positions, in whole blocks
    int done = 0;                                                         // finished positions; from the end in reverse
    int step = s.length();
    while (done < all) {
      // a tile has keys that enter, rows that read, or both; with whole blocks, one of these
      const int rows = min(all - done, step);
      const int start = unit_start + (p.reverse ? all - done - rows : done);
      const int low = min(max(s.first_query() - start, 0), TILE), high = min(unit_end - start, rows);
      bool enters, reads = true, odd = false;
      if (whole_blocks) {
        enters = entering < last_entering;
        reads = !enters;
        if (enters) s.load_keys(entering, 0, min(last_entering - entering, TILE));
        entering += TILE;
      } else {
        const int first = start - s.shift(), keys_low = max(-first, 0), keys_high = min(s.limit() - first, rows);
        enters = keys_low < keys_high;
        if (enters) odd = s.load_keys(first, keys_low, keys_high);
      }
      float pairs[LANE_COLUMNS][4], pair_ref[2];
      Reading<E> reading;
      __syncthreads();
      if (reads) s.load_queries(start - s.first_query(), low, high);
      reading.start();
#pragma unroll
      for (int c = 0; c < LANE_COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[c][i] = 0;
      pair_ref[0] = pair_ref[1] = -INFINITY_F;
      s.sweep(enters, reads, reading, pairs, pair_ref);
      if (enters && reads && !s.merge_pairs(reading, pairs, pair_ref, odd, low, high) && rows > block) {
        step = max(rows / 4 / block, 1) * block;  // again from the same sums, with fewer rows
        continue;
      }
      if (enters) s.turn = 1 - s.turn;
      if (!reads) continue;
      done += rows;
      const float *const query_factors = (const float *)s.starts(Start::QUERY_FACTORS)[0];
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (query_factors && row_of(h) >= low && row_of(h) < high)
          reading.ref[h] += query_factors[start - s.first_query() + row_of(h)];
      if (p.flags & WALK_NEAR) s.read_near(reading, start, low, high);
      // results go through shared memory, so that whole rows are written to global memory
      float *const staged = (float *)s.values(), *const totals = s.far_bias(), *const refs = s.references();
      float *const others = s.pair_bias();
      __syncthreads();
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float den = quad_sum(reading.den[h]);
        if (lane_of() % 4 == 0) totals[row_of(h)] = den, refs[row_of(h)] = reading.ref[h];
#pragma unroll
        for (int c = 0; c < E / 8; c++)
#pragma unroll
          for (int i = 0; i < 2; i++) staged[row_of(h) * (E + 8) + column_of(c, i)] = reading.num[c][2 * h + i];
      }
      __syncthreads();
      const int r = threadIdx.x;
      const View<float> partial = s.template array<float>(Start::PARTIAL, p.partial_sums);
      if (r >= low && r < high) {  // the factors of a row's sums, and of those of an earlier launch
        const i64 i = start - s.first_query() + r;
        float den = totals[r], ref = refs[r], mine = 1, other = 0;
        if (p.flags & WALK_LOAD) {
          const float before = partial.at(i, p.e + 1), top = larger(ref, before);
          mine = exp2_of(ref - safe(top));
          other = exp2_of(before - safe(top));
          den = den * mine + partial.at(i, p.e) * other;
          ref = top;
        }
        const float by = p.flags & WALK_STORE ? 1.0f : den == 0 ? 0.0f : 1.0f / den;
        totals[r] = mine * by;
        others[r] = other * by;
        if (s.e_first() == 0) {
          if (p.flags & WALK_STORE) partial.at(i, p.e) = den, partial.at(i, p.e + 1) = ref;
          else if (p.stats.start) {
            const View<float> stats = s.template array<float>(Start::STATS, p.stats);
            stats.at(i, 0) = by;
            stats.at(i, 1) = safe(ref) * LN_2;
          }
        }
      }
      __syncthreads();
      const View<T> out = s.template array<T>(Start::OUT, p.out);
      if (!(p.flags & (WALK_LOAD | WALK_STORE)) && in_pieces<T>(p.out, p.e)) {
        constexpr int N = ITEMS<T>;
#pragma unroll 1
        for (int t = threadIdx.x; t < high * (E / N); t += THREADS) {
          const int row = t / (E / N), column = t % (E / N) * N;
          if (row < low || s.e_first() + column >= p.e) continue;
          float x[N];
#pragma unroll
          for (int i = 0; i < N; i++) x[i] = staged[row * (E + 8) + column + i] * totals[row];
          store_piece(&out.at(start - s.first_query() + row, s.e_first() + column), x);
        }
        continue;
      }
#pragma unroll 1
      for (int t = threadIdx.x; t < high * E; t += THREADS) {
        const int row = t / E;
        const i64 i = start - s.first_query() + row;
        const int column = s.e_first() + t % E;
        if (row < low || column >= p.e) continue;
        float x = staged[row * (E + 8) + t % E] * totals[row];
        if (p.flags & WALK_LOAD) x += partial.at(i, column) * others[row];
        if (p.flags & WALK_STORE) partial.at(i, column) = x;
        else put(&out.at(i, column), x);
      }
    }
  }
  // computed again, because registers are scarce in the loop
  if (p.kv_out.start && again((int)blockIdx.x) / ((int)p.padded_e / E) % (int)p.segments == (int)p.segments - 1) {
    const View<float> kv = s.template array<float>(Start::KV_OUT, p.kv_out);
    const View<float> z = s.template array<float>(Start::Z_OUT, p.z_out), c = s.template array<float>(Start::C_OUT, p.c_out);
    const View<float> kv_low = s.template array<float>(Start::KV_LOW_OUT, p.kv_low_out);
    const View<float> z_low = s.template array<float>(Start::Z_LOW_OUT, p.z_low_out);
    for (int t = again(threadIdx.x); t < p.m * E; t += THREADS) {
      const int r = t / E, column = s.e_first() + t % E;
      if (column >= p.e) continue;
      kv.at(r, column) = s.state()[layout.at(r, t % E)];
      kv_low.at(r, column) = s.state()[layout.at(r, t % E) + Layout::LOW];
    }
    for (int r = threadIdx.x; r < p.m && s.e_first() == 0; r += THREADS) {
      z.at(0, r) = s.state()[layout.z(r)];
      z_low.at(0, r) = s.state()[layout.z_low(r)];
      c.at(0, r) = s.state()[layout.c(r)] * LN_2;
    }
  }
}

}  // namespace favorsharp
