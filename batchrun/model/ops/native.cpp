// The operators of batchrun/model/ops/__init__.py for a CPU, one pass over memory each.
//
// Compiled on the machine that runs them, for its vector units, by build.py; called through ctypes.
// Plain loops that compilers turn into vector code, no library but OpenMP. Numbers are float32 while
// they are worked on, whatever they are stored as. What one sequence gives does not depend on how
// many threads there are, nor on the other sequences.

#include <math.h>
#include <stdint.h>
#include <string.h>

namespace {

using f32 = float;
enum bf16 : uint16_t {};  // its bits; a struct's copies would not become vector code

inline float load(float value) { return value; }
inline float load(bf16 value) {
    uint32_t bits = uint32_t(value) << 16;
    float out;
    memcpy(&out, &bits, 4);
    return out;
}

inline void store(float &to, float value) { to = value; }
inline void store(bf16 &to, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to the nearest, ties to even
    uint32_t nan = (bits >> 16) | 0x40;
    to = bf16(value != value ? nan : rounded);
}

// e^x to about the last bit of float32; NaN stays NaN.
inline float exponential(float x) {
    x = x > 88.0f ? 88.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float turns = x * 1.44269504088896341f + 12582912.0f;  // rounds to a whole number of ln 2
    uint32_t bits;
    memcpy(&bits, &turns, 4);
    float whole = turns - 12582912.0f;
    float rest = x - whole * 0.693359375f;
    rest -= whole * -2.12194440e-4f;
    float sum = 1.9875691500e-4f;
    sum = sum * rest + 1.3981999507e-3f;
    sum = sum * rest + 8.3334519073e-3f;
    sum = sum * rest + 4.1665795894e-2f;
    sum = sum * rest + 1.6666665459e-1f;
    sum = sum * rest + 5.0000001201e-1f;
    sum = sum * rest * rest + rest + 1.0f;
    uint32_t scale = (bits << 23) + 0x3f800000u;
    float power;
    memcpy(&power, &scale, 4);
    return sum * power;
}

inline float silu(float x) { return x / (1.0f + exponential(-x)); }

inline float softplus(float x) { return x > 20.0f ? x : log1pf(expf(x)); }

const int SCRATCH = 1024;  // the largest state size, head size and head dimension; see native.py

template <typename T>
void add_norm(T *h, const T *delta, const T *weight, T *out, int64_t rows, int64_t size,
              int64_t delta_stride, float eps, int threads) {
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows; i++) {
        T *row = h + i * size;
        float sum = 0;
        if (delta) {
            const T *added = delta + i * delta_stride;
#pragma omp simd
            for (int64_t j = 0; j < size; j++) store(row[j], load(row[j]) + load(added[j]));
        }
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < size; j++) sum += load(row[j]) * load(row[j]);
        float scale = 1.0f / sqrtf(sum / size + eps);
        T *to = out + i * size;
#pragma omp simd
        for (int64_t j = 0; j < size; j++) store(to[j], load(row[j]) * scale * load(weight[j]));
    }
}

template <typename T>
void gated_norm(const T *y, const T *z, const T *weight, T *out, int64_t rows, int64_t size,
                int64_t z_stride, int64_t group_size, float eps, int threads) {
    int64_t groups = size / group_size;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < rows * groups; i++) {
        int64_t row = i / groups, first = i % groups * group_size;
        const T *values = y + row * size + first, *gate = z + row * z_stride + first;
        const T *scales = weight + first;
        T *to = out + row * size + first;
        float sum = 0;
#pragma omp simd reduction(+ : sum)
        for (int64_t j = 0; j < group_size; j++) {
            float v = load(values[j]) * silu(load(gate[j]));
            sum += v * v;
        }
        float scale = 1.0f / sqrtf(sum / group_size + eps);
        // The gate again: cheaper than to keep it, and exact.
#pragma omp simd
        for (int64_t j = 0; j < group_size; j++) {
            float v = load(values[j]) * silu(load(gate[j]));
            store(to[j], v * scale * load(scales[j]));
        }
    }
}

