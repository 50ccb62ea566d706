// One pass of the decoder over some rows: embedded tokens in, logits of the next tokens out.
//
// The decoder is that of models/dalle.py (pre-norm blocks, QK-norm, rotary angles, SwiGLU, no
// biases). A row is one token of one image; the rows of a pass may be the last tokens of several
// images, several tokens of one, or a caption. Keys and values of earlier tokens lie in a cache.
//
// Why not torch: for a few rows a pass is some 400 small operations, each of which torch launches
// and splits over threads anew, and its products of a matrix with few rows do not reach the speed
// of memory. Here threads start once per pass and meet at barriers, and weights lie in memory in
// the order in which they are read.
//
// A row's numbers never depend on the other rows: every sum runs over its terms in one order,
// whatever the tile, and int8 scales are chosen row by row.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __AVX512VNNI__
#include <immintrin.h>
#endif

namespace {

constexpr long LANES = 16;          // numbers in a vector: one AVX-512 register, or several smaller
constexpr long PANEL = 4 * LANES;   // outputs of a product that are computed together
constexpr long TILE = 6;            // rows computed together: 6 x 4 sums fit into 32 registers
constexpr float EPSILON = 1e-6f;    // of every norm
constexpr int SPINS = 4000;         // some 50 microseconds at a barrier; then the core is given up

typedef float Floats __attribute__((vector_size(64)));
typedef int32_t Ints __attribute__((vector_size(64)));

Floats load(const float* from) {
    Floats value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

void store(float* to, Floats value) { std::memcpy(to, &value, sizeof value); }

// bfloat16, the upper half of a float32: the type of cached keys and values with int8 weights.
typedef uint16_t Half;
typedef Half Halves __attribute__((vector_size(32)));

Floats load(const Half* from) {
    Halves halves;
    std::memcpy(&halves, from, sizeof halves);
    const Ints bits = __builtin_convertvector(halves, Ints) << 16;
    Floats value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

void store_one(float* to, float value) { *to = value; }

void store_one(Half* to, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    *to = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;  // to the nearest, ties to even
}

float total(Floats value) {
    float sum = 0;
    for (int lane = 0; lane < LANES; ++lane) sum += value[lane];
    return sum;
}

// Cephes' polynomial; relative error 2e-7 between -87 and 88, beyond which the result stays put.
Floats exponential(Floats x) {
    const Floats low = Floats{} - 87.0f, high = Floats{} + 88.0f;
    x = x < low ? low : x;
    x = x > high ? high : x;
    const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
    const Floats whole = (x * 1.44269504f + magic) - magic;
    const Floats r = x - whole * 0.693359375f + whole * 2.12194440e-4f;
    Floats y = r * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * r + 8.3334519073e-3f;
    y = y * r + 4.1665795894e-2f;
    y = y * r + 1.6666665459e-1f;
    y = y * r + 5.0000001201e-1f;
    y = y * r * r + r + 1.0f;
    const Ints exponent = (__builtin_convertvector(whole, Ints) + 127) << 23;
    Floats power;
    std::memcpy(&power, &exponent, sizeof power);
    return y * power;
}

}  // namespace

extern "C" {

// A linear map without bias. Weights are packed as [panel][input][64 outputs] in float32, and as
// [panel][input / 4][64 outputs][4 inputs] in int8, where scales and starts are set.
struct Matrix {
    const void* weights;
    const float* scales;    // of each output: weight = int8 * scale
    const int32_t* starts;  // -128 * sum of an output's int8 weights: inputs are stored plus 128
    int64_t inputs, panels;
};

struct Layer {
    const float *attention_norm, *query_norm, *key_norm, *feed_forward_norm;
    Matrix query_key_value, attention_output, gate_value, feed_forward_output;
};

struct Decoder {
    int64_t hidden, num_heads, num_layers, intermediate;
    const Layer* layers;
    const float* output_norm;
    Matrix head;
    const float *cosines, *sines;  // [cell][head_dim / 2]; a last row of angle zero for captions
};

// float32 with float32 weights, else bfloat16. Keys are
// [layer][image][head][panel of 64 positions][head_dim][64], values
// [layer][image][head][position][head_dim]: each in the order in which its product reads it.
struct Cache {
    void *keys, *values;
    int64_t images, length;  // length: positions, a multiple of 64
};

struct Rows {
    int64_t count;
    float* hidden;                             // [count][hidden], overwritten
    const int32_t *images, *positions, *cells;  // each image's rows stand together, in order
    int64_t num_logits;
    const int32_t* logit_rows;  // which rows' next tokens are predicted
    float* logits;              // [num_logits][64 * head.panels]
};
}

namespace {

// Threads meet here about nine times a layer. Spinning is cheaper than sleeping by far, but only
// while every thread has a core: so it is bounded.
class Barrier {
  public:
    int num_threads = 1;

    void meet() {
        if (num_threads == 1) return;
        const int round = round_.load(std::memory_order_acquire);
        if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads) {
            arrived_.store(0, std::memory_order_relaxed);
            round_.store(round + 1, std::memory_order_release);
            round_.notify_all();
            return;
        }
        for (int spin = 0; spin < SPINS; ++spin) {
            if (round_.load(std::memory_order_acquire) != round) return;
#if defined(__x86_64__) || defined(__i386__)
            __builtin_ia32_pause();
#endif
        }
        while (round_.load(std::memory_order_acquire) == round) round_.wait(round);
    }

  private:
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

struct Thread {
    int index, count;
    Barrier* barrier;

    long begin(long items) const { return items * index / count; }
    long end(long items) const { return items * (index + 1) / count; }
};

// The rows that the next product reads: float32, or int8 plus 128 with one scale per row.
struct Inputs {
    std::vector<float> floats, scales;
    std::vector<uint8_t> bytes;
    const long width;

    Inputs(long rows, long row_width)
        : floats(rows * row_width), scales(rows), bytes(rows * row_width), width(row_width) {}

    // Quantizes row `row` of floats.
    void quantize(long row) {
        const float* from = &floats[row * width];
        Floats largest = {};
        for (long i = 0; i < width; i += LANES) {
            const Floats x = load(from + i), size = x < 0.0f ? -x : x;
            largest = size > largest ? size : largest;
        }
        float most = 1e-30f;
        for (int lane = 0; lane < LANES; ++lane) most = std::max(most, largest[lane]);
        scales[row] = most / 127.0f;
        const float inverse = 127.0f / most, magic = 12582912.0f;
        typedef uint8_t Bytes __attribute__((vector_size(16)));
        for (long i = 0; i < width; i += LANES) {
            const Floats whole = (load(from + i) * inverse + magic) - magic;
            const Ints shifted = __builtin_convertvector(whole, Ints) + 128;
            const Bytes narrow = __builtin_convertvector(shifted, Bytes);
            std::memcpy(&bytes[row * width + i], &narrow, sizeof narrow);
        }
    }
};

// sums[r][b] = sum over k of x[r][k] * w[k][16 b ...]; the heart of float32 and of attention.
template <int R, int B, class Number>
inline void multiply(const float* x, long x_stride, const Number* w, long w_stride, long count,
                     Floats (&sums)[R][B]) {
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b) sums[r][b] = Floats{};
    for (long k = 0; k < count; ++k, w += w_stride) {
        Floats weights[B];
        for (int b = 0; b < B; ++b) weights[b] = load(w + LANES * b);
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < B; ++b) sums[r][b] += x[r * x_stride + k] * weights[b];
    }
}

// sums[lane] += four inputs times the four weights of each output.
inline void add_dot(Ints& sums, const uint8_t* x, const int8_t* w) {
#ifdef __AVX512VNNI__
    int32_t four;
    std::memcpy(&four, x, sizeof four);
    sums = (Ints)_mm512_dpbusd_epi32((__m512i)sums, _mm512_set1_epi32(four), _mm512_loadu_si512(w));
#else
    for (int lane = 0; lane < LANES; ++lane)
        for (int i = 0; i < 4; ++i) sums[lane] += int32_t(x[i]) * int32_t(w[4 * lane + i]);
#endif
}

template <int R>
inline void multiply(const uint8_t* x, long x_stride, const int8_t* w, const int32_t* starts,
                     long count, Ints (&sums)[R][4]) {
    for (int r = 0; r < R; ++r) std::memcpy(sums[r], starts, sizeof sums[r]);
    for (long k = 0; k < count; k += 4, w += 4 * PANEL)
        for (int b = 0; b < 4; ++b) {
            if (R <= 2) __builtin_prefetch(w + PANEL * b + 8192);  // few rows wait for memory
            for (int r = 0; r < R; ++r) add_dot(sums[r][b], x + r * x_stride + k, w + PANEL * b);
        }
}

template <int R, class Put>
void project_tile(const Matrix& m, const Inputs& x, long panel, long row, const Put& put) {
    const long size = m.inputs * PANEL;
    Floats values[R][4];
    if (m.scales) {
        Ints sums[R][4];
        multiply<R>(&x.bytes[row * x.width], x.width, (const int8_t*)m.weights + panel * size,
                    m.starts + panel * PANEL, m.inputs, sums);
        for (int r = 0; r < R; ++r)
            for (int b = 0; b < 4; ++b)
                values[r][b] = __builtin_convertvector(sums[r][b], Floats) *
                               load(m.scales + panel * PANEL + b * LANES) * x.scales[row + r];
    } else {
        multiply<R, 4>(&x.floats[row * x.width], x.width, (const float*)m.weights + panel * size,
                       PANEL, m.inputs, values);
    }
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < 4; ++b) put(row + r, panel * PANEL + b * LANES, values[r][b]);
}

