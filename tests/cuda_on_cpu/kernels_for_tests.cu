// The kernels on which test_executor.py tries the executor. Each is right, unless a macro BUG_... spoils it.
#ifndef TILE
#define TILE 8
#endif
#define WARP 32
#define FULL 0xffffffffu
#define THREADS(warps) (WARP * (warps))

// ---- a tiled matrix product: c [m, n] = a [m, k] b [k, n] ----
extern "C" __global__ void __launch_bounds__(TILE * TILE)
matrix_product(const float* __restrict__ a, const float* __restrict__ b, float* __restrict__ c,
               int m, int k, int n) {
  extern __shared__ __align__(16) unsigned char smem_raw[];  // two tiles of floats
  float* tile_a = reinterpret_cast<float*>(smem_raw);
  float* tile_b = tile_a + TILE * TILE;
  const int x = threadIdx.x, y = threadIdx.y;
  const int row = blockIdx.y * TILE + y, column = blockIdx.x * TILE + x;
#ifdef BUG_EXIT_BEFORE_BARRIER
  if (row >= m) return;
#endif
  float sum = 0.f;
  for (int begin = 0; begin < k; begin += TILE) {
#ifdef BUG_OUT_OF_BOUNDS
    tile_a[y * TILE + x] = a[row * k + begin + x];
#else
    tile_a[y * TILE + x] = row < m && begin + x < k ? a[row * k + begin + x] : 0.f;
#endif
#ifdef BUG_UNINITIALISED
    if (begin + y < k && column < n) tile_b[y * TILE + x] = b[(begin + y) * n + column];
#else
    tile_b[y * TILE + x] = begin + y < k && column < n ? b[(begin + y) * n + column] : 0.f;
#endif
#ifdef BUG_SHARED_OUT_OF_BOUNDS
    tile_b[(y + 1) * TILE + x] = 0.f;
#endif
#ifdef BUG_DIVERGENT_BARRIER
    if (y < TILE / 2)
      __syncthreads();
    else
      __syncthreads();
#elif !defined(BUG_READ_TOO_EARLY)
    __syncthreads();
#endif
#pragma unroll
    for (int i = 0; i < TILE; ++i) sum = fmaf(tile_a[y * TILE + i], tile_b[i * TILE + x], sum);  // tiles
#ifndef BUG_WRITE_TOO_EARLY
    __syncthreads();
#endif
  }
  if (row < m && column < n) c[row * n + column] = sum;
#ifdef BUG_WRITE_TO_CONST
  if (row < m && column < k) const_cast<float*>(a)[row * k + column] = sum;
#endif
}

// ---- sums: of each block into sums, of all into total ----
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int mask = WARP / 2; mask > 0; mask >>= 1) x += __shfl_xor_sync(FULL, x, mask);
  return x;
}

extern "C" __global__ void __launch_bounds__(THREADS(4), 2)
block_sum(const float* x, float* sums, float* total, int n) {
  __shared__ float of_warp[4];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  const float sum = warp_sum(i < n ? x[i] : 0.f);
  if (threadIdx.x % WARP == 0) of_warp[threadIdx.x / WARP] = sum;
  __syncthreads();
  if (threadIdx.x != 0) return;
  float of_block = 0.f;
  for (unsigned warp = 0; warp < blockDim.x / WARP; ++warp) of_block += of_warp[warp];
#ifdef BUG_ONE_PLACE_FOR_ALL_BLOCKS
  sums[0] = of_block;
#else
  sums[blockIdx.x] = of_block;
#endif
#ifdef BUG_PLAIN_AND_ATOMIC
  if (blockIdx.x == 1) {
    *total += of_block;
    return;
  }
#endif
  atomicAdd(total, of_block);
}

// ---- warps: y is the running sum of x in each warp, z is x reversed in each warp ----
extern "C" __global__ void __launch_bounds__(THREADS(2))
warps(const float* x, float* y, float* z) {
  __shared__ float exchange[THREADS(2)];
  const int lane = threadIdx.x % WARP, first = threadIdx.x - lane;
  float sum = x[threadIdx.x];
#ifdef BUG_SHUFFLE_FROM_EXITED_LANE
  if (lane == 5) return;
#endif
#ifdef BUG_SHUFFLE_FROM_ABSENT_LANE
  if (lane < 16) sum = __shfl_xor_sync(0xffffu, sum, 16);
#endif
#ifdef BUG_NOT_IN_ITS_MASK
  sum = __shfl_xor_sync(FULL ^ 1u, sum, 2);
#endif
#ifdef BUG_DIFFERENT_WARP_OPS
  if (lane < 16)
    __syncwarp();
  else
    sum = __shfl_sync(FULL, sum, lane);
#endif
#ifdef BUG_DEADLOCK
  if (lane < 16) __syncthreads();
#endif
  for (int offset = 1; offset < WARP; offset *= 2) {
    const float below = __shfl_up_sync(FULL, sum, offset);
    if (lane >= offset) sum += below;
  }
  exchange[threadIdx.x] = x[threadIdx.x];
#ifdef BUG_EXCHANGE_BY_SHUFFLE
  sum = __shfl_sync(FULL, sum, lane);
#else
  __syncwarp();
#endif
  z[threadIdx.x] = exchange[first + WARP - 1 - lane];
  y[threadIdx.x] = sum;
}

