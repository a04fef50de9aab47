// Runs CUDA C++ kernels on a CPU: g++ -include shim.h. This file defines the keywords of CUDA; block.h has the threads
// and their barriers, tensor_cores.h the instructions that kernels write in PTX, fibers.h the switches between threads.
// docs/design/host-shim.md says what this proves, and what it cannot.
#pragma once
#define FAVORSHARP_HOST 1
#include <math.h>
#include <stddef.h>
#include <type_traits>

#include "tensor_cores.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(bytes) alignas(bytes)

#define threadIdx (::host::current->index)
#define blockIdx (::host::block.index)
#define blockDim (::host::block.block_dim)
#define gridDim (::host::block.grid_dim)

#define HOST_VECTOR(T, scalar, bytes2, bytes4)                                                       \
  struct alignas(bytes2) T##2 { scalar x, y; };                                                      \
  struct alignas(bytes4) T##4 { scalar x, y, z, w; };                                                \
  inline T##2 make_##T##2(scalar x, scalar y) { return {x, y}; }                                     \
  inline T##4 make_##T##4(scalar x, scalar y, scalar z, scalar w) { return {x, y, z, w}; }
HOST_VECTOR(float, float, 8, 16)
HOST_VECTOR(int, int, 8, 16)
HOST_VECTOR(uint, unsigned, 8, 16)
HOST_VECTOR(double, double, 16, 16)
#undef HOST_VECTOR

inline float __uint_as_float(unsigned x) { return host::bits<float>(x); }
inline unsigned __float_as_uint(float x) { return host::bits<unsigned>(x); }
inline float __int_as_float(int x) { return host::bits<float>(x); }
inline int __float_as_int(float x) { return host::bits<int>(x); }
inline double __longlong_as_double(long long x) { return host::bits<double>(x); }
inline long long __double_as_longlong(double x) { return host::bits<long long>(x); }

inline float __expf(float x) { return expf(x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
template <class T> inline T __ldg(const T *x) { return *x; }
template <class T, class U> inline auto min(T x, U y) { return y < x ? y : x; }
template <class T, class U> inline auto max(T x, U y) { return x < y ? y : x; }

inline void __syncthreads(host::HOST_HERE) { host::block_barrier(place); }
inline void __syncwarp(unsigned mask = 0xffffffffu, host::HOST_HERE) { host::warp_barrier(mask, place); }

namespace host {

template <class T> struct Shuffled {
  T value;
  unsigned from;
};
template <class T> HOST_UNSEEN void shuffle(const Shuffled<T> *given, T *result) {
  for (unsigned l = 0; l < WARP; l++) result[l] = given[given[l].from].value;
}
template <class T> inline T take(unsigned mask, T value, unsigned from, const char *what, Place place) {
  return exchange<T>(Shuffled<T>{value, from}, mask, what, place, shuffle<T>);
}
HOST_UNSEEN inline void vote(const bool *given, unsigned *result) {
  unsigned votes = 0;
  for (unsigned l = 0; l < WARP; l++) votes |= (unsigned)given[l] << l;
  for (unsigned l = 0; l < WARP; l++) result[l] = votes;
}

}  // namespace host

template <class T> inline T __shfl_sync(unsigned mask, T value, int from, int width = 32, host::HOST_HERE) {
  const unsigned base = host::lane() / width * width;
  return host::take(mask, value, base + (unsigned)from % width, "__shfl_sync", place);
}
template <class T> inline T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, host::HOST_HERE) {
  const unsigned lane = host::lane(), other = lane ^ (unsigned)bits;
  return host::take(mask, value, other / width == lane / width ? other : lane, "__shfl_xor_sync", place);
}
template <class T> inline T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, host::HOST_HERE) {
  const unsigned lane = host::lane();
  return host::take(mask, value, lane % width >= by ? lane - by : lane, "__shfl_up_sync", place);
}
template <class T> inline T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, host::HOST_HERE) {
  const unsigned lane = host::lane();
  return host::take(mask, value, lane % width + by < (unsigned)width ? lane + by : lane, "__shfl_down_sync", place);
}
inline unsigned __ballot_sync(unsigned mask, int vote, host::HOST_HERE) {
  return host::exchange<unsigned>(vote != 0, mask, "__ballot_sync", place, host::vote);
}
inline int __any_sync(unsigned mask, int vote, host::HOST_HERE) {
  return host::exchange<unsigned>(vote != 0, mask, "__any_sync", place, host::vote) != 0;
}
inline int __all_sync(unsigned mask, int vote, host::HOST_HERE) {
  return host::exchange<unsigned>(vote != 0, mask, "__all_sync", place, host::vote) == 0xffffffffu;
}

template <class T> inline T atomicAdd(T *address, T value) {  // a loop of atomic operations, which ThreadSanitizer recognises
  using Bits = typename std::conditional<sizeof(T) == 4, uint32_t, uint64_t>::type;
  static_assert(sizeof(T) == sizeof(Bits), "an atomic of 4 or 8 bytes");
  Bits seen = __atomic_load_n((Bits *)address, __ATOMIC_RELAXED);
  while (!__atomic_compare_exchange_n((Bits *)address, &seen, host::bits<Bits>(host::bits<T>(seen) + value), false,
                                      __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
  return host::bits<T>(seen);
}