// Calls put(row, output, values) for this thread's part of the outputs.
template <class Put>
void project(const Matrix& m, const Inputs& x, long rows, const Thread& thread, const Put& put) {
    for (long panel = thread.begin(m.panels); panel < thread.end(m.panels); ++panel)
        for (long row = 0; row < rows; row += TILE) switch (std::min(TILE, rows - row)) {
                case 1: project_tile<1>(m, x, panel, row, put); break;
                case 2: project_tile<2>(m, x, panel, row, put); break;
                case 3: project_tile<3>(m, x, panel, row, put); break;
                case 4: project_tile<4>(m, x, panel, row, put); break;
                case 5: project_tile<5>(m, x, panel, row, put); break;
                default: project_tile<6>(m, x, panel, row, put);
            }
}

// LayerNorm without bias; from and to may be the same.
void normalize(const float* from, const float* weight, float* to, long width) {
    Floats sum = {}, squares = {};
    for (long i = 0; i < width; i += LANES) sum += load(from + i);
    const float mean = total(sum) / width;
    for (long i = 0; i < width; i += LANES) {
        const Floats centered = load(from + i) - mean;
        squares += centered * centered;
    }
    const float scale = 1.0f / std::sqrt(total(squares) / width + EPSILON);
    for (long i = 0; i < width; i += LANES)
        store(to + i, (load(from + i) - mean) * scale * load(weight + i));
}

