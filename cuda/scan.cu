// fast_weight_scan, forward and backward, chunk by chunk. One block takes one head and DVB columns of its values:
//
//     R = diag(w) V - diag(g) E S0 + A' R      A' = -stril((E K^T) . Gam)      Gam_ij = exp(l_i - l_j), l = cumsum(decay)
//     O = diag(g) Q S0 + P R                   P = tril((Q K^T) . Gam)         g_i = exp(l_i)
//     S_C = g_C S0 + K^T diag(g_C / g) R
//
// and backward, for dO and dS, the gradient of S_C:
//
//     dB = (I - A')^-T (P^T dO + diag(g_C / g) K dS)         dV = diag(w) dB      dw = rowsum(dB . V)
//     dP = tril((dO R^T) . Gam)                              dA = -stril((dB R^T) . Gam)
//     dQ = diag(g) dO S0^T + dP K                            dE = -diag(g) dB S0^T + dA K
//     dK = diag(g_C / g) R dS^T + dP^T Q + dA^T E            dS0 = g_C dS + Q^T diag(g) dO - E^T diag(g) dB
//
// Chunks that fit into one tile of dk are read once. A sequence of one chunk without initial and final state never
// builds S. The backward goes from the end, with the states that the forward kept or, where nothing decays, with
// S0 = S_C - K^T R from the final one.
//
// Macros besides those of common.cu:
//     CHUNK  tokens, 16 or 32       DK, DV  widths of keys and values       KT  columns of a tile of dk
//     DVB    values' columns of a block       SPLITS  blocks of a head: ceil(DV / DVB)
//     ERASE  0 nothing, 1 strength times key, 2 keys of their own           DECAY  0 or 1
//     KEPT     1 if the forward keeps every S0, 0 if the backward finds them by S0 = S_C - K^T R
//     INSERTS  1 if R is not V: there is ``w``, or something is erased
//     STATE_IN_MEMORY  1 if S and dS are too large for shared memory
// KT and DVB are multiples of 4.

#define TILES ((DK + KT - 1) / KT)
#define DKP (TILES * KT)        // rows of S: dk, and zeros up to whole tiles
#define K_ROW (KT + 4)          // floats from row to row in shared memory; 4 more let 8 rows lie in different banks
#define V_ROW (DVB + 4)
#define C_ROW (CHUNK + 4)

extern __shared__ __align__(16) unsigned char smem_raw[];

// ---- small matrix products, every thread a few tiles of HEIGHT x 4 results in registers ----

constexpr int height_of(int rows, int columns) {
  int height = 4;
  while (height > 1 && rows * columns < 4 * height * THREADS) height /= 2;
  return height;
}

enum Order { PLAIN, TRANSPOSED };

// Results (ROWS, COLUMNS). A thread's four columns are neighbours, or SPREAD over the row: a product with a transposed
// right side then reads from different banks.
template <int ROWS, int COLUMNS, bool SPREAD>
struct Product {
  static constexpr int HEIGHT = height_of(ROWS, COLUMNS), ACROSS = COLUMNS / 4;
  static constexpr int COUNT = ROWS / HEIGHT * ACROSS, EACH = (COUNT + THREADS - 1) / THREADS;
  float at[EACH][HEIGHT][4];

  DEVICE static bool has(int n) { return COUNT % THREADS == 0 || n * THREADS + (int)threadIdx.x < COUNT; }
  DEVICE static int row(int n) { return (n * THREADS + (int)threadIdx.x) / ACROSS * HEIGHT; }
  DEVICE static int column(int n, int j) {
    const int first = (n * THREADS + (int)threadIdx.x) % ACROSS;
    return SPREAD ? first + j * ACROSS : 4 * first + j;
  }

