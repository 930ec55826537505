// Feature map and normalisation in one pass over the projections, forward and backward (``feature_maps.address``):
//
//     y = phi(x)       out = factor y       factor = scale / sum(y),  scale / |y|  or  scale
//
// and backward, for g, the gradient of out, with the features computed again:
//
//     dy = factor (g - along c)       along = sum(g y) / size       c = 1,  y / |y|  or  0
//
// A row too small to divide by has factor = along = c = 0. One row is one token of one head; LANES neighbouring threads
// of a warp take one row (FAVOR+: TILE rows, so that the projection is read once for all of them). Only warps meet.
// As dy is linear in g and in ``along``, sums of g and of c apart need g only once, before ``along`` is known.
//
// Macros besides those of common.cu:
//     MAP            0 elu, 1 relu, 2 dpfp, 3 favor, 4 tanh, 5 identity, 6 softmax
//     NORMALIZATION  0 sum, 1 l2, 2 none
//     OUT_FLOAT      1 if out and its gradient are float32, 0 if they are what x is
//     D              width of x        NU  rolls of dpfp, 0 for others        M  directions of favor, 0 for others
//     LANES          threads of a row, a power of two up to 32; 32 for favor
// ALIGNED is about x, out and their gradients. THREADS is a multiple of 32. A block has THREADS / LANES rows
// (favor: times TILE) and dynamic shared memory for SHARED floats of each LANES threads.

#define ELU 0
#define RELU 1
#define DPFP 2
#define FAVOR 3
#define TANH 4
#define IDENTITY 5
#define SOFTMAX 6

#define SUM 0
#define L2 1
#define NONE 2

#if ALIGNED && D % 4 == 0
#define WIDTH 4
#else
#define WIDTH 1
#endif
#define ALL_LANES 0xffffffffu

#if OUT_FLOAT
typedef float feature;
#else
typedef number feature;
#endif

extern __shared__ __align__(16) unsigned char smem_raw[];

// ---- rows ----

struct Place {
  long long sentence, head, token;
};
#define OF_ROW(name, at) (name + (at).sentence * name##_batch + (at).head * name##_head + (at).token * name##_token)

DEVICE Place place_of(unsigned row, unsigned heads, unsigned tokens) {
  const unsigned sequence = row / tokens;
  return {sequence / heads, sequence % heads, row % tokens};
}

// The threads of one row, or of TILE rows, and their rows: some at the end may be spare. A spare row repeats the last
// one, so that the whole warp is in every meeting, and is not written.
struct Group {
  unsigned first, last;
  int lane;
  float* shared;

  DEVICE Group(unsigned in_group, unsigned in_floats, long long rows) {
    const unsigned group = threadIdx.x / LANES;
    first = (blockIdx.x * (THREADS / LANES) + group) * in_group;
    last = (unsigned)rows - 1;
    lane = threadIdx.x % LANES;
    shared = (float*)smem_raw + group * in_floats;
  }
  DEVICE unsigned row(int r) const { return min(first + r, last); }
  DEVICE bool has(int r) const { return first + r <= last; }
};

// What a kernel gets beside its rows.
struct Settings {
  const float *projection, *transposed;  // favor: (D, M), and (M, D) for the backward
  float input_scale, eps;                // favor
  int stabilize;                         // favor
  float scale, smallest;
};

// WIDTH neighbouring numbers
template <class T>
DEVICE void read_wide(float (&values)[WIDTH], const T* x) {
  if constexpr (WIDTH == 4) {
    const float4 four = read4(x);
    values[0] = four.x, values[1] = four.y, values[2] = four.z, values[3] = four.w;
  } else {
    values[0] = read(x);
  }
}

template <class T>
DEVICE void write_wide(T* x, const float (&values)[WIDTH]) {
  if constexpr (WIDTH == 4)
    write4(x, make_float4(values[0], values[1], values[2], values[3]));
  else
    write(x, values[0]);
}

// Over the threads of a row, in each of them.
DEVICE float row_sum(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(ALL_LANES, x, distance);
  return x;
}

DEVICE float row_max(float x) {
#pragma unroll
  for (int distance = LANES / 2; distance > 0; distance /= 2) x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, distance));
  return x;
}

DEVICE float positive(float x) { return x <= 0.f ? 0.f : x; }  // and nan for nan

// ---- normalisation ----

struct Scaling {
  float factor, inverse;  // inverse: 1 / the size of y
};