// The state of one pass, shared by its threads.
struct Pass {
    const Decoder& decoder;
    const Cache& cache;
    const Rows& rows;
    const long head_dim;
    Inputs inputs, inner;          // of the products that read `hidden` and `intermediate` numbers
    std::vector<float> projected;  // queries, keys and values; then gates and values
    std::vector<long> starts;      // the first row of each image, and the end of the last one

    Pass(const Decoder& d, const Cache& c, const Rows& r)
        : decoder(d), cache(c), rows(r), head_dim(d.hidden / d.num_heads),
          inputs(r.count, d.hidden), inner(r.count, d.intermediate),
          projected(r.count * std::max(3 * d.hidden, 2 * d.intermediate)) {
        for (long row = 0; row < r.count; ++row)
            if (row == 0 || r.images[row] != r.images[row - 1]) starts.push_back(row);
        starts.push_back(r.count);
    }
    void run(const Thread& thread);
    void normalize_rows(const float* weight, const Thread& thread);
    template <class Number>
    void attend(long layer, const Thread& thread, float* weights);
    template <class Number>
    void attend_head(long layer, long head, long first, long last, float* weights);
    template <int R, class Number>
    void attend_tile(const Number* keys, const Number* values, long head, long row, float* weights);
    template <int R, int B, class Number>
    void mix(const Number* values, long seen, long head, long row, long start, const float* weights,
             const float* scales);
};

void Pass::normalize_rows(const float* weight, const Thread& thread) {
    const long width = decoder.hidden;
    for (long row = thread.begin(rows.count); row < thread.end(rows.count); ++row) {
        normalize(rows.hidden + row * width, weight, &inputs.floats[row * width], width);
        if (decoder.head.scales) inputs.quantize(row);
    }
}