  DEVICE void clear() {
#pragma unroll
    for (int n = 0; n < EACH; ++n)
#pragma unroll
      for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) at[n][i][j] = 0.f;
  }

  // f(row, column, result) for all results of this thread
  template <class F>
  DEVICE void each(F f) {
#pragma unroll
    for (int n = 0; n < EACH; ++n)
      if (has(n))
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) f(row(n) + i, column(n, j), at[n][i][j]);
  }

  // += a b, or with a^T or b^T in their place; INNER is the length of the sums
  template <Order A, Order B, int INNER>
  DEVICE void add(const float* a, int a_row, const float* b, int b_row) {
#pragma unroll
    for (int n = 0; n < EACH; ++n)
      if (has(n)) {
#pragma unroll 2
        for (int k = 0; k < INNER; k += 4) {
          float left[HEIGHT][4], right[4][4];
          load_left<A>(left, a, a_row, row(n), k);
          load_right<B>(right, b, b_row, n, k);
#pragma unroll
          for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
            for (int m = 0; m < 4; ++m)
#pragma unroll
              for (int j = 0; j < 4; ++j) at[n][i][j] += left[i][m] * right[m][j];
        }
      }
  }

  // += diag(factors) other
  DEVICE void add_scaled(const float* factors, const Product& other) {
#pragma unroll
    for (int n = 0; n < EACH; ++n)
      if (has(n))
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i)
#pragma unroll
          for (int j = 0; j < 4; ++j) at[n][i][j] += factors[row(n) + i] * other.at[n][i][j];
  }

  template <Order A>
  DEVICE static void load_left(float (&left)[HEIGHT][4], const float* a, int a_row, int row, int k) {
    if (A == PLAIN) {
#pragma unroll
      for (int i = 0; i < HEIGHT; ++i) {
        const float4 x = read4(a + (row + i) * a_row + k);
        left[i][0] = x.x, left[i][1] = x.y, left[i][2] = x.z, left[i][3] = x.w;
      }
    } else {
#pragma unroll
      for (int m = 0; m < 4; ++m)
#pragma unroll
        for (int i = 0; i < HEIGHT; ++i) left[i][m] = a[(k + m) * a_row + row + i];
    }
  }

  template <Order B>
  DEVICE static void load_right(float (&right)[4][4], const float* b, int b_row, int n, int k) {
    if (B == TRANSPOSED) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float4 x = read4(b + column(n, j) * b_row + k);
        right[0][j] = x.x, right[1][j] = x.y, right[2][j] = x.z, right[3][j] = x.w;
      }
    } else {
#pragma unroll
      for (int m = 0; m < 4; ++m)
        if (SPREAD) {
#pragma unroll
          for (int j = 0; j < 4; ++j) right[m][j] = b[(k + m) * b_row + column(n, j)];
        } else {
          const float4 x = read4(b + (k + m) * b_row + column(n, 0));
          right[m][0] = x.x, right[m][1] = x.y, right[m][2] = x.z, right[m][3] = x.w;
        }
    }
  }
};

// ---- between global and shared memory ----

// f(row, column) at every fourth column of a (ROWS, COLUMNS) block, four columns a thread
template <int ROWS, int COLUMNS, class F>
DEVICE void each_four(F f) {
  for (int n = threadIdx.x; n < ROWS * COLUMNS / 4; n += THREADS) f(n / (COLUMNS / 4), n % (COLUMNS / 4) * 4);
}

// Four numbers of a row of ``width``, zeros beyond it.
template <class T>
DEVICE float4 read4_within(const T* row, int column, int width) {
  if (ALIGNED && column + 4 <= width) return read4(row + column);
  float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
  if (column < width) x.x = read(row + column);
  if (column + 1 < width) x.y = read(row + column + 1);
  if (column + 2 < width) x.z = read(row + column + 2);
  if (column + 3 < width) x.w = read(row + column + 3);
  return x;
}

template <class T>
DEVICE void write4_within(T* row, int column, int width, float4 x) {
  if (ALIGNED && column + 4 <= width) {
    write4(row + column, x);
    return;
  }
  if (column < width) write(row + column, x.x);
  if (column + 1 < width) write(row + column + 1, x.y);
  if (column + 2 < width) write(row + column + 2, x.z);
  if (column + 3 < width) write(row + column + 3, x.w);
}

// to = rows of an operand from column ``first`` on, zeros beyond ``rows`` and ``width``
template <int COLUMNS, class T>
DEVICE void load(float* to, int to_row, const T* from, long long from_row, int first, int width, int rows) {
  each_four<CHUNK, COLUMNS>([&](int i, int j) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (i < rows) x = read4_within(from + i * from_row, first + j, width);
    write4(to + i * to_row + j, x);
  });
}

// K, and E = diag(strength) K
DEVICE void load_with_multiple(float* K, float* E, const number* from, long long from_row, const float* strength,
                               long long strength_row, int first, int rows) {
  each_four<CHUNK, KT>([&](int i, int j) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    float multiple = 0.f;
    if (i < rows) x = read4_within(from + i * from_row, first + j, DK), multiple = strength[i * strength_row];
    write4(K + i * K_ROW + j, x);
    write4(E + i * K_ROW + j, make_float4(multiple * x.x, multiple * x.y, multiple * x.z, multiple * x.w));
  });
}

