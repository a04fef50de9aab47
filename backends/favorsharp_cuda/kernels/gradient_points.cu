// Kernels before and after the sweeps: the factors of points (the part of log features that depends only on the point),
// and the gradients of points and of maps.
namespace favorsharp {

// A tile of points, and the products for their factors: offset + linear.z - beta |z|^2 - |dense^T z|^2.
template <class T, int W> struct Factors {
  typedef typename Computing<T>::type A;
  static constexpr int C = GRADIENT_ROWS, P = W + 4;
  static constexpr bool STAGED = sizeof(A) == 4;  // dense is in shared memory; doubles might not fit
  const Gradients &g;
  A *point, *square, *dense;

  DEVICE Factors(const Gradients &g, unsigned char *raw)
      : g(g), point((A *)raw), square((A *)raw + C * P), dense((A *)raw + 2 * C * P) {}

  DEVICE void load_dense(const PlainSide<A> &side) {
    if (!STAGED) return;
    for (int i = threadIdx.x; i < W * W; i += GRADIENT_THREADS) {
      const int r = i / W, c = i % W;
      dense[r * P + c] = r < g.d && c < g.d ? side.dense()[r * g.d + c] : 0;
    }
  }
  // tile += rows dense, or rows dense^T
  template <bool TRANSPOSED> DEVICE void add_product(Tile<A, C, W> &tile, const A *rows, const PlainSide<A> &side) {
    if constexpr (STAGED) {
      tile.template add_product<Planes<T>::EXPONENT>(rows, P, 1, dense, TRANSPOSED ? 1 : P, TRANSPOSED ? P : 1, W);
    } else {
      const int size = (int)g.d, inner = TRANSPOSED ? 1 : size, column = TRANSPOSED ? size : 1;
      const A *const matrix = side.dense();
#pragma unroll 1
      for (int k = 0; k < size; k++)
        tile.each([&](int r, int c, A &value) {
          if (c < size) value += rows[r * P + k] * matrix[k * inner + c * column];
        });
    }
  }
  // square = point dense, with each row multiplied by scale(row)
  template <class Scale> DEVICE void multiply(const PlainSide<A> &side, Scale scale) {
    Tile<A, C, W> tile;
    tile.clear();
    add_product<false>(tile, point, side);
    tile.each([&](int r, int c, A &value) { square[r * P + c] = scale(r) * value; });
  }
};

// Compute the factors and the other numbers that a sweep needs of each point of one side, which g.keys_read selects.
// One block for each tile.
template <class T, int W> KERNEL(GRADIENT_BOUNDS) gradient_factors(ARGUMENT Gradients g) {
  typedef Factors<T, W> F;
  typedef typename F::A A;
  SHARED_MEMORY(raw);
  F f(g, raw);
  const bool keys = g.keys_read;
  const i64 all = keys ? g.num_keys : g.num_queries, tiles = (all + F::C - 1) / F::C;
  const i64 head = blockIdx.x / tiles, start = blockIdx.x % tiles * F::C;
  const int count = (int)min((i64)F::C, all - start), r = threadIdx.x / 4, part = threadIdx.x % 4;
  i64 index[AXES];
  split_head(g, head, index);
  const View<const T> q = view<const T>(g.q, index), k = view<const T>(g.k, index), x = keys ? k : q;
  const View<const bool> mask = view<const bool>(g.mask, index), none = {0, 0, 0}, visible = keys ? mask : none;
  const i64 map = along(index, g.map_axis) * g.constants;
  const PlainSide<A> side = {(const A *)(keys ? g.key : g.query) + map, g.d, g.m};
  load_points<T, W>(f.point, x, g.d, start, count, side.alpha(), side.center(), visible);
  if (g.has_dense) f.load_dense(side);
  __syncthreads();  // the points and the matrix are there
  if (g.has_dense) {
    f.multiply(side, [](int) { return A(1); });
    __syncthreads();  // its products with the points are there
  }
  A factor = 0, last = 0;
  for (int c = part; c < g.d; c += 4) {
    const A z = f.point[r * F::P + c];
    factor += side.linear()[c] * z - side.beta() * z * z;
    if (g.has_dense) factor -= f.square[r * F::P + c] * f.square[r * F::P + c];
  }
  const View<const T> gradient = view<const T>(g.gradient, index), out = view<const T>(g.out, index);
  if (!keys && out.start && r < count)
    for (int c = part; c < g.e; c += 4) last -= widened(gradient.at(start + r, c)) * widened(out.at(start + r, c));
  factor = finite_or_nan(side.offset() + quarter_sum(factor)), last = quarter_sum(last);
  if (part != 0 || r >= count) return;
  if (keys) {
    const bool hidden = mask.start && !mask.at(start + r, 0);
    ((A *)g.key_factor)[head * all + start + r] = hidden ? -infinity<A>() : factor;
    ((A *)g.key_near)[head * all + start + r] = hidden ? -infinity<A>() : A(0);
  } else {
    const View<const A> stats = view<const A>(g.stats, index);
    const A inverse = stats.start ? stats.at(start + r, 0) : A(1);  // 0 if the query sees nothing
    const A near = !stats.start ? A(0) : inverse == 0 ? -infinity<A>() : log_of(inverse) - stats.at(start + r, 1);
    ((A *)g.query_factor)[head * all + start + r] = inverse == 0 ? near : near + factor;
    ((A *)g.query_near)[head * all + start + r] = near;
    ((A *)g.query_last)[head * all + start + r] = last;
  }
}

// The heads of the batch that are added up for head `number` of target. There are fewer than 2^31 heads. Numbers have
// 32 bits, because loops with 64-bit divisions would not be unrolled, and the arrays would be put into local memory.
struct Members {
  int index[AXES], base[AXES];
  u32 count;
  DEVICE Members(const Gradients &g, u32 number) : count(1) {
#pragma unroll
    for (int a = AXES - 1; a >= 0; a--) {
      const u32 size = (u32)g.shape[a] / (u32)g.member[a];
      base[a] = number % size;
      number /= size;
      count *= (u32)g.member[a];
    }
  }
  DEVICE i64 head(const Gradients &g, u32 member) {
    u32 head = 0, step = 1;
#pragma unroll
    for (int a = AXES - 1; a >= 0; a--) {
      index[a] = base[a] + member % (u32)g.member[a];
      member /= (u32)g.member[a];
      head += index[a] * step;
      step *= (u32)g.shape[a];
    }
    return head;
  }
};

// Compute the gradient of points from those of z = alpha x - center and of the factor. One block for each tile of
// target.
template <class T, int W> KERNEL(GRADIENT_BOUNDS) gradient_points(ARGUMENT Gradients g) {
  typedef Factors<T, W> F;
  typedef typename F::A A;
  SHARED_MEMORY(raw);
  F f(g, raw);
  const bool keys = g.keys_read, with_factor = keys || g.of_factors;
  const i64 all = keys ? g.num_keys : g.num_queries, tiles = (all + F::C - 1) / F::C;
  const i64 start = blockIdx.x % tiles * F::C;
  const int count = (int)min((i64)F::C, all - start);
  Members members(g, blockIdx.x / tiles);
  Tile<A, F::C, W> sum;
  sum.clear();
  for (u32 t = 0; t < members.count; t++) {
    const i64 head = members.head(g, t), line = head * all + start;
    const i64 map = along(members.index, g.map_axis) * g.constants;
    const PlainSide<A> side = {(const A *)(keys ? g.key : g.query) + map, g.d, g.m};
    const A *slopes = (const A *)(keys ? g.key_slopes : g.query_slopes) + line;
    const A *rows = (const A *)(keys ? g.dk : g.dq) + line * g.d;
    if (with_factor) {
      const View<const T> x = keys ? view<const T>(g.k, members.index) : view<const T>(g.q, members.index);
      View<const bool> visible = view<const bool>(g.mask, members.index);
      if (!keys) visible.start = nullptr;
      load_points<T, W>(f.point, x, g.d, start, count, side.alpha(), side.center(), visible);
      if (g.has_dense) f.load_dense(side);
      __syncthreads();  // the points and the matrix are there
      if (g.has_dense) {  // add -2 alpha slope dense dense^T z; scaling z dense makes one tile of sums enough
        f.multiply(side, [&](int r) { return r < count ? -2 * side.alpha() * slopes[r] : A(0); });
        __syncthreads();  // its products with the points are there
        f.template add_product<true>(sum, f.square, side);
      }
    }
    sum.each([&](int r, int c, A &value) {
      if (r >= count || c >= g.d) return;
      A of_z = rows[r * g.d + c];
      if (with_factor) of_z += slopes[r] * (side.linear()[c] - 2 * side.beta() * f.point[r * F::P + c]);
      value += side.alpha() * of_z;
    });
    if (with_factor && t + 1 < members.count) __syncthreads();  // the next head's points overwrite these
  }
  const View<T> to = view<T>(g.target, members.base);
  sum.each([&](int r, int c, A &value) {
    if (r < count && c < g.d) put(&to.at(start + r, c), value);
  });
}

// Write target, in its own dtype. Each number is a sum over the heads that target was broadcast to. One thread for each
// number.
template <class T> KERNEL(GRADIENT_BOUNDS) sum_members(ARGUMENT Gradients g) {
  typedef typename Computing<T>::type A;
  const i64 number = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x, size = g.num_rows * g.num_columns;
  if (number >= g.targets * size) return;
  Members members(g, number / size);
  const i64 row = number % size / g.num_columns, column = number % g.num_columns;
  const A *from = (const A *)g.from + row * g.row_step + column * g.column_step;
  A sum = 0, low = 0;
  for (u32 t = 0; t < members.count; t++) add_to(sum, low, from[members.head(g, t) * g.head_step]);
  put(&view<T>(g.target, members.base).at(row, column), sum);
}

// Sums over the points of a segment, of the side that g.keys_read selects: the gradient of the factor times the
// products of the point's coordinates, times the point, and alone. A block computes 32 rows of the products.
template <class T, int W> KERNEL(GRADIENT_BOUNDS) gradient_factor_sums(ARGUMENT Gradients g) {
  typedef typename Computing<T>::type A;
  constexpr int C = GRADIENT_ROWS, P = W + 4, PARTS = W / 32, SIZE = W * W + W + 1;
  SHARED_MEMORY(raw);
  A *point = (A *)raw, *weighted = point + C * P;
  const bool keys = g.keys_read;
  const i64 all = keys ? g.num_keys : g.num_queries;
  const i64 head = blockIdx.x / PARTS / g.segments, segment = blockIdx.x / PARTS % g.segments;
  const int part = blockIdx.x % PARTS;
  i64 index[AXES];
  split_head(g, head, index);
  const View<const T> q = view<const T>(g.q, index), k = view<const T>(g.k, index), x = keys ? k : q;
  const View<const bool> mask = view<const bool>(g.mask, index), none = {0, 0, 0}, visible = keys ? mask : none;
  const PlainSide<A> side = {(const A *)(keys ? g.key : g.query) + along(index, g.map_axis) * g.constants, g.d, g.m};
  const A *slopes = (const A *)(keys ? g.key_slopes : g.query_slopes) + head * all;
  Tile<A, 32, W> products;
  products.clear();
  A sum = 0, total = 0;
  const i64 stop = min(all, (segment + 1) * g.span);
  for (i64 start = segment * g.span; start < stop; start += C) {
    const int count = (int)min(stop - start, (i64)C);
    load_points<T, W>(point, x, g.d, start, count, side.alpha(), side.center(), visible);
    for (int i = threadIdx.x; i < C * W; i += GRADIENT_THREADS) {  // entries that this thread has loaded itself
      const int r = i / W, c = i % W;
      weighted[r * P + c] = r < count ? slopes[start + r] * point[r * P + c] : 0;
    }
    __syncthreads();  // the points, and the points times their gradients, are there
    products.template add_product<Planes<T>::VALUE, true>(weighted + part * 32, 1, P, point, P, 1, C);
    if (part == 0) {
      A own = 0, own_total = 0;
      if (threadIdx.x < W)
        for (int r = 0; r < C; r++) own += weighted[r * P + threadIdx.x];
      for (int r = 0; r < count; r++) own_total += slopes[start + r];
      sum += own, total += own_total;
    }
    __syncthreads();  // the next points overwrite these
  }
  A *to = (A *)g.factor_sums + (head * g.segments + segment) * SIZE;
  products.each([&](int r, int c, A &value) { to[(part * 32 + r) * W + c] = value; });
  if (part == 0) {
    if (threadIdx.x < W) to[W * W + threadIdx.x] = sum;
    if (threadIdx.x == 0) to[W * W + W] = total;
  }
}

// Sums over segments, from (outer, segments, inner) to (outer, inner). One thread for each number.
template <class A> KERNEL(GRADIENT_BOUNDS) sum_segments(ARGUMENT Gradients g) {
  const i64 number = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x, inner = g.inner;
  if (number >= g.outer * inner) return;
  const A *from = (const A *)g.from + number / inner * g.segments * inner + number % inner;
  A sum = 0, low = 0;
  for (i64 t = 0; t < g.segments; t++) add_to(sum, low, from[t * inner]);
  ((A *)g.to)[number] = sum;
}

// The gradients of a map's rows or, if g.keys_read, of its log weights. They follow from sums over points, (heads,
// inner, width + 1), of the gradients of log features, times the point and alone. q and k are the map's g1 and g2. One
// thread for each number.
template <class A> KERNEL(GRADIENT_BOUNDS) gradient_map(ARGUMENT Gradients g) {
  const i64 thread = (i64)blockIdx.x * GRADIENT_THREADS + threadIdx.x, columns = g.keys_read ? 1 : g.d;
  if (thread >= g.targets * g.m * columns) return;
  const i64 feature = thread / columns % g.m, column = thread % columns;
  Members members(g, thread / columns / g.m);
  A sum = 0, low = 0;
  for (u32 t = 0; t < members.count; t++) {
    const i64 line = (members.head(g, t) * g.inner + feature) * (g.width + 1);
    const A *query = (const A *)g.from + line, *key = (const A *)g.to + line;
    if (g.keys_read) {
      add_to(sum, low, (query[g.width] + key[g.width]) / 2);
    } else {
      const View<const A> g1 = view<const A>(g.q, members.index), g2 = view<const A>(g.k, members.index);
      A own = 0;
      for (i64 c = 0; c < g.d; c++) own += query[c] * g1.at(column, c) + key[c] * g2.at(column, c);
      add_to(sum, low, own);
    }
  }
  const View<A> to = view<A>(g.target, members.base);
  (g.keys_read ? to.at(0, feature) : to.at(feature, column)) = sum;
}

}  // namespace favorsharp
