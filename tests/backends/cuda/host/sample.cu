// Kernels that use each feature that the shim emulates, for the tests of the shim; they are not part of the library.
namespace sample {

// The sum of each row, with one block for each row: shuffles within a warp, shared memory between warps.
__global__ void row_sums(const float *x, float *sums, long long columns) {
  float *partial = (float *)host::shared_memory();
  const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32;
  for (int round = 0; round < 3; round++) {  // the next round overwrites these, so each round ends with a barrier
    float sum = 0.0f;
    for (long long i = threadIdx.x; i < columns; i += blockDim.x) sum += x[blockIdx.x * columns + i] * (round == 2);
    for (int step = 16; step; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (threadIdx.x % 32 == 0) partial[warp] = sum;
    __syncthreads();
    if (threadIdx.x == (unsigned)round) {
      float total = 0.0f;
      for (unsigned w = 0; w < warps; w++) total += partial[w];
      partial[warps] = total;
    }
    __syncthreads();
    if (threadIdx.x == 0) sums[blockIdx.x] = partial[warps];
    __syncthreads();
  }
}

// C (16, 8) = A (16, k) B (k, 8) in 16-bit numbers, one warp, two stages of asynchronous copies; k a multiple of 16.
// B is row by row, so its tiles are transposed on the way to the registers.
template <bool BF16> __global__ void product(const unsigned short *a, const unsigned short *b, float *c, int k) {
  unsigned short *tiles = (unsigned short *)host::shared_memory();
  const int lane = threadIdx.x;
  constexpr int A = 16 * 16, STAGE = A + 16 * 8;
  auto fetch = [&](int step) {
    unsigned short *stage = tiles + step % 2 * STAGE;
    const int row = lane / 2, half = lane % 2;
    host::cp_async(stage + row * 16 + half * 8, a + row * k + step * 16 + half * 8, 16, 16);
    if (half == 0) host::cp_async(stage + A + row * 8, b + (step * 16 + row) * 8, 16, 16);
  };
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  fetch(0);
  host::cp_async_commit();
  for (int step = 0; step < k / 16; step++) {
    if ((step + 1) * 16 < k) fetch(step + 1);
    host::cp_async_commit();
    host::cp_async_wait(1);
    __syncwarp();
    const unsigned short *stage = tiles + step % 2 * STAGE;
    unsigned a_part[4], b_part[2];
    host::ldmatrix<4>(a_part, stage + (lane % 16) * 16 + lane / 16 * 8);
    host::ldmatrix<2, true>(b_part, stage + A + (lane % 16) * 8);
    if constexpr (BF16) host::mma_m16n8k16_bf16(sums, a_part, b_part);
    else host::mma_m16n8k16_f16(sums, a_part, b_part);
    __syncwarp();
  }
  host::cp_async_wait_all();
  for (int i = 0; i < 4; i++) c[(lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = sums[i];
}

// C (16, 8) = A (16, 8) B (8, 8) in tf32, operands from global memory.
__global__ void product_tf32(const float *a, const float *b, float *c) {
  const int g = threadIdx.x / 4, t = threadIdx.x % 4;
  unsigned a_part[4], b_part[2];
  for (int i = 0; i < 4; i++) a_part[i] = host::float_to_tf32(a[(g + i % 2 * 8) * 8 + t + i / 2 * 4]);
  for (int i = 0; i < 2; i++) b_part[i] = host::float_to_tf32(b[(t + i * 4) * 8 + g]);
  float sums[4] = {0.0f, 0.0f, 0.0f, 0.0f};
  host::mma_m16n8k8_tf32(sums, a_part, b_part);
  for (int i = 0; i < 4; i++) c[(g + i / 2 * 8) * 8 + t * 2 + i % 2] = sums[i];
}

// One warp fills a tile while another reads the one before: barriers of two warps out of three.
__global__ void hand_over(const float *x, float *y, int rounds) {
  float *tile = (float *)host::shared_memory();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (warp == 2) return;
  for (int round = 0; round < rounds; round++) {
    if (warp == 0) tile[lane] = x[round * 32 + lane];
    host::barrier(1, 64);
    if (warp == 1) y[round * 32 + lane] = 2.0f * tile[31 - lane];
    host::barrier(2, 64);
  }
}

// Kernels with one mistake each; the number selects the mistake.
__global__ void wrong(int what, float *out, long long n) {
  float *shared = (float *)host::shared_memory();
  const unsigned thread = threadIdx.x;
  if (what == 0) {  // a barrier that half of the block does not reach
    if (thread < 32) __syncthreads();
  } else if (what == 1) {  // two barriers where there should be one
    if (thread < 32) __syncthreads();
    else __syncthreads();
  } else if (what == 2) {  // a barrier after a return
    if (thread == 5) return;
    __syncthreads();
  } else if (what == 3) {  // a shuffle of half a warp
    if (thread < 16) out[thread] = __shfl_xor_sync(0xffffffffu, 1.0f, 1);
  } else if (what == 4) {  // a copy that is never waited for
    host::cp_async(shared + 4 * thread, out + 4 * thread, 16, 16);
    host::cp_async_commit();
  } else if (what == 5) {  // a copy past the end of shared memory
    host::cp_async(shared + n, out, 16, 16);
  } else if (what == 6) {  // a matrix row that is not aligned
    unsigned rows[1];
    host::ldmatrix<1>(rows, shared + 1);
  } else if (what == 7) {  // shared memory that was never written
    out[blockIdx.x * 64 + thread] = shared[thread];
  } else if (what == 8) {  // one element too many
    shared[n] = 1.0f;
  } else if (what == 9) {  // the same in global memory
    out[n] = 1.0f;
  } else if (what == 10) {  // blocks that add to one number without an atomic
    if (thread == 0) out[0] += 1.0f;
  } else if (what == 11) {
    if (thread == 0) atomicAdd(out, 1.0f);
  } else if (what == 12) {  // a misaligned vector
    ((float4 *)(out + 1))[0] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  } else if (what == 13) {  // lanes of one warp that wait for different things
    if (thread % 2) __syncwarp();
    else out[thread] = __shfl_sync(0xffffffffu, 1.0f, 0);
  }
}

}  // namespace sample
