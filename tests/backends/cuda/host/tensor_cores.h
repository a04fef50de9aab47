// The instructions that the kernels write in PTX: asynchronous copies, matrix loads and matrix products. The lane
// layouts are those of the PTX manual's sections on mma.m16n8k16, mma.m16n8k8 and ldmatrix; `make gpu-check` compares
// them with a real GPU.
#pragma once
#include "block.h"
#include "numbers.h"

#define HOST_HERE Place place = {__builtin_FILE(), __builtin_LINE()}

namespace host {

HOST_UNSEEN inline unsigned char *shared_memory() { return block.shared; }

// The byte offset in shared memory, which is what PTX calls a shared address.
HOST_UNSEEN inline void check_shared(const void *address, unsigned bytes, const char *what, Place place) {
  const ptrdiff_t offset = (const unsigned char *)address - block.shared;
  if (offset < 0 || offset + bytes > (ptrdiff_t)block.shared_bytes)
    fail(place, "%s of %u bytes at offset %td of %zu bytes of shared memory", what, bytes, offset, block.shared_bytes);
  if ((uintptr_t)address % bytes) fail(place, "%s at offset %td, not a multiple of %u bytes", what, offset, bytes);
}

// ---- cp.async -----------------------------------------------------------------------------------------------------

// The record of a thread's copies. Sanitizers see the copies, but not the accesses to this record.
HOST_UNSEEN inline void enlist(void *shared, const void *global, unsigned bytes, unsigned source_bytes, Place place) {
  const Copy copy = {shared, global, bytes, source_bytes, current->group};
  if (copy.bytes != 4 && copy.bytes != 8 && copy.bytes != 16) fail(place, "cp.async of %u bytes", copy.bytes);
  if (copy.source_bytes > copy.bytes) fail(place, "cp.async of %u bytes from %u", copy.bytes, copy.source_bytes);
  check_shared(copy.shared, copy.bytes, "cp.async", place);
  if (copy.source_bytes && (uintptr_t)copy.global % copy.bytes)
    fail(place, "cp.async from %p, not a multiple of %u bytes", copy.global, copy.bytes);
  if (current->copies == MAX_COPIES) fail(place, "more than %u cp.async in flight in a thread", MAX_COPIES);
  current->copy[current->copies++] = copy;
}

inline void check_aligned(const void *address, unsigned bytes, Place place) {
  if ((uintptr_t)address % bytes) fail(place, "%u bytes at %p, which is no multiple of them", bytes, address);
}

// Between the issue and the wait, the destination has no valid value. It is written here, and again when the copy is
// made; sanitizers see both writes as the kernel's.
inline void cp_async(void *shared, const void *global, unsigned bytes, unsigned source_bytes, HOST_HERE) {
  enlist(shared, global, bytes, source_bytes, place);
  for (unsigned i = 0; i < bytes / 4; i++) ((uint32_t *)shared)[i] = 0xffffffffu;
}

HOST_UNSEEN inline void cp_async_commit() { current->group++; }

// Take the copies of all but the last `pending` groups.
HOST_UNSEEN inline unsigned take_landing(unsigned pending, Copy *landing) {
  unsigned kept = 0, taken = 0;
  for (unsigned i = 0; i < current->copies; i++) {
    const Copy copy = current->copy[i];
    if (copy.group + pending < current->group) landing[taken++] = copy;
    else current->copy[kept++] = copy;
  }
  current->copies = kept;
  return taken;
}

inline void land(const Copy &copy) {
  for (unsigned i = 0; i < copy.bytes; i++)
    ((unsigned char *)copy.shared)[i] = i < copy.source_bytes ? ((const unsigned char *)copy.global)[i] : 0;
}

// Make all copies except those of the last `pending` groups.
inline void cp_async_wait(unsigned pending) {
  Copy landing[MAX_COPIES];
  const unsigned count = take_landing(pending, landing);
  for (unsigned i = 0; i < count; i++) land(landing[i]);
}

inline void cp_async_wait_all() {
  cp_async_commit();
  cp_async_wait(0);
}

// ---- ldmatrix -----------------------------------------------------------------------------------------------------

template <int N, bool TRANSPOSED> struct Rows {
  const uint16_t *first[N], *second[TRANSPOSED ? N : 1];
};

// Lane l of the first 8 * N gives the address of row l % 8 of matrix l / 8. Lane l takes elements 2 (l % 4) and the next
// of row l / 4 of each matrix, or of its transpose.
template <int N, bool TRANSPOSED> HOST_UNSEEN void choose_rows(const void *const *given, Rows<N, TRANSPOSED> *result) {
  for (unsigned l = 0; l < WARP; l++)
    for (unsigned matrix = 0; matrix < N; matrix++) {
      const uint16_t *const *rows = (const uint16_t *const *)given + 8 * matrix;
      if constexpr (TRANSPOSED) {
        result[l].first[matrix] = rows[2 * (l % 4)] + l / 4;
        result[l].second[matrix] = rows[2 * (l % 4) + 1] + l / 4;
      } else {
        result[l].first[matrix] = rows[l / 4] + 2 * (l % 4);
      }
    }
}

template <int N, bool TRANSPOSED = false> inline void ldmatrix(uint32_t (&out)[N], const void *row, HOST_HERE) {
  static_assert(N == 1 || N == 2 || N == 4, "ldmatrix loads 1, 2 or 4 matrices");
  if (lane() < 8 * N) check_shared(row, 16, "ldmatrix", place);
  using Chosen = Rows<N, TRANSPOSED>;
  const Chosen rows =
      exchange<Chosen>(row, 0xffffffffu, TRANSPOSED ? "ldmatrix.trans" : "ldmatrix", place, choose_rows<N, TRANSPOSED>);
  for (int i = 0; i < N; i++) {  // sanitizers see these loads as the kernel's
    const uint16_t low = *rows.first[i], high = TRANSPOSED ? *rows.second[TRANSPOSED ? i : 0] : rows.first[i][1];
    out[i] = low | (uint32_t)high << 16;
  }
}

// ---- mma ----------------------------------------------------------------------------------------------------------

struct Fragments {
  float c[4];
  uint32_t a[4], b[2];
};
struct Sums {
  float d[4];
};

#ifdef HOST_TRUNCATES

// A sum as tensor cores are reported to compute it: all terms are truncated two bits below the last place that the
// largest of them has in float32, then added exactly, and the sum is truncated to float32.
template <int K> HOST_UNSEEN inline float sum_of_products(const float *a, const float (*b)[8], unsigned column, float c) {
  double term[K + 1], largest = __builtin_fabs((double)c), plain = c;
  term[K] = c;
  for (int k = 0; k < K; k++) {
    term[k] = (double)a[k] * (double)b[k][column];
    plain += term[k];
    largest = __builtin_fabs(term[k]) > largest ? __builtin_fabs(term[k]) : largest;
  }
  if (largest == 0 || plain - plain != 0) return (float)plain;  // zeros, or not finite
  const int exponent = (int)(bits<uint64_t>(largest) >> 52) - 1023;
  const double unit = bits<double>((uint64_t)(1023 + 25 - exponent) << 52);
  const double back = bits<double>((uint64_t)(1023 - 25 + exponent) << 52);
  int64_t sum = 0;
  for (int k = 0; k <= K; k++) sum += (int64_t)(term[k] * unit);
  const double whole = (double)sum * back;
  float kept = (float)whole;
  const bool rounded_up = __builtin_fabs((double)kept) > __builtin_fabs(whole);
  return rounded_up ? bits<float>(bits<uint32_t>(kept) - 1) : kept;
}

#else

template <int K> HOST_UNSEEN inline float sum_of_products(const float *a, const float (*b)[8], unsigned column, float c) {
  for (unsigned k = 0; k < K; k++) c += a[k] * b[k][column];
  return c;
}

#endif

// D (16, 8) = A (16, K) B (K, 8) + C. The lane that comes last computes for the whole warp.
template <int K> HOST_UNSEEN inline void multiply(const float (&a)[16][K], const float (&b)[K][8],
                                                  const Fragments *given, Sums *result) {
  for (unsigned l = 0; l < WARP; l++)
    for (unsigned i = 0; i < 4; i++) {
      const unsigned row = l / 4 + 8 * (i / 2), column = 2 * (l % 4) + i % 2;
      result[l].d[i] = sum_of_products<K>(a[row], b, column, given[l].c[i]);
    }
}

template <float (*WIDEN)(uint16_t)> HOST_UNSEEN void multiply_halves(const Fragments *given, Sums *result) {
  float a[16][16], b[16][8];
  for (unsigned l = 0; l < WARP; l++)
    for (unsigned i = 0; i < 2; i++) {
      const unsigned g = l / 4, t = 2 * (l % 4) + i;
      for (unsigned j = 0; j < 4; j++) a[g + 8 * (j % 2)][t + 8 * (j / 2)] = WIDEN(given[l].a[j] >> 16 * i);
      for (unsigned j = 0; j < 2; j++) b[t + 8 * j][g] = WIDEN(given[l].b[j] >> 16 * i);
    }
  multiply<16>(a, b, given, result);
}

HOST_UNSEEN inline void multiply_tf32(const Fragments *given, Sums *result) {
  float a[16][8], b[8][8];
  for (unsigned l = 0; l < WARP; l++) {
    const unsigned g = l / 4, t = l % 4;
    for (unsigned j = 0; j < 4; j++) a[g + 8 * (j % 2)][t + 4 * (j / 2)] = tf32_seen(given[l].a[j]);
    for (unsigned j = 0; j < 2; j++) b[t + 4 * j][g] = tf32_seen(given[l].b[j]);
  }
  multiply<8>(a, b, given, result);
}

HOST_UNSEEN inline void mma(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], const char *what,
                            void (*compute)(const Fragments *, Sums *), Place place) {
  const Fragments mine = {{d[0], d[1], d[2], d[3]}, {a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Sums sums = exchange<Sums>(mine, 0xffffffffu, what, place, compute);
  for (unsigned i = 0; i < 4; i++) d[i] = sums.d[i];
}

inline void mma_m16n8k16_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOST_HERE) {
  mma(d, a, b, "mma.m16n8k16.bf16", multiply_halves<bf16_to_float>, place);
}
inline void mma_m16n8k16_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOST_HERE) {
  mma(d, a, b, "mma.m16n8k16.f16", multiply_halves<half_to_float>, place);
}
inline void mma_m16n8k8_tf32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], HOST_HERE) {
  mma(d, a, b, "mma.m16n8k8.tf32", multiply_tf32, place);
}

inline void barrier(unsigned id, unsigned threads, HOST_HERE) { named_barrier(id, threads, place); }

}  // namespace host
