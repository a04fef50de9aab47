// Each primitive alone, so that the results of every lane can be compared with the layouts in test_primitives.py.
namespace favorsharp {

// One product of (16, 16) and (16, 8), fragments as they are: a (32 lanes, 4), b (32, 2), d (32, 4).
template <class T> KERNEL(32) check_mma(const u32 *a, const u32 *b, float *d) {
  const int lane = threadIdx.x;
  u32 left[4], right[2];
  float sum[4];
  for (int i = 0; i < 4; i++) left[i] = a[lane * 4 + i], sum[i] = d[lane * 4 + i];
  for (int i = 0; i < 2; i++) right[i] = b[lane * 2 + i];
  mma(sum, left, right, T());
  for (int i = 0; i < 4; i++) d[lane * 4 + i] = sum[i];
}

// Four (8, 8) matrices, whose entries are their own positions, by cp.async and ldmatrix: out (2, 32 lanes, 4).
KERNEL(32) check_matrices(const u16 *x, u32 *out) {
  SHARED_MEMORY(raw);
  u16 *rows = (u16 *)raw;
  const int lane = threadIdx.x;
  copy_async(rows + lane * 8, x + lane * 8, true);
  commit_copies();
  wait_copies<0>();
  __syncwarp();
  u32 plain[4], transposed[4];
  load_matrices(plain, rows + lane * 8);
  load_transposed(transposed, rows + lane * 8);
  for (int i = 0; i < 4; i++) {
    out[lane * 4 + i] = plain[i];
    out[128 + lane * 4 + i] = transposed[i];
  }
}

// Groups of copies: the older group is complete after wait_copies<1>; entries that are not wanted are zero. out (2, 32,
// 8)
KERNEL(32) check_copies(const u16 *x, u16 *out) {
  SHARED_MEMORY(raw);
  u16 *rows = (u16 *)raw;
  const int lane = threadIdx.x;
  copy_async(rows + lane * 8, x + lane * 8, lane % 2 == 0);
  commit_copies();
  copy_async(rows + 256 + lane * 8, x + 256 + lane * 8, true);
  commit_copies();
  wait_copies<1>();
  for (int i = 0; i < 8; i++) out[lane * 8 + i] = rows[lane * 8 + i];
  wait_copies<0>();
  for (int i = 0; i < 8; i++) out[256 + lane * 8 + i] = rows[256 + lane * 8 + i];
}

KERNEL(32) check_numbers(const float *x, u16 *halves, u16 *bfloats, u32 *pairs, float *back, float *powers, int n) {
  for (int i = threadIdx.x; i < n; i += 32) {
    halves[i] = to_half(x[i]).bits;
    bfloats[i] = to_bfloat16(x[i]).bits;
    const u32 pair = to_halves(x[i], x[n - 1 - i]), bfloat_pair = to_bfloat16s(x[i], x[n - 1 - i]);
    pairs[2 * i] = pair, pairs[2 * i + 1] = bfloat_pair;
    back[2 * i] = to_float(to_half(x[i]));
    back[2 * i + 1] = to_float(to_bfloat16(x[i]));
    powers[i] = exp2_of(x[i]);
  }
}

KERNEL(32) check_pieces(const u32 *x, u32 *out) {
  store_16(out + threadIdx.x * 4, load_16(global(x) + (31 - threadIdx.x) * 4));
}

KERNEL(32) check_warp(const float *x, float *out) {
  out[threadIdx.x] = warp_sum(x[threadIdx.x]);
  out[32 + threadIdx.x] = warp_max(x[threadIdx.x]);
}

}  // namespace favorsharp
