/* The elementwise operations of a decoder layer, one pass each; see native_ops.py, which compiles this at start.
 *
 * Built for one element type: -DBFLOAT16 or, without it, float. Arithmetic is in float, one rounding at the end.
 * NaN and infinity must come through, so the build must not assume finite mathematics.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#include "parallel.h"

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

#ifdef BFLOAT16
typedef uint16_t element;

static inline float load(element x) { return float_of_bits((uint32_t)x << 16); }

/* To the nearest, ties to even; a NaN stays one. */
static inline element store(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    uint32_t quiet = (bits >> 16) | 0x40;
    return (element)((bits & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}
#else
typedef float element;
static inline float load(element x) { return x; }
static inline element store(float value) { return value; }
#endif

/* e^x to float precision for |x| <= 87, clamped beyond: Cody-Waite reduction and a polynomial of degree 6. */
static inline float exponential(float x) {
    x = x > 87.0f ? 87.0f : x;
    x = x < -87.0f ? -87.0f : x;
    float n = rintf(x * 1.44269504f);
    float r = x - n * 0.693359375f + n * 2.12194440e-4f;
    float p = 1.3888889e-3f;
    p = p * r + 8.3333333e-3f;
    p = p * r + 4.1666667e-2f;
    p = p * r + 1.6666667e-1f;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    return p * float_of_bits((uint32_t)((int32_t)n + 127) << 23);
}

static inline float inverse_rms(float sum_of_squares, long size, float eps) {
    return 1.0f / sqrtf(sum_of_squares / (float)size + eps);
}

/* Elements from which a second thread pays for its start; the exponential costs more per element. */
enum { PARALLEL_FROM = 16384, PARALLEL_FROM_EXPONENTIAL = 6144 };

/* ---- rms_norm ---- */

/* The arguments of `add_rms_norm`, as all its threads see them. */
typedef struct {
    element *residual, *out;
    const element *delta, *weight;
    long rows, size, parts;
    float eps, offset;
} norm;

static void norm_row(element *restrict x, const element *restrict delta, const element *restrict weight,
                     element *restrict out, long size, float eps, float offset) {
    float sum = 0;
    if (delta) {
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < size; i++) {
            x[i] = store(load(x[i]) + load(delta[i]));
            sum += load(x[i]) * load(x[i]);
        }
    } else {
#pragma omp simd reduction(+ : sum)
        for (long i = 0; i < size; i++) sum += load(x[i]) * load(x[i]);
    }
    float scale = inverse_rms(sum, size, eps);
    for (long i = 0; i < size; i++) out[i] = store(load(x[i]) * scale * (offset + load(weight[i])));
}

static void norm_part(void *of, long part) {
    const norm *n = of;
    for (long row = part_begin(n->rows, part, n->parts); row < part_begin(n->rows, part + 1, n->parts); row++)
        norm_row(n->residual + row * n->size, n->delta ? n->delta + row * n->size : 0, n->weight,
                 n->out + row * n->size, n->size, n->eps, n->offset);
}

/* out = rms_norm(residual) * (offset + weight); with delta, residual += delta first. All [rows, size], contiguous. */
void add_rms_norm(element *residual, const element *delta, const element *weight, element *out, long rows, long size,
                  float eps, float offset, int threads) {
    const long parts = rows * size >= PARALLEL_FROM ? threads : 1;
    norm n = {residual, out, delta, weight, rows, size, parts, eps, offset};
    parallel_for(norm_part, &n, parts, threads);
}

/* ---- gates ---- */

/* The arguments of a gate, as all its threads see them; limit and alpha are those of `clamped_swiglu`. */
typedef struct gates {
    void (*row)(const struct gates *, const element *gate, const element *up, element *out);
    const element *gate_up;
    element *out;
    long rows, size, parts;
    float limit, alpha;
} gates;

static void silu_row(const gates *g, const element *restrict gate, const element *restrict up, element *restrict out) {
    const long size = g->size;
    for (long i = 0; i < size; i++) {
        float x = load(gate[i]);
        out[i] = store(x / (1.0f + exponential(-x)) * load(up[i]));
    }
}

/* (1 + tanh(u)) / 2 is 1 / (1 + e^-2u), with u = sqrt(2 / pi) (x + 0.044715 x^3). */
static void gelu_tanh_row(const gates *g, const element *restrict gate, const element *restrict up,
                          element *restrict out) {
    const long size = g->size;
    for (long i = 0; i < size; i++) {
        float x = load(gate[i]);
        out[i] = store(x / (1.0f + exponential(-1.59576912f * x * (1.0f + 0.044715f * x * x))) * load(up[i]));
    }
}

static void clamped_swiglu_row(const gates *g, const element *restrict gate, const element *restrict up,
                               element *restrict out) {
    const long size = g->size;
    const float limit = g->limit, alpha = g->alpha;
    for (long i = 0; i < size; i++) {
        float x = load(gate[i]), y = load(up[i]);
        x = x > limit ? limit : x;
        y = y > limit ? limit : y;
        y = y < -limit ? -limit : y;
        out[i] = store(x / (1.0f + exponential(-alpha * x)) * (y + 1.0f));
    }
}

static void gate_part(void *of, long part) {
    const gates *g = of;
    for (long row = part_begin(g->rows, part, g->parts); row < part_begin(g->rows, part + 1, g->parts); row++)
        g->row(g, g->gate_up + 2 * row * g->size, g->gate_up + (2 * row + 1) * g->size, g->out + row * g->size);
}

static void run_gates(gates g, int threads) {
    g.parts = g.rows * g.size >= PARALLEL_FROM_EXPONENTIAL ? threads : 1;
    parallel_for(gate_part, &g, g.parts, threads);
}

/* out [rows, size] = silu(gate) * up, with gate_up [rows, 2 * size]. */
void silu_and_mul(const element *gate_up, element *out, long rows, long size, int threads) {
    run_gates((gates){.row = silu_row, .gate_up = gate_up, .out = out, .rows = rows, .size = size}, threads);
}

/* The same with gelu, by its approximation with tanh. */
void gelu_tanh_and_mul(const element *gate_up, element *out, long rows, long size, int threads) {
    run_gates((gates){.row = gelu_tanh_row, .gate_up = gate_up, .out = out, .rows = rows, .size = size}, threads);
}

/* out = gate * sigmoid(alpha * gate) * (up + 1), where gate is at most limit, and up at most that large. */
void clamped_swiglu(const element *gate_up, element *out, long rows, long size, float limit, float alpha, int threads) {
    run_gates((gates){.row = clamped_swiglu_row, .gate_up = gate_up, .out = out, .rows = rows, .size = size,
                      .limit = limit, .alpha = alpha}, threads);
}

/* ---- rotate ---- */

/* The arguments of `rotate`. */
typedef struct {
    element *qkv;
    const float *cos_sin;
    const element *q_norm, *k_norm;
    long rows, row_size, num_q, num_k, head_dim, rotary_dim, parts;
    int is_interleaved;
    float eps, offset;
} rotation;

static inline void norm_head(element *restrict head, const element *restrict weight, long head_dim, float eps,
                             float offset) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (long i = 0; i < head_dim; i++) sum += load(head[i]) * load(head[i]);
    float scale = inverse_rms(sum, head_dim, eps);
    for (long i = 0; i < head_dim; i++) head[i] = store(load(head[i]) * scale * (offset + load(weight[i])));
}

