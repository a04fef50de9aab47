// A walk along the positions of a segment, for causal_attention.cu. The queries of a tile read the sums of the keys
// before it. Keys enter the sums when no later query needs to score them exactly: without a window, the tile's own keys
// enter; with a window, keys that lie two blocks back (ahead, in reverse). If there is no window, or a tile has several
// blocks, each row may see only some of the entering keys, and reads these pair by pair, through features. Near blocks
// are scored exactly.
namespace favorsharp {

constexpr float SMALLEST_TOTAL = 8.673617379884035e-19f;  // 2^-60

template <class T, int E> struct Walk {
  static constexpr int P = PLANES<T>;
  const Problem &p;
  u16 *shared;
  int turn;  // 0 or 1: which of two places in global memory holds the sums

  // Places in shared memory. They are computed where they are used, because registers are scarce.
  static constexpr int VALUE = P * TILE * (E + 8);
  DEVICE int size() const { return (int)p.padded_d; }                      // of a point, padded
  DEVICE int plane() const { return TILE * ((int)p.padded_d + 8); }  // number of halves in a plane of points
  DEVICE int point_planes() const { return AS_THEY_ARE<T> && p.window == 0 ? 1 : 2; }  // near keys are always split
  DEVICE u16 *queries() const { return shared; }
  DEVICE u16 *keys() const { return shared + point_planes() * plane(); }
  DEVICE u16 *key_rows() const { return shared + 2 * point_planes() * plane(); }
  DEVICE u16 *query_rows() const { return key_rows() + (single() ? 0 : 2) * plane(); }
  DEVICE u16 *values() const { return query_rows() + 2 * plane(); }
  DEVICE u16 *sums() const { return values() + VALUE; }
  DEVICE u16 *features() const { return values() + 2 * VALUE; }
  DEVICE float *numbers(int i) const { return (float *)(values() + 2 * VALUE + P * TILE * (TILE + 8)) + i * TILE; }
  DEVICE float *query_unscale() const { return numbers(0); }
  DEVICE float *key_unscale() const { return numbers(1); }
  DEVICE float *key_bias() const { return numbers(2); }
  DEVICE float *far_bias() const { return numbers(3); }
  DEVICE float *references() const { return numbers(4); }
  DEVICE float *pair_bias() const { return numbers(5); }
  DEVICE float *squares() const { return numbers(6); }
  DEVICE float *odd_keys() const { return numbers(7); }
  DEVICE int *key_block() const { return (int *)numbers(8); }
  DEVICE float *votes() const { return numbers(9); }
  DEVICE u32 *visible() const { return (u32 *)numbers(9) + 4; }  // two words with a bit for each key that is not hidden
  // Numbers that each tile needs a few times. In shared memory they take no registers while a tile is processed.
  DEVICE int *kept() const { return (int *)numbers(9) + 8; }
  DEVICE int shift() const { return kept()[0]; }
  DEVICE int limit() const { return kept()[1]; }
  DEVICE int first_query() const { return kept()[2]; }
  DEVICE int begin() const { return kept()[3]; }   // of the segment
  DEVICE int end() const { return kept()[4]; }
  DEVICE int length() const { return kept()[5]; }  // of a tile
  DEVICE int unit() const { return kept()[6]; }    // one or several tiles, at whose ends keys may enter
  DEVICE int window() const { return kept()[7]; }
  DEVICE int e_first() const { return kept()[8]; }  // the first column of the values
  DEVICE i64 *scratch() const { return (i64 *)kept() + 5; }
  // The sums (`Layout`), before and after the entering keys.
  DEVICE float *state() const { return global((float *)scratch()[0]) + turn * layout().size(); }
  DEVICE float *next() const { return global((float *)scratch()[0]) + (1 - turn) * layout().size(); }
  // The addresses of this head's arrays, from one of them on.
  DEVICE i64 *starts(Start first = Start::Q) const { return (i64 *)(numbers(9) + 20) + (int)first; }

  template <class X> DEVICE View<X> array(Start which, const Array &x) const {
    return {global((X *)starts(which)[0]), x.row, x.column};
  }
  DEVICE View<const T> q() const { return array<const T>(Start::Q, p.q); }
  DEVICE View<const T> k() const { return array<const T>(Start::K, p.k); }
  DEVICE View<const T> v() const { return array<const T>(Start::V, p.v); }
  DEVICE SideView side(Start which) const {
    return {global((const float *)starts(which)[0]), global((const u16 *)starts(which)[1]), size(), columns_of<T>(p)};
  }
  DEVICE SideView query() const { return side(Start::QUERY); }
  DEVICE SideView key() const { return side(Start::KEY); }
  DEVICE const float *factors() const { return global((const float *)starts(Start::KEY_FACTORS)[0]); }
  DEVICE auto hidden() const {
    const float *const of_keys = factors();
    return [of_keys](int i) { return of_keys[i] == -INFINITY_F; };
  }

  DEVICE Layout layout() const { return {(int)p.m_pad, E}; }
  DEVICE bool single() const { return p.stages == 1; }
  DEVICE int block_length() const { return p.window ? (int)p.window : 1; }

  // Whether `mine` is true in any thread of the block. This is also a barrier. Callers need another barrier between two
  // calls.
  DEVICE bool any(bool mine) {
    mine = __any_sync(WHOLE_WARP, mine);
    if (lane_of() == 0) votes()[warp_of()] = mine;
    __syncthreads();
    return votes()[0] + votes()[1] + votes()[2] + votes()[3] > 0;
  }

  // Load points as they are, or centred and split, whose scaling `unscale` receives.
  DEVICE void load(const View<const T> &x, const Array &of, int first, int low, int high, const SideView &side, u16 *to,
                   float *unscale) {
    const bool whole = in_pieces<T>(of, p.d);
    if constexpr (AS_THEY_ARE<T>) {
      copy_points(x, whole, first, low, high, (int)p.d, to, size());
    } else {
      load_points(x, whole, first, low, high, (int)p.d, side.root(), side.center(), to, size(), unscale);
    }
  }
  DEVICE void load_queries(int first, int low, int high) {
    load(q(), p.q, first, low, high, query(), queries(), query_unscale());
  }

  // Load keys first + low .. first + high as the entering tile. Returns whether one of them is not finite.
  DEVICE bool load_keys(int first, int low, int high) {
    __syncthreads();
    load(k(), p.k, first, low, high, key(), keys(), key_unscale());
    bool odd = load_values<T, E>(v(), in_pieces<T>(p.v, p.e), first, low, high, e_first(), p.e, hidden(), values(), nullptr);
    const int r = threadIdx.x;
    if (r < TILE) {
      key_bias()[r] = r >= low && r < high ? factors()[first + r] : -INFINITY_F;
      odd |= key_bias()[r] != key_bias()[r];
      if (p.window) key_block()[r] = r / block_length();
      const u32 seen = __ballot_sync(WHOLE_WARP, key_bias()[r] != -INFINITY_F);
      if (lane_of() == 0) visible()[warp_of()] = seen;
    }
    return any(odd);
  }

  // Go through all tiles of features: the keys in shared memory enter the sums, and the queries read the sums as they
  // were before.
  DEVICE void sweep(bool enters, bool reads, Reading<E> &far, float (&pairs)[LANE_COLUMNS][4], float (&pair_ref)[2]) {
    const int tiles = (int)p.m_pad / TILE;
#pragma unroll 1
    for (int tile = 0; tile < tiles; tile++) {
      if (reads && !single()) copy_rows_of(query(), tile, query_rows());
      float weights[LANE_COLUMNS][4], top[2];
      if (enters) {
        if (single() || tile == 0 || !reads) {
          copy_rows_of(key(), tile, key_rows());
          wait_copies<0>();
        } else {
          wait_copies<1>();
        }
        __syncthreads();
        weigh_keys(weights, top);
      } else {  // otherwise the compiler keeps their earlier values in registers
        top[0] = top[1] = -INFINITY_F;
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) weights[n][i] = 0;
      }
      float z[2], c[2], column[2], key_column[2];  // both columns are equal if points are centred
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int r = tile * TILE + row_of(h);
        z[h] = state()[layout().z(r)];
        c[h] = state()[layout().c(r)];
        column[h] = query().column()[r];
        key_column[h] = AS_THEY_ARE<T> ? key().column()[r] : column[h];
      }
      if (reads) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = row_of(h);
          if (P == 2 || !enters) {  // otherwise `enter` writes the sums to shared memory, because it loads them
#pragma unroll
            for (int n = 0; n < E / 8; n++)
              {
              const float2 own = *(const float2 *)(state() + layout().at(again(tile) * TILE + r, column_of(n, 0)));
              put_sums(r, n, own.x, own.y);
            }
          }
          if (lane_of() % 4 == 0) {
            put_z<P>(sums() + r * (E + 8) + E, TILE * (E + 8), z[h]);
            far_bias()[r] = c[h] + column[h];
            pair_bias()[r] = enters ? top[h] + (column[h] + key_column[h]) : -INFINITY_F;
          }
        }
      }
      if (enters) enter(tile, weights, top, z, c, key_column);
      if (reads) {
        if (single()) {
          if (enters) __syncthreads();
          copy_rows_of(query(), tile, query_rows());
        }
        wait_copies<0>();
        __syncthreads();
        if (enters && !single() && tile + 1 < tiles) copy_rows_of(key(), tile + 1, key_rows());
        float dots[LANE_COLUMNS][4];
        multiply_queries<T>(dots, queries(), query_rows(), size());
        if (!AS_THEY_ARE<T>) {
          const float unscale = query().unscale();
          const float back[2] = {query_unscale()[row_of(0)] * unscale, query_unscale()[row_of(1)] * unscale};
#pragma unroll
          for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
            for (int i = 0; i < 4; i++) dots[n][i] *= back[i / 2];
        }
        if (enters) read_pairs(dots, pairs, pair_ref);
        read_sums(dots, far);
      }
      __syncthreads();
    }
  }

  DEVICE void copy_rows_of(const SideView &side, int tile, u16 *to) {
    copy_tile(to, side.planes, tile, size());
    commit_copies();
  }

  // Two entries of the sums, as the queries read them.
  DEVICE void put_sums(int row, int n, float x, float y) {
    const float pair[2] = {x, y};
    put_pieces<P>(sums() + row * (E + 8) + column_of(n, 0), TILE * (E + 8), pair);
  }

  // Log features of keys without the column of the map. Rows are features.
  DEVICE void log_keys(float (&log)[LANE_COLUMNS][4]) {
    multiply_keys<T>(log, key_rows(), keys(), size());
    const float back = AS_THEY_ARE<T> ? 1.0f : key().unscale();
    const bool all_visible = (visible()[0] & visible()[1]) == ~0u;
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int j = column_of(n, i % 2);
        if (!AS_THEY_ARE<T>) log[n][i] *= back * key_unscale()[j];
        log[n][i] += key_bias()[j];
      }
    if (all_visible) return;
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (key_bias()[column_of(n, i % 2)] == -INFINITY_F) log[n][i] = -INFINITY_F;  // of keys that are hidden
  }

  // Key features relative to the largest key of the tile, for each feature. They are also written to shared memory.
  DEVICE void weigh_keys(float (&weights)[LANE_COLUMNS][4], float (&top)[2]) {
    float old[2];
    log_keys(weights);
    top[0] = top[1] = -INFINITY_F;
    weigh(weights, top, old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float pair[2] = {weights[n][2 * h], weights[n][2 * h + 1]};
        put_pieces<P>(features() + row_of(h) * (TILE + 8) + column_of(n, 0), TILE * (TILE + 8), pair);
      }
  }

  // Write the sums of 64 features, with the entering keys, to `next()`.
  DEVICE void enter(int tile, float (&weights)[LANE_COLUMNS][4], const float (&top)[2], const float (&z)[2],
                    const float (&c)[2], const float (&column)[2]) {
    const Layout at = layout();
    const float *const before = state();
    float *const after = next();
    float old[2], now[2], all[2], sum[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      all[h] = larger(c[h], top[h] + column[h]);
      old[h] = exp2_of(c[h] - safe(all[h]));
      now[h] = exp2_of(top[h] + column[h] - safe(all[h]));
    }
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) weights[n][i] *= now[i / 2];
    const LeftFactor<P> factor(weights);
