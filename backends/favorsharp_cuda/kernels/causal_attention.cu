// A walk along the positions of a segment. Queries of a tile read the sums of the keys before it; keys enter the sums when
// no later query has them near. Without a window a tile's own keys enter with it; with one, keys that lie two blocks back
// (ahead, in reverse). Where a tile has several blocks, or none, each row reads its part of the entering keys pair by pair,
// through features. Near blocks are scored exactly.
namespace favorsharp {

enum WalkFlags { WALK_LOAD = 1, WALK_STORE = 2, WALK_NEAR = 4 };
constexpr int TABLE = TILE + 1, GROUP = 16, GROUP_ROW = GROUP + 1;
constexpr int CAREFUL_BYTES = 4 * TILE * (TABLE + GROUP_ROW);
constexpr float SMALLEST_TOTAL = 8.673617379884035e-19f;  // 2^-60

template <class T, int E> struct Walk {
  static constexpr int P = PLANES<T>;
  const Problem &p;
  SideView query, key;
  View<const T> q, k, v;
  const float *factors;
  int D;
  i64 e_first;
  // shared memory
  u16 *queries, *keys, *key_rows, *query_rows, *values, *sums, *features;
  float *table, *query_unscale, *key_unscale, *key_bias, *far_bias, *far_z, *pair_bias, *squares, *votes;
  float *state;  // of this walk, in global memory: S (m_pad, E), z, c

  DEVICE bool single() const { return p.stages == 1; }
  DEVICE int block_length() const { return p.window ? (int)p.window : 1; }

  // Whether any thread of the block says so; also a barrier.
  DEVICE bool any(bool mine) {
    mine = __any_sync(WHOLE_WARP, mine);
    __syncthreads();
    if (lane_of() == 0) votes[warp_of()] = mine;
    __syncthreads();
    return votes[0] + votes[1] + votes[2] + votes[3] > 0;
  }

  // Load keys first + low .. first + high as the entering tile; whether one of them is not finite.
  DEVICE bool load_keys(i64 first, int low, int high) {
    __syncthreads();
    load_points(k, first, low, high, (int)p.d, key.root(), key.center(), keys, D, key_unscale);
    bool odd = load_values<T, E>(v, first, low, high, e_first, p.e, factors, values);
    const int r = threadIdx.x;
    if (r < TILE) {
      key_bias[r] = r >= low && r < high ? factors[first + r] : -INFINITY_F;
      odd |= key_bias[r] != key_bias[r];
    }
    return any(odd);
  }

  // Every tile of features once: the keys in shared memory enter the sums, the queries read them as they were before.
  DEVICE void sweep(bool enters, bool reads, Reading<E> &far, float (&pairs)[LANE_COLUMNS][4], float (&pair_ref)[2]) {
    const i64 tiles = p.m_pad / TILE;
    float back[2] = {0, 0};
    if (reads) back[0] = query_unscale[row_of(0)] * query.unscale(), back[1] = query_unscale[row_of(1)] * query.unscale();
    for (i64 tile = 0; tile < tiles; tile++) {
      if (reads && !single()) copy_rows_of(query, tile, query_rows);
      float weights[LANE_COLUMNS][4], top[2], z_own[2] = {0, 0};
      if (enters) {
        if (single() || tile == 0 || !reads) {
          copy_rows_of(key, tile, key_rows);
          wait_copies<0>();
        } else {
          wait_copies<1>();
        }
        __syncthreads();
        weigh_keys(weights, top, z_own);
      }
      float own[E / 8][4], z[2], c[2], column[2];
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const i64 r = tile * TILE + row_of(h);
        z[h] = state[p.m_pad * E + r];
        c[h] = state[p.m_pad * (E + 1) + r];
        column[h] = query.column()[r];
#pragma unroll
        for (int n = 0; n < E / 8; n++) {
          const float2 x = *(const float2 *)(state + r * E + column_of(n, 0));
          own[n][2 * h] = x.x;
          own[n][2 * h + 1] = x.y;
        }
      }
      if (reads) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          const int r = row_of(h);
#pragma unroll
          for (int n = 0; n < E / 8; n++)
#pragma unroll
            for (int i = 0; i < 2; i++)
              put_planes<P>(sums + r * (E + 8) + column_of(n, i), TILE * (E + 8), own[n][2 * h + i]);
          if (lane_of() % 4 == 0) {
            far_bias[r] = c[h] + column[h];
            far_z[r] = z[h];
            pair_bias[r] = enters ? top[h] + 2 * column[h] : -INFINITY_F;
          }
        }
      }
      if (enters) enter(tile, weights, top, z_own, own, z, c, column);
      if (reads) {
        if (single()) {
          if (enters) __syncthreads();
          copy_rows_of(query, tile, query_rows);
        }
        wait_copies<0>();
        __syncthreads();
        if (enters && !single() && tile + 1 < tiles) copy_rows_of(key, tile + 1, key_rows);
        float dots[LANE_COLUMNS][4];
        multiply_points(dots, queries, query_rows, D);
        if (enters) read_pairs(dots, back, pairs, pair_ref);
        read_sums(dots, back, far);
      }
      __syncthreads();
    }
  }

  DEVICE void copy_rows_of(const SideView &side, i64 tile, u16 *to) {
    copy_side(to, side, tile * TILE, p.plane_rows);
    commit_copies();
  }

  // log features of keys without their column: rows are features
  DEVICE void log_keys(float (&log)[LANE_COLUMNS][4]) {
    multiply_points(log, key_rows, keys, D);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const int j = column_of(n, i % 2);
        log[n][i] = key_bias[j] == -INFINITY_F ? key_bias[j] : log[n][i] * (key.unscale() * key_unscale[j]) + key_bias[j];
      }
  }

  // Key features relative to their largest in the tile, also to shared memory.
  DEVICE void weigh_keys(float (&weights)[LANE_COLUMNS][4], float (&top)[2], float (&z)[2]) {
    float old[2];
    log_keys(weights);
    top[0] = top[1] = -INFINITY_F;
    weigh(weights, top, old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        z[i / 2] += weights[n][i];
        put_planes<P>(features + row_of(i / 2) * (TILE + 8) + column_of(n, i % 2), TILE * (TILE + 8), weights[n][i]);
      }
    z[0] = quad_sum(z[0]);
    z[1] = quad_sum(z[1]);
  }

  // The state's sums of 64 features with the keys taken in.
  DEVICE void enter(i64 tile, float (&weights)[LANE_COLUMNS][4], const float (&top)[2], const float (&z_own)[2],
                    float (&own)[E / 8][4], const float (&z)[2], const float (&c)[2], const float (&column)[2]) {
    __syncwarp();  // z and c have been read by all four lanes of a row
    float old[2], now[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const i64 r = tile * TILE + row_of(h);
      const float all = larger(c[h], top[h] + column[h]);
      old[h] = exp2_of(c[h] - safe(all));
      now[h] = exp2_of(top[h] + column[h] - safe(all));
      if (lane_of() % 4 == 0) {
        state[p.m_pad * E + r] = z[h] * old[h] + z_own[h] * now[h];
        state[p.m_pad * (E + 1) + r] = all;
      }
    }
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) own[n][i] *= old[i / 2];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) weights[n][i] *= now[i / 2];
    multiply_values<P, E>(own, weights, values);