template <int COLUMNS, class T>
DEVICE void store(T* to, long long to_row, int first, int width, int rows, const float* from, int from_row) {
  each_four<CHUNK, COLUMNS>([&](int i, int j) {
    if (i < rows) write4_within(to + i * to_row, first + j, width, read4(from + i * from_row + j));
  });
}

// S, or zeros for none; a state in memory has DVB of the DV columns
DEVICE void load_state(float* S, const float* from, int first) {
  each_four<DKP, DVB>([&](int i, int j) {
    float4 x = make_float4(0.f, 0.f, 0.f, 0.f);
    if (from && i < DK) x = read4_within(from + (long long)i * DV, first + j, DV);
    write4(S + i * V_ROW + j, x);
  });
}

DEVICE void store_state(float* to, const float* S, int first) {
  each_four<DKP, DVB>([&](int i, int j) {
    if (i < DK) write4_within(to + (long long)i * DV, first + j, DV, read4(S + i * V_ROW + j));
  });
}

// One gate of every token of the chunk: 1 where there is none, 0 after the last token.
DEVICE void load_gate(float* to, const float* from, long long from_row, int rows) {
  for (int i = threadIdx.x; i < CHUNK; i += THREADS) to[i] = i < rows ? (from ? from[i * from_row] : 1.f) : 0.f;
}

// l = cumsum(decay), by the first warp
DEVICE void load_decay(float* l, const float* decay, long long decay_row, int rows) {
  if (threadIdx.x < 32) {
    const int i = threadIdx.x;
    float total = i < rows ? decay[i * decay_row] : 0.f;
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const float before = __shfl_up_sync(0xffffffffu, total, step);
      if (i >= step) total += before;
    }
    if (i < CHUNK) l[i] = total;
  }
}

// ---- triangular systems, one column of the values a thread, in registers ----

// R = (I + A)^-1 R, where A_t holds the strictly lower A transposed
DEVICE void solve_lower(const float* A_t, float* R) {
  for (int column = threadIdx.x; column < DVB; column += THREADS) {
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = R[i * V_ROW + column];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i)
#pragma unroll
      for (int m = i + 1; m < CHUNK; ++m) x[m] -= A_t[i * C_ROW + m] * x[i];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) R[i * V_ROW + column] = x[i];
  }
}

// B = (I + A)^-T B for strictly lower A
DEVICE void solve_upper(const float* A, float* B) {
  for (int column = threadIdx.x; column < DVB; column += THREADS) {
    float x[CHUNK];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) x[i] = B[i * V_ROW + column];
#pragma unroll
    for (int i = CHUNK - 1; i > 0; --i)
#pragma unroll
      for (int m = 0; m < i; ++m) x[m] -= A[i * C_ROW + m] * x[i];
#pragma unroll
    for (int i = 0; i < CHUNK; ++i) B[i * V_ROW + column] = x[i];
  }
}

