/* y = x Wᵀ + b with the rows of W as they lie in a file, for matrices of which few are used; see row_major.py.
 *
 * Lanes of a vector are inputs, and a sum runs across them at its end: a matrix need not be laid out anew, so that a
 * mapped file is read when an expert is first used, and no earlier. A tile is OUTPUTS outputs by up to ROWS rows. A row's
 * arithmetic is the same whatever rows are beside it.
 *
 * Built for one element type of x, y and bias: -DBFLOAT16 or, without it, float. Weights are bfloat16, or float beside
 * float inputs.
 */
#include <stdlib.h>

#include "parallel.h"
#include "vectors.h"

enum {
    OUTPUTS = 4,
    ROWS = REGISTERS == 32 ? 4 : 2, /* at most, of a tile */
    MOST_ROWS = 128,            /* of a product, so that its inputs stay in the second-level cache */
    UNIT = 16,                  /* outputs that one thread takes at least */
    CHUNKS_PER_THREAD = 8       /* matrices have different numbers of rows: a delayed thread is helped */
};

#ifdef BFLOAT16
typedef uint16_t element;
#else
typedef float element;
#endif

/* A part of a matrix: `data` [num_outputs, in_size]. */
typedef struct {
    const void *data;
    long num_outputs, first_output;
} part;

/* Rows that meet one matrix. */
typedef struct {
    const part *parts;
    long num_parts, rows, in_size, y_stride;
    const element *x;
    const int64_t *sources; /* the row of x that each row takes; null: its own */
    const element *bias;
    element *y;
} product;

INLINE float of_bfloat16(uint16_t x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE floats load_float(const float *x) { return *(const floats *)x; }

#ifdef BFLOAT16
INLINE float number(element x) { return of_bfloat16(x); }
INLINE floats load(const element *x) { return load_bfloat16(x); }
/* To the nearest, ties to even; a NaN stays one. */
INLINE element rounded(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    uint32_t even = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
    return (element)((bits & 0x7fffffff) > 0x7f800000 ? quiet : even);
}
#else
INLINE float number(element x) { return x; }
INLINE floats load(const element *x) { return load_float(x); }
INLINE element rounded(float value) { return value; }
#endif

INLINE float sum_of(floats x) {
#if defined(AVX512)
    return _mm512_reduce_add_ps((__m512)x);
#elif defined(__aarch64__)
    return vaddvq_f32((float32x4_t)x);
#else
    float sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
#endif
}

/* Where bfloat16 inputs and weights are multiplied in pairs: 2 * LANES of them, and their products added to LANES sums. */
#if defined(BFLOAT16) && defined(__AVX512BF16__)
#define HAS_PAIRS 1
typedef __m512bh pairs_of_inputs;
INLINE pairs_of_inputs load_pairs(const uint16_t *x) { return (__m512bh)_mm512_loadu_si512(x); }
INLINE floats add_products(floats sums, pairs_of_inputs x, pairs_of_inputs y) {
    return (floats)_mm512_dpbf16_ps((__m512)sums, x, y);
}
#elif defined(BFLOAT16) && defined(__ARM_FEATURE_BF16_VECTOR_ARITHMETIC)
#define HAS_PAIRS 1
typedef bfloat16x8_t pairs_of_inputs;
INLINE pairs_of_inputs load_pairs(const uint16_t *x) { return vreinterpretq_bf16_u16(vld1q_u16(x)); }
INLINE floats add_products(floats sums, pairs_of_inputs x, pairs_of_inputs y) {
    return (floats)vbfdotq_f32((float32x4_t)sums, x, y);
}
#endif

/* Sums of OUTPUTS rows of W, each `in_size` long, with some rows of inputs; `is_narrow`: W is bfloat16. Both are
 * constants where this is called. The same bytes of the next outputs are asked for: rows of a page or two are too short
 * for the processor to see that memory is read in order. */
INLINE void sums_of(const element *const *x, const void *w, long in_size, int rows, int is_narrow,
                    float out[ROWS][OUTPUTS]) {
    floats sums[ROWS][OUTPUTS];
    UNROLLED for (int r = 0; r < rows; r++) UNROLLED for (int o = 0; o < OUTPUTS; o++) sums[r][o] = (floats){};
    long i = 0;
#ifdef HAS_PAIRS
    for (; i + 2 * LANES <= in_size; i += 2 * LANES) {
        const uint16_t *at = (const uint16_t *)w + i;
        pairs_of_inputs weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) {
            weights[o] = load_pairs(at + o * in_size);
            __builtin_prefetch(at + (OUTPUTS + o) * in_size);
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            pairs_of_inputs inputs = load_pairs(x[r] + i);
            UNROLLED for (int o = 0; o < OUTPUTS; o++) sums[r][o] = add_products(sums[r][o], weights[o], inputs);
        }
    }
#endif
    for (; i + LANES <= in_size; i += LANES) {
        floats weights[OUTPUTS];
        UNROLLED for (int o = 0; o < OUTPUTS; o++) {
            long at = o * in_size + i;
            weights[o] = is_narrow ? load_bfloat16((const uint16_t *)w + at) : load_float((const float *)w + at);
            __builtin_prefetch((const char *)w + (at + OUTPUTS * in_size) * (is_narrow ? 2 : 4));
        }
        UNROLLED for (int r = 0; r < rows; r++) {
            floats inputs = load(x[r] + i);
            UNROLLED for (int o = 0; o < OUTPUTS; o++) sums[r][o] += weights[o] * inputs;
        }
    }
    for (int r = 0; r < rows; r++)
        for (int o = 0; o < OUTPUTS; o++) {
            float sum = sum_of(sums[r][o]);
            for (long j = i; j < in_size; j++) {
                long at = o * in_size + j;
                sum += number(x[r][j]) * (is_narrow ? of_bfloat16(((const uint16_t *)w)[at]) : ((const float *)w)[at]);
            }
            out[r][o] = sum;
        }
}