#pragma unroll
    for (int h = 0; h < 2; h++)
#pragma unroll
      for (int n = 0; n < E / 8; n++)
        *(float2 *)(state + (tile * TILE + row_of(h)) * E + column_of(n, 0)) =
            make_float2(own[n][2 * h], own[n][2 * h + 1]);
  }

  DEVICE void read_pairs(const float (&dots)[LANE_COLUMNS][4], const float (&back)[2], float (&pairs)[LANE_COLUMNS][4],
                         float (&pair_ref)[2]) {
    float log[LANE_COLUMNS][4], old[2];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) log[n][i] = dots[n][i] * back[i / 2] + pair_bias[column_of(n, i % 2)];
    weigh(log, pair_ref, old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[n][i] *= old[i / 2];
    multiply_values<P, TILE>(pairs, log, features);
  }

  DEVICE void read_sums(float (&log)[LANE_COLUMNS][4], const float (&back)[2], Reading<E> &far) {
    float old[2];
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) log[n][i] = log[n][i] * back[i / 2] + far_bias[column_of(n, i % 2)];
    weigh(log, far.ref, old);
    far.scale(old);
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) far.den[i / 2] += log[n][i] * far_z[column_of(n, i % 2)];
    multiply_values<P, E>(far.num, log, sums);
  }

  // Whether a row of the tile may read an entering key through features.
  DEVICE bool sees(int row, int j) const {
    const int a = row / block_length(), b = j / block_length();
    return key_bias[j] != -INFINITY_F && (p.reverse ? b >= a : b <= a);
  }

  // Take the pairs that each row may see into its reading.
  DEVICE void merge_pairs(Reading<E> &far, float (&pairs)[LANE_COLUMNS][4], float (&pair_ref)[2], bool odd, int rows_low,
                          int rows_high) {
    bool doubtful = odd;
    float share[2] = {0, 0}, old[2], now[2];
    bool seen[2] = {false, false};
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const bool visible = sees(row_of(i / 2), column_of(n, i % 2));
        seen[i / 2] |= visible;
        if (!visible) pairs[n][i] = 0;
        share[i / 2] += pairs[n][i];
      }
