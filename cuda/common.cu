// What all kernels share; the host puts it in front of each kernel file, as no file includes another.
//
// Macros:  NUMBER   the operands: 0 float32, 1 float16, 2 bfloat16. Gates, states and all sums are float32
//          ALIGNED  1 if every row of every operand starts at a multiple of four numbers
//          THREADS  threads of a block

#define DEVICE __device__ __forceinline__

// ---- numbers in memory ----

#if NUMBER == 0

typedef float number;
typedef float4 four_numbers;

DEVICE float to_float(number x) { return x; }
DEVICE number to_number(float x) { return x; }
DEVICE float4 to_floats(four_numbers x) { return x; }
DEVICE four_numbers to_numbers(float4 x) { return x; }

#else

typedef unsigned short number;
typedef uint2 four_numbers;

#if NUMBER == 1

#ifdef CUDA_CPU  // g++ has no cvt
DEVICE float to_float(number x) {
  _Float16 half;
  memcpy(&half, &x, 2);
  return half;
}
DEVICE number to_number(float x) {
  _Float16 half = x;
  number bits;
  memcpy(&bits, &half, 2);
  return bits;
}
#else
DEVICE float to_float(number x) {
  float result;
  asm("cvt.f32.f16 %0, %1;" : "=f"(result) : "h"(x));
  return result;
}
DEVICE number to_number(float x) {
  number result;
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(result) : "f"(x));
  return result;
}
#endif

#else  // bfloat16: the upper half of a float32

DEVICE float to_float(number x) { return __int_as_float((int)((unsigned)x << 16)); }
DEVICE number to_number(float x) {
  unsigned bits = (unsigned)__float_as_int(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return 0x7fff;  // nan, which rounding could turn into infinity
  return (number)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);  // to the nearest, ties to even
}

#endif

DEVICE float4 to_floats(four_numbers x) {
  return make_float4(to_float((number)(x.x & 0xffffu)), to_float((number)(x.x >> 16)),
                     to_float((number)(x.y & 0xffffu)), to_float((number)(x.y >> 16)));
}
DEVICE four_numbers to_numbers(float4 x) {
  four_numbers result;
  result.x = to_number(x.x) | ((unsigned)to_number(x.y) << 16);
  result.y = to_number(x.z) | ((unsigned)to_number(x.w) << 16);
  return result;
}

#endif

// One reading and one writing function for both kinds of memory.
DEVICE float read(const float* x) { return *x; }
DEVICE void write(float* x, float value) { *x = value; }
#if NUMBER != 0
DEVICE float read(const number* x) { return to_float(*x); }
DEVICE void write(number* x, float value) { *x = to_number(value); }
DEVICE float4 read4(const number* x) { return to_floats(*(const four_numbers*)x); }
DEVICE void write4(number* x, float4 values) { *(four_numbers*)x = to_numbers(values); }
#endif
DEVICE float4 read4(const float* x) { return *(const float4*)x; }
DEVICE void write4(float* x, float4 values) { *(float4*)x = values; }

// ---- operands (B, H, T, width): an address and the distances, in numbers, of sentences, heads and tokens ----

#define OPERAND(type, name) type *__restrict__ name, long long name##_batch, long long name##_head, long long name##_token
#define OF_HEAD(name) (name + sentence * name##_batch + head * name##_head)  // where name is not null