#pragma unroll
    for (int n = 0; n < E / 8; n += 2) {
      float product[2][4];
      multiply_values<P, E>(product, factor, values(), n);
#pragma unroll
      for (int i = 0; i < 2; i++)
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int place = at.at(tile * TILE + row_of(h), column_of(n + i, 0));
          float4 own = *(const float4 *)(before + place);
          if (P == 1) put_sums(row_of(h), n + i, own.x, own.y);  // if no query reads them, this does no harm
          add_to(own, old[h], product[i][2 * h], product[i][2 * h + 1]);
          *(float4 *)(after + place) = own;
        }
    }
    multiply_last<P, E>(sum, factor, values());
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const int r = tile * TILE + row_of(h);
      if (lane_of() % 4 == 0) {
        float total = z[h] * old[h], low = before[at.z_low(r)] * old[h];
        add_to(total, low, sum[h]);
        after[at.z(r)] = total;
        after[at.z_low(r)] = low;
        after[at.c(r)] = all[h];
      }
    }
  }

  DEVICE void read_pairs(const float (&dots)[LANE_COLUMNS][4], float (&pairs)[LANE_COLUMNS][4], float (&pair_ref)[2]) {
    float log[LANE_COLUMNS][4], old[2];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) log[n][i] = dots[n][i] + pair_bias()[column_of(n, i % 2)];
    weigh(log, pair_ref, old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[n][i] *= old[i / 2];
    accumulate_values<P, TILE>(pairs, log, features());
  }

  DEVICE void read_sums(float (&log)[LANE_COLUMNS][4], Reading<E> &far) {
    float old[2];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) log[n][i] += far_bias()[column_of(n, i % 2)];
    weigh(log, far.ref, old);
    far.scale(old);
    add_values<P, E>(far, log, sums());
  }

  // Whether a row of the tile may read an entering key through features.
  DEVICE bool sees(int row, int j) const {
    const int own = row / block_length(), block = key_block()[j];
    return key_bias()[j] != -INFINITY_F && (p.reverse ? block >= own : block <= own);
  }

  // Keep the weights of the pairs that rows may see, 0 for others; and whether a row may see a key. With a window,
  DEVICE void keep_of_blocks(float (&pairs)[LANE_COLUMNS][4], bool (&seen)[2]) {
    seen[0] = seen[1] = false;
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool visible = sees(row_of(i / 2), column_of(n, i % 2));
        seen[i / 2] |= visible;
        if (!visible) pairs[n][i] = 0;
      }