// One sequence's tokens, each of x_stride, through the convolution for the channels first .. end.
template <typename T>
void convolve(const T *x, const T *weight, const T *bias, T *state, T *out, int64_t tokens,
              int64_t first, int64_t end, int64_t channels, int kernel, int64_t x_stride,
              bool is_new) {
    int history = kernel - 1;
    if (is_new)
        for (int k = 0; k < history; k++)
            memset(state + k * channels + first, 0, (end - first) * sizeof(T));
    for (int64_t t = 0; t < tokens; t++) {
        const T *now = x + t * x_stride;
        T *to = out + t * channels;
        if (kernel == 4) {
            T *a = state, *b = state + channels, *c = state + 2 * channels;
            const T *w = weight;
#pragma omp simd
            for (int64_t j = first; j < end; j++) {
                float sum = bias ? load(bias[j]) : 0.0f;
                sum += load(a[j]) * load(w[j]);
                sum += load(b[j]) * load(w[channels + j]);
                sum += load(c[j]) * load(w[2 * channels + j]);
                sum += load(now[j]) * load(w[3 * channels + j]);
                a[j] = b[j];
                b[j] = c[j];
                c[j] = now[j];
                store(to[j], silu(sum));
            }
            continue;
        }
        for (int64_t j = first; j < end; j++) {
            float sum = bias ? load(bias[j]) : 0.0f;
            for (int k = 0; k < history; k++) {
                sum += load(state[k * channels + j]) * load(weight[k * channels + j]);
                state[k * channels + j] = k + 1 < history ? state[(k + 1) * channels + j] : now[j];
            }
            sum += load(now[j]) * load(weight[history * channels + j]);
            store(to[j], silu(sum));
        }
    }
}

const int64_t CHANNELS = 512;  // a thread's piece of a row

template <typename T>
void conv(const T *x, const T *weight, const T *bias, T *state, const int64_t *slots,
          const int64_t *starts, const bool *is_new, T *out, int64_t sequences, int64_t channels,
          int kernel, int64_t x_stride, int threads) {
    int64_t pieces = (channels + CHANNELS - 1) / CHANNELS;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < sequences * pieces; i++) {
        int64_t s = i / pieces, first = i % pieces * CHANNELS;
        int64_t end = first + CHANNELS < channels ? first + CHANNELS : channels;
        int64_t start = starts ? starts[s] : s, tokens = starts ? starts[s + 1] - start : 1;
        convolve(x + start * x_stride, weight, bias, state + slots[s] * (kernel - 1) * channels,
                 out + start * channels, tokens, first, end, channels, kernel, x_stride,
                 is_new && is_new[s]);
    }
}

struct Sizes {
    int64_t sequences, heads, head_size, groups, state_size, x_stride, dt_stride, bc_stride;
};

const int64_t LINE = 64;     // bytes of a line of the cache
const int64_t AHEAD = 2048;  // bytes; what the CPU fetches ahead by itself ends with every page

template <typename T, typename S>
void ssm_update(const T *x, const T *dt, const T *B, const T *C, const float *A, const T *dt_bias,
                const T *skip, S *state, const int64_t *slots, T *out, const Sizes &sizes,
                int threads) {
    const int64_t heads = sizes.heads, p = sizes.head_size, n = sizes.state_size;
    const int64_t per_group = heads / sizes.groups;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < sizes.sequences * heads; i++) {
        int64_t d = i / heads, head = i % heads;
        float step = softplus(load(dt[d * sizes.dt_stride + head]) + load(dt_bias[head]));
        float decay = expf(step * A[head]), through = load(skip[head]);
        float b[SCRATCH], c[SCRATCH];
        const T *B_row = B + d * sizes.bc_stride + head / per_group * n;
        const T *C_row = C + d * sizes.bc_stride + head / per_group * n;
        for (int64_t k = 0; k < n; k++) {
            b[k] = load(B_row[k]);
            c[k] = load(C_row[k]);
        }
        S *rows = state + (slots[d] * heads + head) * p * n;
        const T *x_row = x + d * sizes.x_stride + head * p;
        T *to = out + i * p;
        for (int64_t j = 0; j < p; j++) {
            float value = load(x_row[j]), in = step * value, y = 0;
            S *row = rows + j * n;
            for (int64_t k = 0; k < n; k += LINE / sizeof(S))
                __builtin_prefetch(row + AHEAD / sizeof(S) + k, 1);
#pragma omp simd reduction(+ : y)
            for (int64_t k = 0; k < n; k++) {
                float s = load(row[k]) * decay + in * b[k];
                store(row[k], s);
                y += s * c[k];
            }
            store(to[j], y + through * value);
        }
    }
}