// each(f) calls f(y) for the features y of this thread.
template <class Each>
DEVICE Scaling scaling_of(Each each, const Settings& settings) {
  const float smallest = settings.smallest, scale = settings.scale;
  if constexpr (NORMALIZATION == NONE) return {scale, 0.f};
  float size = 0.f;
  if constexpr (NORMALIZATION == SUM) {
    each([&](float y) { size += y; });
    size = row_sum(size);
    if (!(size > smallest)) size = 0.f;
  } else {
    float largest = 0.f, square = 0.f;
    each([&](float y) { largest = fmaxf(largest, fabsf(y)); });
    largest = row_max(largest);
    const float to_one = largest > smallest ? 1.f / largest : 0.f;  // squares of small features underflow
    each([&](float y) { square += (y * to_one) * (y * to_one); });
    size = largest * sqrtf(row_sum(square));
  }
  return size > 0.f ? Scaling{scale / size, 1.f / size} : Scaling{0.f, 0.f};
}

DEVICE float direction(float y, const Scaling& scaling) {
  return NORMALIZATION == SUM ? 1.f : NORMALIZATION == L2 ? y * scaling.inverse : 0.f;
}

// ---- maps ----
//
// Each section has forward(group, settings, x, out) and backward(group, settings, x, d_out, d_x), where x(r) is the
// address of x in the group's row r, and so on.

#if MAP == FAVOR

// phi(x) = (2 m)^-1/2 (exp([p, -p] - shift) + eps),  p = x P,  shift = |x|^2 / 2, or max|p| with the stabilizer, which
// then counts as a constant.

#define TILE 4
#define DP ((D + 3) / 4 * 4)
#define MP ((M + 3) / 4 * 4)
#define SHARED (TILE * (DP + 2 * MP))  // x of every row, then p and its successors

DEVICE float norm_of_features() { return 1.f / sqrtf(2.f * M); }

// f(column, sums) for every column of rows times matrix (INNER, COLUMNS). The rows lie one after another, filled with
// zeros up to a multiple of four.
template <int INNER, int COLUMNS, class F>
DEVICE void multiply(const float* rows, int from_row_to_row, const float* __restrict__ matrix, int lane, F f) {
  constexpr int ACROSS = COLUMNS > 32 ? 2 : 1;
  for (int column = lane; column < COLUMNS; column += 32 * ACROSS) {
    float sums[ACROSS][TILE] = {};
#pragma unroll 2
    for (int i = 0; i < INNER; i += 4) {
      float left[TILE][4];
#pragma unroll
      for (int r = 0; r < TILE; ++r) {
        const float4 four = read4(rows + r * from_row_to_row + i);
        left[r][0] = four.x, left[r][1] = four.y, left[r][2] = four.z, left[r][3] = four.w;
      }
#pragma unroll
      for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int c = 0; c < ACROSS; ++c) {
          const bool inside = i + n < INNER && column + 32 * c < COLUMNS;
          const float right = inside ? matrix[(i + n) * COLUMNS + column + 32 * c] : 0.f;
#pragma unroll
          for (int r = 0; r < TILE; ++r) sums[c][r] += left[r][n] * right;
        }
    }
#pragma unroll
    for (int c = 0; c < ACROSS; ++c)
      if (column + 32 * c < COLUMNS) f(column + 32 * c, sums[c]);
  }
}

// The rows of a warp in shared memory: x, and exp([p, -p] - shift). A thread has the columns lane, lane + 32, ...
struct Tile {
  float* shared;
  int lane;

  DEVICE float* inputs(int r) const { return shared + r * DP; }
  DEVICE float* exponentials(int r) const { return shared + TILE * DP + r * 2 * MP; }

  template <class X>
  DEVICE Tile(const Group& group, const Settings& settings, X x) : shared(group.shared), lane(group.lane) {
    float shift[TILE], largest[TILE] = {};
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
      const number* row = x(r);
      float square = 0.f;
      for (int i = lane; i < DP; i += 32) {
        const float value = i < D ? settings.input_scale * read(row + i) : 0.f;
        inputs(r)[i] = value;
        square += value * value;
      }
      shift[r] = 0.5f * row_sum(square);
    }
    __syncwarp();
    multiply<D, M>(inputs(0), DP, settings.projection, lane, [&](int m, const float(&p)[TILE]) {
#pragma unroll
      for (int r = 0; r < TILE; ++r) {
        exponentials(r)[m] = p[r];
        largest[r] = fmaxf(largest[r], fabsf(p[r]));
      }
    });
#pragma unroll
    for (int r = 0; r < TILE; ++r) {
      if (settings.stabilize) shift[r] = row_max(largest[r]);
      float* e = exponentials(r);
      for (int m = lane; m < M; m += 32) {
        const float p = e[m];
        e[m] = expf(p - shift[r]);
        e[MP + m] = expf(-p - shift[r]);
      }
    }
  }

  DEVICE Scaling scaling(int r, const Settings& settings) const {
    const float* e = exponentials(r);
    auto each = [&](auto f) {
      for (int m = lane; m < M; m += 32) {
        f((e[m] + settings.eps) * norm_of_features());
        f((e[MP + m] + settings.eps) * norm_of_features());
      }
    };
    return scaling_of(each, settings);
  }
};