// R successive rows of one image, one head.
template <int R, class Number>
void Pass::attend_tile(const Number* keys, const Number* values, long head, long row,
                       float* weights) {
    const long width = decoder.hidden, length = cache.length;
    const long seen = rows.positions[row + R - 1] + 1;
    const float* queries = &projected[row * 3 * width + head * head_dim];
    // 1. Scores of all positions that the last row sees.
    for (long start = 0; start < seen; start += PANEL) {
        Floats scores[R][4];
        multiply<R, 4>(queries, 3 * width, keys + start * head_dim, PANEL, head_dim, scores);
        for (int r = 0; r < R; ++r)
            std::memcpy(weights + r * length + start, scores[r], sizeof scores[r]);
    }
    // 2. Softmax of each row, over the positions up to its own; its divisor is applied at the end.
    float scales[R];
    for (int r = 0; r < R; ++r) {
        float* own = weights + r * length;
        const long count = rows.positions[row + r] + 1;  // the row itself, and all before it
        const long padded = (seen + PANEL - 1) / PANEL * PANEL;
        for (long i = count; i < padded; ++i) own[i] = -INFINITY;
        Floats most = load(own), sum = {};
        for (long i = LANES; i < padded; i += LANES) {
            const Floats x = load(own + i);
            most = x > most ? x : most;
        }
        float largest = most[0];
        for (int lane = 1; lane < LANES; ++lane) largest = std::max(largest, most[lane]);
        for (long i = 0; i < padded; i += LANES) {
            const Floats x = load(own + i), power = exponential(x - largest);
            const Floats weight = x == -INFINITY ? Floats{} : power;
            store(own + i, weight);
            sum += weight;
        }
        scales[r] = 1.0f / total(sum);
    }
    // 3. The weighted sum of the values.
    long start = 0;
    for (; start + PANEL <= head_dim; start += PANEL)
        mix<R, 4>(values, seen, head, row, start, weights, scales);
    for (; start < head_dim; start += LANES)
        mix<R, 1>(values, seen, head, row, start, weights, scales);
}

// Numbers `start` to `start` + 16 B of a head's weighted sum of values.
template <int R, int B, class Number>
void Pass::mix(const Number* values, long seen, long head, long row, long start,
               const float* weights, const float* scales) {
    Floats mixed[R][B];
    multiply<R, B>(weights, cache.length, values + start, head_dim, seen, mixed);
    float* to = &inputs.floats[row * decoder.hidden + head * head_dim + start];
    for (int r = 0; r < R; ++r)
        for (int b = 0; b < B; ++b)
            store(to + r * decoder.hidden + b * LANES, mixed[r][b] * scales[r]);
}

template <class Number>
void Pass::attend_head(long layer, long head, long first, long last, float* weights) {
    const long width = decoder.hidden, half = head_dim / 2;
    const long unit =
        (layer * cache.images + rows.images[first]) * decoder.num_heads + head;
    Number* keys = (Number*)cache.keys + unit * cache.length * head_dim;
    Number* values = (Number*)cache.values + unit * cache.length * head_dim;
    const float scale = 1.0f / std::sqrt(float(head_dim));
    // Normalize and rotate queries and keys, and store keys and values, before any row attends.
    for (long row = first; row < last; ++row) {
        float* query = &projected[row * 3 * width + head * head_dim];
        float* key = query + width;
        const float* cosine = decoder.cosines + rows.cells[row] * half;
        const float* sine = decoder.sines + rows.cells[row] * half;
        normalize(query, decoder.layers[layer].query_norm, query, head_dim);
        normalize(key, decoder.layers[layer].key_norm, key, head_dim);
        const long position = rows.positions[row];
        Number* panel = keys + position / PANEL * PANEL * head_dim + position % PANEL;
        for (long i = 0; i < half; ++i) {
            const float a = query[i], b = query[i + half], c = key[i], d = key[i + half];
            query[i] = (a * cosine[i] - b * sine[i]) * scale;
            query[i + half] = (b * cosine[i] + a * sine[i]) * scale;
            store_one(panel + i * PANEL, c * cosine[i] - d * sine[i]);
            store_one(panel + (i + half) * PANEL, d * cosine[i] + c * sine[i]);
        }
        for (long i = 0; i < head_dim; ++i) store_one(values + position * head_dim + i, key[width + i]);
    }
    for (long row = first; row < last; row += 4) switch (std::min(4L, last - row)) {
            case 1: attend_tile<1>(keys, values, head, row, weights); break;
            case 2: attend_tile<2>(keys, values, head, row, weights); break;
            case 3: attend_tile<3>(keys, values, head, row, weights); break;
            default: attend_tile<4>(keys, values, head, row, weights);
        }
}

template <class Number>
void Pass::attend(long layer, const Thread& thread, float* weights) {
    const long units = (starts.size() - 1) * decoder.num_heads;
    for (long unit = thread.begin(units); unit < thread.end(units); ++unit) {
        const long group = unit / decoder.num_heads;
        attend_head<Number>(layer, unit % decoder.num_heads, starts[group], starts[group + 1],
                            weights);
    }
}