const int LANES = 16;  // numbers side by side in a scan or an attention

typedef float Vector __attribute__((vector_size(LANES * sizeof(float))));

template <typename T>
inline const float *widened(const T *row, float *room, int64_t size) {
    for (int64_t j = 0; j < size; j++) room[j] = load(row[j]);
    return room;
}
template <>
inline const float *widened<float>(const float *row, float *, int64_t) {
    return row;
}

// What a token brings to the state of two vectors of channels, and what it takes from it.
struct Token {
    float decay;
    Vector in[2], y[2];
    const float *B, *C;
};

// COUNT tokens, one after the other, while each number of the state is at hand: it is read and
// written once for all of them.
template <int COUNT>
inline void advance(Vector (*kept)[2], Token *tokens, int64_t n) {
    Vector y[COUNT][2];
    memset(y, 0, sizeof y);
    for (int64_t k = 0; k < n; k++) {
        Vector first = kept[k][0], second = kept[k][1];
#pragma GCC unroll 4
        for (int t = 0; t < COUNT; t++) {
            const Token &token = tokens[t];
            first = first * token.decay + token.in[0] * token.B[k];
            second = second * token.decay + token.in[1] * token.B[k];
            y[t][0] += first * token.C[k];
            y[t][1] += second * token.C[k];
        }
        kept[k][0] = first;
        kept[k][1] = second;
    }
    for (int t = 0; t < COUNT; t++)
        for (int half = 0; half < 2; half++) tokens[t].y[half] += y[t][half];
}

// The same for many tokens of a sequence: the state of some channels of a head stays in the cache
// meanwhile, transposed.
template <typename T, typename S>
void scan(const T *x, const T *dt, const T *B, const T *C, const float *A, const T *dt_bias,
          const T *skip, S *state, const int64_t *slots, const int64_t *starts, const bool *is_new,
          T *out, const Sizes &sizes, int threads) {
    const int64_t heads = sizes.heads, p = sizes.head_size, n = sizes.state_size;
    const int64_t per_group = heads / sizes.groups, pieces = (p + 2 * LANES - 1) / (2 * LANES);
#pragma omp parallel for num_threads(threads) schedule(dynamic, 1) if (threads > 1)
    for (int64_t i = 0; i < sizes.sequences * heads * pieces; i++) {
        const int AT_ONCE = 4;
        Vector kept[SCRATCH][2];
        Token tokens[AT_ONCE];
        float rooms[AT_ONCE][2][SCRATCH];
        int64_t s = i / (heads * pieces), head = i / pieces % heads, end = starts[s + 1];
        int64_t first = i % pieces * 2 * LANES;
        int64_t width = p - first < 2 * LANES ? p - first : 2 * LANES;
        float minus = A[head], through = load(skip[head]), bias = load(dt_bias[head]);
        S *rows = state + ((slots[s] * heads + head) * p + first) * n;
        memset(kept, 0, n * sizeof kept[0]);
        float *numbers = reinterpret_cast<float *>(kept);  // [n, 2 LANES]
        for (int64_t j = 0; j < width && !is_new[s]; j++)
            for (int64_t k = 0; k < n; k++) numbers[k * 2 * LANES + j] = load(rows[j * n + k]);
        for (int64_t t = starts[s]; t < end; t += AT_ONCE) {
            int64_t count = end - t < AT_ONCE ? end - t : AT_ONCE;
            for (int64_t u = 0; u < count; u++) {
                Token &token = tokens[u];
                float step = softplus(load(dt[(t + u) * sizes.dt_stride + head]) + bias);
                token.decay = expf(step * minus);
                int64_t place = (t + u) * sizes.bc_stride + head / per_group * n;
                token.B = widened(B + place, rooms[u][0], n);
                token.C = widened(C + place, rooms[u][1], n);
                const T *x_row = x + (t + u) * sizes.x_stride + head * p + first;
                for (int64_t j = 0; j < 2 * LANES; j++) {
                    float value = j < width ? load(x_row[j]) : 0.0f;
                    token.in[j / LANES][j % LANES] = step * value;
                    token.y[j / LANES][j % LANES] = through * value;
                }
            }
            if (count == AT_ONCE)
                advance<AT_ONCE>(kept, tokens, n);
            else
                for (int64_t u = 0; u < count; u++) advance<1>(kept, tokens + u, n);
            for (int64_t u = 0; u < count; u++) {
                T *to = out + ((t + u) * heads + head) * p + first;
                for (int64_t j = 0; j < width; j++)
                    store(to[j], tokens[u].y[j / LANES][j % LANES]);
            }
        }
        for (int64_t j = 0; j < width; j++)
            for (int64_t k = 0; k < n; k++) store(rows[j * n + k], numbers[k * 2 * LANES + j]);
    }
}