template <class X, class Out>
DEVICE void forward(const Group& group, const Settings& settings, X x, Out out) {
  const Tile tile(group, settings, x);
#pragma unroll
  for (int r = 0; r < TILE; ++r) {
    const float factor = tile.scaling(r, settings).factor * norm_of_features();
    if (!group.has(r)) continue;
    const float* e = tile.exponentials(r);
    feature* row = out(r);
    for (int m = group.lane; m < M; m += 32) {
      write(row + m, factor * (e[m] + settings.eps));
      write(row + M + m, factor * (e[MP + m] + settings.eps));
    }
  }
}

// dp = factor (2 m)^-1/2 (g1 e1 - g2 e2, less along times the same of c)
// dx = P dp + x times the gradient of |x|^2 / 2
template <class X, class G, class DX>
DEVICE void backward(const Group& group, const Settings& settings, X x, G d_out, DX d_x) {
  const Tile tile(group, settings, x);
  float of_square[TILE];  // minus the gradient of |x|^2 / 2
#pragma unroll
  for (int r = 0; r < TILE; ++r) {
    const Scaling scaling = tile.scaling(r, settings);
    const feature* g = d_out(r);
    float* e = tile.exponentials(r);
    float along = 0.f, sum = 0.f, sum_of_c = 0.f;
    for (int m = group.lane; m < M; m += 32) {
      const float e1 = e[m], e2 = e[MP + m], g1 = read(g + m), g2 = read(g + M + m);
      const float y1 = (e1 + settings.eps) * norm_of_features(), y2 = (e2 + settings.eps) * norm_of_features();
      const float c1 = direction(y1, scaling), c2 = direction(y2, scaling);
      along += g1 * (y1 * scaling.inverse) + g2 * (y2 * scaling.inverse);
      sum += g1 * e1 + g2 * e2;
      sum_of_c += c1 * e1 + c2 * e2;
      e[m] = g1 * e1 - g2 * e2;
      e[MP + m] = c1 * e1 - c2 * e2;
    }
    along = row_sum(along);
    const float factor = scaling.factor * norm_of_features();
    of_square[r] = factor * (row_sum(sum) - along * row_sum(sum_of_c));
    for (int m = group.lane; m < MP; m += 32) e[m] = m < M ? factor * (e[m] - along * e[MP + m]) : 0.f;
  }
  __syncwarp();
  auto store = [&](int i, const float(&product)[TILE]) {
#pragma unroll
    for (int r = 0; r < TILE; ++r)
      if (group.has(r)) write(d_x(r) + i, settings.input_scale * (product[r] - of_square[r] * tile.inputs(r)[i]));
  };
  multiply<M, D>(tile.exponentials(0), 2 * MP, settings.transposed, group.lane, store);
}

#elif MAP == DPFP

// phi(x) = [x' * roll(x', j), j = 1 .. NU],  x' = [relu(x), relu(-x)], which lies in shared memory. Of x'_i and
// x'_(i + D) one is zero, and so are its products: sums go over the other, at ``place``.

#define TILE 1
#define SIZE (2 * D)
#define STAGED (NU < 4 ? NU : 4)  // rolls whose gradients are in shared memory at once
#define SHARED (SIZE * (1 + STAGED))
#define EACH ((D + LANES - 1) / LANES)

DEVICE int wrapped(int i) { return i < 0 ? i + SIZE : i < SIZE ? i : i - SIZE; }
DEVICE int place_in(const float* both, int i) { return both[i] > 0.f ? i : D + i; }

DEVICE void load_both(const Group& group, const number* x) {
  float* both = group.shared;
  for (int i = group.lane * WIDTH; i < D; i += LANES * WIDTH) {
    float values[WIDTH];
    read_wide(values, x + i);
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) {
      both[i + c] = positive(values[c]);
      both[D + i + c] = positive(-values[c]);
    }
  }
  __syncwarp();
}