#pragma unroll
    for (int h = 0; h < 2; h++) {
      const bool any_seen = quad_max(seen[h] ? 1.0f : 0.0f) > 0;
      const float ref = any_seen ? pair_ref[h] : -INFINITY_F, top = larger(far.ref[h], ref);
      old[h] = exp2_of(far.ref[h] - safe(top));
      now[h] = exp2_of(ref - safe(top));
      const float total = quad_sum(far.den[h] * old[h] + share[h] * now[h]);
      doubtful |= any_seen && total < SMALLEST_TOTAL && row_of(h) >= rows_low && row_of(h) < rows_high;
      pair_ref[h] = top;
    }
    if (any(doubtful)) {
      read_carefully(far);
      return;
    }
    far.scale(old);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      far.ref[h] = pair_ref[h];
      far.den[h] += share[h] * now[h];
    }
#pragma unroll
    for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
      for (int i = 0; i < 4; i++) pairs[n][i] *= now[i / 2];
    multiply_values<P, E>(far.num, pairs, values);
  }

  DEVICE float value(int j, int column) const {
    const bfloat16 high = {values[j * (E + 8) + column]};
    if (P == 1) return to_float(high);
    const bfloat16 low = {values[(TILE + j) * (E + 8) + column]};
    return to_float(high) + to_float(low);
  }

  // num += weights (64, `count`) values, where a negative weight stands for a key that the row may not see: a value that
  // is not finite must not reach it.
  DEVICE void add_carefully(Reading<E> &reading, const float *weights, int pitch, int first, int count) {
#pragma unroll
    for (int n = 0; n < E / 8; n++)
#pragma unroll
      for (int i = 0; i < 4; i++)
        for (int j = 0; j < count; j++) {
          const float weight = weights[row_of(i / 2) * pitch + j];
          if (!(weight < 0)) reading.num[n][i] += weight * value(first + j, column_of(n, i % 2));
        }
  }

  // As merge_pairs, but each pair under a maximum of its own, and pair by pair.
  DEVICE void read_carefully(Reading<E> &far) {
    float *logs = table, *group_logs = table + TILE * TABLE;
    const int row = threadIdx.x / 2, mine = threadIdx.x % 2 * (GROUP / 2);
    for (int group = 0; group < TILE / GROUP; group++) {
      float top[GROUP / 2], total[GROUP / 2];
#pragma unroll
      for (int j = 0; j < GROUP / 2; j++) top[j] = -INFINITY_F, total[j] = 0;
      for (i64 tile = 0; tile < p.m_pad / TILE; tile++) {
        float log[LANE_COLUMNS][4];
        __syncthreads();
        copy_rows_of(key, tile, key_rows);
        wait_copies<0>();
        __syncthreads();
        log_keys(log);
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int j = column_of(n, i % 2) - group * GROUP, r = row_of(i / 2);
            if (j >= 0 && j < GROUP) group_logs[r * GROUP_ROW + j] = log[n][i] + key.column()[tile * TILE + r];
          }
        __syncthreads();
        copy_rows_of(query, tile, key_rows);
        wait_copies<0>();
        __syncthreads();
        multiply_points(log, queries, key_rows, D);
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++) {
            const int r = row_of(i / 2), f = column_of(n, i % 2);
            logs[r * TABLE + f] = log[n][i] * (query_unscale[r] * query.unscale()) + query.column()[tile * TILE + f];
          }
        __syncthreads();
#pragma unroll
        for (int j = 0; j < GROUP / 2; j++) {
          float best = top[j], sum = 0;
          for (int f = 0; f < TILE; f++)
            best = larger(best, logs[row * TABLE + f] + group_logs[f * GROUP_ROW + mine + j]);
          for (int f = 0; f < TILE; f++)
            sum += exp2_of(logs[row * TABLE + f] + group_logs[f * GROUP_ROW + mine + j] - safe(best));
          total[j] = total[j] * exp2_of(top[j] - safe(best)) + sum;
          top[j] = best;
        }
      }
      __syncthreads();