const int KEYS = 32;        // scored at a time
const int MAX_DIM = SCRATCH / 4;

inline Vector exponentials(Vector x) {
#pragma omp simd
    for (int l = 0; l < LANES; l++) x[l] = exponential(x[l]);
    return x;
}

struct Attention {
    int64_t heads, kv_heads, size, q_stride, table_stride, block_size;
};

// LANES queries side by side that share a key/value head: heads of one token, or of neighbouring
// tokens of a sequence. Softmax as the keys go by.
template <typename T>
void attend_tile(const T *q, const T *keys, const T *values, const int64_t *table, T *out,
                 int64_t token, int64_t kv_head, int64_t first, int64_t lanes, int64_t context,
                 const Attention &sizes) {
    const int64_t d = sizes.size, sharing = sizes.heads / sizes.kv_heads;
    const int64_t row_size = sizes.kv_heads * d, block_size = sizes.block_size;
    const float scale = 1.0f / sqrtf(float(d));
    Vector queries[MAX_DIM], sums[MAX_DIM], scores[KEYS], highest, total, shrink;
    float room[4][MAX_DIM];
    const float *row[4];
    int64_t limits[LANES], count = 0;  // keys that each query sees
    for (int l = 0; l < LANES; l++) {
        int64_t query = first + (l < lanes ? l : 0);
        const T *from = q + (token + query / sharing) * sizes.q_stride +
                       (kv_head * sharing + query % sharing) * d;
        for (int64_t j = 0; j < d; j++) {
            queries[j][l] = load(from[j]) * scale;
            sums[j][l] = 0.0f;
        }
        limits[l] = context + query / sharing + 1;
        count = limits[l] > count ? limits[l] : count;
        highest[l] = -INFINITY;
        total[l] = 0.0f;
    }
    for (int64_t at = 0; at < count;) {
        int64_t offset = at % block_size, some = block_size - offset;
        some = some < KEYS ? some : KEYS;
        some = some < count - at ? some : count - at;
        int64_t start = (table[at / block_size] * block_size + offset) * row_size + kv_head * d;
        for (int64_t r = 0; r < some; r += 4) {
            for (int i = 0; i < 4; i++)
                row[i] = widened(keys + start + (r + i < some ? r + i : r) * row_size, room[i], d);
            Vector dots[4] = {};
            for (int64_t j = 0; j < d; j++) {
                dots[0] += queries[j] * row[0][j];
                dots[1] += queries[j] * row[1][j];
                dots[2] += queries[j] * row[2][j];
                dots[3] += queries[j] * row[3][j];
            }
            for (int i = 0; i < 4; i++)
                for (int l = 0; l < LANES; l++)
                    scores[r + i][l] =
                        r + i < some && at + r + i < limits[l] ? dots[i][l] : -INFINITY;
        }
        // Of the first keys every query sees one, so the highest is a number from then on.
        Vector high = highest;
        for (int64_t r = 0; r < some; r++) high = scores[r] > high ? scores[r] : high;
        shrink = exponentials(highest - high);
        highest = high;
        total *= shrink;
        int64_t padded = (some + 3) / 4 * 4;
        for (int64_t r = 0; r < padded; r++) {
            // Minus infinity is a key that is not seen; the least power is not quite nothing.
            scores[r] = scores[r] == -INFINITY ? Vector{} : exponentials(scores[r] - highest);
            total += scores[r];
        }
        for (int64_t j = 0; j < d; j++) sums[j] *= shrink;
        for (int64_t r = 0; r < some; r += 4) {
            for (int i = 0; i < 4; i++)
                row[i] = widened(values + start + (r + i < some ? r + i : r) * row_size, room[i], d);
            Vector w0 = scores[r], w1 = scores[r + 1], w2 = scores[r + 2], w3 = scores[r + 3];
            for (int64_t j = 0; j < d; j++)
                sums[j] += (w0 * row[0][j] + w1 * row[1][j]) + (w2 * row[2][j] + w3 * row[3][j]);
        }
        at += some;
    }
    for (int l = 0; l < lanes; l++) {
        int64_t query = first + l;
        T *to = out + ((token + query / sharing) * sizes.heads + kv_head * sharing +
                       query % sharing) * d;
        for (int64_t j = 0; j < d; j++) store(to[j], sums[j][l] / total[l]);
    }
}

