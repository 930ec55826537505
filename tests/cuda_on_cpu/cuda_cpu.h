// The CUDA C++ language for g++: cuda_executor.py includes this file before a kernel source to compile it for
// the CPU.
//
// Only the kernel side is here: no <<<>>>, no host API, no tensor cores, no cooperative groups. Each CUDA
// thread is a fiber of cuda_cpu_rt.cpp, and every operation in which threads meet (a barrier, a shuffle) is a
// call into it.
#pragma once
#include <float.h>
#include <limits.h>
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <type_traits>
#include <utility>

#ifndef CUDA_CPU
#define CUDA_CPU 1
#endif

// ---- declaration specifiers ----
// g++ ignores the two cuda_... attributes; cuda_executor.py finds the kernels and their bounds by them.
#define __global__ __attribute__((cuda_global))
#define __launch_bounds__(...) __attribute__((cuda_launch_bounds(__VA_ARGS__, "end")))
#define __device__
#define __host__
#define __grid_constant__
#define __constant__ static
// At block scope thread_local implies static; and it may stand after extern, as __shared__ does.
#define __shared__ thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __align__(n) __attribute__((aligned(n)))
// A function whose own memory accesses the checker does not see.
#define CCPU_UNSEEN __attribute__((no_sanitize("thread")))

// ---- built-in types and variables ----
struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};

#define CCPU_VECTOR_TYPES(T, NAME)                                                   \
  struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                 \
  struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; }; \
  inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                         \
  inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
#define CCPU_VECTOR_TYPE_3(T, NAME) \
  struct NAME##3 { T x, y, z; };    \
  inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }
CCPU_VECTOR_TYPES(float, float)
CCPU_VECTOR_TYPES(double, double)
CCPU_VECTOR_TYPES(int, int)
CCPU_VECTOR_TYPES(unsigned, uint)
CCPU_VECTOR_TYPES(short, short)
CCPU_VECTOR_TYPES(unsigned short, ushort)
CCPU_VECTOR_TYPES(signed char, char)
CCPU_VECTOR_TYPES(unsigned char, uchar)
CCPU_VECTOR_TYPE_3(float, float)
CCPU_VECTOR_TYPE_3(double, double)
CCPU_VECTOR_TYPE_3(int, int)
#undef CCPU_VECTOR_TYPES
#undef CCPU_VECTOR_TYPE_3

extern uint3 threadIdx, blockIdx;
extern dim3 blockDim, gridDim;
constexpr int warpSize = 32;

// ---- entry points of the runtime ----
namespace ccpu {
enum BlockOp { SYNC_BLOCK, COUNT_TRUE, ALL_TRUE, ANY_TRUE };
enum WarpOp { SYNC_WARP, SHUFFLE_INDEX, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT };
enum AccessKind { READ, WRITE, ATOMIC };
struct Site {  // a line of the kernel source
  const char* file;
  int line;
};
}  // namespace ccpu

extern "C" {
uint64_t ccpu_block_op(ccpu::BlockOp op, bool predicate, ccpu::Site site);
uint64_t ccpu_warp_op(ccpu::WarpOp op, unsigned mask, uint64_t value, int argument, int width,
                      ccpu::Site site);
void ccpu_access(const void* address, size_t bytes, ccpu::AccessKind kind, void* program_counter);
[[noreturn]] void ccpu_fail(const char* what, ccpu::Site site);
}

// As the last parameters of a function, the line from which it is called; CCPU_HERE is that line.
#define CCPU_FROM const char *file = __builtin_FILE(), int line = __builtin_LINE()
#define CCPU_HERE (ccpu::Site{file, line})