#pragma unroll
      for (int j = 0; j < GROUP / 2; j++) {  // log weights of the group's pairs; +inf where a row may not see the key
        const bool visible = sees(row, group * GROUP + mine + j);
        group_logs[row * GROUP_ROW + mine + j] = visible ? top[j] + log2f(total[j]) : INFINITY_F;
      }
      __syncthreads();
      float old[2], share[2] = {0, 0};
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const float *log = group_logs + row_of(h) * GROUP_ROW;
        float ref = far.ref[h];
        for (int j = 0; j < GROUP; j++)
          if (log[j] != INFINITY_F) ref = larger(ref, log[j]);
        old[h] = exp2_of(far.ref[h] - safe(ref));
        far.ref[h] = ref;
        for (int j = lane_of() % 4; j < GROUP; j += 4) {
          const float weight = log[j] == INFINITY_F ? -1.0f : exp2_of(log[j] - safe(ref));
          logs[row_of(h) * TABLE + j] = weight;
          if (!(weight < 0)) share[h] += weight;
        }
      }
      __syncwarp();
      far.scale(old);
      far.den[0] += share[0];
      far.den[1] += share[1];
      add_carefully(far, logs, TABLE, group * GROUP, GROUP);
    }
  }

  // Score the keys of the rows' own and neighbouring blocks exactly; the tile's first position is `start`.
  DEVICE void read_near(Reading<E> &reading, i64 start, int low, int high) {
    const i64 w = p.window, first_block = start / w, last_block = (start + high - 1) / w;
    const i64 from = max((first_block - 1) * w, (i64)0);
    const i64 to = min((last_block + (p.causal ? 1 : 2)) * w, p.num_keys);
    __syncthreads();
    load_points(q, start - p.first_query, low, high, (int)p.d, query.root(), query.near_center(), queries, D,
                query_unscale, squares);
    __syncwarp();
    float back[2], norm[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      back[h] = query_unscale[row_of(h)] * query.near_unscale();
      norm[h] = p.gaussian ? 0.5f * query.near_unscale() * squares[row_of(h)] : 0.0f;
    }
    for (i64 first = from; first < to; first += TILE) {
      const int count = (int)min(to - first, (i64)TILE), r = threadIdx.x;
      __syncthreads();
      load_points(k, first, 0, count, (int)p.d, key.root(), key.near_center(), keys, D, key_unscale, squares);
      const bool odd = load_values<T, E>(v, first, 0, count, e_first, p.e, factors, values);
      __syncthreads();
      if (r < TILE) {
        key_bias[r] = p.gaussian ? -0.5f * query.near_unscale() * squares[r] : 0.0f;
        if (r >= count || factors[first + r] == -INFINITY_F) key_bias[r] = -INFINITY_F;
        else key_bias[r] = number_or_nan(key_bias[r]);
      }
      const bool careful = any(odd);
      float log[LANE_COLUMNS][4], old[2];
      u32 visible = 0;
      multiply_points(log, queries, keys, D);
#pragma unroll
      for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int j = column_of(n, i % 2);
          const i64 row = start + row_of(i / 2), column = first + j, apart = column / w - row / w;
          const bool sees = key_bias[j] != -INFINITY_F && apart >= -1 && apart <= 1 && !(p.causal && column > row);
          if (sees) visible |= 1u << (4 * n + i);
          const float dot = log[n][i] * (back[i / 2] * key_unscale[j]) + key_bias[j] - norm[i / 2];
          log[n][i] = sees ? number_or_nan(dot) : -INFINITY_F;
        }
      weigh(log, reading.ref, old);
      reading.scale(old);
#pragma unroll
      for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
        for (int i = 0; i < 4; i++) reading.den[i / 2] += log[n][i];
      if (careful) {
#pragma unroll
        for (int n = 0; n < LANE_COLUMNS; n++)
#pragma unroll
          for (int i = 0; i < 4; i++)
            table[row_of(i / 2) * TABLE + column_of(n, i % 2)] = visible >> (4 * n + i) & 1 ? log[n][i] : -1.0f;
        __syncwarp();
        add_carefully(reading, table, TABLE, 0, TILE);
      } else {
        multiply_values<P, E>(reading.num, log, values);
      }
    }
  }
};