// ---- forward ----

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan_forward(
    OPERAND(const number, q), OPERAND(const number, k), OPERAND(const number, v), OPERAND(const float, w),
    OPERAND(const float, strength), OPERAND(const number, erase), OPERAND(const float, decay),
    const float* __restrict__ start,  // (B, H, DK, DV) or null
    OPERAND(number, out),             // null if q is
    OPERAND(float, inserted),         // R, or null
    float* __restrict__ end,          // (B, H, DK, DV) or null
    float* __restrict__ kept,         // (B, H, chunks, DK, DV): S0 of every chunk, or null
    float* __restrict__ workspace,    // (B, H, SPLITS, DKP, V_ROW) if STATE_IN_MEMORY
    int heads, int tokens) {
  const long long sentence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int first = blockIdx.y * DVB;
  const bool reads = q != nullptr, builds = start || end || kept || tokens > CHUNK;
  bool empty = start == nullptr;

  float* K = (float*)smem_raw;
  float* Q = K + CHUNK * K_ROW;
  float* E = Q + CHUNK * K_ROW;
  float* P = E + (ERASE ? CHUNK * K_ROW : 0);
  float* A_t = P + CHUNK * C_ROW;
  float* R = A_t + (ERASE ? CHUNK * C_ROW : 0);
  float* l = R + CHUNK * V_ROW;
  float* gate = l + CHUNK;  // w
  float* S = gate + CHUNK;
  if (STATE_IN_MEMORY) S = workspace + ((long long)blockIdx.x * SPLITS + blockIdx.y) * DKP * V_ROW;

  auto load_keys = [&](int t, int rows, int tile) {
    const number* k_rows = OF_HEAD(k) + t * k_token;
    if (ERASE == 1)
      load_with_multiple(K, E, k_rows, k_token, OF_HEAD(strength) + t * strength_token, strength_token, tile * KT, rows);
    else
      load<KT>(K, K_ROW, k_rows, k_token, tile * KT, DK, rows);
    if (ERASE == 2) load<KT>(E, K_ROW, OF_HEAD(erase) + t * erase_token, erase_token, tile * KT, DK, rows);
    if (reads) load<KT>(Q, K_ROW, OF_HEAD(q) + t * q_token, q_token, tile * KT, DK, rows);
  };

  const long long state_at = (long long)blockIdx.x * DK * DV;
  if (builds) load_state(S, start ? start + state_at : nullptr, first);

  for (int t = 0; t < tokens; t += CHUNK) {
    const int rows = min(CHUNK, tokens - t);
    __syncthreads();  // the chunk before has been read
    load_gate(gate, w ? OF_HEAD(w) + t * w_token : nullptr, w_token, rows);
    if (DECAY) load_decay(l, OF_HEAD(decay) + t * decay_token, decay_token, rows);
    load<DVB>(R, V_ROW, OF_HEAD(v) + t * v_token, v_token, first, DV, rows);
    if (kept) store_state(kept + (blockIdx.x * (long long)((tokens + CHUNK - 1) / CHUNK) + t / CHUNK) * DK * DV, S, first);

    Product<CHUNK, CHUNK, true> p, a;
    Product<CHUNK, DVB, false> o, b;
    p.clear(), a.clear(), o.clear(), b.clear();
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile) __syncthreads();
      load_keys(t, rows, tile);
      __syncthreads();
      const float* S_tile = S + tile * KT * V_ROW;
      if (reads) {
        p.template add<PLAIN, TRANSPOSED, KT>(Q, K_ROW, K, K_ROW);
        if (!empty) o.template add<PLAIN, PLAIN, KT>(Q, K_ROW, S_tile, V_ROW);
      }
      if (ERASE) {
        a.template add<PLAIN, TRANSPOSED, KT>(E, K_ROW, K, K_ROW);
        if (!empty) b.template add<PLAIN, PLAIN, KT>(E, K_ROW, S_tile, V_ROW);
      }
    }
    p.each([&](int i, int j, float& x) {
      P[i * C_ROW + j] = j <= i ? (DECAY ? x * expf(l[i] - l[j]) : x) : 0.f;
    });
    if (ERASE)
      a.each([&](int i, int j, float& x) {
        A_t[j * C_ROW + i] = j < i ? (DECAY ? x * expf(l[i] - l[j]) : x) : 0.f;
      });
    b.each([&](int i, int j, float& x) {  // R is B for now
      float inserts = gate[i] * R[i * V_ROW + j];
      if (ERASE) inserts -= DECAY ? expf(l[i]) * x : x;
      R[i * V_ROW + j] = inserts;
    });
    if (ERASE) {
      __syncthreads();
      solve_lower(A_t, R);
    }
    __syncthreads();

    if (reads) {
      if (DECAY) o.each([&](int i, int, float& x) { x *= expf(l[i]); });
      o.template add<PLAIN, PLAIN, CHUNK>(P, C_ROW, R, V_ROW);
      number* to = OF_HEAD(out) + t * out_token;
#pragma unroll
      for (int n = 0; n < o.EACH; ++n)
        if (o.has(n))
#pragma unroll
          for (int i = 0; i < o.HEIGHT; ++i) {
            const float* x = o.at[n][i];
            if (o.row(n) + i < rows)
              write4_within(to + (o.row(n) + i) * out_token, first + o.column(n, 0), DV, make_float4(x[0], x[1], x[2], x[3]));
          }
    }
    if (inserted) store<DVB>(OF_HEAD(inserted) + t * inserted_token, inserted_token, first, DV, rows, R, V_ROW);

    if (end || t + CHUNK < tokens) {
      if (DECAY) {
        __syncthreads();  // R is stored, and P R added
        each_four<CHUNK, DVB>([&](int i, int j) {
          const float until_end = expf(l[CHUNK - 1] - l[i]);
          for (int m = j; m < j + 4; ++m) R[i * V_ROW + m] *= until_end;
        });
      }
      for (int tile = TILES - 1; tile >= 0; --tile) {  // the last one is still there
        if (tile < TILES - 1) {
          __syncthreads();
          load<KT>(K, K_ROW, OF_HEAD(k) + t * k_token, k_token, tile * KT, DK, rows);
        }
        if (DECAY || tile < TILES - 1) __syncthreads();
        Product<KT, DVB, false> s;
        s.clear();
        s.template add<TRANSPOSED, PLAIN, CHUNK>(K, K_ROW, R, V_ROW);
        s.each([&](int i, int j, float& x) {
          float& to = S[(tile * KT + i) * V_ROW + j];
          to = (DECAY ? expf(l[CHUNK - 1]) : 1.f) * to + x;
        });
      }
      empty = false;
    }
  }
  if (end) {
    __syncthreads();
    store_state(end + state_at, S, first);
  }
}