inline float added_up(Vector v) {
    typedef float Half __attribute__((vector_size(sizeof(Vector) / 2)));
    typedef float Quarter __attribute__((vector_size(sizeof(Vector) / 4)));
    Half halves[2];
    memcpy(halves, &v, sizeof v);
    halves[0] += halves[1];
    Quarter quarters[2];
    memcpy(quarters, halves, sizeof quarters);
    quarters[0] += quarters[1];
    return (quarters[0][0] + quarters[0][1]) + (quarters[0][2] + quarters[0][3]);
}

// Fetch rows of `size` numbers that are read soon.
template <typename T>
inline void fetch(const T *rows, int64_t count, int64_t stride, int64_t size) {
    for (int64_t r = 0; r < count; r++)
        for (int64_t j = 0; j < size; j += LINE / sizeof(T))
            __builtin_prefetch(rows + r * stride + j);
}

const int FEW = 8;

// The same for one token whose few heads would leave most lanes empty: numbers of a head side by
// side, `WIDTH` vectors of them.
template <typename T, int WIDTH>
void attend_token(const T *q, const T *keys, const T *values, const int64_t *table, T *out,
                  int64_t token, int64_t kv_head, int64_t context, const Attention &sizes) {
    const int64_t d = WIDTH * LANES, sharing = sizes.heads / sizes.kv_heads, count = context + 1;
    const int64_t row_size = sizes.kv_heads * d, block_size = sizes.block_size;
    const float scale = 1.0f / sqrtf(float(d));
    Vector queries[FEW][WIDTH], sums[FEW][WIDTH], numbers[WIDTH];
    float scores[FEW][KEYS], highest[FEW], total[FEW], room[WIDTH * LANES];
    for (int64_t h = 0; h < sharing; h++) {
        const T *from = q + token * sizes.q_stride + (kv_head * sharing + h) * d;
        memcpy(queries[h], widened(from, room, d), sizeof queries[h]);
        for (int c = 0; c < WIDTH; c++) {
            queries[h][c] *= scale;
            sums[h][c] = Vector{};
        }
        highest[h] = -INFINITY;
        total[h] = 0.0f;
    }
    for (int64_t at = 0; at < count;) {
        int64_t offset = at % block_size, some = block_size - offset;
        some = some < KEYS ? some : KEYS;
        some = some < count - at ? some : count - at;
        int64_t start = (table[at / block_size] * block_size + offset) * row_size + kv_head * d;
        int64_t next = at + some;
        fetch(values + start, some, row_size, d);
        if (next < count) {
            int64_t place = table[next / block_size] * block_size + next % block_size;
            int64_t left = block_size - next % block_size;
            fetch(keys + place * row_size + kv_head * d, left < KEYS ? left : KEYS, row_size, d);
        }
        for (int64_t r = 0; r < some; r++) {
            memcpy(numbers, widened(keys + start + r * row_size, room, d), sizeof numbers);
            for (int64_t h = 0; h < sharing; h++) {
                Vector dot = queries[h][0] * numbers[0];
                for (int c = 1; c < WIDTH; c++) dot += queries[h][c] * numbers[c];
                scores[h][r] = added_up(dot);
            }
        }
        for (int64_t h = 0; h < sharing; h++) {
            float high = highest[h], sum = 0.0f;
            for (int64_t r = 0; r < some; r++) high = scores[h][r] > high ? scores[h][r] : high;
            for (int64_t r = some; r < KEYS; r++) scores[h][r] = -INFINITY;
            float shrink = exponential(highest[h] - high);
#pragma omp simd reduction(+ : sum)
            for (int r = 0; r < KEYS; r++) {
                float weight = exponential(scores[h][r] - high);
                scores[h][r] = r < some ? weight : 0.0f;
                sum += scores[h][r];
            }
            total[h] = total[h] * shrink + sum;
            highest[h] = high;
            for (int c = 0; c < WIDTH; c++) sums[h][c] *= shrink;
        }
        for (int64_t r = 0; r < some; r++) {
            memcpy(numbers, widened(values + start + r * row_size, room, d), sizeof numbers);
            for (int64_t h = 0; h < sharing; h++)
                for (int c = 0; c < WIDTH; c++) sums[h][c] += scores[h][r] * numbers[c];
        }
        at += some;
    }
    for (int64_t h = 0; h < sharing; h++) {
        float result[WIDTH * LANES];
        memcpy(result, sums[h], sizeof result);
        T *to = out + (token * sizes.heads + kv_head * sharing + h) * d;
        for (int64_t j = 0; j < d; j++) store(to[j], result[j] / total[h]);
    }
}