// ---- barriers ----
inline void __syncthreads(CCPU_FROM) { ccpu_block_op(ccpu::SYNC_BLOCK, false, CCPU_HERE); }
inline int __syncthreads_count(int predicate, CCPU_FROM) {
  return (int)ccpu_block_op(ccpu::COUNT_TRUE, predicate != 0, CCPU_HERE);
}
inline int __syncthreads_and(int predicate, CCPU_FROM) {
  return (int)ccpu_block_op(ccpu::ALL_TRUE, predicate != 0, CCPU_HERE);
}
inline int __syncthreads_or(int predicate, CCPU_FROM) {
  return (int)ccpu_block_op(ccpu::ANY_TRUE, predicate != 0, CCPU_HERE);
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CCPU_FROM) {
  ccpu_warp_op(ccpu::SYNC_WARP, mask, 0, 0, warpSize, CCPU_HERE);
}
// One block runs at a time and one thread of it at a time, so there is nothing to order here.
inline void __threadfence() {}
inline void __threadfence_block() {}

// ---- shuffles and votes ----
namespace ccpu {
template <class T>
CCPU_UNSEEN inline T shuffle(WarpOp op, unsigned mask, T value, int argument, int width, Site site) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable<T>::value, "a shuffle takes at most 8 bytes");
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof(T));
  bits = ccpu_warp_op(op, mask, bits, argument, width, site);
  T result;
  memcpy(&result, &bits, sizeof(T));
  return result;
}
}  // namespace ccpu

template <class T>
inline T __shfl_sync(unsigned mask, T value, int lane, int width = warpSize, CCPU_FROM) {
  return ccpu::shuffle(ccpu::SHUFFLE_INDEX, mask, value, lane, width, CCPU_HERE);
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CCPU_FROM) {
  return ccpu::shuffle(ccpu::SHUFFLE_UP, mask, value, (int)delta, width, CCPU_HERE);
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize, CCPU_FROM) {
  return ccpu::shuffle(ccpu::SHUFFLE_DOWN, mask, value, (int)delta, width, CCPU_HERE);
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize, CCPU_FROM) {
  return ccpu::shuffle(ccpu::SHUFFLE_XOR, mask, value, lane_mask, width, CCPU_HERE);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, CCPU_FROM) {
  return (unsigned)ccpu_warp_op(ccpu::BALLOT, mask, predicate != 0, 0, warpSize, CCPU_HERE);
}
inline int __any_sync(unsigned mask, int predicate, CCPU_FROM) {
  return __ballot_sync(mask, predicate, file, line) != 0;
}
inline int __all_sync(unsigned mask, int predicate, CCPU_FROM) {
  return __ballot_sync(mask, !predicate, file, line) == 0;
}

// ---- failing on purpose ----
#define __trap() ccpu_fail("__trap", ccpu::Site{__FILE__, __LINE__})
#undef assert
#define assert(x) ((x) ? (void)0 : ccpu_fail("assert(" #x ")", ccpu::Site{__FILE__, __LINE__}))

// ---- atomics ----
// Only one thread runs at a time, so a plain update is atomic. Not inlined: the checker takes the place in
// the kernel from the return address.
#define CCPU_ATOMIC(NAME, UPDATED)                                                        \
  template <class T>                                                                      \
  CCPU_UNSEEN __noinline__ T NAME(T* address, typename std::common_type<T>::type value) { \
    ccpu_access(address, sizeof(T), ccpu::ATOMIC, __builtin_return_address(0));           \
    const T old = *address;                                                               \
    *address = (UPDATED);                                                                 \
    return old;                                                                           \
  }
