// fast_weight_step, one token of decoding: one block takes one head of one row and DVB columns of its values.
//
//     S = state[parent]       r = w v - a S^T e       S' = a S + k r^T       out = S'^T q = a S^T q + (k . q) r
//
// The state is what there is to move: it is read once into registers and written once. Both sums over dk, S^T e and
// S^T q, are taken from what was read, so the block meets only once. A thread has WIDTH neighbouring columns of the
// rows group, group + GROUPS, ...; LANES neighbouring threads have one row, so that a warp reads stretches of rows.
//
// Macros besides those of common.cu:
//     DK, DV   widths of keys and values
//     DVB      columns of a block, a power of two, at most 32, or 128 if ALIGNED; grid (rows * heads, ceil(DV / DVB))
// ALIGNED is about v, out and both states; THREADS is a multiple of 32. The token strides of the operands are not used.

#if ALIGNED && DV % 4 == 0 && DVB % 4 == 0
#define WIDTH 4
#else
#define WIDTH 1
#endif
#define LANES (DVB / WIDTH)
#define GROUPS (THREADS / LANES)
#define EACH ((DK + GROUPS - 1) / GROUPS)  // rows of a thread
#define WARPS (THREADS / 32)
#define ALL_LANES 0xffffffffu

struct __align__(4 * WIDTH) Columns {
  float at[WIDTH];
};

template <class T>
DEVICE Columns read_columns(const T* x) {
  Columns result;
  if constexpr (WIDTH == 4) {
    const float4 four = read4(x);
    result.at[0] = four.x, result.at[1] = four.y, result.at[2] = four.z, result.at[3] = four.w;
  } else {
    result.at[0] = read(x);
  }
  return result;
}

template <class T>
DEVICE void write_columns(T* x, const Columns& values) {
  if constexpr (WIDTH == 4)
    write4(x, make_float4(values.at[0], values.at[1], values.at[2], values.at[3]));
  else
    write(x, values.at[0]);
}

DEVICE void add(Columns& sum, const Columns& x, float factor) {
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) sum.at[c] += factor * x.at[c];
}

// The sum over the groups of a warp, in each of its lanes.
DEVICE float warp_sum(float x) {
#pragma unroll
  for (int distance = 16; distance >= LANES; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

DEVICE Columns warp_sum(Columns x) {
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) x.at[c] = warp_sum(x.at[c]);
  return x;
}

// The states may be one buffer, so they are not __restrict__: each number is read and then written by one thread.
extern "C" __global__ void __launch_bounds__(THREADS, 1) step(
    OPERAND(const number, q), OPERAND(const number, k), OPERAND(const number, v), OPERAND(const float, w),
    OPERAND(const float, strength), OPERAND(const number, erase), OPERAND(const float, decay),  // logarithms of a
    const float* state,                      // (given, H, DK, DV)
    const long long* __restrict__ parent,    // (B,), or null: row b continues from state[b]
    OPERAND(number, out),
    float* out_state,                        // (B, H, DK, DV); may be ``state`` where there is no parent
    int heads, long long given) {
  __shared__ Columns read_sums[WARPS][LANES], erased_sums[WARPS][LANES];
  __shared__ float product_sums[WARPS];

  const long long sentence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int group = threadIdx.x / LANES, lane = threadIdx.x % LANES, warp = threadIdx.x / 32;
  const int column = blockIdx.y * DVB + lane * WIDTH;
  const bool inside = column < DV;
  const bool erases = strength || erase;
  const long long source = parent ? parent[sentence] : sentence;
  if ((unsigned long long)source >= (unsigned long long)given) __trap();  // as torch's own index_select does

  const float a = decay ? expf(*OF_HEAD(decay)) : 1.f;
  const float along_key = strength ? *OF_HEAD(strength) : 0.f;
  const float* from = state + (source * heads + head) * DK * DV + column;
  float* to = out_state + (long long)blockIdx.x * DK * DV + column;

  Columns S[EACH] = {}, S_q = {}, S_e = {};
  float key[EACH], k_q = 0.f;
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int row = group + i * GROUPS;
    if (inside && row < DK) S[i] = read_columns(from + (long long)row * DV);
  }
#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int row = group + i * GROUPS;
    key[i] = row < DK ? read(OF_HEAD(k) + row) : 0.f;
    const float query = row < DK ? read(OF_HEAD(q) + row) : 0.f;
    const float erase_key = !erase ? along_key * key[i] : row < DK ? read(OF_HEAD(erase) + row) : 0.f;
    add(S_q, S[i], query);
    if (erases) add(S_e, S[i], erase_key);
    k_q += key[i] * query;
  }

  S_q = warp_sum(S_q);
  if (erases) S_e = warp_sum(S_e);
  k_q = warp_sum(k_q);
  if (threadIdx.x % 32 < LANES) {
    read_sums[warp][lane] = S_q;
    erased_sums[warp][lane] = S_e;
    if (lane == 0) product_sums[warp] = k_q;
  }
  __syncthreads();
  if (!inside) return;

  Columns r = read_columns(OF_HEAD(v) + column);
  const float strength_of_write = w ? *OF_HEAD(w) : 1.f;
#pragma unroll
  for (int c = 0; c < WIDTH; ++c) r.at[c] *= strength_of_write;
  if (erases)
    for (int n = 0; n < WARPS; ++n) add(r, erased_sums[n][lane], -a);

#pragma unroll
  for (int i = 0; i < EACH; ++i) {
    const int row = group + i * GROUPS;
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) S[i].at[c] = a * S[i].at[c] + key[i] * r.at[c];
    if (row < DK) write_columns(to + (long long)row * DV, S[i]);
  }

  if (group == 0) {
    Columns sum = {};
    float k_q_sum = 0.f;
    for (int n = 0; n < WARPS; ++n) {
      add(sum, read_sums[n][lane], a);
      k_q_sum += product_sums[n];
    }
    add(sum, r, k_q_sum);
    write_columns(OF_HEAD(out) + column, sum);
  }
}