// Sequences of up to `longest` new tokens, whose keys and values are in the pools already.
template <typename T>
void attend(const T *q, const T *keys, const T *values, const int64_t *tables,
            const int64_t *contexts, const int64_t *starts, T *out, int64_t sequences,
            int64_t longest, const Attention &sizes, int threads) {
    const int64_t sharing = sizes.heads / sizes.kv_heads;
    const int64_t tiles = (longest * sharing + LANES - 1) / LANES;
#pragma omp parallel for num_threads(threads) schedule(dynamic, 4) if (threads > 1)
    for (int64_t i = 0; i < sequences * sizes.kv_heads * tiles; i++) {
        // The last tiles of a sequence see most keys: those first.
        int64_t s = i / (sizes.kv_heads * tiles), kv_head = i / tiles % sizes.kv_heads;
        int64_t first = (tiles - 1 - i % tiles) * LANES;
        int64_t left = (starts[s + 1] - starts[s]) * sharing - first;
        const int64_t *table = tables + s * sizes.table_stride;
        if (left <= 0) continue;
        if (longest == 1 && sharing <= FEW && sizes.size == 2 * LANES)
            attend_token<T, 2>(q, keys, values, table, out, starts[s], kv_head, contexts[s], sizes);
        else if (longest == 1 && sharing <= FEW && sizes.size == 4 * LANES)
            attend_token<T, 4>(q, keys, values, table, out, starts[s], kv_head, contexts[s], sizes);
        else if (longest == 1 && sharing <= FEW && sizes.size == 8 * LANES)
            attend_token<T, 8>(q, keys, values, table, out, starts[s], kv_head, contexts[s], sizes);
        else
            attend_tile(q, keys, values, table, out, starts[s], kv_head, first,
                        left < LANES ? left : LANES, contexts[s], sizes);
    }
}

