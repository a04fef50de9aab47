// A token in one launch: its key and value enter a state, and its queries read the state. A block processes a part of
// the columns of the values, and up to G of the query heads that share a key head. Features are processed in groups of
// as many as there are threads. For each group, the block first computes the features of the keys that enter and of all
// queries into shared memory. Then it goes through the rows of kv: each entry is loaded, scaled, added to, stored in
// the new state, and read by the queries. In float32 the state also has the low parts of its sums. What a query reads is relative to a reference, which rises from group to
// group.
//
// With a window (NEAR), the token joins the recent keys. These are scored exactly, read like further rows of kv, and
// written for the next state. At some tokens, `limit` of them leave and enter the sums; at most tokens none does, and
// kv is only read.
//
// Constants and log features are those of the plain kernels. `num_queries` is the number of query heads of a key head,
// and `segments` the number of parts of the values, of `span` columns each. `num_keys` is the number of recent keys
// before the token, and `recent` the number after it.
namespace favorsharp {

constexpr int DECODE_WARPS = DECODE_THREADS / 32;
// The number of blocks for which a multiprocessor has enough registers without spills. While one of several blocks
// computes features, the others load.
template <class T, int G, int NEAR>
constexpr int RESIDENT = NEAR && (G > 1 || sizeof(T) == 8) ? 1 : (G == 1 && !NEAR ? 3 : 2) - (sizeof(T) == 8);

// Up to 16 bytes of numbers, which one instruction loads or stores if they are aligned.
template <class T, int SIZE> struct alignas(SIZE * sizeof(T)) Piece {
  T x[SIZE];
};

// Load or store the columns of a row from x on. `whole` says that all columns of the piece exist and are aligned.
template <class T, int SIZE>
DEVICE void load_piece(Piece<T, SIZE> &to, const View<const T> &from, int row, int x, int end, bool whole) {
  if (whole) to = *(const Piece<T, SIZE> *)&from.at(row, x);
  else
    for (int i = 0; i < SIZE; i++) to.x[i] = x + i < end ? from.at(row, x + i) : T();
}
template <class T, int SIZE>
DEVICE void store_piece(const View<T> &to, const Piece<T, SIZE> &from, int row, int x, int end, bool whole) {
  if (whole) *(Piece<T, SIZE> *)&to.at(row, x) = from;
  else
    for (int i = 0; i < SIZE; i++)
      if (x + i < end) to.at(row, x + i) = from.x[i];
}
template <int SIZE, class T> DEVICE bool holds_pieces(const View<T> &x) {
  return x.column == 1 && x.row % SIZE == 0 && (u64)x.start % (SIZE * sizeof(T)) == 0;
}

// Whether the block writes its head's entry of an array. If heads share an entry, the first of them writes it.
template <class Index> DEVICE bool owns(const Array &x, const Index &index) {
  bool first = true;
#pragma unroll
  for (int a = 0; a < AXES; a++) first = first && (index[a] == 0 || x.axis[a] != 0);
  return first;
}

// A warp loads a point, ready for products. Returns the part of its log features that depends only on the point,
// without the quadratic form.
template <class T, class A> DEVICE A load_token(A *to, const View<const T> &x, int row, const PlainSide<A> &side) {
  A sum = 0;
  for (int i = threadIdx.x % 32; i < side.d; i += 32) {
    const A at = side.alpha() * widened(x.at(row, i)) - side.center()[i];
    to[i] = at;
    sum += side.linear()[i] * at - side.beta() * at * at;
  }
  return side.offset() + warp_sum(sum);
}

// Products of N points (d each) with column first + t of a matrix (d, columns), in thread t: of the first K points with
// the matrix `key`, of the others with `query`. They are 0 if there is no such column. Only `count` of the points
// exist. If there are few columns, several threads share the entries of a point.
template <int K, class A, int N>
DEVICE void multiply_token(A (&sum)[N], int count, const A *points, A *parts, const A *key, const A *query, int d,
                           int columns, int first) {
  const int t = threadIdx.x;
  int width = 32;
  while (width < DECODE_THREADS && width < columns - first) width *= 2;
  const int column = first + t % width;
  __syncthreads();  // points are loaded, and no thread uses results of earlier features any more
  for (int r = 0; r < N; r++) sum[r] = 0;
  if (column < columns) {
#pragma unroll 4
    for (int i = t / width; i < d; i += DECODE_THREADS / width) {
      const A of_key = K > 0 ? key[(i64)i * columns + column] : A(0);
      const A of_query = K < N ? query[(i64)i * columns + column] : A(0);
      sum[0] += points[i] * (K > 0 ? of_key : of_query);
#pragma unroll
      for (int r = 1; r < N; r++)
        if (r < count) sum[r] += points[r * d + i] * (r < K ? of_key : of_query);
    }
  }
#pragma unroll
  for (int r = 0; r < N; r++) parts[r * DECODE_THREADS + t] = sum[r];
  __syncthreads();
#pragma unroll
  for (int r = 0; r < N; r++) {
    sum[r] = 0;
    if (t < width)
      for (int s = t; s < DECODE_THREADS; s += width) sum[r] += parts[r * DECODE_THREADS + s];
  }
}

// Subtract the quadratic forms of points from their factors, the part of log features that depends only on the point.
template <int K, int N, class A>
DEVICE void subtract_forms(A *factors, int count, const A *points, A *parts, A *lanes, const A *key, const A *query, int d) {
  const int t = threadIdx.x;
  A sum[N], squares[N] = {};
  for (int first = 0; first < d; first += DECODE_THREADS) {
    multiply_token<K>(sum, count, points, parts, key, query, d, d, first);
#pragma unroll
    for (int r = 0; r < N; r++) squares[r] += sum[r] * sum[r];
  }
#pragma unroll
  for (int r = 0; r < N; r++) {
    const A square = warp_sum(squares[r]);
    if (t % 32 == 0) lanes[r * DECODE_WARPS + t / 32] = square;
  }
  __syncthreads();
  if (t < count)
    for (int i = 0; i < DECODE_WARPS; i++) factors[t] -= lanes[t * DECODE_WARPS + i];
}

// Each thread has one log weight for each query. These become weights in shared memory. References rise to the largest
// log weight, and the sums that threads hold are scaled accordingly.
template <int G, int SIZE, class A>
DEVICE void rise(const A *logs, bool mine, int count, A *weights, A *lanes, A *ref, A (&den)[G], A (&num)[G][SIZE]) {
  const int t = threadIdx.x;
#pragma unroll
  for (int r = 0; r < G; r++)
    if (r < count) {
      const A largest = warp_max(mine ? logs[r] : -infinity<A>());
      if (t % 32 == 0) lanes[r * DECODE_WARPS + t / 32] = largest;
    }
  __syncthreads();
#pragma unroll
  for (int r = 0; r < G; r++)
    if (r < count) {
      A largest = ref[r];
      for (int i = 0; i < DECODE_WARPS; i++) largest = larger(largest, lanes[r * DECODE_WARPS + i]);
      const A safe = finite_or_zero(largest), old = exp_of(ref[r] - safe);
      if (mine) weights[r * DECODE_THREADS + t] = exp_of(logs[r] - safe);
      den[r] *= old;
#pragma unroll
      for (int i = 0; i < SIZE; i++) num[r][i] *= old;
    }
  __syncthreads();
  if (t < count)
    for (int i = 0; i < DECODE_WARPS; i++) ref[t] = larger(ref[t], lanes[t * DECODE_WARPS + i]);
}

template <class T, int G, int NEAR>
__global__ void __launch_bounds__(DECODE_THREADS, RESIDENT<T, G, NEAR>) decode(ARGUMENT Problem p) {
  typedef typename Computing<T>::type A;
  constexpr int SIZE = 16 / sizeof(A);
  constexpr bool LOW = sizeof(A) == 4;           // sums have low parts
  constexpr int IN_FLIGHT = LOW && !NEAR ? 2 : 4;  // rows of kv that a thread loads before it uses the first
  constexpr int KEYS = NEAR ? DECODE_WARPS : 1;  // keys that are loaded at once: without a window, the token's
  constexpr int POINTS = NEAR ? KEYS : 1 + G;    // points that are multiplied at once
  static_assert(G <= POINTS, "queries are multiplied at once");
  SHARED_MEMORY(raw);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, d = (int)p.d, m = (int)p.m, span = (int)p.span;
  const int limit = NEAR ? (int)p.limit : 1;
  // Points and factors: without a window, those of the key and then those of the queries; with a window, those of the
  // queries and then those of the keys that enter.
  A *points = (A *)raw, *factors = points + ((limit > 0 ? KEYS : 0) + G) * d, *values = factors + limit + G;
  A *weight = values + limit * span, *scale = weight + limit * DECODE_THREADS, *z_new = scale + DECODE_THREADS;
  A *features = z_new + DECODE_THREADS, *lanes = features + G * DECODE_THREADS, *ref = lanes + POINTS * DECODE_WARPS;
  A *parts = ref + G, *totals = parts;  // used at the end, when no thread reads parts
  const int group = (int)p.num_queries, chunks = (group + G - 1) / G, block = blockIdx.x / (u32)p.segments;
  const int chunk = block % chunks, first_head = block / chunks * group + chunk * G, count = min(group - chunk * G, G);
  const int begin = blockIdx.x % (u32)p.segments * span, end = min(begin + span, (int)p.e);
  int index[AXES];
  split_head(p, first_head, index);
  const i64 map = along(index, p.map_axis);
  const PlainSide<A> query = {(const A *)p.query.header + map * p.map_rows, p.d, p.m};
  const PlainSide<A> key = {(const A *)p.key.header + map * p.map_rows, p.d, p.m};
  const View<const bool> mask = view<const bool>(p.mask, index);
  const bool visible = !mask.start || mask.at(0, 0);

  for (int r = warp; r < count + 1 - NEAR; r += DECODE_WARPS) {
    const bool is_key = !NEAR && r == 0;
    int own[AXES];
    split_head(p, first_head + (is_key ? 0 : r - 1 + NEAR), own);
    const A factor = load_token(points + r * d, view<const T>(is_key ? p.k : p.q, own), 0, is_key ? key : query);
    if (lane == 0) factors[r] = factor;
  }
  for (int x = t; x < limit * span; x += DECODE_THREADS) {
    const int i = x / span, at = begin + x % span;
    const bool seen = NEAR ? view<const bool>(p.recent_mask, index).at(i, 0) : visible;
    values[x] = seen && at < end ? widened(view<const T>(NEAR ? p.recent_v : p.v, index).at(i, at)) : A(0);
  }
  if (p.has_dense)
    subtract_forms<1 - NEAR, NEAR ? G : 1 + G>(factors, count + 1 - NEAR, points, parts, lanes, key.dense(), query.dense(), d);
  A *const entering = points + G * d;  // points of entering keys, with a window
  for (int from = 0; NEAR && from < limit; from += KEYS) {
    const int there = min(limit - from, KEYS);
    if (warp < there) {
      const A factor = load_token(entering + warp * d, view<const T>(p.recent_k, index), from + warp, key);
      if (lane == 0) factors[G + from + warp] = factor;
    }
    if (p.has_dense)
      subtract_forms<KEYS, KEYS>(factors + G + from, there, entering, parts, lanes, key.dense(), key.dense(), d);
  }

  // `across` lanes share a row of the part, and a warp processes consecutive rows
  int across = 1;
  while (across * SIZE < span) across *= 2;
  const int column = lane % across * SIZE, rows = DECODE_THREADS / across;
  const bool inside = begin + column < end;
  A num[G][SIZE] = {}, den[G] = {};
  if (t < count) ref[t] = -infinity<A>();
  for (int first = 0; first < m; first += DECODE_THREADS) {
    const int j = first + t;
    const bool mine = j < m;
    A sum[NEAR ? G : 1 + G], top = -infinity<A>();
    if constexpr (NEAR) {
      for (int from = 0; from < limit; from += KEYS) {
        const int there = min(limit - from, KEYS);
        if (warp < there) load_token(entering + warp * d, view<const T>(p.recent_k, index), from + warp, key);
        A logs[KEYS];
        multiply_token<KEYS>(logs, there, entering, parts, key.rows(), key.rows(), d, m, first);
#pragma unroll
        for (int r = 0; r < KEYS; r++)
          if (mine && r < there) {
            const bool seen = view<const bool>(p.recent_mask, index).at(from + r, 0);
            const A log = seen ? logs[r] + finite_or_nan(factors[G + from + r]) + key.column()[j] : -infinity<A>();
            weight[(from + r) * DECODE_THREADS + t] = log;
            top = larger(top, log);
          }
      }
      multiply_token<0>(sum, count, points, parts, query.rows(), query.rows(), d, m, first);
    } else {
      multiply_token<1>(sum, 1 + count, points, parts, key.rows(), query.rows(), d, m, first);
    }
    split_head(p, again(first_head), index);  // computed again, because registers are scarce there
    if (mine) {
      const View<const A> z = view<const A>(p.z_in, index), c = view<const A>(p.c_in, index);
      const A before = c.at(0, j);
      if constexpr (!NEAR) {
        weight[t] = visible ? sum[0] + finite_or_nan(factors[0]) + key.column()[j] : -infinity<A>();
        top = weight[t];
      }
      top = larger(before, top);
      const A safe = finite_or_zero(top);
      scale[t] = exp_of(before - safe);
      const View<const A> z_low = view<const A>(p.z_low_in, index);
      A total = scale[t] * z.at(0, j), rest = z_low.start ? scale[t] * z_low.at(0, j) : A(0);
      for (int i = 0; i < limit; i++) {
        const A entered = exp_of(weight[i * DECODE_THREADS + t] - safe);
        weight[i * DECODE_THREADS + t] = entered;
        add_to(total, rest, entered);
      }
      z_new[t] = total;
      if (limit > 0 && chunk == 0 && begin == 0) {
        view<A>(p.z_out, index).at(0, j) = total;
        view<A>(p.c_out, index).at(0, j) = top;
        if (p.z_low_out.start) view<A>(p.z_low_out, index).at(0, j) = rest;
      }
#pragma unroll
      for (int r = 0; r < G; r++)
        if (r < count) sum[1 - NEAR + r] = sum[1 - NEAR + r] + finite_or_nan(factors[1 - NEAR + r]) + query.column()[j] + top;
    }
    rise(sum + 1 - NEAR, mine, count, features, lanes, ref, den, num);
    const View<const A> kv = view<const A>(p.kv_in, index);
    const View<const A> kv_low = view<const A>(p.kv_low_in, index);
    const View<A> kv_new = view<A>(p.kv_out, index), low_new = view<A>(p.kv_low_out, index);
    const bool writes = limit > 0 && chunk == 0, has_low = LOW && writes && kv_low.start;
    const bool whole = p.e % SIZE == 0 && holds_pieces<SIZE>(kv) && (!writes || holds_pieces<SIZE>(kv_new)) &&
                       (!has_low || holds_pieces<SIZE>(kv_low));
    const int here = min(m - first, DECODE_THREADS);
    for (int row = t / across; row < here && inside; row += IN_FLIGHT * rows) {
      Piece<A, SIZE> piece[IN_FLIGHT], low[LOW ? IN_FLIGHT : 1] = {};
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++)
        if (row + u * rows < here) {
          load_piece(piece[u], kv, first + row + u * rows, begin + column, end, whole);
          if (has_low) load_piece(low[LOW ? u : 0], kv_low, first + row + u * rows, begin + column, end, whole);
        }
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++) {
        const int at = row + u * rows;
        if (at >= here) break;
        Piece<A, SIZE> &lost = low[LOW ? u : 0];
#pragma unroll
        for (int i = 0; i < SIZE; i++) piece[u].x[i] *= scale[at], lost.x[i] *= scale[at];
        for (int k = 0; k < limit; k++)
#pragma unroll
          for (int i = 0; i < SIZE; i++) {
            const A entering = weight[k * DECODE_THREADS + at] * values[k * span + column + i];
            if constexpr (LOW) add_to(piece[u].x[i], lost.x[i], entering);
            else piece[u].x[i] += entering;
          }
        if (writes) {
          store_piece(kv_new, piece[u], first + at, begin + column, end, whole);
          if constexpr (LOW) store_piece(low_new, lost, first + at, begin + column, end, whole);
        }
#pragma unroll
        for (int r = 0; r < G; r++)
          if (r < count) {
            const A feature = features[r * DECODE_THREADS + at];
            den[r] += feature * z_new[at];
#pragma unroll
            for (int i = 0; i < SIZE; i++) num[r][i] += feature * piece[u].x[i];
          }
      }
    }
  }

  if constexpr (NEAR) {
    const int kept = (int)p.num_keys, recent = (int)p.recent;
    for (int r = warp; r < count; r += DECODE_WARPS) {  // points are free: all products are done
      int own[AXES];
      split_head(p, first_head + r, own);
      for (int i = lane; i < d; i += 32)
        points[r * d + i] = query.alpha() * widened(view<const T>(p.q, own).at(0, i)) - query.near_center()[i];
    }
    for (int first = 0; first < recent; first += DECODE_THREADS) {
      const int here = min(recent - first, DECODE_THREADS);
      __syncthreads();  // points are loaded, and earlier weights are no longer needed
      split_head(p, again(first_head), index);
      {
        const View<const T> k = view<const T>(p.k, index), kept_k = view<const T>(p.recent_k, index);
        const View<T> k_new = view<T>(p.recent_k_out, index);
        const View<const bool> kept_mask = view<const bool>(p.recent_mask, index);
        const View<bool> mask_new = view<bool>(p.recent_mask_out, index);
        const bool writes_keys = begin == 0 && owns(p.recent_k_out, index);
        const bool writes_mask = begin == 0 && owns(p.recent_mask_out, index);
#pragma unroll 1
        for (int row = warp; row < here; row += DECODE_WARPS) {
          const int to = first + row, at = limit + to;
          const bool is_last = at == kept, seen = is_last ? visible : kept_mask.at(at, 0);
          A logs[G] = {};
#pragma unroll 1
          for (int i = lane; i < d; i += 32) {
            const T number = is_last ? k.at(0, i) : kept_k.at(at, i);
            if (writes_keys) k_new.at(to, i) = number;
            const A y = query.alpha() * widened(number) - query.near_center()[i];
#pragma unroll
            for (int r = 0; r < G; r++)
              if (r < count) {
                const A x = points[r * d + i];
                logs[r] += p.gaussian ? (x - y) * (y - x) / 2 : x * y;
              }
          }
#pragma unroll
          for (int r = 0; r < G; r++)
            if (r < count) {
              const A log = warp_sum(logs[r]);
              if (lane == 0) features[r * DECODE_THREADS + row] = seen ? finite_or_nan(log) : -infinity<A>();
            }
          if (writes_mask && lane == 0) mask_new.at(to, 0) = seen;
        }
      }
      __syncthreads();
      A logs[G];
#pragma unroll
      for (int r = 0; r < G; r++)
        if (r < count && t < here) logs[r] = features[r * DECODE_THREADS + t];
      rise(logs, t < here, count, features, lanes, ref, den, num);
      split_head(p, again(first_head), index);
      const View<const T> v = view<const T>(p.v, index), kept_v = view<const T>(p.recent_v, index);
      const View<T> v_new = view<T>(p.recent_v_out, index);
      const View<const bool> kept_mask = view<const bool>(p.recent_mask, index);
      const bool whole = p.e % SIZE == 0 && holds_pieces<SIZE>(v) && holds_pieces<SIZE>(kept_v) && holds_pieces<SIZE>(v_new);
      const bool writes = owns(p.recent_v_out, index);
#pragma unroll 1
      for (int row = t / across; row < here && inside; row += rows) {
        const int to = first + row, at = limit + to;
        const bool is_last = at == kept, seen = is_last ? visible : kept_mask.at(at, 0);
        Piece<T, SIZE> piece;
        load_piece(piece, is_last ? v : kept_v, is_last ? 0 : at, begin + column, end, whole);
        if (writes) store_piece(v_new, piece, to, begin + column, end, whole);
#pragma unroll
        for (int r = 0; r < G; r++)
          if (r < count && seen) {
            const A near = features[r * DECODE_THREADS + row];
            den[r] += near;
#pragma unroll
            for (int i = 0; i < SIZE; i++) num[r][i] += near * widened(piece.x[i]);
          }
      }
    }
  }

  const int width = span + 1;