// ---- backward ----

#if SPLITS > 1
typedef float partial;  // sums over the blocks of a head are taken by scan_reduce
#else
typedef number partial;
#endif

#if INSERTS
typedef float inserted_number;
#else
typedef number inserted_number;  // V itself
#endif

#define ACROSS (KT / 4)  // threads that share a row of dQ, dK and dE

typedef Product<CHUNK, KT, true> KeyGradient;

DEVICE void put(partial* to, long long to_row, int rows, int first, const KeyGradient& from) {
#pragma unroll
  for (int n = 0; n < from.EACH; ++n)
    if (from.has(n))
#pragma unroll
      for (int i = 0; i < from.HEIGHT; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int row = from.row(n) + i, column = first + from.column(n, j);
          if (row < rows && column < DK) write(to + row * to_row + column, from.at[n][i][j]);
        }
}

// dots (CHUNK, ACROSS) += factor rowsum(x . y), in parts: each thread that shares a row has a place of its own
DEVICE void add_dots(float* dots, float factor, const KeyGradient& x, const float* y) {
#pragma unroll
  for (int n = 0; n < x.EACH; ++n)
    if (x.has(n))
#pragma unroll
      for (int i = 0; i < x.HEIGHT; ++i) {
        const int row = x.row(n) + i;
        float dot = 0.f;
#pragma unroll
        for (int j = 0; j < 4; ++j) dot += x.at[n][i][j] * y[row * K_ROW + x.column(n, j)];
        dots[row * ACROSS + x.column(n, 0)] += factor * dot;
      }
}

DEVICE void clear_dots(float* dots) {
  for (int n = threadIdx.x; n < CHUNK * ACROSS; n += THREADS) dots[n] = 0.f;
}

DEVICE void store_dots(float* to, long long to_row, int rows, const float* dots) {
  for (int i = threadIdx.x; i < rows; i += THREADS) {
    float total = 0.f;
    for (int n = 0; n < ACROSS; ++n) total += dots[i * ACROSS + n];
    to[i * to_row] = total;
  }
}