DEVICE Scaling scaling_of_both(const Group& group, const Settings& settings) {
  const float* both = group.shared;
  auto each = [&](auto f) {
    for (int i = group.lane; i < D; i += LANES) {
      const int place = place_in(both, i);
#pragma unroll 4
      for (int j = 1; j <= NU; ++j) f(both[place] * both[wrapped(place - j)]);
    }
  };
  return scaling_of(each, settings);
}

template <class X, class Out>
DEVICE void forward(const Group& group, const Settings& settings, X x, Out out) {
  const float* both = group.shared;
  load_both(group, x(0));
  const float factor = scaling_of_both(group, settings).factor;
  if (!group.has(0)) return;
  feature* row = out(0);
  for (int i = group.lane * WIDTH; i < SIZE; i += LANES * WIDTH) {
    float own[WIDTH], rolled[WIDTH];
#pragma unroll
    for (int c = 0; c < WIDTH; ++c) own[c] = rolled[c] = both[i + c];
#pragma unroll 4
    for (int j = 1; j <= NU; ++j) {
      float y[WIDTH];
#pragma unroll
      for (int c = WIDTH - 1; c > 0; --c) rolled[c] = rolled[c - 1];
      rolled[0] = both[wrapped(i - j)];
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) y[c] = own[c] * rolled[c] * factor;
      write_wide(row + (j - 1) * SIZE + i, y);
    }
  }
}

template <class X, class G, class DX>
DEVICE void backward(const Group& group, const Settings& settings, X x, G d_out, DX d_x) {
  const float* both = group.shared;
  float* g = group.shared + SIZE;
  load_both(group, x(0));
  const Scaling scaling = scaling_of_both(group, settings);
  const feature* g_row = d_out(0);
  float along = 0.f, sum[EACH] = {}, sum_of_c[EACH] = {};
  int places[EACH];
#pragma unroll
  for (int n = 0; n < EACH; ++n) places[n] = place_in(both, min(group.lane + n * LANES, D - 1));
  for (int done = 0; done < NU; done += STAGED) {
    const int rolls = min(STAGED, NU - done);
    if (done) __syncwarp();  // the gradients before have been read
    for (int i = group.lane * WIDTH; i < rolls * SIZE; i += LANES * WIDTH) {
      float values[WIDTH];
      read_wide(values, g_row + done * SIZE + i);
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) g[i + c] = values[c];
    }
    __syncwarp();
#pragma unroll
    for (int n = 0; n < EACH; ++n) {
      if (group.lane + n * LANES >= D) continue;
      const int place = places[n];
      const float own = both[place];
#pragma unroll(EACH > 4 ? 1 : STAGED)  // registers
      for (int roll = 0; roll < STAGED; ++roll) {
        if (roll >= rolls) break;
        // it is the first factor of one product, and the second of another
        const int before = wrapped(place - done - roll - 1), after = wrapped(place + done + roll + 1);
        const float b = both[before], a = both[after], g_own = g[roll * SIZE + place];
        along += g_own * (own * b * scaling.inverse);
        sum[n] += g_own * b + g[roll * SIZE + after] * a;
        sum_of_c[n] += direction(own * b, scaling) * b + direction(own * a, scaling) * a;
      }
    }
  }
  along = row_sum(along);
  if (!group.has(0)) return;
#pragma unroll
  for (int n = 0; n < EACH; ++n) {
    const int i = group.lane + n * LANES;
    if (i >= D) continue;
    const float d_own = scaling.factor * (sum[n] - along * sum_of_c[n]);
    write(d_x(0) + i, !(both[places[n]] > 0.f) ? 0.f : places[n] < D ? d_own : -d_own);
  }
}

#else

// Maps of one number each, and softmax, which differs by its sums. Everything is in registers.

#define TILE 1
#define SHARED 0
#define CHUNKS ((D + LANES * WIDTH - 1) / (LANES * WIDTH))

DEVICE float mapped(float x) {
  if (MAP == ELU) return positive(x) + expf(fminf(x, 0.f));
  if (MAP == RELU) return positive(x);
  if (MAP == TANH) return tanhf(x);
  return x;
}

DEVICE float mapped_backward(float x, float y, float dy) {
  if (MAP == ELU) return dy * fminf(y, 1.f);  // exp(x) below 0, 1 above
  if (MAP == RELU) return x > 0.f ? dy : 0.f;
  if (MAP == TANH) return dy * (1.f - y * y);
  return dy;
}

// A thread's numbers of a row.
struct Part {
  float at[CHUNKS][WIDTH];
};

DEVICE int column_of(int lane, int n) { return (n * LANES + lane) * WIDTH; }

// f(n, c) for those inside of the row
template <class F>
DEVICE void each_inside(int lane, F f) {
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n)
    if (column_of(lane, n) < D)