#pragma unroll
  for (int r = 0; r < G; r++)
    if (r < count) {
      for (int bit = across; bit < 32; bit *= 2) {
        den[r] += __shfl_xor_sync(WHOLE_WARP, den[r], bit);
#pragma unroll
        for (int i = 0; i < SIZE; i++) num[r][i] += __shfl_xor_sync(WHOLE_WARP, num[r][i], bit);
      }
      A *to = totals + (r * DECODE_WARPS + warp) * width;
      if (lane < across && inside) {
#pragma unroll
        for (int i = 0; i < SIZE; i++) to[column + i] = num[r][i];
        if (lane == 0) to[span] = den[r];
      }
    }
  __syncthreads();
  const int columns = end - begin;
  for (int i = t; i < count * columns; i += DECODE_THREADS) {
    const int r = i / columns, x = i % columns;
    A sum_of_values = 0, sum_of_weights = 0;
    for (int w = 0; w < DECODE_WARPS; w++) {
      const A *from = totals + (r * DECODE_WARPS + w) * width;
      sum_of_values += from[x];
      sum_of_weights += from[span];
    }
    split_head(p, first_head + r, index);
    put(&view<T>(p.out, index).at(0, begin + x), sum_of_weights == 0 ? A(0) : sum_of_values * (1 / sum_of_weights));
  }
}

}  // namespace favorsharp