extern "C" __global__ void __launch_bounds__(THREADS, 1) scan_backward(
    OPERAND(const number, q), OPERAND(const number, k), OPERAND(const number, v), OPERAND(const float, w),
    OPERAND(const float, strength), OPERAND(const number, erase), OPERAND(const float, decay),
    const float* __restrict__ start,     // (B, H, DK, DV) or null
    OPERAND(const inserted_number, inserted),  // R
    const float* __restrict__ end,       // the final state, if S is built and not KEPT
    const float* __restrict__ kept,      // S0 of every chunk, if KEPT
    OPERAND(const number, d_out),        // null if nothing was read, or no gradient came
    const float* __restrict__ d_end,     // (B, H, DK, DV) or null
    OPERAND(partial, d_q), OPERAND(partial, d_k), OPERAND(number, d_v), OPERAND(float, d_w), OPERAND(float, d_strength),
    OPERAND(partial, d_erase),
    OPERAND(float, d_decay),             // q dq + e de - k dk of every token, from which the host has the gradient
    float* __restrict__ d_start,         // (B, H, DK, DV) or null
    float* __restrict__ workspace,       // 2 (B, H, SPLITS, DKP, V_ROW) if STATE_IN_MEMORY
    int heads, int tokens,
    long long wide_split, long long gate_split) {  // numbers from one block's part of dq, dk, de to the next; of gates
  const long long sentence = blockIdx.x / heads, head = blockIdx.x % heads;
  const int first = blockIdx.y * DVB;
  const bool reads = d_out != nullptr, builds = start || d_end || tokens > CHUNK, has_state = start || tokens > CHUNK;
  bool empty = d_end == nullptr;  // dS is 0

  float* K = (float*)smem_raw;
  float* Q = K + CHUNK * K_ROW;
  float* E = Q + CHUNK * K_ROW;
  float* P = E + (ERASE ? CHUNK * K_ROW : 0);
  float* A = P + CHUNK * C_ROW;
  float* R = A + (ERASE ? CHUNK * C_ROW : 0);
  float* dO = R + CHUNK * V_ROW;
  float* dB = dO + CHUNK * V_ROW;
  float* l = dB + CHUNK * V_ROW;
  float* gate = l + CHUNK;
  float* factor = gate + CHUNK;       // erase strength
  float* key_dots = factor + CHUNK;  // rowsum(dE . K)
  float* decay_dots = key_dots + (ERASE == 1 ? CHUNK * ACROSS : 0);
  float* S = decay_dots + (DECAY ? CHUNK * ACROSS : 0);
  if (STATE_IN_MEMORY) S = workspace + 2 * ((long long)blockIdx.x * SPLITS + blockIdx.y) * DKP * V_ROW;
  float* dS = S + DKP * V_ROW;

  auto load_keys = [&](int t, int rows, int tile) {
    const number* k_rows = OF_HEAD(k) + t * k_token;
    if (ERASE == 1)
      load_with_multiple(K, E, k_rows, k_token, OF_HEAD(strength) + t * strength_token, strength_token, tile * KT, rows);
    else
      load<KT>(K, K_ROW, k_rows, k_token, tile * KT, DK, rows);
    if (ERASE == 2) load<KT>(E, K_ROW, OF_HEAD(erase) + t * erase_token, erase_token, tile * KT, DK, rows);
    if (reads) load<KT>(Q, K_ROW, OF_HEAD(q) + t * q_token, q_token, tile * KT, DK, rows);
  };

  const long long state_at = (long long)blockIdx.x * DK * DV;
  if (has_state && !KEPT) load_state(S, end + state_at, first);
  if (builds) load_state(dS, d_end ? d_end + state_at : nullptr, first);

  for (int t = (tokens - 1) / CHUNK * CHUNK; t >= 0; t -= CHUNK) {
    const int rows = min(CHUNK, tokens - t);
    const bool carried = t > 0 || start;  // S0 is not 0
    __syncthreads();  // the chunk before has been read
    load_gate(gate, w ? OF_HEAD(w) + t * w_token : nullptr, w_token, rows);
    if (ERASE == 1) load_gate(factor, OF_HEAD(strength) + t * strength_token, strength_token, rows);
    if (DECAY) load_decay(l, OF_HEAD(decay) + t * decay_token, decay_token, rows);
    if (KEPT && carried) load_state(S, kept + (blockIdx.x * (long long)((tokens + CHUNK - 1) / CHUNK) + t / CHUNK) * DK * DV, first);
    load<DVB>(R, V_ROW, OF_HEAD(inserted) + t * inserted_token, inserted_token, first, DV, rows);
    if (reads) load<DVB>(dO, V_ROW, OF_HEAD(d_out) + t * d_out_token, d_out_token, first, DV, rows);

    // P, A and dR; S becomes S0
    Product<CHUNK, CHUNK, true> p, a;
    Product<CHUNK, DVB, false> b;
    p.clear(), a.clear(), b.clear();
    for (int tile = 0; tile < TILES; ++tile) {
      if (tile) __syncthreads();
      load_keys(t, rows, tile);
      __syncthreads();
      if (reads) p.template add<PLAIN, TRANSPOSED, KT>(Q, K_ROW, K, K_ROW);
      if (ERASE) a.template add<PLAIN, TRANSPOSED, KT>(E, K_ROW, K, K_ROW);
      if (!empty) b.template add<PLAIN, PLAIN, KT>(K, K_ROW, dS + tile * KT * V_ROW, V_ROW);
      if (carried && !KEPT) {
        Product<KT, DVB, false> s;
        s.clear();
        s.template add<TRANSPOSED, PLAIN, CHUNK>(K, K_ROW, R, V_ROW);
        s.each([&](int i, int j, float& x) { S[(tile * KT + i) * V_ROW + j] -= x; });
      }
    }
    if (reads)
      p.each([&](int i, int j, float& x) {
        P[i * C_ROW + j] = j <= i ? (DECAY ? x * expf(l[i] - l[j]) : x) : 0.f;
      });
    if (ERASE)
      a.each([&](int i, int j, float& x) {
        A[i * C_ROW + j] = j < i ? (DECAY ? x * expf(l[i] - l[j]) : x) : 0.f;
      });
    if (DECAY) b.each([&](int i, int, float& x) { x *= expf(l[CHUNK - 1] - l[i]); });
    __syncthreads();
    if (reads) b.template add<TRANSPOSED, PLAIN, CHUNK>(P, C_ROW, dO, V_ROW);
    b.each([&](int i, int j, float& x) { dB[i * V_ROW + j] = x; });
    __syncthreads();
    if (ERASE) {
      solve_upper(A, dB);
      __syncthreads();
    }

    // dV and dw; dP and dA in the places of P and A
    for (int i = threadIdx.x / 32; i < rows; i += THREADS / 32) {
      float dot = 0.f;
      const number* v_row = OF_HEAD(v) + (t + i) * v_token + first;
      number* d_v_row = OF_HEAD(d_v) + (t + i) * d_v_token + first;
      for (int j = threadIdx.x % 32; j < min(DVB, DV - first); j += 32) {
        const float x = dB[i * V_ROW + j];
        if (w) dot += x * read(v_row + j);
        write(d_v_row + j, gate[i] * x);
      }
      if (w) {
#pragma unroll
        for (int step = 16; step > 0; step /= 2) dot += __shfl_xor_sync(0xffffffffu, dot, step);
        if (threadIdx.x % 32 == 0) OF_HEAD(d_w)[blockIdx.y * gate_split + (t + i) * d_w_token] = dot;
      }
    }
    if (reads) {
      p.clear();
      p.template add<PLAIN, TRANSPOSED, DVB>(dO, V_ROW, R, V_ROW);
      p.each([&](int i, int j, float& x) {
        P[i * C_ROW + j] = j <= i ? (DECAY ? x * expf(l[i] - l[j]) : x) : 0.f;
      });
    }
    if (ERASE) {
      a.clear();
      a.template add<PLAIN, TRANSPOSED, DVB>(dB, V_ROW, R, V_ROW);
      a.each([&](int i, int j, float& x) {
        A[i * C_ROW + j] = j < i ? (DECAY ? -x * expf(l[i] - l[j]) : -x) : 0.f;
      });
    }
    __syncthreads();
    if (DECAY) {  // from here on dO and dB stand with diag(g)
      each_four<CHUNK, DVB>([&](int i, int j) {
        const float since_start = expf(l[i]);
        for (int m = j; m < j + 4; ++m) {
          if (reads) dO[i * V_ROW + m] *= since_start;
          if (ERASE) dB[i * V_ROW + m] *= since_start;
        }
      });
      __syncthreads();
    }

    // dQ, dE, dK and dS0
    if (ERASE == 1) clear_dots(key_dots);
    if (DECAY) clear_dots(decay_dots);
    for (int tile = TILES - 1; tile >= 0; --tile) {  // the last one is still there
      if (tile < TILES - 1) {
        __syncthreads();
        load_keys(t, rows, tile);
      }
      __syncthreads();
      const float* S_tile = S + tile * KT * V_ROW;
      float* dS_tile = dS + tile * KT * V_ROW;

      KeyGradient d_key, x;
      d_key.clear();
      if (!empty) {
        d_key.template add<PLAIN, TRANSPOSED, DVB>(R, V_ROW, dS_tile, V_ROW);
        if (DECAY) d_key.each([&](int i, int, float& value) { value *= expf(l[CHUNK - 1] - l[i]); });
      }
      if (reads) {
        x.clear();
        if (carried) x.template add<PLAIN, TRANSPOSED, DVB>(dO, V_ROW, S_tile, V_ROW);
        x.template add<PLAIN, PLAIN, CHUNK>(P, C_ROW, K, K_ROW);
        put(OF_HEAD(d_q) + blockIdx.y * wide_split + t * d_q_token, d_q_token, rows, tile * KT, x);
        if (DECAY) add_dots(decay_dots, 1.f, x, Q);
        d_key.template add<TRANSPOSED, PLAIN, CHUNK>(P, C_ROW, Q, K_ROW);
      }
      if (ERASE) {
        x.clear();
        if (carried) {
          x.template add<PLAIN, TRANSPOSED, DVB>(dB, V_ROW, S_tile, V_ROW);
          x.each([&](int, int, float& value) { value = -value; });
        }
        x.template add<PLAIN, PLAIN, CHUNK>(A, C_ROW, K, K_ROW);
        if (ERASE == 2) put(OF_HEAD(d_erase) + blockIdx.y * wide_split + t * d_erase_token, d_erase_token, rows, tile * KT, x);
        if (ERASE == 1) {
          add_dots(key_dots, 1.f, x, K);
          d_key.add_scaled(factor, x);
        }
        if (DECAY) add_dots(decay_dots, ERASE == 1 ? 2.f : 1.f, x, E);  // dK holds diag(strength) dE too
        d_key.template add<TRANSPOSED, PLAIN, CHUNK>(A, C_ROW, E, K_ROW);
      }
      put(OF_HEAD(d_k) + blockIdx.y * wide_split + t * d_k_token, d_k_token, rows, tile * KT, d_key);
      if (DECAY) add_dots(decay_dots, -1.f, d_key, K);

      if (carried) {
        __syncthreads();  // dS has been read
        Product<KT, DVB, false> s;
        s.clear();
        if (ERASE) {
          s.template add<TRANSPOSED, PLAIN, CHUNK>(E, K_ROW, dB, V_ROW);
          s.each([&](int, int, float& value) { value = -value; });
        }
        if (reads) s.template add<TRANSPOSED, PLAIN, CHUNK>(Q, K_ROW, dO, V_ROW);
        s.each([&](int i, int j, float& value) {
          float& to = dS_tile[i * V_ROW + j];
          to = (DECAY ? expf(l[CHUNK - 1]) : 1.f) * to + value;
        });
      }
    }
    if (carried) empty = false;
    if (ERASE == 1 || DECAY) __syncthreads();
    if (ERASE == 1)
      store_dots(OF_HEAD(d_strength) + blockIdx.y * gate_split + t * d_strength_token, d_strength_token, rows, key_dots);
    if (DECAY) store_dots(OF_HEAD(d_decay) + blockIdx.y * gate_split + t * d_decay_token, d_decay_token, rows, decay_dots);
  }
  if (d_start) {
    __syncthreads();
    store_state(d_start + state_at, dS, first);
  }
}

