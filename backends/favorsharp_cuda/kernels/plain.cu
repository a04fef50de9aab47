// Every op in plain arithmetic, for float64, for points of any size and for few points. A block processes a head, or a
// piece of its queries, one point after the other. Its threads share first the features, then the columns of the
// values.
//
// Log features are natural logarithms here. A state is (kv, z, c) in global memory, in the layout of a State.
namespace favorsharp {

// A side's constants (maps.py): 8 scalars, center, linear, near_center (d each), column (m), rows (d, m), dense (d, d).
template <class A> struct PlainSide {
  const A *start;
  i64 d, m;
  DEVICE A alpha() const { return start[0]; }
  DEVICE A offset() const { return start[1]; }
  DEVICE A beta() const { return start[2]; }
  DEVICE const A *center() const { return start + 8; }
  DEVICE const A *linear() const { return center() + d; }
  DEVICE const A *near_center() const { return linear() + d; }
  DEVICE const A *column() const { return near_center() + d; }
  DEVICE const A *rows() const { return column() + m; }
  DEVICE const A *dense() const { return rows() + m * d; }
};

template <class A> DEVICE A finite_or_nan(A x) { return x - x == 0 ? x : x - x; }
template <class A> DEVICE A finite_or_zero(A x) { return x == -infinity<A>() ? A(0) : x; }

// The sum, or the largest, of a number of each thread of the block. `lanes` has room for one number for each warp.
template <class A> DEVICE A block_sum(A x, A *lanes) {
  x = warp_sum(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) lanes[threadIdx.x / 32] = x;
  __syncthreads();
  A sum = 0;
  for (int i = 0; i < PLAIN_THREADS / 32; i++) sum += lanes[i];
  return sum;
}
template <class A> DEVICE A block_max(A x, A *lanes) {
  x = warp_max(x);
  __syncthreads();
  if (threadIdx.x % 32 == 0) lanes[threadIdx.x / 32] = x;
  __syncthreads();
  A top = -infinity<A>();
  for (int i = 0; i < PLAIN_THREADS / 32; i++) top = larger(top, lanes[i]);
  return top;
}

template <class T> struct Plain {
  typedef typename Computing<T>::type A;
  const Problem &p;
  A *point, *features, *weights, *scale, *num, *lanes;
  A den, ref;

  // Set point = alpha x - center, and return the part of its log features that depends only on the point. All threads
  // have passed a barrier since they last read `point`, so none is needed before. The barriers in here also separate
  // earlier reads of a state from writes that follow.
  DEVICE A load(const View<const T> &x, i64 i, const PlainSide<A> &side) {
    A sum = 0;
    for (int j = threadIdx.x; j < p.d; j += PLAIN_THREADS) {
      const A z = side.alpha() * widened(x.at(i, j)) - side.center()[j];
      point[j] = z;
      sum += side.linear()[j] * z - side.beta() * z * z;
    }
    __syncthreads();
    if (p.has_dense)
      for (int r = threadIdx.x; r < p.d; r += PLAIN_THREADS) {
        A u = 0;
        for (int j = 0; j < p.d; j++) u += point[j] * side.dense()[j * p.d + r];
        sum -= u * u;
      }
    return finite_or_nan(side.offset() + block_sum(sum, lanes));
  }

  DEVICE A log_feature(int j, A factor, const PlainSide<A> &side) {
    A sum = 0;
    for (int i = 0; i < p.d; i++) sum += point[i] * side.rows()[i * p.m + j];
    return sum + factor + side.column()[j];
  }

  DEVICE void absorb(const View<const T> &k, const View<const T> &v, i64 i, const PlainSide<A> &side,
                     const View<A> &kv, const View<A> &z, const View<A> &c, const View<A> &kv_low,
                     const View<A> &z_low) {
    const A factor = load(k, i, side);
    for (int j = threadIdx.x; j < p.m; j += PLAIN_THREADS) {
      const A log = log_feature(j, factor, side), before = c.at(0, j), top = larger(before, log);
      const A safe = finite_or_zero(top), weight = exp_of(log - safe);
      scale[j] = exp_of(before - safe);
      weights[j] = weight;
      add_scaled(z, z_low, 0, j, scale[j], weight);
      c.at(0, j) = top;
    }
    __syncthreads();
    for (i64 t = threadIdx.x; t < p.m * p.e; t += PLAIN_THREADS) {
      const i64 j = t / p.e, x = t % p.e;
      add_scaled(kv, kv_low, j, x, scale[j], weights[j] * widened(v.at(i, x)));
    }
  }

  // Scale a sum by `by` and add x to it. In float32 the low part keeps the rounding error.
  DEVICE void add_scaled(const View<A> &sum, const View<A> &low, i64 r, i64 column, A by, A x) {
    A &place = sum.at(r, column);
    if constexpr (sizeof(A) == 4) {
      A total = by * place, rest = by * low.at(r, column);
      add_to(total, rest, x);
      place = total, low.at(r, column) = rest;
    } else {
      place = by * place + x;
    }
  }

  // Compute num, den and ref of query i, which reads a state.
  DEVICE void read(const View<const T> &q, i64 i, const PlainSide<A> &side, const View<A> &kv, const View<A> &z,
                   const View<A> &c) {
    const A factor = load(q, i, side);
    A top = -infinity<A>(), sum = 0;
    for (int j = threadIdx.x; j < p.m; j += PLAIN_THREADS) {
      features[j] = log_feature(j, factor, side) + c.at(0, j);
      top = larger(top, features[j]);
    }
    ref = block_max(top, lanes);
    const A safe = finite_or_zero(ref);
    for (int j = threadIdx.x; j < p.m; j += PLAIN_THREADS) {
      features[j] = exp_of(features[j] - safe);
      sum += features[j] * z.at(0, j);
    }
    den = block_sum(sum, lanes);
    for (int x = threadIdx.x; x < p.e; x += PLAIN_THREADS) {
      A total = 0;
      for (int j = 0; j < p.m; j++) total += features[j] * kv.at(j, x);
      num[x] = total;
    }
  }

  // Add keys low .. high, which are scored exactly, to what query i has read. In causal attention it sees only keys up
  // to its own position.
  DEVICE void near(const View<const T> &q, i64 i, const View<const T> &k, const View<const T> &v,
                   const View<const bool> &mask, i64 low, i64 high, i64 position, const PlainSide<A> &side) {
    for (i64 first = low; first < high; first += PLAIN_THREADS) {
      const i64 at = first + threadIdx.x;
      const bool seen = at < high && (!p.causal || at <= position) && (!mask.start || mask.at(at, 0));
      A log = -infinity<A>();
      if (seen) {
        A dot = 0, norms = 0;
        for (int j = 0; j < p.d; j++) {
          const A a = side.alpha() * widened(q.at(i, j)) - side.near_center()[j];
          const A b = side.alpha() * widened(k.at(at, j)) - side.near_center()[j];
          dot += a * b;
          norms += a * a + b * b;
        }
        log = finite_or_nan(p.gaussian ? dot - norms / 2 : dot);
      }
      const A top = larger(ref, block_max(log, lanes)), safe = finite_or_zero(top), old = exp_of(ref - safe);
      const A weight = exp_of(log - safe);
      ref = top;
      den = den * old + block_sum(weight, lanes);
      weights_of_keys()[threadIdx.x] = weight;
      __syncthreads();
      for (int x = threadIdx.x; x < p.e; x += PLAIN_THREADS) {
        A total = num[x] * old;
        for (int t = 0; t < PLAIN_THREADS && first + t < high; t++) {
          const bool visible = (!p.causal || first + t <= position) && (!mask.start || mask.at(first + t, 0));
          if (visible) total += weights_of_keys()[t] * widened(v.at(first + t, x));
        }
        num[x] = total;
      }
    }
  }

  DEVICE A *weights_of_keys() { return lanes + PLAIN_THREADS / 32; }
};

// The queries of a piece of a head read a state. With ENTER, the keys that a query may read enter the state before.
template <class T> __global__ void __launch_bounds__(PLAIN_THREADS, 2) plain_attention(ARGUMENT Problem p) {
  typedef typename Computing<T>::type A;
  SHARED_MEMORY(raw);
  A *shared = (A *)raw;
  Plain<T> s = {p, shared, shared + p.d, shared + p.d + p.m, shared + p.d + 2 * p.m, shared + p.d + 3 * p.m,
                shared + p.d + 3 * p.m + p.e, 0, 0};
  const i64 head = blockIdx.x / p.segments, piece = blockIdx.x % p.segments, flags = p.flags, w = p.window;
  int index[AXES];
  split_head(p, head, index);
  const View<const T> q = view<const T>(p.q, index), k = view<const T>(p.k, index), v = view<const T>(p.v, index);
  const View<const bool> mask = view<const bool>(p.mask, index);
  const View<T> out = view<T>(p.out, index);
  const View<A> stats = view<A>(p.stats, index), partial = view<A>(p.partial_sums, index);
  const i64 map = along(index, p.map_axis);
  const PlainSide<A> query = {(const A *)p.query.header + map * p.map_rows, p.d, p.m};
  const PlainSide<A> key = {(const A *)p.key.header + map * p.map_rows, p.d, p.m};
  View<A> kv = view<A>(p.kv_in, index), z = view<A>(p.z_in, index), c = view<A>(p.c_in, index);
  const View<A> kv_low = view<A>(p.kv_low_out, index), z_low = view<A>(p.z_low_out, index);
  if (p.kv_out.start) {  // keys enter these sums, which start as a copy of the given ones or as zeros
    if constexpr (sizeof(A) == 4) {
      const View<A> kv_before = view<A>(p.kv_low_in, index), z_before = view<A>(p.z_low_in, index);
      for (i64 t = threadIdx.x; t < p.m * p.e; t += PLAIN_THREADS)
        kv_low.at(t / p.e, t % p.e) = kv_before.start ? kv_before.at(t / p.e, t % p.e) : 0;
      for (int j = threadIdx.x; j < p.m; j += PLAIN_THREADS) z_low.at(0, j) = z_before.start ? z_before.at(0, j) : 0;
    }
    const View<A> kv_own = view<A>(p.kv_out, index), z_own = view<A>(p.z_out, index), c_own = view<A>(p.c_out, index);
    for (i64 t = threadIdx.x; t < p.m * p.e; t += PLAIN_THREADS)
      kv_own.at(t / p.e, t % p.e) = kv.start ? kv.at(t / p.e, t % p.e) : 0;
    for (int j = threadIdx.x; j < p.m; j += PLAIN_THREADS) {
      z_own.at(0, j) = kv.start ? z.at(0, j) : 0;
      c_own.at(0, j) = kv.start ? c.at(0, j) : -infinity<A>();
    }
    kv = kv_own, z = z_own, c = c_own;
  }
  const i64 begin = p.num_queries * piece / p.segments, end = p.num_queries * (piece + 1) / p.segments;
  i64 entered = p.reverse ? p.num_keys : 0;
  for (i64 t = 0; t < end - begin; t++) {
    const i64 i = p.reverse ? end - 1 - t : begin + t, position = p.first_query + i;
    if (flags & ENTER) {
      if (p.reverse) {
        const i64 limit = w ? (position / w + 2) * w : position;
        for (; entered > limit; entered--)
          if (!mask.start || mask.at(entered - 1, 0)) s.absorb(k, v, entered - 1, key, kv, z, c, kv_low, z_low);
      } else {
        const i64 limit = w ? (position / w - 1) * w : position + 1;
        for (; entered < limit; entered++)
          if (!mask.start || mask.at(entered, 0)) s.absorb(k, v, entered, key, kv, z, c, kv_low, z_low);
      }
    }
    s.read(q, i, query, kv, z, c);
    if (flags & LOAD_PARTIAL) {
      const A before = partial.at(i, p.e + 1), top = larger(s.ref, before), safe = finite_or_zero(top);
      const A mine = exp_of(s.ref - safe), other = exp_of(before - safe);
      for (int x = threadIdx.x; x < p.e; x += PLAIN_THREADS) s.num[x] = s.num[x] * mine + partial.at(i, x) * other;
      s.den = s.den * mine + partial.at(i, p.e) * other;
      s.ref = top;
    }
    if (flags & NEAR) {
      const i64 block = w ? position / w : 0;
      const i64 low = w && block > 0 ? (block - 1) * w : 0, reach = w ? (block + (p.causal ? 1 : 2)) * w : p.recent;
      const i64 last = w ? p.num_keys : p.recent;
      s.near(q, i, k, v, mask, low, reach < last ? reach : last, position, query);
    }
    const A factor = p.normalised ? (s.den == 0 ? A(0) : 1 / s.den) : exp_of(s.ref);
    for (int x = threadIdx.x; x < p.e; x += PLAIN_THREADS) {
      if (flags & STORE_PARTIAL) partial.at(i, x) = s.num[x];
      else put(&out.at(i, x), s.num[x] * factor);
    }
    if (threadIdx.x == 0) {
      if (flags & STORE_PARTIAL) partial.at(i, p.e) = s.den, partial.at(i, p.e + 1) = s.ref;
      else if (stats.start) stats.at(i, 0) = factor, stats.at(i, 1) = finite_or_zero(s.ref);
    }
  }
  if (flags & ENTER && !p.reverse)
    for (; entered < p.limit; entered++)
      if (!mask.start || mask.at(entered, 0)) s.absorb(k, v, entered, key, kv, z, c, kv_low, z_low);
}

// exp(u W^T + row + column): each thread computes one entry at a time
template <class T> KERNEL(PLAIN_THREADS) plain_features(ARGUMENT Problem p) {
  typedef typename Computing<T>::type A;
  const i64 head = blockIdx.x / p.segments, piece = blockIdx.x % p.segments;
  int index[AXES];
  split_head(p, head, index);
  const View<const T> u = view<const T>(p.q, index), rows = view<const T>(p.k, index);
  const View<const T> row = view<const T>(p.v, index), column = view<const T>(p.mask, index);
  const View<T> out = view<T>(p.out, index);
  const i64 all = p.num_queries * p.m;
  for (i64 t = piece * PLAIN_THREADS + threadIdx.x; t < all; t += p.segments * PLAIN_THREADS) {
    const i64 i = t / p.m, j = t % p.m;
    A sum = 0;
    for (i64 x = 0; x < p.d; x++) sum += widened(u.at(i, x)) * widened(rows.at(j, x));
    put(&out.at(i, j), exp_of(sum + (widened(row.at(i, 0)) + widened(column.at(0, j)))));
  }
}

}  // namespace favorsharp
