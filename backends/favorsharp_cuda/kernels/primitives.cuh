// Definitions that differ between the two compilers of this source; all other files use them. For a GPU (NVRTC, nvcc),
// intrinsics are inline PTX, so that no header is needed. With FAVORSHARP_HOST, a shim that is included before this
// file runs the same kernels on a CPU.
#define DEVICE __device__ __forceinline__
#define KERNEL(threads) __global__ void __launch_bounds__(threads)

typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

namespace favorsharp {

struct half {
  u16 bits;
};
struct bfloat16 {
  u16 bits;
};
constexpr u32 WHOLE_WARP = 0xffffffffu;

}  // namespace favorsharp

#ifdef FAVORSHARP_HOST

#define SHARED_MEMORY(name) unsigned char *name = ::host::shared_memory()
#define ARGUMENT const
#define INFINITY_F __builtin_inff()

namespace favorsharp {

DEVICE float to_float(half x) { return ::host::half_to_float(x.bits); }
DEVICE float to_float(bfloat16 x) { return ::host::bf16_to_float(x.bits); }
DEVICE half to_half(float x) { return {::host::float_to_half(x)}; }
DEVICE bfloat16 to_bfloat16(float x) { return {::host::float_to_bf16(x)}; }
DEVICE u32 to_halves(float low, float high) { return (u32)to_half(low).bits | (u32)to_half(high).bits << 16; }
DEVICE u32 to_bfloat16s(float low, float high) { return (u32)to_bfloat16(low).bits | (u32)to_bfloat16(high).bits << 16; }
DEVICE float exp2_of(float x) { return exp2f(x); }
template <class X> DEVICE X *global(X *x) { return x; }

// 16 bytes at once, from and to an address that is a multiple of 16.
DEVICE uint4 load_16(const void *from, ::host::HOST_HERE) {
  ::host::check_aligned(from, 16, place);
  return *(const uint4 *)from;
}
DEVICE void store_16(void *to, uint4 x, ::host::HOST_HERE) {
  ::host::check_aligned(to, 16, place);
  *(uint4 *)to = x;
}

// d += a b, where a is (16, 16) and b is (16, 8), in the fragments of mma.m16n8k16
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], half, ::host::HOST_HERE) {
  ::host::mma_m16n8k16_f16(d, a, b, place);
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bfloat16, ::host::HOST_HERE) {
  ::host::mma_m16n8k16_bf16(d, a, b, place);
}
// Load four matrices of (8, 8) halves from shared memory. Lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], const void *row, ::host::HOST_HERE) { ::host::ldmatrix<4>(r, row, place); }
DEVICE void load_transposed(u32 (&r)[4], const void *row, ::host::HOST_HERE) { ::host::ldmatrix<4, true>(r, row, place); }

// Copy 16 bytes from global to shared memory asynchronously; write zeros if they are not wanted.
DEVICE void copy_async(void *to, const void *from, bool wanted, ::host::HOST_HERE) {
  ::host::cp_async(to, from, 16, wanted ? 16 : 0, place);
}
DEVICE void commit_copies() { ::host::cp_async_commit(); }
template <int PENDING> DEVICE void wait_copies() { ::host::cp_async_wait(PENDING); }

}  // namespace favorsharp

#else

#define SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#define ARGUMENT const __grid_constant__
#define INFINITY_F __int_as_float(0x7f800000)

namespace favorsharp {

DEVICE float to_float(half x) {
  float y;
  asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(x.bits));
  return y;
}
DEVICE float to_float(bfloat16 x) { return __uint_as_float((u32)x.bits << 16); }
DEVICE half to_half(float x) {
  half y;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
DEVICE bfloat16 to_bfloat16(float x) {
  bfloat16 y;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
  return y;
}
// 16 bytes at once, from and to an address that is a multiple of 16.
DEVICE uint4 load_16(const void *from) { return *(const uint4 *)from; }
DEVICE void store_16(void *to, uint4 x) { *(uint4 *)to = x; }
// Returns x, which the compiler then knows as an address of global memory.
template <class X> DEVICE X *global(X *x) {
  __builtin_assume(__isGlobal(x));
  return x;
}
DEVICE u32 to_halves(float low, float high) {  // two numbers in one word
  u32 y;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE u32 to_bfloat16s(float low, float high) {
  u32 y;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
  return y;
}
DEVICE float exp2_of(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// d += a b, where a is (16, 16) and b is (16, 8), in the fragments of mma.m16n8k16
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], half) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE void mma(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], bfloat16) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
DEVICE u32 shared_address(const void *x) { return (u32)__cvta_generic_to_shared(x); }
// Load four matrices of (8, 8) halves from shared memory. Lane l gives the address of row l % 8 of matrix l / 8.
DEVICE void load_matrices(u32 (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
DEVICE void load_transposed(u32 (&r)[4], const void *row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// Copy 16 bytes from global to shared memory asynchronously; write zeros if they are not wanted.
DEVICE void copy_async(void *to, const void *from, bool wanted) {
  const int bytes = wanted ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(bytes)
               : "memory");
}
DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING> DEVICE void wait_copies() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

}  // namespace favorsharp

#endif

namespace favorsharp {

DEVICE float to_float(float x) { return x; }
DEVICE float exp2_of(double) = delete;

// The type that is computed in for each dtype, and functions that read and write items of a dtype.
template <class T> struct Computing {
  typedef float type;
};
template <> struct Computing<double> {
  typedef double type;
};
DEVICE float widened(float x) { return x; }
DEVICE float widened(half x) { return to_float(x); }
DEVICE float widened(bfloat16 x) { return to_float(x); }
DEVICE double widened(double x) { return x; }
DEVICE void put(float *p, float x) { *p = x; }
DEVICE void put(half *p, float x) { *p = to_half(x); }
DEVICE void put(bfloat16 *p, float x) { *p = to_bfloat16(x); }
DEVICE void put(double *p, double x) { *p = x; }

// Returns x, but the compiler does not know that the number is the same. So it computes again what depends on the
// number, and does not keep earlier results in registers.
DEVICE int again(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Add x to a sum whose low part holds the rounding error of earlier additions. The error of sum + low does not grow
// with the number of additions. If the sum is not finite, its low part becomes 0.
template <class A> DEVICE void add_to(A &sum, A &low, A x) {
  const A y = x + low, all = sum + y, lost = y - (all - sum);
  low = lost - lost == 0 ? lost : A(0);
  sum = all;
}

DEVICE u32 pack(u16 low, u16 high) { return (u32)low | (u32)high << 16; }

template <class A> DEVICE A infinity();
template <> DEVICE float infinity<float>() { return INFINITY_F; }
template <> DEVICE double infinity<double>() { return (double)INFINITY_F; }

DEVICE float larger(float a, float b) { return fmaxf(a, b); }  // if one is NaN, returns the other
DEVICE double larger(double a, double b) { return fmax(a, b); }
DEVICE float exp_of(float x) { return exp2_of(x * 1.4426950408889634f); }
DEVICE double exp_of(double x) { return exp(x); }
DEVICE float log_of(float x) { return logf(x); }
DEVICE double log_of(double x) { return log(x); }

template <class A> DEVICE A warp_max(A x) {
  for (int bit = 16; bit; bit >>= 1) x = larger(x, __shfl_xor_sync(WHOLE_WARP, x, bit));
  return x;
}
template <class A> DEVICE A warp_sum(A x) {
  for (int bit = 16; bit; bit >>= 1) x += __shfl_xor_sync(WHOLE_WARP, x, bit);
  return x;
}

}  // namespace favorsharp