#pragma unroll
    for (int h = 0; h < 2; h++) seen[h] = quad_max(seen[h] ? 1.0f : 0.0f) > 0;
  }
  // and without one, where hidden keys have no weight.
  DEVICE void keep_earlier(float (&pairs)[LANE_COLUMNS][4], bool (&seen)[2]) {
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        if (column_of(n, i % 2) > row_of(i / 2)) pairs[n][i] = 0;
#pragma unroll
    for (int h = 0; h < 2; h++) {  // is one of the bits 0 .. row set?
      const int r = row_of(h);
      seen[h] = visible()[0] << max(31 - r, 0) || (r >= 32 && visible()[1] << (63 - r));
    }
  }

  // Add to what each row has read the pairs that it may see. Returns false if that would be inaccurate: if a row's
  // weights are tiny compared with the weight of a key that it does not see, or if something is not finite.
  DEVICE bool merge_pairs(Reading<E> &far, float (&pairs)[LANE_COLUMNS][4], float (&pair_ref)[2], bool odd, int rows_low,
                          int rows_high) {
    bool doubtful = odd;
    float share[2], old[2], now[2];
    bool seen[2];
    if (p.window) keep_of_blocks(pairs, seen);
    else keep_earlier(pairs, seen);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool any_seen = seen[h];
      share[h] = 0;
#pragma unroll
      for (int n = 0; n < LANE_COLUMNS; n++) share[h] += pairs[n][2 * h] + pairs[n][2 * h + 1];
      const float ref = any_seen ? pair_ref[h] : -INFINITY_F, top = larger(far.ref[h], ref);
      old[h] = exp2_of(far.ref[h] - safe(top));
      now[h] = exp2_of(ref - safe(top));
      const float total = quad_sum(far.den[h] * old[h] + share[h] * now[h]);
      doubtful |= any_seen && total < SMALLEST_TOTAL && row_of(h) >= rows_low && row_of(h) < rows_high;
      far.ref[h] = top;
    }
    far.scale(old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[n][i] *= now[i / 2];
    add_values<P, E>(far, pairs, values());
    return !any(doubtful);
  }

  // Whether a row of a block sees key j of a tile that begins `ahead` positions after the rows' tile.
  DEVICE bool sees_near(int row, int block, int j, int ahead) const {
    const int apart = key_block()[j] - block;
    return key_bias()[j] != -INFINITY_F && apart >= -NEIGHBOURS && apart <= NEIGHBOURS && !(p.causal && ahead + j > row);
  }

  // Score the keys of the rows' own block and of its neighbours exactly. `start` is the first position of the rows'
  // tile.
  DEVICE void read_near(Reading<E> &reading, int start, int low, int high) {
    const int w = (int)p.window, first_block = start / w, last_block = (start + high - 1) / w;
    const int from = max((first_block - NEIGHBOURS) * w, 0);
    const int to = (int)min((i64)(last_block + 1 + (p.causal ? 0 : NEIGHBOURS)) * w, p.num_keys);
    load_points(q(), in_pieces<T>(p.q, p.d), start - (int)p.first_query, low, high, (int)p.d, query().root(),
                query().near_center(), queries(), size(), query_unscale(), squares());
    __syncwarp();
    float back[2], norm[2];
    int block[2];  // counted from the block of the first row
#pragma unroll
    for (int h = 0; h < 2; h++) {
      block[h] = (start - first_block * w + row_of(h)) / w;
      back[h] = query_unscale()[row_of(h)] * query().near_unscale();
      norm[h] = p.gaussian ? 0.5f * query().near_unscale() * squares()[row_of(h)] : 0.0f;
    }
#pragma unroll 1
    for (int first = from; first < to; first += TILE) {
      const int count = min(to - first, TILE), r = threadIdx.x;
      __syncthreads();
      load_points(k(), in_pieces<T>(p.k, p.d), first, 0, count, (int)p.d, key().root(), key().near_center(), keys(), size(),
                  key_unscale(), squares());
      const bool whole = in_pieces<T>(p.v, p.e);
      const bool odd = load_values<T, E>(v(), whole, first, 0, count, e_first(), p.e, hidden(), values(), odd_keys());
      if (r < TILE) {  // load_values has a barrier, so the squares are there
        key_bias()[r] = p.gaussian ? -0.5f * query().near_unscale() * squares()[r] : 0.0f;
        if (r >= count || factors()[first + r] == -INFINITY_F) key_bias()[r] = -INFINITY_F;
        else key_bias()[r] = number_or_nan(key_bias()[r]);
        key_block()[r] = (first + r) / w - first_block;
      }
      const bool some_odd = any(odd);
      float log[LANE_COLUMNS][4], old[2];
      multiply_points(log, queries(), keys(), size());
#pragma unroll
      for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int j = column_of(n, i % 2);
          const bool seen = sees_near(row_of(i / 2), block[i / 2], j, first - start);
          const float dot = log[n][i] * (back[i / 2] * key_unscale()[j]) + key_bias()[j] - norm[i / 2];
          log[n][i] = seen ? number_or_nan(dot) : -INFINITY_F;
        }
      weigh(log, reading.ref, old);
      reading.scale(old);
      add_values<P, E>(reading, log, values());
      if (some_odd) spoil(reading, block, first, first - start, count);
    }
  }

  // Values that are not finite, which the planes hold as 0, make NaN of the rows that see them, and of no others.
  DEVICE void spoil(Reading<E> &reading, const int (&block)[2], int first, int ahead, int count) {
    __syncthreads();
#pragma unroll 1
    for (int t = threadIdx.x; t < count * E; t += THREADS) {
      const int column = e_first() + t % E;
      const float x = column < p.e ? widened(v().at(first + t / E, column)) : 0.0f;
      values()[t / E * (E + 8) + t % E] = to_bfloat16(x - x).bits;
    }
    __syncthreads();
#pragma unroll 1
    for (int j = 0; j < count; j++) {
      if (odd_keys()[j] == 0) continue;
#pragma unroll
      for (int h = 0; h < 2; h++) {
        if (!sees_near(row_of(h), block[h], j, ahead)) continue;
#pragma unroll
        for (int n = 0; n < E / 8; n++)
#pragma unroll
          for (int i = 0; i < 2; i++)
            reading.num[n][2 * h + i] += to_float(bfloat16{values()[j * (E + 8) + column_of(n, i)]});
      }
    }
  }
};

}  // namespace favorsharp