template <typename T>
void write_rows(const T *from, T *pool, const int64_t *rows, int64_t tokens, int64_t size,
                int64_t stride) {
    for (int64_t t = 0; t < tokens; t++) memcpy(pool + rows[t] * size, from + t * stride, size * sizeof(T));
}

}  // namespace

// One name for each combination of types: the model's, and for the state the state's after it.

#define MODEL(T)                                                                                   \
    extern "C" void add_norm_##T(T *h, const T *delta, const T *weight, T *out, int64_t rows,      \
                                 int64_t size, int64_t delta_stride, float eps, int threads) {     \
        add_norm<T>(h, delta, weight, out, rows, size, delta_stride, eps, threads);                \
    }                                                                                              \
    extern "C" void gated_norm_##T(const T *y, const T *z, const T *weight, T *out, int64_t rows,  \
                                   int64_t size, int64_t z_stride, int64_t group_size, float eps,  \
                                   int threads) {                                                  \
        gated_norm<T>(y, z, weight, out, rows, size, z_stride, group_size, eps, threads);          \
    }                                                                                              \
    extern "C" void conv_##T(const T *x, const T *weight, const T *bias, T *state,                 \
                             const int64_t *slots, const int64_t *starts, const bool *is_new,      \
                             T *out, int64_t sequences, int64_t channels, int64_t kernel,          \
                             int64_t x_stride, int threads) {                                      \
        conv<T>(x, weight, bias, state, slots, starts, is_new, out, sequences, channels,           \
                int(kernel), x_stride, threads);                                                   \
    }                                                                                              \
    extern "C" void write_##T(const T *from, T *pool, const int64_t *rows, int64_t tokens,         \
                              int64_t size, int64_t stride) {                                      \
        write_rows<T>(from, pool, rows, tokens, size, stride);                                     \
    }                                                                                              \
    extern "C" void attend_##T(const T *q, const T *keys, const T *values, const int64_t *tables,  \
                               const int64_t *contexts, const int64_t *starts, T *out,             \
                               int64_t sequences, int64_t longest, int64_t heads,                  \
                               int64_t kv_heads, int64_t size, int64_t q_stride,                   \
                               int64_t table_stride, int64_t block_size, int threads) {            \
        Attention sizes{heads, kv_heads, size, q_stride, table_stride, block_size};                \
        attend<T>(q, keys, values, tables, contexts, starts, out, sequences, longest, sizes,       \
                  threads);                                                                        \
    }

#define STATE(T, S)                                                                                \
    extern "C" void ssm_##T##_##S(const T *x, const T *dt, const T *B, const T *C, const float *A, \
                                  const T *dt_bias, const T *skip, S *state,                       \
                                  const int64_t *slots, const int64_t *starts, const bool *is_new, \
                                  T *out, int64_t sequences, int64_t heads, int64_t head_size,     \
                                  int64_t groups, int64_t state_size, int64_t x_stride,            \
                                  int64_t dt_stride, int64_t bc_stride, int threads) {             \
        Sizes sizes{sequences, heads,    head_size, groups, state_size,                            \
                    x_stride,  dt_stride, bc_stride};                                              \
        if (starts)                                                                                \
            scan<T, S>(x, dt, B, C, A, dt_bias, skip, state, slots, starts, is_new, out, sizes,    \
                       threads);                                                                   \
        else                                                                                       \
            ssm_update<T, S>(x, dt, B, C, A, dt_bias, skip, state, slots, out, sizes, threads);    \
    }

MODEL(f32)
MODEL(bf16)
STATE(f32, f32)
STATE(f32, bf16)
STATE(bf16, f32)
STATE(bf16, bf16)