// The halves of a warp meet apart, and the last lane meets nobody.
extern "C" __global__ void half_warps(float* y) {
  const int lane = threadIdx.x % WARP;
  if (lane == 31) return;
  if (lane < 16)
    for (int i = 0; i < 3; ++i) y[lane] = __shfl_xor_sync(0xffffu, (float)lane, 1);
  else
    y[lane] = __shfl_xor_sync(0x7fff0000u, (float)lane, lane < 30);
}

// Everyone reads what thread 0 then changes: a __syncwarp is enough only within the warp of thread 0.
extern "C" __global__ void read_then_write(float* y) {
  __shared__ float value;
  if (threadIdx.x == 0) value = 1.f;
  __syncthreads();
  y[threadIdx.x] = value;
#ifdef BUG_ONLY_THE_WARP_WAITS
  __syncwarp();
#else
  __syncthreads();
#endif
  if (threadIdx.x == 0) value = 2.f;
}

// ---- four numbers at once: y = factor x from number `begin` on ----
extern "C" __global__ void scale4(const float* x, float* y, float factor, int begin) {
  assert(begin >= 0);
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  float4 four = reinterpret_cast<const float4*>(x + begin)[i];
  four.x *= factor, four.y *= factor, four.z *= factor, four.w *= factor;
  reinterpret_cast<float4*>(y + begin)[i] = four;
}

// ---- traffic that is known by hand ----
extern "C" __global__ void traffic(const float* x, float* y, unsigned char* flags, int* counter) {
  __shared__ float4 four[WARP];
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  y[i] = x[threadIdx.x % 4] + x[4];  // a block reads 5 numbers
  if (threadIdx.x < 8) flags[0] = 1;
  four[threadIdx.x] = make_float4(y[i], 1.f, 2.f, 3.f);  // y comes back
  __syncthreads();
  if (threadIdx.x == 0) atomicAdd(counter, 1);
  y[i] = four[threadIdx.x ^ 1].x;
}

// ---- the order of the threads: each takes the next place ----
extern "C" __global__ void take_places(int* places, int* next) {
  places[atomicAdd(next, 1)] = blockIdx.x * blockDim.x + threadIdx.x;
}

extern "C" __global__ void copy_strided(const float* x, float* y, int n,
                                        long long stride_x, long long stride_y) {
  const int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) y[i * stride_y] = x ? x[i * stride_x] : -1.f;
}

// ---- the language ----
template <int N, class Function>
__device__ __forceinline__ float sum_of(Function term) {
  float sum = 0.f;
#pragma unroll
  for (int i = 0; i < N; ++i) sum += term(i);
  return sum;
}

__constant__ float table[4] = {1.f, 2.f, 4.f, 8.f};
#define OPERAND(type, name) type *__restrict__ name, long long name##_stride
#define KERNEL(name) name##_kernel

extern "C" __global__ __launch_bounds__(THREADS(1)) void KERNEL(language)(
    OPERAND(const float, x), OPERAND(float, y), uint2* pairs, _Float16* halves, float* maths) {
  __shared__ float s[WARP];
  const int lane = threadIdx.x;
  s[lane] = __ldg(x + lane * x_stride);
  __syncwarp();
  y[lane * y_stride] = sum_of<4>([&](int i) { return table[i] * s[lane ^ i]; });
  pairs[lane] = make_uint2(__ballot_sync(FULL, s[lane] > 0.f), __popc(__ballot_sync(FULL, lane < 5)));
  halves[lane] = (_Float16)s[lane];
  const float down = __shfl_down_sync(FULL, s[lane], 3, 8), other = __shfl_sync(FULL, s[lane], 1, 16);
  maths[lane] = down + other + __expf(s[lane]) + fmaxf(s[lane], 0.f) + rsqrtf(4.f);
  maths[lane] += max(lane, 3) + min(lane, 3);
  if (__any_sync(FULL, lane == 40) || !__all_sync(FULL, lane < 32)) __trap();
  if (__syncthreads_count(lane < 7) != 7 || __syncthreads_or(0) || !__syncthreads_and(1)) __trap();
}
