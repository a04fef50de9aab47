// The seeds of landmarks, drawn one after the other: the next is the candidate with the largest sum of its log weight and
// of log(1 - exp(-D^2)), where D is its distance to the nearest seed so far. Distances are computed in double.
namespace favorsharp {

constexpr int SEED_WARPS = SEED_THREADS / 32;
constexpr double SEED_GRAIN = 3.552713678800501e-15;  // 16 * 2^-52: smaller squared distances are rounding errors
constexpr int NOWHERE = 0x7fffffff;

// The larger score; of equal ones that of the first candidate.
DEVICE void take_larger(double &top, int &place, double other, int there) {
  if (other > top || (other == top && there < place)) top = other, place = there;
}

#define SEED_BOUNDS SEED_THREADS, 1  // otherwise the compiler aims at more blocks, and spills

// A block draws the seeds of one head. q holds the candidates (d, num_keys), k their log weights (1, num_keys). Written
// are the places of the seeds (1, m) to out, and to mask (1, m) whether a candidate was left.
template <class T> KERNEL(SEED_BOUNDS) draw_seeds(ARGUMENT Problem p) {
  SHARED_MEMORY(raw);
  const int count = (int)p.num_keys, d = (int)p.d, t = threadIdx.x;
  double *chosen = (double *)raw, *own = chosen + d, *nearest = own + count, *unexplained = nearest + count;
  double *tops = unexplained + count;
  int *places = (int *)(tops + SEED_WARPS);
  int index[AXES];
  split_head(p, blockIdx.x, index);
  const View<const T> points = view<const T>(p.q, index);
  const View<const double> logs = view<const double>(p.k, index);
  const View<i64> picks = view<i64>(p.out, index);
  const View<bool> used = view<bool>(p.mask, index);
  for (int c = t; c < count; c += SEED_THREADS) {
    double square = 0;
    for (int i = 0; i < d; i++) square += (double)points.at(i, c) * (double)points.at(i, c);
    own[c] = square;
    nearest[c] = infinity<double>();
    unexplained[c] = 0;
  }
  for (i64 seed = 0; seed < p.m; seed++) {
    double top = -infinity<double>();
    int place = NOWHERE;
    for (int c = t; c < count; c += SEED_THREADS) take_larger(top, place, logs.at(0, c) + unexplained[c], c);
    for (int bit = 16; bit; bit >>= 1) {
      const double other = __shfl_xor_sync(WHOLE_WARP, top, bit);
      const int there = __shfl_xor_sync(WHOLE_WARP, place, bit);
      take_larger(top, place, other, there);
    }
    if (t % 32 == 0) tops[t / 32] = top, places[t / 32] = place;
    __syncthreads();  // the best of each warp is there
    for (int w = 0; w < SEED_WARPS; w++) take_larger(top, place, tops[w], places[w]);
    const int best = place < count ? place : 0;  // if no score is a number, there is no best
    if (t == 0) picks.at(0, seed) = best, used.at(0, seed) = top > -infinity<double>();
    for (int i = t; i < d; i += SEED_THREADS) chosen[i] = (double)points.at(i, best);
    __syncthreads();  // the seed is there, and all threads know it
    const double size = own[best];
    for (int c = t; c < count; c += SEED_THREADS) {
      double product = 0;
#pragma unroll 8
      for (int i = 0; i < d; i++) product += (double)points.at(i, c) * chosen[i];
      double square = own[c] + size - 2 * product;
      if (!(square > SEED_GRAIN * (own[c] + size))) square = 0;
      if (!(square < nearest[c])) continue;
      nearest[c] = square;
      unexplained[c] = square > 0 ? log(-expm1(-square)) : -infinity<double>();
    }
  }
}

}  // namespace favorsharp