// The sums over the blocks of each head. Parts are (SPLITS, B, H, T, ...) without gaps, gates and their parts (B, H, T).
extern "C" __global__ void __launch_bounds__(THREADS, 1) scan_reduce(
    const float* __restrict__ q_parts, const float* __restrict__ k_parts, const float* __restrict__ erase_parts,
    OPERAND(number, d_q), OPERAND(number, d_k), OPERAND(number, d_erase),
    const float* __restrict__ w_parts, const float* __restrict__ strength_parts, const float* __restrict__ decay_parts,
    float* __restrict__ d_w, float* __restrict__ d_strength, float* __restrict__ d_decay,
    int heads, int tokens, long long rows) {
  const long long n = (long long)blockIdx.x * THREADS + threadIdx.x, row = n / ((DK + 3) / 4);
  const int column = (int)(n % ((DK + 3) / 4)) * 4;
  if (row >= rows) return;
  const long long t = row % tokens, sentence = row / tokens / heads, head = row / tokens % heads;
  auto total = [&](const float* parts, number* to) {
    float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int split = 0; split < SPLITS; ++split) {
      const float4 x = read4_within(parts + (split * rows + row) * DK, column, DK);
      sum = make_float4(sum.x + x.x, sum.y + x.y, sum.z + x.z, sum.w + x.w);
    }
    write4_within(to, column, DK, sum);
  };
  if (q_parts) total(q_parts, OF_HEAD(d_q) + t * d_q_token);
  total(k_parts, OF_HEAD(d_k) + t * d_k_token);
  if (erase_parts) total(erase_parts, OF_HEAD(d_erase) + t * d_erase_token);
  auto total_gate = [&](const float* parts, float* to) {
    float sum = 0.f;
    for (int split = 0; split < SPLITS; ++split) sum += parts[split * rows + row];
    to[row] = sum;
  };
  if (column == 0 && w_parts) total_gate(w_parts, d_w);
  if (column == 0 && strength_parts) total_gate(strength_parts, d_strength);
  if (column == 0 && decay_parts) total_gate(decay_parts, d_decay);
}