CCPU_ATOMIC(atomicAdd, old + value)
CCPU_ATOMIC(atomicSub, old - value)
CCPU_ATOMIC(atomicExch, value)
CCPU_ATOMIC(atomicMax, old < value ? value : old)
CCPU_ATOMIC(atomicMin, value < old ? value : old)
CCPU_ATOMIC(atomicAnd, old& value)
CCPU_ATOMIC(atomicOr, old | value)
CCPU_ATOMIC(atomicXor, old ^ value)
#undef CCPU_ATOMIC
template <class T>
CCPU_UNSEEN __noinline__ T atomicCAS(T* address, typename std::common_type<T>::type expected,
                                     typename std::common_type<T>::type value) {
  ccpu_access(address, sizeof(T), ccpu::ATOMIC, __builtin_return_address(0));
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

// ---- maths that <math.h> lacks: the fast and the rounded forms are all the exact ones here ----
template <class A, class B>
constexpr typename std::common_type<A, B>::type min(A a, B b) {
  return b < a ? b : a;
}
template <class A, class B>
constexpr typename std::common_type<A, B>::type max(A a, B b) {
  return a < b ? b : a;
}
inline float rsqrtf(float x) { return 1.f / sqrtf(x); }
inline double rsqrt(double x) { return 1. / sqrt(x); }
inline float __expf(float x) { return expf(x); }
inline float __exp10f(float x) { return powf(10.f, x); }
inline float __logf(float x) { return logf(x); }
inline float __log2f(float x) { return log2f(x); }
inline float __sinf(float x) { return sinf(x); }
inline float __cosf(float x) { return cosf(x); }
inline float __powf(float x, float y) { return powf(x, y); }
inline float __fdividef(float a, float b) { return a / b; }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __frcp_rn(float x) { return 1.f / x; }
inline float __fsqrt_rn(float x) { return sqrtf(x); }
inline float __frsqrt_rn(float x) { return 1.f / sqrtf(x); }
inline float __saturatef(float x) { return x > 0 ? x > 1 ? 1 : x : 0; }
// The volatile keeps g++ from contracting them with what follows, which is what they are for.
inline float __fadd_rn(float a, float b) {
  volatile float sum = a + b;
  return sum;
}
inline float __fsub_rn(float a, float b) {
  volatile float difference = a - b;
  return difference;
}
inline float __fmul_rn(float a, float b) {
  volatile float product = a * b;
  return product;
}

// ---- loads and bits ----
template <class T>
inline T __ldg(const T* address) {
  return *address;
}
namespace ccpu {
template <class To, class From>
CCPU_UNSEEN inline To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "two types of one size");
  To result;
  memcpy(&result, &value, sizeof(To));
  return result;
}
}  // namespace ccpu
inline int __float_as_int(float x) { return ccpu::bits_as<int>(x); }
inline float __int_as_float(int x) { return ccpu::bits_as<float>(x); }
inline unsigned __float_as_uint(float x) { return ccpu::bits_as<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return ccpu::bits_as<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }

// ---- how the runtime calls a kernel (cuda_executor.py writes the calls after the kernel source) ----
namespace ccpu {
// One letter a parameter, by which the executor checks the arguments; p is a pointer to const, P to what may
// be written.
template <class T>
constexpr char parameter_code() {
  if (std::is_pointer<T>::value)
    return std::is_const<typename std::remove_pointer<T>::type>::value ? 'p' : 'P';
  if (std::is_floating_point<T>::value) return sizeof(T) == 4 ? 'f' : 'd';
  if (std::is_integral<T>::value) return "?bh?i???q"[sizeof(T)];
  return '?';
}
template <class... Parameters>
struct Codes {
  static constexpr char text[] = {parameter_code<Parameters>()..., 0};
};
template <class... Parameters>
constexpr const char* parameter_codes(void (*)(Parameters...)) {
  return Codes<Parameters...>::text;
}
// `arguments` holds the address of each argument, as for cuLaunchKernel.
template <class... Parameters, size_t... I>
CCPU_UNSEEN inline void call(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {
  kernel(*static_cast<typename std::remove_const<Parameters>::type*>(arguments[I])...);
}
template <class... Parameters>
CCPU_UNSEEN inline void call(void (*kernel)(Parameters...), void** arguments) {
  call(kernel, arguments, std::index_sequence_for<Parameters...>{});
}
constexpr int max_threads(int threads, int = 0, int = 0) { return threads; }
}  // namespace ccpu