template <class T, int E> KERNEL(THREADS) walk(ARGUMENT Problem p) {
  typedef Walk<T, E> W;
  SHARED_MEMORY(raw);
  const int D = (int)p.padded_d, points = 2 * TILE * (D + 8), value = W::P * TILE * (E + 8);
  const i64 parts = p.padded_e / E, part = blockIdx.x % parts, number = blockIdx.x / parts;
  const i64 segment = number % p.segments, size = p.m_pad * (E + 2);
  i64 index[AXES];
  split_head(p, number / p.segments, index);
  u16 *at = (u16 *)raw;
  W s = {p, side_of(p, p.query, index), side_of(p, p.key, index), view<const T>(p.q, index), view<const T>(p.k, index),
         view<const T>(p.v, index), view<const float>(p.key_factors, index).start, D,
         part * E};
  s.queries = at, at += points;
  s.keys = at, at += points;
  s.key_rows = at, at += points;
  s.query_rows = s.single() ? s.key_rows : at, at += s.single() ? 0 : points;
  s.values = at, at += value;
  s.sums = at, s.features = at + value, s.table = (float *)at;
  constexpr int room = W::P * TILE * (E + 8 + TILE + 8);
  at += room > CAREFUL_BYTES / 2 ? room : CAREFUL_BYTES / 2;
  float *numbers = (float *)at;
  s.query_unscale = numbers, s.key_unscale = numbers + TILE, s.key_bias = numbers + 2 * TILE;
  s.far_bias = numbers + 3 * TILE, s.far_z = numbers + 4 * TILE, s.pair_bias = numbers + 5 * TILE;
  s.squares = numbers + 6 * TILE, s.votes = numbers + 7 * TILE;
  s.state = (float *)p.scratch + (i64)blockIdx.x * size;

  // the sums to go on from
  const float *before = p.sums ? sums_of(p, along(index, p.key_axis) * p.segments + segment) : nullptr;
  for (i64 t = threadIdx.x; t < p.m_pad * E; t += THREADS)
    s.state[t] = before ? before[t / E * p.padded_e + part * E + t % E] : 0.0f;
  for (i64 r = threadIdx.x; r < p.m_pad; r += THREADS) {
    s.state[p.m_pad * E + r] = before ? before[p.m_pad * p.padded_e + r] : 0.0f;
    s.state[p.m_pad * (E + 1) + r] = before ? before[p.m_pad * (p.padded_e + 1) + r] : -INFINITY_F;
  }
  __syncthreads();

  const i64 w = p.window, n = p.num_keys;
  const bool whole_blocks = w >= TILE;  // then a tile lies in one block, whose rows all read the same sums
  const int length = w == 0 ? TILE : whole_blocks ? TILE : (int)(TILE / w * w);
  const i64 unit = whole_blocks ? w : length, begin = segment * p.span, end = min(begin + p.span, n);
  const i64 units = end > begin ? (end - begin + unit - 1) / unit : 0;
  const View<T> out = view<T>(p.out, index);
  const View<float> partial = view<float>(p.partial_sums, index), stats = view<float>(p.stats, index);
  const float *query_factors = view<const float>(p.query_factors, index).start;
  for (i64 u = 0; u < units; u++) {
    const i64 unit_start = begin + (p.reverse ? units - 1 - u : u) * unit, unit_end = min(unit_start + unit, end);
    float pairs[LANE_COLUMNS][4], pair_ref[2];
    Reading<E> reading;
    if (whole_blocks) {
      const i64 low = max(unit_start - p.shift, (i64)0), high = min(unit_start - p.shift + w, p.limit);
      for (i64 first = low; first < high; first += TILE) {
        s.load_keys(first, 0, (int)min(high - first, (i64)TILE));
        s.sweep(true, false, reading, pairs, pair_ref);
      }
    }
    for (i64 start = unit_start; start < unit_end; start += length) {
      const int low = (int)min(max(p.first_query - start, (i64)0), (i64)TILE);
      const int high = (int)min(unit_end - start, (i64)length);
      bool enters = false, odd = false;
      if (!whole_blocks) {
        const i64 first = start - p.shift;
        const i64 keys_low = max(-first, (i64)0), keys_high = min(p.limit - first, (i64)length);
        enters = keys_low < keys_high;
        if (enters) odd = s.load_keys(first, (int)keys_low, (int)keys_high);
      }
      __syncthreads();
      load_points(s.q, start - p.first_query, low, high, (int)p.d, s.query.root(), s.query.center(), s.queries, D,
                  s.query_unscale);
      __syncwarp();
      reading.start();
#pragma unroll
      for (int c = 0; c < LANE_COLUMNS; c++)
#pragma unroll
        for (int i = 0; i < 4; i++) pairs[c][i] = 0;
      pair_ref[0] = pair_ref[1] = -INFINITY_F;
      s.sweep(enters, true, reading, pairs, pair_ref);
      if (enters) s.merge_pairs(reading, pairs, pair_ref, odd, low, high);
#pragma unroll
      for (int h = 0; h < 2; h++)
        if (query_factors && row_of(h) >= low && row_of(h) < high)
          reading.ref[h] += query_factors[start - p.first_query + row_of(h)];
      if (p.flags & WALK_NEAR) s.read_near(reading, start, low, high);
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const i64 i = start - p.first_query + row_of(h);
        const bool stored = row_of(h) >= low && row_of(h) < high;
        float den = quad_sum(reading.den[h]), ref = reading.ref[h], mine = 1, other = 0;
        if (p.flags & WALK_LOAD && stored) {
          const float top = larger(ref, partial.at(i, p.e + 1));
          mine = exp2_of(ref - safe(top));
          other = exp2_of(partial.at(i, p.e + 1) - safe(top));
          den = den * mine + partial.at(i, p.e) * other;
          ref = top;
        }
        const float by = den == 0 ? 0.0f : 1.0f / den;
        if (stored) {
#pragma unroll
          for (int c = 0; c < E / 8; c++)
#pragma unroll
            for (int j = 0; j < 2; j++) {
              const i64 column = part * E + column_of(c, j);
              float sum = reading.num[c][2 * h + j] * mine;
              if (column < p.e) {
                if (p.flags & WALK_LOAD) sum += partial.at(i, column) * other;
                if (p.flags & WALK_STORE) partial.at(i, column) = sum;
                else put(&out.at(i, column), sum * by);
              }
            }
          if (lane_of() % 4 == 0 && part == 0) {
            if (p.flags & WALK_STORE) partial.at(i, p.e) = den, partial.at(i, p.e + 1) = ref;
            else if (stats.start) stats.at(i, 0) = by, stats.at(i, 1) = safe(ref) * LN_2;
          }
        }
      }
    }
  }
  __syncthreads();
  if (p.kv_out.start && segment == p.segments - 1) {
    const View<float> kv = view<float>(p.kv_out, index), z = view<float>(p.z_out, index), c = view<float>(p.c_out, index);
    for (i64 t = threadIdx.x; t < p.m * E; t += THREADS)
      if (part * E + t % E < p.e) kv.at(t / E, part * E + t % E) = s.state[t];
    for (i64 r = threadIdx.x; r < p.m && part == 0; r += THREADS) {
      z.at(0, r) = s.state[p.m_pad * E + r];
      c.at(0, r) = s.state[p.m_pad * (E + 1) + r] * LN_2;
    }
  }
}

}  // namespace favorsharp