/* `count` outputs from `out` on, at most OUTPUTS. */
INLINE void tile(const product *t, const part *p, long out, long count, long first, int rows, int is_narrow) {
    const element *x[ROWS];
    float sums[ROWS][OUTPUTS];
    for (int r = 0; r < rows; r++) x[r] = t->x + (t->sources ? t->sources[first + r] : first + r) * t->in_size;
    long start = count == OUTPUTS ? out : p->num_outputs - OUTPUTS, skipped = out - start;
    sums_of(x, (const char *)p->data + start * t->in_size * (is_narrow ? 2 : 4), t->in_size, rows, is_narrow, sums);
    for (int r = 0; r < rows; r++) {
        element *y = t->y + (first + r) * t->y_stride + p->first_output + out;
        for (long o = 0; o < count; o++)
            y[o] = rounded(sums[r][o + skipped] + (t->bias ? number(t->bias[p->first_output + out + o]) : 0));
    }
}

INLINE void rows_of_tile(const product *t, const part *p, long out, int is_narrow) {
    long count = p->num_outputs - out < OUTPUTS ? p->num_outputs - out : OUTPUTS;
    for (long first = 0; first < t->rows; first += ROWS)
        switch (t->rows - first) {
        case 1: tile(t, p, out, count, first, 1, is_narrow); break;
        case 2: tile(t, p, out, count, first, 2, is_narrow); break;
        case 3: tile(t, p, out, count, first, ROWS < 3 ? ROWS : 3, is_narrow); break;
        default: tile(t, p, out, count, first, ROWS, is_narrow); break;
        }
}

/* What all threads see; units of UNIT outputs are numbered over all parts of all products. */
typedef struct {
    const product *products;
    long units, chunks;
    int is_narrow;
} stack;

static long num_units(const part *p) { return (p->num_outputs + UNIT - 1) / UNIT; }

static void unit(const product *t, const part *p, long index, int is_narrow) {
    long end = (index + 1) * UNIT < p->num_outputs ? (index + 1) * UNIT : p->num_outputs;
    for (long out = index * UNIT; out < end; out += OUTPUTS)
        if (is_narrow) rows_of_tile(t, p, out, 1);
        else rows_of_tile(t, p, out, 0);
}

static void stack_chunk(void *task, long chunk) {
    const stack *s = task;
    const product *t = s->products;
    long at = part_begin(s->units, chunk, s->chunks), end = part_begin(s->units, chunk + 1, s->chunks), before = 0;
    for (; at < end; t++)
        for (const part *p = t->parts; at < end && p < t->parts + t->num_parts; before += num_units(p), p++)
            for (; at < end && at - before < num_units(p); at++) unit(t, p, at - before, s->is_narrow);
}

/* y [n, y_stride] = x [rows, in_size] Wᵀ + bias, where rows up to ends[m] and from ends[m - 1] on meet matrix m, of
 * `parts_each` parts with OUTPUTS outputs or more, and row m of the bias [matrices, y_stride]. Row i of the product is row
 * sources[i] of x, or row i. Returns 0, or 1 where there is no memory. */
int row_major_product(const element *x, const int64_t *sources, const part *parts, long parts_each, const int32_t *ends,
                      long matrices, const element *bias, element *y, long in_size, long y_stride, int is_narrow,
                      int threads) {
    product *products = malloc((matrices + ends[matrices - 1] / MOST_ROWS) * sizeof *products);
    if (!products) return 1;
    long count = 0, units = 0, units_each = 0;
    for (long matrix = 0, row = 0; matrix < matrices; matrix++)
        for (long rows; row < ends[matrix]; row += rows, units += units_each) {
            rows = ends[matrix] - row < MOST_ROWS ? ends[matrix] - row : MOST_ROWS;
            const part *own = parts + matrix * parts_each;
            products[count++] = (product){own, parts_each, rows, in_size, y_stride, sources ? x : x + row * in_size,
                                          sources ? sources + row : 0, bias ? bias + matrix * y_stride : 0,
                                          y + row * y_stride};
            units_each = 0;
            for (long i = 0; i < parts_each; i++) units_each += num_units(own + i);
        }
    long chunks = threads > 1 ? threads * CHUNKS_PER_THREAD : 1;
    stack s = {products, units, chunks < units ? chunks : units, is_narrow};
    parallel_for(stack_chunk, &s, s.chunks, threads);
    free(products);
    return 0;
}
