// A token in one launch: its key and value enter a state, and its queries read it. A block takes a part of the columns of
// the values, and up to G of the query heads that share a key head. Features come as many at a time as there are threads:
// computed in shared memory, for the key and all queries, they are followed by their rows of kv, each entry of which is
// loaded, scaled, added to, stored in the new state and read. A query's sums are relative to a reference that rises.
//
// Constants and log features are those of the plain kernels. `num_queries` counts the query heads of a key head, `segments`
// the parts of the values, of `span` columns each.
namespace favorsharp {

constexpr int DECODE_THREADS = 256, DECODE_WARPS = DECODE_THREADS / 32;
constexpr int IN_FLIGHT = 4;  // loads of kv that a thread issues before it uses the first
// Blocks that a processor's registers have room for, without spills: others load while one computes features.
template <class T, int G> constexpr int RESIDENT = (G == 1 ? 3 : 2) - (sizeof(T) == 8);

// 16 bytes of numbers, which one instruction loads or stores where they are aligned.
template <class A> struct alignas(16) Piece {
  static constexpr int SIZE = 16 / sizeof(A);
  A x[SIZE];
};

// Columns x .. of a row; `whole` says that all of them are there and aligned.
template <class A> DEVICE void load_piece(Piece<A> &to, const View<const A> &from, int row, int x, int end, bool whole) {
  if (whole) to = *(const Piece<A> *)&from.at(row, x);
  else
    for (int i = 0; i < Piece<A>::SIZE; i++) to.x[i] = x + i < end ? from.at(row, x + i) : A(0);
}
template <class A> DEVICE void store_piece(const View<A> &to, const Piece<A> &from, int row, int x, int end, bool whole) {
  if (whole) *(Piece<A> *)&to.at(row, x) = from;
  else
    for (int i = 0; i < Piece<A>::SIZE; i++)
      if (x + i < end) to.at(row, x + i) = from.x[i];
}
template <class A> DEVICE bool holds_pieces(const View<A> &x) {
  return x.column == 1 && x.row % Piece<A>::SIZE == 0 && (u64)x.start % sizeof(Piece<A>) == 0;
}

// Products of points (d each): the key's with column first + t of one matrix (d, columns), those of `count` queries with
// that of another, in thread t; 0 where there is no such column. Where columns are few, threads share a point's entries.
template <class A, int N>
DEVICE void multiply_token(A (&sum)[N], int count, const A *points, A *parts, const A *key, const A *query, int d,
                           int columns, int first) {
  const int t = threadIdx.x;
  int width = 32;
  while (width < DECODE_THREADS && width < columns - first) width *= 2;
  const int column = first + t % width;
  __syncthreads();  // points are loaded, and what was computed of the features before is done with
  for (int r = 0; r < N; r++) sum[r] = 0;
  if (column < columns) {
#pragma unroll 4
    for (int i = t / width; i < d; i += DECODE_THREADS / width) {
      const A of_key = key[(i64)i * columns + column], of_query = query[(i64)i * columns + column];
      sum[0] += points[i] * of_key;
#pragma unroll
      for (int r = 1; r < N; r++)
        if (r <= count) sum[r] += points[r * d + i] * of_query;
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

template <class T, int G> __global__ void __launch_bounds__(DECODE_THREADS, RESIDENT<T, G>) decode(ARGUMENT Problem p) {
  typedef typename Computing<T>::type A;
  constexpr int SIZE = Piece<A>::SIZE;
  SHARED_MEMORY(raw);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, d = (int)p.d, m = (int)p.m, span = (int)p.span;
  A *points = (A *)raw, *factors = points + (1 + G) * d, *values = factors + 1 + G;
  A *scale = values + span, *weight = scale + DECODE_THREADS, *z_new = weight + DECODE_THREADS;
  A *features = z_new + DECODE_THREADS, *lanes = features + G * DECODE_THREADS, *ref = lanes + (1 + G) * DECODE_WARPS;
  A *parts = ref + G, *totals = parts;  // in the end, when no thread reads parts
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
  const View<const T> v = view<const T>(p.v, index);

  // point 0 is the key, the others are queries; a warp loads one
  for (int r = warp; r <= count; r += DECODE_WARPS) {
    int own[AXES];
    split_head(p, first_head + max(r - 1, 0), own);
    const View<const T> x = view<const T>(r ? p.q : p.k, own);
    const PlainSide<A> side = r ? query : key;
    A sum = 0;
    for (int i = lane; i < d; i += 32) {
      const A at = side.alpha() * widened(x.at(0, i)) - side.center()[i];
      points[r * d + i] = at;
      sum += side.linear()[i] * at - side.beta() * at * at;
    }
    sum = warp_sum(sum);
    if (lane == 0) factors[r] = side.offset() + sum;
  }
  for (int x = t; x < span; x += DECODE_THREADS)
    values[x] = visible && begin + x < end ? widened(v.at(0, begin + x)) : A(0);
  A sum[1 + G];
  if (p.has_dense) {
    A squares[1 + G] = {};
    for (int first = 0; first < d; first += DECODE_THREADS) {
      multiply_token(sum, count, points, parts, key.dense(), query.dense(), d, d, first);
#pragma unroll
      for (int r = 0; r <= G; r++) squares[r] += sum[r] * sum[r];
    }
#pragma unroll
    for (int r = 0; r <= G; r++) {
      const A square = warp_sum(squares[r]);
      if (lane == 0) lanes[r * DECODE_WARPS + warp] = square;
    }
    __syncthreads();
    if (t <= count)
      for (int i = 0; i < DECODE_WARPS; i++) factors[t] -= lanes[t * DECODE_WARPS + i];
  }

  // `across` lanes share a row of the part, and a warp has rows that follow each other
  int across = 1;
  while (across * SIZE < span) across *= 2;
  const int column = lane % across * SIZE, rows = DECODE_THREADS / across;
  const bool inside = begin + column < end;
  A num[G][SIZE] = {}, den[G] = {};
  if (t < count) ref[t] = -infinity<A>();
  for (int first = 0; first < m; first += DECODE_THREADS) {
    multiply_token(sum, count, points, parts, key.rows(), query.rows(), d, m, first);
    split_head(p, again(first_head), index);  // not kept: registers are scarce while points are multiplied
    const int j = first + t;
    const bool mine = j < m;
    A top = -infinity<A>();
    if (mine) {
      const View<const A> z = view<const A>(p.z_in, index), c = view<const A>(p.c_in, index);
      const A log = visible ? sum[0] + finite_or_nan(factors[0]) + key.column()[j] : -infinity<A>(), before = c.at(0, j);
      top = larger(before, log);
      const A safe = finite_or_zero(top);
      scale[t] = exp_of(before - safe);
      weight[t] = exp_of(log - safe);
      z_new[t] = scale[t] * z.at(0, j) + weight[t];
      if (chunk == 0 && begin == 0) {
        view<A>(p.z_out, index).at(0, j) = z_new[t];
        view<A>(p.c_out, index).at(0, j) = top;
      }
    }
#pragma unroll
    for (int r = 0; r < G; r++)
      if (r < count) {
        sum[1 + r] = mine ? sum[1 + r] + finite_or_nan(factors[1 + r]) + query.column()[j] + top : -infinity<A>();
        const A largest = warp_max(sum[1 + r]);
        if (lane == 0) lanes[r * DECODE_WARPS + warp] = largest;
      }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < G; r++)
      if (r < count) {
        A largest = ref[r];
        for (int i = 0; i < DECODE_WARPS; i++) largest = larger(largest, lanes[r * DECODE_WARPS + i]);
        const A safe = finite_or_zero(largest), old = exp_of(ref[r] - safe);
        if (mine) features[r * DECODE_THREADS + t] = exp_of(sum[1 + r] - safe);
        den[r] *= old;
#pragma unroll
        for (int i = 0; i < SIZE; i++) num[r][i] *= old;
      }
    __syncthreads();
    if (t < count)
      for (int i = 0; i < DECODE_WARPS; i++) ref[t] = larger(ref[t], lanes[t * DECODE_WARPS + i]);
    const View<const A> kv = view<const A>(p.kv_in, index);
    const View<A> kv_new = view<A>(p.kv_out, index);
    const bool whole = p.e % SIZE == 0 && holds_pieces(kv) && holds_pieces(kv_new);
    const int here = min(m - first, DECODE_THREADS);
    for (int row = t / across; row < here && inside; row += IN_FLIGHT * rows) {
      Piece<A> piece[IN_FLIGHT];
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++)
        if (row + u * rows < here) load_piece(piece[u], kv, first + row + u * rows, begin + column, end, whole);
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++) {
        const int at = row + u * rows;
        if (at >= here) break;
#pragma unroll
        for (int i = 0; i < SIZE; i++) piece[u].x[i] = scale[at] * piece[u].x[i] + weight[at] * values[column + i];
        if (chunk == 0) store_piece(kv_new, piece[u], first + at, begin + column, end, whole);
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