/* The first 2 * half dimensions, one half against the other. */
static inline void rotate_halves(element *restrict head, const float *restrict cosines, const float *restrict sines,
                                 long half) {
    element *low = head, *high = head + half;
    for (long i = 0; i < half; i++) {
        float x = load(low[i]), y = load(high[i]);
        low[i] = store(x * cosines[i] - y * sines[i]);
        high[i] = store(y * cosines[i] + x * sines[i]);
    }
}

/* The first 2 * half dimensions, neighbours against each other. */
static inline void rotate_pairs(element *restrict head, const float *restrict cosines, const float *restrict sines,
                                long half) {
    for (long i = 0; i < half; i++) {
        float x = load(head[2 * i]), y = load(head[2 * i + 1]);
        head[2 * i] = store(x * cosines[i] - y * sines[i]);
        head[2 * i + 1] = store(y * cosines[i] + x * sines[i]);
    }
}

static void rotate_part(void *of, long part) {
    const rotation *r = of;
    const long half = r->rotary_dim / 2;
    for (long row = part_begin(r->rows, part, r->parts); row < part_begin(r->rows, part + 1, r->parts); row++) {
        const float *cosines = r->cos_sin + row * r->rotary_dim;
        for (long i = 0; i < r->num_q + r->num_k; i++) {
            element *head = r->qkv + row * r->row_size + i * r->head_dim;
            if (r->q_norm) norm_head(head, i < r->num_q ? r->q_norm : r->k_norm, r->head_dim, r->eps, r->offset);
            if (r->is_interleaved)
                rotate_pairs(head, cosines, cosines + half, half);
            else
                rotate_halves(head, cosines, cosines + half, half);
        }
    }
}

/* Query and key heads of qkv [rows, row_size], in place; cos_sin is [rows, rotary_dim], null with rotary_dim 0. The
 * norms, which come first, may be null. */
void rotate(element *qkv, const float *cos_sin, const element *q_norm, const element *k_norm, long rows, long row_size,
            long num_q, long num_k, long head_dim, long rotary_dim, int is_interleaved, float eps, float offset,
            int threads) {
    if (!rotary_dim && !q_norm) return;
    const long parts = rows * (num_q + num_k) * head_dim >= PARALLEL_FROM ? threads : 1;
    rotation r = {qkv,      cos_sin,    q_norm, k_norm,         rows, row_size, num_q, num_k,
                  head_dim, rotary_dim, parts,  is_interleaved, eps,  offset};
    parallel_for(rotate_part, &r, parts, threads);
}