void Pass::run(const Thread& thread) {
    const long count = rows.count, width = decoder.hidden, inner_width = decoder.intermediate;
    const bool is_int8 = decoder.head.scales != nullptr;
    std::vector<float> weights(4 * cache.length);
    const auto put_into = [this](long stride) {
        return [this, stride](long row, long output, Floats value) {
            if (output < stride) store(&projected[row * stride + output], value);
        };
    };
    const auto add = [&](long row, long output, Floats value) {
        float* to = rows.hidden + row * width + output;
        if (output < width) store(to, load(to) + value);
    };
    for (long layer = 0; layer < decoder.num_layers; ++layer) {
        const Layer& block = decoder.layers[layer];
        // 1. Attention.
        normalize_rows(block.attention_norm, thread);
        thread.barrier->meet();
        project(block.query_key_value, inputs, count, thread, put_into(3 * width));
        thread.barrier->meet();
        if (is_int8) attend<Half>(layer, thread, weights.data());
        else attend<float>(layer, thread, weights.data());
        thread.barrier->meet();
        if (is_int8) {
            for (long row = thread.begin(count); row < thread.end(count); ++row)
                inputs.quantize(row);
            thread.barrier->meet();
        }
        project(block.attention_output, inputs, count, thread, add);
        thread.barrier->meet();
        // 2. Feed-forward: SwiGLU.
        normalize_rows(block.feed_forward_norm, thread);
        thread.barrier->meet();
        project(block.gate_value, inputs, count, thread, put_into(2 * inner_width));
        thread.barrier->meet();
        for (long row = thread.begin(count); row < thread.end(count); ++row) {
            const float *gates = &projected[row * 2 * inner_width], *values = gates + inner_width;
            for (long i = 0; i < inner_width; i += LANES) {
                const Floats gate = load(gates + i);
                store(&inner.floats[row * inner_width + i],
                      gate / (1.0f + exponential(-gate)) * load(values + i));
            }
            if (is_int8) inner.quantize(row);
        }
        thread.barrier->meet();
        project(block.feed_forward_output, inner, count, thread, add);
        thread.barrier->meet();
    }
    // 3. Logits of the chosen rows.
    for (long i = thread.begin(rows.num_logits); i < thread.end(rows.num_logits); ++i) {
        const float* from = rows.hidden + rows.logit_rows[i] * width;
        normalize(from, decoder.output_norm, &inputs.floats[i * width], width);
        if (is_int8) inputs.quantize(i);
    }
    thread.barrier->meet();
    const auto put_logits = [&](long row, long output, Floats value) {
        store(rows.logits + row * decoder.head.panels * PANEL + output, value);
    };
    project(decoder.head, inputs, rows.num_logits, thread, put_logits);
}

}  // namespace

extern "C" void decode(const Decoder* decoder, const Cache* cache, const Rows* rows,
                       int num_threads) {
    Pass pass(*decoder, *cache, *rows);
    Barrier barrier;
#ifdef _OPENMP
#pragma omp parallel num_threads(num_threads)
    {
#pragma omp single
        barrier.num_threads = omp_get_num_threads();
        pass.run({omp_get_thread_num(), omp_get_num_threads(), &barrier});
    }
#else
    (void)num_threads;
    pass.run({0, 1, &barrier});
#endif
}

// The uniform numbers behind sampling/logits.py's noise, from the same integers: in torch they took
// a third of the time of an image. Sources as there: splitmix64 scatters the seed, squares32 counts.
extern "C" void uniforms(const int64_t* seeds, const int64_t* steps, int64_t rows, int64_t count,
                         float* to, int num_threads) {
    (void)num_threads;
#ifdef _OPENMP
#pragma omp parallel for num_threads(num_threads)
#endif
    for (int64_t row = 0; row < rows; ++row) {
        uint64_t key = uint64_t(seeds[row]) + 0x9E3779B97F4A7C15u;
        key = (key ^ key >> 30) * 0xBF58476D1CE4E5B9u;
        key = (key ^ key >> 27) * 0x94D049BB133111EBu;
        key = (key ^ key >> 31) | 1;
        for (int64_t i = 0; i < count; ++i) {
            const uint64_t weyl = uint64_t(steps[row] * count + i) * key, next = weyl + key;
            uint64_t bits = weyl * weyl + weyl;
            bits = bits << 32 | bits >> 32;
            bits = bits * bits + next;
            bits = bits << 32 | bits >> 32;
            bits = bits * bits + weyl;
            bits = bits << 32 | bits >> 32;
            bits = (bits * bits + next) >> 32;
            to[row * count + i] = (float(int32_t(bits >> 9)) + 0.5f) / 8388608.0f;
        }
    }
}