#pragma unroll
      for (int c = 0; c < WIDTH; ++c) f(n, c);
}

template <class T>
DEVICE Part load(const T* row, int lane) {
  Part part = {};
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n)
    if (column_of(lane, n) < D) read_wide(part.at[n], row + column_of(lane, n));
  return part;
}

template <class T>
DEVICE void store(T* row, int lane, const Part& part) {
#pragma unroll
  for (int n = 0; n < CHUNKS; ++n)
    if (column_of(lane, n) < D) write_wide(row + column_of(lane, n), part.at[n]);
}

DEVICE Part features_of(const Part& x, int lane) {
  Part y = {};
  if constexpr (MAP == SOFTMAX) {
    float largest = -3.402823466e38f, total = 0.f;
    each_inside(lane, [&](int n, int c) { largest = fmaxf(largest, x.at[n][c]); });
    largest = row_max(largest);
    each_inside(lane, [&](int n, int c) { total += y.at[n][c] = expf(x.at[n][c] - largest); });
    total = row_sum(total);
    each_inside(lane, [&](int n, int c) { y.at[n][c] /= total; });
  } else {
    each_inside(lane, [&](int n, int c) { y.at[n][c] = mapped(x.at[n][c]); });
  }
  return y;
}

DEVICE Scaling scaling_of_part(const Part& y, int lane, const Settings& settings) {
  auto each = [&](auto f) { each_inside(lane, [&](int n, int c) { f(y.at[n][c]); }); };
  return scaling_of(each, settings);
}

template <class X, class Out>
DEVICE void forward(const Group& group, const Settings& settings, X x, Out out) {
  Part y = features_of(load(x(0), group.lane), group.lane);
  const float factor = scaling_of_part(y, group.lane, settings).factor;
  each_inside(group.lane, [&](int n, int c) { y.at[n][c] *= factor; });
  if (group.has(0)) store(out(0), group.lane, y);
}

template <class X, class G, class DX>
DEVICE void backward(const Group& group, const Settings& settings, X x, G d_out, DX d_x) {
  const Part numbers = load(x(0), group.lane);
  Part g = load(d_out(0), group.lane);
  const Part y = features_of(numbers, group.lane);
  const Scaling scaling = scaling_of_part(y, group.lane, settings);
  float along = 0.f, mean = 0.f;
  each_inside(group.lane, [&](int n, int c) { along += g.at[n][c] * (y.at[n][c] * scaling.inverse); });
  if (NORMALIZATION != NONE) along = row_sum(along);
  each_inside(group.lane, [&](int n, int c) {  // g becomes dy
    g.at[n][c] = scaling.factor * (g.at[n][c] - along * direction(y.at[n][c], scaling));
    mean += g.at[n][c] * y.at[n][c];
  });
  if (MAP == SOFTMAX) mean = row_sum(mean);
  each_inside(group.lane, [&](int n, int c) {
    g.at[n][c] = MAP == SOFTMAX ? y.at[n][c] * (g.at[n][c] - mean)
                                : mapped_backward(numbers.at[n][c], y.at[n][c], g.at[n][c]);
  });
  if (group.has(0)) store(d_x(0), group.lane, g);
}

#endif

// ---- the kernels; rows = B H T, fewer than 2^31 ----

#define ROW_OF(name) [&](int r) { return OF_ROW(name, place_of(group.row(r), heads, tokens)); }

extern "C" __global__ void __launch_bounds__(THREADS) address_forward(
    OPERAND(const number, x), OPERAND(feature, out),
    const float* __restrict__ projection,  // favor: (D, M)
    float input_scale, float eps, int stabilize,  // favor
    float scale, float smallest, int heads, int tokens, long long rows) {
  const Group group(TILE, SHARED, rows);
  forward(group, {projection, nullptr, input_scale, eps, stabilize, scale, smallest}, ROW_OF(x), ROW_OF(out));
}

extern "C" __global__ void __launch_bounds__(THREADS) address_backward(
    OPERAND(const number, x), OPERAND(const feature, d_out), OPERAND(number, d_x),
    const float* __restrict__ projection, const float* __restrict__ transposed,  // favor: (D, M) and (M, D)
    float input_scale, float eps, int stabilize,                                 // favor
    float scale, float smallest, int heads, int tokens, long long rows) {
  const Group group(TILE, SHARED, rows);
  const Settings settings = {projection, transposed, input_scale, eps, stabilize, scale, smallest};
  backward(group, settings, ROW_OF(x), ROW_OF(d_out), ROW_OF(d_x));
}
